"""Which calls of a forward pass its outputs depend on."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary


class Reach:
    """The calls of a pass, and from which of them the tensors come that each one reads.

    A network may compute what nobody reads, such as the average of attention weights over heads that
    ``nn.MultiheadAttention`` gives unless it is told not to. What such a call does to its inputs does not matter.
    """

    def __init__(self) -> None:
        self._made_by: Any = WeakIdKeyDictionary()
        self._read: dict[int, set[int]] = {}
        self._seen_anyhow: set[int] = set()

    def note(self, call: int, inputs: Iterable[Tensor], outputs: Sequence[Tensor]) -> None:
        """Note a call by its number.

        Args:
            call: the number.
            inputs: the tensors that it reads.
            outputs: the tensors that it gives. A call without any is for the model's code, as of ``Tensor.item``; one
                that writes into a tensor may be seen through any other tensor of that memory. Both always count.
        """
        read = [*inputs]
        self._read[call] = {self._made_by[t] for t in read if t in self._made_by}
        if not outputs or any(t is out for t in read for out in outputs):
            self._seen_anyhow.add(call)
        for tensor in outputs:
            self._made_by[tensor] = call

    def note_taken(self, tensors: Iterable[Tensor]) -> None:
        """Note that the model's code gets the numbers of these tensors: what they come from always counts."""
        self._seen_anyhow |= {self._made_by[t] for t in tensors if t in self._made_by}

    def reached(self, outputs: Iterable[Tensor]) -> set[int]:
        """Numbers of the calls that the network's ``outputs``, or the model's code, depend on."""
        left = [*self._seen_anyhow, *(self._made_by[t] for t in outputs if t in self._made_by)]
        found: set[int] = set()
        while left:
            call = left.pop()
            if call not in found:
                found.add(call)
                left += self._read[call]
        return found
