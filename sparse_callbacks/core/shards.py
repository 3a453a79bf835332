"""How a parameter lies over the processes of a run: whole on each, or in shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparse_callbacks.core.packed_bits import packed, unpacked


class Processes(Protocol):
    """The processes that together hold a parameter. All of them make the same calls in the same order."""

    rank: int
    size: int

    def sum(self, numbers: Tensor) -> Tensor:
        """The sum of a tensor over the processes, on the CPU."""
        ...

    def collect(self, part: Tensor) -> list[Tensor]:
        """The tensors of all processes, of one shape, in their order, on the first of them; nothing on the others."""
        ...


@dataclass(frozen=True)
class Layout:
    """How one parameter lies over the processes of a run. The tensors of a process are its own part of the parameter.

    Without sharding that part is the whole, and everything here gives back what it is given. Counts and the selection
    of the largest magnitudes add up over processes, and random draws are made for the whole and cut to this process's
    part, so that every process draws the same. Elementwise work needs no layout.
    """

    def total(self, count: int) -> int:
        """The sum over processes of a count of this process's positions."""
        return count

    def whole_shape(self, part: Tensor) -> torch.Size:
        """The shape of the whole parameter of which this process holds ``part``."""
        return part.shape

    def part(self, whole: Tensor) -> Tensor:
        """This process's part of a tensor that has the shape of the whole parameter."""
        return whole

    def norm(self, norm: Tensor) -> Tensor:
        """The L2 norm of the whole, of which ``norm`` is that of this process's part."""
        return norm

    def collected(self, part: Tensor) -> Tensor | None:
        """The whole tensor whose parts the processes hold, as a copy on the first process; None on the others."""
        return part.clone()

    def layers(self, tensor: Tensor, parts: int) -> Sequence[Tensor]:
        """This process's views of the equal matrices that are stacked in a parameter along dimension 0.

        Args:
            tensor: this process's part of the parameter, or a tensor that lies as it does.
            parts: the number of matrices.
        """
        return (tensor,) if parts == 1 else tensor.chunk(parts)


@dataclass(frozen=True)
class Shards(Layout):
    """A parameter that is cut along one dimension, with one slice on each process in the order of the processes.

    Attributes:
        shape: the shape of the whole parameter.
        dim: the dimension that is cut.
        offset: where this process's slice begins in it.
        length: how long this process's slice is; it may be 0.
        processes: those that hold the slices.
    """

    shape: torch.Size
    dim: int
    offset: int
    length: int
    processes: Processes

    def total(self, count: int) -> int:
        return int(self.processes.sum(torch.tensor([count]))[0])

    def whole_shape(self, part: Tensor) -> torch.Size:
        return self.shape

    def part(self, whole: Tensor) -> Tensor:
        return whole.narrow(self.dim, self.offset, self.length)

    def norm(self, norm: Tensor) -> Tensor:
        return self.processes.sum(norm.double().square().reshape(1)).sqrt()[0].to(norm)

    def collected(self, part: Tensor) -> Tensor | None:
        # one length for all, as collectives ask for, and eight truth values in a byte
        longest = -(-self.shape[self.dim] // self.processes.size)
        shape = [longest if dim == self.dim else size for dim, size in enumerate(self.shape)]
        padded = part.new_zeros(shape)
        padded.narrow(self.dim, 0, self.length).copy_(part)
        packs = part.dtype == torch.bool
        found = self.processes.collect(packed(padded) if packs else padded)
        if not found:
            return None
        slices = [unpacked(t, padded.numel()).view(padded.shape) if packs else t for t in found]
        # every slice but the last ones is as long as the longest, so what was filled up lies at the end
        return torch.cat(slices, self.dim).narrow(self.dim, 0, self.shape[self.dim]).contiguous()

    def layers(self, tensor: Tensor, parts: int) -> Sequence[Tensor]:
        if parts == 1:
            return (lying_as(tensor, self),)
        rows = self.shape[0] // parts
        shape = torch.Size([rows, *self.shape[1:]])
        if self.dim != 0:
            layout = Shards(shape, self.dim, self.offset, self.length, self.processes)
            return [lying_as(view, layout) for view in tensor.chunk(parts)]
        views = []
        for start in range(0, self.shape[0], rows):
            first = min(max(start - self.offset, 0), self.length)
            last = min(max(start + rows - self.offset, first), self.length)
            offset = min(max(self.offset - start, 0), rows)
            layout = Shards(shape, 0, offset, last - first, self.processes)
            views.append(lying_as(tensor[first:last], layout))
        return views


WHOLE = Layout()
_TAG = "_layout_over_processes"


def layout_of(tensor: Tensor) -> Layout:
    """The layout of a parameter, or of a tensor that lies as its parameter does."""
    found: Layout = getattr(tensor, _TAG, WHOLE)
    return found


def lie_as(tensor: Tensor, layout: Layout) -> None:
    """Let :func:`layout_of` know how a tensor lies."""
    setattr(tensor, _TAG, layout)


def lying_as(part: Tensor, layout: Layout) -> Tensor:
    """A view of ``part`` of which :func:`layout_of` knows how it lies."""
    if layout is WHOLE:
        return part
    view = part.detach()
    lie_as(view, layout)
    return view


def size_of(tensor: Tensor) -> int:
    """The number of elements of the whole parameter or layer of which this process holds ``tensor``."""
    return layout_of(tensor).whole_shape(tensor).numel()


def count_of(mask: Tensor) -> int:
    """The number of True positions over all processes that hold a part of the layer of ``mask``."""
    return layout_of(mask).total(int(mask.count_nonzero()))


def cut(tensors: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's parts of tensors that may be whole; those that are parts already, and all others, as they are.

    Args:
        tensors: tensors by the name of a parameter, or by a key that ends in "/" and its name.
        params: this process's parts of the sparse parameters by name.
    """
    return {key: _cut(tensor, params.get(_name_in(key))) for key, tensor in tensors.items()}


def _cut(tensor: Tensor, part: Tensor | None) -> Tensor:
    layout = WHOLE if part is None else layout_of(part)
    if part is None or layout is WHOLE or tensor.shape == part.shape or tensor.shape != layout.whole_shape(part):
        return tensor
    return layout.part(tensor).clone()  # or the whole would stay in memory, or in a file that is mapped into it


def collected(tensors: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of the whole tensors, one after the other; of parameters in shards on their first process alone.

    Args:
        tensors: this process's parts by the name of a parameter, or by a key that ends in "/" and its name.
        params: this process's parts of the sparse parameters by name.
    """
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        part = params.get(_name_in(key))
        layout = WHOLE if part is None or tensor.shape != part.shape else layout_of(part)
        if (whole := layout.collected(tensor)) is not None:
            found[key] = whole
    return found


def _name_in(key: str) -> str:
    return key.split("/", 1)[-1]
