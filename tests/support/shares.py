"""A distribution that looks at the weights of a model."""

from collections.abc import Mapping, Sequence

from torch import nn

from sparse_callbacks.core.selection import Entry


class BySize:
    """Sparsities that follow from the values of the weights: `least` and up to 0.5 more, by their mean magnitude."""

    def __init__(self, least: float = 0.4) -> None:
        self.least, self.asked = least, 0

    def __repr__(self) -> str:
        return f"BySize({self.least})"

    def shares(self, model: nn.Module, entries: Sequence[Entry]) -> Mapping[str, float]:
        self.asked += 1
        params = dict(model.named_parameters())
        means = {e.name: float(params[e.name].detach().abs().mean()) for e in entries if not e.reason}
        return {layer: self.least + min(0.5, means[e.name]) for e in entries if not e.reason for layer in e.layers}
