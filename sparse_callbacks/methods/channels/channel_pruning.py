"""Channel pruning: whole channels go by a published criterion, and stay gone, until a budget is met."""

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import nn

from sparse_callbacks.channels.norms import norm_behind
from sparse_callbacks.core import distance_trigger as trigger
from sparse_callbacks.core.arguments import refuse_unknown
from sparse_callbacks.core.calendar import Calendar, RunLength, Time, calendar_of_one_update, resolve_times
from sparse_callbacks.core.calibration import Loss, number_of_batches
from sparse_callbacks.core.distance_trigger import When
from sparse_callbacks.core.hooks import Figures
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.channels.arguments import refuse_negative
from sparse_callbacks.methods.channels.budgeted import START, STOP, BudgetedChannels
from sparse_callbacks.methods.channels.combinations import refuse_combinations, refuse_when
from sparse_callbacks.methods.channels.criteria import CRITERIA, ScoredNetwork
from sparse_callbacks.methods.channels.rankings import RANKINGS, Choice, Offer, equal_shares


class ChannelPruning(BudgetedChannels):
    """Channel pruning: the least important channels go, and stay gone, until the network costs no more than a budget.

    Every ``every`` steps from ``start`` on, and at ``stop``, with optimizer step t::

        r = (1 - budget) * (1 - e^(-2.8 x)) / (1 - e^-2.8)  with x = (t - start + every) / (stop - start + every)
        m = of the channels that are left those that the ranking chooses by the criterion's scores, so that the network
            costs at most (1 - r) * the dense cost

    A group is the channels that can only go together, through sums, concatenations, depthwise layers and flattening; the
    inputs of all its consumers are masked, and :func:`~sparse_callbacks.channels.slim.slim` removes the channels. The stem,
    a convolution that comes first, and the network's outputs stay. With ``start == stop`` all goes at once, with
    ``start=0, stop=0`` before the first step: for networks that are trained already. Groups are found as in
    :class:`~sparse_callbacks.methods.smcp.smcp.SMCP`; ``groups`` and ``left_out`` hold them, and why others stay.

    The criteria score a unit of a group by

    - ``"l1"``, ``"l2"``: the norm of its filters, summed over producers and depthwise convolutions.
    - ``"taylor_fo"``: (gradient of the loss at a gate of one)^2 of each optimizer step's whole batch, its mean over the
      steps since the last pruning, 0.9 of the former score and 0.1 of that mean. No gates are inserted: behind a batch norm
      the gradient is gain * its gradient + shift * its gradient, elsewhere the sum of weight * gradient over the filter,
      plus bias * its gradient; of a unit with several producers the sum over them, before it is squared. Where another norm
      follows before the consumers, as behind a depthwise layer, the gate is before these: in front of the norm the loss does
      not depend on it.
    - ``"bn_gain"``: \\|gain\\| summed over its batch norms; ``penalty * sign(gain)`` joins the gradient of the gains until the
      last pruning. Groups without a norm are refused.
    - ``"taylor_2017"``: \\|mean over positions of activation * gradient\\| of the feature map that the group's consumers read,
      its mean over the samples of ``batches``, divided by the group's L2 norm.
    - ``"sosp"``: \\|theta_s . g\\| + \\|theta_s . (H theta)_s\\| / 2 of a unit's weights theta_s, the filters of its producers and
      depthwise convolutions, where theta holds those of all units; one Hessian-vector product for each of ``batches``.
    - ``"crop"``, ``"grasp"``: \\|dz/dgate\\|, or dz/dgate itself, of a gate of one in front of the layers that read the unit, where
      dz/dgate is half the derivative of \\|\\|g\\|\\|^2 and g the gradient of the loss on ``batches`` by all weights: the sum of
      weight * (H g) + g^2 over the weights that read the unit. ``"grasp"`` removes the units with the largest -dz/dgate.
    - ``"ispasp"``: the set of units that keeps the output of the next layer closest to what it was on ``batches``, the best
      one seen in 20 exchanges; with ``ranking="layer"`` and ``start == stop``. Groups that several layers make or read go by
      ``"l1"``.
    - ``"random"``: a draw from (seed, step, group), which others have to be better than.

    The rankings choose how many units of each group stay: ``"knapsack"`` so that the sum of scores is largest, as in SMCP;
    ``"global"`` by removing the lowest scores of the whole network, one unit (or ``round_to`` channels) at a time;
    ``"layer"`` the same share of every group, to one of its steps (a unit, or ``round_to`` channels): what is left of the
    budget goes to the groups that are furthest below the share. Scores of norms say little across layers: with ``"l1"`` and ``"l2"``
    ``ranking="layer"`` is the paper's.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN).

    Differs from the papers: budgets are exact, of the real network; Li et al. give a number of filters for each layer by
    hand, Molchanov et al. a number of units for each pruning, Liu et al. a share of the gains. No group loses all its
    channels. Scores of residual sums are not divided by numbers of layers. The released Taylor code inverts the condition
    under which momentum is reset; here what is pruned counts 0. In manual optimization gradients are read, and the penalty
    is added, after the user has clipped them.

    Args:
        budget: cost of the pruned network as a share of the dense one's, in (0, 1).
        cost: ``"parameters"``, ``"flops"`` (a multiply-add is two) or the path of a latency table (``.json``); see SMCP.
        criterion: name of the score of a channel, one of those above.
        ranking: ``"knapsack"``, ``"global"`` or ``"layer"``.
        round_to: number of channels of which a group keeps a multiple, where its own number is one.
        chunk: number of neighbouring channels that are kept or pruned together.
        curve: shape of the ramp: ``"exp"``, ``"linear"`` or ``"exp2"``.
        every: optimizer steps (int) or fraction of the run (float) between prunings; None: 30 (Molchanov et al.), shortened,
            with a message, in short runs.
        start: when the ramp begins, in optimizer steps (int) or as a fraction of the run (float).
        stop: when the ramp ends, in the same units; masks stay from then on.
        when: None: the ramp. Otherwise all channels go at once: ``"start"``, before the first step; a time, in the same units;
            or ``"distance"``, at the end of the first epoch t >= 2 whose weights have settled, \\|d_t - d_(t-1)\\| <
            (budget - 0.1) * d_1 with d_t = \\|\\|theta_t - theta_0\\|\\| / \\|\\|theta_0\\|\\| over the selected weights, and at ``stop``
            at the latest, with a warning (EarlyCroP; a budget above 0.1, and at most 0.99 of d_1).
        penalty: with ``criterion="bn_gain"``, what is added to the gradient of a gain, times its sign.
        batches: for criteria that take passes of their own over the data: number of batches, whose samples are drawn from
            the training data with ``seed``, or a list or loader of the batches.
        loss: a function of module and batch that gives the loss, for such criteria; None: the module's training step.
        prune_stem: whether the stem's outputs may go too.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense; inputs and outputs of these layers stay, as those of
            ``keep_dense``.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, a model without channels to remove, a budget that cannot be met, groups that the
            criterion cannot score; before the first batch.

    Example:
        >>> from sparse_callbacks import ChannelPruning
        >>> ChannelPruning(budget=0.5, criterion="taylor_fo", ranking="global").criterion
        'taylor_fo'

    Reference: Li et al.: Pruning Filters for Efficient ConvNets. ICLR 2017. Molchanov et al.: Importance Estimation for
    Neural Network Pruning. CVPR 2019. Liu et al.: Learning Efficient Convolutional Networks through Network Slimming. ICCV
    2017. Rachwan et al.: Winning the Lottery Ahead of Time: Efficient Early Network Pruning. ICML 2022.
    """

    published_every: ClassVar[int] = 30
    first_update: ClassVar[int] = 0  # one that falls before the first step is made in `rehearse`
    figure_prefix: ClassVar[str] = "channels"

    def __init__(
        self,
        budget: float = 0.5,
        *,
        cost: str = "flops",
        criterion: str = "l1",
        ranking: str = "knapsack",
        round_to: int = 8,
        chunk: int = 1,
        curve: str = "exp",
        every: Time | None = None,
        start: Time = START,
        stop: Time = STOP,
        when: When | None = None,
        penalty: float = 1e-4,
        batches: int | Iterable[Any] = 8,
        loss: Loss | None = None,
        prune_stem: bool = False,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        self.when = when  # set_times reads it
        super().__init__(
            budget,
            cost=cost,
            round_to=round_to,
            chunk=chunk,
            curve=curve,
            every=every,
            start=start,
            stop=stop,
            prune_stem=prune_stem,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        self.criterion, self.ranking, self.penalty = criterion, ranking, penalty
        self.batches, self.loss = batches, loss
        refuse_unknown(
            {"criterion": criterion, "ranking": ranking}, {"criterion": sorted(CRITERIA), "ranking": RANKINGS}
        )
        refuse_negative(penalty=penalty)
        number_of_batches(batches)
        self._rule = CRITERIA[criterion]()
        # the batch norm that takes a layer's output, where the criterion asks for it
        self._norm_behind: dict[str, str] = {}
        # the published tolerance, with the share of the cost that goes for the sparsity
        self._tolerance = trigger.tolerance(1.0 - self.budget, structured=True) if when == "distance" else 0.0
        signature = inspect.signature(ChannelPruning).parameters
        refuse_combinations(self, self._rule, {n: signature[n].default for n in ("penalty", "batches", "loss")})
        self._figures: Figures = {}  # of a pruning before the first step, until training begins

    # ------------------------------------------------------------------ times

    @property
    def is_one_shot(self) -> bool:
        """All channels go at once."""
        same = type(self.start) is type(self.stop) and self.start == self.stop
        return self.when is not None or self.is_before_training or same

    @property
    def is_before_training(self) -> bool:
        """All channels go before the first step."""
        return self.when == "start" or (self.when is None and self.start == self.stop == 0)

    def set_times(self, every: Time | None, start: Time, stop: Time) -> None:
        if self.when is not None:
            refuse_when(self.when, every, start, stop)
        if every is not None and type(start) is type(stop) and start == stop:
            raise ValueError(
                f"every={every!r} is an interval, and with start={start!r}, stop={stop!r} all channels go at once. Leave "
                "every= out, or give a later stop=."
            )
        # elsewhere a last update before the first step moves no mask, and is refused
        if all(isinstance(time, int | float) and not isinstance(time, bool) and time == 0 for time in (start, stop)):
            self.every, self.start, self.stop = every, start, stop
        else:
            super().set_times(every, start, stop)

    def make_calendar(self, run: RunLength) -> Calendar:
        if self.when == "distance":
            return trigger.ending_with_pruning(self, trigger.distance_calendar(self.stop, run))
        if not self.is_one_shot or self.start is None:
            return super().make_calendar(run)
        if self.when is None:
            return resolve_times(None, self.start, self.stop, 1, run, final=True)  # without a word about an interval
        return calendar_of_one_update(0 if isinstance(self.when, str) else self.when, "when", run)

    # ------------------------------------------------------------------ the choice

    def look_at(self, model: nn.Module, example: Any) -> None:
        self._norm_behind = norm_behind(model, example) if self._rule.needs_norms else {}

    def rehearse(self) -> None:
        super().rehearse()
        self._rule.begin(self._scored())
        if self.is_before_training and not self.progress.done:
            update = self.chosen(0)
            # masks alone: values are written next, as those of any run that begins
            for name, mask in self.weights.same_everywhere(update.masks).items():
                self.weights.set_mask(name, mask)
            for optimizer in sorted(set(self.optimizer_of)):
                self.progress.mark_done(optimizer)
            self.note_kept()
            self._figures = update.figures

    def begin_training(self, epoch: int) -> Figures:
        if self.when == "distance":
            trigger.keep_initial(self)
        figures, self._figures = self._figures, {}
        return figures

    def choose(self, number: int, offer: Offer) -> Choice:
        # what is pruned stays pruned: no option is larger than what is kept, and no pruned unit is among the best
        offer = replace(offer, options=[o[o <= kept] for o, kept in zip(offer.options, offer.kept, strict=True)])
        if self._rule.needs_counts:
            counts = equal_shares(offer, [g.size for g in self.groups])
            scores = self._rule.scores_for(self._scored(), number, counts, self.chunks)
        else:
            scores = self._rule.scores(self._scored(), number)
        among_live = [
            own.masked_fill(~live.to(own.device), -torch.inf) for own, live in zip(scores, self.live, strict=True)
        ]
        return RANKINGS[self.ranking](offer, among_live)

    def _scored(self) -> ScoredNetwork:
        return ScoredNetwork(
            method=type(self).__name__,
            model=self.model,
            groups=self.groups,
            live=self.live,
            norm_behind=self._norm_behind,
            optimizer_of=self.optimizer_of,
            owners=self.owners,
            host=self.host,
            aux=self.aux,
            saved=self.saved,
            generator=self.generator,
            penalty=self.penalty,
            batches=self.batches,
            loss=self.loss,
        )

    def figures(self) -> dict[str, float]:
        """Those of :class:`BudgetedChannels`, and of the trigger with ``when="distance"``."""
        waits = self.when == "distance"
        return super().figures() | (self.own_figures(**trigger.trigger_figures(self, self._tolerance)) if waits else {})

    # ------------------------------------------------------------------ the step

    def before_step(self, step: Step) -> None:
        self._rule.before_step(self._scored(), step, last=self.at_target)
        super().before_step(step)

    def after_step(self, step: Step) -> Update | None:
        self._rule.after_step(self._scored(), step)
        waits = self.when == "distance" and step.index in self.optimizer_of
        if waits and not (step.due and trigger.falls_now(self, step, self._tolerance)):
            return None
        return super().after_step(step)

    def after_update(self, step: Step) -> None:
        super().after_update(step)
        self._rule.after_update(self._scored(), self.groups_of(step.index))


@why_no_exchange.register
def _(method: ChannelPruning) -> str:
    return "starts dense and removes whole channels, so sparse storage has nothing to save before its last pruning"
