"""First masks of N:M and of constant fan-in: the largest numbers of each group, or of each row."""

from torch import Tensor

from sparse_callbacks.core.fan_in_layers import has_fan_in, rows_of_largest
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.nm_layers import inputs_axis, nm_of
from sparse_callbacks.core.nm_selection import chosen_in_groups
from sparse_callbacks.core.pattern_names import asked_nm
from sparse_callbacks.core.selection import entry_of


def starts_by_pattern(method: Method) -> bool:
    """Whether :func:`largest_of_pattern` makes the first masks of a method."""
    return asked_nm(method) is not None or has_fan_in(method)


def largest_of_pattern(method: Method, layer: str, scores: Tensor) -> Tensor:
    """Mask of the largest scores of a layer that the method's pattern allows.

    Args:
        method: a method that keeps N:M or a constant fan-in.
        layer: the name of the layer.
        scores: numbers that are not negative, of the shape of the layer.
    """
    entry = entry_of(method.weights.entries, layer)
    if (pattern := nm_of(method, entry)) is not None:
        return chosen_in_groups(scores, pattern, inputs_axis(entry))
    return rows_of_largest(scores, scores.numel() - method.planned_zeros(layer, scores.numel()), entry)
