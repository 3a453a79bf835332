"""SMCP: channels chosen by a knapsack under a budget of weights, FLOPs or measured time."""

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import replace
from numbers import Integral, Real
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.channels import costs, norms, prunable
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.core import distributed
from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.methods.smcp import allocation, budget
from sparse_callbacks.methods.smcp.scores import active_outputs, group_scores, kept_importance, reader_scores

WORDS = {
    "importance": ("taylor", "magnitude"),
    "curve": allocation.CURVES,
    "norm_scaling": (None, "kept", "importance"),
}
START, STOP = 10 / 90, 65 / 90  # published for ImageNet: 10 epochs of warm-up, 55 of ramp, 25 of cool-down


class SMCP(SparsityCallback):
    """SMCP, soft masking for cost-constrained channel pruning (Humble et al., 2022): the network becomes really
    smaller.

    With dense weights w, a mask m over the input channels of each group, and optimizer step t::

        every step      score[c] += | sum of -w * (gradient of the loss at m * w) over the group's layers, active outputs and kernel |
                        w = w - optimizer(that gradient, not masked, + decay * (1 - m) * w)
        every ``every`` r = (1 - budget) * (1 - e^(-2.8 x)) / (1 - e^-2.8),   x = (t - start + every) / (stop - start + every)
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
        cost: ``"parameters"``, ``"flops"`` (multiply-adds) or the path of a latency table (``.json``), measured by
            ``python -m sparse_callbacks.latency``. Counted is what the forward pass of one sample calls: attention,
            recurrent layers and embeddings as they are, biases and norms not.
        importance: ``"taylor"``, or ``"magnitude"``: the sum of \\|w\\| at the solve.
        round_to: groups keep a multiple of so many channels where their number is one.
        chunk: so many neighbouring channels are kept or pruned together.
        curve: of the ramp: ``"exp"``, ``"linear"`` or ``"exp2"``.
        every: optimizer steps (int) or fraction of the run (float) between solves; None: 80, shortened with a word in
            short runs.
        start, stop: when the ramp begins and ends, in the same units.
        decay: added to the gradient of a pruned weight, times the weight.
        norm_scaling: the gain of a batch norm that takes the output of a pruned layer shrinks with the inputs of that
            layer: to the share ``"kept"``, or to their share in ``"importance"``; None (the released default): it does
                not.
        prune_stem: the stem's outputs may go too.
        include, exclude, seed, **options: see :class:`SparsityCallback`; inputs and outputs of layers that ``exclude``
            or ``keep_dense`` name stay. Nothing here is random.

    Raises:
        ValueError: arguments out of range, a model without channels to remove, a budget that cannot be met; before the
            first batch.
        ImportError: torch-pruning (extra ``channels``) is missing.

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
        if "sparsity" in options:
            name = type(self).__name__
            raise ValueError(
                f"sparsity= is no argument of {name}. Give budget=, what is left of the network's cost: 0.5 for half "
                "of it."
            )
        super().__init__(0.0, distribution="uniform", include=include, exclude=exclude, seed=seed, **options)
        self.budget, self.cost, self.importance, self.curve = budget, cost, importance, curve
        self.round_to, self.chunk, self.decay = round_to, chunk, decay
        self.norm_scaling, self.prune_stem = norm_scaling, prune_stem
        self._refuse_arguments()
        self.set_times(every, start, stop)
        self.groups: list[Group] = []  # whose channels may go; known once training starts
        self.left_out: dict[str, str] = {}  # why the channels of the others stay, by the group's name
        self._active: dict[str, Tensor] = {}
        self._fresh: dict[str, Tensor] = {}
        self._owners: list[int] = []  # the optimizer that steps the layers of each group
        self._norms: dict[str, str] = {}  # the batch norm behind each layer
        self._scores: list[Tensor] = []  # of the latest solve

    def _refuse_arguments(self) -> None:
        if not _is_number(self.budget) or not 0.0 < self.budget < 1.0:
            raise ValueError(f"budget={self.budget!r} is out of range. Give a number above 0 and below 1.")
        if not _is_number(self.decay) or not 0.0 <= self.decay < math.inf:
            raise ValueError(f"decay={self.decay!r} is out of range. Give a number that is at least 0.")
        for name, value in (("round_to", self.round_to), ("chunk", self.chunk)):
            if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
                raise ValueError(f"{name}={value!r} is no number of channels. Give a whole number from 1 on.")
        for name, known in WORDS.items():
            if (word := getattr(self, name)) not in known:
                raise ValueError(f"{name}={word!r} is not known. Give {' or '.join(map(repr, known))}.")
        if self.cost not in budget.COSTS and not str(self.cost).endswith(".json"):
            raise ValueError(
                f"cost={self.cost!r} is not known. Give 'parameters', 'flops' or the path of a latency table (.json)."
            )

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
        self._norms = norms.norm_of_layer(model, example) if self.norm_scaling else {}
        self.network = budget.priced_network(model, example, layers, self.groups, self.cost, self._warn)
        self._options = [allocation.options_of(g.size, self.round_to, self.chunk) for g in self.groups]
        stays = stem if any(why.endswith("is the stem") for why in self.left_out.values()) else None
        budget.refuse_budget(self.budget, self.cost, self.network, self.groups, self._options, self.chunk, stays)
        if self.print_plan and distributed.rank() == 0:
            print(budget.overview(self.groups, self._options, self.left_out, self.network, self.cost), flush=True)
        consumers = {c.parameter for g in self.groups for c in g.consumers}
        self.weights.end_copy([n for n in self.weights.copied if n not in consumers])
        self._owners = [next(i for i, names in enumerate(self.owners.owns) if _key(g) in names) for g in self.groups]
        self._note_kept()
        for index, group in enumerate(self.groups) if self.importance == "taylor" else ():
            device, window = self.params[_key(group)].device, self._window_of(index)
            self.aux.setdefault(f"scores.{window}", torch.zeros(group.size, device=device))
            self.aux.setdefault(f"steps.{window}", torch.zeros((), dtype=torch.int64, device=device))

    def _note_kept(self) -> None:
        """Keep in mind how many units of each group there are, and which outputs of its layers are active."""
        keeps = [prunable.kept_units(g, self.weights.masks) for g in self.groups]
        self.kept = [int(keep.sum()) for keep in keeps]
        self._active = active_outputs(self.groups, keeps)

    # ------------------------------------------------------------------ the step

    def before_step(self, step: Step) -> None:
        super().before_step(step)
        self._fresh = {}
        copied = [n for n in step.names if self.weights.has_copy(n)]
        if self.importance == "taylor" and copied:
            gradients = {n: g for n in copied if (g := step.gradient(n)) is not None}
            inputs = reader_scores(self.groups, self._dense(gradients), gradients, self._active)
            found = {self._window_of(i): group_scores(g, inputs) for i, g in enumerate(self.groups)}
            self._fresh = {window: scores for window, scores in found.items() if scores is not None}
        for name in copied if self.decay else ():
            gradient = self.params[name].grad
            if gradient is not None and self.weights.active_counts[name] < self.weights.size(name):
                gradient.add_(self.weights.at_pruned(name, self.weights.dense_values(name)), alpha=self.decay)

    def after_step(self, step: Step) -> Update | None:
        self._accumulate(step)
        return self.new_masks(step) if step.index in self._owners and step.due else None

    def _accumulate(self, step: Step) -> None:
        """Add the step's scores to those of the window; a step with an inf counts for nothing."""
        for window, scores in self._fresh.items():
            finite = torch.as_tensor(step.finite_flag, device=scores.device)
            self.aux[f"scores.{window}"] = self.aux[f"scores.{window}"] + torch.where(finite, scores, 0)
            self.aux[f"steps.{window}"] = self.aux[f"steps.{window}"] + finite

    def share_at(self, number: int) -> float:
        """The share of the dense cost that the network may have at a solve after ``number`` gradient steps."""
        times = self.times
        progress = (number - times.start + times.every) / (times.stop - times.start + times.every)
        return 1.0 - allocation.cost_reduction(self.curve, 1.0 - self.budget, progress)

    def _share(self) -> float:
        return self.network.realised(self.kept) / self.network.dense

    def after_update(self, step: Step) -> None:
        self._note_kept()
        self._scale_norms(step)
        own = [self._window_of(g) for g, owner in enumerate(self._owners) if owner == step.index]
        windows = [f"{kind}.{window}" for window in own for kind in ("scores", "steps")]
        self.aux |= {k: torch.zeros_like(self.aux[k]) for k in windows if k in self.aux}
        if step.number >= step.calendar.last:
            self.weights.end_copy(step.names)  # masks stay from here on, and pruned channels learn no more

    def _scale_norms(self, step: Step) -> None:
        """Shrink, or let grow again, the gains of the norms behind the layers of the step's optimizer."""
        for name in step.names:
            norm = self._norms.get(name.rpartition(".")[0])
            if norm is None or not self.weights.has_copy(name):
                continue
            share = self.weights.active_counts[name] / self.weights.size(name)
            if self.norm_scaling == "importance":
                share = kept_importance(name, self.groups, self._scores, self.weights.masks)
            before = self.aux.get(f"norm/{name}", torch.ones((), dtype=torch.float64))
            self.aux[f"norm/{name}"] = torch.full_like(before, share)
            norms.rescale_gain(
                self.model.get_parameter(f"{norm}.weight"), share / float(before), self.owners.optimizers
            )

    def _window_of(self, group: int) -> str:
        """What the score of a group is kept under; the name of a parameter on its device comes last, as in every key of
        ``aux``."""
        return f"{group}/{_key(self.groups[group])}"

    def scores(self) -> list[Tensor]:
        """Score of each unit of each group: the mean over the steps since the last solve; with magnitudes, as they are
        now."""
        windows = [self._window_of(g) for g in range(len(self.groups))]
        if self.importance == "taylor":
            return [self.aux[f"scores.{w}"] / self.aux[f"steps.{w}"].clamp(min=1) for w in windows]
        inputs = reader_scores(self.groups, self._dense(self.params), None, self._active)
        return [found for g in self.groups if (found := group_scores(g, inputs)) is not None]

    def new_masks(self, step: Step) -> Update:
        self._scores = scores = self.scores()
        over = [
            self.progress.done.get(o, 0) >= self.times.stop for o in self._owners
        ]  # of optimizers that had their last solve
        options = [torch.tensor([k]) if d else o for o, k, d in zip(self._options, self.kept, over, strict=True)]
        values = [allocation.values_of(s, o, self.chunk) for s, o in zip(scores, options, strict=True)]
        share = self.share_at(step.number)
        found = allocation.allocate(self.network, options, values, share * self.network.dense, self.kept)
        own = [g for g, owner in enumerate(self._owners) if owner == step.index]
        keeps = [allocation.best_units(scores[g], found.kept[g], self.chunk) for g in own]
        masks = prunable.consumer_masks([self.groups[g] for g in own], keeps, self.params)
        return Update(masks, self.own_figures(share=share, gap=found.gap))

    def _dense(self, names: Iterable[str]) -> dict[str, Tensor]:
        return {n: self.weights.dense_values(n) for n in names}

    # ------------------------------------------------------------------ where it stands

    @property
    def at_target(self) -> bool:
        stop = math.inf if self.calendar is None else self.calendar.stop
        return bool(self._owners) and all(self.progress.done.get(o, 0) >= stop for o in self._owners)

    def figures(self) -> dict[str, float]:
        """Cost of the pruned network as a share of the dense one's, and the units that each group keeps."""
        if not self.groups:
            return {}
        return {"smcp/cost": self._share()} | {
            f"smcp/kept/{g.name}": float(k) for g, k in zip(self.groups, self.kept, strict=True)
        }

    def outcome(self) -> dict[str, str]:
        return {budget.cost_name(self.cost): f"{self._share():.4f} of the dense network's (budget {self.budget:g})"}

    def shortfall(self) -> str:
        return (
            f"{type(self).__name__} ended at {self._share():.4f} of the dense {budget.cost_name(self.cost)}, before "
            "the solve "
            f"for its budget of {self.budget:g}: {self.step} steps were taken and that solve is due at step "
            f"{self.times.stop}. Train "
            "longer, or give an earlier stop=."
        )


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _key(group: Group) -> str:
    """Name of a parameter on whose device the group's scores are."""
    return group.consumers[0].parameter
