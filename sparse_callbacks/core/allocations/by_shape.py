"""Rules that share a target out by the shapes of layers: uniform, uniform+, and Erdos-Renyi."""

import math
from collections.abc import Mapping

from sparse_callbacks.core.allocations.checks import Shapes, own_sparsities
from sparse_callbacks.core.argument_types import checked_after
from sparse_callbacks.core.ops import zeros_for

LAST_AT_LEAST = 0.2  # uniform+: the share of its weights that the last layer keeps


@checked_after
def uniform(shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None = None) -> dict[str, float]:
    """The same sparsity in every layer, except those in `custom`.

    Args:
        shapes: (out, in, *kernel) by layer name.
        sparsity: fraction of zeros, in [0, 1).
        custom: sparsity of layers that leave the budget.

    Raises:
        ValueError: a sparsity outside [0, 1), or a name in `custom` that is not a layer.

    >>> uniform({"a": (4, 4), "b": (2, 2)}, 0.5, custom={"b": 0.0})
    {'a': 0.5, 'b': 0.0}
    """
    own = own_sparsities(shapes, sparsity, custom)
    return {name: own.get(name, float(sparsity)) for name in shapes}


@checked_after
def uniform_plus(shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None = None) -> dict[str, float]:
    """Uniform, but the first convolution dense and the last layer at least a fifth (Gale et al. 2019, section 3).

    The other layers share one density, so that all together have the target's number of weights; where it would be below
    0.2, the last layer takes exactly sparsity 0.8 and the others share what is left. The order of layers is that of
    `shapes`, and a layer is a convolution where its shape has three dimensions or more; without one no layer is dense.

    Args:
        shapes: (out, in, *kernel) by layer name.
        sparsity: target over the layers that are not in `custom`, in [0, 1).
        custom: sparsity of layers that leave the budget; the first convolution and the last layer are of the others.

    Raises:
        ValueError: a sparsity outside [0, 1), an empty layer, a name in `custom` that is not a layer, or a target that
            leaves nothing for the layers between the first and the last.

    >>> uniform_plus({"conv": (2, 2, 3, 3), "fc": (10, 200), "out": (2, 50)}, 0.9)["out"]
    0.8
    """
    own = own_sparsities(shapes, sparsity, custom)
    size = {name: math.prod(shape) for name, shape in shapes.items() if name not in own}
    total = sum(size.values())
    keep = total - zeros_for(sparsity, total)
    dense = next((name for name in size if len(shapes[name]) > 2), None)
    others = [name for name in size if name != dense]
    found = dict.fromkeys(size, 0.0)
    left = keep - size.get(dense or "", 0)
    last = others[-1] if others and others[-1] == list(size)[-1] else None
    if last is not None and left < LAST_AT_LEAST * sum(size[n] for n in others):
        others.remove(last)
        found[last] = 1 - LAST_AT_LEAST
        left -= size[last] - zeros_for(found[last], size[last])
    if keep < total:
        if left <= 0 or not others:
            raise ValueError(_nothing_left(sparsity, dense, last, keep))
        found |= dict.fromkeys(others, 1 - left / sum(size[n] for n in others))
    return {name: own[name] if name in own else found[name] for name in shapes}


def _nothing_left(sparsity: float, dense: str | None, last: str | None, keep: int) -> str:
    whole = [f"all of {dense}"] if dense else []
    fifth = [f"a fifth of {last}"] if last else []
    return (
        f"sparsity={sparsity!r} leaves {keep} weights, and uniform_plus keeps {' and '.join(whole + fifth)}: nothing remains "
        "for the other layers. Lower the target, or choose another distribution."
    )


@checked_after
def erdos_renyi(
    shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None = None, power: float = 1.0
) -> dict[str, float]:
    """Density in proportion to (in + out) / (in * out) (Mocanu et al. 2018); otherwise as `erdos_renyi_kernel`.

    Args:
        shapes: (out, in, *kernel) by layer name.
        sparsity: target over the layers that are not in `custom`, in [0, 1).
        custom: sparsity of layers that leave the budget.
        power: exponent of the proportion; 0 makes it uniform.
    """
    # the first two dimensions: the rule counts neurons or channels, whatever the kernel between them
    return _in_proportion({name: tuple(shape[:2]) for name, shape in shapes.items()}, shapes, sparsity, custom, power)


@checked_after
def erdos_renyi_kernel(
    shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None = None, power: float = 1.0
) -> dict[str, float]:
    """Density in proportion to sum(shape) / prod(shape) (Evci et al. 2020, section 3), the reference code's rule.

    The factor is such that the layers together have the target's number of weights. While some layer would need a
    density above 1, all layers with the largest one become dense together and the rest is shared out anew.

    Args:
        shapes: (out, in, *kernel) by layer name.
        sparsity: target over the layers that are not in `custom`, in [0, 1).
        custom: sparsity of layers that leave the budget.
        power: exponent of the proportion; 0 makes it uniform.

    Raises:
        ValueError: a sparsity outside [0, 1), an empty layer, or a name in `custom` that is not a layer.

    >>> found = erdos_renyi_kernel({"fc1": (300, 784), "fc2": (100, 300), "fc3": (10, 100)}, 0.9)
    >>> {name: round(s, 4) for name, s in found.items()}
    {'fc1': 0.9204, 'fc2': 0.7698, 'fc3': 0.0}
    """
    return _in_proportion(shapes, shapes, sparsity, custom, power)


def _in_proportion(
    counted: Shapes, shapes: Shapes, sparsity: float, custom: Mapping[str, float] | None, power: float
) -> dict[str, float]:
    """Densities factor * (sum / product of the `counted` dimensions) ** power, capped at 1."""
    own = own_sparsities(shapes, sparsity, custom)
    size = {name: math.prod(shape) for name, shape in shapes.items()}
    raw = _powers(counted, power)
    shared = [name for name in shapes if name not in own]
    dense: set[str] = set()
    factor = 0.0
    # A factor that asks for a density above 1 is of no use. The layers that ask for most become dense; the others get
    # what these cannot take, which may lift the next ones above 1, so the factor is found anew.
    while rest := [name for name in shared if name not in dense]:
        # the reference floors each layer's zeros before it sums, so the budget is not floor(sparsity * total)
        budget = sum(size[n] - zeros_for(sparsity, size[n]) for n in rest) - sum(
            zeros_for(sparsity, size[n]) for n in dense
        )
        factor = budget / sum(raw[n] * size[n] for n in rest)
        largest = max(raw[n] for n in rest)
        if factor * largest <= 1.0:
            break
        # equality of floats is meant: layers of one shape have the same value to the last bit
        dense |= {n for n in rest if raw[n] == largest}
    found = {n: 0.0 if n in dense else 1.0 - factor * raw[n] for n in shared}
    return {name: own[name] if name in own else found[name] for name in shapes}


def _powers(counted: Shapes, power: float) -> dict[str, float]:
    """(sum / product of the dimensions) ** power of each layer."""
    try:
        raw = {name: (sum(dims) / math.prod(dims)) ** power for name, dims in counted.items()}
    except OverflowError:
        raw = {}
    # a float has no room for what a huge power makes of a proportion
    if len(raw) < len(counted) or not all(0.0 < value < math.inf for value in raw.values()):
        raise ValueError(f"power={power!r} leaves no proportion between the layers' densities. Give for example 1.")
    return raw
