"""From masks to a smaller network: channels that nothing reads, or that hold a constant, are removed, and the outputs compared."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels import Group, Member, channel_groups
from sparse_callbacks.folding import arrivals, foldable, shifts
from sparse_callbacks.probing import map_tensors, quiet, tensors_in
from sparse_callbacks.proof import Difference, Proof, Row, compare, outputs, prove
from sparse_callbacks.surgery import Cuts, Surgery, zeroed

TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest relative difference of outputs that counts as equal."""
COARSE = 5e-2  # half precision: a wrong cut differs by more


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
    (not through zero padding, which would make it another value at the border). Groups are cut one after the other, from the
    outputs to the inputs. After each the outputs of a copy in eval mode, in float64 where the model runs in it, are compared with
    those of the masked model, on ``example_input``, ``inputs`` and random ones; a group that changes them, or fails, is put back.
    One unit stays in every group.

    Args:
        model: trained; it is left as it is.
        masks: bool masks by parameter name, as a callback's ``masks``: of the parameter's shape, broadcasting against it
            ([1, C, 1, 1]), or [C]: the inputs of a weight, the entries of a vector.
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
        ValueError: masks that do not fit, or a model that cannot be traced, or whose outputs would show no error.

    Example:
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> mask = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
        >>> small, proof = slim(net, {"2.weight": mask}, torch.zeros(1, 4))
        >>> small[0].out_features, proof.removed
        (3, 3)
    """
    full = {name: _fitted(name, mask, model) for name, mask in masks.items()}
    masked = copy.deepcopy(model)
    for name, mask in full.items():
        owner, _, local = name.rpartition(".")
        masked.get_submodule(owner).register_parameter(local, zeroed(masked.get_parameter(name), ~mask))
    groups = channel_groups(masked, example_input, exclude, seconds)
    given, drawn = [example_input, *inputs], _random(example_input, seed)
    cuts, rows, checked = _cut_all(masked, groups, full, [*given, *drawn])
    small = copy.deepcopy(masked)
    Surgery(small).cut(cuts, [m for g in groups for m in g.members])
    return small, prove(masked, small, rows, checked, given, drawn)


def slimmable_groups(
    model: nn.Module, example_input: Any, exclude: str | Sequence[str] | None = None, seconds: float = 60.0
) -> list[Group]:
    """:func:`~sparse_callbacks.channels.channel_groups`, each tried out: those whose removal changes the outputs get that as reason.

    Every other unit of a group is masked at its consumers, then removed, and the outputs are compared in the model's own precision.
    The model is put back as it was.

    Args: see :func:`~sparse_callbacks.channels.channel_groups`.
    """
    groups = channel_groups(model, example_input, exclude, seconds)
    with quiet(model):
        return [g if g.reason else replace(g, reason=_trial(model, g, example_input)) for g in groups]


def _trial(model: nn.Module, group: Group, example_input: Any) -> str:
    """Why removing every other unit of ``group`` does not leave the outputs as they are; empty where it does."""
    keep = torch.arange(group.size) % 2 == 0
    surgery = Surgery(model)
    try:
        for member in group.consumers:
            surgery.mask(member, keep)
        surgery.cut(Cuts(), group.consumers)
        expected = outputs(model, [example_input])
        surgery.cut(Cuts().with_group(group, keep), group.members)
        return _verdict(model, [example_input], expected)
    finally:
        surgery.restore()


# ---------------------------------------------------------------------- what goes


def _cut_all(
    masked: nn.Module, groups: Sequence[Group], masks: Mapping[str, Tensor], samples: Sequence[Any]
) -> tuple[Cuts, list[Row], tuple[Difference, torch.dtype]]:
    """Cut every group that can be cut into a copy: the cuts, what became of each group, and the difference at the end."""
    check, samples = _precise(masked, samples)
    surgery, cuts, rows = Surgery(check), Cuts(), []
    with quiet(check):
        expected = _telling(outputs(check, samples), samples)
        for group in reversed(groups):
            row = Row(group.name, group.size, note=group.reason)
            if not group.reason:
                row, trial = _tried(group, surgery, cuts, masks, samples)
                surgery.cut(trial, group.members)
                if row.units and (problem := _verdict(check, samples, expected)):
                    surgery.cut(cuts, [*group.members])
                    row, trial = replace(row, units=0, channels=0, note=problem), cuts
                cuts = trial
            rows.append(row)
        return cuts, rows[::-1], (compare(expected, outputs(check, samples)), expected[0].dtype)


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


# ---------------------------------------------------------------------- what is compared


def _verdict(model: nn.Module, samples: Sequence[Any], expected: Sequence[Tensor]) -> str:
    """Why the outputs are not the ``expected`` ones; empty where they are."""
    try:
        found = outputs(model, samples)
    except Exception as error:  # whatever the user's forward does with sizes that it does not expect
        return f"without them the network fails ({type(error).__name__}: {str(error)[:120]})"
    difference = compare(expected, found)
    limit = TOLERANCE.get(expected[0].dtype, COARSE)
    return "" if difference.relative <= limit else f"without them the outputs differ by {difference.relative:.1e} (relative)"


def _precise(masked: nn.Module, samples: Sequence[Any]) -> tuple[nn.Module, list[Any]]:
    """A copy of the model and the samples in float64; in their own precision where the model makes tensors of another by itself."""
    check, doubled = copy.deepcopy(masked).double(), [map_tensors(_double, x) for x in samples]
    try:
        with quiet(check):
            outputs(check, doubled[:1])
    except RuntimeError:
        return copy.deepcopy(masked), list(samples)
    return check, doubled


def _telling(tensors: list[Tensor], samples: Sequence[Any]) -> list[Tensor]:
    """``tensors``, the outputs on ``samples``, found to be such that an error would show in them."""
    if not tensors or not all(bool(t.isfinite().all()) for t in tensors):
        raise ValueError(
            "The masked model gives no finite outputs in eval mode, so nothing can be compared. Look for inf or NaN in its weights and in "
            "example_input, and for a forward pass that returns no tensors."
        )
    each = len(tensors) // len(samples)
    alike = all(torch.equal(a, b) for a, b in zip(tensors[-each:], tensors[-2 * each : -each], strict=True))
    if alike and any(t.is_floating_point() for t in tensors_in(samples[-1])):
        raise ValueError(
            "The masked model gives the same outputs for different random inputs, so a comparison would show no error. Look for a layer "
            "without any active weight, such as a head that is all zeros."
        )
    return tensors


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _random(example_input: Any, seed: int) -> list[Any]:
    """Two inputs of standard normal numbers; what is no floating-point tensor stays as it is."""
    generator = torch.Generator().manual_seed(seed)

    def draw(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator).to(tensor) if tensor.is_floating_point() else tensor

    return [map_tensors(draw, example_input) for _ in range(2)]


def _fitted(name: str, mask: Tensor, model: nn.Module) -> Tensor:
    """``mask`` in the shape of its parameter."""
    parameters = dict(model.named_parameters())
    if name not in parameters:
        known = ", ".join([*parameters][:6])
        raise ValueError(f"masks names {name!r}, and the model has no such parameter. There are for example {known}.")
    shape = parameters[name].shape
    mask = mask.to(parameters[name].device, torch.bool)
    if mask.ndim == 1 and len(shape) > 2:
        mask = mask.view(1, -1, *[1] * (len(shape) - 2))
    try:
        return mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"The mask of {name} has shape {list(mask.shape)} and the parameter {list(shape)}. Give a mask of that shape, or one that "
            "broadcasts against it."
        ) from error
