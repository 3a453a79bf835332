"""One ranking by score over all layers, in which layers may be emptied unless each keeps a minimum."""

from collections.abc import Iterable, Mapping

from torch import Tensor

from sparse_callbacks.core.allocations.by_weight import GLOBAL, LAMP, is_by_weight
from sparse_callbacks.core.checkpoint import shown
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.scored_masks import over_all_layers

SCORED = "scored"
"""In ``aux``, marks the parameters that took part in the ranking."""


def ranks_jointly(rule: object) -> bool:
    """Whether a rule is one ranking over all layers, by its name."""
    return isinstance(rule, str) and is_by_weight(rule) and rule.strip() != LAMP


def refuse_distribution(distribution: Distribution, least: int) -> None:
    """Refuse a distribution that does not go with ``least``, or under which some layers would share a ranking.

    Args:
        distribution, least: the arguments of these names.

    Raises:
        ValueError: says what to give.
    """
    if least and not ranks_jointly(distribution):
        raise ValueError(
            f"least={least!r} is of one ranking over all layers, and distribution={shown(distribution)} plans how many weights "
            "each layer keeps. Leave least= out, or give distribution='global'."
        )
    if least and isinstance(distribution, str) and distribution.strip() != GLOBAL:
        raise ValueError(
            f"least={least!r} and distribution={distribution!r} both say how many weights every layer keeps. Give one of them."
        )
    if isinstance(distribution, Mapping) and any(map(ranks_jointly, distribution.values())):
        raise ValueError(
            f"distribution={distribution!r} names 'global' in a mapping, and here 'global' is one ranking by score over all "
            "layers. Give distribution='global' and leave layers out with exclude=, or name another rule, such as 'lamp'."
        )


def in_one_ranking(
    method: Method,
    scores: Mapping[str, Tensor],
    masks: Mapping[str, Tensor],
    zeros: int,
    least: int,
    tell: bool = False,
) -> dict[str, Tensor]:
    """Masks that keep the active weights with the largest scores of all layers together.

    Args:
        method: the method of the run.
        scores: scores by parameter name; none is negative.
        masks: bool masks of the weights that are left.
        zeros: weights of all these parameters that are pruned.
        least: active weights that every layer keeps.
        tell: say which layers keep more by that.

    Raises:
        ValueError: the layers keep more weights than are left.
    """
    layers = (views[0] for n, m in masks.items() for _, views in method.weights.layers(n, m))
    refuse_least(method, least, sum(m.numel() for m in masks.values()) - zeros, (layer.numel() for layer in layers))
    found = over_all_layers(method, scores, masks, zeros, least)
    if least and tell:
        _tell_of_least(method, least, found, over_all_layers(method, scores, masks, zeros))
    return found


def zeros_of_ranked(method: Method, ranked: Mapping[str, Tensor]) -> int:
    """The zeros that the parameters in a ranking come to at the target, beside those that have no score and keep their
    largest weights.

    Args:
        method: the method of the run.
        ranked: the parameters that have a score, by name.
    """
    total = zeros_for(method.target_sparsity, sum(p.numel() for p in method.params.values()))
    others = {n: p for n, p in method.params.items() if n not in ranked}
    return total - sum(
        method.planned_zeros(layer, views[0].numel())
        for n, p in others.items()
        for layer, views in method.weights.layers(n, p)
    )


def refuse_least(method: Method, least: int, kept: int, sizes: Iterable[int]) -> None:
    """Refuse a minimum that comes to more weights than the target leaves.

    Args:
        method: the method of the run.
        least: active weights that every layer keeps; all, where it has fewer.
        kept: weights that the target leaves.
        sizes: the number of weights of each layer.

    Raises:
        ValueError: says how many weights the minimum asks for.
    """
    wanted = sum(min(least, size) for size in sizes)
    if wanted > kept:
        raise ValueError(
            f"least={least} keeps {wanted:,} weights of all layers, and sparsity={method.sparsity!r} leaves {kept:,}. "
            "Give a smaller least= or sparsity=."
        )


def _tell_of_least(method: Method, least: int, found: Mapping[str, Tensor], otherwise: Mapping[str, Tensor]) -> None:
    """Say what ``least`` has changed."""
    short = [
        f"{layer} {int(mask.sum())} instead of {int(other.sum())}"
        for name in found
        for layer, (mask, other) in method.weights.layers(name, found[name], otherwise[name])
        if int(mask.sum()) > int(other.sum())
    ]
    if short:
        method.host.inform(f"least={least} keeps more weights than one ranking would: {', '.join(short)}.")


def warn_of_empty(method: Method, score: str) -> None:
    """Warn of layers that a score has left without a weight.

    Args:
        method: the method of the run, which has its masks.
        score: the name of the score.
    """
    empty = [
        layer
        for name, mask in method.masks.items()
        for layer, views in method.weights.layers(name, mask)
        if not bool(views[0].any())
    ]
    if empty:
        reached = method.measured_sparsity()["sparsity/total"]
        method.host.warn(
            f"score={score!r} at sparsity {reached:.4g} leaves no weight in {', '.join(empty)}: nothing passes through these "
            "layers. Give least=, more rounds=, a distribution= other than 'global', or a lower sparsity."
        )
