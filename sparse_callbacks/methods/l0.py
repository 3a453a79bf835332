"""Constrained L0: gates that learn to close until no more than a wanted share of the parameters is expected behind open ones."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from numbers import Real
from typing import Any, ClassVar, Unpack

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks import gates
from sparse_callbacks.callback import Options, SparsityCallback
from sparse_callbacks.ops import zeros_for
from sparse_callbacks.plan import Plan
from sparse_callbacks.selection import Entry
from sparse_callbacks.tied import Tied, by_glob, find_tied, refuse_decay

Densities = float | Mapping[str, float]
CHOICES = {"constraint": ("model", "layer"), "unit": ("channel", "weight"), "gate_optimizer": ("sgd", "adam")}
TOLERANCE = 0.03  # expected densities hover about their targets
LEAST = float(gates.p_open(torch.tensor(-gates.LIMIT)))


class ConstrainedL0(SparsityCallback):
    """Constrained L0: hard-concrete gates close under a Lagrangian until E[L0] meets its target (Gallego-Posada et al., 2022).

    With dense weights w, a sample z of the gates (see :mod:`~sparse_callbacks.gates`) and multipliers m >= 0, in each optimizer step::

        defect    = E[share of parameters behind open gates] - density          for the model, or for each layer
        w         = w - optimizer(z * gradient of the loss at z * w + l2 * P(open) * w)
        log_alpha = clip(log_alpha - gate_optimizer(gradient of loss + m * defect), -log 100, log 100)
        m         = 0 if defect < 0, else m + dual_lr * defect

    The weights hold ``median gate * w`` whenever a batch is over, and the sample from a batch's start to its end: one sample for all
    examples, the same through an accumulation window and on every rank. Dense weights, gates and multipliers live in this callback.
    Memory for channels: one dense copy and a mask; for weights also the gates, their medians and, within a batch, a sample.

    A convolution's gate closes an output channel whole: its bias has the same gate, and a batch norm registered right behind the
    convolution gives 0 there, in training too, and takes no statistics from it. A layer whose gates would all close keeps the likeliest
    one, with its P(open) as the gate's value.

    Differs from the paper: single biases get no gates with ``unit="weight"``; parameters without gates have the optimizer's own weight
    decay in place of expected L2; the norm is a plain batch norm whose gain and shift are closed with the channel.

    Args:
        density: target share of parameters behind open gates, at least 0.0472 (gates cannot close further), or ``{glob: share}``,
            the first match for each layer (``constraint="layer"``).
        constraint: ``"model"``: one for all gated parameters (of each optimizer); ``"layer"``: one for each.
        unit: ``"channel"``: a gate for each input unit of a matrix and for each output channel of a convolution; ``"weight"``.
        droprate: of new gates, in [0.01, 0.99], or ``{glob: droprate}``; weights grow by 1 / (1 - droprate) to make up for it.
        gate_lr, dual_lr: learning rates of gates and multipliers; they are not scheduled.
        gate_optimizer: ``"sgd"`` or ``"adam"``.
        l2: coefficient of the expected squared norm over 2; the optimizer's own weight decay of gated parameters must be 0 then.
        include, exclude, seed, **options: see :class:`SparsityCallback`.

    Raises:
        ValueError: arguments out of range, or a model, optimizer or checkpoint that does not fit; before the first batch.

    Example:
        >>> from sparse_callbacks.methods.l0 import ConstrainedL0
        >>> ConstrainedL0(density=0.25, constraint="layer").target_sparsity
        0.75

    Reference: Gallego-Posada, Ramirez, Erraqabi, Bengio, Lacoste-Julien: Controlled Sparsity via Constrained Optimization. NeurIPS 2022.
    """

    keeps_dense: ClassVar[bool] = True
    plans_counts: ClassVar[bool] = False

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
        if "sparsity" in options:
            raise ValueError(
                f"sparsity= is no argument of {type(self).__name__}, whose gates meet a target in expectation. Give "
                "density=, the share of parameters that stay: 0.1 for 90 % zeros."
            )
        super().__init__(0.0, distribution="uniform", include=include, exclude=exclude, seed=seed, **options)
        self.density, self.droprate = _plain(density), _plain(droprate)
        self.constraint, self.unit, self.gate_optimizer = constraint, unit, gate_optimizer
        self.gate_lr, self.dual_lr, self.l2 = gate_lr, dual_lr, l2
        self._refuse_arguments()
        self._targets_of: dict[str, float] = {}
        self._tied: dict[str, Tied] = {}
        self._groups: list[list[str]] = []
        """Kernels under one constraint."""
        self._owner: dict[str, int] = {}
        self._medians: dict[str, Tensor] = {}
        self._versions: dict[str, int] = {}
        self._forget_batch()

    def _refuse_arguments(self) -> None:
        for name, known in CHOICES.items():
            if (given := getattr(self, name)) not in known:
                raise ValueError(f"{name}={given!r} is not known. Give {' or '.join(map(repr, known))}.")
        ranges = {"density": (LEAST, 1.0), "droprate": (0.01, 0.99), "gate_lr": (0.0, None), "dual_lr": (0.0, None), "l2": (0.0, None)}
        for name, (low, high) in ranges.items():
            given = getattr(self, name)
            for value in given.values() if isinstance(given, Mapping) else [given]:
                number = isinstance(value, Real) and not isinstance(value, bool)
                if not number or not low <= float(value) <= (float("inf") if high is None else high):
                    most = "" if high is None else f" and at most {high:g}"
                    raise ValueError(f"{name}={given!r}: {value!r} is out of range. Give a number that is at least {low:.4g}{most}.")
        if isinstance(self.density, Mapping) and self.constraint == "model":
            raise ValueError(f"density={self.density!r} has a target for each layer. Use constraint='layer', or one number for the model.")

    def _forget_batch(self) -> None:
        self._samples: dict[str, Tensor] = {}
        self._pulls: dict[str, Tensor] = {}
        self._astray: set[str] = set()
        """Parameters that do not hold their median gates now."""
        self._statistics: list[tuple[Tensor, Tensor, Tensor]] = []

    # ------------------------------------------------------------------ what is gated

    @property
    def target_sparsity(self) -> float:
        if not isinstance(self.density, Mapping):
            return 1.0 - self.density
        if not self._targets_of:  # the layers are not known yet
            return 1.0 - max(self.density.values())
        return 1.0 - sum(self._targets_of[n] * share for n, share in self._shares(list(self._targets_of)).items())

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        chosen = [e for e in entries if not e.reason]
        targets = by_glob(self.density, [e.name for e in chosen], "density")
        return {layer: 1 - targets[e.name] for e in chosen for layer in e.layers}

    def parameter_zeros(self, entries: Sequence[Entry], targets: Mapping[str, float]) -> dict[str, int]:
        return {e.name: zeros_for(targets.get(e.layers[0], 0.0), e.size) for e in entries if not e.reason}

    def plan(self, model: nn.Module | None = None) -> Plan:
        plan = super().plan(model)
        tied = {} if model is None else self._tied_in(getattr(model, "_orig_mod", model), plan.selected)
        selected = plan.selected | {n for t in tied.values() for n in t.members}
        rows = [replace(r, zeros=None, reason="") if r.name in selected else r for r in plan]
        title = f"{type(self).__name__}: expected density {self.density} of the {self.constraint}"
        return replace(plan, title=title, rows=tuple(rows), selected=selected, joint=plan.zeros)

    def _tied_in(self, model: nn.Module, kernels: Iterable[str]) -> dict[str, Tied]:
        return find_tied(model, kernels) if self.unit == "channel" else {}

    def begin(
        self,
        model: nn.Module,
        entries: Sequence[Entry],
        targets: Mapping[str, float],
        optimizers: Sequence[Optimizer],
        gradients_read: Sequence[bool],
        state: Mapping[str, Any] | None,
    ) -> None:
        kernels = [e.name for e in entries if not e.reason]
        together = dict.fromkeys(kernels, Tied()) | self._tied_in(model, kernels)
        targets_of, rates = (by_glob(getattr(self, a), kernels, a) for a in ("density", "droprate"))
        members = {n for t in together.values() for n in t.members}
        found = [replace(e, reason="", shape=e.full_shape) if e.name in members else e for e in entries]
        decaying = {*together, *(n for t in together.values() for n in t.biases)}
        refuse_decay(optimizers, {id(p): n for n, p in model.named_parameters() if n in decaying}, self.l2)
        held = {n: self.store.dense(n) for n in self.store.hidden}
        super().begin(model, found, targets, optimizers, gradients_read, state)
        self._all_entries, self._tied, self._targets_of = found, together, targets_of
        owned = [[n for n in names if n in together] for names in self._ownership.owns]
        self._groups = [[n] for names in owned for n in names] if self.constraint == "layer" else [names for names in owned if names]
        self._owner = {n: index for index, names in enumerate(owned) for n in names}
        self._forget_batch()
        self._begin_gates(rates, held if state is None else state["dense"])

    def initial_masks(self) -> dict[str, Tensor]:
        return self.full(self.params)

    def _begin_gates(self, rates: Mapping[str, float], held: Mapping[str, Tensor]) -> None:
        """New gates where there are none yet, medians everywhere, and the dense weights that belong to them."""
        for kernel, tied in self._tied.items():
            new = f"log_alpha/{kernel}" not in self.aux
            if new:
                self._make_gates(kernel, rates[kernel])
            self._take_medians(kernel)
            for name in (kernel, *tied.members):
                dense = self.store.dense(name)
                if name in held and not new:
                    dense.copy_(gates.undone(self.params[name].detach(), self._medians[name], held[name].to(dense)))
                elif new and name not in tied.affine:
                    dense.div_(1 - rates[kernel])
        for names in self._groups:
            self.aux.setdefault(f"multiplier/{names[0]}", torch.zeros_like(self._log_alpha(names[0]).flatten()[0]))

    def _make_gates(self, kernel: str, droprate: float) -> None:
        weight, entry = self.params[kernel], self.store.entries[kernel]
        shape = weight.shape if self.unit == "weight" else gates.channel_shape(weight.shape, entry.transposed)
        noise = torch.randn(shape, generator=self.generator(f"log_alpha/{kernel}", 0), dtype=torch.float64)
        values = (gates.log_alpha_at(droprate) + 0.01 * noise).clamp_(-gates.LIMIT, gates.LIMIT)
        self.aux[f"log_alpha/{kernel}"] = values.to(weight.device, torch.promote_types(weight.dtype, torch.float32))

    # ------------------------------------------------------------------ what the parameters hold

    def _log_alpha(self, kernel: str) -> Tensor:
        return self.aux[f"log_alpha/{kernel}"]

    def _factors(self, kernel: str, z: Tensor) -> dict[str, Tensor]:
        """What each parameter of a kernel's channels is multiplied by when its gates are ``z``."""
        tied = self._tied[kernel]
        per_channel = {n: z.flatten().repeat(self.params[n].numel() // z.numel()) for n in tied.members}
        return {kernel: z} | {n: (f != 0).to(f) if n in tied.affine else f for n, f in per_channel.items()}

    def _take_medians(self, kernel: str) -> None:
        """The masks and values of a kernel shall be those of its median gates; :meth:`_settle` writes them."""
        log_alpha = self._log_alpha(kernel)
        self._gate(kernel, gates.median(log_alpha))
        if not self.store.active[kernel]:  # a layer without a connection could not be run, nor made smaller
            self._gate(kernel, gates.likeliest(log_alpha))

    def _gate(self, kernel: str, z: Tensor) -> None:
        for name, factor in self._factors(kernel, z).items():
            self._medians[name] = factor
            self.store.gate(name, factor)
            self._astray.add(name)

    def _settle(self, names: Iterable[str], finite: bool = True) -> None:
        """Parameters hold their median gates."""
        for name in names:
            self.store.scale(name, self._medians[name])
            self._write(name, finite)
            self._astray.discard(name)

    def _write(self, name: str, finite: bool = True) -> None:
        self.store.apply([name], finite)
        self._versions[name] = self.params[name]._version

    def apply_masks(self, index: int | None = None) -> None:
        """Medians everywhere, or, when a step of the optimizer ``index`` is over, nothing yet: :meth:`after_step` writes them anyway."""
        if index is None:
            self._settle(self.params)
        else:
            self.store.put_back(self._ownership.steps[index])
            self._astray.update(self._ownership.steps[index])

    def noise(self, kernel: str) -> Tensor:
        """Uniform numbers in (0, 1) for the gates of the coming step: the same through a window, on every rank and after a resume."""
        like = self._log_alpha(kernel)
        source = self.generator(f"gates/{kernel}", self.progress.counts[self._owner[kernel]].read())
        if like.device.type != "cpu":  # numbers for single weights would take longer to carry over than to draw
            source = torch.Generator(like.device).manual_seed(source.initial_seed())
        return gates.noise(like, source)

    def batch_start(self) -> None:
        for kernel, tied in self._tied.items():
            if kernel not in self._samples:
                self._samples[kernel] = gates.sample(self._log_alpha(kernel), self.noise(kernel))
            for name, factor in self._factors(kernel, self._samples[kernel]).items():
                if self.params[name]._version != self._versions[name]:  # the user clamped weights, say
                    dense = self.store.dense(name)
                    dense.copy_(gates.undone(self.params[name].detach(), self._medians[name], dense))
                self.store.scale(name, factor)
                self._write(name)
                self._astray.add(name)
            for path in tied.norms:
                self._watch_statistics(path, self._samples[kernel].flatten() != 0)

    def after_batch(self) -> None:
        self._settle(list(self._astray))
        for buffer, kept, is_open in self._statistics:
            buffer.copy_(torch.where(is_open, buffer, kept))
        self._statistics = []

    def _watch_statistics(self, path: str, is_open: Tensor) -> None:
        """Keep what the batch norm ``path`` knows of closed channels: in this batch it sees zeros there."""
        model = self._model()
        assert model is not None
        norm = model.get_submodule(path)
        buffers = [b for b in (norm.running_mean, norm.running_var) if isinstance(b, Tensor)]
        self._statistics += [(b, b.clone(), is_open) for b in buffers]

    # ------------------------------------------------------------------ the step

    def before_step(self) -> None:
        for kernel in self._at_hand():
            z, affine = self._samples.get(kernel, self._medians[kernel]), self._tied[kernel].affine
            pulls = []
            for name, factor in self._factors(kernel, z).items():
                gradient, dense = self.params[name].grad, self.store.dense(name)
                if gradient is None:
                    continue
                if name not in affine:
                    pulls.append(gates.pull(gradient, dense, z))
                gradient.mul_(factor)
                if self.l2 and name not in affine:
                    gradient.addcmul_(dense, self._factors(kernel, gates.p_open(self._log_alpha(kernel)))[name], value=self.l2)
            self._pulls[kernel] = torch.stack(pulls).sum(0) if len(pulls) > 1 else pulls[0] if pulls else torch.zeros_like(z)

    def _at_hand(self) -> list[str]:
        return [n for n in self.names if n in self._tied]

    def after_step(self) -> None:
        kernels = self._at_hand()
        if self.finite:
            for names in (g for g in self._groups if g[0] in kernels):
                self._descend_and_ascend(names)
            for kernel in kernels:
                self._take_medians(kernel)
                self._samples.pop(kernel, None)
        self._settle([n for k in kernels for n in (k, *self._tied[k].members)], self.finite)

    def _shares(self, names: Sequence[str]) -> dict[str, float]:
        """Share of each kernel, with its biases, in the parameters of all ``names``."""
        sizes = {n: sum(self.params[m].numel() for m in (n, *self._tied[n].biases)) for n in names}
        return {n: size / sum(sizes.values()) for n, size in sizes.items()}

    def _target(self, names: Sequence[str]) -> float:
        return self._targets_of[names[0]]

    def _density(self, names: Sequence[str]) -> Tensor:
        return gates.expected_density([self._log_alpha(n) for n in names], self._shares(names).values())

    def _descend_and_ascend(self, names: Sequence[str]) -> None:
        """Gates and multiplier of one constraint step at once, each from the other's old value."""
        key = f"multiplier/{names[0]}"
        multiplier, defect = self.aux[key], self._density(names) - self._target(names)
        for name, share in self._shares(names).items():
            log_alpha, pull = self._log_alpha(name), self._pulls.pop(name)
            gradient = gates.p_slope(log_alpha).mul_(multiplier * (share / log_alpha.numel())).add_(pull)
            self.aux[f"log_alpha/{name}"] = (
                self._along(name, gradient).mul_(-self.gate_lr).add_(log_alpha).clamp_(-gates.LIMIT, gates.LIMIT)
            )
        self.aux[key] = gates.ascend(multiplier, defect, self.dual_lr)

    def _along(self, name: str, gradient: Tensor) -> Tensor:
        """What the gates step along, down."""
        if self.gate_optimizer == "sgd":
            return gradient
        state = [f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq", "gate_steps")]
        mean, square = (self.aux.setdefault(k, torch.zeros_like(gradient)) for k in state[:2])
        step = self.aux.setdefault(state[2], torch.zeros_like(gradient.flatten()[0])).add_(1)
        mean.lerp_(gradient, 1 - gates.BETAS[0])
        square.mul_(gates.BETAS[1]).addcmul_(gradient, gradient, value=1 - gates.BETAS[1])
        return gates.adam(mean, square, step)

    # ------------------------------------------------------------------ where it stands

    @property
    def at_target(self) -> bool:
        return bool(self.aux) and all(float(self._density(names)) <= self._target(names) + TOLERANCE for names in self._groups)

    def shortfall(self) -> str:
        found = {names[0]: float(self._density(names)) for names in self._groups}
        worst = max(self._groups, key=lambda names: found[names[0]] - self._target(names))
        where = worst[0] if self.constraint == "layer" else "the model"
        return (
            f"{type(self).__name__} ended at an expected density of {found[worst[0]]:.4f} in {where}, above its target of "
            f"{self._target(worst):.4f}: the multipliers had too little time. Train longer, or raise dual_lr= (now {self.dual_lr:g})."
        )

    def outcome(self) -> dict[str, str]:
        found = [(names[0], float(self._density(names)), self._target(names)) for names in self._groups]
        each = [f"{density:.4f} (target {target:g})" for _, density, target in found]
        several = len(found) > 1
        return {"expected density": "\n".join(f"{n} {text}" for (n, _, _), text in zip(found, each, strict=True)) if several else each[0]}

    def figures(self) -> dict[str, float]:
        """Multipliers (of the model: ``total``, with an index for each further optimizer), and for each layer and in all the share of
        parameters that is expected behind open gates, and the share that is left when those with a closed median are purged."""
        expected = {n: float(gates.mean_open(self._log_alpha(n))) for n in self._tied}
        purged = {n: self.store.active[n] / self.store.size(n) for n in self._tied}
        shares = self._shares(list(self._tied))
        labels = (
            [g[0] for g in self._groups] if self.constraint == "layer" else ["total", *(f"total_{i}" for i in range(1, len(self._groups)))]
        )
        found = {f"l0/multiplier/{k}": float(self.aux[f"multiplier/{g[0]}"]) for k, g in zip(labels, self._groups, strict=True)}
        for kind, of in (("expected", expected), ("purged", purged)):
            found |= {f"l0/{kind}/{n}": v for n, v in of.items()} | {f"l0/{kind}/total": sum(v * shares[n] for n, v in of.items())}
        return found


def _plain(value: Densities) -> Densities:
    return dict(value) if isinstance(value, Mapping) else value
