"""Networks with channels to remove, and short runs of SMCP."""

from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn

from sparse_callbacks import SMCP
from sparse_callbacks.testing.networks import Layers
from support.inside import parameters_of, set_mask


class Residual(nn.Module):
    """Two convolutions around a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norms[1](self.two(self.norms[0](self.one(x)).relu()))).relu()


def conv_net(seed: int = 0) -> nn.Module:
    """Stem, residual block, depthwise convolution and flattening, for inputs [n, 2, 5, 5] and 4 classes."""
    torch.manual_seed(seed)
    return Layers(
        nn.Conv2d(2, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Residual(16),
        nn.Conv2d(16, 16, 3, groups=16),
        nn.ReLU(),
        nn.Conv2d(16, 24, 1),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(216, 4),
    )


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Flatten(), nn.Linear(50, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)
    ).double()


def method(budget: float = 0.5, **options: Any) -> SMCP:
    """With several solves in a run of 16 steps."""
    short = {"every": 3, "start": 2, "stop": 14, "round_to": 4, "prune_stem": True, "print_plan": False}
    return SMCP(budget, **(short | options))


def mask_by_hand(callback: SMCP, name: str, keep: list[int]) -> pl.Callback:
    """Before the first batch the inputs of ``name`` are masked."""

    def cut(*_: Any) -> None:
        mask = torch.tensor(keep).bool().expand(parameters_of(callback)[name].shape).contiguous()
        set_mask(callback, name, mask)

    return pl.callbacks.LambdaCallback(on_train_start=cut)


class Joined(nn.Module):
    """Two layers, of 8 channels and so many, that one layer reads side by side."""

    def __init__(self, second: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(50, 8), nn.Linear(50, second), nn.Linear(8 + second, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.c(torch.cat([self.a(x).tanh(), self.b(x).tanh()], 1))


def normed() -> nn.Module:
    """Channels that are read by a convolution with a batch norm behind it; in between two others that must not be taken
    for it."""
    torch.manual_seed(0)
    net = Layers(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 12, 3),
        nn.BatchNorm2d(12),
        nn.ReLU(),
        nn.BatchNorm2d(12),
        nn.Flatten(),
        nn.Linear(108, 4),
    ).double()
    for index in (1, 4, 6):
        nn.init.uniform_(net[index].weight, 0.5, 1.5)
    return net
