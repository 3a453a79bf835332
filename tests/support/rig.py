"""Short runs of single methods, and records of their updates."""

import itertools
import math
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from torch import Tensor

from sparse_callbacks import SparsityCallback, Static
from sparse_callbacks.testing.runs import trainer_for
from support.data import loader

# ---------------------------------------------------------------------- runs


def fit_steps(folder: Path, callbacks: Any, module: pl.LightningModule, steps: int, **options: Any) -> pl.Trainer:
    """Fit for ``steps`` optimizer steps on random numbers, with enough of them for one epoch."""
    trainer = trainer_for(callbacks, folder, max_steps=steps, **options)
    trainer.fit(module, loader(math.ceil(steps * trainer.accumulate_grad_batches)))
    return trainer


def short_callback(make: Any, **options: Any) -> Any:
    """A callback of the class ``make``, with updates in a run of eight steps where the method has any."""
    times = {} if make is Static else {"every": 2, "stop": 8}
    return make(0.5, print_plan=False, **times, **options)


def record_updates(callback: Any) -> list[tuple[int, int]]:
    """(the callback's own step, batches seen by the trainer before this one) at each update of ``callback``, by its
    count of updates."""
    seen: list[tuple[int, int]] = []
    begin, end = callback.on_train_batch_start, callback.on_train_batch_end
    batch, before = itertools.count(), [0]

    def on_train_batch_start(*arguments: Any) -> None:
        before[0] = callback.updates
        begin(*arguments)

    def on_train_batch_end(*arguments: Any) -> None:
        end(*arguments)
        index = next(batch)
        assert callback.updates - before[0] in (0, 1)
        if callback.updates > before[0]:
            seen.append((callback.step, index))

    callback.on_train_batch_start, callback.on_train_batch_end = on_train_batch_start, on_train_batch_end
    return seen


# ---------------------------------------------------------------------- what a run left


def copied_masks(callback: SparsityCallback) -> dict[str, Tensor]:
    """Copies of the masks."""
    return {n: m.clone() for n, m in callback.masks.items()}
