"""Fits with sparse storage, and what they must share with masked ones."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_callbacks import SET, RigL, SparseLinear, Static
from sparse_callbacks.core.randomness import random_states
from sparse_callbacks.testing.comparison import snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, trainer_for
from support.processes import matrices

GROUP = 4
METHODS: dict[str, Any] = {"static": Static, "set": SET, "rigl": RigL}


def sparse(name: str = "rigl", storage: Any = "sparse", **options: Any) -> Any:
    """A callback whose masks move after every third step, up to the eleventh of sixteen."""
    given: dict[str, Any] = {
        "print_plan": False,
        "distribution": "uniform",
        "every": 3,
        "start": 0,
        "stop": 11,
    } | options
    if name == "static":
        given = {key: value for key, value in given.items() if key not in ("every", "start", "stop")}
    return METHODS[name](0.75, storage=storage, group=GROUP, **given)


def mlp(optimizer: str = "sgd", dtype: torch.dtype = torch.float64, seed: int = 0) -> Classifier:
    """Three matrices under a Trainer."""
    return Classifier(matrices(seed, dtype), optimizer)


def layers_of(module: nn.Module) -> dict[str, SparseLinear]:
    """The exchanged layers of a model, by name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, SparseLinear)}


def patterns_of(module: nn.Module) -> dict[str, Tensor]:
    """The unit keys of each exchanged layer."""
    return {name: layer.keys().clone() for name, layer in layers_of(module).items()}


def fit(
    callback: Any,
    module: pl.LightningModule | None = None,
    *more: pl.Callback,
    loader: Any = None,
    folder: Path | None = None,
    stops: tuple[int, ...] = (),
    ckpt_path: Any = None,
    **options: Any,
) -> tuple[pl.Trainer, Any]:
    """Fit for two epochs of eight batches, unless options say otherwise, with checkpoints after these batches."""
    module = mlp() if module is None else module
    ours = list(callback) if isinstance(callback, list) else [callback]
    listed = [*ours, *more, *([Stops(folder, stops)] if folder is not None and stops else [])]
    trainer = trainer_for(listed, folder, **options)
    trainer.fit(module, Batches() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer, module


def left(trainer: pl.Trainer, module: pl.LightningModule, callback: Any) -> dict[str, Any]:
    """Everything that two equal runs share, the patterns included."""
    return snapshot(trainer, module, callback) | {"patterns": patterns_of(module)}


class Hooked(pl.Callback):
    """Calls a function in one hook."""

    def __init__(self, hook: str, call: Callable[..., Any]) -> None:
        setattr(self, hook, call)


def random_numbers() -> list[Any]:
    """States of the random generators in full, as numbers to compare."""
    states = random_states()
    return [states["torch"].tolist(), states["python"], [part.tolist() for part in states["numpy"][1:2]]]
