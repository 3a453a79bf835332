"""Updates of methods that drop and grow at a constant fan-in."""

from collections.abc import Mapping

from torch import Tensor

from sparse_callbacks.core.fan_in import as_rows, from_rows, moved_fan_in
from sparse_callbacks.core.fan_in_layers import ablated_units, ablation_of
from sparse_callbacks.core.method import Method


def moved_rows(method: Method, name: str, mask: Tensor, scores: Tensor, fraction: float) -> Tensor:
    """The mask of a parameter after an update (:func:`~sparse_callbacks.core.fan_in.moved_fan_in` of each of its layers).

    Args:
        method: the method of the run.
        name: the name of the parameter.
        mask: its mask before the update.
        scores: score of every position to come, by magnitude.
        fraction: the share of planned weights that the update replaces.
    """
    entry = method.weights.entries[name]

    def moved(layer: str, *tensors: Tensor) -> Tensor:
        size, shape = tensors[0].numel(), tensors[0].shape
        before, weight, grow = (as_rows(t, entry) for t in tensors)
        planned = size - method.planned_zeros(layer, size)
        return from_rows(moved_fan_in(before, weight, grow, planned, fraction, ablation_of(method)).mask, shape, entry)

    return method.weights.by_layer(name, moved, mask, method.params[name].detach(), scores)


def ablation_figures(method: Method, new: Mapping[str, Tensor]) -> dict[str, float]:
    """Output units without weights after an update, over all sparse parameters; empty for a method that ablates none.

    Args:
        method: the method of the run.
        new: the masks of the update by parameter name.
    """
    if ablation_of(method) is None:
        return {}
    masks = {**method.weights.held_masks, **new}
    return {"update/ablated_units": float(ablated_units(masks, method.weights.entries))}
