"""What a callback is going to do, parameter by parameter, as a table to read before training."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from sparse_callbacks.selection import Entry


@dataclass(frozen=True)
class Row:
    """One parameter: ``zeros`` of its ``size`` weights will be pruned at the target; ``reason`` says why it stays dense."""

    name: str
    shape: tuple[int, ...]
    size: int
    zeros: int
    reason: str

    @property
    def sparsity(self) -> float:
        """Target fraction of zeros, after rounding down to whole weights."""
        return self.zeros / self.size if self.size else 0.0


@dataclass(frozen=True)
class Plan:
    """Every parameter with its target. ``str(plan)`` is the table; iterate for the rows.

    ``total`` is the sparsity over the selected weights (those without a reason, or dense by the distribution's choice),
    ``model`` over all parameters.
    """

    title: str
    rows: tuple[Row, ...]
    selected: frozenset[str]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, name: str) -> Row:
        for row in self.rows:
            if row.name == name:
                return row
        raise KeyError(f"{name!r} is no parameter of the model. Known: {', '.join(r.name for r in self.rows)}.")

    @property
    def total(self) -> float:
        chosen = [r for r in self.rows if r.name in self.selected]
        return sum(r.zeros for r in chosen) / max(1, sum(r.size for r in chosen))

    @property
    def model(self) -> float:
        return sum(r.zeros for r in self.rows) / max(1, sum(r.size for r in self.rows))

    def __str__(self) -> str:
        head = ("parameter", "shape", "weights", "sparsity", "zeros", "why dense")
        body = [
            (
                r.name,
                "x".join(map(str, r.shape)) or "scalar",
                f"{r.size:,}",
                f"{r.sparsity:.4f}" if r.name in self.selected else "dense",
                f"{r.zeros:,}" if r.name in self.selected else "",
                r.reason,
            )
            for r in self.rows
        ]
        chosen = [r for r in self.rows if r.name in self.selected]
        foot = [
            ("sparsity/total", "", f"{sum(r.size for r in chosen):,}", f"{self.total:.4f}", f"{sum(r.zeros for r in chosen):,}", ""),
            ("sparsity/model", "", f"{sum(r.size for r in self.rows):,}", f"{self.model:.4f}", "", ""),
        ]
        return "\n".join([self.title, *_aligned([head, *body, *foot], rules=(1, 1 + len(body)))])


def _aligned(rows: Sequence[tuple[str, ...]], rules: tuple[int, ...]) -> list[str]:
    """Text columns: numbers to the right, words to the left, a rule before each row index in ``rules``."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    right = {2, 3, 4}
    lines = []
    for index, row in enumerate(rows):
        if index in rules:
            lines.append("  ".join("-" * w for w in widths))
        cells = (c.rjust(w) if i in right else c.ljust(w) for i, (c, w) in enumerate(zip(row, widths, strict=True)))
        lines.append("  ".join(cells).rstrip())
    return lines


def plan_rows(entries: Sequence[Entry], zeros: dict[str, int]) -> tuple[Row, ...]:
    """Rows for all ``entries``; ``zeros`` holds the planned zeros of the selected parameters by name."""
    return tuple(
        Row(e.name, e.full_shape, e.size, zeros.get(e.name, 0), e.reason or ("" if zeros.get(e.name) else "dense by the distribution"))
        for e in entries
    )
