"""Hidden neurons of little importance: those whose incoming weights are small."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparse_callbacks.core.awaited import waits
from sparse_callbacks.core.calendar import Calendar, RunLength, Time
from sparse_callbacks.core.schedules import to_steps
from sparse_callbacks.core.selection import Entry


@dataclass(frozen=True)
class ImportanceTimes:
    """Times at ``start``, ``start + every``, ..., in optimizer steps."""

    start: int
    every: int

    def falls(self, before: int | None, now: int) -> bool:
        """Whether one of the times falls after step ``before`` (None: from the beginning) and up to step ``now``.

        >>> times = ImportanceTimes(10, 5)
        >>> times.falls(None, 9), times.falls(9, 10), times.falls(10, 14), times.falls(13, 21)
        (False, True, False, True)
        """
        return self._count(now) > (0 if before is None else self._count(before))

    def _count(self, number: int) -> int:
        """How many of the times have come with step ``number``."""
        return max(0, (number - self.start) // self.every + 1)


def unimportant_neurons(weight: Tensor, mask: Tensor, share: float) -> Tensor:
    """Live neurons whose importance, the sum of |incoming weights|, is at or below a quantile over all live neurons.

    A neuron is live with an active incoming weight. Where that is every live neuron, as with equal sums, it is none.

    Args:
        weight: ``[neurons, inputs]``.
        mask: bool, of its shape, the active weights.
        share: the quantile, in (0, 1), with linear interpolation between two neurons.

    Returns:
        bool ``[neurons]``.
    """
    live = mask.any(1)
    importance = torch.where(mask, weight.detach(), 0).double().abs().sum(1)
    if not bool(live.any()):
        return live
    found = live & (importance <= importance[live].quantile(share))
    return found if bool((live & ~found).any()) else torch.zeros_like(live)


def hidden_layers(entries: Sequence[Entry]) -> list[str]:
    """Names of the weights whose rows are hidden neurons that may go: of each linear layer that is sparse, or will be once it is
    trained, but the last linear layer of the network in the order of registration.

    Args:
        entries: all parameters of the model.
    """
    linear = [e for e in entries if e.linear]
    return [e.name for e in linear[:-1] if not e.reason or waits(e)]


def why_hidden_output(model: nn.Module, entries: Sequence[Entry], outputs: Iterator[object]) -> str:
    """A warning where a layer that loses neurons is the linear layer that a network calls last, as its output is; else empty.

    Args:
        model: the network.
        entries: all parameters of it.
        outputs: runs the network, eagerly, as its first element is taken.
    """
    linear = [e.name for e in entries if e.linear]
    called: list[str] = []
    handles = [
        # other modules hold a matrix of weights that they do not call
        module.register_forward_hook(lambda *_, name=name: called.append(name))
        for name in linear
        if isinstance(module := model.get_submodule(name.rpartition(".")[0]), nn.Linear)
    ]
    try:
        next(outputs, None)
    finally:
        for handle in handles:
            handle.remove()
    if not called or called[-1] not in hidden_layers(entries):
        return ""
    return (
        f"neuron_importance= takes the linear layer that is registered last, {linear[-1]}, for the output, and {called[-1]} is called "
        f"last: if that is the output, classes lose all of their weights. Give exclude={called[-1]!r}, or register it last."
    )


def check_importance_times(start: Time, every: Time) -> None:
    """Refuse times that are wrong whatever the length of the run.

    Raises:
        ValueError: a value that is not a time, or no interval.
    """
    for name, value in (("importance_start", start), ("importance_every", every)):
        to_steps(value, 1, name)
    if every == 0:
        raise ValueError(
            f"importance_every={every!r} is not an interval between removals of neurons. Give optimizer steps (1 or more) or a "
            "fraction of the run."
        )


def resolve_importance_times(start: Time, every: Time, calendar: Calendar, run: RunLength) -> ImportanceTimes:
    """The times at which neurons are removed in a run.

    Args:
        start: the time of the first removal.
        every: the interval between removals.
        calendar: the updates of the run, at which neurons are removed.
        run: the length of the run.

    Raises:
        ValueError: the first removal would come after the last update.
    """

    def steps(value: Time, name: str) -> int:
        return value if isinstance(value, int) else to_steps(value, run.total(), name)

    first = steps(start, "importance_start")
    if first > calendar.last and not run.lenient:
        raise ValueError(
            f"importance_start={start!r} ({first} steps) lies after the last update, at step {calendar.last}, and neurons are "
            "removed at updates. Give an earlier importance_start= or a later stop=."
        )
    return ImportanceTimes(first, max(1, steps(every, "importance_every")))
