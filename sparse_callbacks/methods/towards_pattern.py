"""Masks on the way to a pattern: what the pattern keeps, and the largest of the other weights.

GMP and DPF prune in this way, so that the network arrives at the pattern exactly when its curve ends.
"""

from collections.abc import Mapping

from torch import Tensor

from sparse_callbacks.core.checkpoint import SavedRun, shown
from sparse_callbacks.core.distributions import Distribution, reads_weights
from sparse_callbacks.core.fan_in_layers import rows_of_largest, shared_group
from sparse_callbacks.core.method import DEFAULT_SPARSITY, Method
from sparse_callbacks.core.nm_layers import inputs_axis
from sparse_callbacks.core.nm_masks import NMPattern, in_groups, nm_mask
from sparse_callbacks.core.ops import keep_largest, zeros_for
from sparse_callbacks.core.pattern_arguments import sparsity_beside
from sparse_callbacks.core.pattern_names import FanIn, asked_nm, asked_pattern, parsed
from sparse_callbacks.core.patterns import largest_columns
from sparse_callbacks.core.schedules import Schedule, pruning_curve
from sparse_callbacks.core.selection import entry_of
from sparse_callbacks.core.state_claims import Zeros, rises_to
from sparse_callbacks.core.transposable import transposable_mask


def curve_towards(method: Method, sparsity: float | str | Schedule | None, distribution: Distribution) -> Schedule:
    """The curve of the sparsity of a method that is made, and has its ``pattern`` already.

    Args:
        method: the method.
        sparsity: as it was given, None where it was not.
        distribution: as it was given.

    Raises:
        ValueError: an argument contradicts the pattern.
    """
    pattern = getattr(method, "pattern", None)
    asked = parsed(pattern)
    if isinstance(asked, FanIn) and reads_weights(distribution):
        raise ValueError(
            f"pattern={pattern!r} with distribution={shown(distribution)}: under one threshold over all layers no layer has a fan-in of "
            "its own. Give distribution='uniform' or another that shares out the target, or leave pattern= out."
        )
    given = None if sparsity is None else pruning_curve(sparsity)
    final = sparsity_beside(method, pattern, None if given is None else given.final, distribution)
    return given or pruning_curve(DEFAULT_SPARSITY if final is None else final)


def mask_towards(
    method: Method, layer: str, weight: Tensor, sparsity: float, among: Tensor | None = None
) -> Tensor | None:
    """The mask of a layer on its way to the pattern of a method; None without a pattern.

    Args:
        method: the method of the run.
        layer: the name of the layer.
        weight: the weights of the layer.
        sparsity: the sparsity that the layer has come to.
        among: bool, of the shape of ``weight``, the weights that may stay; None: all.
    """
    if asked_pattern(method) is None:
        return None
    size, entry = weight.numel(), entry_of(method.weights.entries, layer)
    planned = method.planned_zeros(layer, size)
    if (pattern := asked_nm(method)) is not None:
        kept = kept_by(pattern, weight, inputs_axis(entry), among)
    elif (group := shared_group(method)) is not None:
        # a column that was kept so far is whole, so each block has enough of them
        kept = largest_columns(weight, (size - planned) // len(weight), group, among)
    else:
        kept = rows_of_largest(weight, size - planned, entry, among)
    zeros = zeros_for(sparsity, size)
    # under a transposable pattern some room of a tile may be left, and then the layer ends with more zeros than planned
    return kept if zeros >= planned else with_others(kept, weight, zeros, among)


def figures_towards(method: Method, masks: Mapping[str, Tensor]) -> dict[str, float]:
    """N over time: the most active weights that a group of inputs has after an update; empty of a method without N:M.

    Args:
        method: the method of the run.
        masks: the masks of the update by parameter name.
    """
    if (pattern := asked_nm(method)) is None:
        return {}
    entries, held = method.weights.entries, {**method.weights.held_masks, **masks}
    counts = (in_groups(mask, pattern.m, inputs_axis(entries[n])).sum(-1) for n, mask in held.items())
    return method.own_figures(n=float(max(int(c.amax()) for c in counts)))


def possible_zeros_towards(method: Method, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    """What the masks of a run on its way may count, for :func:`~sparse_callbacks.core.state_claims.possible_zeros`.

    Args:
        method: the method of the run.
        saved: the saved run.
        planned: planned zeros by parameter name.
    """
    pattern = asked_nm(method)
    if pattern is None or not pattern.transposable:
        return rises_to(planned)
    return [Zeros((name,), range(saved.masks[name].numel())) for name in planned]


def kept_by(pattern: NMPattern, weight: Tensor, axis: int = 1, among: Tensor | None = None) -> Tensor:
    """Mask of the weights that a pattern keeps by their magnitude.

    Args:
        pattern: the pattern.
        weight: (outputs, inputs, *kernel).
        axis: the axis of the inputs.
        among: bool, of the shape of ``weight``, the weights that may stay; None: all.
    """
    magnitudes = weight.detach().abs()
    if not pattern.transposable:
        return nm_mask(magnitudes, pattern.n, pattern.m, axis, among)
    if among is None:
        return transposable_mask(magnitudes, pattern.n, pattern.m, axis)
    return transposable_mask(magnitudes * among, pattern.n, pattern.m, axis) & among


def with_others(kept: Tensor, weight: Tensor, zeros: int, among: Tensor | None = None) -> Tensor:
    """``kept``, and the largest magnitudes among the other weights, so that ``zeros`` positions are pruned: all but the
    smallest others. It has more zeros where fewer weights may stay, and fewer where ``kept`` leaves fewer.

    Args:
        kept: bool, of the shape of ``weight``.
        weight: the weights of a layer.
        zeros: positions that are pruned.
        among: bool, of the shape of ``weight``, the weights that may stay, those of ``kept`` among them; None: all.
    """
    others = ~kept if among is None else among & ~kept
    wanted = weight.numel() - zeros - int(kept.count_nonzero())
    return kept | keep_largest(weight, min(max(0, wanted), int(others.count_nonzero())), among=others)
