"""A new run takes the masks that a score makes, before any weight is written."""

import torch

from sparse_callbacks.core.fresh_weights import warn_of_start
from sparse_callbacks.core.initial_masks import StartsSparse
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.reinitialised import reset_weights
from sparse_callbacks.core.topology import EverActive


def awaits_scores(method: Method) -> bool:
    """Whether a new run of ``method`` has its first masks only when :func:`take_scores` has made them."""
    return isinstance(method, StartsSparse) and method.first_score is not None


def take_scores(method: Method) -> None:
    """Make the first masks of a new run by the score that was asked for, if one was.

    Args:
        method: the method of the run; its masks by magnitude are replaced.

    Raises:
        ValueError: there is no loss, no data or no input to compute scores from, or they are not finite.
    """
    if not isinstance(method, StartsSparse) or method.first_score is None or not method.params:
        return
    weights = method.weights
    for name, mask in weights.same_everywhere(method.masks_by_score(method.first_score)).items():
        weights.set_mask(name, mask)
    if method.explores:  # the masks by magnitude were never those of the network
        for name in method.params:
            method.aux.pop(f"ever_active/{name}", None)
        EverActive(method.aux, weights).add(method.params)
    warn_of_start(method)
    method.scores_taken()


def renew_weights(method: Method) -> None:
    """Give layers fresh initial weights where a new run of ``method`` has them made anew after scoring."""
    if isinstance(method, StartsSparse) and method.renews_weights:
        seed = int(torch.randint(2**62, (), generator=method.generator("reinit", 0)))
        reset_weights(method.model, method.params, seed)
