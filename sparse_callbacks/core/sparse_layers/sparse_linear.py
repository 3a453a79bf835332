"""`SparseLinear`, a linear layer that holds its live weights alone."""

import math

import torch
from torch import Tensor, nn

from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.sparse_layers.live_places import (
    LARGEST_INT32,
    GroupPlaces,
    LivePlaces,
    RowPlaces,
    Storage,
    keys_of_mask,
    places_of,
)
from sparse_callbacks.core.sparse_layers.live_weight import LiveWeight, as_parameter
from sparse_callbacks.core.sparse_layers.pattern_draws import fan_in_columns
from sparse_callbacks.core.sparse_layers.product_records import CallRecords, Use
from sparse_callbacks.core.sparse_layers.sparse_products import linear_by_groups, linear_by_rows


class SparseLinear(LiveWeight):
    """A linear layer whose pruned weights do not exist: it costs what its live weights cost, in time and in memory.

    Made by `from_dense` or `random`. The live values are one Parameter, `values`, which `named_parameters` calls ``weight``
    as in `nn.Linear`; `weight` itself is the dense matrix, made when it is asked for and differentiable by the values.
    ``state_dict`` holds it too, so that an `nn.Linear` loads it.

    Attributes:
        in_features: Number of inputs, the columns of the matrix.
        out_features: Number of outputs, the rows of the matrix.
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
        handed_out: Watches the dense copies, into which somebody may write.

    Example:
        >>> import torch
        >>> from sparse_callbacks import SparseLinear
        >>> layer = SparseLinear.random(64, 128, fan_in=8)
        >>> layer.live, layer(torch.zeros(3, 64)).shape
        (1024, torch.Size([3, 128]))
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
        super().__init__(places, values)
        self.feature_major = feature_major
        self.register_parameter("bias", None if bias is None else as_parameter(bias))

    @classmethod
    @checked
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

        Example:
            >>> import torch
            >>> from sparse_callbacks import SparseLinear
            >>> dense = torch.nn.Linear(6, 4)
            >>> SparseLinear.from_dense(dense, dense.weight > 0).to_dense().weight.shape
            torch.Size([4, 6])
        """
        weight = linear.weight
        if mask.shape != weight.shape:
            raise ValueError(f"the mask has shape {tuple(mask.shape)} and the weight {tuple(weight.shape)}")
        keys = keys_of_mask(mask.to(torch.bool), 1 if storage == "sparse" else group)
        places = places_of(storage, weight.shape[0], weight.shape[1], group, keys)
        values = values_at(places, weight)
        bias = None if linear.bias is None else linear.bias.detach().clone()
        layer = cls(places, values, bias, feature_major=feature_major)
        layer.values.requires_grad_(weight.requires_grad)
        if layer.bias is not None:
            layer.bias.requires_grad_(linear.bias.requires_grad)
        return layer.train(linear.training)

    @classmethod
    @checked
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
            ValueError: ``fan_in`` is not between 0 and ``in_features``, ``group`` does not divide the outputs, a size is
                negative or exceeds 2^31 - 1, as the number of live weights must not, or no such device is known.
        """
        refuse_sizes(in_features, out_features, fan_in)
        where = torch.get_default_device() if device is None else device_of(device)
        places = places_of(storage, out_features, in_features, group, torch.empty(0, dtype=torch.int64, device="cpu"))
        places.set_columns(fan_in_columns(places.blocks, in_features, fan_in, generator))
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

    def forward(self, x: Tensor) -> Tensor:
        """``x W' + b``, of shape ``[..., out_features]``.

        Args:
            x: The batch, ``[..., in_features]``, in the type of the values.

        Raises:
            ValueError: The last dimension of ``x`` is not ``in_features``.
        """
        if x.shape[-1] != self.in_features:
            raise ValueError(f"{self.called} has {self.in_features} inputs and was given {tuple(x.shape)}")
        return self.product(x) if self.records is None else self.uncompiled_product(x)

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def uncompiled_product(self, x: Tensor) -> Tensor:
        """The product outside of compiled graphs, which cannot hold lists that grow.

        Args:
            x: The batch, ``[..., in_features]``.
        """
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """What `forward` returns.

        Args:
            x: The batch, ``[..., in_features]``.
        """
        values: Tensor = self.values
        bias: Tensor | None = self.bias
        rows = x if x.dim() == 2 else x.reshape(math.prod(x.shape[:-1]), self.in_features)
        use = None
        if self.records is not None:
            use = Use(CallRecords(self.records))
            values = use.call.tapped(values)
        if isinstance(self.places, RowPlaces):
            y = linear_by_rows(values, bias, self.places.rows, self.as_values(rows), use)
        else:
            assert isinstance(self.places, GroupPlaces)
            values, rows, bias = self.autocast(values, rows, bias)
            y = linear_by_groups(values, bias, self.places.groups, rows, use)
        if not self.feature_major:
            y = y.contiguous()
        return y if x.dim() == 2 else y.reshape(*x.shape[:-1], self.out_features)

    def as_values(self, x: Tensor) -> Tensor:
        """A batch in the type of the values, which autocast alone may change.

        Args:
            x: The batch.

        Raises:
            RuntimeError: It is of another type, as in `nn.Linear`.
        """
        dtype: torch.dtype = self.values.dtype
        if x.dtype == dtype:
            return x
        if not is_cast(x, self.values):
            raise RuntimeError(
                f"{self.called} holds {_short(dtype)} and was given a batch of {_short(x.dtype)}: convert one of them, with "
                "x.to(layer.values.dtype) or module.to(x.dtype)"
            )
        return x.to(dtype)

    def autocast(self, values: Tensor, rows: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Values, batch and bias in the type of autocast, where that is on: it does not reach a bmm within a Function.

        Args:
            values: The live values.
            rows: The batch, ``[rows, in_features]``.
            bias: The bias, or None.
        """
        if not is_cast(rows, values):
            return values, self.as_values(rows), bias
        dtype = torch.get_autocast_dtype(rows.device.type)
        return values.to(dtype), rows.to(dtype), None if bias is None else bias.to(dtype)

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


def values_at(places: LivePlaces, weight: Tensor) -> Tensor:
    """The live values of a dense weight. The pattern moves to its device, but stays where the values are on the meta device.

    Args:
        places: The pattern.
        weight: The matrix ``[outputs, inputs]``.
    """
    if weight.is_meta:
        return torch.empty(places.values_shape, dtype=weight.dtype, device="meta")
    places.to(weight.device)
    return places.read(weight.detach())


def weight_name(layer: str) -> str:
    """The name of a layer's weight in ``named_parameters``.

    Args:
        layer: The layer's name; empty for the model itself.
    """
    return f"{layer}.weight" if layer else "weight"


def refuse_sizes(in_features: int, out_features: int, fan_in: int) -> None:
    """Refuse a layer that cannot be: patterns count in int32.

    Raises:
        ValueError: says which number is out of range.
    """
    most = {"in_features": LARGEST_INT32, "out_features": LARGEST_INT32 // max(1, fan_in), "fan_in": in_features}
    for name, value in {"in_features": in_features, "out_features": out_features, "fan_in": fan_in}.items():
        if not 0 <= value <= most[name]:
            raise ValueError(
                f"{name}={value} of a layer of {in_features} inputs, {out_features} outputs and fan-in {fan_in}: give a "
                f"number from 0 to {most[name]}"
            )


def is_cast(x: Tensor, values: Tensor) -> bool:
    """Whether autocast is on and changes the types of a batch and of live values, as it does with all but float64."""
    on = torch.is_autocast_enabled(x.device.type)
    return on and all(t.is_floating_point() and t.dtype != torch.float64 for t in (x, values))


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def device_of(device: torch.device | str) -> torch.device:
    """The device of that name.

    Raises:
        ValueError: torch knows none.
    """
    try:
        return torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r} is not known to torch. Give for example 'cpu' or 'meta'.") from error
