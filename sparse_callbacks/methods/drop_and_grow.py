"""What RigL, SET and SNFS share: at each update drop small weights, and grow as many elsewhere."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial, singledispatch
from typing import ClassVar, Unpack

from torch import Tensor

from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.fan_in import checked_ablation
from sparse_callbacks.core.fan_in_layers import has_fan_in
from sparse_callbacks.core.growth import moved_by_sign, moved_in_groups, moved_mask, uniform_numbers
from sparse_callbacks.core.initial_masks import InitialMask, StartsSparse
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.nm_layers import inputs_axis, nm_of
from sparse_callbacks.core.patterns import group_of
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.schedules import Schedule, as_schedule
from sparse_callbacks.core.sparse_layers.moved_places import Move
from sparse_callbacks.core.state_claims import Zeros, as_planned, possible_zeros
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import Rows, StorageByLayer, why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.fan_in_updates import ablation_figures, moved_rows
from sparse_callbacks.methods.unit_updates import grown_units, moved_units


class DropAndGrow(StartsSparse):
    """Base of the methods that drop weights and grow as many others, from the first step to the last.

    The number of active weights in a layer never changes. A subclass says what to grow (:meth:`grow_scores`). The update comes
    after a gradient step unless the subclass replaces one (:class:`~sparse_callbacks.RigL`).

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1); None: 0.9, or what ``initial_mask`` holds.
        distribution: how layers share the sparsity: a name such as ``"uniform"``, a mapping ``{glob: sparsity or name}``, a callable
            or an object; see :class:`~sparse_callbacks.core.method.Method`.
        every: optimizer steps (int) or fraction of the run (float) between updates; None: the published 100, shortened, with a
            message, in runs that would see fewer than ten updates.
        start: first time of an update, in optimizer steps (int) or as a fraction of the run (float).
        stop: last time of an update, in the same units.
        drop_fraction: fraction of a layer's active weights that an update replaces, in [0, 1]; a number falls by a cosine to 0 at
            ``stop``; a schedule or its text (``"constant(0.3)"``) is taken as it is.
        initial_mask: where the first masks lie: ``"random"``, ``"magnitude"``, a score such as ``"snip"``, ``"nonzero"``, the path of a
            checkpoint, or a state dict; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        rescale: ``"layer"`` or ``"fan_in"``: active weights of a new run are made larger once, to make up for the inputs that are
            gone; None: they stay as they are.
        pattern: where active weights may lie: ``"2:4"``, ``"transposable 2:4"``, ``"fan_in"`` or ``"fan_in/64"``; None: anywhere. See
            :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        ablation: with ``pattern="fan_in"``, the share of the planned fan-in, in (0, 1], that an output unit must have in salient
            weights, or it loses all of its weights; None: all units stay. Salient are the weights that stay, and the k positions with
            the largest scores.
        storage: ``"masked"``, ``"sparse"``, ``"grouped"``, ``"auto"`` or a mapping of globs to these: whether linear layers hold dense
            matrices under masks, or their live weights alone; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        group: number of output rows that read the same inputs under ``storage="grouped"``.
        rows: rows of input that each layer sees in a step (batch size times sequence length), or such numbers by glob, for
            ``storage="auto"``; None: found with a batch.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, or a model, optimizer or checkpoint that does not fit; before the first batch.
    """

    schedulable: ClassVar[str] = "drop_fraction"
    explores = True
    candidates: float | None = None
    """Candidates for each active weight, from which those with the largest scores grow; None: all that were not kept."""

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
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(
            sparsity,
            initial_mask=initial_mask,
            rescale=rescale,
            pattern=pattern,
            storage=storage,
            group=group,
            rows=rows,
            distribution=distribution,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        self.ablation = checked_ablation(ablation, self.pattern, self.storage)
        self.set_times(every, start, stop)
        self.drop_fraction = drop_fraction
        # a number falls along RigL's f_decay = alpha / 2 * (1 + cos(pi * t / T)), for all three methods
        self._curve = as_schedule(drop_fraction, "cosine", name="drop_fraction")
        for value in (self._curve.initial, self._curve.final):
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"drop_fraction={drop_fraction!r} leaves [0, 1]: it is the fraction of a layer's active weights "
                    "that an update replaces. The published value is 0.3."
                )

    def fraction_at(self, number: int) -> float:
        """The share of a layer's active weights that an update replaces.

        Args:
            number: gradient steps that were taken.
        """
        return self._curve(number, self.times.start, self.times.stop)

    @property
    def fraction(self) -> float:
        """The share of active weights that an update would replace now."""
        return self.fraction_at(self.step)

    def after_step(self, step: Step) -> Update | None:
        return self.new_masks(step) if step.due else None

    def grow_scores(self, step: Step, name: str) -> Tensor | None:
        """Score of every position of a parameter, or under a pattern of rows of every column of each block.

        The positions with the largest magnitudes grow.

        Args:
            step: the step of the update.
            name: name of the parameter.

        Returns:
            Scores of the parameter's shape; None where the update leaves its mask as it is.
        """
        raise NotImplementedError

    def new_masks(self, step: Step) -> Update:
        fraction, new = self.fraction_at(step.number), {}
        moves: dict[str, Callable[[], Move | None]] = {}

        # only the parameters of the optimizer that has stepped: several optimizers take their steps at different times
        for name in step.names:
            if (layer := self.weights.layers_stored.get(name)) is not None:
                moves[name] = partial(moved_units, self, step, name, layer, fraction, _leave_by_sign(self))
                continue
            scores = self.grow_scores(step, name)
            if scores is not None:  # the parameter took part in this step
                new[name] = self._moved(step, name, scores, fraction)
        return Update(new, {"update/drop_fraction": fraction, **ablation_figures(self, new)}, moves)

    def _moved(self, step: Step, name: str, scores: Tensor, fraction: float) -> Tensor:
        """The mask of a parameter after an update."""
        if has_fan_in(self):
            return moved_rows(self, name, mask_before(self, step, name), scores, fraction)
        entry = self.weights.entries[name]
        group, pattern = group_of(self, entry), nm_of(self, entry)
        tensors = [mask_before(self, step, name), self.params[name].detach(), scores]
        by_sign = _leave_by_sign(self)
        if self.candidates is not None:
            tensors.append(uniform_numbers(self, name, step.number))

        def moved(_: str, mask: Tensor, weight: Tensor, grow: Tensor, chances: Tensor | None = None) -> Tensor:
            if pattern is not None:
                return moved_in_groups(mask, weight, grow, fraction, pattern, inputs_axis(entry), by_sign)
            if by_sign:
                return moved_by_sign(mask, weight, grow, fraction)
            return moved_mask(mask, weight, grow, fraction, group, self.candidates, chances)

        return self.weights.by_layer(name, moved, *tensors)


@singledispatch
def mask_before(method: DropAndGrow, step: Step, name: str) -> Tensor:
    """The mask of a parameter that an update begins with: the current one. A method whose counts fall registers a function
    that gives a smaller one.

    Args:
        method: the method of the run.
        step: the step that the update follows or replaces.
        name: the name of the parameter.
    """
    return method.weights.masks[name]


def _leave_by_sign(method: DropAndGrow) -> bool:
    """Whether positive and negative weights leave separately; of methods without the argument the smallest magnitudes do."""
    return getattr(method, "drop", "magnitude") == "signed"


@why_no_exchange.register
def _(method: DropAndGrow) -> str:
    kind = next((c for c in type(method).__mro__ if c in grown_units.registry), object)
    if kind is object or any(getattr(type(method), n) is not getattr(kind, n) for n in ("grow_scores", "new_masks")):
        return "chooses what to grow by a score of every weight, and an exchanged layer has its live weights alone"
    return ""


@possible_zeros.register
def _(method: DropAndGrow, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    if method.ablation is None:
        return as_planned(planned)
    # what the rows left cannot share out evenly is lost, and more where they read all inputs
    return [Zeros((n,), range(zeros, saved.masks[n].numel())) for n, zeros in planned.items()]
