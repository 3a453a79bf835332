"""The checkpoint file that a fit resumes from, looked at before anything in it is loaded into a model."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from pytorch_lightning import LightningModule
from pytorch_lightning.core.saving import get_filesystem  # type: ignore[attr-defined]  # where Lightning uses it
from torch import Tensor

from sparse_callbacks.core.awaited import with_awaited
from sparse_callbacks.core.checkpoint import SavedRun, check_state, misfit, other_storage
from sparse_callbacks.core.checkpoint_file import refuse_broken
from sparse_callbacks.core.cut_weights import count_cut
from sparse_callbacks.core.error_text import first_line
from sparse_callbacks.core.initial_masks import forget_given
from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.core.live.saved_patterns import storage_of, units_of
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.planned_targets import planned_targets, sharing_entries
from sparse_callbacks.core.selection import NOT_TRAINED, select
from sparse_callbacks.core.state_claims import planned_otherwise, refuse_impossible
from sparse_callbacks.core.state_layout import damaged, inventory, is_count, shown_short, why_not_whole
from sparse_callbacks.lightning import sharded
from sparse_callbacks.lightning.averaging import weights_beside_averages
from sparse_callbacks.lightning.dense_shapes import dense_shapes
from sparse_callbacks.lightning.exchanging import exchange_layers_of
from sparse_callbacks.lightning.hidden_calls import call_instead
from sparse_callbacks.lightning.loaded_places import has_optimizer_states, refuse_other_states, take_places
from sparse_callbacks.lightning.refusals import is_tuner_checkpoint, overrides

if TYPE_CHECKING:
    from sparse_callbacks.lightning.callback import SparsityCallback

_ADVICE = "Resume from another checkpoint of the run (ckpt_path=)."
_VERSION = re.compile(r"\d+(\.\d+)*([.+-]?\w+)*")
# what Lightning reads of a checkpoint to resume from it
_PARTS: Mapping[str, Callable[[Any], bool]] = {
    "pytorch-lightning_version": lambda value: isinstance(value, str) and bool(_VERSION.fullmatch(value)),
    "state_dict": lambda value: isinstance(value, Mapping),
    "callbacks": lambda value: isinstance(value, Mapping),
    "optimizer_states": lambda value: _are_optimizers(value),
    "lr_schedulers": lambda value: _are(value, {}),
    "loops": lambda value: isinstance(value, Mapping),
    "epoch": is_count,
    "global_step": is_count,
}
_INVENTORY = "sparse_callbacks"
"""Key in a checkpoint, under which add_inventory() writes by the keys of callbacks."""
_COUNTERS = ("ready", "started", "processed", "completed")


def look_before_loading(trainer: Any, module: LightningModule, methods: Sequence["SparsityCallback"]) -> None:
    """Let the fit that begins look at its checkpoint before it loads anything from it.

    Lightning loads a checkpoint part by part: what is found wrong with the state of a callback leaves a model with other
    weights. No hook comes before that, so the call with which Lightning reads the file is caught.

    Args:
        trainer: the Trainer, in ``setup`` of a fit.
        module: its LightningModule.
        methods: all sparsity callbacks of the Trainer.
    """

    def load_checkpoint(read: Callable[..., Any], path: Any, **options: Any) -> Any:
        loads_at_once = sharded.shards_model(trainer)  # into the model, too late for a look
        if loads_at_once:
            found = sharded.content_of(path, _ADVICE)
        else:
            found = _read(lambda: read(path, **options), path, type(trainer.strategy.checkpoint_io).__name__)
        if not is_tuner_checkpoint(path):
            refuse_other_parts(found, path)
            _refuse_other_progress(found["loops"], path, trainer)
            if fresh := [method for method in methods if method.fresh_start]:  # new masks over its weights
                for method in fresh:
                    refuse_other_states(method, module, found, path)
                take_places(module, found)
                for method in fresh if has_optimizer_states(found) else ():
                    # of layers that are dense now: so "auto" decides as it did there, whatever the times are now
                    exchange_layers_of(
                        method, trainer, module, None, "the checkpoint has optimizer states of its masked weights"
                    )
            resumed = [(m, _saved_run(m, found, module, path)) for m in methods if not m.fresh_start]
            for method, saved in resumed:
                exchange_layers_of(method, trainer, module, saved)
            resumed = [(method, _refuse_other_state(method, saved, module)) for method, saved in resumed]
            # of shards in a folder torch compares names and shapes before it loads any
            in_shards = loads_at_once and Path(path).is_dir()
            if not in_shards and not _others_load(trainer, module, methods):
                for weights in (found["state_dict"], *weights_beside_averages(trainer, found, path)):
                    _refuse_other_weights(weights, module, path)
                    for method, saved in resumed:
                        _refuse_cut_weights(method, saved, weights)
        return read(path, **options) if loads_at_once else found

    call_instead(trainer, "load_checkpoint", load_checkpoint)


def add_inventory(key: str, checkpoint: dict[str, Any]) -> None:
    """Write down beside the state of a callback what it should hold.

    Not in it: the state is what the callback goes on from, whoever loads it.

    Args:
        key: the callback's key.
        checkpoint: what is about to be saved, with the states of all callbacks.
    """
    state = checkpoint.get("callbacks", {}).get(key)
    if state and "masks" in state:
        checkpoint.setdefault(_INVENTORY, {})[key] = inventory(state)


def _with_inventory(key: str, checkpoint: Mapping[str, Any]) -> Any:
    """The state of a callback in a checkpoint, with what :func:`add_inventory` has written of it."""
    state, listed = checkpoint["callbacks"].get(key), checkpoint.get(_INVENTORY, {})
    written = listed.get(key, {}) if isinstance(listed, Mapping) else listed
    if not isinstance(state, Mapping) or written == {}:  # version 0.1 wrote none
        return state
    if not isinstance(written, Mapping) or written.keys() - {"units"} != {"zeros", "names"}:
        written = {"names": shown_short(written)}  # which is refused
    return {**state, **written}


def _read(read: Callable[[], Any], path: Any, reader: str) -> Any:
    """What ``read`` gives, with one kind of error for a file that is damaged.

    A file on a web server, which torch downloads, one that is missing, and one that a CheckpointIO of the user's reads
    are left to whoever reads them.
    """
    if reader != "TorchCheckpointIO" or str(path).startswith("http"):
        return read()
    files = get_filesystem(path)
    if not files.exists(path):
        return read()
    refuse_broken(path, _ADVICE, None if Path(path).exists() else partial(files.open, path, "rb"))
    try:
        return read()
    except Exception as error:  # whatever torch's reader finds in a file that is another one
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {first_line(error)}). {_ADVICE} With "
            "weights_only=True only tensors, numbers and texts are read; a checkpoint with other objects, if you trust "
            "it, needs fit(..., weights_only=False)."
        ) from error


def _are(value: Any, parts: Mapping[str, type]) -> bool:
    """Whether ``value`` is a list of mappings that have ``parts`` of these types."""
    return isinstance(value, list) and all(
        isinstance(item, Mapping) and all(isinstance(item.get(k), t) for k, t in parts.items()) for item in value
    )


def _are_optimizers(value: Any) -> bool:
    """Whether ``value`` is a list of the states of optimizers, whose tensors are left to torch."""
    return _are(value, {}) and all(
        # an optimizer may write a layout of its own
        not {"state", "param_groups"} & optimizer.keys()
        or (
            _are([optimizer], {"state": Mapping, "param_groups": list})
            and _are(optimizer["param_groups"], {"params": list})
        )
        for optimizer in value
    )


def refuse_other_parts(found: Any, path: object) -> None:
    """Refuse what is not the content of a checkpoint that a Trainer has written to resume from.

    Raises:
        ValueError: a part is missing or of another type.
    """
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds {shown_short(found)} and not a checkpoint of Lightning. {_ADVICE}")
    for key, is_right in _PARTS.items():
        if not is_right(found.get(key)):
            has = shown_short(found[key]) if key in found else "missing"
            raise ValueError(
                f"{path} is not a checkpoint that a Trainer has written to resume from: {key!r} in it is {has}. {_ADVICE}"
            )


def _refuse_other_progress(loops: Mapping[str, Any], path: object, trainer: Any) -> None:
    for name, there in loops.items():
        loop = getattr(trainer, name, None)
        if loop is not None and (why := _why_other_progress(there, loop.state_dict(), name)):
            raise ValueError(f"{path} is damaged: in its loops {why}. {_ADVICE}")


def _why_other_progress(there: Any, here: Any, name: str) -> str:
    """Where the counters of a loop are not counters; empty where they are."""
    if not isinstance(here, Mapping):
        wrong = name.rpartition("/")[2] in _COUNTERS and not is_count(there)
        return f"{name} is {shown_short(there)} and not a count" if wrong else ""
    if not isinstance(there, Mapping):
        return f"{name} is {shown_short(there)}"
    pairs = [(there[k], here[k], f"{name}/{k}") for k in here if k in there]
    return next((why for pair in pairs if (why := _why_other_progress(*pair))), "")


def _saved_run(method: Method, found: Mapping[str, Any], module: LightningModule, path: object) -> SavedRun:
    """The saved run of a method with these arguments, whose masks and patterns are of the model's layers."""
    state = _with_inventory(getattr(method, "state_key", ""), found)
    saved = SavedRun.of(check_state(state, method.arguments, type(method).__name__, path), path)
    if not found["optimizer_states"]:  # which Lightning would not notice
        raise ValueError(f"{path} is damaged: it has no states of optimizers, and steps were taken. {_ADVICE}")
    here = dense_shapes(module)
    wrong = [n for n, m in saved.masks.items() if here.get(n) != m.shape]
    if wrong := [*wrong, *(n for n in saved.patterns if n not in here)]:
        raise misfit(wrong, path)
    _refuse_other_layers(saved, module, here, path)
    return saved


def _refuse_other_state(method: Method, saved: SavedRun, module: LightningModule) -> SavedRun:
    """The saved run of a method, which can go on from it."""
    # which parameters the optimizers will have is not known yet, and was known when the masks were made
    chosen = select(module, method.include, method.exclude, method.keep_dense)
    entries = with_awaited(method, chosen, saved.names, saved.awaited or ())
    if any(e.reason.startswith(NOT_TRAINED) for e in entries if e.name in saved.names):
        return saved  # frozen now: whether a callback thaws it before on_fit_start shows there
    saved = planned_otherwise(saved, entries)
    entries = [e if e.name in saved.names else replace(e, reason=e.reason or "not in the checkpoint") for e in entries]
    method.saved = saved  # some methods plan by the saved masks
    try:
        sharing = sharing_entries(method, entries)
        planned = method.parameter_zeros(entries, planned_targets(method, module, sharing, saved))
        refuse_impossible(method, saved, module, planned, optimizers=0)
    finally:
        method.saved = None
        forget_given(method)
    return saved


def _refuse_other_layers(saved: SavedRun, module: LightningModule, shapes: Mapping[str, Any], path: object) -> None:
    """Refuse patterns that are none of these layers, and layers that an earlier fit has exchanged otherwise."""
    layers = exchanged_layers(module)
    storages = dict.fromkeys(saved.masks, "masked") | {n: storage_of(p) for n, p in saved.patterns.items()}
    for name, there in storages.items():
        if name in layers and layers[name].storage != there:
            raise other_storage(
                f"{name} was saved with storage={there!r} (the checkpoint is {path})", repr(layers[name].storage)
            )
    for name, pattern in saved.patterns.items():
        try:
            units_of(pattern, tuple(shapes[name]))
        except ValueError as error:
            raise damaged(f"of the places of live weights in {name}: {error}", path) from error


def _fits(value: Any, shape: torch.Size) -> bool:
    """Whether a parameter of ``shape`` can take ``value``."""
    if not isinstance(value, Tensor) or value.shape != shape:
        return False
    # a subclass of Tensor keeps its values as it likes
    return type(value) is not Tensor or not why_not_whole(value)


def _renames_keys(module: torch.nn.Module) -> bool:
    """Whether code of the user's loads the module's weights, under other names perhaps."""
    ours = type(module)._load_from_state_dict.__module__.startswith(("torch.", "sparse_callbacks."))
    return bool(module._load_state_dict_pre_hooks) or not ours


def _others_load(trainer: Any, module: LightningModule, methods: Sequence[Method]) -> bool:
    """Whether code of the user's may make other weights of those in the file."""
    own = type(module).load_state_dict is not torch.nn.Module.load_state_dict
    hooked = own or overrides(module, "on_load_checkpoint") or any(map(_renames_keys, module.modules()))
    others = [
        c for c in trainer.callbacks if c not in methods and not type(c).__module__.startswith("sparse_callbacks.")
    ]
    return hooked or any(overrides(callback, "on_load_checkpoint") for callback in others)


def _refuse_cut_weights(method: Method, saved: SavedRun, weights: Mapping[str, Any]) -> None:
    """Refuse weights of another run than that of the masks, which would cut them."""
    for name in saved.names:
        if name in weights and (cut := count_cut(method, saved, name, weights[name])):
            raise ValueError(
                f"{saved.path} holds weights of {name} that its own masks cut: {cut} of them are not 0 where the mask is. "
                f"They are of another run, or were changed since. {_ADVICE} For new masks give fresh_start=True."
            )


def _refuse_other_weights(weights: Mapping[str, Any], module: LightningModule, path: object) -> None:
    """Refuse weights that the model cannot take, of which torch would load those that come first."""
    here = dense_shapes(module)
    lost = [n for n in here if n not in weights and f"{n}.values" not in weights] if module.strict_loading else []
    wrong = [n for n, t in weights.items() if n in here and not _fits(t, here[n])]
    if lost or wrong:
        text = ", ".join([*lost, *wrong])
        raise ValueError(
            f"{path} does not fit the model: {text} missing in it, or of another shape. Resume with the model of the "
            "interrupted run."
        )
