"""The channel groups that a method may prune, and their masks."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.slim import slimmable_groups


def prunable_groups(
    model: nn.Module,
    example_input: Any,
    exclude: Sequence[str] | None,
    owned: Iterable[Sequence[str]],
    stem: str | None = None,
) -> tuple[list[Group], dict[str, str]]:
    """The groups whose channels a method may remove, and the reason of every other group by its name.

    Args:
        model, example_input, exclude: see :func:`~sparse_callbacks.channels.slim.slimmable_groups`.
        owned: for each optimizer the names of its parameters that may be masked. All consumers of a group must belong
            to one optimizer, which then decides when the group is pruned.
        stem: name of a layer whose outputs stay.

    Raises:
        ValueError: there is no such group.
    """
    found, optimizers = slimmable_groups(model, example_input, exclude), [set(names) for names in owned]
    # what the network itself forbids is listed first, then what the user's choices leave
    reasons = {g.name: g.reason for g in found if g.reason}
    reasons |= {g.name: reason for g in found if not g.reason and (reason := _why_not_chosen(g, optimizers, stem))}
    if len(reasons) == len(found):
        raise ValueError(
            "no channels can be removed from this model: "
            + "; ".join(f"outputs of {name}: {reason}" for name, reason in reasons.items())
            + ". Change include=, exclude=, keep_dense= or prune_stem=, or use a method that prunes single weights."
        )
    return [g for g in found if g.name not in reasons], reasons


def _why_not_chosen(group: Group, optimizers: Sequence[set[str]], stem: str | None) -> str:
    """Why the channels of a group that could be cut stay; empty where they may be pruned."""
    if any(p.module == stem for p in group.producers):
        return f"{stem} is the stem"
    readers = list(dict.fromkeys(c.parameter for c in group.consumers))  # each once, in order
    dense = [name for name in readers if not any(name in names for names in optimizers)]
    if dense:
        return f"{', '.join(dense)} stay dense (see plan())"
    # optimizers step at different times: until the last one has stepped, some readers would still use channels that
    # others have lost
    if not any(names.issuperset(readers) for names in optimizers):
        return f"{', '.join(readers)} are in several optimizers"
    return ""


def kept_units(group: Group, masks: Mapping[str, Tensor]) -> Tensor:
    """Bool [size]: the units of a group that the mask of its first consumer keeps."""
    reader = group.consumers[0]
    # all consumers lose the same units, so the first one speaks for every other
    slices = masks[reader.parameter].movedim(reader.dim, 0).flatten(1).any(1)
    units = reader.units.to(slices.device)
    keep = torch.zeros(group.size, dtype=torch.bool, device=slices.device)
    keep[units[units >= 0]] = slices[units >= 0]
    return keep


def consumer_masks(groups: Sequence[Group], keeps: Sequence[Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Masks of all consumers of the groups, bool, of the shapes of their weights.

    A layer that reads several groups has the masks of all of them.

    Args:
        groups: the groups.
        keeps: for each group the units that it keeps, bool [size].
        params: the weights, by name.
    """
    masks: dict[str, Tensor] = {}
    for group, keep in zip(groups, keeps, strict=True):
        for reader in group.consumers:
            like = params[reader.parameter]
            mask = reader.mask(keep.to(like.device), like.ndim)
            everything = torch.ones_like(like, dtype=torch.bool)
            masks[reader.parameter] = mask & masks.get(reader.parameter, everything)
    return masks
