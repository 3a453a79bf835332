"""Masks that removed nothing, and what the proof says of them."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import Tensor, nn

from sparse_callbacks.channels.cuts import Cuts
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.masked_model import active_slices
from sparse_callbacks.channels.proof import GroupChange

NOTHING_DEAD = "no unit is dead: under the masks something still makes and something still reads each of them"
"""Reason of a group that masks touch and that loses nothing by them."""
NOT_ITS_DOING = "its mask makes none of the units dead that were removed, and no other"
"""Reason of a mask in a group that loses units by other masks."""
SHIFT_ALONE = "a masked bias removes no channel by itself: the weights or the gain that make the channel are not masked"
"""The same of a bias."""
OVER_ALL_CHANNELS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
"""Norms in which no channel can go without changing the others."""


def with_idle_masks(
    rows: Sequence[GroupChange], groups: Sequence[Group], cuts: Cuts, masks: Mapping[str, Tensor], model: nn.Module
) -> list[GroupChange]:
    """The rows of the groups, with a reason for every mask that cuts weights and removed no unit.

    The reason stands in the rows of the groups that the mask's parameter belongs to, where these lost nothing. Otherwise
    it has a row of its own, under the name of the parameter, whose size is the number of its entries.

    Args:
        rows: what became of each group.
        groups: the groups, in the same order.
        cuts: what was removed.
        masks: see :class:`~sparse_callbacks.channels.masked_model.Masked`.
        model: the masked model.
    """
    found = list(rows)
    for name, mask in masks.items():
        if mask.all():
            continue
        touched = [place for place, group in enumerate(groups) if _touches(group, name)]
        if any(_removes(groups[place], name, mask, model, cuts) for place in touched):
            continue
        for place in touched:
            if not (found[place].units or found[place].reason):
                found[place] = replace(found[place], reason=NOTHING_DEAD)
        if not any(found[place].reason and not found[place].units for place in touched):
            found.append(
                GroupChange(name, model.get_parameter(name).numel(), reason=_why_idle(name, bool(touched), model))
            )
    return found


def _touches(group: Group, name: str) -> bool:
    """Whether a parameter belongs to a group: as a member, as the bias of one, or to a layer that no trace has found."""
    module = name.rpartition(".")[0]
    return bool(_entries(group, name)) or (not group.members and group.name == module)


def _entries(group: Group, name: str) -> list[tuple[Member, int]]:
    """The members whose slices a parameter has along one of its dimensions, and that dimension."""
    module, _, local = name.rpartition(".")
    own = [(m, m.dim) for m in group.members if m.parameter == name]
    # a bias has one entry for each output of its layer, or for each channel of its norm
    beside = [(m, 0) for m in group.producers + group.followers if m.module == module] if local == "bias" else []
    return own or beside


def _removes(group: Group, name: str, mask: Tensor, model: nn.Module, cuts: Cuts) -> bool:
    """Whether some slice that was removed with units of ``group`` is masked as a whole."""
    for member, dim in _entries(group, name):
        stays = cuts.kept.get(member.key)
        if stays is None:
            continue
        gone = ~stays & (member.units >= 0)
        is_masked = ~active_slices(mask, dim, model.get_parameter(name).shape[dim])
        # the bias of a grouped transposed convolution is as long as all groups, its weight only as one
        if bool((gone.repeat(len(is_masked) // len(gone)) & is_masked).any()):
            return True
    return False


def _why_idle(name: str, in_a_group: bool, model: nn.Module) -> str:
    """Why the mask of a parameter removed nothing that a group could say itself."""
    module = model.get_submodule(name.rpartition(".")[0])
    kind = type(module).__name__
    if isinstance(module, OVER_ALL_CHANNELS):
        return f"{kind} takes its statistics over several channels, so none of them can be removed"
    if in_a_group:
        return SHIFT_ALONE if name.rpartition(".")[2] == "bias" else NOT_ITS_DOING
    return f"no group of channels has this parameter of {kind}"
