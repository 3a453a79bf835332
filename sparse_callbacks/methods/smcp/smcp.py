"""SMCP: channels chosen by a knapsack under a budget of weights, FLOPs or measured time."""

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.channels import costs, norms, prunable
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.core import distributed
from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.smcp import allocation, budget
from sparse_callbacks.methods.smcp import score_windows as windows
from sparse_callbacks.methods.smcp.arguments import refuse_budget_arguments, refuse_sparsity_for_budget
from sparse_callbacks.methods.smcp.scores import active_outputs, group_scores, kept_importance, reader_scores

START, STOP = 10 / 90, 65 / 90  # published for ImageNet: 10 epochs of warm-up, 55 of ramp, 25 of cool-down


class SMCP(Method):
    """SMCP, soft masking for cost-constrained channel pruning (Humble et al., 2022): the network becomes really
    smaller.

    With dense weights w, a mask m over the input channels of each group, and optimizer step t::

        every step      score[c] += | sum of -w * (gradient of the loss at m * w) |,
                            over the group's layers, active outputs and kernel
                        w = w - optimizer(that gradient, not masked, + decay * (1 - m) * w)
        every ``every`` r = (1 - budget) * (1 - e^(-2.8 x)) / (1 - e^-2.8)
                            with x = (t - start + every) / (stop - start + every)
                        m = the channels with the largest mean score; how many of each group a knapsack decides:
                            the largest total score whose network costs at most (1 - r) * the dense cost

    A group is the channels that can only go together, through sums, concatenations, depthwise layers and flattening.
    The stem, a convolution that comes first, and the network's outputs stay. Pruned channels go on to learn and may
    come back. After ``stop`` masks stay and the dense weights are dropped; :func:`~sparse_callbacks.channels.slim.slim`
    then removes the channels. Groups are found with the LightningModule's ``example_input_array``, or else the first
    training batch of a torch DataLoader over an indexed set; ``groups`` and ``left_out`` hold them, and why others
    stay.

    Differs from the paper: the last solve has the full budget (the released schedule stops one short). A solve is
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
        importance: ``"taylor"``, or ``"magnitude"``: the sum of \\|w\\| at the solve.
        round_to: number of channels of which a group keeps a multiple, where its own number is one; a head of attention
            counts with all of its channels.
        chunk: number of neighbouring channels that are kept or pruned together, counted likewise.
        curve: shape of the ramp: ``"exp"``, ``"linear"`` or ``"exp2"``.
        every: optimizer steps (int) or fraction of the run (float) between solves; None: 80, shortened, with a
            message, in short runs.
        start, stop: when the ramp begins and ends, in the same units.
        decay: added to the gradient of a pruned weight, times the weight.
        norm_scaling: the gain of a batch norm that takes the output of a pruned layer shrinks with the inputs of that
            layer: to the share ``"kept"``, or to their share in ``"importance"``; None (the released default): it does
                not.
        prune_stem: the stem's outputs may go too.
        include, exclude, seed, **options: see :class:`~sparse_callbacks.core.method.Method`; inputs and outputs of layers that ``exclude``
            or ``keep_dense`` name stay. Nothing here is random.

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

    arrives_at_stop: ClassVar[bool] = True
    published_every: ClassVar[int] = 80
    keeps_dense: ClassVar[bool] = True
    plans_counts: ClassVar[bool] = False

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
        decay: float = 2e-4,
        norm_scaling: str | None = None,
        prune_stem: bool = False,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        refuse_sparsity_for_budget(options, type(self).__name__)
        super().__init__(0.0, distribution="uniform", include=include, exclude=exclude, seed=seed, **options)
        self.budget, self.cost, self.importance, self.curve = budget, cost, importance, curve
        self.round_to, self.chunk, self.decay = round_to, chunk, decay
        self.norm_scaling, self.prune_stem = norm_scaling, prune_stem
        words = {"importance": importance, "curve": curve, "norm_scaling": norm_scaling}
        refuse_budget_arguments(budget, decay, {"round_to": round_to, "chunk": chunk}, words, cost)
        self.budget = float(budget)  # a fraction or a number of numpy is written as any other
        self.set_times(every, start, stop)
        self.groups: list[Group] = []  # whose channels may go; known once training starts
        self.left_out: dict[str, str] = {}  # why the channels of the others stay, by the group's name
        self._grouped: dict[str, torch.Size] = {}  # shapes of the parameters that the groups were found with
        self._active: dict[str, Tensor] = {}  # which outputs of a consumer are kept
        self._fresh: dict[
            int, dict[str, Tensor]
        ] = {}  # scores by window, of the step that each optimizer is about to take
        self._optimizer_of: list[int] = []  # index of the optimizer that steps the layers of each group
        self._norms: dict[str, str] = {}  # the batch norm that takes each layer's output
        self._scores: list[Tensor] = []  # of the latest solve

    # ------------------------------------------------------------------ what can go

    def initial_masks(self) -> dict[str, Tensor]:
        return self.weights.all_active(self.params)

    def plan(self, model: nn.Module | None = None) -> Plan:
        plan = super().plan(model)
        rows = tuple(replace(r, zeros=None, reason="") if r.name in plan.selected else r for r in plan)
        title = f"{type(self).__name__}: {self.budget:g} of the {budget.cost_name(self.cost)}"
        return replace(plan, title=title, rows=rows, joint=0, decided_by="budget")

    @staticmethod
    def _warn(text: str) -> None:
        if distributed.rank() == 0:
            warnings.warn(text, stacklevel=2)

    def rehearse(self) -> None:
        model = self.model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the data is augmented does not matter here
            example = prunable.example_inputs(model, self.host.data_pass())
        stay = [*(self.exclude or ()), *(e.name for e in self.entries if e.reason.endswith("kept dense on request"))]
        layers = costs.layers(model, example)
        stem = None if self.prune_stem else costs.stem(layers)
        self.groups, self.left_out = prunable.prunable_groups(model, example, stay, self.owners.owns, stem)
        self._grouped = _shapes(self.params)
        self._norms = norms.norm_of_layer(model, example) if self.norm_scaling else {}
        self.network = budget.priced_network(model, example, layers, self.groups, self.cost, self._warn)
        self._chunks = [allocation.in_units(self.chunk, g) for g in self.groups]
        rounding = [allocation.in_units(self.round_to, g) for g in self.groups]
        self._options = [
            allocation.options_of(g.size, *of_group)
            for g, *of_group in zip(self.groups, rounding, self._chunks, strict=True)
        ]
        # prune_stem= is advice only where it is the stem that keeps channels from going
        stays = stem if any(why.endswith("is the stem") for why in self.left_out.values()) else None
        budget.refuse_budget(self.budget, self.cost, self.network, self.groups, self._options, self._chunks, stays)
        if self.print_plan and distributed.rank() == 0:
            print(budget.overview(self.groups, self._options, self.left_out, self.network, self.cost), flush=True)
        # only inputs of consumers are ever pruned: a dense copy of any other weight would be memory for nothing
        consumers = {c.parameter for g in self.groups for c in g.consumers}
        self.weights.end_copy([n for n in self.weights.copied if n not in consumers])
        self._optimizer_of = [
            next(i for i, names in enumerate(self.owners.owns) if windows.key_parameter(g) in names)
            for g in self.groups
        ]
        self._note_kept()
        if self.saved is not None and self.importance == "taylor":
            windows.refuse_lost_windows(
                self.saved, dict(zip(self._windows(), (g.size for g in self.groups), strict=True))
            )
        for group, window in zip(self.groups, self._windows(), strict=True) if self.importance == "taylor" else ():
            device = self.params[windows.key_parameter(group)].device
            windows.begin_window(self.aux, window, group.size, device)

    def attach(self, model: nn.Module) -> None:
        if self.attachment.host is None:  # in a run `rehearse` finds the groups
            if self._grouped == _shapes(self.params):
                self._note_kept()
            else:  # groups of another model say nothing about this one
                self.groups, self._optimizer_of = [], []

    def _note_kept(self) -> None:
        """Count the units that each group keeps, and find the outputs of consumers that are active, from the masks."""
        keeps = [prunable.kept_units(g, self.weights.masks) for g in self.groups]
        self.kept = [int(keep.sum()) for keep in keeps]
        self._active = active_outputs(self.groups, keeps)

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
            inputs = reader_scores(self.groups, self._dense(gradients), gradients, self._active)
            found = {w: group_scores(g, inputs) for w, g in zip(self._windows(), self.groups, strict=True)}
            self._fresh[step.index] = {window: scores for window, scores in found.items() if scores is not None}
        # after the scores are taken: decay is not part of the gradient of the loss
        for name in copied if self.decay else ():
            gradient = self.params[name].grad
            if gradient is not None and self.weights.active_counts[name] < self.weights.size(name):
                gradient.add_(self.weights.at_pruned(name, self.weights.dense_values(name)), alpha=self.decay)

    def after_step(self, step: Step) -> Update | None:
        for window, scores in self._fresh.pop(step.index).items():
            windows.add_to_window(self.aux, window, scores, step.finite_flag)
        return self.new_masks(step) if step.index in self._optimizer_of and step.due else None

    def share_at(self, number: int) -> float:
        """The share of the dense cost that the network may have at a solve after ``number`` gradient steps."""
        times = self.times
        # one interval is added to both, so that the first solve saves something already and the last saves all
        progress = (number - times.start + times.every) / (times.stop - times.start + times.every)
        return 1.0 - allocation.cost_reduction(self.curve, 1.0 - self.budget, progress)

    def _share(self) -> float:
        return self.network.realised(self.kept) / self.network.dense

    def after_update(self, step: Step) -> None:
        self._note_kept()
        self._scale_norms(step)
        # groups of other optimizers have had no solve, and go on with their windows
        names, several = self._windows(), len(set(self._optimizer_of)) > 1
        windows.reset_windows(self.aux, [names[g] for g in self._stepped_by(step)], keep_means=several)
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

    def _windows(self) -> list[str]:
        """Name of the window of each group's scores."""
        return [windows.window_of(index, group) for index, group in enumerate(self.groups)]

    def _stepped_by(self, step: Step) -> list[int]:
        """Indices of the groups whose layers the step's optimizer moves."""
        return [group for group, optimizer in enumerate(self._optimizer_of) if optimizer == step.index]

    def scores(self) -> list[Tensor]:
        """Score of each unit of each group: the mean over the steps since the last solve; with magnitudes, as they are
        now."""
        if self.importance == "taylor":
            return [windows.mean_of_window(self.aux, window) for window in self._windows()]
        inputs = reader_scores(self.groups, self._dense(self.params), None, self._active)
        return [found for g in self.groups if (found := group_scores(g, inputs)) is not None]

    def new_masks(self, step: Step) -> Update:
        self._scores = scores = self.scores()
        share = self.share_at(step.number)
        options = self._options_at(step, share * self.network.dense)
        values = [allocation.values_of(*given) for given in zip(scores, options, self._chunks, strict=True)]
        found = allocation.allocate(self.network, options, values, share * self.network.dense, self.kept)
        # each optimizer moves the masks of its own layers only, in a step that it has taken
        own = self._stepped_by(step)
        keeps = [allocation.best_units(scores[g], found.kept[g], self._chunks[g]) for g in own]
        masks = prunable.consumer_masks([self.groups[g] for g in own], keeps, self.params)
        return Update(masks, self.own_figures(share=share, gap=found.gap))

    def _options_at(self, step: Step, capacity: float) -> list[Tensor]:
        """The numbers of units that each group may keep by a solve whose network costs at most ``capacity``.

        The budget is that of the whole network, so all groups take part in a solve, but each optimizer moves the masks
        of its own layers only. So groups of optimizers that have had their solve for this time, or a later one, have one
        option, the channels that they keep: this solve shares out what they leave.
        """
        done, options = self.progress.done, self._options
        # the second only where three optimizers or more step at different rates, and those ahead leave too little: then
        # they take part as well, and follow in solves of their own, unless they have had their last one
        for settled in (step.number, self.times.stop):
            options = [
                torch.tensor([kept]) if done.get(optimizer, 0) >= settled else all_options
                for all_options, kept, optimizer in zip(self._options, self.kept, self._optimizer_of, strict=True)
            ]
            if allocation.fits(allocation.smallest_cost(self.network, options), capacity):
                break
        return options

    def _dense(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {n: self.weights.dense_values(n) for n in names}

    # ------------------------------------------------------------------ where it stands

    @property
    def at_target(self) -> bool:
        stop = math.inf if self.calendar is None else self.calendar.stop
        solved = self._optimizer_of or list(self.progress.done)  # without groups those that have had a solve
        return bool(solved) and all(self.progress.done.get(o, 0) >= stop for o in solved)

    def figures(self) -> dict[str, float]:
        """Cost of the pruned network as a share of the dense one's, and the units that each group keeps."""
        if not self.groups:
            return {}
        kept = {f"smcp/kept/{g.name}": float(k) for g, k in zip(self.groups, self.kept, strict=True)}
        return {"smcp/cost": self._share()} | kept

    def outcome(self) -> dict[str, str]:
        if not self.groups:  # of a checkpoint whose run was in another process
            return {}
        return {budget.cost_name(self.cost): f"{self._share():.4f} of the dense network's (budget {self.budget:g})"}

    def shortfall(self) -> str:
        where = f"at {self._share():.4f} of the dense {budget.cost_name(self.cost)}, " if self.groups else ""
        return (
            f"{type(self).__name__} ended {where}before "
            f"the solve for its budget of {self.budget:g}: {self.step} steps were taken and that solve is due at step "
            f"{self.times.stop}. Train longer, or give an earlier stop=."
        )


def _shapes(params: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in params.items()}


@why_no_exchange.register
def _(method: SMCP) -> str:
    return "has a gate for every channel, closed ones too, so sparse storage has nothing to save"
