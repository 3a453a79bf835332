"""A call of an aten operation: its arguments, and the axes of its tensors."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor

from sparse_callbacks.channels.axes import AnyAxis, MisfitError, Run
from sparse_callbacks.channels.met_axes import joined, reshaped
from sparse_callbacks.core.inspection import tensors_in


@dataclass(frozen=True)
class Call:
    """A call, and what the trace knows of its tensors.

    Attributes:
        name: name of the operation without overload and trailing underscore, such as ``"aten.add"``.
        named: every argument that the operation has by its name, with defaults filled in.
        output: what it returned.
        axes_of: gives the axes of a tensor argument, one for each dimension.
        is_weight: whether a tensor was computed from parameters and buffers alone.
        is_own: whether a tensor was computed from parameters of the module that runs, among others.
        is_score: whether a tensor holds products of activations that no weight was multiplied with since, as the scores of
            attention.
        note_product: told of a product with a weight: the weight, the axes that are summed over, and those that are made.
        note_scores: told that the call multiplies activations with each other.
        note_heads: told of an axis whose channels stay where they are the channels of heads, and of the reason.
        note_block: told of an axis whose channels stay if anything depends on the call, and of the reason.
        since: the place in the forward pass.
        module: name and class of the innermost module that runs.
    """

    name: str
    named: Mapping[str, Any]
    output: Any
    axes_of: Callable[[Tensor], list[AnyAxis]]
    is_weight: Callable[[Tensor], bool]
    is_own: Callable[[Tensor], bool]
    is_score: Callable[[Tensor], bool]
    note_product: Callable[[Tensor, Sequence[AnyAxis], Sequence[AnyAxis]], None]
    note_scores: Callable[[], None]
    note_heads: Callable[[AnyAxis, str, int], None]
    note_block: Callable[[AnyAxis, str, int], None]
    since: int
    module: tuple[str, str]

    def tensors(self) -> list[Tensor]:
        """The tensors among the arguments, also those in lists."""
        return tensors_in(self.named)

    def axis(self, dim: int, of: str = "self") -> int:
        """A dimension of a tensor argument, counted from the front."""
        count = self.named[of].ndim
        return dim % count if count else 0

    @property
    def mixes(self) -> str:
        """The reason of channels that the operation mixes."""
        name, kind = self.module
        where = f" in {name} ({kind})" if name else ""
        return f"runs into {self.name.removeprefix('aten.')}{where}, which mixes these channels"

    def block(self, axes: Iterable[AnyAxis], reason: str | None = None) -> None:
        """These channels stay, if the network's outputs depend on the call."""
        for axis in axes:
            self.note_block(axis, reason or self.mixes, self.since)

    def join(self, *axes: AnyAxis) -> AnyAxis:
        """Axes that meet entry by entry."""
        return joined(axes, self.since, f"{self.mixes.partition(',')[0]}, where they meet others in another order")

    def broadcast(self, tensors: Sequence[Tensor], shape: Sequence[int]) -> list[AnyAxis]:
        """The axes of an output whose entries come from those of the tensors at the same place, aligned at the end."""
        found: list[AnyAxis] = []
        every = [(t.shape, self.axes_of(t)) for t in tensors]
        for place in range(-len(shape), 0):
            size = shape[place]
            met = [axes[place] for sizes, axes in every if -place <= len(sizes) and sizes[place] == size]
            found.append(self.join(*met) if met else Run(size))
        return found

    def in_shape(self, tensor: Tensor, shape: Sequence[int]) -> list[AnyAxis]:
        """The axes of a tensor in another shape, dimension by dimension as far as the sizes agree."""
        axes = self.axes_of(tensor)
        return self._in_sizes(axes, [a.size for a in axes], [*shape])

    def _in_sizes(self, axes: Sequence[AnyAxis], old: Sequence[int], new: Sequence[int]) -> list[AnyAxis]:
        if 0 in old:
            return self._around_nothing(axes, old, new)
        found: list[AnyAxis] = []
        i = 0
        while len(found) < len(new):
            # the smallest numbers of dimensions, old and new, that hold the same entries
            j = len(found)
            last, left, right = i, 1, new[j]
            end = j + 1
            while left != right:
                if left < right:
                    left, last = left * old[last], last + 1
                else:
                    right, end = right * new[end], end + 1
            while last < len(old) and old[last] == 1:
                last += 1
            piece, i = axes[i:last], last
            try:
                found += reshaped(piece, new[j:end])
            except MisfitError:
                self.block(piece, f"{self.mixes.partition(',')[0]}, which takes them apart")
                found += [Run(s) for s in new[j:end]]
        return found

    def _around_nothing(self, axes: Sequence[AnyAxis], old: Sequence[int], new: Sequence[int]) -> list[AnyAxis]:
        """The axes of a tensor without entries, such as the boxes that a detector has not found, in another shape."""
        i, j = [*old].index(0), [*new].index(0)
        if prod(old[:i]) == prod(new[:j]) and prod(old[i + 1 :]) == prod(new[j + 1 :]):
            before = self._in_sizes(axes[:i], old[:i], new[:j])
            return [*before, axes[i], *self._in_sizes(axes[i + 1 :], old[i + 1 :], new[j + 1 :])]
        self.block(axes)
        return [Run(s) for s in new]
