"""PruneAtStart: one mask by a score of the fresh network, held from the first step to the last."""

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import partial, singledispatch
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.core.allocations.by_weight import GLOBAL, least_of
from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.calibration import Loss
from sparse_callbacks.core.distance_trigger import When
from sparse_callbacks.core.distributions import Distribution, uniform
from sparse_callbacks.core.first_mask_arguments import why_no_first_mask
from sparse_callbacks.core.found_shares import renew_shares
from sparse_callbacks.core.hooks import Figures
from sparse_callbacks.core.initial_masks import StartsSparse, joining_masks
from sparse_callbacks.core.joint_thresholds import renews_thresholds
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.reinitialised import refuse_unresettable
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.score_options import Score
from sparse_callbacks.core.scored_masks import (
    NetworkScores,
    sparsity_after,
    within_layers,
)
from sparse_callbacks.core.scored_start import first_score, masks_by_score, ranked_masks, renews_weights, scores_taken
from sparse_callbacks.core.selection import Entry, layer_shapes
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.thawed import masks_by_magnitude
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.prune_at_start.one_ranking import (
    SCORED,
    in_one_ranking,
    ranks_jointly,
    refuse_distribution,
    refuse_least,
    warn_of_empty,
    zeros_of_ranked,
)
from sparse_callbacks.methods.prune_at_start.pruning_time import (
    LATEST,
    PrunesOnce,
    begin_trigger,
    is_dense,
    part_of_step,
    pruned_now,
    restart_if_pruned,
    set_pruning_time,
    waiting_for_step,
)


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

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN).

    Differs from the papers: zeros are counted exactly, floor(sparsity * size). SNIP's reference scores biases too. GraSP's
    released code divides outputs by a temperature of 200. CroP's reference computes its scores on test data, and removes
    one weight more.

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1).
        score: the name of the score, one of those above.
        batches: number of batches, whose samples are drawn from the training data with ``seed``; or a list or loader of the
            batches.
        rounds: how often scores are computed and weights pruned; None: 100 for ``"synflow"``, otherwise 1.
        least: active weights that every layer keeps at least, with ``distribution="global"``; what it changes is said.
        reinit_after: after scoring, the model gets fresh initial weights by the ``reset_parameters()`` of its modules, with
            ``seed``, as in SNIP's reference.
        distribution: ``"global"``: one ranking over all selected weights, in which a layer may lose all of its weights, of
            which a warning tells; ``"global(3)"`` is the same with ``least=3``. Anything else, see
            :class:`~sparse_callbacks.core.method.Method`: a ranking in each layer; ``"lamp"`` shares out by the magnitudes
            that the pruning finds. Mappings cannot name ``"global"``.
        loss: a function of module and batch that gives the loss, a scalar; None: that of the training step. Manual optimization
            and loops of your own need it.
        when: ``"start"``: before the first batch. A time, in optimizer steps (int) or as a fraction of the run (float), or
            ``"distance"``, at the end of the epoch in which weights have settled (:class:`EarlyCroP`): until then training is
            dense, and all rounds fall one after the other.
        stop: the latest time with ``when="distance"``, at which the pruning comes with a warning; not read otherwise.
        lr_after: ``"continue"``: optimizers and schedules go on over a later pruning; ``"restart"``: they are configured anew.
        rescale: ``"layer"`` or ``"fan_in"``: active weights of a new run are made larger once, to make up for the inputs that are
            gone; None: they stay as they are. Scores see the weights before that.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

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
        if not isinstance(reinit_after, bool):
            raise ValueError(
                f"reinit_after={reinit_after!r} is neither True nor False: it says whether the model gets fresh initial weights "
                "after scoring."
            )
        super().__init__(
            sparsity,
            initial_mask="magnitude",  # stands in until there are scores, and for layers that join later
            rescale=rescale,
            distribution=distribution,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        self.score, self.batches, self.loss, self.rounds, self.least = score, batches, loss, rounds, least
        self.reinit_after = reinit_after
        self._scoring = Score(score, batches, loss, rounds, least)
        set_pruning_time(self, when, stop, lr_after)
        if when != "start":
            self._refuse_of_start()
        refuse_distribution(distribution, least)

    def _refuse_of_start(self) -> None:
        """Refuse what a trained network cannot have."""
        for argument, given in (("reinit_after", self.reinit_after), ("rescale", self.rescale)):
            if given:
                raise ValueError(
                    f"{argument}={given!r} is of fresh weights, and with when={self.when!r} they are trained when they are pruned. "
                    f"Leave {argument}= out, or give when='start'."
                )

    @property
    def _is_global(self) -> bool:
        return ranks_jointly(self.distribution)

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
        begin_trigger(self)

    def begin_training(self, epoch: int) -> Figures:
        begin_trigger(self)
        return {}

    def initial_masks(self) -> dict[str, Tensor]:
        return self.weights.all_active(self.params) if is_dense(self) else super().initial_masks()

    def after_step(self, step: Step) -> Update | None:
        if masks := waiting_for_step(self, step):
            return Update(masks)
        return self.new_masks(step) if pruned_now(self, step) else None

    def new_masks(self, step: Step) -> Update:
        renew_shares(self)  # what reads weights reads those that are ranked
        return Update(part_of_step(self, step, masks_by_score(self, self._scoring)))

    def after_update(self, step: Step) -> None:
        if self.at_target:
            scores_taken(self)
        restart_if_pruned(self)

    def rehearse(self) -> None:
        if self.reinit_after:
            refuse_unresettable(self.model, self.params)
        if is_dense(self) and self.saved is None and self.params:
            NetworkScores(self, self._scoring, limit=1).under()  # fails now where it would fail at the pruning


@singledispatch
def sparsity_in_rounds(method: PruneAtStart, sparsity: float, way: float) -> float:
    """The sparsity that rounds of pruning have come to, of the network or of a layer.

    Args:
        method: the method.
        sparsity: its target.
        way: the part of all rounds that is done, in (0, 1].
    """
    return sparsity_after(sparsity, way)


@first_score.register
def _(method: PruneAtStart) -> Score | None:
    return method._scoring if method.when == "start" else None


@ranked_masks.register
def _(method: PruneAtStart, scores: Mapping[str, Tensor], masks: Mapping[str, Tensor], way: float) -> dict[str, Tensor]:
    after = partial(sparsity_in_rounds, method)
    if not method._is_global:
        return within_layers(method, scores, masks, way, after)
    size = sum(m.numel() for m in masks.values())
    zeros = zeros_for(after(method.target_sparsity, way), size) if way < 1 else zeros_of_ranked(method, masks)
    return in_one_ranking(method, scores, masks, zeros, method._least, tell=way == 1)


@scores_taken.register
def _(method: PruneAtStart) -> None:
    if method._is_global:
        # layers that join later have counts of their own
        method.aux |= {f"{SCORED}/{name}": torch.tensor(True) for name in method.params}
    warn_of_empty(method, method.score)


@renews_weights.register
def _(method: PruneAtStart) -> bool:
    return method.reinit_after


@renews_thresholds.register
def _(method: PruneAtStart) -> bool:
    return method._is_global  # scores decide, and shares by magnitude would not be read


@masks_by_magnitude.register
def _(method: PruneAtStart, names: Sequence[str]) -> dict[str, Tensor]:
    # before the pruning a layer that joins is dense, as the others are
    return method.weights.all_active(names) if is_dense(method) else joining_masks(method, names)


@why_no_exchange.register
def _(method: PruneAtStart) -> str:
    return "scores every weight before it prunes, so its layers begin with all of them"


@why_no_first_mask.register
def _(method: PruneAtStart) -> str:
    return "makes its masks by score="
