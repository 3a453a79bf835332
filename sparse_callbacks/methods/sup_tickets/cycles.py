"""Cycles of Sup-tickets: when they begin, their learning rate, and how tickets are merged."""

import math
from collections.abc import Sequence

from torch import Tensor

from sparse_callbacks.core.ops import keep_largest_jointly
from sparse_callbacks.core.schedules import to_steps

SHORTEST = 3  # steps of a cycle: at the low rate, at the high one and at the low one again
LOW = 0.01  # of the published low rate, 0.001, to that of the run, 0.1
RATIO = 5.0  # of the published high rate to the low one


def lay_out(total: float, share: float, cycles: int) -> list[int]:
    """Where the cycles of a run lie: the step at which each begins, and that at which the last one ends.

    They share the last ``share`` of the run equally, up to a step.

    Args:
        total: optimizer steps of the run.
        share: the share of the run that all cycles have together, in (0, 1).
        cycles: their number.

    Raises:
        ValueError: the run has no known end, or no room for the cycles.

    >>> lay_out(100, 0.1, 3)
    [90, 93, 96, 100]
    """
    if math.isinf(total):
        raise ValueError(
            f"share={share:g} is a share of the run, and this run has no known length. Give Trainer(max_epochs=) or "
            "max_steps=, or steps= of sparsify()."
        )
    length = to_steps(share, total, "share")
    begin = int(total) - length
    if not has_room(total, share, cycles):
        raise ValueError(
            f"share={share:g} of a run of {total:g} optimizer steps is {length}, and cycles={cycles} need at least "
            f"{SHORTEST} steps each ({SHORTEST * cycles}) behind a first part of at least one. Give fewer cycles=, "
            "another share=, or a longer run."
        )
    return [begin + length * i // cycles for i in range(cycles + 1)]


def has_room(total: float, share: float, cycles: int) -> bool:
    """Whether the last ``share`` of a run of ``total`` steps has room for the cycles, behind a first part."""
    length = to_steps(share, total, "share")
    return length >= SHORTEST * cycles and total - length >= 1


def triangle(way: float, low: float, high: float) -> float:
    """The learning rate of a cycle: ``low`` where it begins, ``high`` in its middle, ``low`` where it ends.

    Args:
        way: the part of the cycle that is over, in [0, 1].
        low, high: the rates.

    >>> [triangle(way, 0.0, 1.0) for way in (0.0, 0.25, 0.5, 0.75, 1.0)]
    [0.0, 0.5, 1.0, 0.5, 0.0]
    """
    up = 1.0 - abs(2.0 * way - 1.0)
    return (1.0 - up) * low + up * high


def rates_of_groups(
    present: Sequence[float], way: float, low: float | None, high: float | None, of_run: float
) -> list[float]:
    """Learning rates of groups of parameters in a cycle: :func:`triangle` for that with the largest, others in proportion.

    Args:
        present: the rates of the groups when the cycles begin; where all are 0 the groups have equal ones.
        way: the part of the cycle that is over, in [0, 1].
        low: the low rate; None: :data:`LOW` times that of the run, or ``high`` if that is less.
        high: the high rate; None: :data:`RATIO` times the low one.
        of_run: the largest rate of the run.

    >>> rates_of_groups([0.1, 0.05], 0.5, 0.001, 0.004, 0.1)
    [0.004, 0.002]
    """
    largest = max(present)
    if low is None:
        low = LOW * of_run if high is None else min(LOW * of_run, high)
    rate = triangle(way, low, RATIO * low if high is None else high)
    return [rate * (own / largest) if largest else rate for own in present]


def merge(merged: Tensor, ticket: Tensor, factor: float) -> Tensor:
    """The values of two networks as one: ``(1 - factor) * merged + factor * ticket``.

    >>> merge(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 0.5]), 0.5)
    tensor([0.5000, 0.2500])
    """
    return (1.0 - factor) * merged + factor * ticket


def within_budget(layers: Sequence[Tensor], active: int, least: int = 1) -> list[Tensor]:
    """Masks of the ``active`` largest magnitudes over all ``layers``.

    Args:
        layers: values of the layers.
        active: how many stay.
        least: how many each layer keeps at least; all, where it has fewer. Where they are together more than ``active``,
            layers may be emptied.

    >>> within_budget([torch.tensor([0.9, 0.35, 0.2]), torch.tensor([-1.5, 0.0, 0.15])], 3)
    [tensor([ True,  True, False]), tensor([ True, False, False])]
    """
    possible = sum(min(least, layer.numel()) for layer in layers) <= active
    return keep_largest_jointly(list(layers), active, least=least if possible else 0)
