"""Target sparsity of each layer and planned zeros of each parameter."""

from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from sparse_callbacks.core.distributions import Distribution, resolve
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.selection import Entry, layer_shapes


def layer_targets(distribution: Distribution, entries: Sequence[Entry], sparsity: float) -> dict[str, float]:
    """Target sparsity of every layer in the selected parameters.

    Args:
        distribution: how the layers share the target.
        entries: all parameters of the model; those without a reason are selected.
        sparsity: the target over all of the selected weights.
    """
    if isinstance(distribution, Mapping):  # a glob on a parameter's name also means the layers stacked in it
        selected = [e for e in entries if not e.reason]
        distribution = {g: v for glob, v in distribution.items() for g in _layer_globs(glob, selected)}
    return resolve(distribution, layer_shapes(entries), sparsity)


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
