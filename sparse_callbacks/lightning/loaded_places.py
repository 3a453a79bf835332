"""The places of live weights in a checkpoint: sparse layers take them before its weights are loaded."""

from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.checkpoint import other_storage
from sparse_callbacks.core.given_masks import compact_parts
from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.core.live.saved_patterns import Pattern, keys_of, matrix_of
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.state_layout import LAYOUT
from sparse_callbacks.lightning.dense_shapes import dense_shapes
from sparse_callbacks.lightning.hidden_calls import call_instead
from sparse_callbacks.lightning.namespaces import Trainer


def take_places_of_checkpoint(trainer: Trainer, module: nn.Module) -> None:
    """Let the checkpoint that is about to be tested, validated or predicted with fit the layers of the module.

    Sparse layers take its places. No hook comes between the call that reads it and the loading of its weights, so that call is
    caught.

    Args:
        trainer: the Trainer, in ``setup`` of anything but a fit.
        module: its LightningModule.
    """

    def load_checkpoint(read: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        found = read(*arguments, **options)
        take_places(module, found)
        return found

    call_instead(trainer, "load_checkpoint", load_checkpoint)


def take_places(module: nn.Module, found: Any) -> None:
    """Let sparse layers have the places of a checkpoint, and let its compact weights fit dense layers.

    What does not fit is left to whoever loads the weights, and refuses them with the name of the layer.

    Args:
        module: the model.
        found: the content of the checkpoint; compact weights of layers that are dense are replaced in it.
    """
    weights = found.get("state_dict") if isinstance(found, Mapping) else None
    if not isinstance(weights, MutableMapping):
        return
    patterns, layers = dict(_saved_patterns(found)), exchanged_layers(module)
    for name, layer in layers.items():
        keys = _keys_in(patterns.get(name), layer)
        if keys is None and isinstance(weight := weights.get(name), Tensor):
            keys = _keys_of_weight(weight, layer)
        if keys is not None:
            layer.set_places(keys)
    for name, shape in dense_shapes(module).items():
        if name not in layers and f"{name}.values" in weights:
            _unfold(weights, name, tuple(shape))


def _saved_patterns(found: Mapping[str, Any]) -> Iterator[tuple[str, Pattern]]:
    """Names and patterns in the states of all callbacks."""
    states = found.get("callbacks")
    for state in states.values() if isinstance(states, Mapping) else ():
        patterns = state.get("patterns") if isinstance(state, Mapping) else None
        for name, pattern in patterns.items() if isinstance(patterns, Mapping) else ():
            if not LAYOUT["patterns"]({name: pattern}):
                yield name, pattern


def _keys_in(pattern: Pattern | None, layer: SparseLinear) -> Tensor | None:
    """Keys of the units that live in a saved pattern; None where it is not one of this layer."""
    try:
        return None if pattern is None else keys_of(pattern, layer)
    except ValueError:
        return None


def _keys_of_weight(weight: Tensor, layer: SparseLinear) -> Tensor | None:
    """Keys of the units that a dense weight needs, as many as live now; those that it leaves over are some that live now.

    A weight that lives and is zero cannot be told from a pruned one, and it makes no difference to what is computed.
    None where the weight does not fit, or has too many of them.
    """
    places = layer.places
    if weight.shape != (places.outputs, places.inputs):
        return None
    blocks = (weight.to(places.device) != 0).view(places.blocks, -1, places.inputs).any(1)
    needed, live = blocks.flatten().nonzero().flatten(), layer.keys()
    spare = live[~torch.isin(live, needed)]
    if layer.storage == "sparse":
        found = torch.cat([needed, spare[: live.numel() - needed.numel()]])
        return found.sort().values if found.numel() == live.numel() else None
    count, rows = places.units // max(1, places.blocks), []
    for block in range(places.blocks):
        first, last = block * places.inputs, (block + 1) * places.inputs
        mine = needed[(needed >= first) & (needed < last)]
        fills = spare[(spare >= first) & (spare < last)][: count - mine.numel()]
        rows.append(torch.cat([mine, fills]).sort().values)
    return torch.cat(rows) if all(row.numel() == count for row in rows) else None


def _unfold(weights: MutableMapping[str, Any], name: str, shape: tuple[int, ...]) -> None:
    """Replace the compact weight of a layer by its dense matrix."""
    parts = compact_parts(weights, name)
    pattern = {key: tensor for key, tensor in parts.items() if key != "values"}
    if LAYOUT["patterns"]({name: pattern}) or not isinstance(parts["values"], Tensor):
        return
    try:
        weights[name] = matrix_of(pattern, parts["values"], shape)
    except ValueError:  # whoever loads the weights says so, with the name of the layer
        return
    for key in parts:
        del weights[f"{name}.{key}"]


def refuse_other_states(method: Method, module: nn.Module, found: Mapping[str, Any], path: object) -> None:
    """Refuse a fresh start whose optimizers could not take the states in the file, or would take those of other weights.

    Args:
        method: the method, with ``fresh_start=True``.
        module: the model; layers of it that are sparse already take the places in the file.
        found: the content of the checkpoint.
        path: where it was read, for the error.

    Raises:
        ValueError: optimizers have states of live weights alone, or of another storage.
    """
    state = found.get("callbacks", {}).get(getattr(method, "state_key", ""))
    given = state.get("arguments") if isinstance(state, Mapping) else None
    here = method.arguments.get("storage")
    if not isinstance(given, Mapping) or here is None or not has_optimizer_states(found):
        return
    masked = "'masked'"  # arguments are kept as code; those of older versions have no storage
    there, patterns = given.get("storage", masked), state.get("patterns")
    if there != here and (patterns or here != masked):
        raise other_storage(f"the checkpoint {path} was saved with storage={there}", here)
    here_already = exchanged_layers(module)
    if drawn := [name for name in patterns or () if name not in here_already]:
        raise ValueError(
            f"the checkpoint {path} holds optimizer states of the live weights of {', '.join(drawn)} alone, in their order, "
            "and fresh_start=True draws other places for them. Begin a new run with these weights: load them by "
            "load_state_dict(), and give no ckpt_path=."
        )


def has_optimizer_states(found: Mapping[str, Any]) -> bool:
    """Whether an optimizer's states in a checkpoint have the shapes of the weights that it steps."""
    return any(tensor.dim() for tensor in tensors_in([o.get("state") for o in found["optimizer_states"]]))
