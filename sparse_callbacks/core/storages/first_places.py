"""The first live places of an exchanged layer, which are those of the mask that it would have."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.initial_masks import StartsSparse, given_mask, start_of
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.patterns import group_of
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.sparse_layers.drawn_places import LARGEST_SAME, rejected
from sparse_callbacks.core.sparse_layers.live_places import Storage, keys_of_mask, places_of
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear, values_at
from sparse_callbacks.core.weights import SparseWeights


def first_keys(
    method: Method, entry: Entry, weight: nn.Parameter, group: int, targets: Mapping[str, float], device: torch.device
) -> Tensor:
    """Ascending keys of the units that live in a layer at first. One dense mask exists meanwhile, of this layer.

    Args:
        method: the method of the run.
        entry: the layer's weight.
        weight: the dense weight.
        group: the number of rows that read the same inputs; 1 where any weights live.
        targets: the target sparsity of every layer.
        device: a device on which ranks can talk to each other.

    Raises:
        ValueError: the masks that were given are not of the pattern.
    """
    # a model may be made inside `with torch.device(...)`, where tensors lie elsewhere or have no memory
    with torch.device("cpu"):
        return _first_keys(method, entry, weight, group, targets, device)


def _first_keys(
    method: Method, entry: Entry, weight: nn.Parameter, group: int, targets: Mapping[str, float], device: torch.device
) -> Tensor:
    if is_drawn_by_rejection(method, entry, weight):
        with _planned(method, entry, weight, targets):
            active = entry.size - method.planned_zeros(entry.name, entry.size)
        rows, inputs = entry.full_shape
        by_block = group > 1 or group_of(method, entry) is not None
        blocks, units, count = (rows // group, inputs, active // rows) if by_block else (1, rows * inputs, active)
        none_kept = torch.empty(0, dtype=torch.int64, device="cpu")
        return rejected(blocks, units, none_kept, count, method.generator(entry.name, 0))
    if weight.is_meta:
        raise ValueError(
            f"{entry.name} is on the meta device and has no values to choose its first mask by. Give "
            "initial_mask='random', or let the layer have values before."
        )
    mask = given_mask(method, entry.name)
    if mask is None:
        with _planned(method, entry, weight, targets):
            mask = method.initial_masks()[entry.name]
    if distributed.world_size() > 1:  # what ranks choose by may differ before a strategy has made it equal
        mask = distributed.masks_of_first_rank({entry.name: mask.to(device)})[entry.name]
    try:
        return keys_of_mask(mask.to(weight.device, torch.bool), group)
    except ValueError as error:
        raise ValueError(f"{entry.name} cannot have storage='grouped' in groups of {group} rows: {error}") from error


def is_drawn_by_rejection(method: Method, entry: Entry, weight: Tensor) -> bool:
    """Whether the first places of a layer are drawn without ever making its mask: it is too large, or has no memory."""
    if not isinstance(method, StartsSparse) or type(method).initial_masks is not StartsSparse.initial_masks:
        return False  # a rule of a subclass makes them
    return (weight.is_meta or entry.size > LARGEST_SAME) and start_of(method).at_random


@contextmanager
def _planned(method: Method, entry: Entry, weight: nn.Parameter, targets: Mapping[str, float]) -> Iterator[None]:
    """Inside, the method makes first masks, and of this one layer."""
    before = method.weights, method.targets
    method.weights, method.targets = SparseWeights({entry.name: weight}, {entry.name: entry}, {}), dict(targets)
    try:
        yield
    finally:
        method.weights, method.targets = before


def sparse_twin(linear: nn.Linear, storage: str, group: int, keys: Tensor) -> SparseLinear:
    """The layer that computes what ``linear`` does with all but some weights gone; its bias is yet to come.

    Attributes that users have set on the weight are on its live values too, and a gradient that it has is read there.

    Args:
        linear: the dense layer; on the meta device the values of the new one are there too.
        storage: ``"sparse"`` or ``"grouped"``.
        group: the number of rows that read the same inputs.
        keys: ascending keys of the units that live.
    """
    weight = linear.weight
    kind: Storage = "grouped" if storage == "grouped" else "sparse"
    with torch.device("cpu"):
        places = places_of(kind, weight.shape[0], weight.shape[1], group, keys.cpu())
    values = nn.Parameter(values_at(places, weight), requires_grad=weight.requires_grad)
    layer = SparseLinear(places, values, None)
    vars(layer.values).update(vars(weight))
    if weight.grad is not None:
        layer.values.grad = places.read(weight.grad)
    return layer
