"""What a `SparseLinear` writes into a ``state_dict`` and reads from one."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from sparse_callbacks.core.sparse_linear import SparseLinear


def written(layer: "SparseLinear", destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Put the weight of a layer into a ``state_dict``: the dense matrix, or live values and pattern.

    Args:
        layer: The layer.
        destination: The ``state_dict``, in which the live values stand as the weight.
        prefix: The layer's name with a dot.
        keep_vars: Whether tensors keep their graph.
    """
    values = layer.values if keep_vars else layer.values.detach()
    if not (layer.compact_state or layer.is_too_large):
        destination[f"{prefix}weight"] = dense_of(layer, values)  # in its place, before the bias
        return
    rest = {key: destination.pop(key) for key in list(destination) if key.startswith(prefix)}
    del rest[f"{prefix}weight"]
    destination[f"{prefix}weight.values"] = values
    for name, tensor in layer.places.saved().items():
        destination[f"{prefix}weight.{name}"] = tensor
    destination.update(rest)


def dense_of(layer: "SparseLinear", values: Tensor) -> Tensor:
    """The dense matrix of a layer; on the meta device an empty one."""
    if values.is_meta:
        return torch.empty(layer.out_features, layer.in_features, dtype=values.dtype, device="meta")
    return layer.places.dense(values)


def loaded(layer: "SparseLinear", state: dict[str, Any], prefix: str, assign: bool, errors: list[str]) -> bool:
    """Take the weight of a layer out of a ``state_dict``.

    Args:
        layer: The layer.
        state: The ``state_dict``; the weight's entries are taken away.
        prefix: The layer's name with a dot.
        assign: Whether the tensors themselves are to be taken, with their type and device.
        errors: Sentences that say what does not fit; what is wrong here is appended.

    Returns:
        Whether it has a weight for this layer.
    """
    name = prefix.removesuffix(".") or layer.name or "the layer"
    names = ("values", *layer.places.saved())
    compact = {key: state.pop(f"{prefix}weight.{key}") for key in names if f"{prefix}weight.{key}" in state}
    dense = state.pop(f"{prefix}weight", None)
    try:
        if len(compact) == len(names):
            take_compact(layer, compact, assign)
        elif dense is not None:
            take_dense(layer, dense, assign)
    except ValueError as error:
        errors.append(f"{name}: {error}.")
    return dense is not None or bool(compact)


@torch.no_grad()
def take_compact(layer: "SparseLinear", compact: dict[str, Tensor], assign: bool) -> None:
    """Take live values and pattern.

    Raises:
        ValueError: They do not fit the layer, or each other.
    """
    places = layer.places
    keys = places.keys_of_saved({key: tensor.to(places.device) for key, tensor in compact.items() if key != "values"})
    values = compact["values"]
    if values.numel() != keys.numel() * layer.group:
        raise ValueError(f"it has {values.numel()} live values in a pattern of {keys.numel() * layer.group}")
    if assign:
        places.set_keys(keys)
        assign_values(layer, values)
    else:
        layer.set_places(keys, values.to(layer.values.device))


@torch.no_grad()
def take_dense(layer: "SparseLinear", dense: Tensor, assign: bool) -> None:
    """Take the entries of a dense matrix at the live places.

    Raises:
        ValueError: It has another shape, or entries other than 0 outside of the live places.
    """
    layer.refuse_dense("its values from a dense weight")
    if dense.shape != (layer.out_features, layer.in_features):
        raise ValueError(
            f"its weight has shape {tuple(dense.shape)}, and the layer {(layer.out_features, layer.in_features)}"
        )
    if dense.is_meta:
        values = torch.empty(layer.places.values_shape, dtype=dense.dtype, device="meta")
    else:
        values = layer.places.read(dense.detach().to(layer.places.device))
        outside = int(dense.count_nonzero()) - int(values.count_nonzero())
        if outside and not layer.pattern_follows:
            raise ValueError(
                f"its weight has {outside} non-zeros outside of the {layer.live} live places. Load the checkpoint of a run with "
                "the same pattern, a compact state_dict, or mask the weight; to_dense(module) makes dense layers that load any"
            )
    if assign:
        assign_values(layer, values.to(dense.device))
    else:
        layer.values.copy_(values)


def assign_values(layer: "SparseLinear", values: Tensor) -> None:
    """Let a layer hold these values, with their type and device, as its Parameter."""
    layer.register_values(nn.Parameter(values, requires_grad=layer.values.requires_grad))
