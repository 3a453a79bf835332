"""What a truly sparse layer records for the dense gradient of its weight, which is never made."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

Pair = tuple[Tensor, Tensor]  # x [inputs, batch] and dY [outputs, batch]: dY x' is their part of the dense gradient


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

    def complete(self) -> None:
        """Let the pairs found since the last time join the records."""
        for pairs in self.pairs.values():
            self.records.extend(pairs)
        self.pairs.clear()


class Tap(torch.autograd.Function):
    """The values as they are; backward passes here when all uses of them have given their gradient."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, call: CallRecords) -> Tensor:
        ctx.call = call
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        ctx.call.complete()
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


def of_gradient(use: Use | None) -> Use | None:
    """`Use.of_gradient`, None where nothing is recorded."""
    return None if use is None else use.of_gradient()
