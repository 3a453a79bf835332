"""The weight of a truly sparse layer: one Parameter of live values and a pattern."""

from collections.abc import Iterable
from typing import Any, Self

import torch
from torch import Tensor, nn

from sparse_callbacks.core.sparse_layers.handed_out import HandedOut
from sparse_callbacks.core.sparse_layers.live_places import LivePlaces, RowPlaces, Storage
from sparse_callbacks.core.sparse_layers.product_records import Pair, recorded_matrix
from sparse_callbacks.core.sparse_layers.quick_places import mask_below, true_places
from sparse_callbacks.core.sparse_layers.sparse_state import values_for_weight, written

LARGEST_DENSE = 2**31  # entries of a layer that may be made dense
_OF_COMPUTED_WEIGHTS = ("weight_g", "weight_v", "weight_orig")  # of weight_norm, spectral_norm and prune
_PARAMETRIZE_BEFORE = (
    "Parametrize the nn.Linear before layers are exchanged: storage='auto' leaves it masked. to_dense(module) makes it an "
    "nn.Linear again, unless its values are lost already"
)
PRODUCTS_RUN_ON = ("cpu", "meta")  # devices of "sparse" storage


class LiveWeight(nn.Module):
    """A module whose weight is a matrix of which the live values alone exist.

    The values are the Parameter that torch knows as ``weight``, so that names, groups and the order of optimizer states are
    those of the dense layer; the attribute `weight` is the matrix, made when it is asked for. The pattern is plain tensors:
    no ``state_dict`` has them, and DDP does not send them with the buffers.
    """

    def __init__(self, places: LivePlaces, values: Tensor) -> None:
        super().__init__()
        self.in_features, self.out_features = places.inputs, places.outputs
        self.storage: Storage = "sparse" if isinstance(places, RowPlaces) else "grouped"
        self.group = places.group
        self.name = ""
        self.pattern_follows = self.weight_was_read = False
        self.records: list[Pair] | None = None
        self.handed_out = HandedOut()
        self.places = places
        self.compact_state = self.is_too_large
        refuse_device(self.storage, values.device)
        self.register_parameter("weight", as_parameter(values))

    @property
    def values(self) -> nn.Parameter:
        """The live values: ``[1, live]`` for "sparse", ``[blocks, group, k]`` for "grouped".

        Raises:
            RuntimeError: The Parameter was taken away, as ``torch.nn.utils.weight_norm`` does.
        """
        values = self._parameters.get("weight")
        if values is None:
            raise RuntimeError(
                f"{self.called} has lost its live values: somebody has taken the Parameter named weight away, as "
                f"torch.nn.utils.weight_norm does. {_PARAMETRIZE_BEFORE}"
            )
        return values

    def register_values(self, values: nn.Parameter) -> None:
        """Hold another Parameter of live values.

        Args:
            values: The Parameter, in the shape that the pattern asks for.
        """
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
        """Refuse what needs the dense matrix of a layer that is too large for one.

        Args:
            what: What needs it, for the error.

        Raises:
            ValueError: The layer has more than 2^31 entries.
        """
        if self.is_too_large:
            raise ValueError(
                f"{self.called} has {self.out_features} x {self.in_features} entries, too many for a dense "
                f"matrix: {what} cannot be made. Use values, keys() and the compact state_dict"
            )

    @property
    def weight(self) -> Tensor:
        """The dense matrix ``[out_features, in_features]``, a copy; differentiable by the live values.

        Raises:
            AttributeError: The live values are not registered yet.
            ValueError: The layer has too many entries for a dense matrix.
        """
        if "weight" not in self.__dict__.get("_parameters", {}):
            # register_parameter asks whether there is an attribute of that name already
            raise AttributeError("a SparseLinear has no weight before its live values are registered")
        self.refuse_dense("weight")
        object.__setattr__(self, "weight_was_read", True)
        if self.records is None or not torch.is_grad_enabled():
            dense = self.places.dense(self.values)
        else:
            dense = recorded_matrix(self.places.dense, self.values, self.records)
        self.handed_out.watch(dense)
        return dense

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

    @torch.no_grad()
    def move_to(self, keys: Tensor, tensors: Iterable[Tensor] = (), slots: Tensor | None = None) -> Tensor:
        """Let other units live, as many as before (for "grouped", as many in each block). All is written in place.

        Args:
            keys: The ascending keys of the units that live from now on.
            tensors: Further tensors of the values' shape that move with them, such as optimizer state.
            slots: Where each of these units was before, -1 for those that are born; searched for where it is None.

        Returns:
            Where values were born, a bool tensor of their shape. They are 0.

        Raises:
            ValueError: There are not as many units as before. Nothing has moved.
        """
        places = self.places
        if keys.shape != (places.units,):
            raise ValueError(f"{self.called} has {places.units} live units and was given {keys.numel()} keys")
        slots = places.slots_of(keys) if slots is None else slots
        born = mask_below(slots, 0)
        source, new = slots.clamp(min=0), true_places(born)
        places.set_keys(keys)  # first, as it may refuse them
        for tensor in (self.values, *tensors):
            tensor.copy_(places.from_units(places.taken(tensor, source, new)))
        return places.of_units(born)

    @torch.no_grad()
    def set_places(self, keys: Tensor, values: Tensor | None = None) -> None:
        """Take another pattern, of any number of units.

        Args:
            keys: The ascending keys of its units.
            values: The values there; those that are live now are kept and others are 0 where it is None.

        Raises:
            ValueError: There are not as many values as places.
        """
        if values is not None and values.numel() != keys.numel() * self.group:
            raise ValueError(
                f"{self.called} was given {values.numel()} values for {keys.numel() * self.group} live places"
            )
        if self.values.is_meta:
            self.places.set_keys(keys)
            values = torch.empty(self.places.values_shape, dtype=self.values.dtype, device="meta")
        elif values is None:
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
            self.values.data = values.detach().view(self.places.values_shape).to(self.values)

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
            raise AttributeError(
                f"{self.called}: {name} cannot be deleted, and a SparseLinear cannot be parametrized. {_PARAMETRIZE_BEFORE}"
            )
        super().__delattr__(name)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """See `nn.Module`; what torch.nn.utils would compute the weight from is refused."""
        if name in _OF_COMPUTED_WEIGHTS:
            raise AttributeError(
                f"{self.called} cannot be parametrized or pruned by torch.nn.utils. {_PARAMETRIZE_BEFORE}"
            )
        super().register_parameter(name, param)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
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


def refuse_device(storage: str, device: torch.device) -> None:
    """Refuse "sparse" storage on a device where its products would be slower than dense ones."""
    if storage == "sparse" and device.type not in PRODUCTS_RUN_ON:
        raise ValueError(
            f"storage='sparse' runs on the CPU, and this layer was asked to go to {device}: there a masked layer is faster. Use "
            "storage='masked', or 'grouped', or to_dense(module) first"
        )


def as_parameter(tensor: Tensor) -> nn.Parameter:
    """The tensor as a Parameter, itself where it is one."""
    return tensor if isinstance(tensor, nn.Parameter) else nn.Parameter(tensor)
