"""How long the phases of grow-and-prune last."""

import math
from numbers import Integral, Real

from sparse_callbacks.core.calendar import RunLength, Time
from sparse_callbacks.core.schedules import to_steps

FINETUNE = 0.75  # share of the run at which fine-tuning begins by default


def check_phases(rounds: int, epochs: float | None, every: Time | None, finetune: Time | None, partitions: int) -> None:
    """Refuse times and numbers of phases that no run can make right.

    Raises:
        ValueError: a value out of its range, several that say the same, or one partition in several rounds.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, Integral) or rounds < 1:
        raise ValueError(
            f"rounds={rounds!r} is not a number of rounds. Give 1 or more: in each, every partition is dense once."
        )
    if partitions == 1 and rounds > 1:
        raise ValueError(
            f"rounds={rounds} of one partition would grow at once what was just pruned. Give partitions=2 or more, or "
            "rounds=1."
        )
    for name, value in (("epochs", epochs), ("every", every), ("finetune", finetune)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} is not a length of time above 0. Give a number, for example {name}=1.")
        if name != "epochs":
            # for its errors only: an int counts steps, a float is a fraction of the run, whatever its length
            to_steps(value, 1, name)
    given = [n for n, v in (("epochs", epochs), ("every", every), ("finetune", finetune)) if v is not None]
    if len(given) > 1:
        raise ValueError(
            f"{'= and '.join(given)}= are given together: epochs= or every= is the length of a phase, and fine-tuning "
            "begins after the last; finetune= alone says when it begins, and the phases share the time before. Give "
            "one of them."
        )


def phase_steps(
    phases: int,
    epochs: float | None,
    every: Time | None,
    finetune: Time | None,
    run: RunLength,
    taken: int = 0,
) -> int:
    """Optimizer steps of each of ``phases`` equal phases, all of which end within the run.

    Args:
        phases: the number of phases.
        epochs, every: length of a phase, in epochs, or in steps (int) or as a fraction of the run (float).
        finetune: with neither, when the last phase ends at the latest; None: 0.75 of the run.
        run: the length of the run; in a trial run nothing is refused, and a phase has a step at least.
        taken: optimizer steps of earlier fits.

    Raises:
        ValueError: epochs of unknown length, a fraction of an endless run, or phases that the run is too short for.
    """
    begins = math.inf
    if epochs is not None:
        if not math.isfinite(steps := run.epoch()):
            raise ValueError(
                f"epochs={epochs} cannot be counted in steps: the train loader has no length. Give the length of a "
                "phase in optimizer steps, every=1000, or epoch= where sparsify() is called."
            )
        length = round(epochs * steps)
    elif every is not None:
        length = to_steps(every, run.total(), "every")
    else:
        begins = to_steps(FINETUNE if finetune is None else finetune, run.total(), "finetune")
        length = int(begins) // phases  # equal phases: the steps that are left over are trained in fine-tuning
    if run.lenient:
        # a trial run of a few batches must not fail for being short, and a calendar needs an interval of 1 at least
        return max(1, length)
    # the calendar counts from the first fit, so the end is compared with the steps of earlier fits and this run
    ends = length * phases if begins == math.inf else begins
    if length < 1 or ends > taken + run.total():
        given = {"epochs": epochs, "every": every, "finetune": finetune}
        shown = ", ".join(f"{k}={v}" for k, v in given.items() if v is not None) or f"finetune={FINETUNE}"
        raise ValueError(
            f"{phases} phases (rounds= times partitions=) of {length} optimizer steps each do not fit a run of "
            f"{run.total():g} steps, with {shown}: each needs a step at least, and fine-tuning begins within the run. "
            "Give shorter phases, fewer rounds= or partitions=, or a longer run."
        )
    return length
