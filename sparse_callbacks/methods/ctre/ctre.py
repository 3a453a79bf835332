"""CTRE: drop small weights, grow between neurons that fire alike."""

import math
from collections.abc import Mapping, Sequence
from contextlib import closing
from itertools import islice
from typing import Any, ClassVar, Literal, Unpack

from torch import Tensor, nn

from sparse_callbacks.core.awaited import names_awaited
from sparse_callbacks.core.calendar import Calendar, RunLength, Time, resolve_times
from sparse_callbacks.core.distributions import Distribution, clipped, epsilon_sparsity, is_epsilon
from sparse_callbacks.core.growth import fresh_values
from sparse_callbacks.core.hooks import BatchEnd, Figures
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.initial_masks import InitialMask
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.ops import drop_and_grow, drop_count
from sparse_callbacks.core.randomness import uniform_like
from sparse_callbacks.core.rescaling import Rescale
from sparse_callbacks.core.schedules import Schedule, as_schedule
from sparse_callbacks.core.step import MeasuresSimilarity, Step
from sparse_callbacks.core.storages.storage import why_no_exchange
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.ctre.activations import measure_similarity
from sparse_callbacks.methods.ctre.growth import GrowthFigures, propose_growth, replace_regrown
from sparse_callbacks.methods.ctre.patience import Mode, Patience, check_patience
from sparse_callbacks.methods.ctre.similarity import CosineSums, cosine_similarity, layers_of
from sparse_callbacks.methods.drop_and_grow import DropAndGrow

Variant = Literal["sim", "seq", "pure"]
PUBLISHED = "erdos_renyi"


class CTRE(MeasuresSimilarity, DropAndGrow):
    """CTRE: drop small weights, grow between neurons that fire alike (Atashgahi et al., 2022).

    Once an epoch, before its first step, a pass over the training data (eval mode, in order, without gradients) gives
    for every possible connection of every layer::

        S_pq = |<a_p, b_q>| / (|a_p| |b_q|)     a_p, b_q: activations of an input and an output neuron over all samples

    After that step, layer by layer, with k = int(drop_fraction * active)::

        keep  the active weights with the largest |w|, all but k
        grow  "seq", "pure": the k most similar of all others, those just dropped included
              "sim": the same k candidates, but each that was just dropped makes way for a position drawn at random from
              those neither kept nor grown

    ``"seq"`` draws uniformly (as SET does) for the rest of the run once ``monitor`` has not improved for ``patience``
    validated epochs. New weights are drawn from U(-b, b), b = sqrt(6 / n_in) with the dense fan-in n_in, with zero
    optimizer state; a weight dropped and grown again keeps both. No gradient of a pruned weight is ever read. What the
    activations of a layer are, in any network: see
    :class:`~sparse_callbacks.methods.ctre.activations.ActivationTracer`; of the last they are the softmax of the
    output.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN).

    Differs from the paper: convolutions count positions as samples (our extension). From the released code: ``"sim"``
    draws from what it has not grown already (the code can draw such a position again and loses one); no update after
    the very first step, when no similarity exists; ties go to the lower index, without noise; every layer that epsilon
    makes too dense is dense.

    Args:
        sparsity: target fraction of zeros, by default 0.9, or what ``initial_mask`` holds; not together with
            ``epsilon``.
        epsilon: density epsilon (n_in + n_out) / (n_in n_out) of each layer, as published; same as
            ``distribution="epsilon(1)"``.
        distribution: how layers share the sparsity: a name such as ``"uniform"``, a mapping ``{glob: sparsity or name}``, a callable
            or an object; see :class:`~sparse_callbacks.core.method.Method`.
        variant: ``"sim"``, ``"seq"`` or ``"pure"`` (similarity only).
        every: optimizer steps (int) or fraction of the run (float) between updates; None: an epoch.
        start: time of the first update, in the same units, or one interval after step 1, if that is later.
        stop: time after which no update comes, in the same units.
        drop_fraction: share of active weights that an update replaces; constant, or a curve such as ``"cosine(0.3)"``.
        monitor: name of a metric logged in validation, which ``"seq"`` requires and the other variants do not read.
        mode: which way ``monitor`` improves, ``"max"`` or ``"min"``.
        patience: validated epochs without strict improvement of ``monitor`` after which ``"seq"`` grows at random.
        data_fraction: share of the batches that the pass looks at, from the first on, in (0, 1].
        forward: function of module and batch that gives the network's output; default: by the
            batch's type, ``module(batch)``, ``module(batch[0])`` or ``module(**batch)``.
        statistics_dataloader: the data of the pass; default: the training data, not shuffled.
        initial_mask: where the first masks lie: ``"random"``, ``"magnitude"``, a score such as ``"snip"``, ``"nonzero"``, the path of a
            checkpoint, or a state dict; see :class:`~sparse_callbacks.core.initial_masks.StartsSparse`.
        rescale: ``"layer"`` or ``"fan_in"``: active weights of a new run are made larger once, to make up for the inputs that are
            gone; None: they stay as they are.
        include: glob, or globs, on the names of parameters that become sparse; None: the weights of all supported layers except
            embeddings.
        exclude: glob, or globs, on the names of parameters that stay dense.
        seed: whole number from which everything random derives, together with the step and the parameter's name.
        **options: ``keep_dense``, ``print_plan`` and ``fresh_start``; see :class:`~sparse_callbacks.core.method.Options`.

    Raises:
        ValueError: arguments out of range, or a model, optimizer, data or checkpoint that does not fit; before the
            first step.

    Example:
        >>> from sparse_callbacks import CTRE
        >>> CTRE(epsilon=1, variant="seq", monitor="val_acc").variant
        'seq'

    Reference: Atashgahi, Pieterse, Liu, Mocanu, Veldhuis, Pechenizkiy: A brain-inspired algorithm for training highly
    sparse neural networks. Machine Learning 111, 2022, algorithms 1 and 2.
    """

    reads_dense_gradients: ClassVar[bool] = False

    def __init__(
        self,
        sparsity: float | None = None,
        *,
        epsilon: float | None = None,
        distribution: Distribution = PUBLISHED,
        variant: Variant = "sim",
        every: Time | None = None,
        start: Time = 0,
        stop: Time = 1.0,
        drop_fraction: float | str | Schedule = 0.2,
        monitor: str | None = None,
        mode: Mode = "max",
        patience: int = 40,
        data_fraction: float = 1.0,
        forward: Forward | None = None,
        statistics_dataloader: Any | None = None,
        initial_mask: InitialMask = "random",
        rescale: Rescale | None = None,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        if variant not in ("sim", "seq", "pure"):
            raise ValueError(f"variant={variant!r} is not known. Give 'sim', 'seq' or 'pure'.")
        check_patience("seq", variant, monitor, mode, patience)
        if not 0.0 < data_fraction <= 1.0:
            raise ValueError(
                f"data_fraction={data_fraction!r} is not a share of the training data in (0, 1]. For all of it "
                "give 1.0."
            )
        # before the base looks at the distribution, which epsilon= stands for
        distribution = _with_epsilon(sparsity, epsilon, distribution)
        super().__init__(
            sparsity,
            distribution=distribution,
            every=every,
            start=start,
            stop=stop,
            drop_fraction=drop_fraction,
            initial_mask=initial_mask,
            rescale=rescale,
            include=include,
            exclude=exclude,
            seed=seed,
            **options,
        )
        # over the base's cosine: CTRE replaces a constant share, as published
        self._fractions = as_schedule(drop_fraction, "constant", name="drop_fraction")
        self.epsilon, self.variant = epsilon, variant
        self.monitor, self.mode, self.patience = monitor, mode, patience
        self.data_fraction, self.forward, self.statistics_dataloader = data_fraction, forward, statistics_dataloader
        self._began: dict[int, int] = {}  # steps of each optimizer when the latest window began

    # ------------------------------------------------------------------ when

    def fraction_at(self, number: int) -> float:
        return self._fractions(number, self.times.start, self.times.stop)  # a number stays as it is here

    def make_calendar(self, run: RunLength) -> Calendar:
        assert self.start is not None
        made = resolve_times(self.every, self.start, self.stop, 1, run)
        interval = made.every
        if self.every is None:
            if math.isinf(length := run.epoch()):
                raise ValueError(
                    "every=None is one update an epoch, and the training loader has no length. Give every= in steps, or "
                    "epoch= where sparsify() is called."
                )
            interval = max(1, int(length))
        first = made.start if made.start > 1 else 1 + interval  # after the first step there is no similarity yet
        return Calendar(interval, first, max(first, made.stop))

    def attach(self, model: nn.Module) -> None:
        self._began = {}
        list(layers_of(model, self._all_layers()))  # refuses what has no similarity before there is a batch

    def _all_layers(self) -> dict[str, nn.Parameter]:
        """The sparse parameters, and those that become so once they are trained."""
        return self.params | {n: self.model.get_parameter(n) for n in names_awaited(self.entries)}

    def rehearse(self) -> None:
        if not self.at_random:  # a batch shows whether the activations of every layer can be found
            self._measure(0.0)

    def window_start(self, batch: int) -> None:
        if self.at_random:
            return
        if self._update_follows():
            # before the step that the update follows, with the weights that the forward pass of that step sees
            sums = self._measure(self.data_fraction)
            self.aux |= {f"similarity/{name}": cosine_similarity(s) for name, s in sums.items()}

    def batch_end(self, end: BatchEnd) -> Figures:
        if not end.window_open:  # a step that was skipped comes again, with a pass of its own
            self.aux = {key: t for key, t in self.aux.items() if not key.startswith("similarity/")}
        return {}

    def _update_follows(self) -> bool:
        """A step of the coming batch, if it is taken, brings an update."""
        begin, found = self.progress.grid_start(self.times), False
        for index, count in self.progress.counts.items():
            most = count.at_most()
            span = max(1, most - self._began.get(index, most))  # in manual optimization a batch may have several steps
            self._began[index] = most
            done = self.progress.done.get(index)
            due = self.times.next(0, begin, done)
            if due is not None and most + span >= due:
                step = count.read() + 1  # may wait for the device
                due = self.times.next(step, begin, done)
                found |= due is not None and due < step + span
        return found

    def _measure(self, fraction: float) -> dict[str, CosineSums]:
        """Sums over a pass for every sparse layer that the network used; with fraction 0 over one batch."""
        made = self.host.data_pass(fraction or 1.0, forward=self.forward, loader=self.statistics_dataloader)
        # a batch is enough to see whether activations can be found, which is what fraction 0 is for
        with closing(made) as outputs:  # where measuring fails, flags and random states are put back now
            if not fraction:
                return measure_similarity(self.model, self._all_layers(), islice(outputs, 1))
            return measure_similarity(self.model, self.params, outputs)

    # ------------------------------------------------------------------ how

    def after_step(self, step: Step) -> Update | None:
        # without a pass before it (as for the very first step) an update would not know where to grow
        measured = any(f"similarity/{name}" in self.aux for name in step.names)
        return self.new_masks(step) if step.due and (self.at_random or measured) else None

    def new_masks(self, step: Step) -> Update:
        grown = GrowthFigures()
        measured = [n for n in step.names if self.at_random or f"similarity/{n}" in self.aux]
        masks = {n: self._new_mask(step, n, grown) for n in measured}
        figures = {"update/drop_fraction": self.fraction_at(step.number)} | {
            f"update/{k}": v for k, v in grown.figures().items()
        }
        return Update(masks, figures | self.own_figures(phase=float(self.at_random)))

    def after_update(self, step: Step) -> None:
        # as large as the weights, and of no use once the masks have moved
        for name in step.names:
            self.aux.pop(f"similarity/{name}", None)

    def _new_mask(self, step: Step, name: str, grown: GrowthFigures) -> Tensor:
        mask, weight = self.weights.masks[name], self.params[name].detach()
        count = drop_count(self.weights.active_counts[name], self.fraction_at(step.number))
        if self.at_random:
            grown.drawn += count
            return drop_and_grow(mask, weight, self._draw(step, name), count)
        similarity = self.aux[f"similarity/{name}"].to(weight.device)
        kept, proposed = propose_growth(mask, weight, similarity, count)
        if self.variant != "sim":
            grown.add(similarity, proposed)
            return kept | proposed
        # algorithm 2: what was only just dropped and proposed again gives way to a random position
        accepted, drawn = replace_regrown(mask, kept, proposed, self._draw(step, name))
        grown.add(similarity, accepted)
        grown.drawn += int(drawn.count_nonzero())
        return kept | accepted | drawn

    def _draw(self, step: Step, name: str) -> Tensor:
        """Uniform numbers in [0, 1) of the parameter's shape."""
        return uniform_like(self.params[name], self.generator(name, step.number))

    def new_weights(self, step: Step, name: str) -> Tensor:
        return fresh_values(self, name, step.number)

    # ------------------------------------------------------------------ patience

    @property
    def _patience(self) -> Patience | None:
        if self.monitor is None or self.variant != "seq":
            return None
        return Patience(self.aux, self.monitor, self.mode, self.patience, next(iter(self.params.values())).device)

    @property
    def at_random(self) -> bool:
        """Growth is random from here on, because the monitored metric has stopped improving."""
        return self._patience is not None and self._patience.over

    def validation_end(self, metrics: Mapping[str, float], epoch: int | None) -> None:
        if self._patience is None:
            return
        if epoch is None:
            self._patience.sanity(metrics)
        else:
            self._patience.validated(metrics, epoch)

    def epoch_start(self, epoch: int) -> None:
        if self._patience is not None:
            self._patience.epoch_started(epoch)

    def epoch_end(self, metrics: Mapping[str, float], epoch: int) -> None:
        if self._patience is not None:
            self._patience.epoch_ended(metrics, epoch)


def _with_epsilon(sparsity: float | None, epsilon: float | None, distribution: Distribution) -> Distribution:
    """The distribution that the three arguments mean together."""
    if epsilon is not None:
        epsilon_sparsity({}, epsilon)
        if distribution not in (PUBLISHED, f"epsilon({epsilon})"):
            raise ValueError(
                f"epsilon={epsilon} and distribution={distribution!r} both share out the weights. Give one of them."
            )
        distribution = f"epsilon({epsilon})"
    if is_epsilon(distribution) and sparsity is not None:
        raise ValueError(
            f"sparsity={sparsity} and {distribution} both say how many weights there are. Give sparsity= or epsilon=."
        )
    clipped(distribution, {})  # refuses what is not a number
    return distribution


@why_no_exchange.register
def _(method: CTRE) -> str:
    return "scores every weight of a layer by the similarity of its neurons, pruned ones too, so its layers are whole"
