"""NM: N:M sparsity of dense weights that learn on."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from sparse_callbacks.core.arguments import refuse_unknown
from sparse_callbacks.core.calendar import NO_END, Calendar, RunLength, Time, check_times, resolve_times
from sparse_callbacks.core.dense_copy import undone
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.nm_layers import GROUPS_CHANGED, inputs_axis
from sparse_callbacks.core.nm_masks import in_groups, nm_mask
from sparse_callbacks.core.patterns import reached_targets
from sparse_callbacks.core.schedules import to_steps
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.thawed import by_step, masks_by_magnitude
from sparse_callbacks.core.topology import Update
from sparse_callbacks.core.transposable import transposable_mask
from sparse_callbacks.methods.nm.nm_arguments import (
    asked_of_nm,
    refuse_beside_soft,
    refuse_other_targets,
    refuse_pruned_decay,
    refuse_ramp,
)
from sparse_callbacks.methods.nm.soft_projection import scale_of, soft_factors

DECAY = 2e-4
PROJECTIONS = ("hard", "soft")
SCALE, CHANGED = "scale", "changed"
"""Keys in ``aux``, before the name of a parameter: of its beta, and of how many groups the latest step of the soft projection changed."""


class NM(Method):
    """N:M sparsity: the masked network computes the gradient, the dense one takes the step (SR-STE, Zhou et al., 2021).

    With dense weights w, mask m and optimizer step t::

        every k steps    m = the N largest |w| of every M consecutive inputs, with k = every
        every step       w = w - optimizer(gradient of the loss at m * w, + decay * (1 - m) * w)

    The gradient is not masked (straight-through), and the decay of pruned weights is part of it, so momentum sees both. The
    mask of a step is that of the dense weights before its forward pass: refreshes fall before steps 0, ``every``, 2 *
    ``every``, and where a ramp ends. Between optimizer steps the model holds ``m * w``: validation, checkpoints and export see the
    N:M network. The dense weights live in this callback: one copy, beside a bool and a float mask. Groups of a convolution run
    along its input channels at a fixed position of the kernel. Layers whose inputs (of a transposable pattern: outputs too) M does not
    divide stay dense, and the plan says so.

    ``projection="soft"`` (S-STE): w goes into the forward pass as beta * sign(w) * max(|w| - t, 0), where t is the
    (M - N)-th smallest |w| of the group, so that no weight jumps; ``beta = <w, S> / ||S||^2`` of each tensor, with S the
    projection without beta, is fixed before the first step. The gradient is passed straight through and nothing decays.

    Passes over the weights in a step: 3 in place (the mask on the dense weights, into the other buffer; the decay of
    pruned weights, of two) and 1 that reads (gradients, for inf and NaN). A refresh, or the soft projection, comes on top: its
    passes grow with M.

    Differs from the paper: none of SR-STE. A transposable mask (Hubara et al., 2021) has at most N in each row
    and column of a tile, found exactly up to M = 4 and greedily above, where the paper has exactly N by a min-cost
    flow; it keeps SR-STE's decay. Of S-STE its scaling of gradients in half precision is left to the Trainer.

    Args:
        pattern: ``"2:4"``, other whole numbers N:M with N below M, or ``"transposable 2:4"``, which is N:M along the outputs too.
            It fixes the sparsity, 1 - N/M.
        every: optimizer steps (int) or fraction of the run (float) between masks; None: 1, of a transposable pattern
            40, shortened, with a message, in short runs. The soft projection moves in every step.
        decay: of pruned weights: decay * w is added to their gradients; None: 2e-4, the published one of SR-STE, and
            0 of the soft projection, which has none.
        ramp: when N is reached, in the units of ``every``: N falls from M by one at equal intervals until then, each
            fall with the next refresh. None: N from the first step on.
        projection: ``"hard"``, a mask; or ``"soft"``.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number; nothing here is random.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, a model of which no layer fits, or an optimizer or checkpoint that does not fit;
            before the first batch.

    Example:
        >>> from sparse_callbacks import NM
        >>> NM("1:4", ramp=0.5).target_sparsity
        0.75

    Reference: Zhou, Ma, Zhu, Liu, Zhang, Yuan, Sun, Li: Learning N:M Fine-grained Structured Sparse Neural Networks From
    Scratch. ICLR 2021. Hubara, Chmiel, Island, Banner, Naor, Soudry: Accelerated Sparse Neural Training: A Provable and
    Efficient Method to Find N:M Transposable Masks. NeurIPS 2021. Hu, Zhu, Chen: S-STE: Continuous Pruning Function for
    Efficient 2:4 Sparse Pre-training. NeurIPS 2024.
    """

    published_every: ClassVar[int] = 1
    published_transposable: ClassVar[int] = 40
    arrives_at_stop: ClassVar[bool] = True
    first_update: ClassVar[int] = 0  # the refresh of step 0 is the initial mask
    keeps_dense: ClassVar[bool] = True

    def __init__(
        self,
        pattern: str = "2:4",
        *,
        every: Time | None = None,
        decay: float | None = None,
        ramp: Time | None = None,
        projection: str = "hard",
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        self._asked = asked_of_nm(pattern)
        refuse_other_targets(options, self._asked, type(self).__name__)
        super().__init__(self._asked.sparsity, include=include, exclude=exclude, seed=seed, **options)
        refuse_unknown({"projection": projection}, {"projection": PROJECTIONS})
        check_times(0, 1.0, every)  # whether it fits the run shows when that begins
        refuse_ramp(ramp)
        refuse_pruned_decay(decay)
        if projection == "soft":
            refuse_beside_soft(self._asked, every, decay, ramp)
        self.pattern, self.decay, self.ramp, self.projection = pattern, decay, ramp, projection
        self.every, self.start, self.stop = every, 0, 0 if ramp is None else ramp
        # by parameter name, of the soft projection: its factors, and whether the step that is being taken has finite gradients
        self._soft: dict[str, Tensor] = {}
        self._finite: dict[str, Tensor | bool] = {}

    # ------------------------------------------------------------------ what a user reads

    @property
    def has_full_groups(self) -> bool:
        """Whether every group has N active weights at the end: a tile may have fewer, and so may a soft group."""
        return self.projection == "hard" and not self._asked.transposable

    @property
    def at_target(self) -> bool:
        if not self.masks or self.calendar is None:
            return False
        # between runs no optimizer owns anything: then those that the steps were counted for
        owners = [i for i, names in enumerate(self.owners.owns) if names] or list(self.progress.counts)
        return all(self.progress.done.get(i, 0) >= self.calendar.stop for i in owners)

    def shortfall(self) -> str:
        return (
            f"{type(self).__name__} ended with {self.active_at(self.step)}:{self._asked.m} active weights in groups, before its pattern "
            f"{self.pattern!r}: {self.step} steps were taken and the ramp ends at step {self.times.stop}. Train longer, or "
            "give an earlier ramp=."
        )

    def active_at(self, number: int) -> int:
        """The most active weights that a group may have: N, and more on the ramp.

        Args:
            number: gradient steps that were taken.
        """
        n, m = self._asked.n, self._asked.m
        if self.ramp is None:
            return n
        if not number:  # the first masks are made before the calendar
            return m
        if number >= self.times.stop:
            return n
        refreshed = number - number % self.times.every
        return max(n, m - refreshed * (m - n) // max(1, self.times.stop))

    def figures(self) -> dict[str, float]:
        found = {"n": float(self.active_at(self.step))} if self.calendar is not None else {}
        if self.weights.copied:
            found["pruned_dense_norm"] = self._norm_of_pruned()
        return self.own_figures(**found) | self._changed_softly()

    def _changed_softly(self) -> dict[str, float]:
        """The share of groups that the latest step of the soft projection changed, which moves without updates."""
        counts = {n: t for n in self.weights.copied if (t := self.aux.get(f"{CHANGED}/{n}")) is not None}
        groups = sum(self.weights.size(n) for n in counts) // self._asked.m
        changed = sum(float(t) for t in counts.values())
        return {GROUPS_CHANGED: changed / groups} if self.projection == "soft" and counts else {}

    # ------------------------------------------------------------------ plan and calendar

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        return reached_targets(self, {}, entries)

    def make_calendar(self, run: RunLength) -> Calendar:
        end = 0 if self.ramp is None else self.ramp
        last = end if isinstance(end, int) else to_steps(end, run.total(), "ramp")
        every = self._interval(run)
        if self.projection == "hard" and every > run.total():
            self.host.inform(
                f"every={every} is longer than the run ({run.total():g} steps), so the first masks stay. Give a smaller every= for masks "
                "that follow the dense weights."
            )
        return Calendar(every, 0, last, final=True, until=NO_END)

    def _interval(self, run: RunLength) -> int:
        """Optimizer steps between masks."""
        if isinstance(self.every, int):
            return self.every
        if self.every is None and not self._asked.transposable:
            return self.published_every
        if self.every is not None:
            return max(1, to_steps(self.every, run.total(), "every"))
        if run.total() == math.inf:
            return self.published_transposable
        whole = RunLength(run.total, run.epoch, lenient=True)  # the shortest run has a mask in each step
        return resolve_times(None, 0, 1.0, self.published_transposable, whole, inform=self.host.inform).every

    # ------------------------------------------------------------------ the method

    def initial_masks(self) -> dict[str, Tensor]:
        return {name: self._mask(name, p.detach(), 0) for name, p in self.params.items()}

    def start_copies(self, dense: Mapping[str, Tensor], new: Iterable[str]) -> None:
        new = list(new)
        super().start_copies(dense, new)
        self._soft, self._finite = {}, {}
        for name in self.weights.copied if self.projection == "soft" else ():
            values = self.weights.dense_values(name)
            if name in new:
                self.aux[f"{SCALE}/{name}"] = scale_of(values, self._asked.n, self._asked.m, self._axis(name))
            elif name in dense:
                # the base takes active weights from the parameter, which has shrunk ones, and may have been written to
                held = dense[name].to(values)
                values.copy_(undone(self.params[name].detach(), self._factors(name, held), held))

    def before_step(self, step: Step) -> None:
        super().before_step(step)  # masks no gradients: every parameter has a dense copy
        if self.projection == "soft":
            # used up by write(), which follows the step: one that is not finite moves no mask
            self._finite.update(dict.fromkeys(step.names, step.finite_flag))
        elif decay := DECAY if self.decay is None else self.decay:
            self._decay_pruned(step, decay)

    def _decay_pruned(self, step: Step, decay: float) -> None:
        """Add ``decay`` times the dense values to the gradients of pruned weights."""
        for name in step.names:
            gradient = self.params[name].grad
            if gradient is not None and self.weights.active_counts[name] < self.weights.size(name):
                memory = self.weights.scratch.like("pruned", self.weights.dense_values(name))
                gradient.add_(self.weights.dense_at_pruned(name, memory), alpha=decay)

    def after_step(self, step: Step) -> Update | None:
        return self.new_masks(step) if self.projection == "hard" and step.due else None

    def new_masks(self, step: Step) -> Update:
        return Update({n: self._mask(n, self.weights.dense_values(n), step.number) for n in step.names})

    def write(self, names: Sequence[str] | None, finite: bool) -> None:
        if self.projection == "soft":
            copied = [n for n in (self.params if names is None else names) if self.weights.has_copy(n)]
            self.weights.swap_out(copied)
            for name in copied:
                self._project(name)
        super().write(names, finite)

    def _project(self, name: str) -> None:
        """Take the factors of the soft projection from the dense values of a parameter."""
        before, finite = self._soft.get(name), self._finite.pop(name, True)
        if before is not None and finite is False:
            return
        factors = self._factors(name, self.weights.dense_values(name))
        if before is not None:
            if isinstance(finite, Tensor):  # nobody has waited for it yet
                factors = torch.where(finite, factors, before)
            moved = in_groups((before != 0) != (factors != 0), self._asked.m, self._axis(name))
            # in aux: a callback that describes the network of a checkpoint has the figures of its run
            self.aux[f"{CHANGED}/{name}"] = moved.any(-1).sum()
        self._soft[name] = factors
        self.weights.set_factor(name, factors)

    def _mask(self, name: str, weight: Tensor, number: int) -> Tensor:
        """The mask of a parameter after ``number`` gradient steps, by its dense values."""
        asked, axis, magnitudes = self._asked, self._axis(name), weight.abs()
        if self.projection == "soft":
            return soft_factors(weight, torch.ones(()), asked.n, asked.m, axis) != 0
        choose = transposable_mask if asked.transposable else nm_mask
        # in the memory order of the weight: what reads mask and weight together is then fast
        found = choose(magnitudes, self.active_at(number), asked.m, axis)
        mask = torch.empty_like(weight, dtype=torch.bool)
        return mask.copy_(found)

    def _factors(self, name: str, dense: Tensor) -> Tensor:
        return soft_factors(dense, self.aux[f"{SCALE}/{name}"], self._asked.n, self._asked.m, self._axis(name))

    def _axis(self, name: str) -> int:
        return inputs_axis(self.weights.entries[name])

    def _norm_of_pruned(self) -> float:
        """L2 norm of the dense values of all pruned weights."""
        weights = self.weights
        norms = [
            torch.linalg.vector_norm(weights.at_pruned(n, weights.dense_values(n)).float()) for n in weights.copied
        ]
        return float(torch.linalg.vector_norm(torch.stack([norm.cpu() for norm in norms])))


@masks_by_magnitude.register
def _(method: NM, names: Sequence[str]) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for number, mine in by_step(method, names):
        masks |= {n: method._mask(n, method.params[n].detach(), number) for n in mine}
    return masks


@why_no_exchange.register
def _(method: NM) -> str:
    return "trains the pruned weights on, in a dense copy, so sparse storage has nothing to save"
