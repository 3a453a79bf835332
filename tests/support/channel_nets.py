"""Small networks, one for each way in which channels are shared, and masks of half of their channels."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.channels.groups import Group

IMAGE = (2, 3, 8, 8)
OUTPUTS = "these are outputs of the network"


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.inner, self.outer = nn.Conv2d(8, 6, 3, padding=1), nn.Conv2d(6, 8, 3, padding=1)
        self.head = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x))
        x = x + self.outer(self.inner(x).relu())
        return self.head(x.relu().mean((2, 3)))


class Padded(nn.Module):
    """A residual sum whose shortcut grows from 6 to 9 channels by zeros, two of them in front, and every other row
    alone."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.inner, self.outer = nn.Conv2d(6, 4, 3, 2, padding=1), nn.Conv2d(4, 9, 3, padding=1)
        self.head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(36, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        shortcut = functional.pad(x[..., ::2, ::2], (0, 0, 0, 0, 2, 1))
        return self.head((shortcut + self.outer(self.inner(x).relu())).relu())


class Cropped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.pad(self.first(x), (0, 0, 0, 0, 1, -1)))


class Concat(nn.Module):
    def __init__(self, turned: bool = False) -> None:
        super().__init__()
        self.turned = turned
        self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(10)
        self.head = nn.Conv2d(10, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        parts = [self.b(x), self.a(x)] if self.turned else [self.a(x), self.b(x)]
        return self.head(self.norm(torch.cat(parts, 1)).relu())


class Joined(nn.Module):
    """A concatenation before a grouped convolution, whose groups tie the branches; its outputs are 3 channels for each
    group."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Conv2d(3, 2, 1), nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(3, 6, 1)
        self.norm, self.groups = nn.BatchNorm2d(12), nn.Conv2d(12, 6, 3, groups=2)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.groups(self.norm(torch.cat([self.a(x), self.b(x), self.c(x)], 1)).relu()).relu())


class Auxiliary(nn.Module):
    """A second head that runs in train mode only, with a convolution of its own; ``noise``: that never gives the same
    twice."""

    def __init__(self, noise: float = 0.0) -> None:
        super().__init__()
        self.noise = noise
        self.first, self.norm, self.second, self.head = (
            nn.Conv2d(3, 8, 1),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 6, 1),
            nn.Linear(6, 3),
        )
        self.aside = nn.ModuleDict({"conv": nn.Conv2d(8, 4, 1), "drop": nn.Dropout(), "head": nn.Linear(4, 3)})

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.norm(self.first(x)).relu()
        found = self.head(self.second(x).relu().mean((2, 3)))
        if not self.training:
            return found
        other = self.aside["drop"](self.aside["conv"](x).relu()).mean((2, 3))
        return found, self.aside["head"](other) + self.noise * torch.randn(())


class SqueezeExcite(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand = nn.Sequential(nn.Conv2d(3, 8, 1, bias=False), nn.BatchNorm2d(8), nn.Hardswish(inplace=True))
        self.depthwise = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.BatchNorm2d(8))
        self.down, self.up = nn.Conv2d(8, 4, 1), nn.Conv2d(4, 8, 1)
        self.project = nn.Conv2d(8, 5, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.depthwise(self.expand(x))
        gate = self.up(self.down(functional.adaptive_avg_pool2d(x, 1)).relu()).sigmoid()
        return self.project(gate * x)


class Scaled(nn.Module):
    """A parameter of its own with one entry for each channel, and a PReLU with one."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.slopes, self.slope = nn.Conv2d(3, 8, 3), nn.PReLU(8), nn.PReLU()
        self.scale = nn.Parameter(torch.randn(8, 1, 1))
        self.last = nn.Conv2d(8, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.slope(self.slopes(self.first(x))) * self.scale)


class Chunked(nn.Module):
    """A gated unit: the halves of one convolution are multiplied."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.both(x).chunk(2, 1)
        return self.head(value * gate.sigmoid())


class Split(nn.Module):
    """Half of the channels goes through a branch, half past it."""

    def __init__(self) -> None:
        super().__init__()
        self.both, self.branch, self.head = nn.Conv2d(3, 16, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(14, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        past, through = self.both(x).chunk(2, 1)
        return self.head(torch.cat([past, self.branch(through).relu()], 1))


def times_channels(x: Tensor) -> Tensor:
    """``x`` times the number of its channels, which must be even: something that no trace sees."""
    if x.shape[1] % 2:
        raise RuntimeError(f"{x.shape[1]} channels make no pairs")
    return x * x.shape[1]


class Shuffled(nn.Module):
    """A channel shuffle, of blocks whose sizes the code fixes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 6, 1), nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = x.view(x.shape[0], 2, 4, *x.shape[2:]).transpose(1, 2).reshape(x.shape)
        return self.last(self.inner(x).relu())


class Reused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.head = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twice(self.twice(self.first(x)).relu()))


class Transformer(nn.Module):
    """Tokens [batch, 4, 6]: attention, and an MLP whose units are channels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(6), nn.MultiheadAttention(6, 2, batch_first=True)
        self.up, self.down = nn.Linear(6, 12), nn.Linear(12, 6)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return self.head((x + self.down(functional.gelu(self.up(self.norm(x))))).mean(1))


class Kernel(nn.Conv2d):
    """A convolution of another class."""


def flattened() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, 2),
        nn.ReLU(),
        nn.MaxPool2d(2, 1),
        nn.Flatten(),
        nn.Linear(6 * 4, 7),
        nn.ReLU(),
        nn.Linear(7, 2),
    )


def grouped() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 8, 3, groups=2), nn.ReLU(), nn.Conv2d(8, 4, 1)
    )


def transposed() -> nn.Module:
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 12, 2, 2, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(12, 4, 2),
    ]
    return nn.Sequential(*layers)


def transposed_depthwise() -> nn.Module:
    layers = [
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 8, 4, 2, 1, groups=8),
        nn.BatchNorm2d(8),
        nn.Conv2d(8, 4, 1),
    ]
    return nn.Sequential(*layers)


def one_dimensional() -> nn.Module:
    return nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 8, 3), nn.BatchNorm1d(8), nn.ReLU(), nn.Conv1d(8, 4, 3))


class Functional(nn.Module):
    """A kernel of its own, norms of single images, and groups of several inputs with one output each."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), nn.InstanceNorm2d(8, affine=True), nn.Conv2d(2, 4, 1)
        self.kernel = nn.Parameter(torch.randn(8, 8, 1, 1))
        self.groups = nn.Conv2d(8, 2, 1, groups=2)

    def forward(self, x: Tensor) -> Tensor:
        x = functional.conv2d(self.norm(self.first(x)).relu(), self.kernel)
        return self.last(self.groups(x.relu()).relu())


class Rotary(nn.Module):
    """Tokens [batch, 6, 16]: attention with a rotary embedding, and an MLP."""

    cos: Tensor
    sin: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16, bias=False) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)
        angles = torch.arange(6)[:, None] / 10 ** torch.arange(4).repeat(2)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def turned(self, x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * self.cos + torch.cat([-second, first], -1) * self.sin

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).view(*x.shape[:2], -1, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        weights = (self.turned(q) @ self.turned(k).transpose(2, 3)).softmax(-1)
        x = x + self.o((weights @ v).transpose(1, 2).flatten(2))
        return self.head(x + self.down(torch.relu(self.up(x))))


class GroupedQueries(nn.Module):
    """Tokens [batch, n, 12]: attention whose keys and values serve several queries each, of 3 channels a head."""

    def __init__(self, heads: int, shared: int) -> None:
        super().__init__()
        self.heads, self.shared = heads, shared
        self.q, self.o = nn.Linear(12, 3 * heads), nn.Linear(3 * heads, 12)
        self.k, self.v = nn.Linear(12, 3 * shared), nn.Linear(12, 3 * shared)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, 3)).transpose(1, 2) for f in (self.q, self.k, self.v))
        k, v = (z.repeat_interleave(q.shape[1] // z.shape[1], 1) for z in (k, v))
        mixed = functional.scaled_dot_product_attention(q, k, v)
        return self.head(self.o(mixed.transpose(1, 2).flatten(2)).relu())


class FrozenNorm(nn.Module):
    """A batch norm whose vectors are buffers."""

    scale: Tensor
    mean: Tensor
    bias: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        for name in ("scale", "mean", "bias"):
            self.register_buffer(name, torch.rand(channels) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        scale, mean, bias = (v.view(1, -1, 1, 1) for v in (self.scale, self.mean, self.bias))
        return (x - mean) * scale + bias


class Frozen(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Conv2d(3, 8, 3), FrozenNorm(8), nn.Conv2d(8, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)).relu())


class NormAct(nn.BatchNorm2d):
    """A batch norm with an activation inside."""

    def forward(self, x: Tensor) -> Tensor:
        return functional.silu(super().forward(x))


NETS: dict[str, Callable[[], nn.Module]] = {
    "residual": Residual,
    "padded": Padded,
    "concat": Concat,
    "squeeze_excite": SqueezeExcite,
    "scaled": Scaled,
    "reused": Reused,
    "flattened": flattened,
    "grouped": grouped,
    "transposed": transposed,
    "one_dimensional": one_dimensional,
    "chunked": Chunked,
    "split": Split,
    "joined": Joined,
    "functional": Functional,
    "frozen": Frozen,
    "norm_with_activation": lambda: nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 4, 3)),
    "transposed_depthwise": transposed_depthwise,
    "subclass": lambda: nn.Sequential(Kernel(3, 8, 3), nn.ReLU(), Kernel(8, 4, 3)),
}


def made(build: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """The network with random norms and biases, in eval mode."""
    torch.manual_seed(seed)
    net = build()
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.modules.batchnorm._NormBase):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_()
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 1.5)
    return net.eval()


def half(model: nn.Module, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Input masks of half of the units of every group, at random."""
    masks: dict[str, Tensor] = {}
    for group in groups:
        keep = torch.ones(group.size, dtype=torch.bool)
        keep[torch.randperm(group.size)[: group.size // 2]] = False
        for name, mask in group.masks(model, keep).items():
            masks[name] = masks[name] & mask if name in masks else mask
    return masks


def masked(net: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy with zeros where the masks say so."""
    found = copy.deepcopy(net)
    with torch.no_grad():
        for name, mask in masks.items():
            found.get_parameter(name).mul_(mask)
    return found


def outputs(net: nn.Module, x: Tensor) -> Tensor:
    """Outputs in eval mode; the network is left as it is."""
    with torch.no_grad():
        return copy.deepcopy(net).eval()(x)


def dead_rows(gone: int, channels: int) -> Tensor:
    """A mask of a convolution whose first outputs are dead."""
    return (torch.arange(channels) >= gone).view(-1, 1, 1, 1)
