"""Layers of a model are exchanged for sparse ones before optimizers are made, and dense ones put back."""

from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.attachment import Choice
from sparse_callbacks.core.awaited import for_targets, with_awaited
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.cut_weights import count_cut
from sparse_callbacks.core.initial_masks import forget_given
from sparse_callbacks.core.inspection import copied
from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.core.live.live_records import end_records
from sparse_callbacks.core.live.saved_patterns import storage_of, units_of
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.planned_targets import planned_targets
from sparse_callbacks.core.selection import Entry, select
from sparse_callbacks.core.sparse_layers.live_places import keys_of_mask
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.storages.auto_storage import RowsSeen, decided
from sparse_callbacks.core.storages.exchanged import Exchanged
from sparse_callbacks.core.storages.first_places import first_keys, is_drawn_by_rejection, sparse_twin
from sparse_callbacks.core.storages.module_swap import enter_fast_paths, holders_of, leave_fast_paths, put_in, take_over
from sparse_callbacks.core.storages.storage import Rows, refuse_rows, why_no_exchange
from sparse_callbacks.core.storages.storage_choice import (
    choices_for,
    kept,
    linear_layers,
    refuse_choices,
    refuse_idle_globs,
)
from sparse_callbacks.core.wrappers import plain_model, set_up_by

_MASKED = Choice("masked")


@checked
def exchange_layers(method: Method, model: nn.Module, rows: Rows | None = None) -> dict[str, SparseLinear]:
    """Exchange the layers of ``model`` that are to have another storage than masks, as ``method`` says.

    Call it where the optimizer is made before the run of the method begins, as for Fabric or DistributedDataParallel:
    before that optimizer and before the wrapper. A Trainer, and `sparsify` with an optimizer that has not stepped yet, do
    it themselves. Layers that are exchanged already stay as they are. Layers on the meta device stay there, without ever
    being dense; give them memory with ``model.to_empty(device=...)`` and then values.

    Args:
        method: A method with ``storage=``, such as ``RigL(0.9, storage="sparse")``.
        model: The model, without wrappers.
        rows: For ``storage="auto"``, the rows that each layer sees in a step, or such numbers by glob; where None, those of
            the method's ``rows=``.

    Returns:
        The layers that were exchanged, by the name of their weight.

    Raises:
        ValueError: A layer cannot have the storage that was asked for; nothing was changed then.

    Example:
        >>> import torch
        >>> from sparse_callbacks import exchange_layers
        >>> from sparse_callbacks.methods import RigL
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
        >>> layers = exchange_layers(RigL(0.75, distribution="uniform", storage="sparse"), model)
        >>> list(layers), model[0].density
        (['0.weight', '2.weight'], 0.25)
    """
    refuse_rows(rows)
    if wrapper := set_up_by(model, ()):
        raise ValueError(
            f"model= is a {wrapper}, which knows the layers that storage= would exchange. Give the module that it was made from, "
            "before it is made."
        )
    done = exchange(method, plain_model(model), rows=rows)
    done.forget()
    return done.layers


def exchange(
    method: Method,
    model: nn.Module,
    *,
    rows: RowsSeen = None,
    device: torch.device | None = None,
    saved: SavedRun | None = None,
    why_masked: str = "",
) -> Exchanged:
    """Exchange layers for the run that begins; nothing is changed where it is refused.

    Args:
        method: the method of the run.
        model: the user's model, without wrappers.
        rows: the rows that each layer sees in a step, by its name or a glob, or a function that finds them out; ``rows=`` of
            the method goes first.
        device: where the model will be trained; None: where it is.
        saved: the run that goes on, whose patterns say which layers are exchanged.
        why_masked: the reason of the host why ``"auto"`` leaves all layers masked; empty where it has none.

    Raises:
        ValueError: a layer cannot have the storage that was asked for.
    """
    done = Exchanged(method, model)
    if why_no_exchange(method) or not _concerns(method, model, saved):
        method.attachment.choose(model, {})
        return done
    try:
        entries = with_awaited(method, select(model, method.include, method.exclude, method.keep_dense))
        refuse_idle_globs(rows, entries, "rows")
        choices = choices_for(method, model, entries, device)
        if saved is not None:
            _put_saved(done, method, model, entries, choices, saved)
        else:
            _put_first(done, method, model, entries, choices, rows, device, why_masked)
        leave_fast_paths(model)
    except BaseException:
        done.undo()
        raise
    return done


def _concerns(method: Method, model: nn.Module, saved: SavedRun | None) -> bool:
    """Whether any layer is exchanged, or is to be. Models with masks alone are left without a look at them."""
    return (
        getattr(method, "storage", "masked") != "masked"
        or (saved is not None and bool(saved.patterns))
        or any(isinstance(module, SparseLinear) for module in model.modules())
    )


def _put_first(
    done: Exchanged,
    method: Method,
    model: nn.Module,
    entries: list[Entry],
    choices: dict[str, Choice],
    rows: RowsSeen,
    device: torch.device | None,
    why_masked: str,
) -> None:
    """Exchange layers for a run that is new, or goes on with the masks of the method's last one."""
    method.attachment.choose(model, choices)
    shared = for_targets(entries)
    targets = planned_targets(method, model, shared, None, together=True)
    method.attachment.share(model)  # of weights that exchanged layers have lost when the run begins
    zeros = method.parameter_zeros(shared, targets)
    refuse_choices(getattr(method, "storage", "masked"), choices, {name for name, n in zeros.items() if not n})
    layers = linear_layers(model)
    # a layer that is dense by its distribution has nothing to save
    choices = {n: c if zeros.get(n) or c.live is not None else Choice("masked") for n, c in choices.items()}
    choices, done.report = decided(method, layers, choices, zeros, rows, why_masked)
    known = method.weights.masks if method.attachment.model is model else {}
    for entry in shared:
        choice = choices.get(entry.name, _MASKED)
        if choice.storage == "masked" or choice.live is not None:
            continue
        linear: Any = layers[entry.name].module
        note = [choice.note] if choice.note else []
        if entry.name in known:
            keys = keys_of_mask(known[entry.name].to(linear.weight.device), choice.group)
        else:
            keys = first_keys(method, entry, linear.weight, choice.group, targets, device or linear.weight.device)
            note += ["drawn by rejection"] if is_drawn_by_rejection(method, entry, linear.weight) else []
        done.put(entry.name, linear, sparse_twin(linear, choice.storage, choice.group, keys))
        choices[entry.name] = kept(done.layers[entry.name], "; ".join(note))
    forget_given(method)
    method.attachment.choose(model, choices)


def _put_saved(
    done: Exchanged,
    method: Method,
    model: nn.Module,
    entries: list[Entry],
    choices: dict[str, Choice],
    saved: SavedRun,
) -> None:
    """Exchange the layers that were exchanged in the run that goes on, with the places that it has saved.

    Raises:
        ValueError: the model has no such layer, or it cannot be exchanged.
    """
    layers, here = linear_layers(model), exchanged_layers(model)
    choices = {name: c if c.live is not None else replace(c, storage="masked") for name, c in choices.items()}
    for name, pattern in saved.patterns.items():
        found = name in layers and name in choices
        why = choices[name].note if found else "the model has no linear layer of that name that becomes sparse"
        if why and name not in here:
            raise ValueError(
                f"the checkpoint {saved.path} has sparse storage for {name}, which this run cannot give it: {why}. Resume with the "
                "model and the arguments of the interrupted run, or give fresh_start=True."
            )
        shape = next(e.full_shape for e in entries if e.name == name)
        keys, _, group = units_of(pattern, shape)
        if name in here:
            if not torch.equal(here[name].keys(), keys):
                done.foreign.append(name)
            done.move(here[name], keys)
        else:
            linear: Any = layers[name].module
            if count_cut(method, saved, name, linear.weight):
                done.foreign.append(name)
            done.put(name, linear, sparse_twin(linear, storage_of(pattern), group, keys))
        choices[name] = kept(here.get(name) or done.layers[name], choices[name].note)
    method.attachment.choose(model, choices)


def dense_twin(model: nn.Module) -> nn.Module:
    """``model`` itself, or where layers of it are exchanged a copy whose layers are dense."""
    return to_dense(copied(model)) if exchanged_layers(model) else model


@checked
def to_dense(module: nn.Module) -> nn.Module:
    """Put an ``nn.Linear`` in the place of every `SparseLinear` inside ``module``, with zeros where no weight lives.

    It is done in place, as by the functions of ``torch.nn.utils``; hooks and attributes move along, and the Parameters of
    the weights are new ones. For a copy write ``to_dense(copy.deepcopy(module))``.

    Args:
        module: Any module, or a `SparseLinear`.

    Returns:
        ``module`` itself; of a `SparseLinear` the ``nn.Linear``.

    Raises:
        ValueError: A layer is too large for a dense matrix; nothing was changed then.

    Example:
        >>> import torch
        >>> from sparse_callbacks import SparseLinear, to_dense
        >>> to_dense(torch.nn.Sequential(SparseLinear.random(8, 4, fan_in=2)))
        Sequential(
          (0): Linear(in_features=8, out_features=4, bias=True)
        )
    """
    layers = [m for m in module.modules() if isinstance(m, SparseLinear)]
    for layer in layers:
        layer.refuse_dense("an nn.Linear")
    holders = holders_of(module)
    made: nn.Module = module
    for layer in layers:
        dense = layer.to_dense()
        take_over(layer, dense)
        put_in(holders.get(id(layer), []), dense)
        end_records([layer])  # of a run that was broken off, and that nobody has closed
        made = dense if layer is module else made
    enter_fast_paths(made)
    return made
