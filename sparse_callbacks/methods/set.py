"""SET: drop small weights, grow at random."""

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from numbers import Real
from typing import Any, Literal, Unpack

from torch import Tensor, nn

from sparse_callbacks.core.arguments import refuse_unknown
from sparse_callbacks.core.awaited import with_awaited
from sparse_callbacks.core.calendar import Calendar, RunLength, Time
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.constructors import argument_values
from sparse_callbacks.core.data_pass import NoPassError
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.growth import fresh_values, uniform_numbers
from sparse_callbacks.core.initial_masks import InitialMask
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.nm_masks import NMPattern
from sparse_callbacks.core.pattern_names import parsed
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.schedules import Schedule
from sparse_callbacks.core.selection import Entry, select
from sparse_callbacks.core.sparse_layers.drawn_places import drawn_units
from sparse_callbacks.core.state_claims import Zeros, possible_zeros
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.storages.storage import Rows, StorageByLayer, why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.drop_and_grow import DropAndGrow, mask_before
from sparse_callbacks.methods.neuron_importance import (
    ImportanceTimes,
    check_importance_times,
    hidden_layers,
    resolve_importance_times,
    unimportant_neurons,
    why_hidden_output,
)
from sparse_callbacks.methods.unit_updates import fills_rows, grown_units

Drop = Literal["magnitude", "signed"]
NewWeights = Literal["zero", "uniform"]


class SET(DropAndGrow):
    """SET: drop small weights, grow at random (Mocanu et al., 2018).

    After the gradient step of every ``every`` steps, layer by layer, with k = int(drop_fraction(t) * active)::

        keep  the active weights with the largest |w|, all but k
        grow  k positions drawn uniformly from all others, those just dropped included

    With ``drop="signed"``, as published, positive and negative weights leave separately: int(drop_fraction(t) * count) of
    the smallest positive and as large a share of the largest negative ones, and as many positions are drawn. An active
    weight that is exactly zero counts as positive.

    Grown weights start at zero, or with ``new_weights="uniform"``, as published, from U(-b, b) with b = sqrt(6 / inputs of
    the dense layer), He's uniform initialisation, drawn from (seed, step, name). Their optimizer state is that of a fresh
    weight. A weight dropped and drawn again keeps value and state. Updates come after steps 1, 1 + every, ... (counted from
    1, as in the reference code of RigL).

    With ``neuron_importance=0.2`` an update at or after each of the times ``importance_start``, ``importance_start +
    importance_every``, ... first removes all incoming weights of the hidden neurons whose sum of |incoming weights| is at or
    below the 20th percentile of its layer (Curci et al., 2021); k is counted among what is left, so that the number of
    active weights falls. ``plan()`` shows the zeros of the beginning, and which layers lose neurons. Growth is over all
    positions: a neuron may come back with new weights. Hidden neurons are the rows of linear layers, without the last one
    in the order of registration, which is taken for the output (of a model with several outputs leave the others out with
    exclude=); layers of other kinds, convolutions among them, lose none.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN).

    Differs from the paper: by default the smallest magnitudes are dropped and grown weights start at zero (see above for
    both as published); the drop fraction falls by a cosine, where the paper holds it constant
    (``drop_fraction="constant(0.3)"``); the interval is in steps and not epochs; a weight drawn again at once keeps its value
    and momentum, where the released code draws a new value; and that code never updates the output layer. The percentile of
    neurons is over those that are live, where the released code counts dead ones, which once they are a fifth of all let no
    more neurons go; where a removal would take every live neuron of a layer it takes none.

    Args:
        sparsity: fraction of zeros over the selected weights, in [0, 1); None: 0.9, or what ``initial_mask`` holds.
        distribution: how layers share the sparsity: a name such as ``"uniform"``, a mapping ``{glob: sparsity or name}``, a callable
            or an object; see :class:`~sparse_callbacks.core.method.Method`.
        every: optimizer steps (int) or fraction of the run (float) between updates; None: the published 100, shortened, with a
            message, in runs that would see fewer than ten updates.
        start: first time of an update, in optimizer steps (int) or as a fraction of the run (float).
        stop: last time of an update, in the same units.
        drop: ``"magnitude"`` or ``"signed"``. A group of rows has no sign, so ``"signed"`` has no ``pattern="fan_in/64"`` and
            no ``storage="grouped"``.
        drop_fraction: fraction of a layer's active weights that an update replaces, in [0, 1]; a number falls by a cosine to 0 at
            ``stop``; a schedule or its text (``"constant(0.3)"``) is taken as it is.
        new_weights: ``"zero"`` or ``"uniform"``, what grown weights start from.
        neuron_importance: the share of the live hidden neurons of a layer that a removal takes, in (0, 1); None: none. With it
            layers are masked, without a ``pattern``, as counts fall.
        importance_start: the first time that neurons are removed, in optimizer steps (int) or as a fraction of the run
            (float); published is epoch 200 of 500.
        importance_every: the interval, in the same units; published are 10 epochs of 500.
        initial_mask: where the first masks lie: ``"random"``, ``"magnitude"``, a score such as ``"snip"``, ``"nonzero"``, the path of a
            checkpoint, or a state dict; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        rescale: ``"layer"`` or ``"fan_in"``: active weights of a new run are made larger once, to make up for the inputs that are
            gone; None: they stay as they are.
        pattern: where active weights may lie: ``"2:4"``, ``"transposable 2:4"``, ``"fan_in"`` or ``"fan_in/64"``; None: anywhere. See
            :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        ablation: with ``pattern="fan_in"``, the share of the planned fan-in, in (0, 1], that an output unit must have in salient
            weights, or it loses all of its weights; None: all units stay. Salient are the weights that stay, and k positions drawn
            from the others.
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
        ValueError: arguments out of range, or a model, optimizer or checkpoint that does not fit; before the first
            batch.

    Example:
        >>> from sparse_callbacks import SET
        >>> SET(sparsity=0.95, drop="signed", new_weights="uniform", drop_fraction="constant(0.3)").target_sparsity
        0.95

    Reference: Mocanu, Mocanu, Stone, Nguyen, Gibescu, Liotta: Scalable training of artificial neural networks with
    adaptive sparse connectivity inspired by network science. Nature Communications 9, 2018, algorithm 1. For
    ``neuron_importance``: Curci, Mocanu, Pechenizkiy: Truly Sparse Neural Networks at Scale. arXiv 2102.01732, 2021.
    """

    neuron_importance: float | None = None  # asked for before the constructor of a subclass has run

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        distribution: Distribution = "erdos_renyi_kernel",
        every: Time | None = None,
        start: Time = 0,
        stop: Time = 0.75,
        drop: Drop = "magnitude",
        drop_fraction: float | str | Schedule = 0.3,
        new_weights: NewWeights = "zero",
        neuron_importance: float | None = None,
        importance_start: Time = 0.4,
        importance_every: Time = 0.02,
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
        given = {"drop": drop, "new_weights": new_weights}
        refuse_unknown(given, {"drop": ("magnitude", "signed"), "new_weights": ("zero", "uniform")})
        check_importance_times(importance_start, importance_every)
        _refuse_share(neuron_importance)
        self.drop, self.neuron_importance = drop, neuron_importance
        self.importance_start, self.importance_every = importance_start, importance_every
        self._starts_from = new_weights
        self._importance_times: ImportanceTimes | None = None  # made with the calendar of each run
        self._refuse_shapes(pattern, storage)
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

    def _refuse_shapes(self, pattern: Any, storage: Any) -> None:
        """Refuse masks that lie otherwise than weight by weight where an argument asks for that."""
        storages = list(storage.values()) if isinstance(storage, Mapping) else [storage]
        asked = parsed(pattern)
        grouped = f"pattern={pattern!r}" if asked else "storage='grouped'" if "grouped" in storages else ""
        # under N:M single weights leave, which have a sign
        if self.drop == "signed" and grouped and not isinstance(asked, NMPattern):
            raise ValueError(
                f"drop='signed' with {grouped}: the rows of a group move together, and their weights have signs of their own. "
                "Give drop='magnitude', or leave the other out."
            )
        if self.neuron_importance is not None and (grouped or "sparse" in storages):
            raise ValueError(
                f"neuron_importance={self.neuron_importance!r} with {grouped or 'storage=' + repr(storage)}: the number of "
                "active weights falls, and there it stays as it is. Give storage='masked' and no pattern, or leave "
                "neuron_importance= out."
            )

    # ------------------------------------------------------------------ neurons that lose their weights

    def make_calendar(self, run: RunLength) -> Calendar:
        made = super().make_calendar(run)
        if self.neuron_importance is not None:
            times = resolve_importance_times(self.importance_start, self.importance_every, made, run)
            self._importance_times = times
        return made

    def plan(self, model: nn.Module | None = None) -> Plan:
        made = super().plan(model)
        if self.neuron_importance is None:
            return made
        plain = getattr(model, "_orig_mod", model)  # of torch.compile
        entries = self.entries
        if plain is not None:
            entries = with_awaited(self, select(plain, self.include, self.exclude, self.keep_dense))
        self._refuse_without_hidden(entries)
        hidden = hidden_layers(entries)
        rows = tuple(
            replace(r, remark="; ".join(filter(None, [r.remark, "loses neurons"]))) if r.name in hidden else r
            for r in made
        )
        remark = (
            f"neuron_importance={float(self.neuron_importance):g}: these are the zeros of the beginning. Layers that lose "
            f"neurons have more and more of them from importance_start={self.importance_start!r} on."
        )
        return replace(made, rows=rows, remark=" ".join(filter(None, [made.remark, remark])))

    def rehearse(self) -> None:
        super().rehearse()
        layers = self.weights.layers_stored  # of a model that has such layers of its own, whatever storage= says
        if self.drop == "signed" and any(layer.storage == "grouped" for layer in layers.values()):
            self._refuse_shapes(None, "grouped")
        if self.neuron_importance is not None:
            self._refuse_without_hidden(self.entries)
            self._warn_of_hidden_output()

    def _warn_of_hidden_output(self) -> None:
        """Warn where classes would lose their weights as neurons do, if there is data to run the network on."""
        try:
            with closing(self.host.data_pass(values=False)) as outputs:
                if why := why_hidden_output(self.model, self.entries, outputs):
                    self.host.warn(why)
        except NoPassError:
            pass  # nothing but this warning depends on it

    def _refuse_without_hidden(self, entries: Sequence[Entry]) -> None:
        if not hidden_layers(entries):
            raise ValueError(
                f"neuron_importance={self.neuron_importance!r}: no sparse linear layer has hidden neurons. The last linear layer is "
                "taken for the output, and layers of other kinds keep their neurons. Leave it out, or let include=, exclude= or "
                "keep_dense= leave another linear layer."
            )

    def _removed_neurons(self, step: Step, name: str) -> Tensor | None:
        """The neurons (bool, a row each) that the update of this step removes from a layer; None where there are none."""
        before, share = self.progress.done.get(step.index), self.neuron_importance
        if share is None or self._importance_times is None or name not in hidden_layers(self.entries):
            return None
        # an update after those of the calendar, such as the first one of a cycle of SupTickets, keeps all neurons
        if step.number > step.calendar.last or not self._importance_times.falls(before, step.number):
            return None
        return unimportant_neurons(self.params[name], self.weights.masks[name], float(share))

    # ------------------------------------------------------------------ updates

    def new_masks(self, step: Step) -> Update:
        update = super().new_masks(step)
        if self.neuron_importance is None:
            return update
        removed = [rows for name in step.names if (rows := self._removed_neurons(step, name)) is not None]
        neurons = float(sum(int(rows.count_nonzero()) for rows in removed))
        return replace(update, figures={**update.figures, "update/removed_neurons": neurons})

    def grow_scores(self, step: Step, name: str) -> Tensor:
        return uniform_numbers(self, name, step.number)

    def new_weights(self, step: Step, name: str) -> Tensor | None:
        return None if self._starts_from == "zero" else fresh_values(self, name, step.number)


def _refuse_share(share: Any) -> None:
    if share is None or (isinstance(share, Real) and not isinstance(share, bool) and 0.0 < float(share) < 1.0):
        return
    raise ValueError(
        f"neuron_importance={share!r} is not a share of the hidden neurons between 0 and 1. The published value is 0.2; None "
        "removes no neurons."
    )


@argument_values.register
def _(method: SET, shared: type) -> dict[str, Any]:
    # under the name of this argument an object has the hook of born weights
    return argument_values.dispatch(DropAndGrow)(method, shared) | {"new_weights": method._starts_from}


@mask_before.register
def _(method: SET, step: Step, name: str) -> Tensor:
    mask, removed = method.weights.masks[name], method._removed_neurons(step, name)
    return mask if removed is None else mask & ~removed[:, None]


@grown_units.register
def _(method: SET, step: Step, name: str, kept: Tensor, count: int) -> Tensor:
    layer = method.weights.layers_stored[name]
    shape, source = (layer.block_rows, layer.in_features), method.generator(name, step.number)
    full = fills_rows(method, layer)
    return drawn_units(shape, kept, count, source, per_block=layer.storage == "grouped", full=full)


@why_no_exchange.register
def _(method: SET) -> str:
    if method.neuron_importance is not None:
        return "removes neurons, so that the number of active weights falls, and sparse storage keeps as many as it began with"
    return why_no_exchange.dispatch(DropAndGrow)(method)


@possible_zeros.register
def _(method: SET, saved: SavedRun, planned: Mapping[str, int]) -> list[Zeros]:
    if method.neuron_importance is None:
        return list(possible_zeros.dispatch(DropAndGrow)(method, saved, planned))
    # which matrices are of hidden layers is not known without the model; a removal leaves a live neuron in each
    matrices = {n: saved.masks[n].numel() for n in planned if saved.masks[n].ndim == 2}
    return [Zeros((n,), range(z, matrices[n]) if n in matrices else (z,)) for n, z in planned.items()]
