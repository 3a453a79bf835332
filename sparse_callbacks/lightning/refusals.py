"""Refusals and warnings about a Trainer, its other callbacks and its checkpoint."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.optim import Optimizer

from sparse_callbacks.core.awaited import names_awaited
from sparse_callbacks.core.checkpoint import check_state
from sparse_callbacks.core.fresh_weights import refuse_rescaled_checkpoint
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizers import is_elementwise
from sparse_callbacks.core.two_pass import refuse_two_calls
from sparse_callbacks.lightning.added_epoch import epochs_to_train

# Classes are recognised by name, because they exist twice (in pytorch_lightning and in lightning.pytorch) and not in
# every version.
SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "FSDP2Strategy")
# How the names of the checkpoints begin that Lightning's tuner writes.
_TUNER_PREFIXES = (".lr_find_", ".scale_batch_size_")


def is_tuner_checkpoint(path: object) -> bool:
    """Whether ``path`` is a checkpoint that Lightning's tuner writes and restores before callbacks have state."""
    return Path(str(path)).name.startswith(_TUNER_PREFIXES)


def has_class_named(thing: object, names: Iterable[str]) -> bool:
    """Whether the class of ``thing``, or a class that it inherits from, has one of ``names``."""
    return any(c.__name__ in names for c in type(thing).__mro__)


def refuse_host(trainer: Any) -> None:
    """Refuse a Trainer under which training would silently end dense or wrong.

    Raises:
        ValueError: a sharded strategy, or ModelPruning.
    """
    if has_class_named(trainer.strategy, SHARDED):
        raise ValueError(
            f"{type(trainer.strategy).__name__} keeps parameters in pieces that do not follow their shapes, and masks are made for "
            "parameters. Use ModelParallelStrategy(data_parallel_size=..., tensor_parallel_size=1), strategy='ddp' or one "
            "device."
        )
    for callback in trainer.callbacks:
        if has_class_named(callback, ("ModelPruning",)):
            raise ValueError(
                "ModelPruning re-parametrises the weights that this callback masks. Keep one of the two in callbacks=."
            )


def warnings_for(trainer: Any, dense_at_first: bool) -> Iterator[str]:
    """True and harmless things that the user should know before the first batch.

    Args:
        trainer: a Trainer whose optimizers and schedules are set up.
        dense_at_first: True where the method starts denser than its target.
    """
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            yield (
                "ReduceLROnPlateau does not resume exactly under Lightning: a run resumed from a checkpoint may miss "
                "one of its updates. Use a schedule over steps or epochs where exact resume matters."
            )
    # Lightning hands a loader its saved position when it makes it, and here it was made before the checkpoint was read
    if trainer.ckpt_path and getattr(trainer.fit_loop, "_combined_loader", None) is not None:
        yield (
            "the train loader was made before its saved position arrived (somebody read "
            "trainer.estimated_stepping_batches in configure_optimizers or earlier), so Lightning will not restore it: "
            "a checkpoint from inside an epoch starts its data over. Read it later, for example inside the function of "
            "a LambdaLR, but not at step 0, which its constructor calls."
        )
    if dense_at_first:
        for callback in trainer.callbacks:
            compares = has_class_named(callback, ("ModelCheckpoint", "EarlyStopping")) and getattr(
                callback, "monitor", None
            )
            # `only_at_target` is for classes that leave out the epochs before the target themselves
            if compares and not getattr(callback, "only_at_target", False):
                yield (
                    f"{type(callback).__name__}(monitor={callback.monitor!r}) also counts epochs before the target "
                    "sparsity is reached, and the best of them is usually a dense one. Use sparse_callbacks.BestAtTarget or "
                    "EarlyStoppingAtTarget, which leave these epochs out, or monitor a metric that you log only while the "
                    "sparsity callback's at_target is True."
                )


def gradients_are_read(trainer: Any, module: Any, optimizer: Optimizer) -> bool:
    """Whether anything reads gradients between the backward pass and the step: clipping, an optimizer that mixes the
    gradients of several weights, the user's hooks, or manual optimization.

    The gradients of pruned weights must be masked before it does; otherwise masking the weights after the step is
    enough.
    """
    if trainer.gradient_clip_val or not is_elementwise(optimizer) or not module.automatic_optimization:
        return True
    # a hook that is overridden may read gradients, and whether it does cannot be found out
    if overrides(module, "on_before_optimizer_step") or overrides(module, "configure_gradient_clipping"):
        return True
    return any(overrides(c, "on_before_optimizer_step") and not isinstance(c, Method) for c in trainer.callbacks)


def overrides(thing: object, hook: str) -> bool:
    """Whether ``hook`` of ``thing`` is the user's own, rather than the default that Lightning's classes define."""
    # of the instance, as a LambdaCallback has its hooks there; what has no module is somebody's partial function
    module = getattr(getattr(thing, hook), "__module__", "")
    # with the dots, or packages whose names only begin like these would count as Lightning
    return not module.startswith(("pytorch_lightning.", "lightning."))


def refuse_unsteppable(module: Any, given: Sequence[Optimizer], found: Sequence[Optimizer]) -> None:
    """Refuse optimizers that automatic optimization cannot step.

    Args:
        module: the module that is trained.
        given: the optimizers that it has made.
        found: those that take their steps.

    Raises:
        ValueError: :func:`~sparse_callbacks.core.two_pass.refuse_two_calls` says which.
    """
    if module.automatic_optimization and not overrides(module, "optimizer_step"):
        refuse_two_calls(given, found)


def refuse_shared(mine: Method, names: Sequence[str], others: Iterable[Method]) -> None:
    """Refuse two methods that claim the same parameter.

    Args:
        mine: the method that is about to make parameters sparse.
        names: the names of the parameters that ``mine`` will make sparse, now or once they are trained.
        others: the methods that already have their parameters.

    Raises:
        ValueError: a parameter already belongs to another method.
    """
    for other in others:
        if both := sorted(set(names) & {*other.params, *names_awaited(other.entries)}):
            raise ValueError(
                f"{type(other).__name__} and {type(mine).__name__} both claim {', '.join(both)}. Give each callback "
                "its own layers with include= or exclude=."
            )


def state_to_resume(method: Method, restored: Mapping[str, Any] | None, path: object) -> Mapping[str, Any] | None:
    """The saved state that a fit resumes from, after a check that the same method with the same arguments saved it.

    Args:
        method: the method that resumes.
        restored: the state of the method in the checkpoint; None where the checkpoint has none.
        path: the path of the checkpoint; empty where the fit starts without one.

    Returns:
        The state; None for a start with new masks.

    Raises:
        ValueError: the checkpoint holds no state of the method, or a state saved with other arguments.
    """
    # the tuner saves before callbacks have state and restores afterwards, so that its fits begin from new masks
    if method.fresh_start or not path or (restored is None and is_tuner_checkpoint(path)):
        if path and restored is not None:
            rank_zero_info(f"{type(method).__name__}: fresh_start=True, so the masks in the checkpoint are ignored.")
        if path and not is_tuner_checkpoint(path):
            refuse_rescaled_checkpoint(method, path)
        return None
    return check_state(restored, method.arguments, type(method).__name__, path)


def ends_run(trainer: Any) -> bool:
    """Whether the batch that has just ended was the last of the run, by ``max_epochs`` and ``max_steps``."""
    # max_epochs is None or -1 for a run that only its steps end, max_steps is -1 for one that only its epochs end
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= epochs_to_train(trainer)
    return bool(trainer.is_last_batch and last_epoch) or 0 <= trainer.max_steps <= trainer.global_step
