"""A network in which channels are shared in every way, and its cost by the channels that are kept."""

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.costs import layers, parameters
from sparse_callbacks.channels.groups import Group, channel_groups
from sparse_callbacks.channels.network_cost import Network


class Block(nn.Module):
    """Residual sum, concatenation, depthwise and grouped convolution, flattening."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.inner, self.back = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 8, 1), nn.Conv2d(8, 16, 1)
        self.depth, self.wide = nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.Conv2d(16, 24, 1)
        self.join, self.many, self.fc = nn.Conv2d(40, 16, 1), nn.Conv2d(16, 16, 1, groups=2), nn.Linear(16 * 16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        x = x + self.back(self.inner(x).relu())
        x = torch.cat([x, self.wide(self.depth(x))], 1)
        return self.fc(self.many(self.join(x)).flatten(1))


def network(net: nn.Module, x: Tensor, cost: object = parameters) -> tuple[Network, list[Group]]:
    groups = [g for g in channel_groups(net, x) if not g.reason]
    return Network(layers(net, x), groups, cost), groups  # type: ignore[arg-type]


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)
