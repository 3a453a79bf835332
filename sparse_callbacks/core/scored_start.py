"""First masks by a score: a new run takes them when there is data, before any weight is written."""

from collections.abc import Mapping
from contextlib import nullcontext
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.error_text import naming
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.reinitialised import reset_weights
from sparse_callbacks.core.score_options import Score, score_in
from sparse_callbacks.core.scored_masks import pruned_in_rounds, within_layers
from sparse_callbacks.core.topology import EverActive

# ---------------------------------------------------------------------- what a kind of method registers functions for


@singledispatch
def first_score(method: Method) -> Score | None:
    """The score that makes the first masks of a new run of ``method``; None where something else decides."""
    return None


@singledispatch
def ranked_masks(
    method: Method, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], way: float
) -> dict[str, Tensor]:
    """The masks that a round of pruning by score leaves: by default each layer has its planned count at the end.

    Args:
        method: the method of the run.
        scores: scores by parameter name; none is negative.
        masks: bool masks of the weights that are left.
        way: the part of all rounds that is done, in (0, 1].
    """
    return within_layers(method, scores, masks, way)


@singledispatch
def scores_taken(method: Method) -> None:
    """The run of ``method`` has the masks that its score makes."""


@singledispatch
def renews_weights(method: Method) -> bool:
    """Whether the layers of a new run of ``method`` get fresh initial weights once its masks are made."""
    return False


# ---------------------------------------------------------------------- what a run does


def masks_by_score(method: Method, score: Score) -> dict[str, Tensor]:
    """The masks of a run's sparse parameters by a score. No weight is written.

    Args:
        method: the method of the run, whose host is known.
        score: the score.

    Raises:
        ValueError: there is no loss, no data or no input to compute scores from, or they are not finite.
    """
    asked: Any = nullcontext()
    if (given := score_in(getattr(method, "initial_mask", None))) is not None:
        whose = f"Here loss= and batches= are arguments of Score: initial_mask=Score({given.name!r}, loss=...)."
        asked = naming(f"initial_mask={given!r}", whose)
    with asked:
        return pruned_in_rounds(method, score, lambda scores, masks, way: ranked_masks(method, scores, masks, way))


def take_scores(method: Method) -> bool:
    """Make the first masks of a new run by the score that was asked for, if one was; no weight is written.

    Args:
        method: the method of the run; the masks that stand in are replaced.

    Returns:
        Whether a score has made them.

    Raises:
        ValueError: see :func:`masks_by_score`.
    """
    score = first_score(method)
    if score is None or not method.params:
        return False
    weights = method.weights
    # a method may begin with other masks on some layers, so it is asked for its first ones
    with method.attachment.scores(masks_by_score(method, score)):
        masks = method.initial_masks()
    for name, mask in weights.same_everywhere(masks).items():
        weights.set_mask(name, mask)
    if method.explores:  # the masks that stood in were never those of the network
        for name in method.params:
            method.aux.pop(f"ever_active/{name}", None)
        EverActive(method.aux, weights).add(method.params)
    scores_taken(method)
    return True


def renew_weights(method: Method) -> None:
    """Give layers fresh initial weights where a new run of ``method`` has them made anew after scoring."""
    if renews_weights(method):
        seed = int(torch.randint(2**62, (), generator=method.generator("reinit", 0)))
        reset_weights(method.model, method.params, seed)
