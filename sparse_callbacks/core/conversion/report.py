"""What a conversion did to each layer, as a table, and the checkpoint of the converted network."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.core.checkpoint import VERSION
from sparse_callbacks.core.nm_counts import chance_of_nm
from sparse_callbacks.core.plan import aligned
from sparse_callbacks.core.saved_bits import with_bits

SHOWN_PATTERNS = ((2, 4), (4, 8), (8, 16))


@dataclass(frozen=True)
class ConvertedLayer:
    """What became of one weight.

    Attributes:
        name: the name of the weight in ``named_parameters()``.
        shape: its shape.
        size: its number of weights.
        kept: how many of them may be other than zero now; ``size`` where it stays dense.
        before: with the masked weights, the mean squared error of the layer's outputs over rows and outputs; None where it stays
            dense.
        after: the same with the weights that it has now.
        power: mean square of its dense outputs: errors are shown as shares of it.
        how: what its weights are: ``"as masked"``, ``"absorbed means"``, ``"least squares"`` or ``"Adam"``.
        rows: rows of data that its errors are over: positions of samples.
        active: kept weights of an output, rounded down.
        reason: why it stays dense; empty where it is converted.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    kept: int
    before: float | None = None
    after: float | None = None
    power: float = 0.0
    how: str = ""
    rows: int = 0
    active: int = 0
    reason: str = ""

    @property
    def remark(self) -> str:
        """How it was fitted, and whether there was enough data; or why it stays dense."""
        if self.how not in ("least squares", "Adam") or self.rows >= self.active:
            return self.reason or self.how
        few = f"{self.rows} rows of data for {self.active} weights of an output, so the error says little: give more"
        return f"{self.how}; {few}"

    def share(self, error: float | None) -> str:
        """An error as a share of the mean square of the dense outputs, as text; empty where there is none."""
        return "" if error is None else f"{error / self.power:.4f}" if self.power else f"{error:.4f}"


@dataclass(frozen=True)
class Conversion:
    """The evidence of a conversion. ``str(conversion)`` is the table.

    Attributes:
        pattern: the pattern, such as ``"2:4"``.
        layers: what became of each weight that could be sparse, in the order of the network.
        masks: bool masks of the converted weights by name.
        batches: batches of the data.
        sparsity_given: the fraction of zeros that the converted weights had before.
        norms: batch norms that were re-estimated.
    """

    pattern: str
    layers: tuple[ConvertedLayer, ...]
    masks: Mapping[str, Tensor] = field(repr=False)
    batches: int
    sparsity_given: float
    norms: int = 0

    def __getitem__(self, name: str) -> ConvertedLayer:
        for layer in self.layers:
            if layer.name == name:
                return layer
        raise KeyError(
            f"{name!r} is not a weight that could be sparse. Known: {', '.join(row.name for row in self.layers)}."
        )

    @property
    def left_dense(self) -> dict[str, str]:
        """Why each weight that stays dense does, by name."""
        return {layer.name: layer.reason for layer in self.layers if layer.reason}

    @property
    def sparsity(self) -> float:
        """The fraction of zeros of the converted weights."""
        converted = [layer for layer in self.layers if not layer.reason]
        return 1 - sum(layer.kept for layer in converted) / sum(layer.size for layer in converted)

    @property
    def chances(self) -> dict[str, float]:
        """For 2:4, 4:8 and 8:16 the probability that a group of random zeros fits already, at the sparsity that was given."""
        return {f"{n}:{m}": chance_of_nm(self.sparsity_given, n, m) for n, m in SHOWN_PATTERNS}

    def checkpoint(self, model: nn.Module) -> dict[str, Any]:
        """What ``torch.save`` writes and ``Static(from_checkpoint=)`` reads: the weights, and the masks as bits.

        Args:
            model: the converted network.

        Example:
            >>> import torch
            >>> from sparse_callbacks import convert, saved_masks
            >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).eval()
            >>> smaller, report = convert(net, "2:4", data=[torch.randn(32, 4)], keep_dense=None)
            >>> sorted(saved_masks(report.checkpoint(smaller)))
            ['0.weight', '2.weight']
        """
        weights = model.state_dict()
        # zeros of an unstructured network in layers that stay dense: Static would not train such weights without a mask
        active = {name: weights[name] != 0 for name in self.left_dense if name in weights}
        masks = {**self.masks} | {name: mask for name, mask in active.items() if mask.any() and not mask.all()}
        state = {"version": VERSION, "arguments": {"pattern": repr(self.pattern)}, "masks": with_bits(masks)}
        return {"state_dict": weights, "conversion": state}

    def __str__(self) -> str:
        head = ("parameter", "shape", "weights", "kept", "error masked", "error now", "how, or why dense")
        body = [
            (
                layer.name,
                "x".join(map(str, layer.shape)),
                f"{layer.size:,}",
                "dense" if layer.reason else f"{layer.kept:,}",
                layer.share(layer.before),
                layer.share(layer.after),
                layer.remark,
            )
            for layer in self.layers
        ]
        chances = ", ".join(f"{pattern} {chance:.4f}" for pattern, chance in self.chances.items())
        return "\n".join(
            [
                f"{self.pattern}: sparsity {self.sparsity:.4f} of the converted weights, which had {self.sparsity_given:.4f}",
                *aligned([head, *body], rules=(1,), right=(2, 3, 4, 5)),
                f"errors: mean squared error over the mean square of the dense outputs, on {self.batches} batches",
                f"a random group fits already at sparsity {self.sparsity_given:.4f}: {chances}",
                f"batch norms re-estimated: {self.norms}",
            ]
        )
