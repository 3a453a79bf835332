"""What patterns of truly sparse layers have in common, and the tensors of them that products read."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_callbacks.core.sparse_layers.moved_places import slots_at
from sparse_callbacks.core.sparse_layers.quick_places import counts_below


class RowPattern(NamedTuple):
    """A pattern in compressed rows, and the same of the transposed matrix, whose values are ``values[perm]``."""

    crow: Tensor
    col: Tensor
    crow_t: Tensor
    col_t: Tensor
    perm: Tensor

    def transposed(self) -> "RowPattern":
        """The pattern of the transposed matrix."""
        places = torch.arange(self.perm.numel(), dtype=self.perm.dtype, device=self.perm.device)
        return RowPattern(
            self.crow_t, self.col_t, self.crow, self.col, torch.empty_like(places).scatter_(0, self.perm.long(), places)
        )


class GroupPattern(NamedTuple):
    """The inputs ``idx [blocks, k]`` of each group of rows; and the same sorted by input: ``places`` of ``idx`` and, in them,
    ``offsets [inputs + 1]``."""

    idx: Tensor
    places: Tensor
    offsets: Tensor


class LivePlaces(ABC):
    """The live places of a weight ``[outputs, inputs]``, in units.

    A unit is one input column of one block of ``group`` rows. Its key is ``block * inputs + column``, and keys are always
    ascending. Products read plain tensors, which `move_to` rewrites where they are: captured graphs, compiled code and
    shared memory see the new pattern.
    """

    def __init__(self, outputs: int, inputs: int, group: int) -> None:
        self.outputs, self.inputs, self.group = outputs, inputs, group

    @property
    def blocks(self) -> int:
        return self.outputs // self.group

    @property
    @abstractmethod
    def units(self) -> int:
        """The number of live units."""

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where the pattern is."""

    @property
    @abstractmethod
    def values_shape(self) -> tuple[int, ...]:
        """The shape of the live values."""

    @abstractmethod
    def keys(self) -> Tensor:
        """Ascending int64 keys ``[units]``."""

    @abstractmethod
    def set_keys(self, keys: Tensor) -> None:
        """Take another pattern; in place where it has as many units."""

    @abstractmethod
    def set_columns(self, columns: Tensor) -> None:
        """Take another pattern, given by the ascending columns ``[blocks, k]`` that each block reads, int32."""

    @abstractmethod
    def saved(self) -> dict[str, Tensor]:
        """The tensors from which `from_saved` makes the pattern again."""

    @abstractmethod
    def keys_of_saved(self, saved: dict[str, Tensor]) -> Tensor:
        """The keys of a saved pattern.

        Raises:
            ValueError: It is not a pattern of this layer.
        """

    @abstractmethod
    def sums(self, values: Tensor) -> Tensor:
        """Values summed over the rows of each unit, ``[units]``, as numbers of at least 32 bits."""

    @abstractmethod
    def of_units(self, units: Tensor) -> Tensor:
        """What each unit has, ``[units]``, in the shape of the values."""

    @abstractmethod
    def by_unit(self, values: Tensor) -> Tensor:
        """Values as ``[units]``, or ``[units, group]``: a row for each unit."""

    @abstractmethod
    def from_units(self, values: Tensor) -> Tensor:
        """Values by unit in their own shape."""

    def taken(self, values: Tensor, slots: Tensor, born: Tensor) -> Tensor:
        """Values of other units, in a shape for as many as there are ``slots``.

        Args:
            values: values of the units that live now.
            slots: the slot that each unit has now; any, where it is born.
            born: places of the slots whose units are born: they get 0.
        """
        now = self.by_unit(values)
        if not len(now):
            return now.new_zeros(slots.numel(), *now.shape[1:])
        return now.index_select(0, slots).index_fill_(0, born, 0)

    @abstractmethod
    def dense(self, values: Tensor) -> Tensor:
        """The matrix ``[outputs, inputs]``, differentiable by the values."""

    @abstractmethod
    def read(self, matrix: Tensor) -> Tensor:
        """The entries of a matrix ``[outputs, inputs]`` at the live places, in the shape of the values."""

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of the pattern."""
        for name, tensor in vars(self).items():
            if isinstance(tensor, Tensor):
                yield name, tensor

    def to(self, device: torch.device) -> None:
        """Move the pattern to a device."""
        for name, tensor in list(self.tensors()):
            setattr(self, name, tensor.to(device))

    def share_memory(self) -> None:
        """Put the pattern into memory that processes share."""
        for _, tensor in self.tensors():
            tensor.share_memory_()  # type: ignore[no-untyped-call]

    def replace(self, **tensors: Tensor) -> None:
        """Take these tensors for the pattern: in place where the shapes are those that are there."""
        for name, tensor in tensors.items():
            self.room(name, tensor.shape, tensor).copy_(tensor)

    def room(self, name: str, shape: Sequence[int], like: Tensor) -> Tensor:
        """The tensor of the pattern with this name, to be written: a new one, on the device of ``like``, where there is none
        of this shape."""
        old = getattr(self, name, None)
        if old is None or old.shape != torch.Size(shape):
            setattr(self, name, torch.empty(shape, dtype=torch.int32, device=like.device))
        room: Tensor = getattr(self, name)
        return room

    def slots_of(self, keys: Tensor) -> Tensor:
        """The slots that units have now, -1 where they are not live.

        Args:
            keys: The ascending keys of the units.
        """
        old = self.keys()
        return slots_at(old, 0, keys, counts_below(old, keys))


def checked_keys(keys: Tensor, columns: Tensor, inputs: int) -> Tensor:
    """Keys as they are.

    Raises:
        ValueError: They do not ascend, or a column is outside of the matrix.
    """
    if columns.numel() and (int(columns.min()) < 0 or int(columns.max()) >= inputs):
        raise ValueError(f"it has live weights outside of the layer's {inputs} inputs")
    if bool((keys.diff() <= 0).any()):
        raise ValueError("its live weights are not in ascending order")
    return keys
