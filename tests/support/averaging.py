"""Runs with Lightning's averaging callbacks, and what they leave."""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging, WeightAveraging
from torch import Tensor
from torch.optim.swa_utils import SWALR

from sparse_callbacks import SparsityCallback
from sparse_callbacks.testing.comparison import snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, trainer_for

DECAY = 0.8


class AfterEpochs(WeightAveraging):
    """A user's own: an average after each epoch."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None


class EveryThird(WeightAveraging):
    """A user's own: an average after every third step."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return step_idx is not None and step_idx % 3 == 2


AVERAGING: dict[str, Callable[[], Any]] = {
    "steps": WeightAveraging,
    "ema": lambda: EMAWeightAveraging(decay=DECAY),
    "third": EveryThird,
    "epochs": AfterEpochs,
    "swa": lambda: StochasticWeightAveraging(0.02, swa_epoch_start=2),
}


class Looks(pl.Callback):
    """Keeps the weights that the network validates with."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_validation_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if not trainer.sanity_checking:
            self.seen.append({n: p.detach().clone() for n, p in module.named_parameters()})


def is_sparse(weights: dict[str, Tensor], callback: SparsityCallback) -> bool:
    """Pruned weights are zero to the last bit."""
    return not any(weights[n].detach().to("cpu")[~m].view(torch.uint8).any() for n, m in callback.masks.items())


def average_of(averager: Any) -> dict[str, Tensor]:
    """The averages that a callback holds."""
    module = averager._average_model
    return dict(getattr(module, "module", module).named_parameters())


@cache
def saves_a_function() -> bool:
    """Whether torch saves a function with the schedule of StochasticWeightAveraging, as torch 2.8 does: Lightning reads such a
    checkpoint with ``fit(weights_only=False)`` alone."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    return any(map(callable, SWALR(optimizer, swa_lr=0.1).state_dict().values()))


def fit(
    callbacks: list[Any],
    folder: Path | None = None,
    module: pl.LightningModule | None = None,
    stops: tuple[int, ...] = (),
    validate: bool = False,
    ckpt_path: Path | None = None,
    **options: Any,
) -> tuple[pl.Trainer, Any]:
    """Fit for three epochs of eight batches, unless options say otherwise."""
    module = Classifier() if module is None else module
    listed = [*callbacks, Stops(folder, stops)] if folder is not None and stops else callbacks
    trainer = trainer_for(listed, folder, **({"max_epochs": 3} | options))
    whole = saves_a_function() and any(isinstance(c, StochasticWeightAveraging) for c in callbacks)
    weights_only = False if whole else None
    trainer.fit(module, Batches(), Batches(1) if validate else None, ckpt_path=ckpt_path, weights_only=weights_only)
    return trainer, module


def everything(trainer: pl.Trainer, module: Any, callback: SparsityCallback, averager: Any) -> dict[str, Any]:
    """All that a resumed run must share with one that never stopped, averages and what averages them included."""
    found = snapshot(trainer, module, callback)
    averaged = {k: t.detach().clone() for k, t in averager._average_model.state_dict().items()}
    return found | {
        "average": averaged,
        "averager": averager.state_dict() if "n_averaged" in averager.state_dict() else {},
    }
