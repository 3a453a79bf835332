"""What a truly sparse layer records for the dense gradient of its weight, which is never made."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # x [inputs, batch] and dY [outputs, batch]: dY x' is their part of the dense gradient


class Records(list[Pair]):
    """Pairs of a window, and the gradient that reached the live values otherwise.

    Attributes:
        direct: What the gradient of the live values has beyond the products, such as that of a penalty on parameters; in
            their shape, None where there is nothing.
    """

    direct: Tensor | None = None

    def copied(self) -> "Records":
        """The same pairs in a list of their own, which records nothing."""
        copy = Records(self)
        copy.direct = self.direct
        return copy

    def reached(self, grad: Tensor) -> None:
        """The gradient of a call, whose pairs have joined, has reached the live values.

        Args:
            grad: The gradient, in the shape of the live values.
        """


class CallRecords:
    """The pairs of one call of a layer. They join the layer's records when a gradient reaches its values.

    A backward pass to the inputs alone, as for adversarial examples, runs through the same Functions and adds nothing to a
    gradient of the weight.
    """

    def __init__(self, records: list[Pair]) -> None:
        self.records = records
        self.pairs: dict[int, list[Pair]] = {}
        self.uses = 0

    def tapped(self, values: Tensor) -> Tensor:
        """Live values as the products are to use them: the pairs join the records when their gradient is complete."""
        tapped: Tensor = Tap.apply(values, self)
        return tapped

    def complete(self, grad: Tensor) -> None:
        """Let the pairs found since the last time join the records.

        Args:
            grad: The gradient of the live values that they are of.
        """
        for pairs in self.pairs.values():
            self.records.extend(pairs)
        self.pairs.clear()
        if isinstance(self.records, Records):
            self.records.reached(grad.detach())


class Tap(torch.autograd.Function):
    """The values as they are; backward passes here when all uses of them have given their gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, call: CallRecords) -> Tensor:
        ctx.call = call
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.call.complete(grad)
        return grad, None


class Use(NamedTuple):
    """One product with the weight in a call: the forward pass, or the backward pass where that is differentiated itself."""

    call: CallRecords
    number: int = 0
    swapped: bool = False

    def take(self, pairs: list[Pair]) -> None:
        """Record the pairs of a backward pass, in place of those of an earlier one through the same product."""
        if self.swapped:
            # the pass that made this product reached the inputs alone, or has joined the records already
            self.call.pairs.pop(0, None)
            pairs = [(dy, x) for x, dy in pairs]
        self.call.pairs[self.number] = [(x.detach(), dy.detach()) for x, dy in pairs]

    def of_gradient(self) -> "Use":
        """The use by a product with the transposed weight, in which input and output change places."""
        self.call.uses += 1
        return Use(self.call, self.call.uses, swapped=not self.swapped)


def recorded_matrix(matrix: Callable[[Tensor], Tensor], values: Tensor, records: list[Pair]) -> Tensor:
    """A dense matrix of live values, whose gradient is recorded: it is the dense gradient, or a part of it.

    Args:
        matrix: Makes the matrix ``[outputs, inputs]`` of live values.
        values: The live values.
        records: The records of the layer.
    """
    call = CallRecords(records)
    dense = matrix(call.tapped(values))
    if dense.requires_grad:
        dense.register_hook(partial(_take_matrix, Use(call)))  # type: ignore[no-untyped-call]
    return dense


def _take_matrix(use: Use, grad: Tensor) -> None:
    """Record a dense gradient ``[outputs, inputs]`` as a pair, one of which is the identity; the smaller of the two."""
    outputs, inputs = grad.shape
    identity = torch.eye(min(outputs, inputs), dtype=grad.dtype, device=grad.device)
    use.take([(identity, grad) if inputs <= outputs else (grad.t(), identity)])


def of_gradient(use: Use | None) -> Use | None:
    """`Use.of_gradient`, None where nothing is recorded."""
    return None if use is None else use.of_gradient()
