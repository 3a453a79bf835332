"""From masks to a smaller network: dead channels are removed, and the outputs compared."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.attention_exchange import put_back_attention, put_slim_attention
from sparse_callbacks.channels.comparison import TOLERANCES, Difference, Reference, Tolerance, outputs_on
from sparse_callbacks.channels.comparison_inputs import (
    Precise,
    as_it_runs,
    first_entry,
    precise,
    random_samples,
    refuse_telling_nothing,
)
from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.groups import Group, groups_of_copy
from sparse_callbacks.channels.idle_masks import with_idle_masks
from sparse_callbacks.channels.joint_trials import reasons_to_stay
from sparse_callbacks.channels.masked_model import under_masks
from sparse_callbacks.channels.obstacles import refuse_uncuttable, refuse_without_values
from sparse_callbacks.channels.own_precision import exceeded_limit, refuse_differing
from sparse_callbacks.channels.proof import GroupChange, Proof, outputs_of_both, prove
from sparse_callbacks.channels.trials import Trials
from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.inspection import copied, copied_around_parameters, quiet, training_branches
from sparse_callbacks.core.storages.exchange import dense_twin


# parameters that are made in inference mode could never be trained
@torch.inference_mode(False)
@checked
def slim(
    model: nn.Module,
    masks: Mapping[str, Tensor],
    example_input: Any,
    *,
    exclude: str | Sequence[str] | None = None,
    inputs: Sequence[Any] = (),
    seconds: float = 60.0,
    seed: int = 0,
    replace_modules: bool = True,
) -> tuple[nn.Module, Proof]:
    """A copy of ``model`` without its dead channels, and a proof that it computes the same as the masked model.

    A channel is dead in two cases. Either no layer reads it: the masks of all its readers are zero for it. Or no layer
    makes it: the masks of all its makers, or that of the gain of a norm behind them, are zero for it, and what its
    readers get is a constant. A constant of zero is left out; any other goes into the bias of the reader, but not through
    zero padding, which would make it another value at the border. One unit stays in every group.

    All groups are cut together, in a copy in eval mode, in float64 where the model runs in it, and the outputs compared
    with those of the masked model on all of ``example_input``, ``inputs`` and the random inputs. If they differ, groups
    are tried by halves, from the outputs to the inputs, on one random sample, and where that does not show what all inputs
    show, again on all of them: each group on top of those accepted. A group that changes the outputs, or makes the model
    fail, is put back. Where the slim model gives other outputs in the precision of ``model`` than the masked one, by more
    than rounding can, since its forward pass goes by the type of its tensors, all of this is done again in that precision.

    Where layers run in train mode only, such as auxiliary heads, outputs in train mode are compared too, on
    ``example_input``, with norms and dropouts in eval mode. Nothing is known of branches that fail on it.

    What is a constant is proved along the forward pass, so that it is one for other inputs, masks and sizes too; see
    :mod:`sparse_callbacks.channels.constant_propagation`. Below float32 only what is exactly constant counts. The random
    inputs hold normal numbers of standard deviation 1 and 10, random bools, and integers in another order.

    Hooks of the model run in every pass, on copies, and stay on the slim model. The model must be one that
    ``copy.deepcopy`` copies; for modules with ``torch.nn.utils.prune`` or the old ``weight_norm``, call
    ``prune.remove`` or ``remove_weight_norm`` first.

    Args:
        model: the trained model; it is left as it is.
        masks: bool masks by parameter name, such as a callback's ``masks``. Weights that they cut are usually zero
            already; of others there is a warning, and a line in the proof. A mask has the parameter's shape, or
            broadcasts against it ([1, C, 1, 1]), or is [C]: for the inputs of a weight (dimension 0 of a transposed
            convolution), or for the entries of a vector.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments, on the model's device.
        exclude: globs of module or parameter names whose channels stay.
        inputs: further inputs to compare on, such as batches of real data.
        seconds: time limit for the search for groups.
        seed: seed of the random inputs.
        replace_modules: whether an ``nn.MultiheadAttention`` that loses heads may become a
            :class:`~sparse_callbacks.channels.slim_attention.SlimAttention`; otherwise its heads stay.

    Returns:
        the slim model, an ordinary module in the modes of ``model``, and the proof; ``print(proof)`` shows it.

    Raises:
        TimeoutError: the search takes too long.
        ValueError: there are no masks, one does not fit or is not bool, the model cannot be copied or traced, is scripted, on
            the meta device or has layers without sizes, or its outputs cannot be looked at or would show no error, or
            are others in the precision of the model whatever is put back.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from sparse_callbacks import slim
        >>> net = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 2))
        >>> mask = torch.tensor([1, 0, 1, 0, 0, 1]).bool()
        >>> small, proof = slim(net, {"2.weight": mask}, torch.zeros(1, 4))
        >>> small[0].out_features, proof.removed
        (3, 3)
    """
    refuse_uncuttable(model)
    refuse_without_values(model)
    model = dense_twin(model)
    small, full_masks, cut = under_masks(model, masks)
    if cut:
        warnings.warn(_foreign(cut), stacklevel=3)  # 3: the decorator's frame lies between
    # forward passes may write to what modules hold besides parameters, so what is returned never runs
    running = copied_around_parameters(small)
    if replace_modules:
        for whole in (running, small):
            put_slim_attention(whole)
    groups = groups_of_copy(running, example_input, exclude, seconds)
    put_back_attention(running)  # what the slim model is compared with has the modules that it had
    given, drawn = [example_input, *inputs], random_samples(running, example_input, seed)
    samples = [*given, *drawn.samples]
    cuts, rows, checked = _cut_all(precise(small, samples), groups, full_masks)
    # the cuts were tried in float64 where that is possible, and are made in the precision of the model
    trial, idle = _cut(small, cuts, rows, groups, full_masks)
    compared = outputs_of_both(running, trial, given, drawn)
    limits = exceeded_limit(running, samples, compared) if any(r.units for r in rows) else None
    if limits is not None:
        # the forward pass goes by the type of its tensors, so all is decided again in the type that they have
        small = under_masks(model, masks).model
        if replace_modules:
            put_slim_attention(small)
        kept = [g if r.units else replace(g, reason=g.reason or r.reason) for g, r in zip(groups, rows, strict=True)]
        cuts, rows, checked = _cut_all(as_it_runs(small, samples), kept, full_masks, limits)
        trial, idle = _cut(small, cuts, rows, groups, full_masks)
        compared = outputs_of_both(running, trial, given, drawn)
        if any(r.units for r in rows):
            refuse_differing(compared, limits)
    proof = prove(running, trial, idle, checked, compared, example_input)
    return small, replace(proof, cut=sum(cut.values()))


@checked
def slimmable_groups(
    model: nn.Module,
    example_input: Any,
    exclude: str | Sequence[str] | None = None,
    seconds: float = 60.0,
    replace_modules: bool = True,
) -> list[Group]:
    """:func:`~sparse_callbacks.channels.groups.channel_groups`, with every group tried out.

    Every other unit of a group is masked in its consumers, then removed, and the outputs are compared in the model's
    own precision, or in float64 where it gives outputs in half precision; as in :func:`slim`, also in train mode where
    layers run in that mode alone. A group whose removal changes the outputs gets that as its reason. Several groups are
    tried at a time where that would show what each of them alone does, see
    :mod:`sparse_callbacks.channels.joint_trials`. The model is left as it is.

    Args:
        model: the model; it is left as it is.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments, on the model's device.
        exclude: globs of module or parameter names whose channels stay.
        seconds: time limit for the search for groups.
        replace_modules: whether an ``nn.MultiheadAttention`` that loses heads may become a
            :class:`~sparse_callbacks.channels.slim_attention.SlimAttention`; otherwise its heads stay.

    Returns:
        The groups, in the order of the network; one that cannot lose channels has a ``reason``.

    Raises:
        TimeoutError: the search takes too long.
        ValueError: the model cannot be copied or traced, or its outputs cannot be looked at.
    """
    refuse_uncuttable(model)
    refuse_without_values(model)
    trial = copied(dense_twin(model))
    if replace_modules:
        put_slim_attention(trial)
    groups = groups_of_copy(trial, example_input, exclude, seconds)
    context: Callable[[], AbstractContextManager[None]] = nullcontext
    branches = _branches(trial, example_input)
    if branches is None:
        trial, [example_input], _, branches, context = precise(trial, [example_input])
    opened = [g for g in groups if not g.reason]
    with quiet(trial), context():
        reasons = reasons_to_stay(trial, opened, example_input, branches)
    found = iter(reasons)
    return [g if g.reason else replace(g, reason=next(found)) for g in groups]


def _branches(model: nn.Module, sample: Any) -> list[str] | None:
    """The branches that only run in train mode; None where some output is in half precision, in which little would show."""
    with quiet(model):
        if any(t.is_floating_point() and t.dtype not in TOLERANCES for t in outputs_on(model, [sample])):
            return None
        return training_branches(model, sample)


def _foreign(cut: Mapping[str, int]) -> str:
    """The warning for masks that cut weights which are not zero.

    It is not an error: masks that somebody has made for a dense network cut such weights on purpose.
    """
    listed = ", ".join(f"{count:,} of {name}" for name, count in cut.items())
    return (
        f"the masks cut weights that are not zero ({listed}), so the slim network computes what the masked model does, "
        "and not what this model does. If they are the masks of a training, the weights are not: others were loaded "
        "since. Test the checkpoint with its callback, trainer.test(ckpt_path=...), and take the callback's masks then."
    )


# ---------------------------------------------------------------------- what is removed


def _cut(
    small: nn.Module,
    cuts: Cuts,
    rows: Sequence[GroupChange],
    groups: Sequence[Group],
    masks: Mapping[str, Tensor],
) -> tuple[nn.Module, list[GroupChange]]:
    """Cut the masked model ``small`` in place.

    Returns:
        a copy with the same parameters, to run, and the rows with those of masks that removed nothing.
    """
    idle = with_idle_masks(rows, groups, cuts, masks, small)
    Surgery(small).cut(cuts, [m for g in groups for m in g.members])  # cut parameters are replaced
    put_back_attention(small)  # where it lost no head
    return copied_around_parameters(small), idle


def _cut_all(
    looked_at: Precise, groups: Sequence[Group], masks: Mapping[str, Tensor], tolerance: Tolerance = None
) -> tuple[Cuts, list[GroupChange], tuple[Difference, torch.dtype]]:
    """Cut every group that can be cut, in a copy of the masked model and on its samples.

    Returns:
        the cuts, what became of each group, and the difference of outputs at the end with its precision.
    """
    model, samples, known, branches, context = looked_at
    with quiet(model), context():
        on_all = Reference(model, samples, branches, known, tolerance)
        refuse_telling_nothing(on_all.expected, samples)
        # one entry of the random sample of standard deviation 1: comparing on everything after each trial takes long
        single, outputs = first_entry(model, samples[-2], on_all.expected[-2])
        in_training = training_branches(model, single) if branches else ()
        on_one = Reference(model, [single], in_training, [outputs], tolerance)
        trials = Trials(groups, Surgery(model), masks, samples)
        problem = trials.cut_all(on_all)
        if problem:
            trials.cut(on_one)
            # what was accepted on one entry is compared on everything; where it is all there is, that has been done
            problem = on_all.why_changed() if trials.has_refused else problem
            if problem:  # some input shows what the single entry did not
                trials.cut(on_all, "" if trials.has_refused else problem)
        return trials.cuts, trials.rows, on_all.difference()
