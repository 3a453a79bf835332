"""Shares of layers that follow from a model: found when a run begins, and kept with the run."""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.allocations.by_weight import LAMP, least_of
from sparse_callbacks.core.allocations.sees_model import SeesData, SeesModel
from sparse_callbacks.core.awaited import for_targets
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distributions import checked_shares, reads_weights, weight_rules
from sparse_callbacks.core.host import Host
from sparse_callbacks.core.joint_thresholds import are_joint
from sparse_callbacks.core.live.live_masks import exchanged_layers
from sparse_callbacks.core.local_parts import local_parameter
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.patterns import share_of
from sparse_callbacks.core.selection import Entry, layer_shapes
from sparse_callbacks.core.shards import layout_of
from sparse_callbacks.core.state_layout import damaged, shown_short
from sparse_callbacks.core.targets import for_layers, layer_targets

if TYPE_CHECKING:
    from sparse_callbacks.core.method import Method

ALLOCATED = "allocated"
"""In ``aux``, where the zeros lie that a distribution which sees the model has given the layers of each parameter."""


def follow_from_model(method: "Method") -> bool:
    """Whether the targets of a method follow from the model, and a run keeps those that it began with."""
    once = reads_weights(method.distribution) and not are_joint(method)
    return isinstance(method.distribution, SeesModel) or once


def find_shares(
    method: "Method", model: nn.Module, entries: Sequence[Entry], saved: SavedRun | None, together: bool = False
) -> None:
    """Let a distribution that sees the model look at it, before the method is asked for its targets.

    A run that goes on has the shares that it began with, and only layers that are new to it get theirs now.

    Args:
        method: the method, of any kind.
        model: the model.
        entries: all parameters of it as distributions see them.
        saved: the run that goes on; None for that of ``method.aux``, or a new one.
        together: whether all ranks ask, which then take what the first has found.

    Raises:
        ValueError: the distribution gives no sparsity for a layer, or one that no layer can have; the saved run is damaged.
    """
    if not follow_from_model(method):
        method.attachment.shares = {}
        return
    chosen = [e for e in entries if not e.reason]
    known = dict(method.attachment.shares_of(model))
    if saved is not None:
        known = _kept(saved.aux, chosen, saved.path)
    elif method.attachment.model is model:
        known = _kept(method.aux, chosen, None)
    if any(layer not in known for e in chosen for layer in e.layers):
        found = _new_shares(method, model, entries, method.attachment.beginning if together else None)
        # in a loop ranks may still have weights of their own
        known = {**(distributed.of_first_rank(found) if together else found), **known}
    method.attachment.shares = known


def renew_shares(method: "Method") -> None:
    """Let a distribution that reads weights share the target out by the weights as they are now. The run keeps that.

    Args:
        method: the method of a run that is about to prune; on all ranks.

    Raises:
        ValueError: no mask comes to the target.
    """
    if not follow_from_model(method) or isinstance(method.distribution, SeesModel):
        return
    entries, params = for_targets(method.entries), method.params
    # in a loop ranks may have weights of their own
    method.attachment.shares = distributed.of_first_rank(_new_shares(method, method.model, entries, None))
    kept = shares_to_keep(method, [e for e in entries if e.name in params])
    method.aux |= {key: zeros.to(params[key.partition("/")[2]].device) for key, zeros in kept.items()}
    method.targets = method.share_out(entries)


def found_targets(method: "Method", entries: Sequence[Entry]) -> dict[str, float]:
    """Target sparsity of every layer, as :func:`find_shares` has found it.

    Args:
        method: a method whose targets follow from the model.
        entries: all parameters of the model; those without a reason have targets.

    Raises:
        ValueError: nobody has looked at the model yet.
    """
    layers, shares = layer_shapes(entries), method.attachment.shares
    if missing := [layer for layer in layers if layer not in shares]:
        raise ValueError(
            f"distribution={method.arguments['distribution']} looks at a model, and has seen none with {missing[0]}. Ask "
            "plan(model), or let a run begin."
        )
    return {layer: shares[layer] for layer in layers}


def shares_to_keep(method: "Method", entries: Iterable[Entry]) -> dict[str, Tensor]:
    """What a run keeps in ``aux``, so that it has the same targets when it goes on: the zeros of the layers of each
    parameter. Nothing for methods whose targets follow from their arguments, or from masks that were found."""
    shares = method.attachment.shares
    return {
        f"{ALLOCATED}/{e.name}": torch.tensor([zeros_for(shares[x], e.size // e.parts) for x in e.layers])
        for e in entries
        if not e.reason and e.layers[0] in shares
    }


def remarks_of_minimum(method: "Method", entries: Iterable[Entry], targets: Mapping[str, float]) -> dict[str, str]:
    """What a plan says of parameters with a layer that keeps no more than its minimum under one threshold, by name.

    Args:
        method: the method that plans.
        entries: all parameters.
        targets: target sparsity by layer.
    """
    if not follow_from_model(method) or isinstance(method.distribution, SeesModel):
        return {}
    chosen = [e for e in entries if not e.reason]
    rules = weight_rules(for_layers(method.distribution, chosen), [x for e in chosen for x in e.layers])
    found: dict[str, str] = {}
    for entry in chosen:
        size = entry.size // entry.parts
        for rule in (rules[x] for x in entry.layers if x in rules and rules[x].strip() != LAMP and x in targets):
            least = least_of(rule)
            if any(size - zeros_for(targets[x], size) == least for x in entry.layers):
                found[entry.name] = f"no more than its minimum of {least} under one threshold"
    return found


def _new_shares(method: "Method", model: nn.Module, entries: Sequence[Entry], host: Host | None) -> dict[str, float]:
    distribution = method.distribution
    if isinstance(distribution, SeesModel):
        if host is not None and isinstance(distribution, SeesData):
            result = distribution.shares_in_run(model, entries, host)
        else:
            result = distribution.shares(model, entries)
        given = checked_shares(result, layer_shapes(entries), f"{type(distribution).__name__}.shares")
    else:
        given = layer_targets(distribution, entries, method.target_sparsity, weights_of(model, entries))
    # through whole zeros, as the run keeps them: a run that goes on must have the very same targets
    sizes = {layer: e.size // e.parts for e in entries if not e.reason for layer in e.layers}
    return {layer: share_of(zeros_for(given[layer], size), size) for layer, size in sizes.items()}


def weights_of(model: nn.Module, entries: Iterable[Entry]) -> dict[str, Tensor]:
    """The weights of each layer of the selected parameters, of sharded ones this process's parts.

    Args:
        model: the model.
        entries: all parameters of it; those without a reason are selected.

    Raises:
        ValueError: a weight is on the meta device.
    """
    params, live = dict(model.named_parameters()), exchanged_layers(model)
    found: dict[str, Tensor] = {}
    for entry in (e for e in entries if not e.reason):
        layer = live.get(entry.name)
        weight = local_parameter(params[entry.name]) if layer is None else layer.places.dense(layer.values.detach())
        if weight.is_meta:
            raise ValueError(
                f"{entry.name} is on the meta device and has no values, by which distribution= would share out the target. "
                "Let it have values before, or choose a distribution that reads shapes alone."
            )
        views = layout_of(weight).layers(weight.detach(), entry.parts)
        found |= dict(zip(entry.layers, views, strict=True))
    return found


def _kept(aux: Mapping[str, Tensor], entries: Iterable[Entry], path: object) -> dict[str, float]:
    """The shares that a run has kept, of those of its layers that had one.

    Raises:
        ValueError: they are none that a run can have saved.
    """
    known: dict[str, float] = {}
    for entry in entries:
        found = aux.get(f"{ALLOCATED}/{entry.name}")
        if found is None:
            continue
        size = entry.size // entry.parts
        whole = not found.is_floating_point() and not found.is_complex() and tuple(found.shape) == (entry.parts,)
        if not whole or not all(0 <= n <= size for n in found.tolist()):
            raise damaged(
                f"its {ALLOCATED}/{entry.name} is {shown_short(found)}, and should be {entry.parts} whole numbers up to {size}",
                path,
            )
        known |= {layer: share_of(int(n), size) for layer, n in zip(entry.layers, found.tolist(), strict=True)}
    return known
