"""How many samples a batch holds, and how many a hand-written loop trains on."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.core.undisturbed import no_training


def samples_in(batch: Any) -> int | None:
    """Samples of a batch: the first dimension of its first tensor that has one; None where no tensor has.

    >>> samples_in({"image": torch.zeros(8, 3), "label": torch.zeros(8)})
    8
    """
    first = batch[0] if isinstance(batch, list | tuple) and batch else batch
    if not isinstance(
        first, torch.Tensor
    ):  # the usual batch is asked at every step, so its other parts are not looked at
        first = next((t for t in tensors_in(batch) if t.ndim), None)
    return None if first is None or not first.ndim else int(first.shape[0])


class LoopSamples:
    """Counts the samples that a hand-written loop trains on, by the inputs of the module that a batch calls first.

    A forward pass without gradients is not training. The hook of a compiled module cannot count: such batches are taken to
    be as large as the first one, which runs eagerly.
    """

    def __init__(self) -> None:
        self.usual = 0
        """Samples of the first batch."""
        self.window = 0
        """Samples since the last step."""
        self._forward = 0  # of a forward pass that no backward pass has followed
        self._uncounted: dict[int, int] = {}  # backward passes without a counted forward pass, by optimizer
        self._handle: Any = None

    def follow(self, module: nn.Module, first: int) -> None:
        """Count by the inputs of ``module``, whose first batch begins and has ``first`` samples."""
        self.stop()
        self.usual = self._forward = first
        self._handle = module.register_forward_pre_hook(self._count, with_kwargs=True)

    def stop(self) -> None:
        """Count no more."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def _count(self, _: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if not torch.compiler.is_compiling() and torch.is_grad_enabled() and not no_training():
            self._forward = samples_in([*args, *kwargs.values()]) or 0

    def backward(self, optimizer: int) -> None:
        """A backward pass has reached the parameters of an optimizer."""
        self.window += self._forward
        if not self._forward:  # it is counted already for another optimizer, or nobody could count it
            self._uncounted[optimizer] = self._uncounted.get(optimizer, 0) + 1
        self._forward = 0

    def take(self, two_passes: bool) -> int:
        """Samples of the window that is over.

        Args:
            two_passes: its optimizer has taken gradients of each sample twice.
        """
        found = self.window or self.usual * max(self._uncounted.values(), default=0)
        self.window, self._uncounted = 0, {}
        return found // 2 if two_passes else found
