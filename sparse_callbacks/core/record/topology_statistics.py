"""Statistics of connections over time: what moved, what was ever active, ages, fan-in and fan-out."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.record.fans import Fans, fans_of_layer, fans_of_mask, groups_of
from sparse_callbacks.core.record.layer_history import LayerHistory, Overlap, summed
from sparse_callbacks.core.shards import WHOLE, layout_of
from sparse_callbacks.core.weights import SparseWeights

_STEPS = "steps"  # the optimizer step of each look, int64 [looks]


class TopologyHistory:
    """Looks at the masks of a run from time to time, and compares each with the first and with the one before.

    Of the connections that are active at a look::

        churn              the share that was not active at the look before
        distance_previous  1 - |A and B| / |A or B|, the Jaccard distance to the mask of the look before
        distance_first     the same to the first mask
        ever_active        positions active at some look so far over all positions (the R of ITOP)
        mean_age           optimizer steps since the look at which a connection last became active, on average
        fan_in, fan_out    connections of each output, and of each input: smallest, median and largest
        dead_in, dead_out  outputs without an input, and inputs without an output

    What comes and goes between two looks is not seen. A returned connection has age 0. Of convolutions the first five
    compare weights, and fans and dead units are of channels: a connection is a slice of the kernel with an active weight.

    The memory that it holds is stated at :class:`~sparse_callbacks.core.record.layer_history.LayerHistory`: at sparsity 0.9
    0.58 bytes for each weight under a mask.

    Args:
        model: the model of the run, which knows the groups of convolutions.

    Reference: Liu, Yin, Mocanu, Pechenizkiy: Do We Actually Need Dense Over-Parameterization? In-Time
    Over-Parameterization in Sparse Training. ICML 2021, for ``ever_active``.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._state: dict[str, Tensor] = {_STEPS: torch.empty(0, dtype=torch.int64)}
        self.left_out: dict[str, str] = {}
        """Why no statistics are kept of a layer, by the name of its weight."""

    def look(self, step: int, weights: Sequence[SparseWeights]) -> tuple[dict[str, float | None], dict[str, Any]]:
        """Compare the masks with those of earlier looks.

        Args:
            step: optimizer steps taken.
            weights: those of all methods of the run.

        Returns:
            Figures of all layers together, by their full names (``topology/churn``), and of each layer by the name of its
            weight. None stands where there was no look before.
        """
        steps = self._state[_STEPS] = torch.cat([self._state[_STEPS], torch.tensor([step])])
        look, overlaps, layers = steps.numel() - 1, dict[str, Overlap](), dict[str, Any]()

        def age(births: Tensor) -> int:
            counts = torch.bincount(births, minlength=steps.numel()).cpu()
            return int((counts * (step - steps)).sum())

        for mine in weights:
            names = [n for n in mine.params if not self._leaves_out(mine, n)]
            for name, groups in groups_of(self._model, names).items():
                overlaps[name], fans = self._look_at(mine, name, groups, look, age)
                found = {} if fans is None else fans.figures()
                layers[name] = {"active": overlaps[name].active, **overlaps[name].figures(), **found}
        figures = {f"topology/{key}": value for key, value in summed(overlaps).figures().items()}
        return figures | {"topology/dead_units": sum(figure.get("dead_in", 0) for figure in layers.values())}, layers

    def _look_at(
        self, weights: SparseWeights, name: str, groups: int, look: int, age: Callable[[Tensor], int]
    ) -> tuple[Overlap, Fans | None]:
        history, layer = LayerHistory(self._state, name), weights.layers_stored.get(name)
        if layer is not None:
            return history.look_at_layer(layer, look, age), fans_of_layer(layer)
        mask = weights.held_masks[name]
        # gates may close biases and gains too, which connect nothing
        fans = fans_of_mask(mask, weights.entries[name], groups) if mask.ndim > 1 else None
        return history.look_at_mask(mask, look, age), fans

    def _leaves_out(self, weights: SparseWeights, name: str) -> bool:
        if layout_of(weights.params[name]) is WHOLE:
            return False
        self.left_out[name] = (
            "its mask lies in shards on several processes, each of which knows a part of its units alone"
        )
        return True

    def state(self) -> dict[str, Tensor]:
        """Tensors by name, for a checkpoint: copies are not made."""
        return dict(self._state)

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what :meth:`state` gave."""
        self._state = dict(state)
