"""The batches of a hand-written loop, and whether a step's gradients are those of sampled gates."""

from sparse_callbacks.core.hooks import Hooks
from sparse_callbacks.core.method import Method


class LoopBatches:
    """Counts the batches of a loop, and knows whether their backward passes run inside of ``with run.batch():``.

    Args:
        method: the method of the run. One that is told when a micro-batch begins, because it samples gates, say, needs
            that block.
    """

    def __init__(self, method: Method) -> None:
        self.needed = type(method).batch_start is not Hooks.batch_start
        """The method needs ``with run.batch():`` around each micro-batch."""
        self.number = 0
        """Batches that are over: in each of them every optimizer has stepped."""
        self._name = type(method).__name__
        self._inside = False
        # since every optimizer has stepped: a block was entered; a backward pass has run outside of one
        self._entered = self._bare_backward = False

    def refuse_nested(self) -> None:
        """A block is about to be entered.

        Raises:
            RuntimeError: the loop is in one already.
        """
        if self._inside:
            raise RuntimeError("run.batch() was entered inside of another run.batch(). Leave the first one before.")

    def enter(self) -> None:
        """The block around a micro-batch begins."""
        self._inside = self._entered = True

    def leave(self) -> None:
        """The block around a micro-batch is over."""
        self._inside = False

    def backward(self) -> None:
        """A backward pass has run."""
        self._bare_backward |= not self._inside

    def refuse_step_of_no_sample(self) -> None:
        """A step begins.

        Raises:
            RuntimeError: its gradients are not those of a sample, and the method needs it.
        """
        if self.needed and (not self._entered or self._bare_backward):
            self._bare_backward = False
            raise RuntimeError(
                f"{self._name} samples its gates for each micro-batch, and this step's gradients are not of a sample. "
                "Put 'with run.batch():' around forward and backward of each micro-batch (run = sparsify(...))."
            )

    def next(self) -> None:
        """Every optimizer has stepped: what comes belongs to the next batch."""
        self._entered = self._bare_backward = False
        self.number += 1
