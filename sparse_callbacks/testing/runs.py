"""How the contract runs a Trainer: quiet, short, on one CPU, with checkpoints after chosen batches."""

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from sparse_callbacks.testing.data import Batches

Watcher = Callable[[pl.Trainer, Any, int], None]


def trainer_for(
    callbacks: pl.Callback | Sequence[pl.Callback], folder: Path | None = None, **options: Any
) -> pl.Trainer:
    """A quiet Trainer on one CPU, for two epochs where neither epochs nor steps are given."""
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 1,
        "logger": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": False,
        "default_root_dir": folder,
    }
    if "max_epochs" not in options and "max_steps" not in options:
        defaults["max_epochs"] = 2
    listed = [callbacks] if isinstance(callbacks, pl.Callback) else list(callbacks)
    return pl.Trainer(**(defaults | options), callbacks=listed)


def fit(
    module: pl.LightningModule, *callbacks: pl.Callback, loader: Any = None, ckpt_path: Any = None, **options: Any
) -> pl.Trainer:
    """Fit for two epochs of eight batches, unless options say otherwise."""
    trainer = trainer_for(callbacks, **options)
    trainer.fit(module, Batches() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def watch(on_batch_end: Watcher) -> pl.Callback:
    """Calls ``on_batch_end(trainer, module, batches done before)`` after every batch; list it after the sparsity
    callbacks."""
    count = itertools.count()
    return pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda trainer, module, *_: on_batch_end(trainer, module, next(count))
    )


class Stops(pl.Callback):
    """Writes a checkpoint after each of these batches (counted from 1)."""

    def __init__(self, folder: Path, after: tuple[int, ...]) -> None:
        self.folder, self.after, self.batches = folder, after, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches in self.after:
            trainer.save_checkpoint(self.path(self.batches))

    def path(self, batch: int) -> Path:
        return self.folder / f"{batch}.ckpt"
