"""The best checkpoint and early stopping, which count only epochs at target sparsity."""

from pathlib import Path

import pytorch_lightning as pl
from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.tasks.loggers import summarize
from sparse_callbacks.tasks.safe_stop import save_atomically


def sparsity_callbacks(trainer: pl.Trainer) -> list[SparsityCallback]:
    """The trainer's sparsity callbacks; a dense run has none."""
    # the attribute is set by one of the Trainer's connectors, so the type checker does not see it
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return [callback for callback in callbacks if isinstance(callback, SparsityCallback)]


def at_target(trainer: pl.Trainer) -> bool:
    """Whether every sparsity callback has reached its target; always true in a dense run, which has no target."""
    return all(callback.at_target for callback in sparsity_callbacks(trainer))


class BestAtTarget(ModelCheckpoint):
    """Keeps the checkpoint of the best epoch at target sparsity.

    Under gradual pruning the best epoch of all would be an early one, with an almost dense network.
    """

    # by this attribute sparsity callbacks know that no early dense network can win here, so they do not warn
    only_at_target = True

    def __init__(self, dirpath: str, monitor: str = "val/acc", mode: str = "max") -> None:
        super().__init__(
            dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # without a validation in this epoch there is no value to compare
        if at_target(trainer) and self.monitor in trainer.callback_metrics:
            super().on_train_epoch_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: pl.Trainer, filepath: str) -> None:
        # where temporary files lie on another disk, Lightning copies the new file over the best one so far: a kill or
        # a full disk would leave half of it
        save_atomically(trainer, Path(filepath))
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
            # only the best epoch so far is saved here, and a run that is killed has told it already
            best = float(trainer.callback_metrics[str(self.monitor)])
            summarize(trainer.loggers, {f"best/{self.monitor}": best, "best/epoch": trainer.current_epoch})


class EarlyStoppingAtTarget(EarlyStopping):
    """Stops after `patience` validated epochs at target sparsity without a better value."""

    # as in `BestAtTarget`
    only_at_target = True

    def __init__(self, patience: int, monitor: str = "val/acc", mode: str = "max") -> None:
        if patience < 1:
            raise ValueError(
                f"early_stopping={patience} is not a number of epochs to wait. Give 1 or more, or null for none."
            )
        super().__init__(monitor, patience=patience, mode=mode, check_on_train_epoch_end=True)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if at_target(trainer):
            super().on_train_epoch_end(trainer, pl_module)
