"""What about a Trainer stands in the way of sparse training. Classes are known by name, so no Lightning is imported."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch.optim import Optimizer

from sparse_callbacks.core.optimizers import is_elementwise

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
            f"{type(trainer.strategy).__name__} shards parameters, and masks are made for whole ones. Use strategy='ddp' or one device."
        )
    for callback in trainer.callbacks:
        if _is_a(callback, _AVERAGING):
            raise ValueError(
                f"{type(callback).__name__} averages weights over moving masks, so the average ends dense. Remove it from callbacks=."
            )
        if _is_a(callback, ("ModelPruning",)):
            raise ValueError("ModelPruning re-parametrises the weights that this callback masks. Keep one of the two in callbacks=.")


def warnings_for(trainer: Any, dense_at_first: bool) -> Iterator[str]:
    """True and harmless things that the user should know before the first batch.

    Args:
        trainer: with optimizers and schedulers set up.
        dense_at_first: the method starts denser than its target.
    """
    for config in trainer.lr_scheduler_configs:
        if isinstance(config.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            yield (
                "ReduceLROnPlateau does not resume exactly under Lightning: a run resumed from a checkpoint may miss one of its updates. "
                "Use a schedule over steps or epochs where exact resume matters."
            )
    if trainer.ckpt_path and getattr(trainer.fit_loop, "_combined_loader", None) is not None:
        yield (
            "the train loader was made before its saved position arrived (somebody read trainer.estimated_stepping_batches in "
            "configure_optimizers or earlier), so Lightning will not restore it: a checkpoint from inside an epoch starts its data over. "
            "Read it later, for example inside the function of a LambdaLR, but not at step 0, which its constructor calls."
        )
    if dense_at_first:
        for callback in trainer.callbacks:
            judges = _is_a(callback, ("ModelCheckpoint", "EarlyStopping")) and getattr(callback, "monitor", None)
            if judges and not getattr(callback, "only_at_target", False):
                yield (
                    f"{type(callback).__name__}(monitor={callback.monitor!r}) also counts epochs before the target sparsity is reached, "
                    "and the best of them is usually a dense one. Save the last checkpoint, or monitor a metric that you log only "
                    "while the sparsity callback's at_target is True."
                )


def gradients_are_read(trainer: Any, module: Any, optimizer: Optimizer) -> bool:
    """Whether somebody reads gradients between backward and the step, so that those of pruned weights must be zero by then."""
    if trainer.gradient_clip_val or not is_elementwise(optimizer) or not module.automatic_optimization:
        return True
    if _overrides(module, "on_before_optimizer_step") or _overrides(module, "configure_gradient_clipping"):
        return True
    return any(_overrides(c, "on_before_optimizer_step") and not hasattr(c, "measured_sparsity") for c in trainer.callbacks)


def _overrides(thing: object, hook: str) -> bool:
    """The hook is the user's: neither missing nor one of Lightning's own classes."""
    return not getattr(type(thing), hook).__module__.startswith(("pytorch_lightning.", "lightning."))
