"""Puts a saved run into a method outside of a run, which then describes the loaded network."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from sparse_callbacks.core.attachment import Attachment, Choice
from sparse_callbacks.core.awaited import with_awaited
from sparse_callbacks.core.calendar import Calendar
from sparse_callbacks.core.checkpoint import SavedRun, misfit, refuse_foreign_weights, refuse_other_model
from sparse_callbacks.core.initial_masks import forget_given
from sparse_callbacks.core.live.ever_live import as_truths
from sparse_callbacks.core.live.live_layout import units_in
from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.core.live.live_runs import note_places
from sparse_callbacks.core.live.saved_patterns import (
    Pattern,
    keys_of,
    live_in,
    mask_of,
    matrix_of_units,
    storage_of,
    units_of,
)
from sparse_callbacks.core.local_parts import local_parameter
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.planned_targets import planned_targets, sharing_entries
from sparse_callbacks.core.progress import Progress
from sparse_callbacks.core.selection import NOT_TRAINED, Entry, select
from sparse_callbacks.core.shards import cut
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.state_claims import planned_otherwise, refuse_impossible
from sparse_callbacks.core.topology import EverActive
from sparse_callbacks.core.weights import SparseWeights


def aux_on_devices(aux: Mapping[str, Tensor], params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies of a method's tensors, each on the device of the parameter whose name ends its key.

    Copies, as methods write into them, and the state may be loaded once more.
    """
    devices = {n: p.device for n, p in params.items()}
    return {k: t.to(devices.get(k.split("/", 1)[-1], t.device), copy=True) for k, t in aux.items()}


def take_saved(method: Method, model: nn.Module, saved: SavedRun, owned: Sequence[Sequence[str]] | None = None) -> None:
    """Make ``method`` what it was when ``saved`` was written, as if its latest run had ended there.

    No weight is written, and where something is refused the method stays as it was. A later run of the same model goes
    on from these masks, dense values, counters and tensors.

    Args:
        method: a method that no run uses now.
        model: the model that holds the weights which belong to ``saved``.
        saved: the run that was saved.
        owned: the names of the parameters of each optimizer; None where nobody knows them.

    Raises:
        ValueError: the masks do not fit the model, or cut weights of it that are not zero.
    """
    before = dict(vars(method))
    try:
        _take(method, model, saved, owned)
    except BaseException:
        vars(method).clear()
        vars(method).update(before)
        raise


def _take(method: Method, model: nn.Module, saved: SavedRun, owned: Sequence[Sequence[str]] | None) -> None:
    entries, targets = _entries_and_targets(method, model, saved)
    parameters = dict(model.named_parameters())
    params = {e.name: parameters[e.name] for e in entries if not e.reason}
    layers = {n: layer for n, layer in exchanged_layers(model).items() if n in params}
    saved = with_masks(saved, {n: tuple(p.shape) for n, p in params.items() if n not in layers})
    refuse_other_model(saved, params, layers)
    saved = planned_otherwise(saved, entries)
    planned = method.parameter_zeros(entries, targets)
    refuse_impossible(method, saved, model, planned, len(saved.progress["steps"]))
    params = {n: local_parameter(p) for n, p in params.items()}
    refuse_foreign_weights(cut(saved.masks, params), params, everywhere=True)
    refuse_other_places(saved, layers)
    _describe(method, entries, targets, params, saved, method.owners.owns if owned is None else owned, layers)
    if method.keeps_dense:
        method.start_copies(cut(saved.dense, params), new=())
    if method.explores:
        EverActive(method.aux, method.weights).add(params)
    choices = method.attachment.choices_of(model)
    method.attachment = Attachment()
    method.attachment.choose(model, choices)
    method.attachment.know(model)
    method.saved = saved  # a method that asks in `attach` whether its run has begun finds that it has
    method.attach(model)
    method.saved = None


def describe(
    method: Method,
    weights: Mapping[str, Tensor],
    entries: Sequence[Entry],
    targets: Mapping[str, float],
    saved: SavedRun,
    owned: Sequence[Sequence[str]],
) -> None:
    """:func:`take_saved` where the model is in another process: the method describes it, by copies of its sparse weights.

    Args:
        method: a method that no run uses now.
        weights: values of the sparse parameters.
        entries: all parameters of the model.
        targets: planned sparsity of every sparse layer.
        saved: the run that was saved.
        owned: the names of the parameters of each optimizer.
    """
    params = {n: nn.Parameter(w, requires_grad=False) for n, w in weights.items()}
    masks = {n: e.full_shape for e in entries if (n := e.name) in saved.patterns}
    _describe(method, entries, targets, params, with_masks(saved, masks), owned, {})


def choice_of(pattern: Pattern, shape: tuple[int, ...]) -> Choice:
    """The storage of a layer of which a pattern was saved.

    Args:
        pattern: the pattern.
        shape: the shape of the layer's matrix.
    """
    live = live_in(pattern, shape)
    return Choice(storage_of(pattern), group=live // max(1, units_in(pattern)), live=live)


def with_masks(saved: SavedRun, shapes: Mapping[str, tuple[int, ...]]) -> SavedRun:
    """``saved`` with masks in place of the patterns of layers that are dense in a model.

    Args:
        saved: the saved run.
        shapes: shapes of the dense weights by parameter name.

    Raises:
        ValueError: a pattern is not one of such a layer.
    """
    dense = [name for name in saved.patterns if name in shapes]
    if not dense:
        return saved
    try:
        masks = {name: mask_of(saved.patterns[name], shapes[name]) for name in dense}
    except ValueError as error:
        raise misfit(dense, saved.path) from error
    aux = {k: t for k, t in saved.aux.items() if k not in {f"once_active/{name}" for name in dense}}
    for name, mask in masks.items():
        if (former := saved.aux.get(f"once_active/{name}")) is not None:
            _, units, group = units_of(saved.patterns[name], shapes[name])
            aux[f"ever_active/{name}"] = mask | matrix_of_units(as_truths(former, units), shapes[name], group)
    patterns = {name: pattern for name, pattern in saved.patterns.items() if name not in masks}
    return replace(saved, masks={**saved.masks, **masks}, patterns=patterns, aux=aux)


def refuse_other_places(saved: SavedRun, layers: Mapping[str, SparseLinear]) -> None:
    """Refuse a saved run whose live weights are others than those of the exchanged layers.

    Raises:
        ValueError: a layer has other places.
    """
    others = [n for n, layer in layers.items() if not torch.equal(keys_of(saved.patterns[n], layer), layer.keys())]
    if others:
        raise ValueError(
            f"{', '.join(others)} have other live weights than the run that was saved ({saved.path}). Load the weights that "
            "were saved together with the state."
        )


def _describe(
    method: Method,
    entries: Sequence[Entry],
    targets: Mapping[str, float],
    params: Mapping[str, nn.Parameter],
    saved: SavedRun,
    owned: Sequence[Sequence[str]],
    layers: Mapping[str, SparseLinear],
) -> None:
    """Give the method the masks, counters and tensors of the saved run."""
    method.owners = Ownership.between_runs(owned, params, len(saved.progress["steps"]))
    method.entries, method.targets = list(entries), dict(targets)
    chosen = {e.name: e for e in entries if not e.reason}
    method.weights = SparseWeights(params, chosen, cut(saved.masks, params), layers)
    note_places(method.weights)
    method.aux = cut(aux_on_devices(saved.aux, params), params)
    method.progress = Progress.restored(method.first_update, saved.progress)
    method.calendar = calendar_of(method, saved.times)


def _entries_and_targets(method: Method, model: nn.Module, saved: SavedRun) -> tuple[list[Entry], dict[str, float]]:
    """All parameters of the model, those without a mask as dense ones, and the planned sparsity of every layer."""
    if method.attachment.model is model and {e.name for e in method.entries if not e.reason} == set(saved.names):
        return method.entries, method.targets  # of the latest run, which knows what its optimizers trained
    found = select(model, method.include, method.exclude, method.keep_dense)
    found = [e if e.reason or e.name in saved.names else replace(e, reason=NOT_TRAINED[1]) for e in found]
    entries = with_awaited(method, found, saved.names)
    shapes = {e.name: e.full_shape for e in found}
    kept = {n: pattern for n, pattern in saved.patterns.items() if n in shapes}
    method.attachment = Attachment()
    method.attachment.choose(model, {n: choice_of(pattern, shapes[n]) for n, pattern in kept.items()})
    targets = planned_targets(method, model, sharing_entries(method, entries), saved)
    forget_given(method)
    return list(method.further_members(model, entries)), targets


def calendar_of(method: Method, times: Sequence[int]) -> Calendar | None:
    """The calendar that was saved as ``times``."""
    if not times:
        return None
    every, start, stop, *until = times
    return Calendar(every, start, stop, method.arrives_at_stop, *until)
