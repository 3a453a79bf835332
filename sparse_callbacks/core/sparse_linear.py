"""`SparseLinear`, a linear layer that holds its live weights alone."""

import math
from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_callbacks.core.live_places import GroupPlaces, LivePlaces, RowPlaces, keys_of_mask
from sparse_callbacks.core.moved_places import true_places
from sparse_callbacks.core.pattern_draws import drawn_keys
from sparse_callbacks.core.product_records import CallRecords, Use
from sparse_callbacks.core.sparse_products import linear_by_groups, linear_by_rows
from sparse_callbacks.core.sparse_state import values_for_weight, written

Storage = Literal["sparse", "grouped"]
LARGEST_DENSE = 2**31  # entries of a layer that may be made dense


class SparseLinear(nn.Module):
    """A linear layer whose pruned weights do not exist: it costs what its live weights cost, in time and in memory.

    Made by `from_dense` or `random`. The live values are one Parameter, `values`, which `named_parameters` calls ``weight``
    as in `nn.Linear`; `weight` itself is the dense matrix, made when it is asked for and differentiable by the values.
    ``state_dict`` holds it too, so that an `nn.Linear` loads it.

    Attributes:
        in_features, out_features: The shape of the matrix.
        storage: "sparse", where any weights live, or "grouped", where every ``group`` rows read the same inputs.
        group: The number of rows that read the same inputs; 1 for "sparse".
        feature_major: Whether outputs are views of ``[features, batch]`` memory, which the next layer reads without a copy.
            Give False where a module calls ``.view`` on them.
        compact_state: Whether ``state_dict`` holds live values and pattern instead of the dense matrix.
        name: The layer's name in its model, for messages.
        bias: The bias, a Parameter, or None.
        records: Where it is a list, each backward pass appends the inputs and output gradients ``[features, batch]``.
        pattern_follows: Whether a dense matrix is loaded though it has weights outside of the live places.
        weight_was_read: Whether somebody has asked for the dense `weight`.
    """

    bias: nn.Parameter | None

    def __init__(self, places: LivePlaces, values: Tensor, bias: Tensor | None, *, feature_major: bool = True) -> None:
        """A layer of these tensors; `from_dense` and `random` make them.

        Args:
            places: The pattern.
            values: The live values, in the shape of ``places.values_shape``.
            bias: The bias ``[out_features]``, or None.
            feature_major: Whether outputs are views of feature-major memory.
        """
        super().__init__()
        self.in_features, self.out_features = places.inputs, places.outputs
        self.storage: Storage = "sparse" if isinstance(places, RowPlaces) else "grouped"
        self.group = places.group
        self.feature_major = feature_major
        self.compact_state = self.is_too_large
        self.name = ""
        self.records: list[tuple[Tensor, Tensor]] | None = None
        self.pattern_follows = self.weight_was_read = False
        self.places = places
        refuse_device(self.storage, values.device)
        self.register_parameter("weight", as_parameter(values))
        self.register_parameter("bias", None if bias is None else as_parameter(bias))

    @classmethod
    def from_dense(
        cls,
        linear: nn.Linear,
        mask: Tensor,
        *,
        storage: Storage = "sparse",
        group: int = 64,
        feature_major: bool = True,
    ) -> "SparseLinear":
        """The layer that computes what ``linear`` computes with its weight masked.

        Args:
            linear: The dense layer. It is left as it is.
            mask: Where its weights live, a bool tensor of the weight's shape.
            storage: "sparse" or "grouped".
            group: For "grouped", the number of rows that read the same inputs.
            feature_major: Whether outputs are views of feature-major memory.

        Raises:
            ValueError: The mask has another shape, or is not of the pattern of the storage.
        """
        weight = linear.weight
        if mask.shape != weight.shape:
            raise ValueError(f"the mask has shape {tuple(mask.shape)} and the weight {tuple(weight.shape)}")
        keys = keys_of_mask(mask.to(torch.bool), checked_group(storage, group, weight.shape[0]))
        places = places_of(storage, weight.shape[0], weight.shape[1], group, keys)
        if weight.device.type != "meta":
            places.to(weight.device)
            values = places.read(weight.detach())
        else:
            values = torch.empty(places.values_shape, dtype=weight.dtype, device="meta")
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(places, values, bias, feature_major=feature_major)
        layer.values.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    @classmethod
    def random(
        cls,
        in_features: int,
        out_features: int,
        fan_in: int,
        *,
        storage: Storage = "sparse",
        group: int = 64,
        bias: bool = True,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        feature_major: bool = True,
    ) -> "SparseLinear":
        """A layer in which each output reads ``fan_in`` random inputs; the dense matrix is never made.

        Values and bias are uniform in plus or minus ``1 / sqrt(fan_in)``, as `nn.Linear` initializes a layer of so many
        inputs.

        Args:
            in_features: The number of inputs.
            out_features: The number of outputs.
            fan_in: The number of inputs that each output reads.
            storage: "sparse" or "grouped".
            group: For "grouped", the number of rows that read the same inputs.
            bias: Whether it has a bias.
            generator: The random generator of pattern and values, on the CPU; torch's own where it is None.
            device: Where the layer is made. On "meta" only the pattern is drawn.
            dtype: The type of the values.
            feature_major: Whether outputs are views of feature-major memory.

        Raises:
            ValueError: ``fan_in`` is not between 0 and ``in_features``, or ``group`` does not divide the outputs.
        """
        if not 0 <= fan_in <= in_features:
            raise ValueError(f"fan_in={fan_in} of {in_features} inputs: give a number from 0 to {in_features}")
        blocks = out_features // checked_group(storage, group, out_features)
        keys = drawn_keys(blocks, in_features, fan_in, generator)
        places = places_of(storage, out_features, in_features, group, keys)
        where = torch.device(device) if device is not None else torch.get_default_device()
        values = torch.empty(places.values_shape, dtype=dtype, device=where)
        offset = torch.empty(out_features, dtype=dtype, device=where) if bias else None
        layer = cls(places, values, offset, feature_major=feature_major)
        if where.type != "meta":
            places.to(where)
            layer.reset_parameters(generator)
        return layer

    @torch.no_grad()
    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw values and bias anew, uniform in plus or minus ``1 / sqrt(fan_in)``, and leave the pattern.

        Args:
            generator: The random generator, on the CPU; torch's own where it is None.
        """
        fan_in = self.live / max(1, self.out_features)  # where rows read different numbers of inputs, their mean
        bound = 1 / math.sqrt(fan_in) if fan_in else 0.0
        for tensor in (self.values, self.bias):
            if tensor is not None:
                drawn = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
                tensor.copy_(drawn.uniform_(-bound, bound, generator=generator))

    @property
    def values(self) -> nn.Parameter:
        """The live values: ``[1, live]`` for "sparse", ``[blocks, group, k]`` for "grouped"."""
        values = self._parameters["weight"]
        assert values is not None
        return values

    def register_values(self, values: nn.Parameter) -> None:
        """Hold another Parameter of live values, in the shape that the pattern asks for."""
        refuse_device(self.storage, values.device)
        self._parameters["weight"] = values
        self.let_pattern_follow()

    @property
    def called(self) -> str:
        """The layer in a message."""
        return self.name or "a SparseLinear"

    @property
    def is_too_large(self) -> bool:
        """Whether the layer has too many entries for a dense matrix."""
        return self.out_features * self.in_features > LARGEST_DENSE

    def refuse_dense(self, what: str) -> None:
        """Refuse what needs the dense matrix of a layer that is too large for one."""
        if self.is_too_large:
            raise ValueError(
                f"{self.called} has {self.out_features} x {self.in_features} entries, too many for a dense "
                f"matrix: {what} cannot be made. Use values, keys() and the compact state_dict"
            )

    @property
    def weight(self) -> Tensor:
        """The dense matrix ``[out_features, in_features]``, a copy; differentiable by the live values."""
        if "weight" not in self.__dict__.get("_parameters", {}):
            raise AttributeError("weight")
        self.refuse_dense("weight")
        object.__setattr__(self, "weight_was_read", True)
        return self.places.dense(self.values)

    @property
    def mask(self) -> Tensor:
        """Where weights live, a bool tensor ``[out_features, in_features]``, made when asked for."""
        self.refuse_dense("mask")
        return self.places.dense(torch.ones(self.values.shape, dtype=torch.bool, device=self.places.device))

    @property
    def live(self) -> int:
        """The number of live weights."""
        return self.values.numel()

    @property
    def density(self) -> float:
        """The fraction of the weights that live."""
        return self.live / max(1, self.out_features * self.in_features)

    @property
    def block_rows(self) -> int:
        """The number of blocks of rows, each with live inputs of its own."""
        return self.places.blocks

    def keys(self) -> Tensor:
        """Ascending int64 keys of the live units: ``block row * in_features + input``."""
        return self.places.keys()

    def unit_magnitudes(self) -> Tensor:
        """Of each live unit the sum of its rows' absolute values, in the order of `keys` and at least in float32."""
        return self.places.sums(self.values.detach().abs())

    def forward(self, x: Tensor) -> Tensor:
        """``x W' + b`` for ``x [..., in_features]``."""
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.called} has {self.in_features} inputs and was given {tuple(x.shape)}")
        return self.product(x) if self.records is None else self.uncompiled_product(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def uncompiled_product(self, x: Tensor) -> Tensor:
        """The product outside of compiled graphs: lists that grow are not for them."""
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """What `forward` returns."""
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        rows = x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), self.in_features)
        use = None
        if self.records is not None:
            use = Use(CallRecords(self.records))
            values = use.call.tapped(values)
        if isinstance(self.places, RowPlaces):
            y = linear_by_rows(values, bias, self.places.rows, rows.to(values.dtype), use)
        else:
            assert isinstance(self.places, GroupPlaces)
            kind = x.device.type
            if torch.is_autocast_enabled(kind):
                # bmm within a Function is not autocast's business
                dtype = torch.get_autocast_dtype(kind)
                values, rows, bias = values.to(dtype), rows.to(dtype), None if bias is None else bias.to(dtype)
            y = linear_by_groups(values, bias, self.places.groups, rows, use)
        if not self.feature_major:
            y = y.contiguous()
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)

    @torch.no_grad()
    def move_to(self, keys: Tensor, tensors: Iterable[Tensor] = (), slots: Tensor | None = None) -> Tensor:
        """Let other units live, as many as before (for "grouped", as many in each block). All is written in place.

        Args:
            keys: The ascending keys of the units that live from now on.
            tensors: Further tensors of the values' shape that move with them, such as optimizer state.
            slots: Where each of these units was before, -1 for those that are born; searched for where it is None.

        Returns:
            Where values were born, a bool tensor of their shape. They are 0.
        """
        places = self.places
        if keys.shape != (places.units,):
            raise ValueError(f"{self.called} has {places.units} live units and was given {keys.numel()} keys")
        slots = places.slots_of(keys) if slots is None else slots
        born = slots < 0
        source, new = slots.clamp(min=0), true_places(born)
        for tensor in (self.values, *tensors):
            tensor.copy_(places.from_units(places.taken(tensor, source, new)))
        places.set_keys(keys)
        return places.of_units(born)

    @torch.no_grad()
    def set_places(self, keys: Tensor, values: Tensor | None = None) -> None:
        """Take another pattern, of any number of units.

        Args:
            keys: The ascending keys of its units.
            values: The values there; those that are live now are kept and others are 0 where it is None.
        """
        if values is None:
            slots = self.places.slots_of(keys)
            by_unit = self.places.taken(self.values, slots.clamp(min=0), true_places(slots < 0))
            self.places.set_keys(keys)
            values = self.places.from_units(by_unit)
        else:
            self.places.set_keys(keys)
        if values.shape == self.values.shape:
            self.values.copy_(values)
        else:
            self.values.grad = None
            self.values.data = values.detach().to(self.values)

    def to_dense(self) -> nn.Linear:
        """The `nn.Linear` with the same weights, zeros where none live."""
        self.refuse_dense("an nn.Linear")
        linear = nn.Linear(
            self.in_features, self.out_features, bias=self.bias is not None, device="meta", dtype=self.values.dtype
        )
        dense = self.places.dense(self.values.detach()) if not self.values.is_meta else linear.weight.detach()
        linear.weight = nn.Parameter(dense, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.detach().clone(), requires_grad=self.bias.requires_grad)
        return linear.train(self.training)

    def extra_repr(self) -> str:
        group = f", group={self.group}" if self.storage == "grouped" else ""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"storage={self.storage!r}{group}, live={self.live}, density={self.density:.3g}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in ("weight", "values"):
            super().__setattr__(name, value)
        elif isinstance(value, nn.Parameter) and value.shape == self.places.values_shape:
            self.register_values(value)  # so does load_state_dict(assign=True) set them
        else:
            raise AttributeError(
                f"{self.called}: {name} cannot be set, as pruned weights do not exist. Write into its live values, "
                "layer.values.data.copy_(...), or set another pattern with set_places(keys, values)"
            )

    def __delattr__(self, name: str) -> None:
        if name in ("weight", "values"):
            raise AttributeError(f"{self.called}: {name} cannot be deleted, and a SparseLinear cannot be parametrized")
        super().__delattr__(name)

    def _apply(self, fn: Any, recurse: bool = True) -> "SparseLinear":
        refuse_device(self.storage, fn(torch.empty(0, dtype=self.values.dtype, device=self.values.device)).device)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.let_pattern_follow()
        return self

    def let_pattern_follow(self) -> None:
        """Move the pattern to where the values are. It stays real where they are on the meta device: `to_empty` keeps it."""
        values = self.values
        if values.is_meta:
            return
        self.places.to(values.device)
        if values.is_shared():  # type: ignore[no-untyped-call]
            self.places.share_memory()

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        written(self, destination, prefix, keep_vars)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        # registered last: it sees what the user's own hooks have made of the state
        handle = self.register_load_state_dict_pre_hook(values_for_weight)  # type: ignore[no-untyped-call]
        try:
            super()._load_from_state_dict(state_dict, prefix, *args)
        finally:
            handle.remove()


def places_of(storage: Storage, outputs: int, inputs: int, group: int, keys: Tensor) -> LivePlaces:
    """The pattern of these keys."""
    return RowPlaces(outputs, inputs, keys) if storage == "sparse" else GroupPlaces(outputs, inputs, group, keys)


def checked_group(storage: str, group: int, outputs: int) -> int:
    """The number of rows in a block.

    Raises:
        ValueError: The storage is unknown, or ``group`` does not divide the rows.
    """
    if storage not in ("sparse", "grouped"):
        raise ValueError(f"storage={storage!r}: give 'sparse' or 'grouped'")
    if storage == "sparse":
        return 1
    if group < 1 or outputs % group:
        raise ValueError(f"groups of {group} do not divide {outputs} rows: give another group, or storage='sparse'")
    return group


def refuse_device(storage: str, device: torch.device) -> None:
    """Refuse "sparse" storage on a device where its products would be slower than dense ones."""
    if storage == "sparse" and device.type not in ("cpu", "meta"):
        raise ValueError(
            f"storage='sparse' runs on the CPU, and this layer was asked to go to {device}: there a masked layer is faster. Use "
            "storage='masked', or 'grouped', or to_dense(module) first"
        )


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor as a Parameter, itself where it is one."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
