"""Thresholds over several layers that a method takes anew at each selection, as it prunes by a score."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import singledispatch
from typing import TYPE_CHECKING

from torch import Tensor

from sparse_callbacks.core.allocations.by_weight import largest_by, least_of
from sparse_callbacks.core.allocations.checks import check_reachable
from sparse_callbacks.core.distributions import Distribution, reads_weights, weight_rules
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.pattern_names import asked_nm
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.selection import Entry, layer_shapes
from sparse_callbacks.core.shards import count_of, size_of
from sparse_callbacks.core.targets import for_layers

if TYPE_CHECKING:
    from sparse_callbacks.core.method import Method

Select = Callable[[str, Mapping[str, Tensor], int], dict[str, Tensor]]
"""Masks by layer for a rule's name, its layers' weights, and the zeros that they share."""


@singledispatch
def renews_thresholds(method: object) -> bool:
    """Whether a method takes a new threshold at each selection where its distribution reads weights, in place of shares
    that are found once. A method registers a function of its own."""
    return False


def are_joint(method: "Method") -> bool:
    """Whether some layers of a method's run share a threshold, so that none of them has a target of its own."""
    # under N:M every layer has that of the pattern, whatever the default distribution is
    return renews_thresholds(method) and reads_weights(method.distribution) and asked_nm(method) is None


def without_thresholds(distribution: Distribution, sparsity: float) -> Distribution:
    """``distribution`` with ``sparsity`` for each layer that shares a threshold; they come to the same total."""
    if isinstance(distribution, Mapping):
        return {glob: sparsity if reads_weights(rule) else rule for glob, rule in distribution.items()}
    return {"*": sparsity} if reads_weights(distribution) else distribution


def refuse_unreachable(method: "Method", entries: Sequence[Entry]) -> None:
    """Refuse a target at which not all layers that share a threshold keep what its rule says.

    Args:
        method: the method that plans.
        entries: all parameters of the model.

    Raises:
        ValueError: says which sparsity is the highest that can be reached.
    """
    shapes = layer_shapes(entries)
    for rule, layers in joint_layers(method, entries).items():
        check_reachable({layer: shapes[layer] for layer in layers}, method.target_sparsity, least_of(rule))


def joint_layers(method: "Method", entries: Iterable[Entry]) -> dict[str, list[str]]:
    """The layers that share a threshold, by the name of its rule.

    Args:
        method: the method of the run.
        entries: the parameters whose layers are asked about.
    """
    if not are_joint(method):
        return {}
    chosen = [e for e in entries if not e.reason]
    rules = weight_rules(for_layers(method.distribution, chosen), [x for e in chosen for x in e.layers])
    found: dict[str, list[str]] = {}
    for layer, rule in rules.items():
        found.setdefault(rule, []).append(layer)
    return found


def may_empty(method: "Method") -> bool:
    """Whether a threshold may leave a layer without any weight."""
    rules = method.distribution.values() if isinstance(method.distribution, Mapping) else [method.distribution]
    return are_joint(method) and any(isinstance(r, str) and reads_weights(r) and least_of(r) == 0 for r in rules)


def joint_masks(
    method: "Method",
    names: Iterable[str],
    weights: Mapping[str, Tensor],
    sparsity: float,
    among: Mapping[str, Tensor] | None = None,
    select: Select | None = None,
) -> dict[str, Tensor]:
    """Masks of the layers in ``names`` that share a threshold, by layer.

    Args:
        method: the method of the run.
        names: names of the parameters whose masks are made now; the others have thresholds of their own.
        weights: the weights of their layers by layer name.
        sparsity: the fraction of zeros that the layers of one rule come to.
        among: bool masks by layer, of the weights that may stay; None: all.
        select: makes the masks of one rule; None: those with the largest magnitudes or scores stay.
    """
    found: dict[str, Tensor] = {}
    for rule, layers in joint_layers(method, [method.weights.entries[n] for n in names]).items():
        members = {layer: weights[layer] for layer in layers}
        size = sum(map(size_of, members.values()))
        zeros = zeros_for(sparsity, size)
        if select is not None:
            found |= select(rule, members, zeros)
            continue
        allowed = None if among is None else {layer: among[layer] for layer in layers}
        left = size if allowed is None else sum(map(count_of, allowed.values()))
        # a run that goes on longer steps back along its curve: the masks then have fewer than planned, and keep them
        found |= largest_by(rule, members, min(left, size - zeros), allowed)
    return found


def joint_names(method: "Method", entries: Iterable[Entry]) -> set[str]:
    """Names of the parameters some of whose layers share a threshold."""
    listed = [e for e in entries if not e.reason]
    joint = _joint(method, listed)
    return {e.name for e in listed if joint.intersection(e.layers)}


def planned_total(method: "Method", entries: Sequence[Entry], targets: Mapping[str, float]) -> int:
    """Planned zeros of all selected parameters.

    In a run every optimizer has a threshold of its own, as they step at different times, and rounds its own zeros down; a
    plan without a run does not know the optimizers.

    Args:
        method: the method that plans.
        entries: all parameters of the model.
        targets: target sparsity by layer.
    """
    zeros, names = method.parameter_zeros(entries, targets), joint_names(method, entries)
    total = sum(n for name, n in zeros.items() if name not in names)
    sizes = {layer: e.size // e.parts for e in entries if not e.reason for layer in e.layers}
    # of a parameter only some of whose layers share a threshold, the others have targets of their own
    joint = _joint(method, entries)
    others = [layer for e in entries if e.name in names for layer in e.layers if layer not in joint]
    total += sum(zeros_for(targets[layer], sizes[layer]) for layer in others)
    runs = [names for names in method.owners.owns if names] if entries is method.entries else []
    by_name = {e.name: e for e in entries if not e.reason}
    for run in runs or [list(by_name)]:
        for layers in joint_layers(method, [by_name[n] for n in run]).values():
            total += zeros_for(method.target_sparsity, sum(sizes[layer] for layer in layers))
    return total


def with_joint_rows(method: "Method", plan: Plan, entries: Sequence[Entry], targets: Mapping[str, float]) -> Plan:
    """``plan``, with no zeros of their own for parameters whose layers share a threshold.

    Args:
        method: the method that plans.
        plan: the plan with a row for each of ``entries``.
        entries: all parameters of the model.
        targets: target sparsity by layer.
    """
    names = joint_names(method, entries)
    return plan.joined(planned_total(method, entries, targets), names) if names else plan


def _joint(method: "Method", entries: Iterable[Entry]) -> set[str]:
    return {layer for layers in joint_layers(method, entries).values() for layer in layers}
