"""SMCP: channels chosen by a knapsack under a budget of weights, FLOPs or measured time."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.channels import norms
from sparse_callbacks.channels.normalized import normalized_outputs
from sparse_callbacks.core.arguments import refuse_unknown
from sparse_callbacks.core.calendar import Calendar, RunLength, Time, resolve_times
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.channels import score_windows as windows
from sparse_callbacks.methods.channels.arguments import refuse_hysteresis, refuse_negative
from sparse_callbacks.methods.channels.budgeted import START, STOP, BudgetedChannels
from sparse_callbacks.methods.channels.rankings import Choice, Offer, by_knapsack
from sparse_callbacks.methods.smcp.scores import (
    active_outputs,
    deviation_under_mask,
    group_scores,
    kept_importance,
    reader_scores,
)

WORDS = {"importance": ("taylor", "magnitude"), "norm_scaling": (None, "kept", "importance")}
CORRECTED = "rule/corrected"
"""Key in ``aux`` of runs whose scores have the factor u and whose interval counts images. Runs that were saved before lack it,
and go on by the rule that they began with."""


class SMCP(BudgetedChannels):
    """SMCP, soft masking for cost-constrained channel pruning (Humble et al., 2022): the network becomes smaller.

    With dense weights w, a mask m over the input channels of each group, and optimizer step t::

        every step      score[c] += | sum of -w * (gradient of the loss at m * w) * u |,
                            over the group's layers, active outputs and kernel;
                            u = ||m * w|| / ||w|| of the output's weights where only norms take it, else 1
                        w = w - optimizer(that gradient, not masked, + decay * (1 - m) * w)
        every k steps   r = (1 - budget) * (1 - e^(-2.8 x)) / (1 - e^-2.8)
                            with k = every and x = (t - start + every) / (stop - start + every)
                        m = the channels with the largest mean score, times hysteresis where they are pruned;
                            how many of each group a knapsack decides:
                            the largest total score whose network costs at most (1 - r) * the dense cost

    A group is the channels that can only go together, through sums, concatenations, depthwise layers and flattening.
    The stem, a convolution that comes first, and the network's outputs stay. Pruned channels go on to learn and may
    come back. After ``stop`` masks stay and the dense weights are dropped; :func:`~sparse_callbacks.channels.slim.slim`
    then removes the channels. With u scores behind norms hardly depend on how much of the group is kept; where it holds
    is in :mod:`~sparse_callbacks.methods.smcp.scores`. Groups are found with the LightningModule's
    ``example_input_array``, or else the first training batch of a torch DataLoader over an indexed set; ``groups`` and
    ``left_out`` hold them, and why others stay.

    Passes over the weights in a step: 4 in place at most (the mask on the dense weights;
    products of weights and gradients for scores; decay of pruned channels) and 2 that read (gradients, for inf and
    NaN, and the products, which are summed).

    Differs from the paper: u is 1 there, so a norm makes the scores of a group larger the more of it is pruned, and whole
    groups are pruned and given back in turn; its remedy is ``norm_scaling``, whose factors u takes out of the scores. There is no
    ``hysteresis``. The last solve has the full budget (the released schedule stops one short). A solve is
    repeated with the outputs that it leaves, so that the network really fits the budget; the paper counts the outputs
    of the solve before. Scores are means, over the steps since the last solve, of each step's absolute value; the
    released code takes the latest batch. No group loses all its channels. Gains under ``norm_scaling`` are multiplied
    once for every new factor, which for SGD is the paper's gradient rule; Adam's steps are larger than there. In manual
    optimization gradients are clipped before their decay is added.

    Args:
        budget: cost of the pruned network as a share of the dense one's, in (0, 1).
        cost: ``"parameters"``, ``"flops"`` (a multiply-add is two) or the path of a latency table (``.json``), measured by
            ``python -m sparse_callbacks.latency``. Counted is what the forward pass of one sample calls:
            recurrent layers, embeddings and the products of attention (in tables all of ``nn.MultiheadAttention``) as
            they are, biases and norms not.
        importance: ``"taylor"``, as in the paper, or ``"magnitude"``: the sum of \\|w\\| at the solve, which is the default of
            the released code.
        round_to: number of channels of which a group keeps a multiple, where its own number is one; a head of attention
            counts with all of its channels.
        chunk: number of neighbouring channels that are kept or pruned together, counted likewise.
        curve: shape of the ramp: ``"exp"``, ``"linear"`` or ``"exp2"``.
        every: optimizer steps (int) or fraction of the run (float) between solves; None: as many as see
            20,480 training images over all ranks and accumulated batches, as the authors count (80 steps of 256 images), or
            80 where the batch size is unknown; shortened, with a message, in short runs.
        start: when the ramp begins, in optimizer steps (int) or as a fraction of the run (float).
        stop: when the ramp ends, in the same units; masks stay from then on.
        hysteresis: factor on the scores of pruned channels at a solve, in (0, 1]: below 1 a channel comes back only if it
            is clearly more important than those that are kept.
        decay: coefficient of pruned weights: decay * weight is added to their gradients.
        norm_scaling: the gain of a batch norm that takes the output of a pruned layer shrinks with the inputs of that
            layer: to the share ``"kept"``, or to their share in ``"importance"``; None (the released default): it does not.
        prune_stem: whether the stem's outputs may go too.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense; inputs and outputs of these layers stay, as those of
            ``keep_dense``.
        seed: whole number; nothing here is random.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, a model without channels to remove, a budget that cannot be met; before the
            first batch.

    Example:
        >>> from sparse_callbacks import SMCP
        >>> SMCP(budget=0.5, cost="flops").budget
        0.5

    Reference: Humble, Shen, Albericio Latorre, Darve, Alvarez: Soft Masking for Cost-Constrained Channel Pruning. ECCV
    2022.
    """

    published_every: ClassVar[int] = 80
    published_images: ClassVar[int] = 80 * 256
    keeps_dense: ClassVar[bool] = True
    figure_prefix: ClassVar[str] = "smcp"

    def __init__(
        self,
        budget: float = 0.5,
        *,
        cost: str = "flops",
        importance: str = "taylor",
        round_to: int = 8,
        chunk: int = 1,
        curve: str = "exp",
        every: Time | None = None,
        start: Time = START,
        stop: Time = STOP,
        hysteresis: float = 0.25,
        decay: float = 2e-4,
        norm_scaling: str | None = None,
        prune_stem: bool = False,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
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
        self.importance, self.decay, self.norm_scaling = importance, decay, norm_scaling
        refuse_negative(decay=decay)
        refuse_hysteresis(hysteresis)
        self.hysteresis = float(hysteresis)  # 1 is written as 1.0
        refuse_unknown({"importance": importance, "norm_scaling": norm_scaling}, WORDS)
        self._active: dict[str, Tensor] = {}  # which outputs of a consumer are kept
        # scores by window, of the step that each optimizer is about to take
        self._fresh: dict[int, dict[str, Tensor]] = {}
        self._norms: dict[str, str] = {}  # the batch norm with a gain that takes each layer's output
        # for each layer whose output only norms take these norms, and how many outputs they divide together
        self._divided_by: dict[str, tuple[tuple[str, ...], int]] = {}
        self._scores: list[Tensor] = []  # of the latest solve
        self._inputs_of: dict[str, int] = {}  # the dimension of each consumer's weight along which its inputs lie

    # ------------------------------------------------------------------ the rule of the run

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        if self.attachment.host is not None and self.saved is None and not self.step:
            self.aux[CORRECTED] = torch.tensor(True)

    def make_calendar(self, run: RunLength) -> Calendar:
        samples = run.samples() if CORRECTED in self.aux else None
        interval = self.published_every if samples is None else math.ceil(self.published_images / samples)
        assert self.start is not None
        ends = self.arrives_at_stop
        return resolve_times(self.every, self.start, self.stop, interval, run, final=ends, inform=self.host.inform)

    # ------------------------------------------------------------------ what can go

    def look_at(self, model: nn.Module, example: Any) -> None:
        self._norms = norms.with_gains(model, norms.norm_behind(model, example)) if self.norm_scaling else {}
        corrects = self.importance == "taylor" and CORRECTED in self.aux
        self._divided_by = normalized_outputs(model, example) if corrects else {}

    def rehearse(self) -> None:
        super().rehearse()
        # only inputs of consumers are ever pruned: a dense copy of any other weight would be memory for nothing
        self._inputs_of = {c.parameter: c.dim for g in self.groups for c in g.consumers}
        self.weights.end_copy([n for n in self.weights.copied if n not in self._inputs_of])
        if CORRECTED not in self.aux and self.saved is not None:
            self.host.inform(
                f"{type(self).__name__} goes on from {self.saved.path} by the rule that it was saved under: scores without "
                "regard to norms, hysteresis=1, and 80 steps where every= is None. Give fresh_start=True for the present one."
            )
        if self.importance != "taylor":
            return
        if self.saved is not None:
            sizes = dict(zip(self._windows(), (g.size for g in self.groups), strict=True))
            windows.refuse_lost_windows(self.saved, type(self).__name__, sizes)
        for group, window in zip(self.groups, self._windows(), strict=True):
            device = self.params[windows.key_parameter(group)].device
            windows.begin_window(self.aux, window, group.size, device)

    def note_kept(self) -> None:
        super().note_kept()
        self._active = active_outputs(self.groups, self.live)

    # ------------------------------------------------------------------ the step

    def before_step(self, step: Step) -> None:
        super().before_step(step)  # masks gradients of weights without a copy, as after the last solve; no others
        # not into aux yet: a GradScaler may still skip the step. By optimizer: others may be announced before this one steps
        self._fresh[step.index] = {}
        copied = [n for n in step.names if self.weights.has_copy(n)]
        if self.importance == "taylor" and copied:
            self.weights.absorb_if_written(copied)  # such as a model that was loaded after the state of its run
            gradients = {n: g for n in copied if (g := step.gradient(n)) is not None}
            # dense weights times the gradient at the pruned ones: so pruned channels have scores too, and may come back
            dense = self._dense(gradients)
            inputs = reader_scores(self.groups, dense, gradients, self._output_factors(dense), self.weights.scratch)
            found = {w: group_scores(g, inputs) for w, g in zip(self._windows(), self.groups, strict=True)}
            self._fresh[step.index] = {window: scores for window, scores in found.items() if scores is not None}
        # after the scores are taken: decay is not part of the gradient of the loss
        for name in copied if self.decay else ():
            gradient = self.params[name].grad
            if gradient is not None and self.weights.active_counts[name] < self.weights.size(name):
                memory = self.weights.scratch.like("taylor", self.weights.dense_values(name))
                gradient.add_(self.weights.dense_at_pruned(name, memory), alpha=self.decay)

    def after_step(self, step: Step) -> Update | None:
        for window, scores in self._fresh.pop(step.index).items():
            windows.add_to_window(self.aux, window, scores, step.finite_flag)
        return super().after_step(step)

    def after_update(self, step: Step) -> None:
        super().after_update(step)
        self._scale_norms(step)
        # groups of other optimizers have had no solve, and go on with their windows
        names, several = self._windows(), len(set(self.optimizer_of)) > 1
        windows.reset_windows(self.aux, [names[g] for g in self.groups_of(step.index)], keep_means=several)
        if step.number >= step.calendar.last:
            self.weights.end_copy(step.names)  # masks stay from here on, and pruned channels no longer learn

    def _scale_norms(self, step: Step) -> None:
        """Shrink, or let grow again, the gains of the norms behind the layers of the step's optimizer."""
        for name in step.names:
            norm = self._norms.get(name.rpartition(".")[0])
            if norm is None or not self.weights.has_copy(name):
                continue
            share = self.weights.active_counts[name] / self.weights.size(name)
            if self.norm_scaling == "importance":
                share = kept_importance(name, self.groups, self._scores, self.weights.masks)
            # the factor that the gain has already, kept in aux: a resumed run must not multiply by it once more
            before = self.aux.get(f"norm/{name}", torch.ones((), dtype=torch.float64))
            self.aux[f"norm/{name}"] = torch.full_like(before, share)
            norms.rescale_gain(
                self.model.get_parameter(f"{norm}.weight"), share / float(before), self.owners.optimizers
            )

    def _output_factors(self, dense: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """For each consumer the factor of each output's scores: 0 where it is pruned, and what a norm behind it asks for.

        Args:
            dense: dense weights by parameter name.
        """
        factors = dict(self._active)
        for name, weight in dense.items() if CORRECTED in self.aux else ():
            layer = self.model.get_submodule(name.rpartition(".")[0])
            behind, together = self._divided_by.get(name.rpartition(".")[0], ((), 0))
            own = all(norms.divides_by_own_statistics(self.model.get_submodule(norm)) for norm in behind)
            if not behind or not own or self.weights.active_counts[name] == self.weights.size(name):
                continue
            left = deviation_under_mask(layer, weight, self.weights.masks[name], self._inputs_of[name], together)
            undone = left / self.aux.get(f"norm/{name}", 1.0)
            factors[name] = undone * factors[name] if name in factors else undone
        return factors

    def _windows(self) -> list[str]:
        """Name of the window of each group's scores."""
        return [windows.window_of(index, group) for index, group in enumerate(self.groups)]

    def scores(self) -> list[Tensor]:
        """Score of each unit of each group, the mean over the steps since the last solve.

        With ``importance="magnitude"`` it is that of the weights as they are now.
        """
        if self.importance == "taylor":
            return [windows.mean_of_window(self.aux, window) for window in self._windows()]
        inputs = reader_scores(self.groups, self._dense(self.params), None, self._active)
        return [found for g in self.groups if (found := group_scores(g, inputs)) is not None]

    def choose(self, number: int, offer: Offer) -> Choice:
        self._scores = self.scores()
        # training takes the gradient of a kept channel to zero and leaves that of a pruned one: on equal terms it would return
        factor = self.hysteresis if CORRECTED in self.aux else 1.0
        weighed = [torch.where(kept, s, s * factor) for s, kept in zip(self._scores, self.live, strict=True)]
        return by_knapsack(offer, weighed)

    def _dense(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {n: self.weights.dense_values(n) for n in names}


@why_no_exchange.register
def _(method: SMCP) -> str:
    return "has a gate for every channel, closed ones too, so sparse storage has nothing to save"
