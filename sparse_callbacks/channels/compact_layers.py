"""Truly sparse layers in a compact checkpoint: live values and patterns, and how a model takes them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.live.saved_patterns import places_in
from sparse_callbacks.core.sparse_layers.live_places import LivePlaces
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear, weight_name
from sparse_callbacks.core.storages.module_swap import holders_of, leave_fast_paths, put_in, take_over

_PARTS = {"sparse": ("values", "crow", "col"), "grouped": ("values", "idx")}
"""Names of the tensors of each storage, after ``weight.``."""
_DESCRIBED = ("storage", "group", "feature_major")
_FIXED = ("in_features", "out_features", "storage", "group")
"""What a layer must have in common with the described one; a dense layer has no storage yet."""


@contextmanager
def compact_states(model: nn.Module) -> Iterator[None]:
    """Inside, ``state_dict`` has the live values and patterns of sparse layers, and no dense matrix is made."""
    flags = [(m, m.compact_state) for m in model.modules() if isinstance(m, SparseLinear)]
    try:
        for layer, _ in flags:
            layer.compact_state = True
        yield
    finally:
        for layer, flag in flags:
            layer.compact_state = flag


def class_name(module: nn.Module) -> str:
    """The class of a module by which a checkpoint knows it: layers made for inference are sparse layers there."""
    return SparseLinear.__name__ if isinstance(module, SparseLinear) else type(module).__name__


def described_layer(module: nn.Module) -> dict[str, Any]:
    """What a checkpoint says of a sparse layer besides its size; nothing of other modules."""
    return {a: getattr(module, a) for a in _DESCRIBED} if isinstance(module, SparseLinear) else {}


def is_sparse(layer: Mapping[str, Any]) -> bool:
    """Whether a layer is described as a truly sparse one."""
    return bool(layer["class"] == SparseLinear.__name__)


def state_names(model: nn.Module) -> set[str]:
    """Names in the ``state_dict`` of a model, ``weight`` alone for the weight of a sparse layer."""
    with compact_states(model):
        names = set(model.state_dict())
    for name, module in model.named_modules(remove_duplicate=False):
        if isinstance(module, SparseLinear):
            weight = weight_name(name)
            names = names - {f"{weight}.{part}" for part in _PARTS[module.storage]} | {weight}
    return names


def split(
    tensors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]]]:
    """The tensors of a checkpoint, with one of the dense shape on the meta device for the weight of each sparse layer; and
    values and patterns of these weights, by their names.

    Args:
        tensors: all tensors.
        layers: the description of each module.

    Raises:
        KeyError: a part of a sparse layer is missing.
    """
    weights = {weight_name(name): layer for name, layer in layers.items() if is_sparse(layer)}
    # a module with two names is described under the first of them, and its tensors have both
    described = {id(tensors[f"{weight}.values"]): layer for weight, layer in weights.items()}
    for key, tensor in tensors.items():
        if key.endswith("weight.values") and id(tensor) in described:
            weights.setdefault(key.removesuffix(".values"), described[id(tensor)])
    others, parts = dict(tensors), dict[str, dict[str, Tensor]]()
    stand_ins: dict[int, Tensor] = {}  # by the values: a weight with two names is one
    for weight, layer in weights.items():
        parts[weight] = {part: others.pop(f"{weight}.{part}") for part in _PARTS[layer["storage"]]}
        values, shape = parts[weight]["values"], (layer["out_features"], layer["in_features"])
        if id(values) not in stand_ins:
            stand_ins[id(values)] = torch.empty(shape, dtype=values.dtype, device="meta")
        others[weight] = stand_ins[id(values)]
    return others, parts


# ---------------------------------------------------------------------- loading


def why_other_patterns(
    model: nn.Module, parts: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, Mapping[str, Any]]
) -> str:
    """A sparse layer of the checkpoint that the model's layer cannot become; empty if none.

    Args:
        model: the model.
        parts: values and pattern of each sparse weight.
        layers: the description of each module.
    """
    for name, module in model.named_modules():
        if weight_name(name) not in parts:
            continue
        stated = layers[name]
        here = {a: getattr(module, a, stated[a]) for a in _FIXED}
        for attribute, value in here.items():
            if value != stated[attribute]:
                return f"{attribute} of {name!r} is {value} here and {stated[attribute]} there"
        try:
            _places(stated, parts[weight_name(name)])
        except ValueError as error:
            return f"the pattern of {name!r} contradicts itself: {error}"
    return ""


def _places(stated: Mapping[str, Any], parts: Mapping[str, Tensor]) -> LivePlaces:
    """The pattern of a sparse layer.

    Raises:
        ValueError: its parts do not fit each other.
    """
    pattern = {name: tensor for name, tensor in parts.items() if name != "values"}
    places = places_in(pattern, (stated["out_features"], stated["in_features"]))
    if places.group != stated["group"]:
        raise ValueError(f"its groups have {places.group} rows, and {stated['group']} are described")
    values = parts["values"]
    if tuple(values.shape) != places.values_shape:
        raise ValueError(f"its values have shape {list(values.shape)}, and the pattern {list(places.values_shape)}")
    return places


def put_sparse(
    model: nn.Module, parts: Mapping[str, Mapping[str, Tensor]], layers: Mapping[str, Mapping[str, Any]]
) -> None:
    """Let sparse layers take values and patterns, and dense ones become sparse layers; see `why_other_patterns`."""
    holders = holders_of(model)
    for name, module in list(model.named_modules()):
        if weight_name(name) not in parts:
            continue
        stated, there = layers[name], parts[weight_name(name)]
        old = module._parameters["weight"]
        assert old is not None  # it is an nn.Linear or a SparseLinear
        device = torch.device("cpu") if old.is_meta else old.device
        values = nn.Parameter(there["values"].to(device), requires_grad=old.requires_grad)
        places = _places(stated, there)
        if isinstance(module, SparseLinear):
            module.places.set_keys(places.keys().to(device))
            module.register_values(values)
            continue
        places.to(device)
        layer = SparseLinear(places, values, None, feature_major=stated["feature_major"])
        layer.name = name
        take_over(module, layer)
        put_in(holders[id(module)], layer)
    leave_fast_paths(model)
