"""Small networks out of random blocks, each of which shares channels in another way and computes its sizes from tensors."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Residual(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = channels
        self.inner, self.outer = nn.Conv2d(channels, width, 3, padding=1), nn.Conv2d(width, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).relu())


class Branches(nn.Module):
    """A concatenation, also of the input itself."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = 2 * channels + width
        self.one, self.other = nn.Conv2d(channels, width, 1), nn.Conv2d(channels, channels, 3, padding=1)
        self.norm = nn.BatchNorm2d(self.out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(torch.cat([self.one(x), x, self.other(x)], 1)).relu()


class Gated(nn.Module):
    """Two halves that are multiplied."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = width
        self.both = nn.Conv2d(channels, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, 1)
        return value * gate.sigmoid()


class Grouped(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = 2 * width
        self.before, self.groups = nn.Conv2d(channels, 4 * width, 1), nn.Conv2d(4 * width, 2 * width, 3, 1, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.groups(self.before(x).relu())


class Depthwise(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = width
        self.each = nn.Conv2d(channels, channels, 3, padding=1, groups=channels)
        self.norm, self.project = nn.BatchNorm2d(channels), nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.project(self.norm(self.each(x)).relu())


class Excited(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = channels
        self.down, self.up = nn.Linear(channels, width), nn.Linear(width, channels)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.up(self.down(x.mean((2, 3))).relu()).sigmoid()[:, :, None, None]


class ShuffledChannels(nn.Module):
    """Channels of two groups in turn; their number two is fixed by this code."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = 2 * width
        self.conv = nn.Conv2d(channels, 2 * width, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return x.view(len(x), 2, -1, *x.shape[2:]).transpose(1, 2).flatten(1, 2)


class Heads(nn.Module):
    """Attention by heads of 4 channels each, as many as fit."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = channels
        self.query, self.key, self.value = (nn.Linear(channels, 4 * width) for _ in range(3))
        self.project = nn.Linear(4 * width, channels)

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).transpose(1, 2)
        query, key, value = (
            layer(tokens).unflatten(-1, (-1, 4)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        mixed = nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
        return x + self.project(mixed).transpose(1, 2).view(x.shape)


class Scaled(nn.Module):
    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = channels
        self.scale, self.shift = nn.Parameter(torch.randn(channels, 1, 1)), nn.Parameter(torch.randn(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.shift, x, self.scale).clamp(-3, 3)


class Written(nn.Module):
    """Two branches that are written into parts of a tensor of zeros."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.out = channels + width
        self.cheap = nn.Conv2d(channels, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        more = self.cheap(x)
        made = x.new_zeros(len(x), x.shape[1] + more.shape[1], *x.shape[2:])
        made[:, : x.shape[1]] = x
        made[:, x.shape[1] :] = more
        return made


BLOCKS = (Residual, Branches, Gated, Grouped, Depthwise, Excited, ShuffledChannels, Heads, Scaled, Written)
FIXED = (ShuffledChannels,)
"""Blocks whose code fixes a size, so that a group may have to be put back."""


class RandomNetwork(nn.Module):
    """A convolution, blocks one after the other, and a linear layer that reads the flattened image.

    Args:
        blocks: number of the class in :data:`BLOCKS`, and a width, of each block.
        seed: of its parameters and statistics.
    """

    def __init__(self, blocks: Sequence[tuple[int, int]], seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.stem = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU())
        channels, made = 6, []
        for number, width in blocks:
            made.append(BLOCKS[number](channels, width))
            channels = made[-1].out
        self.blocks = nn.Sequential(*made)
        self.pool, self.head = nn.AdaptiveAvgPool2d(2), nn.Linear(4 * channels, 5)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 2.0)
                nn.init.normal_(module.bias, 0.2)
                # near to those of the images, so that few channels are zero behind every ReLU
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.05, 0.2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.pool(self.blocks(self.stem(x))).flatten(1))
