"""Rules that share a target out by the values of the weights: one threshold over all layers, and LAMP."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.allocations.checks import check_reachable, fraction
from sparse_callbacks.core.argument_types import checked_after
from sparse_callbacks.core.ops import keep_largest, keep_largest_jointly, zeros_for
from sparse_callbacks.core.patterns import share_of
from sparse_callbacks.core.shards import Shards, count_of, layout_of, size_of

GLOBAL, LAMP = "global", "lamp"
_LEAST = re.compile(r"global\(\s*(?:least\s*=\s*)?([0-9]+)\s*\)")


@checked_after
def global_magnitude(weights: Mapping[str, Tensor], sparsity: float, least: int = 1) -> dict[str, float]:
    """Sparsity of each layer under one threshold over all magnitudes; zeros of all layers are floor(sparsity * weights).

    Args:
        weights: the weights by layer name.
        sparsity: target over all layers, in [0, 1).
        least: weights that each layer keeps whatever the threshold; all, where it has fewer. 0: a layer may be emptied,
            and then has sparsity 1.

    Raises:
        ValueError: a sparsity outside [0, 1), a layer without weights, or a target at which not all keep their least.

    >>> global_magnitude({"a": torch.tensor([3.0, 2.0]), "b": torch.tensor([0.1, 0.2])}, 0.5)
    {'a': 0.5, 'b': 0.5}
    """
    return _shares(GLOBAL if least == 1 else f"{GLOBAL}({least})", weights, sparsity)


@checked_after
def lamp(weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """Sparsity of each layer under one threshold over the scores of LAMP (Lee et al. 2021); see `lamp_scores`.

    The largest weight of each layer scores 1, so that no layer is emptied. Zeros of all layers are floor(sparsity * weights).

    Args:
        weights: the weights by layer name.
        sparsity: target over all layers, in [0, 1).

    Raises:
        ValueError: a sparsity outside [0, 1), a layer without weights, or a target at which not all keep a weight.
    """
    return _shares(LAMP, weights, sparsity)


@checked_after
def lamp_scores(weight: Tensor) -> Tensor:
    """w^2 / sum of the squares of all weights of the layer that are not smaller, in float64 on the CPU (Lee et al. 2021).

    Of equal magnitudes the one with the lower row-major index counts as the smaller. NaN counts as zero.

    >>> lamp_scores(torch.tensor([1.0, 2.0, 3.0])).tolist()
    [0.07142857142857142, 0.3076923076923077, 1.0]
    """
    magnitudes, order = weight.detach().abs().nan_to_num(nan=0.0).flatten().sort(stable=True)
    # on the CPU: sums of floats along a tensor are the same in every run there, and some devices have no float64
    squares = magnitudes.cpu().double()
    largest = squares[-1:].clamp(min=torch.finfo(torch.float64).tiny)
    squares = (squares / largest).square()
    not_smaller = squares.flip(0).cumsum(0).flip(0)
    scores = torch.where(not_smaller > 0, squares / not_smaller, 0.0)
    return torch.empty_like(scores).scatter_(0, order.cpu(), scores).view(weight.shape)


def is_by_weight(rule: Any) -> bool:
    """Whether a rule's name is that of one which reads weights.

    Raises:
        ValueError: it is such a name with a minimum that is not a whole number.
    """
    if not isinstance(rule, str):
        return False
    name = rule.strip()
    if name.startswith(f"{GLOBAL}(") and _LEAST.fullmatch(name) is None:
        raise ValueError(
            f"distribution={rule!r} is not known. Give 'global(2)' for a threshold under which each layer keeps at least 2 "
            "weights, or another whole number."
        )
    return name in (GLOBAL, LAMP) or _LEAST.fullmatch(name) is not None


def least_of(rule: str) -> int:
    """Weights that each layer keeps under a rule that reads weights: 1, or what ``global(2)`` says."""
    found = _LEAST.fullmatch(rule.strip())
    return int(found[1]) if found else 1


def largest_by(
    rule: str, weights: Mapping[str, Tensor], keep: int, among: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """Masks of together exactly ``keep`` weights, those with the largest magnitudes or scores.

    Within a layer both rules keep the largest magnitudes, of equals those with the lower index.

    Args:
        rule: the name of a rule that reads weights.
        weights: the weights by layer name; of sharded ones this process's parts.
        keep: how many stay.
        among: bool masks of those that may stay; None: all.
    """
    values, allowed = list(weights.values()), None if among is None else [among[n] for n in weights]
    if rule.strip() != LAMP:
        return dict(zip(weights, keep_largest_jointly(values, keep, least_of(rule), allowed), strict=True))
    counts = _lamp_counts(values, keep, allowed)
    limits = [None] * len(values) if allowed is None else allowed
    return {
        name: keep_largest(weight, count, among=limit)
        for (name, weight), count, limit in zip(weights.items(), counts, limits, strict=True)
    }


def _lamp_counts(weights: Sequence[Tensor], keep: int, among: Sequence[Tensor] | None) -> list[int]:
    """How many weights of each layer are among the ``keep`` with the largest scores."""
    shards = [layout for w in weights if isinstance(layout := layout_of(w), Shards)]
    wholes = [layout_of(w).collected(w.detach()) if shards else w for w in weights]
    limits = (
        None
        if among is None
        else [layout_of(w).collected(a) if shards else a for w, a in zip(weights, among, strict=True)]
    )
    counts = [0] * len(weights)
    if not any(w is None for w in wholes):  # of sharded weights the first process has them whole
        scores = [lamp_scores(w) for w in wholes if w is not None]
        allowed = None if limits is None else [a.cpu() for a in limits if a is not None]
        counts = [int(m.count_nonzero()) for m in keep_largest_jointly(scores, keep, 1, allowed)]
    if shards:  # all others add nothing
        counts = shards[0].processes.sum(torch.tensor(counts)).tolist()
    return counts


def _shares(rule: str, weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    fraction(sparsity, f"sparsity={sparsity!r}")
    sizes = {name: size_of(weight) for name, weight in weights.items()}
    if empty := [name for name, size in sizes.items() if not size]:
        raise ValueError(f"{empty[0]} has no weight to prune, weights={{{empty[0]!r}: an empty tensor}}. Leave it out.")
    check_reachable({name: (size,) for name, size in sizes.items()}, sparsity, least_of(rule))
    total = sum(sizes.values())
    masks = largest_by(rule, weights, total - zeros_for(sparsity, total))
    return {name: share_of(sizes[name] - count_of(mask), sizes[name]) for name, mask in masks.items()}


def shares_by(rule: str, weights: Mapping[str, Tensor], sparsity: float) -> dict[str, float]:
    """The sparsities of a rule that reads weights, by its name; see `global_magnitude` and `lamp`."""
    return _shares(rule, weights, sparsity)
