"""Whether a network that was cut still gives the outputs of the masked one: on which inputs, in which precision and modes."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.proof import Difference, compare, mismatch, outputs
from sparse_callbacks.core.inspection import map_tensors, quiet, run, tensors_in, training


class Check:
    """The outputs that a model has on ``samples`` when this is made, to compare with those that it has later.

    Args:
        model: in the state of :func:`~sparse_callbacks.core.inspection.quiet`.
        samples: inputs.
        branches: modules to be put in train mode for a further pass on the first sample, from
            :func:`~sparse_callbacks.core.inspection.training_branches`;
            where two such passes differ by chance, only their shapes are compared.
    """

    def __init__(self, model: nn.Module, samples: Sequence[Any], branches: Sequence[str] = ()) -> None:
        self.model, self.samples, self.branches = model, list(samples), list(branches)
        self.expected = outputs(model, samples)
        self.trained = self._train()
        self.is_random = bool(branches) and bool(mismatch(self.trained, self._train()))

    def problem(self) -> str:
        """Why the outputs are others now; empty where they are the same."""
        return _judged("without them", lambda: outputs(self.model, self.samples), self.expected) or _judged(
            "without them, in train mode,", self._train, self.trained, only_shapes=self.is_random
        )

    def difference(self) -> tuple[Difference, torch.dtype]:
        """Of the outputs now, and the precision of the first of them that has one."""
        precision = next((t.dtype for t in self.expected if t.is_floating_point()), self.expected[0].dtype)
        return compare(self.expected, outputs(self.model, self.samples)), precision

    def _train(self) -> list[Tensor]:
        """Outputs in train mode, where there are branches for it."""
        if not self.branches:
            return []
        with training(self.model.get_submodule(n) for n in self.branches):
            return outputs(self.model, self.samples[:1])


def _judged(lead: str, look: Callable[[], list[Tensor]], expected: Sequence[Tensor], only_shapes: bool = False) -> str:
    try:
        found = look()
    except Exception as error:  # whatever the user's forward does with sizes that it does not expect
        return f"{lead} the network fails ({type(error).__name__}: {str(error)[:120]})"
    if only_shapes:
        expected, found = [torch.zeros_like(t) for t in expected], [torch.zeros_like(t) for t in found]
    difference = mismatch(expected, found)
    return difference and f"{lead} the {difference}"


def precise(masked: nn.Module, samples: Sequence[Any]) -> tuple[nn.Module, list[Any]]:
    """A copy of the model and the samples in float64; in their own precision where the model makes tensors of another by itself."""
    check, doubled = copy.deepcopy(masked).double(), [map_tensors(_double, x) for x in samples]
    try:
        with quiet(check):
            run(check, doubled[0])
    except Exception:  # a forward pass may well assert its types
        return copy.deepcopy(masked), list(samples)
    return check, doubled


def telling(tensors: list[Tensor], samples: Sequence[Any]) -> None:
    """Refuse ``tensors``, the outputs on ``samples`` of which the last two are random, if an error would not show in them.

    Raises:
        ValueError: they are NaN, none is finite, or they are always the same.
    """
    if not any(bool(t.isfinite().any()) for t in tensors) or any(bool(t.isnan().any()) for t in tensors):
        raise ValueError(
            "The masked model gives NaN, or no finite outputs, in eval mode, so nothing can be compared. Look for inf or NaN in its "
            "weights and in example_input, and for a forward pass that returns no tensors."
        )
    each = len(tensors) // len(samples)
    alike = all(torch.equal(a, b) for a, b in zip(tensors[-each:], tensors[-2 * each : -each], strict=True))
    if alike and any(t.is_floating_point() for t in tensors_in(samples[-1])):
        raise ValueError(
            "The masked model gives the same outputs for different random inputs, so a comparison would show no error. Look for a layer "
            "without any active weight, such as a head that is all zeros."
        )


def drawn(model: nn.Module, example_input: Any, seed: int) -> list[Any]:
    """Two random inputs like ``example_input``: normal numbers of standard deviation 1 and 10, bools that are true half of the time,
    and in the second one integers in another order.

    Where the model fails on such an input, or gives values that are not finite where it gives finite ones otherwise, the numbers are of
    standard deviation 1, and bools and integers those of ``example_input``.

    Args:
        model: runs three times, in eval mode.
    """
    generator = torch.Generator().manual_seed(seed)
    model = copy.deepcopy(model)
    with quiet(model):
        usual = [t.isfinite() for t in outputs(model, [example_input])]
        found = []
        for scale, reorder in ((1.0, False), (10.0, True)):
            plain = map_tensors(partial(_normal, generator=generator), example_input)
            varied = map_tensors(partial(_varied, generator=generator, scale=scale, reorder=reorder), example_input)
            found.append(varied if _is_taken(model, varied, usual) else plain)
        return found


def one(model: nn.Module, sample: Any) -> Any:
    """The first entry of a batch, where the model takes it; otherwise the whole."""
    sizes = {t.shape[:1] for t in tensors_in(sample)}
    if len(sizes) != 1 or sizes <= {torch.Size([]), torch.Size([1])}:
        return sample
    first = map_tensors(lambda t: t[:1], sample)
    try:
        with quiet(model):
            good = all(bool(t.isfinite().all()) and t.numel() > 0 for t in outputs(model, [first]))
    except Exception:  # whatever the user's forward does with a batch of one
        return sample
    return first if good else sample


def _is_taken(model: nn.Module, sample: Any, usual: Sequence[Tensor]) -> bool:
    try:
        found = [t.isfinite() for t in outputs(model, [sample])]
    except Exception:  # such as a mask that leaves nothing, or lengths that have to be sorted
        return False
    return len(found) == len(usual) and all(torch.equal(a, b) for a, b in zip(found, usual, strict=True))


def _double(tensor: Tensor) -> Tensor:
    return tensor.double() if tensor.is_floating_point() else tensor


def _normal(tensor: Tensor, generator: torch.Generator, scale: float = 1.0) -> Tensor:
    return (scale * torch.randn(tensor.shape, generator=generator)).to(tensor) if tensor.is_floating_point() else tensor


def _varied(tensor: Tensor, generator: torch.Generator, scale: float, reorder: bool) -> Tensor:
    if tensor.dtype == torch.bool:
        return (torch.rand(tensor.shape, generator=generator) < 0.5).to(tensor.device)
    if tensor.is_floating_point() or tensor.is_complex() or not reorder:
        return _normal(tensor, generator, scale)
    order = torch.randperm(tensor.numel(), generator=generator).to(tensor.device)
    return tensor.flatten()[order].view(tensor.shape)
