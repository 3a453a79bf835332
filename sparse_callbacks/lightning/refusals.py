"""Trainers, and callbacks beside ours, under which sparse training cannot work."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.utilities import rank_zero_info
from torch.optim import Optimizer

from sparse_callbacks.core.checkpoint import check_state
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizers import is_elementwise

# Classes are known by name: those of both Lightning packages, and of versions that do not have all of them.
_SHARDED = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy", "FSDP2Strategy")
_AVERAGING = ("WeightAveraging", "StochasticWeightAveraging", "EMAWeightAveraging")


_TUNER = (".lr_find_", ".scale_batch_size_")


def is_tuners(path: object) -> bool:
    """A checkpoint that Lightning's tuner writes and restores by itself, before there is anything of ours to save."""
    return Path(str(path)).name.startswith(_TUNER)


def _is_a(thing: object, names: Iterable[str]) -> bool:
    return any(c.__name__ in names for c in type(thing).__mro__)


def refuse_host(trainer: Any) -> None:
    """Refuse a Trainer under which training would silently end dense or wrong.

    Raises:
        ValueError: a sharded strategy, weight averaging, or ModelPruning.
    """
    if _is_a(trainer.strategy, _SHARDED):
        raise ValueError(
            f"{type(trainer.strategy).__name__} shards parameters, and masks are made for whole ones. Use "
            "strategy='ddp' or one device."
        )
    for callback in trainer.callbacks:
        if _is_a(callback, _AVERAGING):
            raise ValueError(
                f"{type(callback).__name__} averages weights over moving masks, so the average ends dense. Remove it "
                "from callbacks=."
            )
        if _is_a(callback, ("ModelPruning",)):
            raise ValueError(
                "ModelPruning re-parametrises the weights that this callback masks. Keep one of the two in callbacks=."
            )


def warnings_for(trainer: Any, dense_at_first: bool) -> Iterator[str]:
    """True and harmless things that the user should know before the first batch.

    Args:
        trainer: with optimizers and schedulers set up.
        dense_at_first: the method starts denser than its target.
    """
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            yield (
                "ReduceLROnPlateau does not resume exactly under Lightning: a run resumed from a checkpoint may miss "
                "one of its updates. "
                "Use a schedule over steps or epochs where exact resume matters."
            )
    if trainer.ckpt_path and getattr(trainer.fit_loop, "_combined_loader", None) is not None:
        yield (
            "the train loader was made before its saved position arrived (somebody read "
            "trainer.estimated_stepping_batches in "
            "configure_optimizers or earlier), so Lightning will not restore it: a checkpoint from inside an epoch "
            "starts its data over. "
            "Read it later, for example inside the function of a LambdaLR, but not at step 0, which its constructor "
            "calls."
        )
    if dense_at_first:
        for callback in trainer.callbacks:
            judges = _is_a(callback, ("ModelCheckpoint", "EarlyStopping")) and getattr(callback, "monitor", None)
            if judges and not getattr(callback, "only_at_target", False):
                yield (
                    f"{type(callback).__name__}(monitor={callback.monitor!r}) also counts epochs before the target "
                    "sparsity is reached, "
                    "and the best of them is usually a dense one. Save the last checkpoint, or monitor a metric that "
                    "you log only "
                    "while the sparsity callback's at_target is True."
                )


def gradients_are_read(trainer: Any, module: Any, optimizer: Optimizer) -> bool:
    """Whether somebody reads gradients between backward and the step, so that those of pruned weights must be zero by
    then."""
    if trainer.gradient_clip_val or not is_elementwise(optimizer) or not module.automatic_optimization:
        return True
    if _overrides(module, "on_before_optimizer_step") or _overrides(module, "configure_gradient_clipping"):
        return True
    return any(_overrides(c, "on_before_optimizer_step") and not isinstance(c, Method) for c in trainer.callbacks)


def _overrides(thing: object, hook: str) -> bool:
    """The hook is the user's: neither missing nor one of Lightning's own classes."""
    return not getattr(type(thing), hook).__module__.startswith(("pytorch_lightning.", "lightning."))


def refuse_shared(mine: Method, names: Sequence[str], others: Iterable[Method]) -> None:
    """Refuse two methods that claim the same parameter.

    Args:
        mine: the method that is about to take hold of ``names``.
        names: names of the parameters that it will make sparse.
        others: methods that have taken hold of theirs.

    Raises:
        ValueError: a parameter that another method has.
    """
    for other in others:
        if both := sorted(set(names) & set(other.params)):
            raise ValueError(
                f"{type(other).__name__} and {type(mine).__name__} both claim {', '.join(both)}. Give each callback "
                "its own layers "
                "with include= or exclude=."
            )


def state_to_resume(method: Method, restored: Mapping[str, Any] | None, path: object) -> Mapping[str, Any] | None:
    """The saved state that a fit goes on from, found to be the method's and of the same arguments.

    Args:
        method: which resumes.
        restored: what the checkpoint held for it, or None.
        path: the checkpoint's path; empty without one.

    Returns:
        The state; None for a start with new masks.

    Raises:
        ValueError: a checkpoint without state, or one of other arguments.
    """
    if method.fresh_start or not path or (restored is None and is_tuners(path)):
        if path and restored is not None:
            rank_zero_info(f"{type(method).__name__}: fresh_start=True, so the masks in the checkpoint are ignored.")
        return None
    return check_state(restored, method.arguments, type(method).__name__, path)


def ends_run(trainer: Any) -> bool:
    """Whether the batch that is over was the last of the run, as far as that is known beforehand."""
    last_epoch = trainer.max_epochs not in (None, -1) and trainer.current_epoch + 1 >= trainer.max_epochs
    return bool(trainer.is_last_batch and last_epoch) or 0 <= trainer.max_steps <= trainer.global_step
