"""Small networks, and the LightningModules that train them."""

from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.testing.networks import Configure


def sgd(parameters: Iterable[nn.Parameter], lr: float = 0.1) -> Optimizer:
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9, weight_decay=1e-2)


def mlp(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


class Regression(pl.LightningModule):
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


def row(numbers: list[float]) -> Tensor:
    """One row of a matrix in float32."""
    return torch.tensor([numbers], dtype=torch.float32)


class FixedGradient(pl.LightningModule):
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
