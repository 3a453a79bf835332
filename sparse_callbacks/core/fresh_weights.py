"""Weights that a new run begins with: which may be made larger, and what the user should know of them."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from sparse_callbacks.core.given_masks import GivenMasks
from sparse_callbacks.core.initial_masks import StartsSparse, start_of
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.pattern_names import asked_pattern
from sparse_callbacks.core.rescaling import counted_norm, rescale_weights, starved_layers, why_not_fresh, zeros_among


def refuse_rescaling(method: Method, model: nn.Module, params: Mapping[str, Tensor]) -> None:
    """Refuse to rescale weights that are known to be trained, when a new run is about to begin.

    Raises:
        ValueError: the method was asked to.
    """
    if not isinstance(method, StartsSparse) or method.rescale is None:
        return
    start = start_of(method)
    why = why_not_fresh(model, params, start.brings_counts)
    if not why and start.given is not None:
        why = _why_of_given(start.given, params)
    if why:
        raise ValueError(
            f"rescale={method.rescale!r} is for fresh weights, and those of the model are trained: {why}. Leave rescale= "
            "out. (A run that goes on from its own state, by ckpt_path= or sparsify(state=), is never rescaled.)"
        )


def _why_of_given(given: GivenMasks, params: Mapping[str, Tensor]) -> str:
    """Why weights beside which masks are given are known to be trained; empty where nobody knows."""
    mine = {n: params[n].detach() for n in given.masks if n in params}
    for name, weight in given.weights.items() if given.trained else ():
        if name in mine and _same_where(given.masks[name], mine[name], weight):
            return f"{name} is as in the checkpoint of a trained network"
    if not any(bool(weight[~given.masks[n].to(weight.device)].any()) for n, weight in mine.items()):
        return "they are zero already where the given masks are, as after a run with these masks"
    return ""


def rescale_fresh(method: Method) -> None:
    """Make the masked weights of a new run larger, where the method was asked to."""
    if isinstance(method, StartsSparse) and method.rescale is not None:
        rescale_weights(method.weights, method.rescale, method.attachment.given_layers)


def refuse_rescaled_checkpoint(method: Method, path: object) -> None:
    """Refuse to rescale the weights of a checkpoint that a new run begins with, by ``fresh_start=True``.

    Raises:
        ValueError: the method was asked to.
    """
    if isinstance(method, StartsSparse) and method.rescale is not None:
        raise ValueError(
            f"rescale={method.rescale!r} is for fresh weights, and with fresh_start=True a new run begins with the trained "
            f"ones of the checkpoint {path}. Leave rescale= out."
        )


def warn_of_start(method: Method) -> None:
    """Tell the user what is to be known of the masks and weights that a new run begins with, which are not written yet."""
    for text in _warnings_of_start(method, method.model):
        method.host.warn(text)


def _warnings_of_start(method: Method, model: nn.Module) -> Iterator[str]:
    if not isinstance(method, StartsSparse):
        return
    name, start = type(method).__name__, start_of(method)
    if dead := [n for n, count in method.weights.active_counts.items() if not count and start.brings_counts]:
        yield f"{', '.join(dead)} has no active weight in {start.shown}, and so never trains. exclude= leaves it dense."
    if filling := _zeros_left_dense(method, model):
        listed = ", ".join(f"{layer} ({share:.0%} zeros; {why})" for layer, (share, why) in filling.items())
        yield (
            f"layers that pattern= leaves dense have zeros, which training fills: {listed}. Where they are to stay, hold them by "
            "another Static(initial_mask='nonzero', include=[...]) beside this one."
        )
    if start.brings_counts:
        return
    if start.at_random and (share := zeros_among(model, method.params)):
        yield (
            f"{name} draws its masks at random, and {share:.1%} of the weights are zero already: a pruned network loses "
            "most of what it has learnt. Give initial_mask='nonzero' to go on with its masks."
        )
    elif start.at_random and (norm := counted_norm(model, method.params)):
        yield (
            f"{name} draws its masks at random, and the network was trained before: {norm} has counted batches. Give "
            "initial_mask='magnitude' to keep its largest weights."
        )
    elif starved := layers_of_few_inputs(method, model):
        listed = ", ".join(f"{layer} ({inputs:.1f})" for layer, inputs in starved.items())
        yield (
            f"few inputs are left for each output of {listed}, with no norm in between: the signal fades from layer to "
            f"layer, and the network may not learn. {name}(rescale='fan_in') makes fresh weights larger for it."
        )


def _zeros_left_dense(method: Method, model: nn.Module) -> dict[str, tuple[float, str]]:
    """The share of zeros in each layer that a pattern leaves dense and that was pruned before, with the reason."""
    start, params = f"not {asked_pattern(method)}: ", dict(model.named_parameters())
    left = {e.name: e.reason for e in method.entries if e.reason.startswith(start)}
    shares = {name: zeros_among(model, {name: params[name]}) for name in left if name in params}
    return {name: (share, left[name]) for name, share in shares.items() if share}


def layers_of_few_inputs(method: Method, model: nn.Module) -> dict[str, float]:
    """Inputs that an output keeps on average, by layer, where a new run loses its signal and nothing is done about it."""
    if not isinstance(method, StartsSparse) or method.rescale is not None or start_of(method).brings_counts:
        return {}
    return starved_layers(model, method.weights, method.attachment.given_layers)


def _same_where(mask: Tensor, mine: Tensor, theirs: Tensor) -> bool:
    """Whether two tensors have the same values, and any, where ``mask`` is True."""
    mask = mask.to(mine.device)
    return bool(mask.any()) and torch.equal(mine[mask], theirs.to(mine)[mask])
