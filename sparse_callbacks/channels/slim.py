"""From masks to a smaller network: channels that nothing reads, or that hold a constant, are removed, and the outputs compared."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.comparison import Check, drawn, one, precise, telling
from sparse_callbacks.channels.constants import arrivals, foldable, shifts
from sparse_callbacks.channels.cuts import Cuts, Surgery, masked_copy
from sparse_callbacks.channels.groups import Group, Member, channel_groups
from sparse_callbacks.channels.proof import Difference, Proof, Row, prove
from sparse_callbacks.core.inspection import copied, quiet, training_branches


@torch.inference_mode(False)
def slim(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example_input: Any,
    *,
    exclude: str | Sequence[str] | None = None,
    inputs: Sequence[Any] = (),
    seconds: float = 60.0,
    seed: int = 0,
) -> tuple[nn.Module, Proof]:
    """A copy of ``model`` without its dead channels, an ordinary module, and a proof that it computes the same as the masked model.

    A channel is dead where every layer that reads it has a mask that is zero for it, or where every layer that makes it has a mask
    that is zero for it and what arrives at its readers is a constant: zero, or else the constant goes into the bias of the reader
    (not through zero padding, which would make it another value at the border). One unit stays in every group.

    Groups are cut one after the other, from the outputs to the inputs, in a copy in eval mode, in float64 where the model runs in
    it. After each the outputs are compared with those of the masked model, on one random sample, and at the end on all of
    ``example_input``, ``inputs`` and the random ones (then, if they differ, after each group on all); a group that changes them, or
    fails, is put back. Where layers run in train mode only, such as auxiliary heads, outputs in train mode are compared too, on
    ``example_input``, norms and dropouts being in eval mode; of branches whose pass fails on it nothing is known.

    What is a constant is judged on the same inputs: ``example_input``, ``inputs``, and two random ones with normal numbers of standard
    deviation 1 and 10, random bools, and integers in another order. Give ``inputs`` on which masks and switches take other values than
    there. Below float32 only what is exactly constant counts.

    Hooks of the model run in every pass, on copies, and stay on the slim model. The model is copied, so it must be one that
    ``copy.deepcopy`` takes; modules with ``torch.nn.utils.prune`` or the old ``weight_norm`` are none before ``prune.remove`` and
    ``remove_weight_norm``.

    Args:
        model: trained; it is left as it is.
        masks: bool masks by parameter name, as a callback's ``masks``: of the parameter's shape, broadcasting against it
            ([1, C, 1, 1]), or [C]: the inputs of a weight (of a transposed convolution: its dimension 0), the entries of a vector.
        example_input: a tensor, a tuple of positional or a mapping of named arguments, on the model's device.
        exclude: globs of module or parameter names whose channels stay.
        inputs: further inputs to compare on, such as batches of real data.
        seconds: time limit of the search for groups.
        seed: of the random inputs.

    Returns:
        the slim model, in the modes of ``model``, and the proof; ``print(proof)`` shows it.

    Raises:
        ImportError: torch-pruning (extra ``channels``) is missing.
        TimeoutError: the search takes too long.
        ValueError: masks that do not fit, or a model that cannot be copied or traced, or whose outputs would show no error.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> mask = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
        >>> small, proof = slim(net, {"2.weight": mask}, torch.zeros(1, 4))
        >>> small[0].out_features, proof.removed
        (3, 3)
    """
    masked, full = masked_copy(model, masks)
    groups = channel_groups(masked, example_input, exclude, seconds)
    given, random = [example_input, *inputs], drawn(masked, example_input, seed)
    cuts, rows, checked = _cut_all(masked, groups, full, [*given, *random])
    small = copied(masked)
    Surgery(small).cut(cuts, [m for g in groups for m in g.members])
    return small, prove(masked, small, rows, checked, given, random)


def slimmable_groups(
    model: nn.Module, example_input: Any, exclude: str | Sequence[str] | None = None, seconds: float = 60.0
) -> list[Group]:
    """:func:`~sparse_callbacks.channels.groups.channel_groups`, each tried out: those whose removal changes the outputs get that as reason.

    Every other unit of a group is masked at its consumers, then removed, and the outputs are compared in the model's own precision,
    as in :func:`slim` also in train mode where layers run in it alone. The model is left as it is.

    Args: see :func:`~sparse_callbacks.channels.groups.channel_groups`.
    """
    groups = channel_groups(model, example_input, exclude, seconds)
    trial = copied(model)
    with quiet(trial):
        branches = training_branches(trial, example_input)
        return [g if g.reason else replace(g, reason=_trial(trial, g, example_input, branches)) for g in groups]


def _trial(model: nn.Module, group: Group, example_input: Any, branches: Sequence[str]) -> str:
    """Why removing every other unit of ``group`` does not leave the outputs as they are; empty where it does."""
    keep = torch.arange(group.size) % 2 == 0
    surgery = Surgery(model)
    try:
        for member in group.consumers:
            surgery.mask(member, keep)
        surgery.cut(Cuts(), group.consumers)
        check = Check(model, [example_input], branches)
        surgery.cut(Cuts().with_group(group, keep), group.members)
        return check.problem()
    finally:
        surgery.restore()


# ---------------------------------------------------------------------- what goes


def _cut_all(
    masked: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor], samples: Sequence[Any]
) -> tuple[Cuts, list[Row], tuple[Difference, torch.dtype]]:
    """Cut every group that can be cut into a copy: the cuts, what became of each group, and the difference at the end."""
    model, samples = precise(masked, samples)
    with quiet(model):
        branches = training_branches(model, samples[0])
        whole, surgery = Check(model, samples, branches), Surgery(model)
        telling(whole.expected, samples)
        single = one(model, samples[-2])  # random, of standard deviation 1
        quick = Check(model, [single], training_branches(model, single) if branches else ())
        cuts, rows = _cut(groups, surgery, masks, samples, quick)
        if whole.problem():  # some input shows what the single sample did not
            surgery.restore()
            cuts, rows = _cut(groups, surgery, masks, samples, whole)
        return cuts, rows, whole.difference()


def _cut(
    groups: Sequence[Group], surgery: Surgery, masks: Mapping[str, Tensor], samples: Sequence[Any], check: Check
) -> tuple[Cuts, list[Row]]:
    """Cut one group after the other, the last first; the cuts that pass the check, and what became of each group."""
    cuts, rows = Cuts(), []
    for group in reversed(groups):
        row = Row(group.name, group.size, note=group.reason)
        if not group.reason:
            row, trial = _tried(group, surgery, cuts, masks, samples)
            surgery.cut(trial, group.members)
            if row.units and (problem := check.problem()):
                surgery.cut(cuts, group.members)
                row, trial = replace(row, units=0, channels=0, note=problem), cuts
            cuts = trial
        rows.append(row)
    return cuts, rows[::-1]


def _tried(group: Group, surgery: Surgery, cuts: Cuts, masks: Mapping[str, Tensor], samples: Sequence[Any]) -> tuple[Row, Cuts]:
    """What should go of ``group``, and the cuts with it."""
    unread = ~_alive(group.consumers, group.size, masks, cuts)
    silent = ~_alive(group.producers, group.size, masks, cuts) & ~unread
    arriving, note = {}, ""
    if silent.any():
        arriving = arrivals(group, surgery, cuts, samples)
        constant = foldable(group, arriving, surgery.model)
        if stuck := int((silent & ~constant).sum()):
            note = f"{stuck} units stay: what they hold is no constant, or one that zero padding would change"
        silent &= constant
    keep = ~(unread | silent)
    if not keep.any():  # a layer without channels is none
        keep[0], note = True, "all units are dead; one stays"
    added = shifts(group, silent & ~keep, arriving, surgery)
    units = group.producers[0].units
    row = Row(group.name, group.size, int((~keep).sum()), int((~keep[units[units >= 0]]).sum()), note)
    return row, cuts.with_group(group, keep, added)


def _alive(members: Sequence[Member], size: int, masks: Mapping[str, Tensor], cuts: Cuts) -> Tensor:
    """Bool [units]: some weight of some member is active for it, among those that the cuts leave."""
    alive = torch.zeros(size, dtype=torch.bool)
    for member in members:
        if (mask := masks.get(member.parameter)) is None:
            return torch.ones(size, dtype=torch.bool)
        active = cuts.rest(member.parameter, mask.cpu()).movedim(member.dim, 0).flatten(1).any(1)
        alive[member.units[(member.units >= 0) & active]] = True
    return alive
