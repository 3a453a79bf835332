"""First masks that a score makes: a new run takes them when there is data, before any weight is written."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.reinitialised import reset_weights
from sparse_callbacks.core.score_options import Score, score_in
from sparse_callbacks.core.scored_masks import pruned_in_rounds, within_layers
from sparse_callbacks.core.topology import EverActive


class StartsByScore(Method):
    """A method whose first masks may be made by a score.

    Until there is data, other masks stand in for them.
    """

    _first_score: Score | None = None  # of a new run's masks; None where something else decides
    _scored: Mapping[str, Tensor] | None = None  # the masks by that score, while a run takes them

    @property
    def _starts_by(self) -> Score | None:
        return self._first_score

    @staticmethod
    def _score_of(initial_mask: Any) -> Score | None:
        """The score that ``initial_mask=`` asks for; None where it says something else."""
        return score_in(initial_mask)

    def _masks_by(self, score: Score) -> dict[str, Tensor]:
        """The first masks made anew by a score: data and loss are there now, and no weight is written yet."""
        self._scored = pruned_in_rounds(self, score, self._ranked)
        try:
            return self.initial_masks()
        finally:
            self._scored = None

    def _ranked(self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], way: float) -> dict[str, Tensor]:
        """The masks that a round of pruning by score leaves: by default each layer has its planned count at the end.

        Args:
            scores: scores by parameter name; none is negative.
            masks: bool masks of the weights that are left.
            way: the part of all rounds that is done, in (0, 1].
        """
        return within_layers(self, scores, masks, way)

    def _scores_taken(self) -> None:
        """The run has the masks that the score makes; no weight is written yet."""

    @property
    def _renews_weights(self) -> bool:
        """Whether the layers of a new run get fresh initial weights once its masks are made."""
        return False


def first_score(method: Method) -> Score | None:
    """The score that makes the first masks of a new run of ``method``; None where something else decides."""
    return method._starts_by if isinstance(method, StartsByScore) else None


def take_scores(method: Method) -> bool:
    """Make the first masks of a new run by the score that was asked for, if one was; no weight is written.

    Args:
        method: the method of the run; the masks that stand in are replaced.

    Returns:
        Whether a score has made them.

    Raises:
        ValueError: there is no loss, no data or no input to compute scores from, or they are not finite.
    """
    score = first_score(method)
    if not isinstance(method, StartsByScore) or score is None or not method.params:
        return False
    weights = method.weights
    for name, mask in weights.same_everywhere(method._masks_by(score)).items():
        weights.set_mask(name, mask)
    if method.explores:  # the masks that stood in were never those of the network
        for name in method.params:
            method.aux.pop(f"ever_active/{name}", None)
        EverActive(method.aux, weights).add(method.params)
    method._scores_taken()
    return True


def renews_weights(method: Method) -> bool:
    """Whether the layers of a new run of ``method`` get fresh initial weights after scoring."""
    return isinstance(method, StartsByScore) and method._renews_weights


def renew_weights(method: Method) -> None:
    """Give layers fresh initial weights where a new run of ``method`` has them made anew after scoring."""
    if renews_weights(method):
        seed = int(torch.randint(2**62, (), generator=method.generator("reinit", 0)))
        reset_weights(method.model, method.params, seed)
