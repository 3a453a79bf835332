"""Target sparsity of each layer and planned zeros of each parameter."""

from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from torch import Tensor

from sparse_callbacks.core.distributions import Distribution, resolve
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.selection import Entry, layer_shapes


def layer_targets(
    distribution: Distribution,
    entries: Sequence[Entry],
    sparsity: float,
    weights: Mapping[str, Tensor] | None = None,
) -> dict[str, float]:
    """Target sparsity of every layer in the selected parameters.

    Args:
        distribution: how the layers share the target.
        entries: all parameters of the model; those without a reason are selected.
        sparsity: the target over all of the selected weights.
        weights: the weights by layer name, where the distribution reads them.
    """
    return resolve(for_layers(distribution, entries), layer_shapes(entries), sparsity, weights)


def for_layers(distribution: Distribution, entries: Iterable[Entry]) -> Distribution:
    """``distribution`` with globs on layers: a glob on a parameter's name also means the layers stacked in it."""
    if not isinstance(distribution, Mapping):
        return distribution
    selected = [e for e in entries if not e.reason]
    return {g: v for glob, v in distribution.items() for g in _layer_globs(glob, selected)}


def on_the_way(target: float, now: float, final: float, way: float) -> float:
    """Sparsity of a layer while that of all selected weights moves along a curve; at the curve's end its own target.

    Zeros rise in the same proportion in each layer, and where the curve falls active weights do.

    Args:
        target: the layer's own target.
        now: the value of the curve, over all selected weights.
        final: its value at the end.
        way: the part of the curve's way that is done. It decides where the curve stays at zero, which has no proportion,
            and layers have targets of their own.

    >>> on_the_way(0.8, now=0.25, final=0.5, way=0.3)
    0.4
    >>> on_the_way(0.8, now=0.0, final=0.0, way=0.5)
    0.4
    >>> on_the_way(0.5, now=0.5, final=0.0, way=0.1)
    0.75
    """
    if now > final:
        return now if target == final else 1.0 - (1.0 - target) * ((1.0 - now) / (1.0 - final))
    return target * (now / final if final else way)


def zeros_by_parameter(entries: Sequence[Entry], targets: Mapping[str, float]) -> dict[str, int]:
    """Planned zeros of every selected parameter.

    Args:
        entries: all parameters of the model; those without a reason are selected.
        targets: target sparsity by layer.
    """
    # counted layer by layer, as masks are made: zeros are rounded down in each layer
    return {e.name: sum(zeros_for(targets[x], e.size // e.parts) for x in e.layers) for e in entries if not e.reason}


def _layer_globs(glob: str, entries: Sequence[Entry]) -> list[str]:
    """The globs that mean for layers what ``glob`` means for parameters."""
    matching = [e for e in entries if fnmatchcase(e.name, glob)]
    if not matching:
        return [glob]  # it may name a single layer, such as "in_proj_weight[[]0]"
    found = []
    if any(fnmatchcase(e.layers[0], glob) for e in matching):
        found.append(glob)
    if any(not fnmatchcase(e.layers[0], glob) for e in matching):
        found.append(f"{glob}[[]*]")  # "[[]" is how a glob writes the character "["
    return found
