"""EarlyCroP: pruning by gradient flow in rounds, early in training, where weights have settled."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Unpack

from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.calibration import Loss
from sparse_callbacks.core.distance_trigger import When
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.score_rules import SCORES
from sparse_callbacks.methods.prune_at_start.one_ranking import ranks_jointly
from sparse_callbacks.methods.prune_at_start.prune_at_start import PruneAtStart, sparsity_in_rounds
from sparse_callbacks.methods.prune_at_start.pruning_time import LATEST

BATCHES = 5  # of the paper's code
FIRST = 0.5  # sparsity of the first round


class EarlyCroP(PruneAtStart):
    """EarlyCroP: train dense until weights have settled, then prune once (Rachwan et al., 2022).

    It is :class:`PruneAtStart` with ``when="distance"`` and ``score="crop"``. With theta the selected weights::

        every epoch t   d_t = ||theta_t - theta_0|| / ||theta_0||
        prune at        the first t >= 2 with |d_t - d_(t-1)| < (1 - sparsity) * d_1, and at stop at the latest
        in rounds i     to sparsity - (sparsity - 0.5) / 2^i for i = 0 .. rounds - 2, and then to sparsity,
                        by scores |w * (H g)| that are made anew in each, of the network as it is pruned so far

    All rounds fall one after the other at the end of that epoch. Costs one copy of the initial weights until then, and for each
    round one gradient and one Hessian-vector product of each of ``batches``.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN); a look at the distance takes more.

    Differs from the paper's code: it takes the weights after the first epoch for theta_0, biases and norms among them, and the
    paper the initial ones, as here; it computes its scores on test data, adds the epochs before the pruning to those of the
    run, removes one weight more, and takes 100 rounds, of which those behind the tenth change nothing any more.

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1); up to 0.5 one round does it.
        when: ``"distance"``, as above; a time, in optimizer steps (int) or as a fraction of the run (float); or ``"start"``: before
            the first batch.
        stop: the latest time of the pruning, in optimizer steps (int) or as a fraction of the run (float); a warning says that
            the distance has not decided.
        score: the name of the score, see :class:`PruneAtStart`.
        batches: number of batches that scores are computed on, whose samples are drawn from the training data with ``seed``;
            or a list or loader of the batches. SynFlow, magnitude and random need no data.
        rounds: number of rounds; magnitude and random, which are the same in every round, take 1.
        least: active weights that every layer keeps at least, with ``distribution="global"``.
        lr_after: ``"continue"``: optimizers and learning rates go on over the pruning. ``"restart"``: the module configures
            them anew after it; :func:`sparse_callbacks.horizon` tells it for how many steps.
        distribution: ``"global"``: one ranking over all selected weights; otherwise one in each layer, see :class:`PruneAtStart`.
        loss: a function of module and batch that gives the loss, a scalar; None: that of the training step. Manual optimization and
            loops of your own need it.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, no loss or data for the score, a loader without a length; before the first batch.

    Example:
        >>> from sparse_callbacks import EarlyCroP
        >>> EarlyCroP(0.95).when
        'distance'

    Reference: Rachwan, Zuegner, Charpentier, Geisler, Ayle, Guennemann: Winning the Lottery Ahead of Time: Efficient Early
    Network Pruning. ICML 2022.
    """

    figure_prefix: ClassVar[str] = "early_crop"

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        when: When = "distance",
        stop: Time = LATEST,
        score: str = "crop",
        batches: int | Iterable[Any] = BATCHES,
        rounds: int = 7,
        least: int = 0,
        lr_after: str = "continue",
        distribution: Distribution = "global",
        loss: Loss | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        # a score that looks at no data has no use for the default
        unread = isinstance(batches, int) and batches == BATCHES and score in SCORES and not SCORES[score].of_loss
        super().__init__(
            sparsity,
            score=score,
            batches=1 if unread else batches,
            rounds=rounds,
            least=least,
            distribution=distribution,
            loss=loss,
            when=when,
            stop=stop,
            lr_after=lr_after,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        self.batches = batches
        if sparsity <= FIRST and ranks_jointly(distribution):
            # all would prune to the same sparsity, and of the same scores
            self._scoring = replace(self._scoring, rounds=1)


@sparsity_in_rounds.register
def _(method: EarlyCroP, sparsity: float, way: float) -> float:
    rounds = method.rounds or 1
    return early_sparsity(sparsity, round(way * rounds) - 1, rounds)


def early_sparsity(limit: float, number: int, rounds: int) -> float:
    """The sparsity of round ``number`` (from 0) of ``rounds``: limit - (limit - 0.5) / 2^number, and in the last one ``limit``.

    Example:
        >>> [early_sparsity(0.9, i, 4) for i in range(4)]
        [0.5, 0.7, 0.8, 0.9]
    """
    # up to a half the formula would come down to the limit, and pruned weights do not come back
    return limit if number == rounds - 1 else min(limit, limit - (limit - FIRST) * 0.5**number)
