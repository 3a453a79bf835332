"""What a checkpoint holds of a method, and whether a method may go on from it."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any, Self

from torch import Tensor

from sparse_callbacks.core.allocations.sees_model import SeesModel, shown_object
from sparse_callbacks.core.awaited import names_awaited
from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.core.live.live_records import SavedRecords, saved_records
from sparse_callbacks.core.live.saved_patterns import Pattern, live_in, pattern_of, storage_of
from sparse_callbacks.core.saved_bits import why_damaged, with_bits, with_truths
from sparse_callbacks.core.schedules import Schedule
from sparse_callbacks.core.score_rules import SCORES
from sparse_callbacks.core.shards import collected, layout_of
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.state_layout import damaged, is_count, refuse_damaged, shown_short

if TYPE_CHECKING:
    from sparse_callbacks.core.method import Method

# To be raised with a change that older versions of the package would misread. 2: truth values are bits.
VERSION = 2
# Arguments in which a resumed run may differ from the saved one: a loader's text holds its address in memory.
_MAY_DIFFER = ("print_plan", "fresh_start", "statistics_dataloader", "rows")
# Where the first masks lie, under the names that methods have for it; all of them are words, or a path or a state dict.
_START = ("initial_mask", "from_checkpoint", "init")
_RANDOM = "'random'"
_WORDS_OF_START = ("'nonzero'", *(f"'{name}'" for name in SCORES))
# Arguments that version 0.1 lacked, with the text of their defaults. A run that uses none of them is saved without them.
_LATER = {
    "initial_mask": _RANDOM,
    "rescale": "None",
    "storage": "'masked'",
    "group": "64",
    "rows": "None",
    "candidates": "None",
    "pattern": "None",
    "ablation": "None",
    "hysteresis": "0.25",
    "drop": "'magnitude'",
    "new_weights": "'zero'",
    "neuron_importance": "None",
    "importance_start": "0.4",
    "importance_every": "0.02",
}


@dataclass(frozen=True)
class SavedRun:
    """The run that a method goes on from.

    Attributes:
        masks: bool masks by parameter name.
        aux: the method's own tensors by key.
        dense: dense values of parameters whose pruned weights learn on.
        times: the calendar in optimizer steps, empty for a method without one.
        grads: gradients of an accumulation window that was open when the checkpoint was written, by parameter name.
        dense_grads: dense copies of those that were masked already, as in manual optimization, by parameter name.
        awaited: names of the parameters that would have become sparse once they were trained; None where there were none,
            or the state was saved before layers could join a run.
        patterns: of exchanged layers, which have no mask, the places of their live weights by parameter name.
        records: what exchanged layers have recorded in a window that was open, at whose end they are updated.
        window_open: no optimizer had stepped since the backward pass that gave the gradients.
        averages: what is known of averages that others keep of the weights, by the keys of those who keep them.
        progress: counted steps and updates, see :meth:`~sparse_callbacks.core.progress.Progress.state`.
        of_loop: a loop written by hand has saved it, which version 0.1 could not.
        path: where it was saved, for errors.
    """

    masks: Mapping[str, Tensor]
    aux: Mapping[str, Tensor]
    dense: Mapping[str, Tensor]
    times: tuple[int, ...]
    grads: Mapping[str, Tensor]
    dense_grads: Mapping[str, Tensor]
    window_open: bool
    averages: Mapping[str, Mapping[str, Any]]
    progress: Mapping[str, Any]
    of_loop: bool
    path: object
    awaited: tuple[str, ...] | None = None
    patterns: Mapping[str, Pattern] = field(default_factory=dict)
    records: SavedRecords = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the sparse parameters."""
        return [*self.masks, *self.patterns]

    def zeros(self, name: str, shape: tuple[int, ...]) -> int:
        """Pruned weights of a parameter.

        Args:
            name: its name.
            shape: its shape; of an exchanged layer that of its whole matrix.
        """
        if name in self.patterns:
            return math.prod(shape) - live_in(self.patterns[name], shape)
        return int((~self.masks[name]).sum())

    @classmethod
    def of(cls, state: Mapping[str, Any], path: object) -> Self:
        """The run in what :func:`check_state` gave.

        Raises:
            ValueError: the state is damaged.
        """
        if why := why_damaged(state):
            raise damaged(why, path)
        state = with_truths(state)
        refuse_damaged(state, path)
        return cls(
            masks=state["masks"],
            aux=state["aux"],
            dense=state.get("dense", {}),  # checkpoints of the first weeks had none
            times=tuple(state["times"]),
            grads=state.get("grads", {}),
            dense_grads=state.get("dense_grads", {}),
            window_open=bool(state.get("window_open", "grads" in state)),  # older versions saved no others
            averages=state.get("averages", {}),
            progress={k: state[k] for k in ("steps", "done", "updates")},
            of_loop="method" in state,
            path=path,
            awaited=tuple(state["awaited"]) if "awaited" in state else None,
            patterns=state.get("patterns", {}),
            records=state.get("records", {}),
        )


def state_of(method: "Method") -> dict[str, Any]:
    """Everything that a resume of a method's run needs: tensors, numbers and strings only; masks and other truth values are
    bits (:mod:`~sparse_callbacks.core.saved_bits`).

    Tensors of sharded parameters are collected on the first of their processes, so all of these must ask together.
    """
    awaited, weights = names_awaited(method.entries), method.weights
    patterns = {name: pattern_of(layer) for name, layer in weights.layers_stored.items()}
    later = {"awaited": awaited, "patterns": patterns, "records": saved_records(weights.records)}
    return {
        "version": VERSION,
        "arguments": {k: text for k, text in method.arguments.items() if _LATER.get(k) != text},
        "times": [] if method.calendar is None else method.calendar.times(),
        **method.progress.state(),
        "masks": _saved(weights.held_masks, method.params),
        "aux": _saved(method.aux, method.params),
        "dense": collected({n: weights.dense_values(n) for n in weights.copied}, method.params),
    } | {key: value for key, value in later.items() if value}


def _saved(tensors: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Any]:
    """Copies of whole tensors as a state holds them, see :func:`~sparse_callbacks.core.shards.collected`."""
    found: dict[str, Any] = {}
    for key, tensor in tensors.items():  # one at a time: a mask takes eight times the memory of its bits
        found |= with_bits(collected({key: tensor}, params))
    return found


def shown(value: object) -> str:
    """An argument as text that is the same in every process: a function and a loader by their names, a state dict and batches
    not in full."""
    if isinstance(value, Real) and not isinstance(value, bool):  # numpy's numbers, which show their type
        return repr(int(value) if isinstance(value, Integral) else float(value))
    # the repr of a function holds its address in memory, which is another one in the process that resumes
    if isinstance(value, SeesModel):
        return shown_object(value)
    if callable(value) and not isinstance(value, Schedule):
        return str(getattr(value, "__qualname__", type(value).__qualname__))
    if isinstance(value, Mapping) and any(isinstance(v, Tensor | Mapping) for v in value.values()):
        return f"<state dict of {len(value)}>"
    if isinstance(value, list | tuple) and tensors_in(value):
        return f"<{len(value)} batches>"
    # such as of a loader: the repr that every object has holds an address too
    return type(value).__qualname__ if type(value).__repr__ is object.__repr__ else repr(value)


def check_state(
    state: Mapping[str, Any] | None, arguments: Mapping[str, str], name: str, path: object
) -> Mapping[str, Any]:
    """The state in a checkpoint, if a method with these arguments may resume from it.

    Args:
        state: what was found in the checkpoint under the callback's key, or None.
        arguments: the method's constructor arguments, as text by name.
        name: the method's name.
        path: the checkpoint's path, for the errors.

    Raises:
        ValueError: no state, one of another kind or of a later version, or one of other arguments.
    """
    if state is None:
        raise ValueError(
            f"the checkpoint {path} holds no state of {name}: its weights come without masks. Resume with the callback "
            "of the interrupted run (same method, include= and exclude=), or give fresh_start=True to make new masks."
        )
    if not isinstance(state, Mapping) or not {"version", "arguments"} <= state.keys():
        has = f"the keys {', '.join(map(str, state)) or 'none'}" if isinstance(state, Mapping) else shown_short(state)
        raise ValueError(
            f"the checkpoint {path} is not a state of {name}: it has {has}. Give what state_dict() of the interrupted "
            "run gave."
        )
    # every method has arguments
    if not is_count(state["version"]) or not isinstance(state["arguments"], Mapping) or not state["arguments"]:
        raise damaged(
            f"its version is {shown_short(state['version'])} and its arguments are {shown_short(state['arguments'])}",
            path,
        )
    if (writer := state.get("method", name)) != name:  # a callback's state has no name: it lies under its key
        raise ValueError(
            f"the checkpoint {path} was written by {writer}, and this is {name}. Go on with the method of the "
            "interrupted run, or give fresh_start=True to make new masks."
        )
    if state["version"] > VERSION:
        raise ValueError(
            f"the checkpoint {path} has sparsity state of version {state['version']}, and this package reads up "
            f"to {VERSION}. Upgrade sparse-callbacks."
        )
    saved = state["arguments"]
    here, there = _comparable(arguments), _comparable(saved)
    # an argument that the saved run did not have yet cannot differ
    differ = [k for k in here if k in there and here[k] != there[k]]
    if "storage" in differ:
        raise other_storage(f"the checkpoint {path} was saved with storage={there['storage']}", here["storage"])
    if differ:
        changes = ", ".join(f"{k}={there[k]} there and {k}={here[k]} here" for k in differ)
        raise ValueError(
            f"the checkpoint {path} was written by {name} with other arguments: {changes}. Give the same, "
            "or fresh_start=True to make new masks."
        )
    return state


def _comparable(arguments: Mapping[str, str]) -> dict[str, str]:
    """Those of ``arguments`` in which a resumed run may not differ, as texts to compare."""
    found = {k: v for k, v in {**_LATER, **arguments}.items() if k not in (*_MAY_DIFFER, *_START)}
    starts = [arguments[k] for k in _START if arguments.get(k, "None") not in ("None", _RANDOM)]
    start = starts[0] if starts else _RANDOM
    # a file may have been moved, or be gone: its masks are in the checkpoint
    known = start in _WORDS_OF_START or start.startswith("Score(")
    return {**found, "initial_mask": start if known else "a checkpoint"}


def other_storage(there: str, here: str) -> ValueError:
    """The error for a run that was saved with another storage.

    Args:
        there: which state has which storage, as the beginning of a sentence.
        here: the storage of the run that goes on, as text.
    """
    return ValueError(
        f"{there}, and this run has storage={here}: optimizer states differ in shape. Give the same storage, or "
        "begin a new run with these weights: load them by load_state_dict(), or resume with fresh_start=True where optimizers "
        "had no state."
    )


def refuse_other_model(
    saved: SavedRun,
    params: Mapping[str, Tensor],
    layers: Mapping[str, SparseLinear] | None = None,
    dense: Mapping[str, str] | None = None,
) -> None:
    """Refuse a saved run whose masks do not fit the sparse parameters of a model.

    Args:
        saved: the saved run.
        params: the sparse parameters by name.
        layers: those of exchanged layers among them, by the same names.
        dense: why other parameters of the model stay dense, by name.

    Raises:
        ValueError: a name, a shape or the storage of a layer differs.
    """
    exchanged = layers or {}
    wrong = []
    # names of both, because either side may have a parameter that the other lacks
    for name in dict.fromkeys([*params, *saved.names]):
        if name not in saved.names or name not in params:
            wrong.append(name)
            continue
        there = storage_of(saved.patterns[name]) if name in saved.patterns else "masked"
        here = exchanged[name].storage if name in exchanged else "masked"
        if there != here:
            raise other_storage(f"{name} was saved with storage={there!r} (the checkpoint is {saved.path})", repr(here))
        if name in saved.masks and saved.masks[name].shape != params[name].shape:
            wrong.append(name)
    if wrong:
        raise misfit(wrong, saved.path, {n: why for n, why in (dense or {}).items() if n in saved.names})


def misfit(names: Iterable[str], path: object, dense: Mapping[str, str] | None = None) -> ValueError:
    """The error for masks of other names or shapes than the model's sparse parameters.

    Args:
        names: names of the parameters that differ.
        path: the checkpoint's path.
        dense: why those that have a mask there stay dense in the model, by name.
    """
    here = "".join(f" {name} has a mask there, and stays dense here ({why})." for name, why in (dense or {}).items())
    return ValueError(
        f"the checkpoint's masks do not fit the model: {', '.join(names)} differ in name or shape.{here} Resume with the model "
        "and the include=, exclude=, keep_dense= of the interrupted run, or give fresh_start=True to make new masks. The "
        f"checkpoint is {path}."
    )


def refuse_foreign_weights(masks: Mapping[str, Tensor], params: Mapping[str, Tensor], everywhere: bool = False) -> None:
    """Refuse to put the masks of the last run on weights that came from elsewhere since, or to speak of them.

    Args:
        masks: masks by parameter name.
        params: the parameters by name, of sharded ones this process's parts.
        everywhere: whether all processes ask together, and the weights of all count.

    Raises:
        ValueError: a weight is not zero where its mask is.
    """
    found = {n: int(params[n].detach()[~mask.to(params[n].device)].any()) for n, mask in masks.items()}
    foreign = [n for n, here in found.items() if (layout_of(params[n]).total(here) if everywhere else here)]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} hold weights that the masks of the last fit would cut: other weights were loaded "
            "since, for example by load_state_dict. Resume with ckpt_path= to get the masks that belong to them, or test "
            "with ckpt_path=, or use a new callback or fresh_start=True for new masks."
        )
