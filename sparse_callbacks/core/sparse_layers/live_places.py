"""Patterns of truly sparse layers: live places of a matrix, as products read them."""

from functools import reduce
from typing import Literal, get_args

import torch
from torch import Tensor

from sparse_callbacks.core.arguments import refuse_unknown
from sparse_callbacks.core.largest import widened
from sparse_callbacks.core.sparse_layers.moved_places import fill_by_column, fill_columns, fill_rows
from sparse_callbacks.core.sparse_layers.place_units import GroupPattern, LivePlaces, RowPattern, checked_keys
from sparse_callbacks.core.sparse_layers.quick_places import fresh, repeated

__all__ = ["GroupPlaces", "LivePlaces", "RowPlaces", "Storage", "keys_of_mask", "places_of"]

Storage = Literal["sparse", "grouped"]
LARGEST_INT32 = 2**31 - 1


class RowPlaces(LivePlaces):
    """Any places: the rows in compressed form (CSR), and the columns too, for the product with the transposed matrix."""

    crow: Tensor
    col: Tensor
    crow_t: Tensor
    col_t: Tensor
    perm: Tensor

    def __init__(self, outputs: int, inputs: int, keys: Tensor) -> None:
        super().__init__(outputs, inputs, 1)
        self.set_keys(keys)

    def set_columns(self, columns: Tensor) -> None:
        crow = torch.arange(self.outputs + 1, dtype=torch.int32, device=columns.device) * columns.shape[1]
        rows = torch.arange(self.outputs, dtype=torch.int32, device=columns.device)
        self.set_rows(crow, columns.reshape(-1), rows.repeat_interleave(columns.shape[1]))

    def set_rows(self, crow: Tensor, col: Tensor, rows: Tensor) -> None:
        """Take the pattern of these compressed rows.

        Args:
            crow: Where each row begins, int32.
            col: The column of each live place, int32.
            rows: Its row, int32.

        Raises:
            ValueError: There are more places than int32 numbers.
        """
        if col.numel() > LARGEST_INT32:
            raise ValueError(f"a layer may have {LARGEST_INT32} live weights, and this one would have {col.numel()}")
        self.replace(crow=crow, col=col)
        crow_t = self.room("crow_t", (self.inputs + 1,), col)
        col_t, perm = (self.room(name, col.shape, col) for name in ("col_t", "perm"))
        fill_columns(rows, col, crow_t, col_t, perm)

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
    def rows(self) -> RowPattern:
        """The pattern as the products read it."""
        return RowPattern(self.crow, self.col, self.crow_t, self.col_t, self.perm)

    def keys(self) -> Tensor:
        # products of numbers of one type, which is small where all keys fit, take a fraction of the time
        small = self.outputs * self.inputs <= LARGEST_INT32
        firsts = torch.arange(self.outputs, dtype=torch.int32 if small else torch.int64, device=self.device).mul_(
            self.inputs
        )
        keys = repeated(firsts, self.crow.diff(), self.units).add_(self.col)
        return fresh(self.units, torch.int64, self.device).copy_(keys) if small else keys

    def set_keys(self, keys: Tensor) -> None:
        crow, col = self.room("crow", (self.outputs + 1,), keys), self.room("col", keys.shape, keys)
        self.set_rows(crow, col, fill_rows(keys, self.inputs, crow, col))

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
        return checked_keys(keys, col, self.inputs)

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
        return matrix.reshape(-1).index_select(0, self.keys()).view(1, -1)


class GroupPlaces(LivePlaces):
    """The same inputs for every ``group`` rows: ``idx [blocks, k]``, and the same sorted by input."""

    idx: Tensor
    places: Tensor
    offsets: Tensor

    def __init__(self, outputs: int, inputs: int, group: int, keys: Tensor) -> None:
        super().__init__(outputs, inputs, group)
        self.set_keys(keys)

    @property
    def units(self) -> int:
        return self.idx.numel()

    @property
    def device(self) -> torch.device:
        return self.idx.device

    @property
    def groups(self) -> GroupPattern:
        """The pattern as the products read it."""
        return GroupPattern(self.idx, self.places, self.offsets)

    @property
    def values_shape(self) -> tuple[int, ...]:
        return (self.blocks, self.group, self.idx.shape[1])

    def keys(self) -> Tensor:
        return (self.idx + self.first_keys(self.device)).flatten()

    def set_keys(self, keys: Tensor) -> None:
        if self.blocks and keys.numel() % self.blocks:
            raise ValueError(f"{keys.numel()} live inputs cannot be as many for each of {self.blocks} groups of rows")
        by_block = keys.view(self.blocks, keys.numel() // max(1, self.blocks))
        columns = by_block - self.first_keys(keys.device)
        if bool(((columns < 0) | (columns >= max(1, self.inputs))).any()):
            raise ValueError(f"the groups of {self.group} rows do not all read the same number of inputs")
        self.set_columns(columns.to(torch.int32))

    def set_columns(self, columns: Tensor) -> None:
        flat = columns.reshape(-1)
        self.replace(idx=columns)
        fill_by_column(flat, self.room("offsets", (self.inputs + 1,), flat), self.room("places", flat.shape, flat))

    def first_keys(self, device: torch.device) -> Tensor:
        """The key of the first input of each block, ``[blocks, 1]``."""
        return torch.arange(self.blocks, device=device)[:, None] * self.inputs

    def saved(self) -> dict[str, Tensor]:
        return {"idx": self.idx}

    def keys_of_saved(self, saved: dict[str, Tensor]) -> Tensor:
        idx = saved["idx"].to(torch.int64)
        if idx.dim() != 2 or idx.shape[0] != self.blocks:
            raise ValueError(f"its idx does not describe {self.blocks} groups of {self.group} rows")
        return checked_keys((idx + self.first_keys(idx.device)).flatten(), idx.flatten(), self.inputs)

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
        return matrix.scatter(2, self.columns_of_values(), values).view(self.outputs, self.inputs)

    def read(self, matrix: Tensor) -> Tensor:
        matrix = matrix.reshape(self.blocks, self.group, self.inputs)
        return matrix.gather(2, self.columns_of_values())

    def columns_of_values(self) -> Tensor:
        """The column of each value, int64, in the shape of the values."""
        return self.idx.to(torch.int64)[:, None, :].expand(self.values_shape)


def places_of(storage: Storage, outputs: int, inputs: int, group: int, keys: Tensor) -> LivePlaces:
    """The pattern of these keys.

    Args:
        storage: "sparse" or "grouped".
        outputs: The number of rows of the matrix.
        inputs: The number of its columns.
        group: For "grouped", the number of rows that read the same inputs.
        keys: Ascending keys of the live units.

    Raises:
        ValueError: The storage is unknown, ``group`` does not divide the outputs, or the keys are not of the pattern.
    """
    refuse_unknown({"storage": storage}, {"storage": get_args(Storage)})
    if storage == "sparse":
        return RowPlaces(outputs, inputs, keys)
    refuse_group(outputs, group)
    return GroupPlaces(outputs, inputs, group, keys)


def refuse_group(outputs: int, group: int) -> None:
    """Refuse groups that do not divide the rows."""
    if group < 1 or outputs % group:
        raise ValueError(f"groups of {group} do not divide {outputs} rows. Give another group, or storage='sparse'")


def keys_of_mask(mask: Tensor, group: int) -> Tensor:
    """The ascending unit keys of a mask ``[outputs, inputs]``.

    Raises:
        ValueError: With ``group`` above 1, the mask is not of the pattern in which every group of rows reads the same
            inputs, as many for each group.
    """
    if group == 1:
        return mask.reshape(-1).nonzero().flatten()
    refuse_group(mask.shape[0], group)
    if why := why_not_grouped(mask, group):
        raise ValueError(f"its mask {why}. Make it with pattern='fan_in/{group}', or give storage='sparse'")
    return mask[::group].reshape(-1).nonzero().flatten()


def why_not_grouped(mask: Tensor, group: int) -> str:
    """Why a mask is not of the pattern in which every group of rows reads the same inputs, as many for each group; the end of a
    sentence, empty where it is.

    Args:
        mask: ``[outputs, inputs]``.
        group: The number of rows, which divides the outputs.
    """
    first = mask[::group]
    if not torch.equal(mask, first.repeat_interleave(group, 0)):
        return f"has groups of {group} rows that do not read the same inputs"
    counts = first.sum(1)
    if counts.numel() and int(counts.min()) != int(counts.max()):
        return f"has groups of {group} rows that read from {int(counts.min())} to {int(counts.max())} inputs, not as many each"
    return ""
