"""Random small networks, each described by a record that builds it again."""

from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn

CLASSES = 8  # also the words of an embedding, so that it can be tied to the last layer
SPACES = {"1d": 1, "2d": 2, "3d": 3}
CHANNELS, PLACES = 2, 4  # of the inputs
ACTIVATIONS = {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU, "silu": nn.SiLU}
CONVOLUTIONS = ("conv", "pointwise", "grouped", "depthwise", "dilated", "transposed", "transposed in groups")
SEQUENCES = (
    "linear",
    "attention",
    "attention with its own keys",
    "rnn",
    "gru",
    "lstm",
    "stacked",
    "two ways",
    "projected",
)
NORMS = {"conv": ("batch", "group", "instance"), "sequence": ("layer", "rms")}


@dataclass(frozen=True)
class Block:
    """A layer and the norm after it.

    ``kind`` is one of :data:`CONVOLUTIONS` or :data:`SEQUENCES`, ``width`` the number of its outputs; with ``skip`` its
    input is added to the output where the shapes allow it.
    """

    kind: str
    width: int
    norm: str = ""
    skip: bool = False


@dataclass(frozen=True)
class Network:
    """A network for inputs of one ``space``: 1d, 2d, 3d, sequence or tokens.

    ``traits``: ``frozen`` (the first layer), ``unused`` (a layer that the forward pass leaves out), ``tied`` (two layers
    with one weight), ``tied embedding`` (to the last layer), ``channels_last``, ``asleep`` (norms in eval mode),
    ``flat`` (a flattened input of the last layer in place of a mean over positions).
    """

    space: str
    blocks: tuple[Block, ...]
    activation: str = "relu"
    traits: tuple[str, ...] = ()
    dtype: str = "float32"
    seed: int = 0

    @property
    def convolves(self) -> bool:
        return self.space in SPACES

    def build(self) -> "RandomNetwork":
        """The network, with the same values each time."""
        torch.manual_seed(self.seed)
        made = RandomNetwork(self).to(getattr(torch, self.dtype))
        return made.to(memory_format=torch.channels_last) if "channels_last" in self.traits else made

    def batch(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Random inputs and labels."""
        labels = torch.randint(0, CLASSES, (size,), generator=generator)
        if self.space == "tokens":
            return torch.randint(0, CLASSES, (size, PLACES), generator=generator), labels
        shape = (CHANNELS, *[PLACES] * SPACES[self.space]) if self.convolves else (PLACES, CHANNELS)
        return torch.randn(size, *shape, generator=generator), labels


class Recurrent(nn.Module):
    """The outputs of a recurrent layer without its last state."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(x)[0]


class Attention(nn.Module):
    """Attention of a sequence to itself; with ``own_keys`` keys and values have features of their own, and the
    projections are three parameters instead of one."""

    def __init__(self, width: int, own_keys: bool) -> None:
        super().__init__()
        self.extra = 1 if own_keys else 0
        sizes = {"kdim": width + 1, "vdim": width + 1} if own_keys else {}
        self.layer = nn.MultiheadAttention(width, 2, batch_first=True, **sizes)

    def forward(self, x: Tensor) -> Any:
        keys = torch.cat([x, x[..., : self.extra]], dim=-1)
        return self.layer(x, keys, keys, need_weights=False)[0]


def _convolution(kind: str, inputs: int, width: int, dimensions: int) -> tuple[nn.Module, int]:
    """A convolution that keeps the positions, and its number of outputs."""
    plain = [nn.Conv1d, nn.Conv2d, nn.Conv3d][dimensions - 1]
    transposed = [nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d][dimensions - 1]
    if kind == "depthwise":
        return plain(inputs, inputs, 3, padding=1, groups=inputs), inputs
    made = {
        "conv": lambda: plain(inputs, width, 3, padding=1),
        "pointwise": lambda: plain(inputs, width, 1, bias=False),
        "grouped": lambda: plain(inputs, width, 3, padding=1, groups=2),
        "dilated": lambda: plain(inputs, width, 3, padding=2, dilation=2),
        "transposed": lambda: transposed(inputs, width, 3, padding=1),
        "transposed in groups": lambda: transposed(inputs, width, 3, padding=1, groups=2, bias=False),
    }
    return made[kind](), width


def _on_sequences(kind: str, inputs: int, width: int) -> tuple[nn.Module, int]:
    """A layer over sequences, and its number of outputs."""
    if kind.startswith("attention"):
        return Attention(inputs, own_keys=kind != "attention"), inputs
    if kind == "linear":
        return nn.Linear(inputs, width), width
    made: dict[str, Any] = {
        "rnn": lambda: nn.RNN(inputs, width, batch_first=True),
        "gru": lambda: nn.GRU(inputs, width, batch_first=True, bias=False),
        "lstm": lambda: nn.LSTM(inputs, width, batch_first=True),
        "stacked": lambda: nn.LSTM(inputs, width, num_layers=2, batch_first=True),
        "two ways": lambda: nn.GRU(inputs, width // 2, bidirectional=True, batch_first=True),
        "projected": lambda: nn.LSTM(inputs, width + 2, proj_size=width, batch_first=True),
    }
    return Recurrent(made[kind]()), width


def _norm(name: str, width: int, dimensions: int) -> nn.Module:
    made: dict[str, Any] = {
        "": nn.Identity,
        "batch": lambda: [nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d][dimensions - 1](width),
        "instance": lambda: [nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d][dimensions - 1](
            width, affine=True
        ),
        "group": lambda: nn.GroupNorm(2, width),
        "layer": lambda: nn.LayerNorm(width),
        "rms": lambda: nn.RMSNorm(width),
    }
    return made[name]()  # type: ignore[no-any-return]


class RandomNetwork(nn.Module):
    """The network that a record describes: [batch, ...] to scores of :data:`CLASSES`."""

    def __init__(self, spec: Network) -> None:
        super().__init__()
        self.spec = spec
        dimensions = SPACES.get(spec.space, 0)
        width = CHANNELS
        self.embedding = nn.Embedding(CLASSES, 6) if spec.space == "tokens" else None
        if self.embedding is not None:
            width = 6
        self.layers, self.norms = nn.ModuleList(), nn.ModuleList()
        self.skips: list[bool] = []
        for block in spec.blocks:
            make = (
                (lambda b, w: _convolution(b.kind, w, b.width, dimensions))
                if dimensions
                else (lambda b, w: _on_sequences(b.kind, w, b.width))
            )
            inputs = width
            layer, width = make(block, inputs)
            # decided now and not by the shapes of a forward pass: a method that removes channels changes those
            self.skips.append(block.skip and width == inputs)
            self.layers.append(layer)
            self.norms.append(_norm(block.norm, width, dimensions))
        if "tied embedding" in spec.traits:
            self.bridge = nn.Linear(width, 6)
            width = 6
        self.activation = ACTIVATIONS[spec.activation]()
        self.twins = nn.ModuleList([nn.Linear(width, width), nn.Linear(width, width)] if "tied" in spec.traits else [])
        self.flat = spec.convolves and "flat" in spec.traits and not self.twins
        self.head = nn.Linear(width * (PLACES**dimensions if self.flat else 1), CLASSES)
        self._apply_traits()

    def _apply_traits(self) -> None:
        traits = self.spec.traits
        if "tied" in traits:
            self.twins[1].weight = self.twins[0].weight
        if "tied embedding" in traits and self.embedding is not None:
            self.head.weight = self.embedding.weight
        if "frozen" in traits:
            self.layers[0].requires_grad_(False)
        if "asleep" in traits:
            self.norms.eval()
        self.unused = nn.Linear(5, 7) if "unused" in traits else None

    def forward(self, x: Tensor) -> Any:
        spec = self.spec
        x = x.to(self.head.weight.dtype) if self.embedding is None else self.embedding(x)
        if "channels_last" in spec.traits:
            x = x.contiguous(memory_format=torch.channels_last)
        for skip, layer, norm in zip(self.skips, self.layers, self.norms, strict=True):
            out = self.activation(norm(layer(x)))
            x = x + out if skip else out
        x = self._without_positions(x)
        if "tied embedding" in spec.traits:
            x = torch.tanh(self.bridge(x))
        for twin in self.twins:
            x = x + torch.tanh(twin(x))
        return self.head(x)

    def _without_positions(self, x: Tensor) -> Tensor:
        if not self.spec.convolves:
            return x.mean(1)
        return x.flatten(1) if self.flat else x.flatten(2).mean(2)


@st.composite
def networks(draw: st.DrawFn, convolutions_only: bool = False, simple: bool = False) -> Network:
    """Networks of one to four blocks.

    Args:
        convolutions_only: no sequences, and at least two blocks.
        simple: neither attention nor recurrent layers.
    """
    spaces = list(SPACES) if convolutions_only else [*SPACES, "sequence", "tokens"]
    space = draw(st.sampled_from(spaces))
    if space in SPACES:
        # channels of the other norms cannot be removed
        kinds, norms = CONVOLUTIONS, ("batch",) if convolutions_only else NORMS["conv"]
    else:
        kinds, norms = (("linear",) if simple else SEQUENCES), NORMS["sequence"]
    block = st.builds(
        Block, st.sampled_from(kinds), st.sampled_from([4, 6, 8]), st.sampled_from(["", *norms]), st.booleans()
    )
    blocks = draw(st.lists(block, min_size=2 if convolutions_only else 1, max_size=4))
    possible = ["frozen", "unused", "asleep", "flat", *["tied"] * (not convolutions_only)]  # tied channels stay
    possible += ["channels_last"] if space == "2d" else ["tied embedding"] if space == "tokens" else []
    traits = draw(st.lists(st.sampled_from(possible), unique=True, max_size=3))
    return Network(
        space,
        tuple(blocks),
        draw(st.sampled_from(list(ACTIVATIONS))),
        tuple(sorted(traits)),
        draw(st.sampled_from(["float32", "float32", "float32", "float64", "bfloat16"])),
        draw(st.integers(0, 3)),
    )
