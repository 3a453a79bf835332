"""Checks of what every rule for sharing out a target is given."""

import math
from collections.abc import Mapping
from numbers import Real
from typing import Any

from sparse_callbacks.core.ops import zeros_for

Shapes = Mapping[str, tuple[int, ...]]


def fraction(value: Any, what: str) -> float:
    """A sparsity as a float.

    Args:
        value: what was given for it.
        what: the argument and its value, for the error.

    Raises:
        ValueError: it is not a number in [0, 1).
    """
    if isinstance(value, bool) or not isinstance(value, Real) or not 0.0 <= float(value) < 1.0:
        raise ValueError(f"{what} is not in [0, 1): it is the fraction of zeros. For 90 % zeros write 0.9.")
    return float(value)


def own_sparsities(shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None) -> dict[str, float]:
    """The sparsities in `custom` as floats, after all arguments of a rule were found good.

    Raises:
        ValueError: a sparsity outside [0, 1), an empty layer, or a name in `custom` that is not a layer.
    """
    fraction(sparsity, f"sparsity={sparsity!r}")
    for name, shape in shapes.items():
        if math.prod(shape) < 1:
            raise ValueError(
                f"{name} with shape {tuple(shape)} has no weight to prune. Leave it out, e.g. by exclude=[{name!r}]."
            )
    own = dict(custom or {})
    if unknown := [name for name in own if name not in shapes]:
        raise ValueError(f"custom names layers that do not exist: {', '.join(unknown)}. Layers: {', '.join(shapes)}.")
    return {name: fraction(value, f"custom: the sparsity {value!r} of {name}") for name, value in own.items()}


def check_reachable(shapes: Shapes, sparsity: float, least: int = 1) -> None:
    """Refuse a target that no masks have in which each layer keeps its least number of weights.

    Args:
        shapes: (out, in, *kernel) by layer name.
        sparsity: the target, in [0, 1).
        least: weights that each layer keeps; all, where it has fewer.

    Raises:
        ValueError: says which sparsity is the highest that can be reached.
    """
    sizes = [math.prod(shape) for shape in shapes.values()]
    total, kept = sum(sizes), sum(min(least, size) for size in sizes)
    if zeros_for(sparsity, total) > total - kept:
        weights = "one" if least == 1 else str(least)
        raise ValueError(
            f"sparsity={sparsity!r} cannot be reached: each of the {len(shapes)} layers keeps at least "
            f"{weights} of their {total} weights. The highest reachable sparsity is {(total - kept) / total:.6g}: lower the "
            "target, or exclude small layers."
        )
