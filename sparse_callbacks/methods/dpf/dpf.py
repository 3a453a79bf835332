"""DPF: dynamic pruning with feedback."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import ClassVar, Unpack

import torch
from torch import Tensor

from sparse_callbacks.core.allocations.by_weight import GLOBAL
from sparse_callbacks.core.calendar import NO_END, Calendar, RunLength, Time
from sparse_callbacks.core.distributions import Distribution, reads_weights
from sparse_callbacks.core.joint_thresholds import joint_masks, renews_thresholds
from sparse_callbacks.core.method import Method, Options
from sparse_callbacks.core.ops import keep_largest, zeros_for
from sparse_callbacks.core.pattern_arguments import kept_pattern
from sparse_callbacks.core.pattern_names import FanIn, asked_nm, asked_pattern
from sparse_callbacks.core.patterns import reached_targets
from sparse_callbacks.core.schedules import Schedule, to_steps
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.shards import layout_of, size_of
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.targets import on_the_way
from sparse_callbacks.core.thawed import by_step, masks_by_magnitude
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.dpf import filters
from sparse_callbacks.methods.towards_pattern import curve_towards, figures_towards, mask_towards

UNITS = ("weight", "filter")


class DPF(Method):
    """DPF, dynamic pruning with feedback: pruned weights learn on and may come back (Lin et al., 2020).

    The pruned network computes the gradient, and the dense one takes the step. With dense weights w, mask m and optimizer step t::

        every 16 steps   s_t = s_f + (s_0 - s_f) * (1 - (t - start) / (stop - start))^3
                         m   = the weights with the largest |w|, all but floor(s_t * size), jointly over all layers
        every step       w   = w - optimizer(gradient of the loss at m * w)

    The gradient is not masked, so a pruned weight goes on to learn, and comes back once it is among the largest.
    Between optimizer steps the model holds ``m * w``: validation, checkpoints and export see the pruned network. The
    dense weights live in this callback: one copy, beside a bool and a float mask. With ``finetune`` the masks freeze at
    that time, the dense weights are dropped, and gradients are masked from then on, also where a longer run would have
    it start later.

    With ``pattern="2:4"`` the network arrives at 2 of every 4 inputs: on the way the floor(s_t * size) smallest dense weights
    are pruned among those that are not among the 2 largest of their group; with ``"transposable 2:4"`` among those that the
    transposable mask of |w| leaves out, all of which are in the end, also where that are a few more than planned. With
    ``pattern="fan_in"`` they are those that are not among the k largest of their row, the weights of one output unit; with
    ``pattern="fan_in/64"`` those outside the k inputs of every 64 rows with the largest sums of magnitudes.

    What you write into the weights between steps is kept if torch sees it (``with torch.no_grad(): p.clamp_(...)``); a
    write past autograd, ``p.data.clamp_(...)``, is undone by the next step.

    Passes over the weights in a step: 1 in place (the mask on the dense weights, into the
    other buffer) and 1 that reads (gradients, for inf and NaN).

    Differs from the paper: no code was published. Every default is a reading of the paper and of a third-party port;
    that port prunes one weight more than asked. Biases and norms are never pruned; each layer keeps at least one
    weight. Refreshes go on every 16 steps until fine-tuning starts, or to the end, where the port stops with the curve.

    Args:
        sparsity: a number is the target, reached along the cubic; a schedule or its text (``"linear(0, 0.9)"``) is
            taken as it is, and ``"constant(0.9)"`` prunes from the start. None: 0.9, or what ``pattern`` fixes.
        distribution: ``"global"``: one threshold over all selected weights (of each optimizer, where there are
            several); ``"lamp"``: the same over scores; both are taken anew at each refresh. Otherwise one for each layer,
            which rises to its own target in the same proportion (name, ``{glob: sparsity or name}``, callable or object;
            see :class:`~sparse_callbacks.core.method.Method`).
        every: optimizer steps (int) or fraction of the run (float) between refreshes; None: 16, shortened, with a
            message, in short runs.
        start: when the curve begins, in optimizer steps (int) or as a fraction of the run (float).
        stop: when the curve ends, in the same units.
        finetune: when the masks freeze, in the same units, at ``stop`` or later; None: never.
        unit: ``"weight"``, or ``"filter"``: output channels are pruned as a whole, those with the smallest L2 norm
            first, as many as fit the target (floor(s * filters) of a layer; with ``"global"`` no more than floor(s *
            size) weights). The network's outputs are channels too: leave them alone with ``keep_dense="last"``. A pattern
            keeps single weights, so ``"filter"`` has none.
        pattern: as in :class:`~sparse_callbacks.GMP`. ``"fan_in"`` and ``"fan_in/64"`` have a share of each layer, so beside them
            the default ``distribution="global"`` is ``"uniform"``; ``"lamp"`` is refused.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number; nothing here is random.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, or a model, optimizer or checkpoint that does not fit; before the first
            batch.

    Example:
        >>> from sparse_callbacks import DPF
        >>> DPF(sparsity=0.95, finetune=0.9).target_sparsity
        0.95

    Reference: Lin, Stich, Barba, Dmitriev, Jaggi: Dynamic Model Pruning with Feedback. ICLR 2020, algorithm 1.
    """

    schedulable: ClassVar[str] = "sparsity"
    arrives_at_stop: ClassVar[bool] = True
    published_every: ClassVar[int] = 16
    first_update: ClassVar[int] = 0  # the refresh of step 0 is the initial mask
    keeps_dense: ClassVar[bool] = True

    def __init__(
        self,
        sparsity: float | str | Schedule | None = None,
        *,
        distribution: Distribution = GLOBAL,
        every: Time | None = None,
        start: Time = 0,
        stop: Time = 0.75,
        finetune: Time | None = None,
        unit: str = "weight",
        pattern: str | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        self.pattern = kept_pattern(pattern)
        if distribution == GLOBAL and isinstance(asked_pattern(self), FanIn):
            distribution = "uniform"  # under one threshold over all layers none would have a fan-in of its own
        self._curve = curve_towards(self, sparsity, distribution)
        super().__init__(
            self._curve.final, distribution=distribution, include=include, exclude=exclude, seed=seed, **options
        )
        if unit not in UNITS:
            raise ValueError(f"unit={unit!r} is not known. Give 'weight', or 'filter' to prune whole output channels.")
        named = self.distribution.values() if isinstance(self.distribution, Mapping) else [self.distribution]
        if unit == "filter" and (others := [r for r in named if reads_weights(r) and r != GLOBAL]):
            raise ValueError(
                f"distribution={others[0]!r} ranks single weights, and unit='filter' whole channels, of which each layer keeps "
                "its strongest. Give distribution='global', or unit='weight'."
            )
        if unit == "filter" and self.pattern is not None:
            raise ValueError(
                f"unit='filter' with pattern={pattern!r}: whole output channels go, or single weights of each group of inputs. Give "
                "one of the two."
            )
        # as given, since a resumed run compares it as an argument
        self.sparsity, self.unit = self._curve.final if sparsity is None else sparsity, unit
        self.set_times(every, start, stop)
        if finetune is not None:
            to_steps(finetune, 1, "finetune")  # refuses what is not a time; the run's length is not known yet
            # steps and fractions of the run can be compared only once its length is known, in make_calendar
            if type(finetune) is type(stop) and finetune < stop:
                raise ValueError(_too_early(finetune, stop))
        self.finetune = finetune

    @property
    def target_sparsity(self) -> float:
        return self._curve.final

    @property
    def at_target(self) -> bool:
        if not self.masks or self.calendar is None:
            return False
        # between runs no optimizer owns anything: then those that the steps were counted for
        owners = [i for i, names in enumerate(self.owners.owns) if names] or list(self.progress.counts)
        arrived = all(self.progress.done.get(i, 0) >= self.calendar.stop for i in owners)
        if self._curve.final:
            return arrived or self._curve.initial == self._curve.final
        # on a curve that ends at zero layers move to targets of their own
        return arrived or self._curve.curve == "constant" or not (self._curve.initial or any(self.targets.values()))

    def sparsity_at(self, number: int) -> float:
        """The sparsity s_t that the curve asks for, over all selected weights.

        Args:
            number: gradient steps that were taken.
        """
        # the cubic of Zhu and Gupta (2017), which the paper takes over, unless a schedule was given
        return self._curve(number, self.times.start, self.times.stop)

    def _at(self, number: int) -> tuple[float, float]:
        """s_t after ``number`` gradient steps, and the part of the curve's way that is done."""
        return self.sparsity_at(number), self._curve.way(number, self.times.start, self.times.stop)

    # ------------------------------------------------------------------ plan and calendar

    def share_out(self, entries: Sequence[Entry]) -> dict[str, float]:
        if self.pattern is None:
            return super().share_out(entries)
        # under N:M every layer has that share, and nothing is shared out
        return reached_targets(self, {} if asked_nm(self) is not None else super().share_out(entries), entries)

    def parameter_zeros(self, entries: Sequence[Entry], targets: Mapping[str, float]) -> dict[str, int]:
        if self.unit == "weight":
            return super().parameter_zeros(entries, targets)
        chosen = [e for e in entries if not e.reason]
        return {
            e.name: sum(_filters_gone(targets[x], e) * (e.size // e.parts // e.shape[0]) for x in e.layers)
            for e in chosen
        }

    def make_calendar(self, run: RunLength) -> Calendar:
        calendar = super().make_calendar(run)
        if self.finetune is None:
            # the curve ends at stop, the refreshes do not: magnitudes go on to change, and masks follow them
            return replace(calendar, until=NO_END)
        begin = self.finetune if isinstance(self.finetune, int) else to_steps(self.finetune, run.total(), "finetune")
        if not run.lenient and begin < calendar.stop:
            raise ValueError(_too_early(self.finetune, self.stop, f" ({begin} steps against {calendar.stop})"))
        if not run.lenient and begin > run.total():
            raise ValueError(
                f"finetune={self.finetune!r} lies behind the run's {run.total():g} steps, so fine-tuning would never "
                "start. Give an earlier time, or finetune=None."
            )
        return replace(calendar, until=max(begin, calendar.stop))

    # ------------------------------------------------------------------ the method

    def initial_masks(self) -> dict[str, Tensor]:
        groups = [names for names in self.owners.owns if names]
        way = self._curve.way(0, 0, 1)
        return {n: mask for names in groups for n, mask in self._largest(names, self._curve.initial, way).items()}

    def start_copies(self, dense: Mapping[str, Tensor], new: Iterable[str]) -> None:
        learning = set(new)
        if self.attachment.in_training:  # a layer that joins in fine-tuning is pruned for good, as the others are
            learning = {n for number, mine in by_step(self, [*learning]) if number < self.times.last for n in mine}
        super().start_copies(dense, learning)

    def after_step(self, step: Step) -> Update | None:
        # a longer run may put the end of the refreshes behind the start of a fine-tuning that has begun: it goes on
        if not self.weights.copied or not step.due or not self.weights.has_copy(step.names[0]):
            return None
        return self.new_masks(step)

    def new_masks(self, step: Step) -> Update:
        # algorithm 1 takes the largest of all dense weights, not of the active ones alone: so pruned ones come back
        masks = self._largest(step.names, *self._at(step.number))
        back = sum(self.weights.count(n, mask & ~self.weights.masks[n]) for n, mask in masks.items())
        # in aux, so that the count goes on where a run is resumed
        total = self.aux.setdefault("reactivated/total", torch.zeros((), dtype=torch.int64))
        total += back
        norm = self._norm_of_pruned({**self.weights.masks, **masks})
        figures = self.own_figures(reactivated=back, reactivated_total=int(total), pruned_dense_norm=norm)
        return Update(masks, {**figures, **figures_towards(self, masks)})

    def after_update(self, step: Step) -> None:
        if step.number >= step.calendar.last:  # fine-tuning begins: pruned weights learn no more
            self.weights.end_copy(step.names)

    def _norm_of_pruned(self, masks: Mapping[str, Tensor]) -> float:
        """L2 norm of the dense values of all weights that ``masks`` prune."""
        norms = []
        # without a copy the dense value of a pruned weight is zero: parameters in fine-tuning add nothing
        for name in self.weights.copied:
            dense = self.weights.dense_values(name)
            # float: in half precision the sum of squares would overflow
            norm = torch.linalg.vector_norm((dense * (1 - masks[name].to(dense))).float())
            norms.append(layout_of(self.params[name]).norm(norm))
        return float(torch.linalg.vector_norm(torch.stack(norms)))

    def _largest(self, names: Sequence[str], sparsity: float, way: float) -> dict[str, Tensor]:
        """Masks of the weights or filters of ``names`` with the largest dense magnitude, where the curve has come to
        ``sparsity`` and this part of its way is done."""
        layers = {x: t for n in names for x, (t,) in self.weights.layers(n, self.weights.dense_values(n))}
        entries = {x: self.weights.entries[n] for n in names for x in self.weights.entries[n].layers}
        select = partial(self._filters_jointly, entries) if self.unit == "filter" else None
        chosen = joint_masks(self, names, layers, sparsity, select=select)
        final = self.target_sparsity
        for x, t in layers.items():
            if x not in chosen:
                share = on_the_way(self.targets[x], sparsity, final, way)
                towards = mask_towards(self, x, t, share)
                chosen[x] = self._in_layer(t, entries[x], share) if towards is None else towards
        return {
            n: self.weights.by_layer(n, lambda layer, _: chosen[layer], self.weights.dense_values(n)) for n in names
        }

    def _in_layer(self, weight: Tensor, entry: Entry, sparsity: float) -> Tensor:
        if self.unit == "weight":
            return keep_largest(weight, size_of(weight) - zeros_for(sparsity, size_of(weight)))
        scores = filters.norms(weight, entry.shape[0], entry.transposed)
        return filters.mask_of(
            keep_largest(scores, entry.shape[0] - _filters_gone(sparsity, entry)), weight, entry.transposed
        )

    def _filters_jointly(
        self, entries: Mapping[str, Entry], rule: str, layers: Mapping[str, Tensor], zeros: int
    ) -> dict[str, Tensor]:
        scores = [filters.norms(t, entries[x].shape[0], entries[x].transposed) for x, t in layers.items()]
        kept = filters.keep_filters_jointly(
            scores, [t.numel() // s.numel() for t, s in zip(layers.values(), scores, strict=True)], zeros
        )
        return {x: filters.mask_of(k, t, entries[x].transposed) for (x, t), k in zip(layers.items(), kept, strict=True)}


def _filters_gone(sparsity: float, entry: Entry) -> int:
    """Output channels of a layer that go: floor(sparsity * channels), one is left at least."""
    return min(zeros_for(sparsity, entry.shape[0]), entry.shape[0] - 1)


def _too_early(finetune: Time, stop: Time, steps: str = "") -> str:
    return (
        f"finetune={finetune!r} comes before stop={stop!r}{steps}: the masks would freeze before the target is "
        "reached. Give a time at or after stop=."
    )


@masks_by_magnitude.register
def _(method: DPF, names: Sequence[str]) -> dict[str, Tensor]:
    # under one threshold the layers that join share theirs at first; the next refresh takes one for all
    masks: dict[str, Tensor] = {}
    for number, mine in by_step(method, names):
        masks |= method._largest(mine, *method._at(number))
    return masks


@renews_thresholds.register
def _(method: DPF) -> bool:
    return True


@why_no_exchange.register
def _(method: DPF) -> str:
    return "trains the pruned weights on, in a dense copy, so sparse storage has nothing to save"
