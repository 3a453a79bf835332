"""Small modules, data and trainers with which the tests of the core run."""

import math
from collections.abc import Callable, Iterable
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning import LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import SparsityCallback

Configure = Callable[[Iterable[nn.Parameter]], Any]


def sgd(parameters: Iterable[nn.Parameter], lr: float = 0.1) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-2)


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Regression(LightningModule):
    """Squared error of ``net`` on (x, y)."""

    def __init__(self, net: nn.Module | None = None, configure: Configure = sgd) -> None:
        super().__init__()
        self.net = mlp(12, 20, 6) if net is None else net
        self.configure = configure
        self.batches = 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        self.batches += 1
        x, y = batch
        return nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return self.configure(self.parameters())


class FixedGradient(LightningModule):
    """One weight whose gradient is the tensor given for each batch, or the last one given."""

    def __init__(self, weight: Tensor, gradients: list[Tensor], configure: Configure = sgd) -> None:
        super().__init__()
        self.net = nn.Linear(weight.shape[1], weight.shape[0])
        self.net.weight.data.copy_(weight)
        self.gradients, self.configure, self.batches = gradients, configure, 0

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        gradient = self.gradients[min(self.batches, len(self.gradients) - 1)]
        self.batches += 1
        # twice the bias, so that it has a gradient as well; `where` lets a single inf through without NaN elsewhere
        return torch.where(gradient == 0, 0.0, self.net.weight * gradient).sum() + 2 * self.net.bias.sum()

    def configure_optimizers(self) -> Any:
        return self.configure(self.parameters())


def loader(batches: int, batch_size: int = 4, inputs: int = 12, outputs: int = 6, seed: int = 7) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batches * batch_size, inputs, generator=generator)
    y = torch.randn(batches * batch_size, outputs, generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=batch_size)


def trainer(path: Path, callbacks: Any, **options: Any) -> Trainer:
    defaults: dict[str, Any] = {
        "accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False,
        "enable_checkpointing": False, "default_root_dir": path,
    }  # fmt: skip
    listed = callbacks if isinstance(callbacks, list) else [callbacks]
    return Trainer(**(defaults | options), callbacks=listed)


def fit(path: Path, callbacks: Any, module: LightningModule, steps: int, **options: Any) -> Trainer:
    """Fit for ``steps`` optimizer steps, with enough data for one epoch unless told otherwise."""
    made = trainer(path, callbacks, max_steps=steps, **options)
    window = made.accumulate_grad_batches
    made.fit(module, loader(math.ceil(steps * window)))
    return made


def snapshot(callback: SparsityCallback) -> dict[str, Tensor]:
    return {n: m.clone() for n, m in callback.masks.items()}


def record_updates(callback: Any) -> list[tuple[int, int]]:
    """(the callback's own step, batches seen by the trainer before this one) at each update of ``callback``."""
    seen: list[tuple[int, int]] = []
    move, begin = callback.move_masks, callback.on_train_batch_start
    batch = [-1]

    def on_train_batch_start(*arguments: Any) -> None:
        batch[0] += 1
        begin(*arguments)

    def move_masks(**events: float) -> None:
        seen.append((callback.step, batch[0]))
        move(**events)

    callback.on_train_batch_start, callback.move_masks = on_train_batch_start, move_masks
    return seen
