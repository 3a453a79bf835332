"""Optimizers and schedules that live for a phase of the run, and are then configured anew."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any

from pytorch_lightning.utilities import rank_zero_warn
from torch.optim import Optimizer, lr_scheduler

from sparse_callbacks.core.calendar import RunLength
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.core.optimizer_modes import switch_through, take_over_mode
from sparse_callbacks.core.optimizers import parameter_ids
from sparse_callbacks.lightning.accumulation import epoch_length, epochs_of, run_length, samples_of_step, shortest_epoch
from sparse_callbacks.lightning.averaging import averages_epochs
from sparse_callbacks.lightning.namespaces import Trainer

# The constructor argument of each schedule that says after how many of its own steps it ends.
_END_ARGUMENTS: dict[type, str] = {
    lr_scheduler.CosineAnnealingLR: "T_max",
    lr_scheduler.CosineAnnealingWarmRestarts: "T_0",
    lr_scheduler.OneCycleLR: "total_steps",
    lr_scheduler.LinearLR: "total_iters",
    lr_scheduler.PolynomialLR: "total_iters",
    lr_scheduler.ConstantLR: "total_iters",
    lr_scheduler.MultiStepLR: "milestones",
}


def horizon(trainer: Trainer) -> float:
    """Optimizer steps from the creation of the current optimizers to their end.

    That is the length of the phase where a callback such as :class:`~sparse_callbacks.GaP` restarts the optimizers (a
    fine-tuning phase has a length of its own), otherwise the length of the run. An int, or inf for a run that has no
    known end.

    The LightningModule calls it as ``sparse_callbacks.horizon(self.trainer)``, in ``configure_optimizers`` for the
    optimizers that it is about to make, or at any time later, for example in the function of a ``LambdaLR``.

    Without a callback that restarts optimizers, and in ``configure_optimizers`` of a resumed run, Lightning makes the
    train loader for the answer, and does not restore its position. The constructor of a ``LambdaLR`` already calls its
    function, with step 0, which is too early; at later steps the function may ask: ``lambda step: 1.0 if step == 0 else
    1 - step / horizon(self.trainer)``.

    Args:
        trainer: the Trainer that fits, ``self.trainer`` of the LightningModule.

    Returns:
        Optimizer steps, an int; ``inf`` where no end is known.

    Raises:
        RuntimeError: the trainer is not running a fit, so there is no phase yet.

    Example:
        >>> import torch
        >>> from pytorch_lightning import LightningModule
        >>> from sparse_callbacks import horizon
        >>> class Mine(LightningModule):
        ...     def configure_optimizers(self):
        ...         optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        ...         schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, horizon(self.trainer))
        ...         return [optimizer], [{"scheduler": schedule, "interval": "step"}]
    """
    if getattr(trainer, "lightning_module", None) is None:
        raise RuntimeError(
            "horizon() needs a trainer that fits: the length of a phase follows from the data and max_epochs= or "
            "max_steps=. Call it as horizon(self.trainer) in configure_optimizers or later."
        )
    # of several callbacks that restart optimizers, the one that does so first ends the life of all
    lives = [c.optimizer_life(length_of(trainer)) for c in trainer.callbacks if isinstance(c, RestartsOptimizers)]
    steps = min((life for life in lives if life is not None), default=None)
    found = run_length(trainer) if steps is None else steps
    return int(found) if math.isfinite(found) else found


def length_of(trainer: Trainer) -> RunLength:
    """The length of the Trainer's run, in the form that methods take it."""
    trial = bool(trainer.fast_dev_run)
    return RunLength(
        lambda: run_length(trainer), lambda: epoch_length(trainer), trial, lambda: samples_of_step(trainer)
    )


def restart(trainer: Trainer) -> None:
    """Run ``configure_optimizers`` again: new optimizers without state and new schedules replace the current ones.

    A GradScaler keeps its scale; ``trainer.optimizers`` and ``self.optimizers()`` return the new optimizers. Call it
    between two steps, on every rank.

    Raises:
        ValueError: ``configure_optimizers`` now returns another number of optimizers, or leaves trained parameters out.
    """
    instead = RestartsOptimizers.without_restarts
    for callback in trainer.callbacks:
        if isinstance(callback, RestartsOptimizers) and callback.restarts:
            instead = callback.without_restarts
            callback.begin_optimizer_life()  # first, because configure_optimizers may call horizon()
    before: list[Optimizer] = list(trainer.optimizers)
    trainer.strategy.setup_optimizers(trainer)
    after: list[Optimizer] = list(trainer.optimizers)
    if len(before) != len(after):
        raise ValueError(
            f"configure_optimizers gave {len(before)} optimizers at the start and {len(after)} at the restart of a "
            f"phase. Let it give the same ones at every call, or give {instead}."
        )
    for new, old in zip(after, before, strict=True):
        take_over_mode(new, old)
    trained = {id(p): n for n, p in trainer.lightning_module.named_parameters() if p.requires_grad}
    # an id means the same parameter in both lists, because `before` keeps the old ones alive
    lost = [trained[i] for i in (parameter_ids(*before) - parameter_ids(*after)) & trained.keys()]
    if lost:
        raise ValueError(
            f"{', '.join(sorted(lost))} were in an optimizer and are in none after configure_optimizers was called "
            "anew for a phase (a group added later, as by a finetuning callback, is lost). Let configure_optimizers "
            f"give all of them, or give {instead}."
        )


def switch_through_wrappers(trainer: Trainer) -> None:
    """What ``self.optimizers()`` gives switches the optimizers of the Trainer themselves."""
    # a private list, because the public way to the wrappers is the module's and gives one or several
    for wrapper in trainer.strategy._lightning_optimizers:
        switch_through(wrapper, wrapper.optimizer)


def check_schedules(trainer: Trainer, method: Method) -> None:
    """Refuse a schedule that would be cut off before the first batch; later, when a restart brings one, say so and
    train on.

    Args:
        trainer: a Trainer whose optimizers and schedules are set up.
        method: the method that trains, of any kind.

    Raises:
        ValueError: before the first batch, a schedule that is longer than the phase.
    """
    if not isinstance(method, RestartsOptimizers) or not method.restarts or trainer.fast_dev_run:
        return
    in_training = method.attachment.in_training
    if not in_training:
        _refuse_restarts_among_averages(trainer, method)
    life = method.horizon if method.horizon_asked or in_training else method.shortest_life
    if life is None:
        return
    try:
        check_horizons(trainer, life, shortest_epoch(trainer), method.without_restarts)
    except ValueError as error:
        if not in_training:
            raise
        rank_zero_warn(str(error))


def _refuse_restarts_among_averages(trainer: Trainer, method: Any) -> None:
    """Refuse new optimizers and schedules once StochasticWeightAveraging has set a schedule of its own.

    Raises:
        ValueError: a phase ends in an epoch in which it averages.
    """
    waits = method.step < method.times.stop or method.engine.restart_wanted
    for callback in filter(averages_epochs, trainer.callbacks) if waits else ():
        begins = sum(islice(epochs_of(trainer), callback.swa_start))
        ends = trainer.global_step + method.times.stop - method.step
        if ends >= begins:
            raise ValueError(
                f"{type(callback).__name__} sets a schedule of its own at step {begins:g}, and {type(method).__name__} "
                f"configures optimizers and schedules anew until step {ends}, which ends it. Let it start later "
                f"(swa_epoch_start=), or give {method.without_restarts}."
            )


def check_horizons(trainer: Trainer, phase_steps: float, epoch_steps: float, instead: str = "restart=False") -> None:
    """Refuse a learning rate schedule that would be cut off at the end of a phase, before its own end.

    Args:
        trainer: a Trainer whose optimizers and schedules are set up.
        phase_steps: the number of optimizer steps in the phase.
        epoch_steps: the number of optimizer steps in the shortest epoch, for schedules that step once an epoch. (In manual
            optimization Lightning does not know when the user steps a schedule. One step of the schedule for each
            optimizer step is assumed, so that no schedule that fits is refused.)
        instead: the argument with which optimizers live as long as the run.

    Raises:
        ValueError: a schedule's known horizon, such as ``T_max`` or ``total_steps``, is longer than the phase.
    """
    automatic = trainer.lightning_module.automatic_optimization
    for config in trainer.lr_scheduler_configs:
        # "frequency" and "interval" are instructions to Lightning, which it follows in automatic optimization only
        over_epochs = automatic and config.interval == "epoch"
        unit = (epoch_steps if over_epochs else 1) * (config.frequency if automatic else 1)
        for length, shown in _known_ends(config.scheduler):
            if length * unit > phase_steps:
                means = "" if unit == 1 else f", that is {length * unit:g} optimizer steps,"
                raise ValueError(
                    f"{shown}{means} is longer than the phase of {phase_steps:g} optimizer steps at whose end "
                    "optimizers and schedules are configured anew, so it would be cut off. In configure_optimizers "
                    "use sparse_callbacks.horizon(self.trainer), the optimizer steps of the phase (with 'interval': "
                    f"'step'), or keep one schedule for the run with {instead}."
                )


def _known_ends(scheduler: Any, begins: float = 0) -> Iterator[tuple[float, str]]:
    """The known ends of ``scheduler`` and of the schedules within it, as pairs.

    The first item is the step of the outermost schedule at which the end comes, the second the argument as the user
    wrote it. ``begins`` is the step of the outermost schedule at which ``scheduler`` begins.
    """
    after = f" after {begins:g} steps of other schedules" if begins else ""
    if isinstance(scheduler, lr_scheduler.SequentialLR):
        *cut, last = scheduler._milestones  # each schedule but the last ends at a milestone at the latest
        yield begins + last, f"{type(scheduler).__name__}(milestones={[*cut, last]}){after}"
        # the steps of a schedule in a sequence count from where the one before it was cut
        yield from _known_ends(scheduler._schedulers[-1], begins + last)
    elif isinstance(scheduler, lr_scheduler.ChainedScheduler):
        for inner in scheduler._schedulers:
            yield from _known_ends(inner, begins)
    for kind, name in _END_ARGUMENTS.items():
        if isinstance(scheduler, kind):
            value = getattr(scheduler, name)
            # torch keeps milestones as a Counter
            listed = sorted(value) if name == "milestones" else [value]
            yield (
                begins + max(listed, default=0),
                f"{type(scheduler).__name__}({name}={listed if name == 'milestones' else value}){after}",
            )
