"""The outputs of a model before and after a cut, and which differences count as equal."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.outputs import output_tensors
from sparse_callbacks.core.inspection import run, training

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest relative difference of outputs that counts as equal, by their type; integers and bools must be the same."""
COARSE_TOLERANCE = 5e-2
"""The same for half precision, whose rounding is large; most wrong cuts differ by more, and the proof says so."""
RANDOM = (
    "the outputs are random in eval mode, as two passes over the same input differ, so nothing can be compared; look for "
    "noise, sampling, or dropout that is always on"
)
"""Why a group stays in a model whose outputs differ whatever is cut."""
WRITES = (
    "the model writes into its buffer {} in eval mode, so two passes over the same input differ, and nothing can be compared; "
    "write to it in train mode alone, or exclude it from the outputs"
)
"""The same, where the cause is known."""

FILL = 1e4
"""A number that is so many times the median of its tensor, and the same before and after, is a fill and no scale."""


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of outputs, and that divided by the largest finite output of the same tensor."""

    absolute: float
    relative: float

    def __str__(self) -> str:
        return f"{self.relative:.1e} relative, {self.absolute:.1e} absolute"


# ---------------------------------------------------------------------- two lists of outputs


def outputs_on(model: nn.Module, samples: Sequence[Any]) -> list[Tensor]:
    """Copies of the tensors that ``model`` gives on each of ``samples``, in one list.

    Raises:
        OpaqueOutputError: see :func:`~sparse_callbacks.channels.outputs.output_tensors`.
    """
    # copies: a model may give the same buffer each time, and write the outputs into it
    return [t.detach().clone() for sample in samples for t in output_tensors(run(model, sample), model)]


def compare(expected: Sequence[Tensor], found: Sequence[Tensor]) -> Difference:
    """Largest difference of two lists of tensors.

    It is infinite where shapes or numbers of tensors differ, or values that are not finite.
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        return Difference(float("inf"), float("inf"))
    absolute = relative = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        gap, scale = _gap(_real(a), _real(b))
        absolute = max(absolute, gap)
        # outputs that are all zero have no scale; tiny makes the relative difference huge instead of dividing by 0
        relative = max(relative, gap / max(scale, torch.finfo(torch.float64).tiny))
    return Difference(absolute, relative)


Tolerance = float | Mapping[torch.dtype, float] | None
"""Largest relative difference of floating-point tensors: one number, or by their type, or None for :data:`TOLERANCES`."""


def why_not_equal(expected: Sequence[Tensor], found: Sequence[Tensor], tolerance: Tolerance = None) -> str:
    """How two lists of tensors differ by more than is allowed; empty where they do not.

    Every tensor is compared by itself: one in half precision must not hide an error in another.

    Args:
        expected, found: tensors in the same order.
        tolerance: largest relative difference of floating-point tensors, also by their type; of types that are not
            named it is :data:`COARSE_TOLERANCE`. None: :data:`TOLERANCES`.
    """
    if len(expected) != len(found):
        return f"outputs are {len(found)} in the place of {len(expected)}"
    for a, b in zip(expected, found, strict=True):
        limits = TOLERANCES if tolerance is None else tolerance
        limit = limits.get(a.dtype, COARSE_TOLERANCE) if isinstance(limits, Mapping) else limits
        # labels, indices and masks: rounding leaves them as they are
        if not (a.is_floating_point() or a.is_complex()):
            limit = 0.0
        gap = compare([a], [b]).relative
        if gap > limit:
            return f"outputs differ by {gap:.1e} (relative)"
    return ""


def _real(tensor: Tensor) -> Tensor:
    """The numbers of a tensor in float64; of complex numbers, both parts."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def _gap(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Largest absolute difference of two tensors, and largest absolute value of the first, over their finite values.

    Values that are not finite must be the same in both; a model may rule out a class with minus infinity.
    """
    finite = a.isfinite() & b.isfinite()
    if not torch.allclose(a[~finite], b[~finite], rtol=0, atol=0, equal_nan=True):
        return float("inf"), 1.0
    a, b = a[finite], b[finite]
    if not a.numel():
        return 0.0, 1.0
    sizes = a.abs()
    # a model may also rule out classes with a number like -1e9, which no other one is to be measured by
    middle = sizes.median()
    large = sizes > FILL * middle
    if middle and large.any() and not large.all() and torch.equal(a[large], b[large]):
        sizes = sizes[~large]
    return float((a - b).abs().max()), float(sizes.max())


# ---------------------------------------------------------------------- one model before and after


class Reference:
    """The outputs that a model has when this is made, to compare with the outputs that it has later.

    Args:
        model: in the state of :func:`~sparse_callbacks.core.inspection.quiet`.
        samples: inputs.
        branches: names of the modules that are put in train mode for a further pass on the first sample, from
            :func:`~sparse_callbacks.core.inspection.training_branches`. Where two such passes differ by chance, only
            the shapes of their outputs are compared.
        known: the outputs on the first samples, as far as they are known; on the others the model runs.
        tolerance: see :func:`why_not_equal`.

    Attributes:
        expected: the outputs on each sample.
        is_unsteady: whether the outputs were found to differ the last time whatever is cut.
    """

    def __init__(
        self,
        model: nn.Module,
        samples: Sequence[Any],
        branches: Sequence[str] = (),
        known: Sequence[list[Tensor]] = (),
        tolerance: Tolerance = None,
    ) -> None:
        self.tolerance = tolerance
        self.model, self.samples, self.branches = model, list(samples), list(branches)
        self.is_unsteady = False
        self.expected = [*known, *(outputs_on(model, [x]) for x in self.samples[len(known) :])]
        # the outputs when they were found to be the same the last time
        self._same = _joined(self.expected)
        self.expected_in_training = self._outputs_in_training()
        # a branch may draw random numbers, and then no difference between its outputs means anything
        self.is_random = bool(branches) and bool(why_not_equal(self.expected_in_training, self._outputs_in_training()))

    def why_changed(self) -> str:
        """How the model's outputs differ from those at first; empty where they are the same."""
        found: list[Tensor] = []

        def look() -> list[Tensor]:
            found.extend(outputs_on(self.model, self.samples))
            return found

        changed = _why_changed("without them", look, _joined(self.expected), tolerance=self.tolerance)
        if changed:
            # asked only where something differs, as it takes another pass
            unsteady = self._why_unsteady(found)
            self.is_unsteady = bool(unsteady)
            return unsteady or changed
        # only where eval mode shows nothing, as the pass in train mode costs as much again
        lead, expected = "without them, in train mode,", self.expected_in_training
        changed = _why_changed(lead, self._outputs_in_training, expected, self.is_random, self.tolerance)
        if not changed:
            self._same = found
        return changed

    def _why_unsteady(self, found: Sequence[Tensor]) -> str:
        """Why another pass gives other outputs than those that were found; empty where it does not, or the model fails."""
        if not found:
            return ""
        before = {name: buffer.clone() for name, buffer in self.model.named_buffers()}
        if not why_not_equal(found, outputs_on(self.model, self.samples)):
            return ""
        now = dict(self.model.named_buffers())
        written = [n for n, b in now.items() if n not in before or not torch.equal(b, before[n])]
        return WRITES.format(", ".join(written)) if written else RANDOM

    def difference(self) -> tuple[Difference, torch.dtype]:
        """Difference from the outputs at first when nothing was found to have changed the last time, and the lowest precision
        that some of them has."""
        expected = _joined(self.expected)
        # a model may give labels beside its scores; rounding is a matter of the scores
        precisions = {t.dtype for t in expected if t.is_floating_point() or t.is_complex()} or {expected[0].dtype}
        precision = max(precisions, key=lambda p: torch.finfo(p).eps if p.is_floating_point or p.is_complex else 0.0)
        return compare(expected, self._same), precision

    def _outputs_in_training(self) -> list[Tensor]:
        """Outputs in train mode on the first sample; none where no branch needs that mode."""
        if not self.branches:
            return []
        with training(self.model.get_submodule(n) for n in self.branches):
            return outputs_on(self.model, self.samples[:1])


def _joined(outputs: Sequence[list[Tensor]]) -> list[Tensor]:
    return [t for each in outputs for t in each]


def _why_changed(
    lead: str,
    look: Callable[[], list[Tensor]],
    expected: Sequence[Tensor],
    only_shapes: bool = False,
    tolerance: Tolerance = None,
) -> str:
    """How the outputs that ``look`` gives differ from the expected ones, after the words ``lead``; or empty."""
    try:
        found = look()
    except Exception as error:  # whatever the user's forward does with sizes that it does not expect
        # some errors quote whole tensors, so only their beginning is shown
        return f"{lead} the network fails ({type(error).__name__}: {str(error)[:120]})"
    # random outputs differ in any case, but a wrong shape or a failing branch still shows
    if only_shapes:
        expected, found = [torch.zeros_like(t) for t in expected], [torch.zeros_like(t) for t in found]
    difference = why_not_equal(expected, found, tolerance)
    return f"{lead} the {difference}" if difference else ""
