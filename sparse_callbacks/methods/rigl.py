"""RigL: drop small weights, grow where the dense gradient is large."""

import math
from collections.abc import Sequence
from typing import ClassVar, Unpack

from torch import Tensor

from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.fan_in_layers import has_fan_in
from sparse_callbacks.core.growth import candidate_count, checked_candidates, moved_count
from sparse_callbacks.core.initial_masks import InitialMask
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.pattern_names import asked_nm
from sparse_callbacks.core.patterns import group_of
from sparse_callbacks.core.record.multiply_adds import WeightsInStep
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.schedules import Schedule
from sparse_callbacks.core.shards import size_of
from sparse_callbacks.core.step import ReplacesSteps, Step
from sparse_callbacks.core.storages.storage import Rows, StorageByLayer
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.drop_and_grow import DropAndGrow
from sparse_callbacks.methods.unit_updates import active_units, fills_rows, free_units, grown_units, units_to_move


class RigL(ReplacesSteps, DropAndGrow):
    """RigL: drop small weights, grow where the dense gradient is large (Evci et al., ICML 2020).

    Every ``every`` steps, layer by layer, with k = int(drop_fraction(t) * active)::

        keep  the active weights with the largest |w|, all but k
        grow  the k positions with the largest |dL/dw| among all others, those just dropped included

    An update replaces the gradient step of its optimizer: no parameter moves, biases, norms, momentum and Adam's
    counter included, while the LR schedule and ``trainer.global_step`` go on; ``self.step`` does not. Grown weights
    start at zero with the optimizer state of a fresh weight; a weight dropped and grown again in one update keeps both.
    The gradient is taken after reduction over ranks and accumulation, and before clipping.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN).

    Differs from the paper: an update whose count is 0 in every layer (at the end of the cosine) is an ordinary gradient
    step. Differs from the released code: the cosine runs over (t - start) / (stop - start), where the code does not
    shift t; ties go to the lower index instead of to noise; and pruned weights hold zero, where the code hides their
    last value.

    With ``candidates`` the k positions are the largest |dL/dw| among candidates alone, drawn uniformly and without
    repetition from all others: int(candidates * active) of them, at least k. This is guided stochastic exploration (GSE,
    Heddes et al. 2024) with its uniform draw. Differs from that paper: weights are dropped before others grow, where there
    a weight that has grown is safe from the drop that follows; candidates are drawn from what was not kept, where the
    released code draws from all positions, with repetition; layers of less than 50 % sparsity have candidates as well; and
    draws by activity (GraBo, GraEst) are not offered.

    With ``pattern="fan_in"`` each row, the weights of one output unit, has as many active weights after every update: with k
    counted in a layer's planned weights, all but the k smallest |w| of the layer stay, and each row grows its own largest
    |dL/dw| up to the fan-in. With ``ablation=0.3`` a row goes as a whole where it has fewer than max(1, 0.3 * planned fan-in)
    salient weights: those that stay, and the k largest |dL/dw| of the layer among all others. The rows left share out the
    planned weights, floor(planned / rows left) each. This is SRigL (Lasby et al., ICLR 2024); see
    :func:`~sparse_callbacks.core.fan_in.moved_fan_in`. Where that paper leaves it open: weights just dropped can grow, a row
    that is gone may return, and the fan-in follows from the planned count at every update, so that nothing is lost for good.

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1); None: 0.9, or what ``initial_mask`` holds.
        distribution: how layers share the sparsity: a name such as ``"uniform"``, a mapping ``{glob: sparsity or name}``, a callable
            or an object; see :class:`~sparse_callbacks.core.method.Method`.
        every: optimizer steps (int) or fraction of the run (float) between updates; None: the published 100, shortened,
            with a message, down to 10 in runs that would see fewer than ten updates.
        start: first time of an update, in optimizer steps (int) or as a fraction of the run (float).
        stop: last time of an update, in the same units.
        drop_fraction: fraction of a layer's active weights that an update replaces, in [0, 1]; a number falls by a cosine to 0 at
            ``stop``; a schedule or its text (``"constant(0.3)"``) is taken as it is.
        initial_mask: where the first masks lie: ``"random"``, ``"magnitude"``, a score such as ``"snip"``, ``"nonzero"``, the path of a
            checkpoint, or a state dict; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        rescale: ``"layer"`` or ``"fan_in"``: active weights of a new run are made larger once, to make up for the inputs that are
            gone; None: they stay as they are.
        pattern: where active weights may lie: ``"2:4"``, ``"transposable 2:4"``, ``"fan_in"`` or ``"fan_in/64"``; None: anywhere. See
            :class:`~sparse_callbacks.core.initial_masks.StartsSparse`. Under ``"fan_in/64"`` k is counted in each block
            of rows, as the columns that leave it: those with the smallest sum of |w| over its rows; the columns with the largest sum
            of |dL/dw| come. Under ``"2:4"`` the k smallest |w| of the layer leave, and each group grows as many as it has lost; under
            ``"transposable 2:4"`` each tile does, see :func:`~sparse_callbacks.core.tiles.moved_tiles`.
        ablation: the share of the planned fan-in, in (0, 1], that an output unit must have in salient weights, or it loses
            all of its weights; None: all units stay. Of ``pattern="fan_in"`` alone. The number of units without weights is
            logged as ``update/ablated_units``, and ``plan()`` shows it in a run.
        candidates: candidates for each active weight (under ``"fan_in/64"`` for each active column), from which those with
            the largest gradients grow; the paper finds 1 to 2 enough. None: all positions that were not kept. Not with N:M or
            ``"fan_in"``.
        storage: ``"masked"``, ``"sparse"``, ``"grouped"``, ``"auto"`` or a mapping of globs to these: whether linear layers hold dense
            matrices under masks, or their live weights alone; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        group: number of output rows that read the same inputs under ``storage="grouped"``.
        rows: rows of input that each layer sees in a step (batch size times sequence length), or such numbers by glob, for
            ``storage="auto"``; None: found with a batch.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense`` ("first", "last" or "both"; default None), ``print_plan`` (default True) and
            ``fresh_start`` (default False: a resumed checkpoint must hold the masks of a callback with the same
            arguments).

    Raises:
        ValueError: arguments out of range, or a model, optimizer or checkpoint that does not fit; before the first
            batch.

    Example:
        >>> from sparse_callbacks import RigL
        >>> RigL(sparsity=0.9).target_sparsity
        0.9

    Reference: Evci, Gale, Menick, Castro, Elsen: Rigging the Lottery: Making All Tickets Winners. ICML 2020, algorithm
    1. For ``candidates``: Heddes, Srinivasa, Givargis, Nicolau: Always-Sparse Training by Growing Connections with Guided
    Stochastic Exploration. arXiv 2401.06898, 2024, algorithm 1. For ``pattern="fan_in"``: Lasby, Golubeva, Evci, Nica,
    Ioannou: Dynamic Sparse Training with Structured Sparsity. ICLR 2024, section 3.
    """

    first_update: ClassVar[int] = 0  # the calendar is asked before a step, with the steps taken so far

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        distribution: Distribution = "erdos_renyi_kernel",
        every: Time | None = None,
        start: Time = 0,
        stop: Time = 0.75,
        drop_fraction: float | str | Schedule = 0.3,
        initial_mask: InitialMask = "random",
        rescale: Rescale | None = None,
        pattern: str | None = None,
        ablation: float | None = None,
        storage: StorageByLayer = "masked",
        group: int = 64,
        rows: Rows | None = None,
        candidates: float | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            sparsity,
            distribution=distribution,
            every=every,
            start=start,
            stop=stop,
            drop_fraction=drop_fraction,
            initial_mask=initial_mask,
            rescale=rescale,
            pattern=pattern,
            ablation=ablation,
            storage=storage,
            group=group,
            rows=rows,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        self.candidates = checked_candidates(candidates)
        if self.candidates is not None and (asked_nm(self) is not None or has_fan_in(self)):
            raise ValueError(
                f"candidates={candidates!r} draws positions of a whole layer, and under pattern={pattern!r} each group of inputs, or "
                "each row, grows its own number. Leave candidates= or pattern= out."
            )

    def before_step(self, step: Step) -> None:
        # at the end of the cosine every count is 0: such an update would cost a gradient step and change nothing
        if step.due and any(self._counts(step)):
            # algorithm 1 has an update or a gradient step, never both: here the masks move and the weights do not
            step.replace()
        else:
            super().before_step(step)

    def after_step(self, step: Step) -> Update | None:
        return None  # an update takes the place of a step, so none follows one

    def wants_dense_gradients(self, step: Step) -> bool:
        # manual optimization asks before the step is counted: an upper bound, which need not wait for the device
        return step.may_be_due

    def weights_in_step(self, step: Step) -> WeightsInStep:
        counts = super().weights_in_step(step)
        if self.candidates is None or not step.replaced:
            return counts
        return WeightsInStep(counts.forward, {name: self._candidates_of(step, name) for name in step.names})

    def _candidates_of(self, step: Step, name: str) -> int:
        """Weights of a parameter whose gradients an update looks at."""
        assert self.candidates is not None
        entry, fraction = self.weights.entries[name], self.fraction_at(step.number)
        size = math.prod(entry.shape)
        # under a pattern each block of rows draws columns, and a column has a weight in each of its rows
        draws = 1 if group_of(self, entry) is None else entry.shape[0]
        found = 0
        for layer in entry.layers:
            active = size - self.planned_zeros(layer, size)
            moved = moved_count(self, entry, active, fraction)
            free = (size - active) // draws + moved
            found += draws * candidate_count(self.candidates, active // draws, moved, free)
        return found

    def grow_scores(self, step: Step, name: str) -> Tensor | None:
        return step.gradient(name)

    def _counts(self, step: Step) -> list[int]:
        """The number of weights that an update would replace in each layer, or of columns in each block."""
        fraction = self.fraction_at(step.number)
        masks, exchanged = self.weights.held_masks, self.weights.layers_stored
        # from the planned counts, which are those of the masks: counting the masks would wait for the device
        masked = [
            moved_count(
                self, self.weights.entries[name], size_of(part) - self.planned_zeros(layer, size_of(part)), fraction
            )
            for name in step.names
            if name in masks
            for layer, (part,) in self.weights.layers(name, masks[name])
        ]
        return masked + [units_to_move(self, exchanged[name], fraction) for name in step.names if name in exchanged]


@grown_units.register
def _(method: RigL, step: Step, name: str, kept: Tensor, count: int) -> Tensor | None:
    gradient = step.gradient(name)
    if gradient is None:
        return None
    layer = method.weights.layers_stored[name]
    if method.candidates is None:
        new = step.largest_units(name, kept, count, full=fills_rows(method, layer))
    else:
        drawn = candidate_count(method.candidates, active_units(layer), count, free_units(layer, kept))
        new = step.largest_units(name, kept, count, drawn, method.generator(name, step.number))
    if new is None and bool(gradient.any()):
        method.host.warn(
            f"RigL has left the places of {name} as they are: its live values have a gradient, and no backward pass through the "
            "layer since the last step has made it, so that gradients of pruned weights are not known. Call the layer between "
            f"two steps and let backward() make the gradient, or leave it masked, storage={{{name!r}: 'masked', '*': 'sparse'}}."
        )
    return new
