"""The base of methods that prune whole channels until the network costs no more than a budget."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.channels import costs, prunable
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.units_left import flops_network, shapes_of, without_units
from sparse_callbacks.core import distributed
from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.example_inputs import example_inputs
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.core.units_left import UnitsLeft, bar_figures, units_left
from sparse_callbacks.methods.channels import allocation, budget
from sparse_callbacks.methods.channels.arguments import refuse_budget_arguments, refuse_other_options
from sparse_callbacks.methods.channels.rankings import Choice, Offer
from sparse_callbacks.methods.channels.score_windows import key_parameter

START, STOP = 10 / 90, 65 / 90  # published for SMCP on ImageNet: 10 epochs of warm-up, 55 of ramp, 25 of cool-down


class BudgetedChannels(Method):
    """Whole channels go until the network costs no more than a budget; a subclass chooses which ones.

    The channels of a group go together: the inputs of all its consumers are masked. Groups are found, and priced, before
    the first batch. A subclass overrides :meth:`choose`, and may read ``groups``, ``network``, ``live``, ``kept``,
    ``chunks`` and ``optimizer_of``; what it has to know of the model besides it finds in :meth:`look_at`.

    Args:
        budget: cost of the pruned network as a share of the dense one's, in (0, 1).
        cost: ``"parameters"``, ``"flops"`` or the path of a latency table (``.json``).
        round_to: number of channels of which a group keeps a multiple, where its own number is one.
        chunk: number of neighbouring channels that are kept or pruned together.
        curve: shape of the ramp: ``"exp"``, ``"linear"`` or ``"exp2"``.
        every: optimizer steps (int) or fraction of the run (float) between choices; None: ``published_every``.
        start: when the ramp begins, in optimizer steps (int) or as a fraction of the run (float).
        stop: when the ramp ends, in the same units; masks stay from then on.
        prune_stem: whether the outputs of a convolution that comes first may go too.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments that no model can make right.
    """

    arrives_at_stop: ClassVar[bool] = True
    plans_counts: ClassVar[bool] = False

    def __init__(
        self,
        budget: float = 0.5,
        *,
        cost: str = "flops",
        round_to: int = 8,
        chunk: int = 1,
        curve: str = "exp",
        every: Time | None = None,
        start: Time = START,
        stop: Time = STOP,
        prune_stem: bool = False,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        refuse_other_options(options, type(self))
        super().__init__(0.0, distribution="uniform", include=include, exclude=exclude, seed=seed, **options)
        self.budget, self.cost, self.curve = budget, cost, curve
        self.round_to, self.chunk, self.prune_stem = round_to, chunk, prune_stem
        refuse_budget_arguments(budget, {"round_to": round_to, "chunk": chunk}, curve, cost)
        self.budget = float(budget)  # a fraction or a number of numpy is written as any other
        self.set_times(every, start, stop)
        self.groups: list[Group] = []
        """The groups whose channels may go; known once training starts."""
        self.left_out: dict[str, str] = {}
        """Why the channels of other groups stay, by the group's name."""
        self.live: list[Tensor] = []
        """The units that each group keeps, bool [size]."""
        self.kept: list[int] = []
        """The number of units that each group keeps."""
        self.chunks: list[int] = []
        """For each group the number of neighbouring units that go together."""
        self.left: UnitsLeft | None = None
        """Parameters, FLOPs and units of the network without pruned channels; None before training starts."""
        self.optimizer_of: list[int] = []
        """Index of the optimizer that steps the consumers of each group."""
        self._grouped: dict[str, torch.Size] = {}  # shapes of the parameters that the groups were found with

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
        example = example_inputs(model, self.host.data_pass(values=False))
        stay = [*(self.exclude or ()), *(e.name for e in self.entries if e.reason.endswith("kept dense on request"))]
        layers = costs.layers(model, example)
        stem = None if self.prune_stem else costs.stem(layers)
        self.groups, self.left_out = prunable.prunable_groups(model, example, stay, self.owners.owns, stem)
        self._grouped = _shapes(self.params)
        self.look_at(model, example)
        self.network = budget.priced_network(model, example, layers, self.groups, self.cost, self._warn)
        self.dense_shapes = shapes_of(model)
        counted = self.cost == "flops"
        self.flops = self.network if counted else flops_network(model, example, self.groups, layers)
        self.chunks = [allocation.in_units(self.chunk, g) for g in self.groups]
        rounding = [allocation.in_units(self.round_to, g) for g in self.groups]
        self._options = [
            allocation.options_of(g.size, *of_group)
            for g, *of_group in zip(self.groups, rounding, self.chunks, strict=True)
        ]
        # prune_stem= is advice only where it is the stem that keeps channels from going
        stays = stem if any(why.endswith("is the stem") for why in self.left_out.values()) else None
        coarse = {"round_to=": max(rounding, default=1), "chunk=": max(self.chunks, default=1)}
        finer = [name for name, units in coarse.items() if units > 1]
        budget.refuse_budget(
            self.budget, self.cost, self.network, self.groups, self._options, self.chunks, stays, finer
        )
        if self.print_plan and distributed.rank() == 0:
            print(budget.overview(self.groups, self._options, self.left_out, self.network, self.cost), flush=True)
        self.optimizer_of = [
            next(i for i, names in enumerate(self.owners.owns) if key_parameter(g) in names) for g in self.groups
        ]
        self.note_kept()

    def look_at(self, model: nn.Module, example: Any) -> None:
        """Find what a method has to know of the model beside its groups, before the first batch; nothing by default.

        Args:
            model: the model.
            example: inputs of one sample, as the model's forward takes them.
        """

    def attach(self, model: nn.Module) -> None:
        if self.attachment.host is None:  # in a run `rehearse` finds the groups
            if self._grouped == _shapes(self.params):
                self.note_kept()
            else:  # groups of another model say nothing about this one
                self.groups, self.optimizer_of = [], []

    def note_kept(self) -> None:
        """Find the units that each group keeps from the masks."""
        self.live = [prunable.kept_units(g, self.weights.masks) for g in self.groups]
        self.kept = [int(keep.sum()) for keep in self.live]
        if self.groups:
            self.left = without_units(self.dense_shapes, self.groups, self.live, self.flops)

    # ------------------------------------------------------------------ the choice

    def share_at(self, number: int) -> float:
        """The share of the dense cost that the network may have at a choice.

        Args:
            number: gradient steps that were taken.
        """
        times = self.times
        # one interval is added to both, so that the first choice saves something already and the last saves all
        progress = (number - times.start + times.every) / (times.stop - times.start + times.every)
        return 1.0 - allocation.cost_reduction(self.curve, 1.0 - self.budget, progress)

    def choose(self, number: int, offer: Offer) -> Choice:
        """The units to keep, of every group.

        Args:
            number: the gradient steps taken.
            offer: the numbers of units that each group may keep, and what the network may cost.
        """
        raise NotImplementedError(f"{type(self).__name__} has no choose(): override it, and return a Choice of units.")

    def chosen(self, number: int, optimizer: int | None = None) -> Update:
        """The update that a choice after ``number`` gradient steps brings.

        Args:
            number: the gradient steps taken.
            optimizer: index of the optimizer whose layers' masks move; None: all masks.
        """
        share = self.share_at(number)
        capacity = share * self.network.dense
        options = self._options_at(number, capacity)
        choice = self.choose(number, Offer(self.network, options, self.chunks, self.kept, capacity))
        # each optimizer moves the masks of its own layers only, in a step that it has taken
        own = range(len(self.groups)) if optimizer is None else self.groups_of(optimizer)
        masks = prunable.consumer_masks([self.groups[g] for g in own], [choice.keeps[g] for g in own], self.params)
        return Update(masks, self.own_figures(share=share, **choice.figures))

    def _options_at(self, number: int, capacity: float) -> list[Tensor]:
        """The numbers of units that each group may keep by a choice whose network costs at most ``capacity``.

        The budget is that of the whole network, so all groups take part in a choice, but each optimizer moves the masks
        of its own layers only. So groups of optimizers that have had their choice for this time, or a later one, have
        one option, the channels that they keep: this choice shares out what they leave.
        """
        done, options = self.progress.done, self._options
        # the second only where three optimizers or more step at different rates, and those ahead leave too little: then
        # they take part as well, and follow in choices of their own, unless they have had their last one
        for settled in (number, self.times.stop):
            options = [
                torch.tensor([kept]) if done.get(optimizer, -1) >= settled else all_options
                for all_options, kept, optimizer in zip(self._options, self.kept, self.optimizer_of, strict=True)
            ]
            if allocation.fits(allocation.smallest_cost(self.network, options), capacity):
                break
        return options

    def groups_of(self, optimizer: int) -> list[int]:
        """Indices of the groups whose consumers an optimizer steps.

        Args:
            optimizer: index of the optimizer in the run.
        """
        return [group for group, owner in enumerate(self.optimizer_of) if owner == optimizer]

    def after_step(self, step: Step) -> Update | None:
        return self.new_masks(step) if step.index in self.optimizer_of and step.due else None

    def new_masks(self, step: Step) -> Update:
        return self.chosen(step.number, step.index)

    def after_update(self, step: Step) -> None:
        self.note_kept()

    # ------------------------------------------------------------------ where it stands

    def _share(self) -> float:
        return self.network.realised(self.kept) / self.network.dense

    @property
    def at_target(self) -> bool:
        stop = math.inf if self.calendar is None else self.calendar.stop
        solved = self.optimizer_of or list(self.progress.done)  # without groups those that have had a choice
        return bool(solved) and all(self.progress.done.get(o, -1) >= stop for o in solved)

    def figures(self) -> dict[str, float]:
        """Cost, parameters and FLOPs of the pruned network as shares of the dense one's, and the units that each group keeps."""
        if self.left is None or not self.groups:
            return {}
        kept = {f"kept/{name}": float(count) for name, (count, _) in self.left.units.items()}
        return self.own_figures(cost=self._share(), **self.left.shares, **kept)

    def outcome(self) -> dict[str, str]:
        if not self.groups:  # of a checkpoint whose run was in another process
            return {}
        cost = budget.cost_name(self.cost)
        return {"budget": f"{self._share():.4f} of the dense network's {cost} (at most {self.budget:g})"}

    def shortfall(self) -> str:
        where = f"at {self._share():.4f} of the dense {budget.cost_name(self.cost)}, " if self.groups else ""
        return (
            f"{type(self).__name__} ended {where}before "
            f"the solve for its budget of {self.budget:g}: {self.step} steps were taken and that solve is due at step "
            f"{self.times.stop}. Train longer, or give an earlier stop=."
        )


@units_left.register
def _(method: BudgetedChannels, example_input: Any = None) -> UnitsLeft | None:
    return method.left if method.groups else None  # of a checkpoint whose run was in another process nothing is known


@bar_figures.register
def _(method: BudgetedChannels) -> dict[str, float]:
    left = units_left(method)
    return {} if left is None else method.own_figures(parameters=left.shares["parameters"])


def _shapes(params: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in params.items()}
