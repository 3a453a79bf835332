"""Phases of a run of Sup-tickets: its cycles, steps and tickets so far, in the ``aux`` of the method."""

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.calendar import RunLength
from sparse_callbacks.methods.sup_tickets.cycles import has_room, lay_out, rates_of_groups

OF_RUN = "phase/"


def number_in(aux: Mapping[str, Tensor], name: str) -> int:
    """A number of the run, such as its ``steps`` or ``tickets``; 0 where none was kept."""
    return int(aux.get(OF_RUN + name, 0))


def note(aux: MutableMapping[str, Tensor], **numbers: int) -> None:
    """Keep numbers of the run under their names."""
    aux.update({OF_RUN + name: torch.tensor(number) for name, number in numbers.items()})


def bounds_in(aux: Mapping[str, Tensor]) -> list[int]:
    """The step at which each cycle begins, and that at which the last one ends; empty where there are none."""
    found = aux.get(f"{OF_RUN}bounds")
    return [] if found is None else [int(step) for step in found.tolist()]


def cycle_in(aux: Mapping[str, Tensor]) -> int | None:
    """The cycle that the coming step belongs to; None before the first one, and their number after the last."""
    bounds, position = bounds_in(aux), number_in(aux, "steps")
    if not bounds or position < bounds[0]:
        return None
    return sum(bound <= position for bound in bounds) - 1


def awaits_update(aux: Mapping[str, Tensor], cycles: int) -> bool:
    """Whether the coming step belongs to one of the cycles, and that cycle has not had its update yet."""
    cycle = cycle_in(aux)
    return cycle is not None and cycle < cycles and number_in(aux, "explored") <= cycle


def keep_bounds(aux: MutableMapping[str, Tensor], run: RunLength, share: float, cycles: int) -> list[int]:
    """Lay the cycles of a run out, or keep those that it has begun; a trial run without room for them has none.

    Args:
        aux: tensors of the method; the bounds lie there afterwards.
        run: the length of the run.
        share, cycles: arguments of the method.

    Raises:
        ValueError: no room for the cycles, or a run that ends before those it has begun.
    """
    bounds, total = bounds_in(aux), run.total()
    if bounds and number_in(aux, "steps") >= bounds[0]:
        if bounds[-1] > total and not run.lenient:
            raise ValueError(
                f"the cycles of this run were laid out up to step {bounds[-1]}, and it ends at step {total:g}. Train longer, "
                "or give fresh_start=True for new masks and cycles."
            )
    elif run.lenient and not has_room(total, share, cycles):
        return []
    else:
        bounds = lay_out(total, share, cycles)
    aux[f"{OF_RUN}bounds"] = torch.tensor(bounds)
    return bounds


def note_peak(aux: MutableMapping[str, Tensor], optimizer: Optimizer) -> None:
    """Keep the largest rate that a step before the cycles was taken with; rates on accelerators are not waited for."""
    rates = [group["lr"] for group in optimizer.param_groups]
    seen = max((float(r) for r in rates if not isinstance(r, Tensor) or r.device.type == "cpu"), default=0.0)
    if seen > float(aux.get(f"{OF_RUN}peak", 0.0)):
        aux[f"{OF_RUN}peak"] = torch.tensor(seen, dtype=torch.float64)


def rates_now(
    aux: MutableMapping[str, Tensor], optimizer: Optimizer, cycle: int, low: float | None, high: float | None
) -> list[float]:
    """The rates of an optimizer's groups in the coming step, which belongs to a cycle.

    Args:
        aux: tensors of the method; the optimizer's own rates are kept there when they are first asked for.
        optimizer: the optimizer.
        cycle: the number of the cycle.
        low, high: see :func:`~sparse_callbacks.methods.sup_tickets.cycles.rates_of_groups`.
    """
    own = aux.get(f"{OF_RUN}rates")
    if own is None:
        own = torch.tensor([float(group["lr"]) for group in optimizer.param_groups], dtype=torch.float64)
    if len(own) < len(optimizer.param_groups):
        own = _with_new_groups(own, [float(group["lr"]) for group in optimizer.param_groups])
    aux[f"{OF_RUN}rates"] = own
    begin, end = bounds_in(aux)[cycle : cycle + 2]
    way = (number_in(aux, "steps") - begin) / (end - 1 - begin)
    # of a loop that sets rates by hand nobody but the steps knows the largest one
    of_run = max(float(aux.get(f"{OF_RUN}peak", 0.0)), *own.tolist(), *map(_rate_of_schedule, optimizer.param_groups))
    return rates_of_groups(own.tolist(), way, low, high, of_run)


def _with_new_groups(own: Tensor, present: Sequence[float]) -> Tensor:
    """The rates that groups had when the cycles began, and such rates of groups that have come since: in the proportion to the
    others that theirs have now.

    Args:
        own: rates of the groups that were there, float64.
        present: the rates of all groups now, those of the older ones first.
    """
    before, now = float(own.max()), max(present[: len(own)])
    scale = before / now if now else 1.0
    return torch.cat([own, torch.tensor([rate * scale for rate in present[len(own) :]], dtype=own.dtype)])


def _rate_of_schedule(group: Mapping[str, Any]) -> float:
    """The rate that a schedule begins or peaks with; 0 without one."""
    return float(group.get("max_lr", group.get("initial_lr", 0.0)))


def of_late_updates(stop: float, bounds: list[int]) -> str:
    """A warning of a base whose last update would come after the first part."""
    return (
        f"stop={stop} lies behind the first part of the run, which ends with step {bounds[0]} of {bounds[-1]}: updates at their "
        "interval end there, and the cycles begin. Give stop= as a fraction of that part, or a smaller share=."
    )


def of_longer_run(end: int, total: float) -> str:
    """A warning of a run that goes on for longer than it was to last when its cycles began."""
    return (
        f"the cycles of this run were laid out up to step {end}, and it goes on to step {total:g}: after step {end} the merged "
        "network is trained on by the schedule of the run, with masks that stay. Give fresh_start=True for new masks and cycles, "
        "or train for no longer than before."
    )


def of_early_end(method: str, aux: Mapping[str, Tensor]) -> str:
    """A warning of a run that ends before its cycles do."""
    bounds, tickets = bounds_in(aux), number_in(aux, "tickets")
    kept = "those merged so far are the network" if tickets > 1 else "the network is the one that was trained"
    return (
        f"{method} ended after {number_in(aux, 'steps')} of {bounds[-1]} optimizer steps, with {tickets} of {len(bounds)} tickets: "
        f"{kept}. Train for as many steps as the run's length promises."
    )
