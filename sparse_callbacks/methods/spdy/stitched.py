"""The loss of a network whose layers are pruned by magnitude, each to a level of its own."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.calibration import Calibration
from sparse_callbacks.core.ops import keep_largest, zeros_for
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.weights import SparseWeights


class Stitched:
    """A network that is pruned by magnitude and measured again and again, from the same dense weights.

    Use it in a ``with`` block, which gives the dense weights back.

    Args:
        model: the network.
        entries: all parameters of it; those without a reason are pruned.
        levels: the sparsities that each layer may have.
        calibration: the batches that the loss is taken on.
    """

    def __init__(
        self,
        model: nn.Module,
        entries: Sequence[Entry],
        levels: Mapping[str, Sequence[float]],
        calibration: Calibration,
    ) -> None:
        self._levels, self._calibration = levels, calibration
        selected = {e.name: e for e in entries if not e.reason}
        self._params = {n: p for n, p in model.named_parameters() if n in selected}
        # masks are set later: to give them to the constructor is to wait for the other ranks
        self._weights = SparseWeights(self._params, selected, {})
        self._now: dict[str, int] = {}  # the level that each layer has in the parameters
        self._known: dict[tuple[int, ...], float] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within, parameters hold pruned weights; afterwards they hold their own again."""
        self._dense = {n: p.detach().clone() for n, p in self._params.items()}
        try:
            yield
        finally:
            self._weights.write_values(self._dense)
            self._now, self._dense = {}, {}

    def loss(self, chosen: Mapping[str, int]) -> float:
        """Mean loss over the samples with these levels, the index of one by layer; the same on every rank.

        Asked for once for each choice of levels: many coefficients lead to the same one.
        """
        key = tuple(chosen[layer] for layer in self._levels)
        if key not in self._known:
            self._prune(chosen)
            with self._calibration.losses(order=0) as losses:
                found = [(float(one.loss), one.samples or 1) for one in losses]
            mean = math.fsum(loss * samples for loss, samples in found) / sum(samples for _, samples in found)
            # ranks must take the same way, and the last bit of a loss may be another on another device
            self._known[key] = distributed.of_first_rank(mean if math.isfinite(mean) else math.inf)
        return self._known[key]

    def _prune(self, chosen: Mapping[str, int]) -> None:
        for name, entry in self._weights.entries.items():
            if all(self._now.get(layer) == chosen[layer] for layer in entry.layers):
                continue
            self._weights.write_values({name: self._dense[name]})
            self._weights.set_mask(name, self._weights.by_layer(name, self._mask_of(chosen), self._dense[name]))
            self._weights.write_masked([name])
            self._now |= {layer: chosen[layer] for layer in entry.layers}

    def _mask_of(self, chosen: Mapping[str, int]) -> Callable[[str, Tensor], Tensor]:
        def mask(layer: str, weight: Tensor) -> Tensor:
            size = weight.numel()
            return keep_largest(weight, size - zeros_for(self._levels[layer][chosen[layer]], size))

        return mask
