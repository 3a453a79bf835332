"""PruneAtStart: one mask by a score of the fresh network, held from the first step to the last."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.core.allocations.by_weight import GLOBAL, LAMP, is_by_weight, least_of
from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.calibration import Loss
from sparse_callbacks.core.distance_trigger import When
from sparse_callbacks.core.distributions import Distribution, uniform
from sparse_callbacks.core.hooks import Figures
from sparse_callbacks.core.initial_masks import InitialMask, StartsSparse, joining_masks
from sparse_callbacks.core.joint_thresholds import renews_thresholds
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.reinitialised import refuse_unresettable
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.score_options import Score
from sparse_callbacks.core.scored_masks import (
    pruned_in_rounds,
    scores_of,
    sparsity_after,
    within_layers,
)
from sparse_callbacks.core.selection import Entry, layer_shapes
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.thawed import masks_by_magnitude
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.prune_at_start.one_ranking import (
    SCORED,
    in_one_ranking,
    refuse_least,
    warn_of_empty,
    zeros_of_ranked,
)
from sparse_callbacks.methods.prune_at_start.pruning_time import LATEST, PrunesOnce


class PruneAtStart(PrunesOnce, StartsSparse):
    """Pruning at initialisation: one mask by a score of the fresh network, held from the first step to the last.

    Before the first batch, in rounds k = 1 .. n, with g the gradient of the mean loss over ``batches`` and H its Hessian::

        s_k  = 1 - (1 - sparsity)^(k / n)
        keep  the weights that are left with the largest scores, all but floor(s_k * size) of all layers together

    - ``"snip"``: \\|w * g\\| (Lee et al. 2019).
    - ``"grasp"``: w * (H g), with its sign: what is removed would have held the gradient down (Wang et al. 2020).
    - ``"crop"``: \\|w * (H g)\\| (Rachwan et al. 2022).
    - ``"synflow"``: \\|w\\| * dR / d\\|w\\|, with R the sum of the outputs for an input of ones, of the network with absolute
      parameters; without data, in float64, in 100 rounds (Tanaka et al. 2020). The input has the shape of the module's
      ``example_input_array``, or of one sample of a batch.
    - ``"fisher"``: w^2 / 2 * mean over batches of g^2 (Theis et al. 2018).
    - ``"magnitude"``: \\|w\\|; ``"random"``: a uniform number.

    Scores are those of the weights as the model has them, in eval mode and without autocast. A run that goes on keeps its masks,
    and nothing is scored again. Layers that are trained later join with their largest weights, floor(sparsity * size) zeros each.

    Differs from the papers: zeros are counted exactly, floor(sparsity * size). SNIP's reference scores biases too. GraSP's
    released code divides outputs by a temperature of 200. CroP's reference computes its scores on test data, and removes
    one weight more.

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1).
        score: the name of the score.
        batches: number of batches, whose samples are drawn from the training data with ``seed``; or a list or loader of the
            batches.
        rounds: how often scores are computed and weights pruned; None: 100 for ``"synflow"``, otherwise 1.
        least: active weights that every layer keeps at least, with ``distribution="global"``; what it changes is said.
        reinit_after: after scoring, the model gets fresh initial weights by the ``reset_parameters()`` of its modules, with
            ``seed``, as in SNIP's reference.
        distribution: ``"global"``: one ranking over all selected weights, in which a layer may lose all of its weights, of
            which a warning tells; ``"global(3)"`` is the same with ``least=3``. Anything else, see
            :class:`~sparse_callbacks.core.method.Method`: a ranking in each layer. Mappings cannot name ``"global"``.
        loss: a function of module and batch that gives the loss, a scalar; None: that of the training step. Manual optimization
            and loops of your own need it.
        when: ``"start"``: before the first batch. A time, in optimizer steps (int) or as a fraction of the run (float), or
            ``"distance"``, at the end of the epoch in which weights have settled (:class:`EarlyCroP`): until then training is
            dense, and all rounds fall one after the other.
        stop: the latest time with ``when="distance"``, at which the pruning comes with a warning; not read otherwise.
        lr_after: ``"continue"``: optimizers and schedules go on over a later pruning; ``"restart"``: they are configured anew.
        rescale: see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`; scores see the weights before that.
        include, exclude, seed, **options: see :class:`~sparse_callbacks.core.method.Method`.

    Raises:
        ValueError: arguments out of range, no loss or data for the score, a loss that does not depend on a layer; before the
            first batch.

    Example:
        >>> from sparse_callbacks import PruneAtStart
        >>> PruneAtStart(0.95, score="synflow").rounds is None
        True

    Reference: Lee, Ajanthan, Torr: SNIP: Single-shot Network Pruning based on Connection Sensitivity. ICLR 2019. Wang, Zhang,
    Grosse: Picking Winning Tickets Before Training by Preserving Gradient Flow. ICLR 2020. Tanaka, Kunin, Yamins, Ganguli:
    Pruning neural networks without any data by iteratively conserving synaptic flow. NeurIPS 2020. Rachwan et al.: Winning the
    Lottery Ahead of Time. ICML 2022.
    """

    figure_prefix: ClassVar[str] = "pruning"

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        score: str = "snip",
        batches: int | Iterable[Any] = 1,
        rounds: int | None = None,
        least: int = 0,
        reinit_after: bool = False,
        distribution: Distribution = GLOBAL,
        loss: Loss | None = None,
        when: When = "start",
        stop: Time = LATEST,
        lr_after: str = "continue",
        rescale: Rescale | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        if "initial_mask" in options:
            raise ValueError(
                f"initial_mask= is not an argument of {type(self).__name__}, whose first mask is made by score=. Give Static or "
                "RigL initial_mask=."
            )
        if not isinstance(reinit_after, bool):
            raise ValueError(
                f"reinit_after={reinit_after!r} is neither True nor False: it says whether the model gets fresh initial weights "
                "after scoring."
            )
        super().__init__(
            sparsity,
            initial_mask=Score(score, batches, loss, rounds, least),
            rescale=rescale,
            distribution=distribution,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        self.score, self.batches, self.loss, self.rounds, self.least = score, batches, loss, rounds, least
        self.reinit_after = reinit_after
        self._score = self._first_score
        self._set_pruning_time(when, stop, lr_after)
        if when != "start":
            self._first_score = None  # the run begins dense
            self._refuse_of_start()
        self._refuse_distribution()

    def _refuse_of_start(self) -> None:
        """Refuse what a trained network cannot have."""
        for argument, given in (("reinit_after", self.reinit_after), ("rescale", self.rescale)):
            if given:
                raise ValueError(
                    f"{argument}={given!r} is of fresh weights, and with when={self.when!r} they are trained when they are pruned. "
                    f"Leave {argument}= out, or give when='start'."
                )

    def _refuse_distribution(self) -> None:
        """Refuse a distribution that does not go with ``least``, or under which some layers would share a ranking."""
        given, joint = self.distribution, self._is_global
        if self.least and not joint:
            raise ValueError(
                f"least={self.least!r} is of one ranking over all layers, and distribution={given!r} plans how many weights "
                "each layer keeps. Leave least= out, or give distribution='global'."
            )
        if self.least and given.strip() != GLOBAL:  # type: ignore[union-attr]
            raise ValueError(
                f"least={self.least!r} and distribution={given!r} both say how many weights every layer keeps. Give one of them."
            )
        if isinstance(given, Mapping) and any(map(_ranks_jointly, given.values())):
            raise ValueError(
                f"distribution={given!r} names 'global' in a mapping, and here 'global' is one ranking by score over all layers. "
                "Give distribution='global' and leave layers out with exclude=, or name another rule, such as 'lamp'."
            )

    @staticmethod
    def _score_of(initial_mask: InitialMask) -> Score | None:
        return initial_mask if isinstance(initial_mask, Score) else None

    @property
    def _is_global(self) -> bool:
        return _ranks_jointly(self.distribution)

    @property
    def _least(self) -> int:
        """Active weights that every layer keeps under one ranking; 0 unless it was said, as in :attr:`least`."""
        given = self.distribution
        return least_of(given) if isinstance(given, str) and given.strip() != GLOBAL else self.least

    # ------------------------------------------------------------------ counts

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        # one threshold decides how many of each layer go, and no layer has a target: uniform ones give the total
        if self._is_global:
            shapes = layer_shapes(entries)
            sizes = [math.prod(shape) for shape in shapes.values()]
            refuse_least(self, self._least, sum(sizes) - zeros_for(self.target_sparsity, sum(sizes)), sizes)
            return uniform(shapes, self.target_sparsity)
        return super().share_out(entries)

    def plan(self, model: nn.Module | None = None) -> Plan:
        plan = super().plan(model)
        if not self._is_global:
            return plan
        scored = [] if model is not None else [r.size for r in plan if f"{SCORED}/{r.name}" in self.aux]
        later = [r for r in plan if scored and r.name in plan.selected and f"{SCORED}/{r.name}" not in self.aux]
        # layers that have joined the run since have counts of their own
        own = self.parameter_zeros(self.entries, self.targets) if later else {}
        zeros = zeros_for(self.target_sparsity, sum(scored) or plan.weights) + sum(own[r.name] for r in later)
        return plan.joined(zeros)

    # ------------------------------------------------------------------ the pruning

    def attach(self, model: nn.Module) -> None:
        self._begin_trigger()

    def begin_training(self, epoch: int) -> Figures:
        self._begin_trigger()
        return {}

    def initial_masks(self) -> dict[str, Tensor]:
        return self.weights.all_active(self.params) if self._is_dense else super().initial_masks()

    def after_step(self, step: Step) -> Update | None:
        if masks := self._waiting_part(step):
            return Update(masks)
        return self.new_masks(step) if self._pruned_now(step) else None

    def new_masks(self, step: Step) -> Update:
        assert self._score is not None  # _score_of gives the one of the arguments
        return Update(self._own_part(step, pruned_in_rounds(self, self._score, self._ranked)))

    def after_update(self, step: Step) -> None:
        if self.at_target:
            self._scores_taken()
        self._restart_if_pruned()

    # ------------------------------------------------------------------ the masks

    @property
    def _renews_weights(self) -> bool:
        return self.reinit_after

    def rehearse(self) -> None:
        if self.reinit_after:
            refuse_unresettable(self.model, self.params)
        if self._is_dense and self.saved is None and self._score is not None and self.params:
            scores_of(self, self._score.of_one_batch())  # fails now where it would fail at the pruning

    def _sparsity_after(self, sparsity: float, way: float) -> float:
        """The sparsity that rounds have come to, of the network or of a layer.

        Args:
            sparsity: its target.
            way: the part of all rounds that is done, in (0, 1].
        """
        return sparsity_after(sparsity, way)

    def _ranked(self, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], way: float) -> dict[str, Tensor]:
        if not self._is_global:
            return within_layers(self, scores, masks, way, self._sparsity_after)
        size = sum(m.numel() for m in masks.values())
        sparsity = self._sparsity_after(self.target_sparsity, way)
        zeros = zeros_for(sparsity, size) if way < 1 else zeros_of_ranked(self, masks)
        return in_one_ranking(self, scores, masks, zeros, self._least, tell=way == 1)

    def _scores_taken(self) -> None:
        if self._is_global:
            # layers that join later have counts of their own
            self.aux |= {f"{SCORED}/{name}": torch.tensor(True) for name in self.params}
        warn_of_empty(self, self.score)


def _ranks_jointly(rule: object) -> bool:
    """Whether a rule is one ranking over all layers, by its name."""
    return isinstance(rule, str) and is_by_weight(rule) and rule.strip() != LAMP


@renews_thresholds.register
def _(method: PruneAtStart) -> bool:
    return method._is_global  # scores decide, and shares by magnitude would not be read


@masks_by_magnitude.register
def _(method: PruneAtStart, names: Sequence[str]) -> dict[str, Tensor]:
    # before the pruning a layer that joins is dense, as the others are
    return method.weights.all_active(names) if method._is_dense else joining_masks(method, names)


@why_no_exchange.register
def _(method: PruneAtStart) -> str:
    return "scores every weight before it prunes, so its layers begin with all of them"
