"""Patterns of truly sparse layers: which places of a weight matrix are live, in the forms that its products read."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_callbacks.core.largest import widened
from sparse_callbacks.core.moved_places import compressed, transposed

LARGEST_INT32 = 2**31 - 1


class Rows(NamedTuple):
    """A pattern in compressed rows, and the same of the transposed matrix, whose values are ``values[perm]``."""

    crow: Tensor
    col: Tensor
    crow_t: Tensor
    col_t: Tensor
    perm: Tensor

    def transposed(self) -> "Rows":
        """The pattern of the transposed matrix."""
        places = torch.arange(self.perm.numel(), dtype=self.perm.dtype, device=self.perm.device)
        return Rows(
            self.crow_t, self.col_t, self.crow, self.col, torch.empty_like(places).scatter_(0, self.perm.long(), places)
        )


class Groups(NamedTuple):
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

    group: int

    def __init__(self, outputs: int, inputs: int) -> None:
        self.outputs, self.inputs = outputs, inputs

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
            old = getattr(self, name, None)
            if old is not None and old.shape == tensor.shape:
                old.copy_(tensor)
            else:
                setattr(self, name, tensor)

    def slots_of(self, keys: Tensor) -> Tensor:
        """The slots that units have now, -1 where they are not live.

        Args:
            keys: The ascending keys of the units.
        """
        old = self.keys()
        if not old.numel():
            return torch.full_like(keys, -1)
        slots = torch.searchsorted(old, keys).clamp_(max=old.numel() - 1)
        return slots.masked_fill_(old[slots] != keys, -1)


class RowPlaces(LivePlaces):
    """Any places: the rows in compressed form (CSR), and the columns too, for the product with the transposed matrix."""

    group = 1
    crow: Tensor
    col: Tensor
    crow_t: Tensor
    col_t: Tensor
    perm: Tensor

    def __init__(self, outputs: int, inputs: int, keys: Tensor) -> None:
        super().__init__(outputs, inputs)
        if keys.numel() > LARGEST_INT32:
            raise ValueError(
                f"a layer may have {LARGEST_INT32} live weights at most, and this one would have {keys.numel()}"
            )
        self.set_keys(keys)

    @property
    def units(self) -> int:
        return self.col.numel()

    @property
    def device(self) -> torch.device:
        return self.col.device

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (1, self.units)

    @property
    def rows(self) -> Rows:
        """The pattern as the products read it."""
        return Rows(self.crow, self.col, self.crow_t, self.col_t, self.perm)

    def keys(self) -> Tensor:
        rows = torch.arange(self.outputs, device=self.device)
        return torch.repeat_interleave(rows, self.crow.diff()).mul_(self.inputs).add_(self.col)

    def set_keys(self, keys: Tensor) -> None:
        crow, col, rows = compressed(keys, self.outputs, self.inputs)
        crow_t, col_t, perm = transposed(rows, col, self.inputs)
        self.replace(crow=crow, col=col, crow_t=crow_t, col_t=col_t, perm=perm)

    def saved(self) -> dict[str, Tensor]:
        return {"crow": self.crow, "col": self.col}

    def keys_of_saved(self, saved: dict[str, Tensor]) -> Tensor:
        crow, col = saved["crow"].to(torch.int64), saved["col"].to(torch.int64)
        lengths = crow.diff()
        if (
            crow.numel() != self.outputs + 1
            or int(crow[0])
            or int(crow[-1]) != col.numel()
            or bool((lengths < 0).any())
        ):
            raise ValueError(f"its crow does not describe {self.outputs} rows of {col.numel()} live weights")
        keys = torch.repeat_interleave(torch.arange(self.outputs, device=col.device), lengths) * self.inputs + col
        return checked(keys, col, self.inputs)

    def sums(self, values: Tensor) -> Tensor:
        return values.flatten().to(widened(values.dtype))

    def of_units(self, units: Tensor) -> Tensor:
        return units.view(1, -1)

    def by_unit(self, values: Tensor) -> Tensor:
        return values.view(-1)

    def from_units(self, values: Tensor) -> Tensor:
        return values.view(1, -1)

    def dense(self, values: Tensor) -> Tensor:
        matrix = torch.zeros(self.outputs * self.inputs, dtype=values.dtype, device=values.device)
        return matrix.scatter(0, self.keys(), values.flatten()).view(self.outputs, self.inputs)

    def read(self, matrix: Tensor) -> Tensor:
        return matrix.reshape(-1)[self.keys()].view(1, -1)


class GroupPlaces(LivePlaces):
    """The same inputs for every ``group`` rows: ``idx [blocks, k]``, and the same sorted by input."""

    idx: Tensor
    places: Tensor
    offsets: Tensor

    def __init__(self, outputs: int, inputs: int, group: int, keys: Tensor) -> None:
        super().__init__(outputs, inputs)
        self.group = group
        self.set_keys(keys)

    @property
    def units(self) -> int:
        return self.idx.numel()

    @property
    def device(self) -> torch.device:
        return self.idx.device

    @property
    def groups(self) -> Groups:
        """The pattern as the products read it."""
        return Groups(self.idx, self.places, self.offsets)

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.blocks, self.group, self.idx.shape[1])

    def keys(self) -> Tensor:
        blocks = torch.arange(self.blocks, device=self.device)
        return (self.idx + blocks[:, None] * self.inputs).flatten()

    def set_keys(self, keys: Tensor) -> None:
        idx = keys.view(self.blocks, -1) if self.blocks else keys.view(0, 0)
        idx = idx - torch.arange(self.blocks, device=keys.device)[:, None] * self.inputs
        if bool(((idx < 0) | (idx >= max(1, self.inputs))).any()):
            raise ValueError(f"the groups of {self.group} rows do not all read the same number of inputs")
        places = torch.argsort(idx.flatten(), stable=True)
        self.replace(idx=idx, places=places, offsets=counted(idx.flatten(), self.inputs).to(torch.int64))

    def saved(self) -> dict[str, Tensor]:
        return {"idx": self.idx}

    def keys_of_saved(self, saved: dict[str, Tensor]) -> Tensor:
        idx = saved["idx"].to(torch.int64)
        if idx.dim() != 2 or idx.shape[0] != self.blocks:
            raise ValueError(f"its idx does not describe {self.blocks} groups of {self.group} rows")
        keys = idx + torch.arange(self.blocks, device=idx.device)[:, None] * self.inputs
        return checked(keys.flatten(), idx.flatten(), self.inputs)

    def sums(self, values: Tensor) -> Tensor:
        # row is added to row in their order, so that a unit has the same sum bit by bit whatever lies beside it
        return reduce(torch.add, values.to(widened(values.dtype)).unbind(1)).flatten()

    def of_units(self, units: Tensor) -> Tensor:
        return units.view(self.blocks, 1, -1).expand(self.values_shape).contiguous()

    def by_unit(self, values: Tensor) -> Tensor:
        return values.transpose(1, 2).reshape(-1, self.group)

    def from_units(self, values: Tensor) -> Tensor:
        return values.view(self.blocks, -1, self.group).transpose(1, 2).contiguous()

    def dense(self, values: Tensor) -> Tensor:
        matrix = torch.zeros(self.blocks, self.group, self.inputs, dtype=values.dtype, device=values.device)
        return matrix.scatter(2, self.idx[:, None, :].expand(self.values_shape), values).view(self.outputs, self.inputs)

    def read(self, matrix: Tensor) -> Tensor:
        matrix = matrix.reshape(self.blocks, self.group, self.inputs)
        return matrix.gather(2, self.idx[:, None, :].expand(self.values_shape))


def counted(indices: Tensor, size: int) -> Tensor:
    """Where each of ``size`` numbers begins in the sorted ``indices``, int32 ``[size + 1]``."""
    counts = torch.zeros(size + 1, dtype=torch.int32, device=indices.device)
    if indices.numel():
        counts[1:] = torch.bincount(indices, minlength=size)
    return counts.cumsum(0, dtype=torch.int32)


def checked(keys: Tensor, columns: Tensor, inputs: int) -> Tensor:
    """Keys as they are.

    Raises:
        ValueError: They do not ascend, or a column is outside of the matrix.
    """
    if columns.numel() and (int(columns.min()) < 0 or int(columns.max()) >= inputs):
        raise ValueError(f"it has live weights outside of the layer's {inputs} inputs")
    if bool((keys.diff() <= 0).any()):
        raise ValueError("its live weights are not in ascending order")
    return keys


def keys_of_mask(mask: Tensor, group: int) -> Tensor:
    """The ascending unit keys of a mask ``[outputs, inputs]``.

    Raises:
        ValueError: With ``group`` above 1, the mask is not of the pattern in which every group of rows reads the same
            inputs, as many for each group.
    """
    if group == 1:
        return mask.reshape(-1).nonzero().flatten()
    outputs, inputs = mask.shape
    if outputs % group:
        raise ValueError(f"groups of {group} do not divide its {outputs} rows: give another group, or storage='sparse'")
    blocks = mask.reshape(outputs // group, group, inputs)
    rows = blocks[:, 0]
    if not bool((blocks == rows[:, None]).all()):
        raise ValueError(
            f"its mask is not of the pattern: every {group} rows must read the same inputs. Make it with "
            f"pattern='fan_in/{group}', or give storage='sparse'"
        )
    counts = rows.sum(1)
    if counts.numel() and int(counts.min()) != int(counts.max()):
        raise ValueError(
            f"its groups of {group} rows read from {int(counts.min())} to {int(counts.max())} inputs: each must read as many"
        )
    return rows.reshape(-1).nonzero().flatten()
