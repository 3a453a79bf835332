"""Networks of which channels are scored by calibration batches, their groups, and losses of batches."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.slim import slimmable_groups
from sparse_callbacks.core.calibration import BatchLoss
from sparse_callbacks.testing.networks import Layers
from support.smcp import Residual


class Parts(nn.Module):
    """Convolutions with all that makes units of several channels: groups, a sum, a flattening; and a depthwise one."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.split = nn.Conv2d(8, 8, 3, padding=1, groups=2, bias=False)
        self.deep, self.one = nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 6, 1)
        self.up, self.side = nn.ConvTranspose2d(6, 5, 2), nn.Conv2d(6, 5, 2, padding=1, stride=1)
        self.last = nn.Linear(5 * 16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).tanh()
        x = self.one(self.deep(self.split(x).tanh())).tanh()
        x = (self.up(x) + self.side(x)).tanh()
        return self.last(x.flatten(1))


class Tokens(nn.Module):
    """Attention and an MLP over five tokens, after dropout."""

    def __init__(self, batch_first: bool = True) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.embed, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.layer = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.3, batch_first=batch_first)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        x = self.layer(x) if self.batch_first else self.layer(x.transpose(0, 1)).transpose(0, 1)
        return self.head(x.mean(1))


def smooth_net() -> nn.Module:
    """A convolution, a residual block and a linear layer that reads a flattened image, for inputs [n, 2, 5, 5]."""
    return Layers(
        nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6), nn.Tanh(), Residual(6), nn.Dropout(0.4), nn.Conv2d(6, 5, 3),
        nn.Tanh(), nn.Flatten(), nn.Linear(45, 3),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "parts": (Parts, (2, 5, 5)),
    "residual": (smooth_net, (2, 5, 5)),
    "attention": (Tokens, (5, 6)),
    "sequence first": (lambda: Tokens(False), (5, 6)),
}


def network(name: str, seed: int = 0) -> tuple[nn.Module, list[Group], list[tuple[Tensor, Tensor]]]:
    """A network in float64 and eval mode whose norms have seen data, its groups, and three batches of four samples."""
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    net = make().double()
    for _ in range(3):
        net(torch.randn(8, *shape, dtype=torch.float64))
    groups = [g for g in slimmable_groups(net, torch.randn(1, *shape, dtype=torch.float64)) if not g.reason]
    assert groups
    return net.eval(), groups, [(torch.randn(4, *shape).double(), torch.randint(3, (4,))) for _ in range(3)]


def losses(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Iterator[BatchLoss]:
    """The cross entropy of each batch, computed when it is asked for."""
    for x, y in batches:
        yield BatchLoss(functional.cross_entropy(net(x), y), len(x))


def everything(groups: Sequence[Group]) -> list[Tensor]:
    """All units of each group."""
    return [torch.ones(g.size, dtype=torch.bool) for g in groups]
