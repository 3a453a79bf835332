"""Masks made by a score in rounds: scores of the network as it is, and its weights ranked by them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from functools import cached_property, partial, reduce
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core import scores as functions
from sparse_callbacks.core.calibration import Calibration
from sparse_callbacks.core.example_inputs import example_inputs
from sparse_callbacks.core.local_parts import is_sharded
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.nm_layers import inputs_axis, nm_of
from sparse_callbacks.core.nm_selection import chosen_on_the_way
from sparse_callbacks.core.ops import keep_largest, keep_largest_jointly, zeros_for
from sparse_callbacks.core.replaced_parameters import masked
from sparse_callbacks.core.score_options import Score
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.selection import entries as all_entries
from sparse_callbacks.core.shards import size_of

Rank = Callable[[Mapping[str, Tensor], Mapping[str, Tensor], float], dict[str, Tensor]]
"""Gives the masks that scores leave of masks, with the part of all rounds that is done, in (0, 1]."""


def pruned_in_rounds(method: Method, score: Score, rank: Rank) -> dict[str, Tensor]:
    """The masks of a run's sparse parameters after all rounds of a score. No weight is written.

    Args:
        method: the method of the run, whose host is known.
        score: the score.
        rank: ranks the weights in each round.

    Raises:
        ValueError: there is no loss, no data or no input to compute scores from, or they are not finite.
    """
    masks = method.weights.all_active(method.params)
    scores = NetworkScores(method, score)
    rounds, unscored = score.number_of_rounds, list[str]()
    for number in range(1, rounds + 1):
        found = scores.under(masks if number > 1 else None)
        unscored = [name for name in method.params if name not in found]
        ranked = rank(found, {name: masks[name] for name in found}, number / rounds)
        # of rank 0: in a loop ranks may have weights of their own until they are made equal
        masks |= method.weights.same_everywhere(ranked)
    if unscored:
        method.host.warn(
            f"score={score.name!r}: in eval mode nothing that is scored depends on {', '.join(unscored)}, which keep their "
            "largest weights. Leave layers that take no part out with exclude=."
        )
    return masks | _largest(method, unscored)


def _largest(method: Method, names: Sequence[str]) -> dict[str, Tensor]:
    """Masks of the largest weights of each layer, as many as planned."""
    if not names:
        return {}
    params = {name: method.params[name] for name in names}
    return within_layers(method, functions.magnitude_scores(params), method.weights.all_active(names), 1.0)


class NetworkScores:
    """Scores of the sparse parameters of a run, as often as they are asked for, of the same batches or inputs.

    Args:
        method: the method of the run, whose host is known.
        score: the score.
        limit: the number of batches at most; None: all.
    """

    def __init__(self, method: Method, score: Score, limit: int | None = None) -> None:
        self._method, self._score, self._limit = method, score, limit

    def under(self, masks: Mapping[str, Tensor] | None = None) -> functions.Scores:
        """Scores by parameter name, of which the largest are kept; none is negative. Parameters that nothing depends on are
        missing.

        Args:
            masks: bool masks by name under which the network is scored; None: with its weights as they are.

        Raises:
            ValueError: there is no loss, no data or no input to compute scores from, or they are not finite.
        """
        score = self._score
        if any(map(is_sharded, self._method.params.values())):
            raise ValueError(
                f"score={score.name!r} needs whole weights, and this run has shards of them on each process. Give "
                "initial_mask='random', or train with strategy='ddp'."
            )
        found = self._raw(masks)
        for name, values in found.items():
            if not bool(values.isfinite().all()):
                raise ValueError(
                    f"score={score.name!r} of {name} is not finite: the loss or its derivatives overflow on these batches. Give "
                    "other batches=, weights that are not trained, or weights in float32."
                )
        if not score.rule.signed:
            return found
        # ranks of another type would not compare with these, where one ranking goes over all layers
        common = reduce(torch.promote_types, {values.dtype for values in found.values()}, torch.float32)
        return {name: as_magnitudes(values.to(common)) for name, values in found.items()}

    def _raw(self, masks: Mapping[str, Tensor] | None) -> functions.Scores:
        method, name = self._method, self._score.name
        if name == "synflow":
            return functions.synflow_scores(method.model, self._inputs, method.params, masks)
        scope: Any = nullcontext(method.params) if masks is None else masked(method.model, masks)
        with scope as params:
            if name == "magnitude":
                return functions.magnitude_scores(params)
            if name == "random":
                return functions.random_scores(params, lambda of: method.generator(f"score/{of}", 0))
            losses = partial(self._calibration.losses, limit=self._limit)
            if name in ("grasp", "crop"):
                return self._of_gradient_flow(losses, masks or {})
            return (functions.fisher_scores if name == "fisher" else functions.snip_scores)(losses, params)

    def _of_gradient_flow(self, losses: functions.Losses, masks: Mapping[str, Tensor]) -> functions.Scores:
        """GraSP or CroP. The gradient is that of every weight that could be sparse, whatever include= and exclude= say, so that
        the scores of a layer do not depend on who prunes the others."""
        model, params = self._method.model, self._method.params
        parameters = dict(model.named_parameters())
        flows = [e.name for e in all_entries(model) if not e.reason and parameters[e.name].requires_grad]
        named = {name: parameters[name] for name in dict.fromkeys([*flows, *params])}
        scores = functions.grasp_scores if self._score.name == "grasp" else functions.crop_scores
        found = scores(losses, named, masks)
        return {name: found[name] for name in params if name in found}

    @cached_property
    def _inputs(self) -> Any:
        return example_inputs(self._method.model, self._method.host.data_pass(values=False))

    @cached_property
    def _calibration(self) -> Calibration:
        score, method = self._score, self._method
        seed = int(torch.randint(2**62, (), generator=method.generator("score", 0)))
        found = method.host.calibration(score.batches, loss=score.loss, seed=seed)
        # so many batches of the training data are drawn once; those that were given are there, or may not fit into memory
        return found.held() if isinstance(score.batches, Integral) and self._limit is None else found


def as_magnitudes(signed: Tensor) -> Tensor:
    """Numbers that are not negative, in the order of signed ones: magnitudes rank as the signed numbers do.

    Exact for float32; of float64 the last 11 of 52 bits of the fraction are lost.

    Args:
        signed: float32 or float64, without NaN.

    Returns:
        float64, of the same shape.
    """
    bits = signed.contiguous().view(torch.int32 if signed.dtype == torch.float32 else torch.int64)
    # floats have a sign and a magnitude: without the sign they rank as integers do
    ranks = torch.where(bits < 0, torch.iinfo(bits.dtype).min - bits, bits)
    if bits.dtype == torch.int64:
        return (ranks >> 11).double() + 2.0**52
    return ranks.double() + 2.0**31


# ---------------------------------------------------------------------- rankings


def sparsity_after(sparsity: float, way: float) -> float:
    """The sparsity after a part ``way`` of the rounds on the way to ``sparsity``: each keeps the same share of the weights."""
    return sparsity if way == 1 else 1.0 - (1.0 - sparsity) ** way


def within_layers(
    method: Method,
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    way: float,
    after: Callable[[float, float], float] = sparsity_after,
) -> dict[str, Tensor]:
    """Masks that keep in each layer the active weights with the largest scores, at last as many as planned, and under N:M
    as many in each group.

    Args:
        method: the method of the run.
        scores: scores by parameter name; none is negative.
        masks: bool masks of the weights that are left.
        way: the part of all rounds that is done, in (0, 1].
        after: gives a layer's sparsity after that part, of its target.
    """

    def rank(entry: Entry, layer: str, values: Tensor, mask: Tensor) -> Tensor:
        zeros = zeros_for(after(method.targets[layer], way), size_of(values))
        if (pattern := nm_of(method, entry)) is not None:
            return chosen_on_the_way(values, zeros, pattern, inputs_axis(entry), mask)
        return keep_largest(values, size_of(values) - zeros, mask)

    entries = method.weights.entries
    return {n: method.weights.by_layer(n, partial(rank, entries[n]), s, masks[n]) for n, s in scores.items()}


def over_all_layers(
    method: Method, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], zeros: int, least: int = 0
) -> dict[str, Tensor]:
    """Masks that keep the active weights with the largest scores of all layers together.

    Args:
        method: the method of the run.
        scores: scores by parameter name; none is negative.
        masks: bool masks of the weights that are left.
        zeros: weights of all these parameters that are pruned.
        least: active weights that every layer keeps at least.
    """
    layers = [(name, views) for name, s in scores.items() for _, views in method.weights.layers(name, s, masks[name])]
    values = [views[0] for _, views in layers]
    count = sum(v.numel() for v in values) - zeros
    kept = keep_largest_jointly(values, count, least, [views[1] for _, views in layers])
    made: dict[str, list[Tensor]] = {}
    for (name, _), mask in zip(layers, kept, strict=True):
        made.setdefault(name, []).append(mask)
    return {name: parts[0] if len(parts) == 1 else torch.cat(parts) for name, parts in made.items()}
