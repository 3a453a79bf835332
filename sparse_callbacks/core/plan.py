"""Plan of a callback: the target sparsity of every parameter, as a table to read before training."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from sparse_callbacks.core.attachment import Choice
from sparse_callbacks.core.awaited import AWAITED
from sparse_callbacks.core.selection import NOT_TRAINED, Entry

_MASKED = Choice("masked")


@dataclass(frozen=True)
class Row:
    """One parameter of the model, as the plan has it.

    Attributes:
        name: name of the parameter.
        shape: its shape.
        size: number of its weights.
        zeros: number of weights that are pruned at the target; None where one threshold over all layers decides in training.
        reason: why it stays dense; empty where it becomes sparse.
        remark: what else there is to say of a sparse one, such as the pattern of its mask.
        storage: ``"masked"`` (of dense ones too), ``"sparse"``, ``"grouped"``, or ``"decided at fit"``.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    zeros: int | None
    reason: str
    remark: str = ""
    storage: str = "masked"

    @property
    def sparsity(self) -> float | None:
        """Target fraction of zeros, after rounding down to whole weights; None where ``zeros`` is."""
        return None if self.zeros is None else self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class Plan:
    """Every parameter with its target. ``str(plan)`` is the table; iterate for the rows.

    ``total`` is the sparsity over the selected weights (those without a reason, or dense by the distribution's choice),
    ``model`` over all parameters.

    Attributes:
        title: first line of the table.
        rows: every parameter of the model, in its order.
        selected: names of the parameters that are sparse, or dense by the distribution's choice.
        joint: number of zeros that all selected weights have together where some share a threshold; None where each row has
            its own.
        decided_by: what else decides during training how many zeros there are, such as a budget; ``total`` and ``model`` are 0
            then.
        remark: a sentence about all rows.

    Example:
        >>> import torch
        >>> from sparse_callbacks import RigL
        >>> plan = RigL(0.9, distribution="uniform").plan(torch.nn.Sequential(torch.nn.Linear(20, 10)))
        >>> plan.total, plan.zeros, plan["0.bias"].reason
        (0.9, 180, 'bias')
    """

    title: str
    rows: tuple[Row, ...]
    selected: frozenset[str]
    joint: int | None = None
    decided_by: str = ""
    remark: str = ""

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is not a parameter of the model. Known: {', '.join(r.name for r in self.rows)}.")

    @property
    def weights(self) -> int:
        """Number of selected weights."""
        return sum(r.size for r in self.rows if r.name in self.selected)

    @property
    def zeros(self) -> int:
        """Planned zeros of all selected weights."""
        return sum(r.zeros or 0 for r in self.rows) if self.joint is None else self.joint

    @property
    def total(self) -> float:
        """Planned sparsity over the selected weights."""
        return self.zeros / max(1, self.weights)

    @property
    def model(self) -> float:
        """Planned sparsity over all parameters of the model."""
        return self.zeros / max(1, sum(r.size for r in self.rows))

    @property
    def note(self) -> str:
        """What the table alone does not make plain, as a sentence: most weights are not trained; empty otherwise."""
        awaited = sum(r.size for r in self.rows if r.reason in AWAITED)
        untrained = awaited + sum(r.size for r in self.rows if r.reason.startswith(NOT_TRAINED))
        if untrained <= self.weights:
            return ""
        share = (
            f" {awaited:,} have a share of the target, for they become sparse once they are trained: leave layers that are "
            "never trained out with exclude=."
            if awaited
            else ""
        )
        return (
            f"Of {self.weights + untrained:,} weights that could be sparse {untrained:,} are not trained and stay dense. "
            f"The other {self.weights:,} become sparse; where they are adapters, as in LoRA, the network that they adapt "
            f"stays dense.{share}"
        )

    def joined(self, zeros: int | None = None, names: Collection[str] | None = None) -> "Plan":
        """The plan of a method with one threshold over several layers.

        The threshold decides during training how many weights of each parameter are zeros.

        Args:
            zeros: the number of zeros that all selected weights have; default: as many as are planned here.
            names: the parameters that share a threshold; None: all that are selected.
        """
        shared = self.selected if names is None else names
        rows = tuple(replace(r, zeros=None) if r.name in shared else r for r in self.rows)
        return replace(self, rows=rows, joint=self.zeros if zeros is None else zeros)

    def with_storages(self, choices: Mapping[str, Choice]) -> "Plan":
        """The plan with the storage of each sparse parameter, and what there is to say of it.

        Args:
            choices: storages by parameter name; what is missing is masked.
        """
        return replace(self, rows=tuple(_stored(row, choices.get(row.name, _MASKED)) for row in self.rows))

    def __str__(self) -> str:
        stored = any(r.storage != "masked" for r in self.rows)
        head = ("parameter", "shape", "weights", "sparsity", "zeros", *(["storage"] if stored else []), "why dense")
        body = [
            (
                r.name,
                "x".join(map(str, r.shape)) or "scalar",
                f"{r.size:,}",
                "dense"
                if r.name not in self.selected
                else self.decided_by or "joint"
                if r.sparsity is None
                else f"{r.sparsity:.4f}",
                "" if r.name not in self.selected or r.zeros is None else f"{r.zeros:,}",
                *([r.storage if r.name in self.selected and r.zeros != 0 else ""] if stored else []),
                "; ".join(filter(None, (r.reason, r.remark))),
            )
            for r in self.rows
        ]
        if any(r.remark for r in self.rows):
            head = (*head[:-1], "why dense, or how sparse")
        known = f"{self.total:.4f}", f"{self.model:.4f}", f"{self.zeros:,}"
        total, model, zeros = (self.decided_by, self.decided_by, "") if self.decided_by else known
        foot: list[tuple[str, ...]] = [
            ("sparsity/total", "", f"{self.weights:,}", total, zeros),
            ("sparsity/model", "", f"{sum(r.size for r in self.rows):,}", model, ""),
        ]
        foot = [(*row, *[""] * (len(head) - len(row))) for row in foot]
        table = aligned([head, *body, *foot], rules=(1, 1 + len(body)))
        return "\n".join([self.title, *table, *filter(None, [self.remark, self.note])])


def _stored(row: Row, choice: Choice) -> Row:
    if row.reason and row.reason not in AWAITED:
        return row
    note = "; ".join(filter(None, (row.remark, choice.note)))
    return replace(row, storage="decided at fit" if choice.storage == "auto" else choice.storage, remark=note)


def aligned(rows: Sequence[tuple[str, ...]], rules: tuple[int, ...], right: Collection[int] = (2, 3, 4)) -> list[str]:
    """Text columns: numbers to the right, words to the left, a rule before each row index in ``rules``.

    Args:
        rows: the cells of each row, as many in each.
        rules: indices of rows that have a rule above them.
        right: indices of the columns with numbers; by default weights, sparsity and zeros.
    """
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for index, row in enumerate(rows):
        if index in rules:
            lines.append("  ".join("-" * w for w in widths))
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return lines


def plan_rows(
    entries: Sequence[Entry], zeros: Mapping[str, int], remarks: Mapping[str, str] | None = None
) -> tuple[Row, ...]:
    """Rows for all ``entries``.

    Args:
        entries: all parameters.
        zeros: planned zeros of each selected parameter by its name.
        remarks: what else there is to say of sparse parameters, by name.
    """
    return tuple(
        Row(
            e.name,
            e.full_shape,
            e.size,
            zeros.get(e.name, 0),
            e.reason or ("" if zeros.get(e.name) else "dense by the distribution"),
            (remarks or {}).get(e.name, ""),
        )
        for e in entries
    )
