"""GMP: gradual magnitude pruning, from dense to the target along a cubic."""

from collections.abc import Mapping, Sequence
from typing import ClassVar, Unpack

from torch import Tensor

from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.joint_thresholds import are_joint, joint_masks, may_empty, renews_thresholds
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.ops import keep_largest, zeros_for
from sparse_callbacks.core.pattern_arguments import kept_pattern
from sparse_callbacks.core.pattern_names import asked_nm
from sparse_callbacks.core.patterns import reached_targets
from sparse_callbacks.core.schedules import Schedule
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.shards import count_of, size_of
from sparse_callbacks.core.state_claims import Zeros, possible_zeros
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.targets import on_the_way
from sparse_callbacks.core.thawed import by_step, masks_by_magnitude
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.towards_pattern import (
    curve_towards,
    figures_towards,
    mask_towards,
    possible_zeros_towards,
)


class GMP(Method):
    """GMP, gradual magnitude pruning: from dense to the target along a cubic (Zhu and Gupta, 2017).

    Every ``every`` steps, and at ``stop``, layer by layer::

        s_t  = s_f + (s_0 - s_f) * (1 - (t - start) / (stop - start))^3
        keep  the active weights with the largest |w|, all but floor(s_t * size)

    A pruned weight does not come back. With a distribution other than uniform each layer rises to its own target in the
    same proportion; with ``"global"`` and ``"lamp"`` every update takes one threshold over all layers (of each optimizer,
    where there are several). The mask for step t is made from the weights after step t - 1.

    With ``pattern="2:4"`` the network arrives at 2 of every 4 inputs: on the way the floor(s_t * size) smallest go among the
    weights that are not among the 2 largest active ones of their group; with ``"transposable 2:4"`` among those that the
    transposable mask of |w| leaves out, all of which go in the end, also where that are a few more than planned. With
    ``pattern="fan_in"`` they are those that are not among the k largest of their row, the weights of one output unit; with
    ``pattern="fan_in/64"`` those outside the k inputs of every 64 rows with the largest sums of magnitudes.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN).

    Differs from the paper: the default distribution leaves no layer dense by itself (``keep_dense="both"`` does);
    pruned weights hold zero at once and receive no update.

    Args:
        sparsity: a number is the target, reached along the cubic; a schedule or its text (``"linear(0, 0.9)"``) is
            taken as it is, and only ``"constant(0.9)"`` prunes at once. None: 0.9, or what ``pattern`` fixes.
        distribution: how layers share the sparsity: a name such as ``"uniform"``, a mapping ``{glob: sparsity or name}``, a callable
            or an object; see :class:`~sparse_callbacks.core.method.Method`.
        every: optimizer steps (int) or fraction of the run (float) between updates; None: 100, shortened, with a
            message, in short runs.
        start: when the curve begins, in optimizer steps (int) or as a fraction of the run (float).
        stop: when the curve ends, in the same units.
        pattern: ``"unstructured"``, or None; ``"N:M"``: of every M consecutive inputs (of a convolution, input channels at a
            position of the kernel) N are kept; ``"transposable N:M"``: of every M outputs of an input too. The target is then
            1 - N/M, in each layer that divides; the others stay dense. With it ``distribution`` has its default. ``"fan_in"``:
            each output unit of a layer has as many inputs, k = floor(density * inputs), at least 1. ``"fan_in/64"``: in linear
            layers every 64 consecutive rows read the same inputs, k = round(density * inputs), at least 1.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, or a model, optimizer or checkpoint that does not fit; before the first
            batch.

    Example:
        >>> from sparse_callbacks import GMP
        >>> GMP(sparsity="linear(0.5, 0.9)").target_sparsity
        0.9

    Reference: Zhu, Gupta: To prune, or not to prune: exploring the efficacy of pruning for model compression.
    arXiv 1710.01878, 2017, equation 1.
    """

    schedulable: ClassVar[str] = "sparsity"
    arrives_at_stop: ClassVar[bool] = True

    def __init__(
        self,
        sparsity: float | str | Schedule | None = None,
        *,
        distribution: Distribution = "uniform",
        every: Time | None = None,
        start: Time = 0,
        stop: Time = 0.75,
        pattern: str | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        self.pattern = kept_pattern(pattern)
        self._curve = curve_towards(self, sparsity, distribution)
        # the base plans for the end of the curve: its counts are what the last update leaves
        super().__init__(
            self._curve.final, distribution=distribution, include=include, exclude=exclude, seed=seed, **options
        )
        if self._curve.initial > self._curve.final:
            raise ValueError(
                f"sparsity={sparsity!r} falls, and pruned weights do not come back. Give a curve that rises."
            )
        # as given, since a resumed run compares it as an argument
        self.sparsity = self._curve.final if sparsity is None else sparsity
        self.set_times(every, start, stop)

    @property
    def target_sparsity(self) -> float:
        return self._curve.final

    def sparsity_at(self, number: int) -> float:
        """The sparsity s_t that the curve asks for, over all selected weights.

        Args:
            number: gradient steps that were taken.
        """
        # equation 1, unless a schedule was given
        return self._curve(number, self.times.start, self.times.stop)

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        if self.pattern is None:
            return super().share_out(entries)
        # under N:M every layer has that share, and nothing is shared out
        return reached_targets(self, {} if asked_nm(self) is not None else super().share_out(entries), entries)

    def initial_masks(self) -> dict[str, Tensor]:
        way = self._curve.way(0, 0, 1)
        dense = [self.weights.all_active(names) for names in self.owners.owns if names]
        return {n: mask for masks in dense for n, mask in self._pruned(masks, self._curve.initial, way).items()}

    def after_step(self, step: Step) -> Update | None:
        return self.new_masks(step) if step.due else None

    def new_masks(self, step: Step) -> Update:
        current = {name: self.weights.masks[name] for name in step.names}
        masks = self._pruned(current, *self._at(step.number))
        return Update(masks, figures_towards(self, masks))

    def _at(self, number: int) -> tuple[float, float]:
        """s_t after ``number`` gradient steps, and the part of the curve's way that is done."""
        return self.sparsity_at(number), self._curve.way(number, self.times.start, self.times.stop)

    def _pruned(self, masks: Mapping[str, Tensor], sparsity: float, way: float) -> dict[str, Tensor]:
        """``masks`` with the smallest weights taken out, under a threshold that layers share or layer by layer, until each is
        as far on the way to its own target as ``sparsity`` is on that of all weights."""
        joint: dict[str, Tensor] = {}
        if are_joint(self):
            both = {x: t for n in masks for x, t in self.weights.layers(n, self.params[n].detach(), masks[n])}
            weights, active = {x: w for x, (w, _) in both.items()}, {x: m for x, (_, m) in both.items()}
            joint = joint_masks(self, masks, weights, sparsity, active)

        def prune(layer: str, mask: Tensor, weight: Tensor) -> Tensor:
            if layer in joint:
                return joint[layer]
            share = on_the_way(self.targets[layer], sparsity, self.target_sparsity, way)
            towards = mask_towards(self, layer, weight, share, mask)
            if towards is not None:
                return towards
            zeros = zeros_for(share, size_of(weight))
            # a run that goes on longer steps back along its curve: the mask then has fewer than planned, and keeps them
            return keep_largest(weight, min(count_of(mask), size_of(weight) - zeros), among=mask)

        return {n: self.weights.by_layer(n, prune, mask, self.params[n].detach()) for n, mask in masks.items()}


@possible_zeros.register
def _(method: GMP, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    if not are_joint(method):
        return possible_zeros_towards(method, saved, planned)
    size = {n: saved.masks[n].numel() for n in planned}
    each = [Zeros((n,), range(size[n] + may_empty(method))) for n in planned]
    total = zeros_for(method.target_sparsity, sum(size.values()))
    return [*each, Zeros(tuple(planned), range(total + 1))] if isinstance(method.distribution, str) else each


@renews_thresholds.register
def _(method: GMP) -> bool:
    return True


@masks_by_magnitude.register
def _(method: GMP, names: Sequence[str]) -> dict[str, Tensor]:
    masks: dict[str, Tensor] = {}
    for number, mine in by_step(method, names):
        masks |= method._pruned(method.weights.all_active(mine), *method._at(number))
    return masks


@why_no_exchange.register
def _(method: GMP) -> str:
    return "starts dense and prunes step by step, so sparse storage has nothing to save before its last update"
