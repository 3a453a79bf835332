"""Dense copies that a sparse layer has handed out: which were written into."""

from typing import Any

import torch
from torch import Tensor

REMEMBERED = 8  # copies that are watched; the latest


class HandedOut:
    """Watches copies of a weight without holding them, by the counter of writes that torch shares between a tensor and its
    detached views. Writes through ``.data`` are not counted by torch."""

    def __init__(self) -> None:
        self._copies: list[tuple[Tensor, int]] = []

    def watch(self, copy: Tensor) -> None:
        """Watch a copy from now on."""
        if torch.compiler.is_compiling() or copy.is_meta or copy.is_inference():
            return
        counter = copy.detach()
        version = counter._version
        counter.data = counter.new_empty(0)  # it keeps the counter, and lets go of the memory
        self._copies = [*self._copies[1 - REMEMBERED :], (counter, version)]

    def were_written(self) -> bool:
        """Whether any of them was written into since it was handed out; such are forgotten."""
        as_given = [(counter, version) for counter, version in self._copies if counter._version == version]
        found, self._copies = len(as_given) < len(self._copies), as_given
        return found

    def __reduce__(self) -> Any:
        return HandedOut, ()  # a copy of the layer has handed out nothing
