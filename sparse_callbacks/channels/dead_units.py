"""Which units of a group are dead under the masks, and may go."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from sparse_callbacks.channels.constant_propagation.propagation import ArrivingConstants
from sparse_callbacks.channels.constants import bias_shifts, constants_after_cuts, foldable, is_read_by_layer
from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.masked_model import active_slices
from sparse_callbacks.channels.proof import GroupChange


def with_dead_units(
    group: Group,
    surgery: Surgery,
    cuts: Cuts,
    masks: Mapping[str, Tensor],
    arriving_before: Callable[[], Mapping[str, ArrivingConstants]],
) -> tuple[GroupChange, Cuts]:
    """What is dead in ``group``, and the cuts with it; nothing is cut here.

    Args:
        group: a group that may be cut.
        surgery: holds the model.
        cuts: what is cut already.
        masks: see :class:`~sparse_callbacks.channels.masked_model.Masked`.
        arriving_before: gives the constants that arrive at the consumers of every group in the model without cuts; asked
            only where that decides.
    """
    # unread: masked at all consumers. silent: masked at all producers, or in a follower such as the gain of a norm, so a
    # constant may arrive at the consumers, and the unit can go only if their biases can stand for it.
    unread = ~_alive(group.consumers, group.size, masks, cuts)
    made = _alive(group.producers, group.size, masks, cuts)
    silent = (~made | _muted(group, masks, cuts)) & ~unread
    arriving: dict[str, ArrivingConstants] = {}
    reason = ""
    other = next((c for c in group.consumers if not is_read_by_layer(c, surgery.model)), None)
    if silent.any() and other is not None:
        kind = type(surgery.model.get_submodule(other.module)).__name__
        reason = (
            f"{int(silent.sum())} units that nothing makes stay: {other.parameter} ({kind}) reads them, and constants go into "
            "the bias of an nn.Linear or a convolution alone"
        )
        silent &= False
    if silent.any():
        arriving = constants_after_cuts(group, arriving_before(), cuts, surgery.model)
        constant = foldable(group, arriving, surgery.model)
        stuck = int((silent & ~constant).sum())
        if stuck:
            reason = f"{stuck} units stay: {_why_no_constant(arriving)}"
        silent &= constant
    keep = ~(unread | silent)
    if not keep.any():  # a layer needs a channel at least
        keep[0], reason = True, "all units are dead; one stays"
    added = bias_shifts(group, silent & ~keep, arriving, surgery)
    units = group.producers[0].units
    channels = int((~keep[units[units >= 0]]).sum())
    row = GroupChange(group.name, group.size, int((~keep).sum()), channels, reason)
    return row, cuts.with_group(group, keep, added)


def _why_no_constant(arriving: Mapping[str, ArrivingConstants]) -> str:
    """Why units that nothing makes are not constants where they are read."""
    found = next((a.reason for a in arriving.values() if a.reason), "")
    if found:
        return f"what they hold is not a constant for all inputs and sizes: {found}"
    return "what they hold is not a constant, or one that zero padding would change"


def _alive(members: Sequence[Member], size: int, masks: Mapping[str, Tensor], cuts: Cuts) -> Tensor:
    """Bool [units]: whether some weight of some member is active for the unit, among those that the cuts leave."""
    alive = torch.zeros(size, dtype=torch.bool)
    for member in members:
        mask = masks.get(member.parameter)
        if mask is None:  # a dense layer
            return torch.ones(size, dtype=torch.bool)
        active = active_slices(cuts.without_cut(member.parameter, mask), member.dim, len(member.units))
        alive[member.units[(member.units >= 0) & active]] = True
    return alive


def _muted(group: Group, masks: Mapping[str, Tensor], cuts: Cuts) -> Tensor:
    """Bool [units]: whether some follower has its factors for the unit masked, as the gain of a norm is.

    Behind that follower the channels are constants. Whether they are so where they are read is another question.
    """
    muted = torch.zeros(group.size, dtype=torch.bool)
    for member in group.followers:
        if member.parameter not in masks or member.parameter.rpartition(".")[2] == "bias":
            continue
        alive, has_entry = _alive([member], group.size, masks, cuts), torch.zeros(group.size, dtype=torch.bool)
        has_entry[member.units[member.units >= 0]] = True
        muted |= has_entry & ~alive
    return muted
