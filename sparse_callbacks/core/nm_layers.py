"""Layers under N:M: which can have it, their zeros and masks, and what a plan says."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from sparse_callbacks.core.nm_masks import NMPattern, in_groups, why_not_nm
from sparse_callbacks.core.pattern_names import asked_nm
from sparse_callbacks.core.selection import Entry

GROUPS_CHANGED = "update/groups_changed"
"""The key of the share of groups whose masks an update changed."""

LIVE_ALONE = "its layer holds live weights alone"
"""Why a layer that is exchanged already cannot have a pattern of masks."""


def inputs_axis(entry: Entry) -> int:
    """The axis of a stored parameter along which inputs lie: torch stores those of a transposed convolution first."""
    return 0 if entry.transposed else 1


def nm_of(method: object, entry: Entry) -> NMPattern | None:
    """The N:M in which the masks of a parameter are; None where the method keeps none, or the parameter cannot have it.

    Args:
        method: the method of the run.
        entry: the parameter.
    """
    asked = asked_nm(method)
    return None if asked is None or why_no_groups(entry, asked) else asked


def why_no_groups(entry: Entry, pattern: NMPattern) -> str:
    """Why a parameter cannot have the pattern, as a clause; empty where it can."""
    if len(entry.shape) < 2:
        return "it has no inputs"
    if entry.live_alone:
        return LIVE_ALONE
    return why_not_nm(entry.shape, pattern, groups=entry.groups)


def nm_targets(entries: Iterable[Entry], pattern: NMPattern) -> dict[str, int]:
    """Zeros of each layer in the parameters without a reason: M - N in every group.

    Args:
        entries: all parameters; those without a reason can have the pattern.
        pattern: the pattern.
    """
    per_group = pattern.m - pattern.n
    return {layer: e.size // e.parts // pattern.m * per_group for e in entries if not e.reason for layer in e.layers}


def why_other_groups(mask: Tensor, entry: Entry, pattern: NMPattern) -> str:
    """Why a mask is not of the pattern, as a clause that follows its name; empty where it is. A group may have fewer than N
    active weights.

    Args:
        mask: bool, of the shape of the parameter.
        entry: the parameter, which can have the pattern.
        pattern: the pattern.
    """
    axis = inputs_axis(entry)
    for what, along in (("inputs", axis), ("outputs", 1 - axis))[: 1 + pattern.transposable]:
        counts = in_groups(mask, pattern.m, along).sum(-1)
        if (most := int(counts.amax())) > pattern.n:
            return f"has {most} active weights in a group of {pattern.m} {what}, and {pattern} allows {pattern.n}"
    return ""


def changed_groups(
    method: object, entries: Mapping[str, Entry], before: Mapping[str, Tensor], after: Mapping[str, Tensor]
) -> dict[str, float]:
    """The share of groups in which an update changed the mask, by the key of its curve; empty of a method without N:M.

    Args:
        method: the method of the run.
        entries: the sparse parameters by name.
        before: bool masks of the updated parameters, before the update.
        after: masks of these, and perhaps of others.
    """
    if (pattern := asked_nm(method)) is None or not before:
        return {}
    changed = [in_groups(mask != after[n], pattern.m, inputs_axis(entries[n])).any(-1) for n, mask in before.items()]
    # counted where they lie: layers may be on several devices
    return {GROUPS_CHANGED: sum(int(c.sum()) for c in changed) / sum(c.numel() for c in changed)}


def nm_remarks(method: object, entries: Iterable[Entry], zeros: Mapping[str, int]) -> dict[str, str]:
    """What a plan says of the N:M of each sparse parameter, by its name.

    Args:
        method: the method that plans.
        entries: all parameters.
        zeros: planned zeros of the sparse parameters.
    """
    found = {}
    for entry in entries:
        if not entry.reason and zeros.get(entry.name) and (pattern := nm_of(method, entry)) is not None:
            of = "inputs and outputs" if pattern.transposable else "inputs"
            found[entry.name] = f"{pattern}: {pattern.n} of every {pattern.m} {of}"
    return found
