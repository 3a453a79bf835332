"""Sup-tickets: several sparse networks of the last part of training, merged into one."""

from collections.abc import Generator, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any, ClassVar, Literal

from torch import nn

from sparse_callbacks.core.calendar import Calendar, RunLength
from sparse_callbacks.core.checkpoint import shown
from sparse_callbacks.core.constructors import argument_names, argument_values
from sparse_callbacks.core.hooks import BatchEnd, Figures
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.method import Options
from sparse_callbacks.core.plan import Plan
from sparse_callbacks.core.running_statistics import norms_with_statistics, renew_statistics
from sparse_callbacks.core.step import SetsRates, Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.methods.drop_and_grow import DropAndGrow
from sparse_callbacks.methods.sup_tickets import phase
from sparse_callbacks.methods.sup_tickets.around import (
    check_arguments,
    check_base,
    class_around,
    copy_around,
    refuse_optimizers,
    refuse_synchronized,
)
from sparse_callbacks.methods.sup_tickets.tickets import MERGED, install, keeps_shares, take_ticket


class SupTickets(SetsRates, DropAndGrow):
    """Sup-tickets: a drop-and-grow method, and at the end cycles whose networks are merged (Yin et al., 2022).

    The first part of the run, 1 - ``share`` of it, is that of the method ``base``, as it is without this one; the network at its
    end is the first ticket. ``cycles`` cycles of equal length follow::

        begin   one update by the rule of base drops drop_fraction of each layer's active weights and grows as many;
                until the cycle ends the masks stay
        rate    low_lr -> high_lr -> low_lr, linearly
        end     the network is ticket n + 1, and m = (1 - f) * m + f * ticket with f = 1 / (n + 1); then m is pruned to the
                number of active weights that the network has, by magnitude over all layers

    Training goes on from the ticket, not from m. After the last step m takes the place of the network, with its masks, and the
    statistics of batch norms are estimated anew in a pass over the training data; the last validation and the last checkpoint
    see that network. Biases and gains of norms are averaged too, buffers are not.

    Until the first merge ``plan()``, masks and figures are those of ``base``. From then on the number of zeros of the whole network
    is planned, and it is exact; layers without zeros stay dense, and every layer keeps a weight (three under
    ``distribution="global(3)"``). Where a budget of cost decides (:class:`~sparse_callbacks.Spdy`, or another distribution that
    looks at the model) m is pruned within each layer instead, to the number of weights that the layer has, so that the budget and
    the plan hold to the end. The times of ``base`` are those of the first part: fractions are fractions of it, and an update that
    would come after it does not come. The rates are those of the group of parameters with the largest rate when the cycles begin;
    other groups have theirs in proportion. They are set for each step alone: the schedule goes on, and monitors show its rates. A
    run that ends within a cycle keeps the tickets merged so far; one that a callback stops (``EarlyStopping``) keeps the network
    that it trains. The object is also one of the class of ``base``. Costs one copy of all weights and a pass over the training
    data.

    Differs from the released code: an update grows by the rule of ``base``, where the code grows by gradients also for SET; times
    are in steps, not epochs; the last step of a cycle has the low rate, where the code's is a step of the triangle above it;
    counters of batch norms are not averaged; merged weights are pruned among the layers that have zeros, and under a budget of
    cost layer by layer.

    Passes over the weights in a step: 1 in place (the mask on the weights) and 1 that reads
    (gradients, for inf and NaN), as in the method that it is around.

    Args:
        base: a new SET, RigL, SNFS or other :class:`~sparse_callbacks.DropAndGrow`, with ``sparsity``, ``include``, ``seed``,
            ``print_plan`` and all else that concerns masks; not CTRE, and without ``pattern`` and sparse storage.
        share: share of the run's optimizer steps, in (0, 1), that the cycles have together.
        cycles: their number, each of at least three steps.
        low_lr: learning rate at the beginning and the end of a cycle; None: a hundredth of the largest that the run has had or
            its schedule begins or peaks with, as published (or ``high_lr``, if that is less).
        high_lr: learning rate in the middle of a cycle; None: five times ``low_lr``, as published.
        drop_fraction: fraction of a layer's active weights that the update at the beginning of a cycle replaces.
        average: ``"cumulative"``, as above, or ``"moving"``: f = 0.5.
        forward: a function of the module and a batch that returns the network's output, for the pass over the data; None: by the
            type of the batch.
        statistics_dataloader: loader for that pass, used as it is; None: the training data in order.

    Raises:
        ValueError: another kind of method, arguments out of range, a run without a known length or without room for the cycles,
            several optimizers, an optimizer without a rate, or a model or checkpoint that does not fit; before the first batch.

    Example:
        >>> from sparse_callbacks import RigL, SupTickets
        >>> SupTickets(RigL(0.9), share=0.1, cycles=3, low_lr=0.001, high_lr=0.005).cycles
        3

    Reference: Yin, Menkovski, Fang, Huang, Pei, Pechenizkiy, Mocanu, Liu: Superposing Many Tickets into One: A Performance
    Booster for Sparse Neural Network Training. UAI 2022, arXiv 2205.15322, algorithm 1.
    """

    outer: ClassVar[type]
    """The class without the kind of ``base``."""

    def __init__(
        self,
        base: DropAndGrow,
        *,
        share: float = 0.1,
        cycles: int = 3,
        low_lr: float | None = None,
        high_lr: float | None = None,
        drop_fraction: float = 0.5,
        average: Literal["cumulative", "moving"] = "cumulative",
        forward: Forward | None = None,
        statistics_dataloader: Any | None = None,
    ) -> None:
        check_base(base)
        given = {"share": share, "cycles": cycles, "low_lr": low_lr, "high_lr": high_lr}
        check_arguments({**given, "drop_fraction": drop_fraction, "average": average})
        # of both kinds: whatever asks for the class of a method finds the rules of the base
        self.__class__ = class_around(type(self), type(base))
        super().__init__(**argument_values(base, Options))
        self.base, self.share, self.cycles, self.low_lr, self.high_lr = base, share, cycles, low_lr, high_lr
        self.drop_fraction, self.average = drop_fraction, average
        self._fraction_at_begin = float(drop_fraction)
        self.forward, self.statistics_dataloader = forward, statistics_dataloader
        self._explores_now = False  # the current step may begin a cycle
        self._announced: Step | None = None
        self._skipped = 0  # skipped steps of this fit that are counted

    # ------------------------------------------------------------------ where the run stands

    @property
    def bounds(self) -> list[int]:
        """Optimizer steps of this run: at which each cycle begins, and at which the last one ends.

        Empty before training, and where a trial run has no room for cycles.
        """
        return phase.bounds_in(self.aux)

    @property
    def position(self) -> int:
        """Optimizer steps of this run, replaced and skipped ones included."""
        return phase.number_in(self.aux, "steps")

    @property
    def tickets(self) -> int:
        """Tickets found so far, that of the first part included."""
        return phase.number_in(self.aux, "tickets")

    @property
    def is_merged(self) -> bool:
        """The merged ticket is the network."""
        return bool(phase.number_in(self.aux, "installed"))

    # ------------------------------------------------------------------ a run begins

    def attach(self, model: nn.Module) -> None:
        super().attach(model)
        if self.saved is None or not self.saved.times:  # a run begins
            self._forget_tickets()
            self.aux = {key: t for key, t in self.aux.items() if not key.startswith(phase.OF_RUN)}
            phase.note(self.aux, steps=0)

    def make_calendar(self, run: RunLength) -> Calendar:
        bounds = phase.keep_bounds(self.aux, run, self.share, self.cycles)
        if not bounds:
            return super().make_calendar(run)
        if bounds[-1] < run.total() and not run.lenient:
            self.host.warn(phase.of_longer_run(bounds[-1], run.total()))
        calendar = super().make_calendar(replace(run, total=lambda: float(bounds[0])))
        late = isinstance(self.stop, int) and calendar.stop > self.step + bounds[0] - self.position
        if late and not self.tickets and not run.lenient:
            self.host.warn(phase.of_late_updates(self.stop, bounds))
        return calendar

    def rehearse(self) -> None:
        super().rehearse()
        if not self.bounds or self.is_merged:
            return
        refuse_optimizers(type(self).__name__, self.owners.optimizers)
        norms = norms_with_statistics(self.model)
        refuse_synchronized(norms)
        if norms:
            # a batch shows whether the model can be called as forward= says, before a run has been spent
            with closing(self._pass()) as outputs:
                next(outputs, None)

    def begin_training(self, epoch: int) -> Figures:
        self._skipped, self._announced, self._explores_now = 0, None, False
        return super().begin_training(epoch)

    # ------------------------------------------------------------------ one step

    def wants_dense_gradients(self, step: Step) -> bool:
        self._direct(step)
        return super().wants_dense_gradients(step)

    def before_step(self, step: Step) -> None:
        cycle = self._direct(step)
        self._announced = step
        if cycle is not None and cycle < self.cycles:
            step.use_rates(phase.rates_now(self.aux, step.optimizer, cycle, self.low_lr, self.high_lr))
        super().before_step(step)

    def after_step(self, step: Step) -> Update | None:
        update = super().after_step(step)
        if phase.cycle_in(self.aux) is None:
            phase.note_peak(self.aux, step.optimizer)
        self._count_step()
        return update

    def new_masks(self, step: Step) -> Update:
        update = super().new_masks(step)
        if self._explores_now:
            phase.note(self.aux, explored=1 + (phase.cycle_in(self.aux) or 0))
        if step.replaced:
            self._count_step()
        return update

    def fraction_at(self, number: int) -> float:
        return self._fraction_at_begin if self._explores_now else super().fraction_at(number)

    def _direct(self, step: Step) -> int | None:
        """Let the first step of a cycle bring its update (the next one where it has no finite gradient), and no other step
        of the cycles any; gives the cycle."""
        cycle = phase.cycle_in(self.aux)
        self._explores_now = phase.awaits_update(self.aux, self.cycles)
        if cycle is not None:
            step.call_for_update(self._explores_now)
        return cycle

    def _count_step(self) -> None:
        phase.note(self.aux, steps=self.position + 1)
        self._announced = None

    # ------------------------------------------------------------------ tickets

    def batch_end(self, end: BatchEnd) -> Figures:
        figures = super().batch_end(end)
        if (missed := end.skipped - self._skipped) > 0:
            phase.note(self.aux, steps=self.position + missed)
        elif self._announced is not None and self._announced.taken:
            self._count_step()  # another method on this optimizer has replaced the step
        self._skipped = end.skipped
        if not end.window_open:
            self._announced = None
            self._look_for_tickets(end.run_over)
        return figures

    def _look_for_tickets(self, run_over: bool) -> None:
        bounds = self.bounds
        while self.tickets < len(bounds) and self.position >= bounds[self.tickets]:
            take_ticket(self, 0.5 if self.average == "moving" else 1 / (self.tickets + 1))
            phase.note(self.aux, tickets=self.tickets + 1)
        if self.is_merged or not bounds:
            return
        complete = self.tickets == len(bounds)
        if run_over and not complete:
            self.host.warn(phase.of_early_end(type(self).__name__, self.aux))
        if complete or (run_over and self.tickets > 1):
            self._install()

    def _install(self) -> None:
        """The merged ticket takes the place of the network, with statistics of its own."""
        install(self)
        self._forget_tickets()
        phase.note(self.aux, installed=1)
        norms = [m for m in norms_with_statistics(self.model) if m.training]  # those in eval mode are frozen
        renew_statistics(norms, self._pass, self.host.warn)

    def _forget_tickets(self) -> None:
        self.aux = {key: t for key, t in self.aux.items() if not key.startswith(MERGED)}

    def _pass(self, train: Sequence[nn.Module] = ()) -> Generator[Any, None, None]:
        return self.host.data_pass(forward=self.forward, loader=self.statistics_dataloader, train=train)

    # ------------------------------------------------------------------ words

    def plan(self, model: nn.Module | None = None) -> Plan:
        made = super().plan(model)
        if model is not None or self.tickets < 2 or keeps_shares(self):
            return made
        # as many as the network has, which are more than the base has planned where units lose all of their weights
        zeros = {name: int((~mask).sum()) for name, mask in self.masks.items()}
        return made.joined(sum(zeros.get(row.name, row.zeros or 0) for row in made if row.name in made.selected))

    def figures(self) -> dict[str, float]:
        merged = {"tickets/merged": float(self.tickets)} if self.tickets > 1 else {}
        return {**super().figures(), **merged}

    def outcome(self) -> dict[str, str]:
        merged = {"merged tickets": str(self.tickets)} if self.is_merged else {}
        return {**super().outcome(), **merged}

    @property
    def arguments(self) -> dict[str, str]:
        """Constructor arguments of the base as text, and over them those of the cycles.

        The base's own ``drop_fraction`` is ``base.drop_fraction``.
        """
        inner = {k: v for k, v in self.base.arguments.items() if k != "drop_fraction"}
        mine = {name: shown(getattr(self, name)) for name in argument_names(SupTickets, Options) if name != "base"}
        kept = {"base": type(self.base).__name__, "base.drop_fraction": shown(self.base.drop_fraction)}
        return {**kept, **inner, **{k: v for k, v in mine.items() if k not in Options.__annotations__}}

    def __repr__(self) -> str:
        mine = [n for n in argument_names(SupTickets, Options) if n not in Options.__annotations__]
        return f"{type(self).__name__}({', '.join(f'{n}={shown(getattr(self, n))}' for n in mine)})"

    def __reduce__(self) -> tuple[Any, ...]:
        return copy_around, (self.outer, type(self.base)), self.__getstate__()
