"""The inputs on which outputs are compared: random ones, single entries, and in which precision."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.comparison import outputs_on
from sparse_callbacks.channels.double_precision import Casts, everything_in_double, made_in_double
from sparse_callbacks.channels.quick_depthwise import quicken_depthwise
from sparse_callbacks.core.inspection import calls_noted, copied, map_tensors, quiet, tensors_in, training_branches

NOISE = 0.01
"""Standard deviation of the noise that is added to an example, in standard deviations of its tensors."""
NOISY_DRAWS = 3
"""How many such inputs are drawn."""


Precise = tuple[nn.Module, list[Any], list[list[Tensor]], list[str], Callable[[], AbstractContextManager[None]]]
"""What :func:`precise` returns."""


def precise(masked: nn.Module, samples: Sequence[Any]) -> Precise:
    """A copy of the model and the samples in float64, where rounding hides no error.

    Casts inside of the model go to float64 too. Where it fails then, for example since it asserts its types, model and
    samples stay as they are.

    Returns:
        the copy, its samples, its outputs on the first of them, the branches that only run in train mode (see
        :func:`~sparse_callbacks.core.inspection.training_branches`), and the context that every pass has to be in.
    """
    try:
        model, doubled = _doubled(masked), [map_tensors(_double, x) for x in samples]
        casts = Casts()
        with everything_in_double(casts):
            found = _looked_at(model, doubled)
        # without any, the passes that follow need not be watched
        return *found, everything_in_double if casts.seen else made_in_double
    except Exception:  # a forward pass may well assert its types
        return as_it_runs(masked, samples)


def as_it_runs(masked: nn.Module, samples: Sequence[Any]) -> Precise:
    """What :func:`precise` gives, in the model's own precision."""
    return *_looked_at(copied(masked), list(samples)), nullcontext


def _looked_at(model: nn.Module, samples: list[Any]) -> tuple[nn.Module, list[Any], list[list[Tensor]], list[str]]:
    with quiet(model):
        with calls_noted(model) as called:
            first = outputs_on(model, samples[:1])
        return model, samples, [first], training_branches(model, samples[0], called)


def _doubled(model: nn.Module) -> nn.Module:
    """A copy in float64, made without a copy in the model's own precision."""
    known: dict[int, Any] = {}
    for p in model.parameters():
        if p.is_floating_point():
            known[id(p)] = nn.Parameter(p.detach().double(), requires_grad=p.requires_grad)
    made = copied(model, known).double()
    quicken_depthwise(made)  # a look at a model takes several passes
    return made


def refuse_telling_nothing(expected: Sequence[list[Tensor]], samples: Sequence[Any]) -> None:
    """Refuse outputs in which an error would not show.

    Args:
        expected: the outputs on each of ``samples``.
        samples: inputs, of which the last two are random.

    Raises:
        ValueError: the outputs are NaN, none of them is finite, all of them are empty, or they are the same on both
            random inputs.
    """
    outputs = [t for each in expected for t in each]
    if outputs and not any(t.numel() for t in outputs):
        raise ValueError(
            "All outputs of the masked model are empty, as of a detector that finds no box, so nothing can be compared. "
            "Give an example_input on which it finds some, or lower its threshold of scores."
        )
    if not any(bool(t.isfinite().any()) for t in outputs) or any(bool(t.isnan().any()) for t in outputs):
        raise ValueError(
            "The masked model gives NaN, or no finite outputs, in eval mode, so nothing can be compared. Look for inf "
            "or NaN in its weights and in example_input, and for a forward pass that returns no tensors."
        )
    before_last, last = expected[-2:]
    # nothing was found on these, but on other samples
    if not any(t.numel() for t in (*last, *before_last)):
        return
    alike = all(torch.equal(a, b) for a, b in zip(last, before_last, strict=True))
    # integers of the random inputs may be those of the example, on which equal outputs are right
    if alike and any(t.is_floating_point() for t in tensors_in(samples[-1])):
        raise ValueError(
            "The masked model gives the same outputs for different random inputs, so a comparison would show no error. "
            "Look for a layer without any active weight, such as a head that is all zeros."
        )


class Drawn(NamedTuple):
    """Random inputs, and what a model gives on them.

    Attributes:
        samples: the random inputs.
        usual: the model's outputs on the example that they are like.
        outputs: its outputs on all of them, in one list.
    """

    samples: list[Any]
    usual: list[Tensor]
    outputs: list[Tensor]


def random_samples(model: nn.Module, example_input: Any, seed: int) -> Drawn:
    """Random inputs like ``example_input``: two, or five where the model gives empty outputs on these.

    The first two hold normal numbers of standard deviation 1 and 10, bools that are true half of the time, and in the
    second one integers in another order. Where the model fails on such an input, or gives values that are not finite
    where it gives finite ones otherwise, the numbers have standard deviation 1, and bools and integers are those of
    ``example_input``.

    A detector seldom finds a box in noise. Where an output is empty on one of these two that is not on
    ``example_input``, three more are that input with noise of 1 % of the standard deviation of each of its tensors.

    Args:
        model: runs in eval mode, once on ``example_input`` and on each random input.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments.
        seed: seed of the random numbers.
    """
    # on the CPU, so that a seed gives the same numbers whatever device the model is on
    generator = torch.Generator().manual_seed(seed)
    with quiet(model):
        usual = outputs_on(model, [example_input])
        drawn, is_empty = Drawn([], usual, []), False
        for scale, reorder in ((1.0, False), (10.0, True)):
            # drawn in any case, so that the second input does not depend on whether the model took the first
            plain = map_tensors(partial(_normal, generator=generator), example_input)
            varied = map_tensors(partial(_varied, generator=generator, scale=scale, reorder=reorder), example_input)
            outputs = _outputs_if_finite(model, varied, usual)
            drawn.samples.append(plain if outputs is None else varied)
            drawn.outputs.extend(outputs_on(model, [plain]) if outputs is None else outputs)
            is_empty |= any(not b.numel() for a, b in zip(usual, outputs or (), strict=False) if a.numel())
        if is_empty:
            noisy = [map_tensors(partial(_noisy, generator=generator), example_input) for _ in range(NOISY_DRAWS)]
            drawn.samples.extend(noisy)
            drawn.outputs.extend(outputs_on(model, noisy))
    return drawn


def another_sample(model: nn.Module, example_input: Any, usual: Sequence[Tensor]) -> Any:
    """An input of the same shapes: normal numbers, random bools, and integers in another order; None where the model fails
    on it, or gives values that are not finite.

    Args:
        model: in the state of :func:`~sparse_callbacks.core.inspection.quiet`.
        example_input: an input.
        usual: the outputs on it.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = map_tensors(partial(_varied, generator=generator, scale=1.0, reorder=True), example_input)
    return None if _outputs_if_finite(model, drawn, usual) is None else drawn


def first_entry(model: nn.Module, sample: Any, outputs: list[Tensor]) -> tuple[Any, list[Tensor]]:
    """The first entry of a batch, on which a comparison is fast; the whole batch if the model does not take it.

    Args:
        model: in the state of :func:`~sparse_callbacks.core.inspection.quiet`.
        sample: an input.
        outputs: the outputs on it.

    Returns:
        the input, and the outputs on it.
    """
    sizes = {t.shape[:1] for t in tensors_in(sample)}
    # tensors of several lengths have no common batch, and a batch of one is its own first entry
    if len(sizes) != 1 or sizes <= {torch.Size([]), torch.Size([1])}:
        return sample, outputs
    first = map_tensors(lambda t: t[:1], sample)
    try:
        found = outputs_on(model, [first])
    except Exception:  # whatever the user's forward does with a batch of one
        return sample, outputs
    good = all(bool(t.isfinite().all()) and t.numel() > 0 for t in found)
    return (first, found) if good else (sample, outputs)


def _outputs_if_finite(model: nn.Module, sample: Any, usual: Sequence[Tensor]) -> list[Tensor] | None:
    """The outputs on ``sample``; None where the model fails, or they are not finite where the ``usual`` ones are.

    A tensor of another shape than usual, such as of another number of boxes, has to be finite throughout.
    """
    try:
        found = outputs_on(model, [sample])
    except Exception:  # such as a mask that leaves nothing, or lengths that have to be sorted
        return None
    if len(found) != len(usual):
        return None
    for a, b in zip(usual, found, strict=True):
        if not (torch.equal(a.isfinite(), b.isfinite()) if a.shape == b.shape else bool(b.isfinite().all())):
            return None
    return found


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _normal(tensor: Tensor, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    """Normal numbers in the place of floating-point ones; other tensors as they are."""
    if not tensor.is_floating_point():
        return tensor
    return (scale * torch.randn(tensor.shape, generator=generator)).to(tensor)


def _varied(tensor: Tensor, generator: torch.Generator, scale: float, reorder: bool) -> Tensor:
    """Normal numbers, random bools, and integers in another order: so they stay in the range that the model takes."""
    if tensor.dtype == torch.bool:
        return (torch.rand(tensor.shape, generator=generator) < 0.5).to(tensor.device)
    if tensor.is_floating_point() or tensor.is_complex() or not reorder:
        return _normal(tensor, generator, scale)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape)


def _noisy(tensor: Tensor, generator: torch.Generator) -> Tensor:
    """``tensor`` with noise of 1 % of its standard deviation; integers and bools as they are."""
    if not tensor.is_floating_point():
        return tensor
    return tensor + NOISE * tensor.std(correction=0) * _normal(tensor, generator)
