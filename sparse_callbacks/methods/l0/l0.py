"""Constrained L0: gates that close until the expected density of the network meets its target."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Unpack

import torch
from torch import Tensor, nn

from sparse_callbacks.core.arguments import by_glob
from sparse_callbacks.core.hooks import BatchEnd, Figures
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.record.multiply_adds import WeightsInStep
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.l0 import gates, norm_check, report
from sparse_callbacks.methods.l0.arguments import Densities, plain, refuse_gate_arguments, refuse_sparsity
from sparse_callbacks.methods.l0.channel_members import ChannelMembers, find_members, refuse_decay
from sparse_callbacks.methods.l0.constraint import Constraint, Rates, make_constraints, shares_of
from sparse_callbacks.methods.l0.gated_weights import GatedWeights

TOLERANCE = 0.03  # expected densities hover about their targets: restarts of the multiplier let them rise again


class ConstrainedL0(Method):
    """Constrained L0: gates close until their expected density meets the target (Gallego-Posada et al., 2022).

    The gates are hard-concrete ones, and the constraint has a Lagrange multiplier.

    With dense weights w, a sample z of the gates (see :mod:`~sparse_callbacks.methods.l0.gates`) and multipliers m >=
    0, in each optimizer step::

        defect    = E[share of parameters behind open gates] - density          for the model, or for each layer
        w         = w - optimizer(z * gradient of the loss at z * w + l2 * P(open) * w)
        log_alpha = clip(log_alpha - gate_optimizer(gradient of loss + m * defect), -log 100, log 100)
        m         = 0 if defect < 0, else m + dual_lr * defect

    The weights hold ``median gate * w`` whenever a batch is over, and the sample from a batch's start to its end: one
    sample for all examples, the same through an accumulation window and on every rank; manual optimization goes on with
    another after each step. Put callbacks that look at weights behind this one: those before it still find samples when
    a batch ends that took no step.

    Dense weights, gates and multipliers live in this callback. Memory, in copies of the gated parameters: for channels
    one, and one of the largest kernel; for weights 7 with Adam for the gates and 5 with SGD, two of which a step
    computes in, and 2.5 of the largest kernel. Masks of single weights are made when somebody asks for them, a quarter
    of a copy. In a checkpoint for channels 1.03; for weights 4.03 and 2.03.

    What you write into the weights is kept if torch sees it (``with torch.no_grad(): p.clamp_(...)``), as gate * w: w
    becomes what was written over the gate at that time. A write past autograd, ``p.data.clamp_(...)``, is undone at the
    next batch.

    A convolution's gate closes an output channel whole: its bias has the same gate, and a batch norm registered right
    behind the convolution gives 0 there, in training too, and takes no statistics from it. Before the first batch one
    example shows whether each of these norms takes that output alone. A layer whose gates would all close keeps the
    likeliest one, with its P(open) as its value.

    Passes over the weights in a step: 4 in place (sample and median gates times dense
    weights, weights times gradients, gradients times gates) and 2 that read (gradients, for inf and NaN, and the
    products, which are summed); with ``unit="weight"`` and Adam 40 in place and 3 that read.

    Differs from the paper: single biases get no gates with ``unit="weight"``; parameters without gates have the
    optimizer's own weight decay in place of expected L2; the norm is a plain batch norm whose gain and shift are closed
    with the channel.

    Args:
        density: target share of parameters behind open gates, at least 0.0472 (gates cannot close further), or ``{glob:
            share}``, the first match for each layer (``constraint="layer"``).
        constraint: ``"model"``: one for all gated parameters (of each optimizer); ``"layer"``: one for each.
        unit: ``"channel"``: a gate for each input unit of a matrix and for each output channel of a convolution;
            ``"weight"``.
        droprate: dropout rate of new gates, in [0.01, 0.99], or ``{glob: droprate}``: their mean is about 1 - droprate,
            and weights grow by 1 / (1 - droprate) to make up for it.
        gate_lr: learning rate of the gates, which is not scheduled.
        dual_lr: learning rate of the multipliers, which is not scheduled.
        gate_optimizer: ``"sgd"`` or ``"adam"``.
        l2: coefficient of the expected squared norm over 2; the optimizer's own weight decay of gated parameters must
            be 0 then.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, or a model, optimizer or checkpoint that does not fit; before the first
            batch.

    Example:
        >>> from sparse_callbacks import ConstrainedL0
        >>> ConstrainedL0(density=0.25, constraint="layer").target_sparsity
        0.75

    Reference: Gallego-Posada, Ramirez, Erraqabi, Bengio, Lacoste-Julien: Controlled Sparsity via Constrained
    Optimization. NeurIPS 2022.
    """

    keeps_dense: ClassVar[bool] = True
    plans_counts: ClassVar[bool] = False
    figure_prefix: ClassVar[str] = "l0"

    def __init__(
        self,
        density: Densities = 0.5,
        *,
        constraint: str = "model",
        unit: str = "channel",
        droprate: Densities = 0.5,
        gate_lr: float = 7e-4,
        dual_lr: float = 1e-4,
        gate_optimizer: str = "adam",
        l2: float = 0.0,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        refuse_sparsity(options, type(self).__name__)
        super().__init__(0.0, distribution="uniform", include=include, exclude=exclude, seed=seed, **options)
        self.density, self.droprate = plain(density), plain(droprate)
        self.constraint, self.unit, self.gate_optimizer = constraint, unit, gate_optimizer
        self.gate_lr, self.dual_lr, self.l2 = gate_lr, dual_lr, l2
        choices = {"constraint": constraint, "unit": unit, "gate_optimizer": gate_optimizer}
        refuse_gate_arguments(self.density, self.droprate, choices, {"gate_lr": gate_lr, "dual_lr": dual_lr, "l2": l2})
        self.gated = GatedWeights(self.weights, {})
        self._together: dict[str, ChannelMembers] = {}  # what has the gates of each kernel, until attach makes them
        self._held: dict[str, Tensor] = {}  # dense values of the last run, from start_copies to attach
        self._constraints: list[Constraint] = []
        self._optimizer_of: dict[str, int] = {}  # index of the optimizer that steps a kernel
        self._pulls: dict[str, Tensor] = {}  # gradient of the loss by the log_alpha of each kernel, for one step
        self._in_batch = False

    # ------------------------------------------------------------------ what is gated

    @property
    def target_sparsity(self) -> float:
        if not isinstance(self.density, Mapping):
            return 1.0 - self.density
        if not self._constraints:  # the layers are not known yet
            return 1.0 - max(self.density.values())
        shares = shares_of(self.gated.sizes(self.gated.members))
        return 1.0 - sum(c.target * shares[c.names[0]] for c in self._constraints)

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        chosen = [e for e in entries if not e.reason]
        targets = by_glob(self.density, [e.name for e in chosen], "density")
        return {layer: 1 - targets[e.name] for e in chosen for layer in e.layers}

    def parameter_zeros(self, entries: Sequence[Entry], targets: Mapping[str, float]) -> dict[str, int]:
        return {e.name: zeros_for(targets.get(e.layers[0], 0.0), e.size) for e in entries if not e.reason}

    def plan(self, model: nn.Module | None = None) -> Plan:
        plan = super().plan(model)
        tied = {} if model is None else self._tied_in(getattr(model, "_orig_mod", model), plan.selected)
        selected = plan.selected | {n for t in tied.values() for n in t.names}
        rows = tuple(replace(r, zeros=None, reason="") if r.name in selected else r for r in plan)
        title = f"{type(self).__name__}: expected density {self.density} of the {self.constraint}"
        return replace(plan, title=title, rows=rows, selected=selected, joint=0, decided_by="gates")

    def _tied_in(self, model: nn.Module, kernels: Iterable[str]) -> dict[str, ChannelMembers]:
        return find_members(model, kernels) if self.unit == "channel" else {}

    def further_members(self, model: nn.Module, entries: Sequence[Entry]) -> Sequence[Entry]:
        """Biases and norms whose channels have gates become members beside the kernels."""
        kernels = [e.name for e in entries if not e.reason]
        self._together = dict.fromkeys(kernels, ChannelMembers()) | self._tied_in(model, kernels)
        members = {n for t in self._together.values() for n in t.names}
        return [replace(e, reason="", shape=e.full_shape) if e.name in members else e for e in entries]

    def start_copies(self, dense: Mapping[str, Tensor], new: Iterable[str]) -> None:
        # the base copies what the parameters hold, weights times gates; attach takes the gates out again with these
        self._held = dict(dense)
        super().start_copies(dense, new)

    def attach(self, model: nn.Module) -> None:
        together = self._together
        kernels = list(together)
        targets_of, rates = (by_glob(getattr(self, a), kernels, a) for a in ("density", "droprate"))
        # without gains and shifts of norms: they are not in the expected L2 norm, so the optimizer may decay them
        decaying = {*together, *(n for t in together.values() for n in t.biases)}
        refuse_decay(self.owners.optimizers, {id(p): n for n, p in model.named_parameters() if n in decaying}, self.l2)
        self.gated, self._in_batch = GatedWeights(self.weights, together), False
        # members beside a kernel have its gates, so only kernels have constraints
        owned = [[n for n in names if n in together] for names in self.owners.owns]
        self._constraints = make_constraints(owned, self.gated.sizes(kernels), targets_of, self.constraint == "layer")
        self._optimizer_of = {n: index for index, names in enumerate(owned) for n in names}
        for kernel in kernels:
            # gates live in aux: they are learned, and a resumed run or a second fit goes on with them
            new = f"log_alpha/{kernel}" not in self.aux
            if new:
                self.aux[f"log_alpha/{kernel}"] = self._new_gates(kernel, rates[kernel])
            self.gated.begin(kernel, self._log_alpha(kernel), rates[kernel] if new else None, self._held)
        # after the gates, as each multiplier takes its dtype and device from one
        for constraint in self._constraints:
            constraint.begin(self.aux)
        self._held = {}

    def initial_masks(self) -> dict[str, Tensor]:
        return self.weights.all_active(self.params)  # attach makes the gates, and with them the masks

    def _new_gates(self, kernel: str, droprate: float) -> Tensor:
        weight, entry = self.params[kernel], self.weights.entries[kernel]
        shape = weight.shape if self.unit == "weight" else gates.channel_shape(weight.shape, entry.transposed)
        found = gates.initial(shape, droprate, self.generator(f"log_alpha/{kernel}", 0))
        return found.to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    def rehearse(self) -> None:
        if self.unit == "channel" and any(self.params[n].ndim > 2 for n in self.gated.members):
            norm_check.check_on_example(self.model, self.gated.members, self.host.data_pass(values=False))

    # ------------------------------------------------------------------ what the parameters hold

    def _log_alpha(self, kernel: str) -> Tensor:
        return self.aux[f"log_alpha/{kernel}"]

    def _sample(self, kernels: Iterable[str], finite: bool = True) -> None:
        """The parameters of ``kernels`` hold the sample of their gates for the coming step."""
        for kernel in kernels:
            self.gated.write_sample(kernel, partial(self._draw, kernel), self.model.get_submodule, finite)

    def _draw(self, kernel: str) -> Tensor:
        log_alpha, kept = self._log_alpha(kernel), self.gated.kept
        into = kept.like(f"sample/{kernel}", log_alpha)
        if getattr(self.noise, "__func__", None) is not ConstrainedL0.noise:  # a subclass has noise of its own
            return gates.sample(log_alpha, self.noise(kernel), into)
        bits = kept.like("bits", log_alpha.view(-1)[: math.ceil(log_alpha.numel() / 4)], torch.int64)
        return gates.sample(log_alpha, gates.noise(log_alpha, self._source(kernel), into, bits), into)

    def write(self, names: Sequence[str] | None, finite: bool) -> None:
        if names is None:
            self.gated.write_all_medians()
        else:  # an optimizer has stepped: written now, they would be written over by after_step
            self.gated.after_step(names)

    def noise(self, kernel: str) -> Tensor:
        """Uniform numbers in (0, 1) for the gates of the coming step: the same through a window, on every rank and after a resume.

        Args:
            kernel: name of the gated parameter.
        """
        return gates.noise(self._log_alpha(kernel), self._source(kernel))

    def _source(self, kernel: str) -> torch.Generator:
        # numbered by the steps taken, which are the same in all micro-batches of a window
        return self.generator(f"gates/{kernel}", self.progress.counts[self._optimizer_of[kernel]].read())

    def batch_start(self, batch: int) -> None:
        self._in_batch = True
        # before the sample is written: what the user wrote since the last batch is over the median gates
        self.weights.absorb_if_written(self.params)
        self._sample(self.gated.members)

    def batch_end(self, end: BatchEnd) -> Figures:
        self._in_batch = False
        self.gated.after_batch()
        return {}

    # ------------------------------------------------------------------ the step

    def weights_in_step(self, step: Step) -> WeightsInStep:
        # gates are drawn anew at every step, so that any weight may take part in it: a step costs what a dense one costs
        every = {n: self.weights.size(n) for n in self.params}
        return WeightsInStep(every, every)

    def before_step(self, step: Step) -> None:
        for kernel in self._gated_in(step):
            gates_now = self._log_alpha(kernel)
            self._pulls[kernel] = self.gated.pull_back(kernel, gates_now, self.l2, step.finite_flag is True)

    def _gated_in(self, step: Step) -> list[str]:
        """Names of the gated kernels that the step's optimizer owns."""
        return [n for n in step.names if n in self.gated.members]

    def after_step(self, step: Step) -> Update | None:
        kernels, rates = self._gated_in(step), Rates(self.gate_lr, self.dual_lr, self.gate_optimizer == "adam")
        finite = step.finite  # waits for the device, once
        if finite:
            # before the medians are taken: the gradients belong to the gates as they were in the step
            for constraint in (c for c in self._constraints if c.names[0] in kernels):
                constraint.step(self.aux, self._pulls, rates, self.gated.kept)
            for kernel in kernels:
                del self._pulls[kernel]  # not those of another optimizer, whose step was announced before this one
                self.gated.take_medians(kernel, self._log_alpha(kernel))
        # in manual optimization the batch may go on, with other steps
        if self._in_batch and not self.host.announces_steps:
            self._sample(kernels, finite)
        else:
            self.gated.write_medians(self.gated.parameters(kernels), finite)
        return None

    # ------------------------------------------------------------------ where it stands

    def _densities(self) -> list[tuple[Constraint, float]]:
        """Each constraint with its expected density; empty before the first fit."""
        return [(c, float(c.density(self.aux))) for c in self._constraints] if self.aux else []

    @property
    def at_target(self) -> bool:
        found = self._densities()
        return bool(found) and all(density <= c.target + TOLERANCE for c, density in found)

    def shortfall(self) -> str:
        name, by_layer, found = type(self).__name__, self.constraint == "layer", self._densities()
        if not found:  # the gates of a run in another process, whose members are found when a fit begins
            return f"{name} was trained in another process, and knows its expected density again in the next fit."
        return report.missed_in_words(name, found, by_layer, self.dual_lr)

    def outcome(self) -> dict[str, str]:
        found = self._densities()
        return {"expected density": report.densities_in_words(found, self.constraint == "layer")} if found else {}

    def figures(self) -> dict[str, float]:
        """Multipliers of the constraints, and of each layer and of all what gates leave.

        ``l0/multiplier/...`` are the multipliers (of the model: ``total``, with an index for each further optimizer),
        ``l0/expected/...`` the shares of parameters that are expected behind open gates, and ``l0/purged/...`` the shares that are
        left when those whose median gate is closed are removed.
        """
        if not self.aux:  # before the first fit there are no gates
            return {}
        expected = self.expected_open()
        purged = {n: self.weights.active_counts[n] / self.weights.size(n) for n in self.gated.members}
        labels = report.labels_of(self._constraints, self.constraint == "layer")
        multipliers = {label: self.aux[c.key] for label, c in zip(labels, self._constraints, strict=True)}
        return report.gate_figures(multipliers, expected, purged, self._shares())

    def expected_open(self) -> dict[str, float]:
        """The share of each kernel's parameters that is expected behind open gates: one wait for the device in all."""
        means = [gates.mean_open(self._log_alpha(n)) for n in self.gated.members]
        return dict(zip(self.gated.members, torch.stack([m.to(means[0].device) for m in means]).tolist(), strict=True))

    def expected_left(self) -> float:
        """The share of all parameters under gates that is expected behind open ones: one wait for the device."""
        return report.total_of(self.expected_open(), self._shares())

    def _shares(self) -> dict[str, float]:
        return shares_of(self.gated.sizes(self.gated.members))


@why_no_exchange.register
def _(method: ConstrainedL0) -> str:
    return "has a gate for every weight or channel, closed ones too, so sparse storage has nothing to save"
