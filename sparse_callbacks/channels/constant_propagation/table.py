"""The table of operations that constants are followed through, and what is known of a tensor.

It lists what is known to keep a constant one. Whatever runs through an operation that is not in it, varies.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.inspection import tensors_in


@dataclass(frozen=True)
class Known:
    """What is known of the entries of a tensor, whatever the inputs of the network and their sizes are.

    Attributes:
        constant: bool, with as many dimensions as the tensor: where an entry is always the same number. A dimension has
            size 1 where this holds for all places along it alike, however many there are, with one number for all
            of them; otherwise its entries go by their index.
        zero: the same: where that number is 0.
        reason: which operation made constants vary on the way; empty where none did.
        weight: name of the parameter that the tensor is; empty where it is none.
        transposed: whether it is that parameter transposed.
        sources: names of the parameters and buffers out of which alone the tensor was computed; empty where activations went
            into it, or nothing did.
        dead: like ``zero``: where the entry is 0 because parameters are, whatever numbers the model's code puts in; None
            where none is.
    """

    constant: Tensor
    zero: Tensor
    reason: str = ""
    weight: str = ""
    transposed: bool = False
    sources: frozenset[str] = frozenset()
    dead: Tensor | None = None


@dataclass(frozen=True)
class Step:
    """One call of an operation.

    Attributes:
        name: name of the operation without overload and trailing underscore, such as ``"aten.add"``.
        named: every argument by its name.
        output: what it returned.
        known: gives what was known of a tensor argument before the call.
        read: told of a product with a weight: the weight, its dimension that is summed over, the tensor that is read,
            its dimension, and whether zeros may be read beside a constant.
    """

    name: str
    named: Mapping[str, Any]
    output: Any
    known: Callable[[Tensor], Known]
    read: Callable[[Tensor, int, Tensor, int, bool], None]

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, also those in lists."""
        return tensors_in(self.named)

    def constant(self, name: str = "self") -> Tensor:
        """:attr:`Known.constant` of an argument."""
        return self.known(self.named[name]).constant

    def zero(self, name: str = "self") -> Tensor:
        """:attr:`Known.zero` of an argument."""
        return self.known(self.named[name]).zero


ConstantRule = Callable[[Step], list[Tensor]]
"""Gives :attr:`Known.constant` of every tensor that an operation returns; the last one may stand for those behind it."""

CONSTANT_RULES: dict[str, ConstantRule] = {}
"""The rule of each operation by its name without overload and trailing underscore."""


def constant_rule(*names: str) -> Callable[[ConstantRule], ConstantRule]:
    """Enter a function into the table, under these names: ``"add"`` stands for ``"aten.add"``."""

    def entered(function: ConstantRule) -> ConstantRule:
        CONSTANT_RULES.update({f"aten.{name}" if "." not in name else name: function for name in names})
        return function

    return entered


def returned(step: Step) -> list[Tensor]:
    """The tensors that an operation returned."""
    return tensors_in(step.output)


def varying(tensor: Tensor) -> Tensor:
    """No entry of ``tensor`` is a constant."""
    return torch.zeros([1] * tensor.ndim, dtype=torch.bool, device=tensor.device)


def everywhere(tensor: Tensor) -> Tensor:
    """All entries of ``tensor`` are one constant."""
    return ~varying(tensor)


def broadcast(parts: Sequence[Tensor], tensor: Tensor) -> list[Tensor]:
    """Bools with as many dimensions as ``tensor``, aligned at the end."""
    return [p.reshape([1] * (tensor.ndim - p.ndim) + [*p.shape]) for p in parts]


def alike_along(known: Tensor, dims: Sequence[int]) -> bool:
    """Whether nothing is told apart along these dimensions."""
    return all(known.shape[d] == 1 for d in dims)
