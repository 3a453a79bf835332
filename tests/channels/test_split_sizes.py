"""Modules that split channels by a size that they state lose channels: stand-ins by name, and timm's classes where it is there."""

import copy
import importlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import load_compact, save_compact, slim
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.split_sizes import SPLITS, split_sizes, update_splits

pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
WIDTH = 16
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(3))


def conv(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, padding=1, groups=groups)


def named(qualified: str) -> Callable[[type], type]:
    def give(kind: type) -> type:
        kind.__module__, _, kind.__qualname__ = qualified.rpartition(".")
        return kind

    return give


# ---------------------------------------------------------------------- stand-ins, which need no package


@named("timm.models.res2net.Bottle2neck")
class Scales(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale, self.width = 4, 6
        self.conv1, self.conv3 = nn.Conv2d(WIDTH, 24, 1), nn.Conv2d(24, WIDTH, 1)
        self.convs = nn.ModuleList(conv(6, 6) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        parts = torch.split(self.conv1(x), self.width, 1)
        done, last = [], None
        for layer, part in zip(self.convs, parts, strict=False):
            last = layer(part if last is None else part + last).relu()
            done.append(last)
        return x + self.conv3(torch.cat([*done, parts[-1]], 1))


@named("timm.layers.mixed_conv2d.MixedConv2d")
class Kernels(nn.ModuleDict):
    def __init__(self, groups: int = 1) -> None:
        super().__init__({"0": conv(10, 10, 10 if groups > 1 else 1), "1": conv(6, 6, 2 if groups > 1 else 1)})
        self.splits = [10, 6]

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([layer(part) for layer, part in zip(self.values(), x.split(self.splits, 1), strict=True)], 1)


@named("timm.layers.selective_kernel.SelectiveKernel")
class Paths(nn.Module):
    def __init__(self, split_input: bool = True) -> None:
        super().__init__()
        self.in_channels, self.num_paths, self.split_input = WIDTH, 2, split_input
        inputs = WIDTH // 2 if split_input else WIDTH
        self.paths = nn.ModuleList(nn.Sequential() for _ in range(2))
        for path in self.paths:
            path.conv = conv(inputs, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        parts = x.split(self.in_channels // 2, 1) if self.split_input else [x, x]
        return self.paths[0](parts[0]) + self.paths[1](parts[1]).relu()


@named("timm.models.cspnet.CrossStage")
class Halves(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.expand_chs = 12
        self.conv_exp, self.block, self.last = nn.Sequential(), conv(6, 6), conv(12, WIDTH)
        self.conv_exp.conv = conv(WIDTH, 12)

    def forward(self, x: Tensor) -> Tensor:
        one, other = self.conv_exp(x).split(self.expand_chs // 2, 1)
        return self.last(torch.cat([one, self.block(other)], 1))


@named("timm.models.mobilevit.LinearSelfAttention")
class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed_dim = 12
        self.qkv_proj, self.out_proj = nn.Conv2d(WIDTH, 25, 1), nn.Conv2d(12, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv_proj(x).split([1, self.embed_dim, self.embed_dim], 1)
        return self.out_proj(value.relu() * (key * query.softmax(-1)).sum(-1, keepdim=True))


@named("timm.models.focalnet.FocalModulation")
class Focal(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.focal_level, self.input_split = 1, [WIDTH, WIDTH, 2]
        self.f, self.h, self.proj = (nn.Conv2d(WIDTH, n, 1) for n in (2 * WIDTH + 2, WIDTH, WIDTH))
        self.inner = conv(WIDTH, WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        query, context, gates = self.f(x).split(self.input_split, 1)
        context = self.inner(context) * gates[:, :1]
        return self.proj(query * self.h(context))


@named("timm.models.mambaout.GatedConvBlock")
class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split_indices = (20, 12, 8)
        self.fc1, self.fc2, self.conv = nn.Linear(WIDTH, 40), nn.Linear(20, WIDTH), conv(8, 8, 8)

    def forward(self, x: Tensor) -> Tensor:
        gate, plain, mixed = self.fc1(x.permute(0, 2, 3, 1)).split(self.split_indices, -1)
        mixed = self.conv(mixed.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        return x + self.fc2(gate.relu() * torch.cat([plain, mixed], -1)).permute(0, 3, 1, 2)


class _Bands(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.split_indexes = (10, 2, 2, 2)
        self.dwconv_hw, self.dwconv_w, self.dwconv_h = (conv(2, 2, 2) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        first, *others = x.split(self.split_indexes, 1)
        layers = (self.dwconv_hw, self.dwconv_w, self.dwconv_h)
        return torch.cat([first, *(layer(part) for layer, part in zip(layers, others, strict=True))], 1)


@named("timm.models.inception_next.MetaNeXtBlock")
class Bands(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_mixer, self.norm, self.mlp = _Bands(), nn.BatchNorm2d(WIDTH), nn.Conv2d(WIDTH, WIDTH, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.norm(self.token_mixer(x)))


class _Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.dim_conv3, self.dim_untouched, self.partial_conv3 = 4, 12, conv(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        mixed, plain = x.split([self.dim_conv3, self.dim_untouched], 1)
        return torch.cat([self.partial_conv3(mixed), plain], 1)


@named("timm.models.fasternet.MLPBlock")
class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.spatial_mixing, self.mlp = _Partial(), nn.Sequential(nn.Conv2d(WIDTH, WIDTH, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(self.spatial_mixing(x))


STAND_INS = {
    "width": Scales,
    "splits": Kernels,
    "depthwise splits": lambda: Kernels(2),
    "paths": Paths,
    "whole paths": lambda: Paths(False),
    "halves": Halves,
    "linear attention": Linear,
    "focal": Focal,
    "gated": Gated,
    "bands": Bands,
    "partial": Partial,
}


def net(block: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, WIDTH, 1), block, nn.ReLU(), nn.Conv2d(WIDTH, 2, 1)).eval()


def slimmed(model: nn.Module) -> nn.Module:
    """Without every third unit of every group that is open; the inputs of depthwise layers are among them."""
    masks: dict[str, Tensor] = {}
    for group in channel_groups(model, X):
        if not group.reason:
            for name, mask in group.masks(model, torch.arange(group.size) % 3 != 1).items():
                masks[name] = masks[name] & mask if name in masks else mask
    with torch.no_grad():
        for name, mask in masks.items():
            model.get_parameter(name).mul_(mask)
    small, proof = slim(model, masks, X)
    failing = {row.name: row.reason for row in proof.rows if "fails" in row.reason or "outputs change" in row.reason}
    assert not failing
    return small


def check(make: Callable[[], nn.Module], path: Path) -> None:
    """What is left computes the same, states sizes of splits that are smaller, and comes back from a file."""
    torch.manual_seed(0)
    model = net(make())
    before = copy.deepcopy(model)
    stated = split_sizes(model[1])
    small = slimmed(model)
    torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-5)
    now = split_sizes(small[1])
    assert now.keys() == stated.keys()
    assert all(torch.tensor(now[name]).sum() < torch.tensor(stated[name]).sum() for name in stated)
    for name, size in now.items():
        owner, _, attribute = name.rpartition(".")
        held = [getattr(m[1].get_submodule(owner), attribute) for m in (small, before)]
        assert type(held[0]) is type(held[1])
        assert type(held[0])(size) == held[0] != held[1]
    save_compact(small, path / "small.safetensors")
    description = json.loads((path / "small.json").read_text())
    assert (description["version"], description["layers"]["1"]["splits"]) == (3, now)
    assert torch.equal(load_compact(before, path / "small.safetensors").eval()(X), small(X))


@pytest.mark.parametrize("name", STAND_INS, ids=str)
def test_what_is_left_splits_by_what_it_has(name: str, tmp_path: Path) -> None:
    check(STAND_INS[name], tmp_path)


def test_a_convolution_of_a_part_may_make_fewer_channels_than_it_reads() -> None:
    model = net(Partial())
    small, proof = slim(model, {"1.mlp.0.weight": torch.arange(WIDTH) >= 3}, X)
    assert proof.removed == 3
    assert split_sizes(small[1]) == {"spatial_mixing.dim_conv3": 4, "spatial_mixing.dim_untouched": 12}


def test_every_function_of_the_table_has_a_stand_in() -> None:
    stand_ins = {f"{type(m).__module__}.{type(m).__qualname__}" for m in (make() for make in STAND_INS.values())}
    assert {SPLITS[name] for name in stand_ins} == set(SPLITS.values())


def test_a_forward_of_its_own_or_another_release_says_nothing() -> None:
    class Own(Scales):
        def forward(self, x: Tensor) -> Tensor:
            return x

    older = Scales()
    del older.scale
    nothing = Scales()
    del nothing.width
    for module in (Own(), older, nothing, nn.Linear(2, 2)):
        attributes = dict(vars(module))
        assert split_sizes(module) == {}
        update_splits(module)
        assert vars(module).keys() == attributes.keys()


def test_sizes_that_are_not_those_of_the_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.json"
    save_compact(slimmed(net(Scales())), path.with_suffix(".safetensors"))
    description = json.loads(path.read_text())
    for wrong, message in [
        ({"width": 9}, "width of '1' is 9 there, where its weights mean 4"),
        (5, "splits of '1' is 5"),
    ]:
        description["layers"]["1"]["splits"] = wrong
        path.write_text(json.dumps(description))
        fresh = net(Scales())
        with pytest.raises(ValueError, match=message):
            load_compact(fresh, path.with_suffix(".safetensors"))
        assert fresh[1].width == 6


# ---------------------------------------------------------------------- timm


def timm_class(path: str) -> Any:
    pytest.importorskip("timm")
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(f"timm.{module}"), name)


class Tokens(nn.Module):
    """A block of timm that takes channels last."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


STAGE = {"depth": 1, "block_ratio": 0.5, "norm_layer": nn.BatchNorm2d, "act_layer": nn.ReLU}
TIMM = {
    "models.res2net.Bottle2neck": lambda kind: kind(WIDTH, 4, base_width=96, norm_layer=nn.BatchNorm2d),
    "models.dla.DlaBottle2neck": lambda kind: kind(WIDTH, WIDTH, cardinality=1, base_width=48),
    "layers.mixed_conv2d.MixedConv2d": lambda kind: kind(WIDTH, WIDTH, [3, 5]),
    "layers.selective_kernel.SelectiveKernel": lambda kind: kind(WIDTH, WIDTH, split_input=True),
    "models.cspnet.CrossStage": lambda kind: kind(
        WIDTH, WIDTH, 1, 1, depth=1, block_ratio=0.5, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU
    ),
    "models.cspnet.CrossStage3": lambda kind: kind(
        WIDTH, WIDTH, 2, 1, depth=1, block_ratio=0.5, norm_layer=nn.BatchNorm2d, act_layer=nn.ReLU
    ),
    "models.fasternet.MLPBlock": lambda kind: kind(WIDTH, 4, 2.0, 0.0, 0.0),
    "models.focalnet.FocalModulation": lambda kind: kind(WIDTH, 3, 2),
    "models.inception_next.MetaNeXtBlock": lambda kind: kind(WIDTH),
    "models.mambaout.GatedConvBlock": lambda kind: Tokens(kind(WIDTH, conv_ratio=0.5)),
    "models.mobilevit.LinearSelfAttention": lambda kind: kind(WIDTH),
}


@pytest.mark.parametrize("path", TIMM)
def test_the_classes_of_timm_split_by_what_they_have(path: str) -> None:
    torch.manual_seed(0)
    model = net(TIMM[path](timm_class(path)))
    block = next(m for m in model.modules() if split_sizes(m))
    before = split_sizes(block)
    assert f"timm.{path}" in SPLITS
    small = slimmed(model)
    torch.testing.assert_close(small(X), model(X), rtol=1e-4, atol=1e-5)
    after = split_sizes(next(m for m in small.modules() if split_sizes(m)))
    assert all(torch.tensor(after[name]).sum() < torch.tensor(before[name]).sum() for name in before)


def test_every_class_of_timm_in_the_table_is_tried() -> None:
    assert {f"timm.{path}" for path in TIMM} == set(SPLITS)
