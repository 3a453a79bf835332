"""What a truly sparse layer writes into a ``state_dict`` and reads from one."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sparse_callbacks.core.sparse_layers.live_weight import LiveWeight


def written(layer: "LiveWeight", destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
    """Put the weight of a layer into a ``state_dict``: the dense matrix, or live values and pattern.

    Args:
        layer: The layer.
        destination: The ``state_dict``, in which the live values stand as the weight.
        prefix: The layer's name with a dot.
        keep_vars: Whether tensors keep their graph.
    """
    values = layer.values if keep_vars else layer.values.detach()
    if not (layer.compact_state or layer.is_too_large):
        dense = destination[f"{prefix}weight"] = dense_of(layer, values)  # in its place, before the bias
        layer.handed_out.watch(dense)
        return
    # all that torch has put there is put behind the parts of the weight, so that the weight stays first
    others = {key: destination.pop(key) for key in list(destination) if key.startswith(prefix)}
    del others[f"{prefix}weight"]
    destination[f"{prefix}weight.values"] = values
    for name, tensor in layer.places.saved().items():
        destination[f"{prefix}weight.{name}"] = tensor
    destination.update(others)


def dense_of(layer: "LiveWeight", values: Tensor) -> Tensor:
    """The dense matrix of a layer; on the meta device an empty one."""
    if values.is_meta:
        return torch.empty(layer.out_features, layer.in_features, dtype=values.dtype, device="meta")
    return layer.places.dense(values)


def values_for_weight(
    layer: "LiveWeight",
    state: dict[str, Any],
    prefix: str,
    local_metadata: dict[str, Any],
    strict: bool,
    missing_keys: list[str],
    unexpected_keys: list[str],
    error_msgs: list[str],
) -> None:
    """Put live values into a ``state_dict`` that is to be loaded, in place of a dense or compact weight; a pre-hook.

    Of a compact weight the layer takes the pattern at once.

    Args:
        layer: The layer.
        state: The ``state_dict``.
        prefix: The layer's name with a dot.
        local_metadata: Not read, as the four that follow: torch passes them.
        strict: See there.
        missing_keys: See there.
        unexpected_keys: See there.
        error_msgs: What does not fit is appended here, and the layer keeps its values.
    """
    key = f"{prefix}weight"
    names = ("values", *layer.places.saved())
    compact = {name: state.pop(f"{key}.{name}") for name in names if f"{key}.{name}" in state}
    try:
        if len(compact) == len(names):
            state[key] = compact_values(layer, compact)
        elif isinstance(state.get(key), Tensor):
            state[key] = values_of_dense(layer, state[key])
    except ValueError as error:
        name = prefix.removesuffix(".") or layer.name or "the layer"
        error_msgs.append(f"{name}: {error}.")
        state[key] = layer.values.detach()


@torch.no_grad()
def compact_values(layer: "LiveWeight", compact: dict[str, Tensor]) -> Tensor:
    """The values of a compact weight, whose pattern the layer takes.

    Raises:
        ValueError: They do not fit the layer, or each other.
    """
    places, values = layer.places, compact["values"]
    keys = places.keys_of_saved({key: tensor.to(places.device) for key, tensor in compact.items() if key != "values"})
    if values.numel() != keys.numel() * layer.group:
        raise ValueError(f"it has {values.numel()} live values in a pattern of {keys.numel() * layer.group}")
    layer.set_places(keys)
    return values.view(places.values_shape)


@torch.no_grad()
def values_of_dense(layer: "LiveWeight", dense: Tensor) -> Tensor:
    """The entries of a dense matrix at the live places.

    Raises:
        ValueError: It has another shape, or entries other than 0 outside of the live places.
    """
    if dense.shape != (layer.out_features, layer.in_features):
        raise ValueError(
            f"its weight has shape {tuple(dense.shape)}, and the layer {(layer.out_features, layer.in_features)}"
        )
    layer.refuse_dense("a weight to load")
    if dense.is_meta:
        return torch.empty(layer.places.values_shape, dtype=dense.dtype, device="meta")
    values = layer.places.read(dense.detach().to(layer.places.device))
    outside = int(dense.count_nonzero()) - int(values.count_nonzero())
    if outside and not layer.pattern_follows:
        raise ValueError(
            f"its weight has {outside} non-zeros outside of the {layer.live} live places. Load the checkpoint of a run with "
            "the same pattern or a compact state_dict, or mask the weight; for a run that goes on call sparsify(..., state=) "
            "before, which gives layers its places. to_dense(module) makes dense layers, which load any"
        )
    return values.to(dense.device)
