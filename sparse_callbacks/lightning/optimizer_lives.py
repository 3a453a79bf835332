"""Optimizers and learning rate schedules that live for one phase of a run. A Trainer is used by its attributes, not imported."""

import math
from collections.abc import Callable, Iterator
from numbers import Integral, Real
from typing import Any

from torch.optim import Optimizer, lr_scheduler

from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.optimizers import stepped
from sparse_callbacks.core.schedules import to_steps

Trainer = Any
FINETUNE = 0.75  # share of the run at which fine-tuning begins by default

# the argument of each schedule that says after how many of its own steps it has come to its end
_HORIZONS: dict[type, str] = {
    lr_scheduler.CosineAnnealingLR: "T_max",
    lr_scheduler.CosineAnnealingWarmRestarts: "T_0",
    lr_scheduler.OneCycleLR: "total_steps",
    lr_scheduler.LinearLR: "total_iters",
    lr_scheduler.PolynomialLR: "total_iters",
    lr_scheduler.ConstantLR: "total_iters",
    lr_scheduler.MultiStepLR: "milestones",
}


def horizon(trainer: Trainer) -> float:
    """Optimizer steps that the optimizers at hand live, or in ``configure_optimizers`` those that it makes: the length of a phase
    where a callback such as :class:`~sparse_callbacks.GaP` restarts them (fine-tuning has its own), otherwise of the run.

    The LightningModule calls it as ``sparse_callbacks.horizon(self.trainer)``, in ``configure_optimizers`` or at any time later,
    for example in the function of a ``LambdaLR``. An int, or inf for a run that has no end that is known.

    Without a callback that restarts optimizers, and in ``configure_optimizers`` of a resumed run, Lightning makes the train loader
    for the answer, and does not restore its position. The function of a ``LambdaLR`` asks too early at step 0, which its
    constructor calls; later it may ask: ``lambda step: 1.0 if step == 0 else 1 - step / horizon(self.trainer)``.

    Raises:
        RuntimeError: the trainer runs no fit, so there is no phase yet.
    """
    if getattr(trainer, "lightning_module", None) is None:
        raise RuntimeError(
            "horizon() needs a trainer that fits: the length of a phase follows from the data and max_epochs= or max_steps=. Call it as "
            "horizon(self.trainer) in configure_optimizers or later."
        )
    asked = [c.optimizer_life for c in trainer.callbacks if hasattr(c, "optimizer_life")]
    lives = [life(lambda: run_length(trainer), lambda: epoch_length(trainer), bool(trainer.fast_dev_run)) for life in asked]
    steps = min((life for life in lives if life is not None), default=None)
    found = run_length(trainer) if steps is None else steps
    return int(found) if math.isfinite(found) else found


def run_length(trainer: Trainer) -> float:
    """Optimizer steps of the run, accumulation and devices counted; infinite where it has no end that is known."""
    steps = float(trainer.estimated_stepping_batches)
    return steps if steps > 0 else math.inf


def epoch_length(trainer: Trainer) -> float:
    """Optimizer steps of an epoch; infinite where the loader has no length. Makes the loader where there is none yet."""
    if trainer.train_dataloader is None:
        trainer.fit_loop.setup_data()
    batches = float(trainer.num_training_batches)
    return math.ceil(batches / trainer.accumulate_grad_batches) if math.isfinite(batches) else batches


def restart(trainer: Trainer) -> None:
    """Run ``configure_optimizers`` again: new optimizers without state and new schedules take the place of the present ones.

    A GradScaler keeps its scale, and whoever reads ``trainer.optimizers`` or ``self.optimizers()`` finds the new ones. Call it
    between two steps, on every rank.

    Raises:
        ValueError: ``configure_optimizers`` now gives optimizers in another number, or leaves trained parameters out.
    """
    for callback in trainer.callbacks:
        if hasattr(callback, "begin_optimizer_life"):
            callback.begin_optimizer_life()  # before: configure_optimizers may ask for the horizon
    before: list[Optimizer] = list(trainer.optimizers)
    trainer.strategy.setup_optimizers(trainer)
    after: list[Optimizer] = list(trainer.optimizers)
    if len(before) != len(after):
        raise ValueError(
            f"configure_optimizers gave {len(before)} optimizers at the start and {len(after)} at the restart of a phase. Let it give the "
            "same ones at every call, or give restart=False."
        )
    trained = {id(p): n for n, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    lost = [trained[i] for i in (stepped(*before) - stepped(*after)) & trained.keys()]
    if lost:
        raise ValueError(
            f"{', '.join(sorted(lost))} were in an optimizer and are in none after configure_optimizers was called anew for a phase (a "
            "group added later, as by a finetuning callback, is lost). Let configure_optimizers give all of them, or give restart=False."
        )


def check_horizons(trainer: Trainer, phase_steps: float, epoch_steps: float) -> None:
    """Refuse a learning rate schedule that would be cut off in its middle at the end of a phase.

    Args:
        trainer: with optimizers and schedules set up.
        phase_steps: optimizer steps that they live.
        epoch_steps: optimizer steps of an epoch, for schedules over epochs. (In manual optimization Lightning does not know when
            the user steps a schedule: it is taken as once a step, which refuses none that fits.)

    Raises:
        ValueError: a schedule's known horizon, such as ``T_max`` or ``total_steps``, is longer than the phase.
    """
    automatic = trainer.lightning_module.automatic_optimization
    for config in trainer.lr_scheduler_configs:
        over_epochs = automatic and config.interval == "epoch"
        unit = (epoch_steps if over_epochs else 1) * (config.frequency if automatic else 1)
        for known, shown in _known(config.scheduler):
            if known * unit > phase_steps:
                means = "" if unit == 1 else f", that is {known * unit:g} optimizer steps,"
                raise ValueError(
                    f"{shown}{means} is longer than the phase of {phase_steps:g} optimizer steps at whose end optimizers and schedules are "
                    "configured anew, so it would be cut off. In configure_optimizers use sparse_callbacks.horizon(self.trainer), the "
                    "optimizer steps of the phase (with 'interval': 'step'), or keep one schedule for the run with restart=False."
                )


def _known(scheduler: Any, begins: float = 0) -> Iterator[tuple[float, str]]:
    """(step of the schedule at which it comes to its end, how the user wrote it) for it and the schedules within it."""
    after = f" behind {begins:g} steps of others" if begins else ""
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        *cut, last = scheduler._milestones  # each schedule but the last ends at a milestone at the latest
        yield begins + last, f"{type(scheduler).__name__}(milestones={[*cut, last]}){after}"
        yield from _known(scheduler._schedulers[-1], begins + last)
    elif isinstance(scheduler, lr_scheduler.ChainedScheduler):
        for inner in scheduler._schedulers:
            yield from _known(inner, begins)
    for kind, name in _HORIZONS.items():
        if isinstance(scheduler, kind):
            value = getattr(scheduler, name)
            listed = sorted(value) if name == "milestones" else [value]
            yield begins + max(listed, default=0), f"{type(scheduler).__name__}({name}={listed if name == 'milestones' else value}){after}"


# ---------------------------------------------------------------------- how long a phase lasts


def check_phases(rounds: int, epochs: float | None, every: Time | None, finetune: Time | None, partitions: int) -> None:
    """Refuse times and numbers of phases that no run can make right.

    Raises:
        ValueError: a value out of its range, several that say the same, or one partition in several rounds.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, Integral) or rounds < 1:
        raise ValueError(f"rounds={rounds!r} is no number of rounds. Give 1 or more: in each, every partition is dense once.")
    if partitions == 1 and rounds > 1:
        raise ValueError(
            f"rounds={rounds} of one partition would grow at once what was just pruned. Give partitions=2 or more, or rounds=1."
        )
    for name, value in (("epochs", epochs), ("every", every), ("finetune", finetune)):
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, Real) or not 0 < value < math.inf:
            raise ValueError(f"{name}={value!r} is no length of time above 0. Give a number, for example {name}=1.")
        if name != "epochs":
            to_steps(value, 1, name)
    given = [n for n, v in (("epochs", epochs), ("every", every), ("finetune", finetune)) if v is not None]
    if len(given) > 1:
        raise ValueError(
            f"{'= and '.join(given)}= are given together: epochs= or every= is the length of a phase, and fine-tuning begins after the "
            "last; finetune= alone says when it begins, and the phases share the time before. Give one of them."
        )


def phase_steps(
    phases: int,
    epochs: float | None,
    every: Time | None,
    finetune: Time | None,
    total: Callable[[], float],
    epoch: Callable[[], float],
    lenient: bool = False,
    taken: int = 0,
) -> int:
    """Optimizer steps of each of ``phases`` equal phases, all of which end within the run.

    Args:
        phases: their number.
        epochs, every: length of a phase, in epochs, or in steps (int) or as a fraction of the run (float).
        finetune: with neither, when the last phase ends at the latest; None: 0.75 of the run.
        total, epoch: give the optimizer steps of the run and of an epoch, infinite where unknown.
        lenient: a trial run (``fast_dev_run``): nothing is refused, and a phase has a step at least.
        taken: steps of earlier fits.

    Raises:
        ValueError: epochs of unknown length, a fraction of an endless run, or phases that the run is too short for.
    """
    begins = math.inf
    if epochs is not None:
        if not math.isfinite(steps := epoch()):
            raise ValueError(
                f"epochs={epochs} cannot be counted in steps: the train loader has no length. Give the length of a phase in optimizer "
                "steps, every=1000."
            )
        length = round(epochs * steps)
    elif every is not None:
        length = to_steps(every, total(), "every")
    else:
        begins = to_steps(FINETUNE if finetune is None else finetune, total(), "finetune")
        length = int(begins) // phases
    if lenient:
        return max(1, length)
    ends = length * phases if begins == math.inf else begins
    if length < 1 or ends > taken + total():
        given = {"epochs": epochs, "every": every, "finetune": finetune}
        shown = ", ".join(f"{k}={v}" for k, v in given.items() if v is not None) or f"finetune={FINETUNE}"
        raise ValueError(
            f"{phases} phases (rounds= times partitions=) of {length} optimizer steps each do not fit a run of {total():g} steps, with "
            f"{shown}: each needs a step at least, and fine-tuning begins within the run. Give shorter phases, fewer rounds= or "
            "partitions=, or a longer run."
        )
    return length
