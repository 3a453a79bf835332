"""The trigger of EarlyCroP: pruning falls once the distance from the initial weights hardly changes."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.calendar import Calendar, RunLength, Time
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.schedules import to_steps
from sparse_callbacks.core.shards import layout_of
from sparse_callbacks.core.state_claims import Kept
from sparse_callbacks.core.step import Step

When = Literal["start", "distance"] | Time
"""When a method prunes: before the first step, where the distance from the initial weights settles, or at a time."""
INITIAL = "initial"
DISTANCES = "trigger/distances"
LOOKED = "trigger/looked"
PRUNED = "trigger/pruned"
INSTEAD = "Give when= as a time, in optimizer steps (int) or as a fraction of the run (float)."


def tolerance(sparsity: float, structured: bool = False) -> float:
    """The largest increment, as a share of the first epoch's, at which pruning falls: 1 - sparsity.

    Args:
        sparsity: the fraction that is going to be pruned.
        structured: of channels it is min(1 - sparsity - 0.1, 0.99).

    Raises:
        ValueError: that is not positive, so pruning would never fall.

    Example:
        >>> tolerance(0.75), tolerance(0.5, structured=True)
        (0.25, 0.4)
    """
    found = min(1.0 - sparsity - 0.1, 0.99) if structured else 1.0 - sparsity
    if found > 1e-9:  # of 0.9 rounding leaves 2e-17
        return found
    raise ValueError(
        f"when='distance' can never prune {sparsity:g} of a network by channels: the increment of the distance would have to "
        f"be below {found:.2g} of the first one (1 - {sparsity:g} - 0.1), which is not positive from 0.9 on. Prune less, or "
        "give when= as a time."
    )


def has_settled(distances: Sequence[float], share: float) -> bool:
    """Whether the last of the ``distances``, one at the end of each epoch, is within ``share`` of the first one from the one
    before: \\|d_t - d_(t-1)\\| < share * d_1, for t >= 2.

    Example:
        >>> has_settled([0.4, 0.62], 0.5), has_settled([0.4, 0.62, 0.73], 0.5)
        (False, True)
    """
    return len(distances) > 1 and abs(distances[-1] - distances[-2]) < share * distances[0]


def relative_distance(values: Mapping[str, Tensor], initial: Mapping[str, Tensor]) -> float:
    """\\|\\|theta - theta_0\\|\\| / \\|\\|theta_0\\|\\| over all tensors together, those of other processes included.

    Args:
        values: this process's parts of the weights by name.
        initial: of the same names and shapes, what they were at first.
    """
    moved = (
        v.detach().double() - initial[n].to(v.device).double() for n, v in values.items()
    )  # one at a time in memory
    return _norm(moved, values) / _norm((initial[n] for n in values), values)


def _norm(tensors: Iterable[Tensor], like: Mapping[str, Tensor]) -> float:
    pairs = zip(tensors, like.values(), strict=True)
    return math.hypot(*(float(layout_of(p).norm(torch.linalg.vector_norm(t.double()))) for t, p in pairs))


def distance_calendar(stop: Time, run: RunLength) -> Calendar:
    """The calendar of looks at the distance: at the end of each epoch, and at ``stop`` at the latest.

    Raises:
        ValueError: nobody knows how long an epoch is, or the run, of which ``stop`` is a fraction.
    """
    epoch = run.epoch()
    if not math.isfinite(epoch):
        raise ValueError(
            "when='distance' looks at the weights at the end of each epoch, and this run's loader has no length. Give it one "
            f"(in a loop of your own sparsify(..., epoch=), the optimizer steps of an epoch). {INSTEAD}"
        )
    last = max(1, stop if isinstance(stop, int) else to_steps(stop, run.total(), "stop"))
    every = max(1, int(epoch))
    return Calendar(every, min(every, last), last, final=True)


# ---------------------------------------------------------------------- what a method keeps for it in aux


def keep_initial(method: Method) -> None:
    """Keep the values of the sparse parameters that none are kept of; nothing once the method has pruned.

    Raises:
        ValueError: all of them are zero, so there is no distance relative to them.
    """
    if PRUNED in method.aux:
        return
    for name, p in method.params.items():
        if f"{INITIAL}/{name}" not in method.aux:
            method.aux[f"{INITIAL}/{name}"] = p.detach().clone()
    if method.params and _norm(initial_values(method).values(), method.params) == 0:
        raise ValueError(
            "when='distance' measures how far weights have moved relative to their initial values, and these are all zero. "
            f"Initialise the model. {INSTEAD}"
        )


def initial_values(method: Method) -> dict[str, Tensor]:
    """What the sparse parameters held when the run began."""
    return {name: method.aux[f"{INITIAL}/{name}"] for name in method.params}


def falls_now(method: Method, step: Step, share: float) -> bool:
    """Whether the pruning of a method falls at this step, whose update is due; from then on the calendar ends at it.

    Measures the distance, where that was not done yet at this time. Of several optimizers the first one that comes there
    decides for all, and each prunes when it has taken as many steps.

    Args:
        method: the method; its times are those of :func:`distance_calendar`.
        step: the step, which was taken.
        share: the :func:`tolerance`.
    """
    number = step.number
    if PRUNED not in method.aux:
        settled = _look(method, number, share)
        if not settled and number < method.times.stop:
            return False
        if not settled:
            method.host.warn(_why_not_settled(method, share))
        method.aux[PRUNED] = torch.tensor(number)
        for key in [k for k in method.aux if k.startswith(f"{INITIAL}/")]:
            del method.aux[key]  # as large as the weights, and not needed any more
        method.calendar = ending_with_pruning(method, method.times)
    return number >= method.times.stop


def ending_with_pruning(method: Method, times: Calendar) -> Calendar:
    """``times``, with nothing behind the pruning where that has fallen."""
    pruned = method.aux.get(PRUNED)
    return times if pruned is None else replace(times, start=min(times.start, int(pruned)), stop=int(pruned))


def _look(method: Method, number: int, share: float) -> bool:
    """Measure the distance after ``number`` steps, unless that was done, and find whether weights have settled."""
    aux = method.aux
    if number % method.times.every or number <= int(aux.get(LOOKED, 0)):
        return False  # stop may lie within an epoch, whose part says nothing
    now = distributed.of_first_rank(relative_distance(method.params, initial_values(method)))
    aux[DISTANCES] = torch.tensor([*distances(method), now], dtype=torch.float64)
    aux[LOOKED] = torch.tensor(number)
    return has_settled(distances(method), share)


def distances(method: Method) -> list[float]:
    """The distance at the end of each epoch so far."""
    found: list[float] = method.aux.get(DISTANCES, torch.zeros(0)).tolist()
    return found


def trigger_figures(method: Method, share: float) -> dict[str, float]:
    """The latest distance, the increment below which pruning falls, once they are known, and whether it has fallen."""
    known, fired = distances(method), float(PRUNED in method.aux)
    return {"fired": fired} | ({"distance": known[-1], "threshold": share * known[0]} if known else {})


def expected_of_trigger(saved: SavedRun) -> dict[str, Kept]:
    """What a saved run of a method with this trigger holds."""
    waits = PRUNED not in saved.aux
    initial = {f"{INITIAL}/{n}": Kept(tuple(m.shape), required=waits, finite=False) for n, m in saved.masks.items()}
    return initial | {
        DISTANCES: Kept(None, finite=False),  # of weights that have diverged
        LOOKED: Kept(dtype="int", low=0),
        PRUNED: Kept(dtype="int", low=0),
    }


def _why_not_settled(method: Method, share: float) -> str:
    """The warning of a pruning at ``stop``, which the distance has not brought about."""
    known = distances(method)
    if len(known) < 2:
        why = f"it takes the ends of two epochs, and there were {len(known)}"
    else:
        why = (
            f"its last increment was {abs(known[-1] - known[-2]):.3g}, and it had to be below {share * known[0]:.3g}, "
            f"{share:.3g} of the first epoch's {known[0]:.3g}"
        )
    return (
        f"{type(method).__name__} prunes at step {method.times.stop}, its stop=, as the distance from the initial weights has not "
        f"settled before: {why}. Give a later stop=, or when= as a time."
    )
