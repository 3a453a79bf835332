"""Compact checkpoints: what is written loads onto the original class, and another model is refused."""

import copy
import json
from pathlib import Path

import pytest
import torch
from support.channel_nets import (
    IMAGE,
    NETS,
    dead_rows,
    half,
    made,
    masked,
    outputs,
)
from torch import Tensor, nn

from sparse_callbacks.channels import compact
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.testing.comparison import differences

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")


@pytest.mark.parametrize("name", [*NETS, "constant"])
def test_a_compact_checkpoint_loads_onto_the_original_class(name: str, tmp_path: Path) -> None:
    build = NETS.get(name, lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.Sigmoid(), nn.Conv2d(8, 4, 3, bias=False)))
    net, x = made(build), torch.randn(IMAGE)
    masks = (
        half(net, [g for g in channel_groups(net, x) if not g.reason])
        if name in NETS
        else {"0.weight": dead_rows(4, 8)}
    )
    small, _ = slim(net, masks, x)
    compact.save_compact(small, tmp_path / "small.safetensors")
    torch.serialization.clear_safe_globals()
    fresh = build()
    fresh.requires_grad_(False)
    again = compact.load_compact(fresh, tmp_path / "small.safetensors")
    assert again is fresh
    assert torch.equal(outputs(again, x), outputs(small, x))
    assert differences(again.state_dict(), small.state_dict()) == []
    assert [str(m) for m in again.modules() if not list(m.children())] == [
        str(m) for m in small.modules() if not list(m.children())
    ]
    description = json.loads((tmp_path / "small.json").read_text())
    assert description["version"] == 1
    with torch.device("meta"):
        elsewhere = build()
    if name not in ("scaled",):  # a parameter of its own is made from random numbers, which meta tensors do not hold
        assert torch.equal(
            outputs(compact.load_compact(elsewhere, tmp_path / "small.safetensors"), x), outputs(small, x)
        )


def test_tied_weights_stay_tied_on_disk(tmp_path: Path) -> None:
    def build() -> nn.Module:
        net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
        net[2].weight = net[0].weight
        return net

    net = build()
    compact.save_compact(net, tmp_path / "tied.safetensors")
    again = compact.load_compact(build(), tmp_path / "tied.safetensors")
    assert again[0].weight is again[2].weight
    assert torch.equal(again[0].weight, net[0].weight)
    for first, last in ((net, net[2]), (net[2], net)):  # one of the two has another name besides
        compact.save_compact(nn.ModuleList([first, last]), tmp_path / "tied.safetensors")
        fresh = build()
        twice = nn.ModuleList([fresh, fresh[2]] if first is net else [fresh[2], fresh])
        assert compact.load_compact(twice, tmp_path / "tied.safetensors") is twice
        assert fresh[0].weight is fresh[2].weight


def stacked(*layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(*layers)


class Other(nn.Sequential):
    """The same layers under another class."""


def conv(into: int = 4, out: int = 4, kernel: int = 3, **options: object) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, **options)


def two_linear(is_tied: bool) -> nn.Module:
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    if is_tied:
        net[1].weight = net[0].weight
    return net


@pytest.mark.parametrize(
    ("saved", "model", "difference"),
    [
        (nn.Linear(4, 4), nn.Conv2d(4, 4, 1), "it is Conv2d here and Linear there"),
        (stacked(nn.Linear(4, 4)), Other(nn.Linear(4, 4)), "it is Other here and Sequential there"),
        (stacked(nn.Linear(4, 4)), stacked(nn.Conv2d(4, 4, 1)), "'0' is Conv2d here and Linear there"),
        (stacked(nn.Linear(4, 4), nn.ReLU()), stacked(nn.Linear(4, 4), nn.Tanh()), "'1' is Tanh here and ReLU there"),
        (stacked(nn.Linear(4, 4)), stacked(nn.Linear(4, 4), nn.ReLU()), "'1' is ReLU here and missing there"),
        (nn.LayerNorm(4, bias=False), nn.LayerNorm(4), "bias is missing there"),
        (nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False), "bias is too many there"),
        (two_linear(False), two_linear(True), "1.weight and 0.weight are one parameter here and two there"),
        (two_linear(True), two_linear(False), "1.weight and 0.weight are one parameter there and two here"),
        (conv(kernel=3), conv(kernel=5), r"kernel_size of '' is \[5, 5\] here and \[3, 3\] there"),
        (conv(stride=2), conv(), r"stride of '' is \[1, 1\] here and \[2, 2\] there"),
        (conv(padding=1), conv(padding="same"), r"padding of '' is same here and \[1, 1\] there"),
        (conv(dilation=2), conv(), r"dilation of '' is \[1, 1\] here and \[2, 2\] there"),
        (conv(padding_mode="reflect"), conv(), "padding_mode of '' is zeros here and reflect there"),
        (conv(out=8), conv(), r"weight has shape \[4, 4, 3, 3\] here and \[8, 4, 3, 3\] there"),
        (nn.Embedding(3, 2), nn.Embedding(5, 2), r"weight has shape \[5, 2\] here and \[3, 2\] there"),
    ],
)
def test_a_checkpoint_of_another_model_is_refused(
    saved: nn.Module, model: nn.Module, difference: str, tmp_path: Path
) -> None:
    before = copy.deepcopy(model.state_dict())
    compact.save_compact(saved, tmp_path / "small.safetensors")
    with pytest.raises(
        ValueError,
        match=rf"is of another model: {difference}. Give an instance of {type(saved).__name__}, made with the",
    ):
        compact.load_compact(model, tmp_path / "small.safetensors")
    assert differences(before, model.state_dict()) == []


@pytest.mark.parametrize(
    ("attribute", "value", "difference"),
    [
        ("out_channels", 7, r"weight has shape \[4, 4, 3, 3\] there, where the sizes beside it mean \[7, 4, 3, 3\]"),
        ("groups", 4, r"weight has shape \[4, 4, 3, 3\] there, where the sizes beside it mean \[4, 1, 3, 3\]"),
        ("groups", 0, "groups of '' is 0 there"),
        ("in_channels", None, "in_channels of '' is None there"),
    ],
)
def test_sizes_that_are_not_those_of_the_tensors_are_refused(
    attribute: str, value: object, difference: str, tmp_path: Path
) -> None:
    path = tmp_path / "small.safetensors"
    compact.save_compact(conv(), path)
    description = json.loads(path.with_suffix(".json").read_text())
    description["layers"][""][attribute] = value
    path.with_suffix(".json").write_text(json.dumps(description))
    with pytest.raises(ValueError, match=f"is of another model: {difference}"):
        compact.load_compact(conv(), path)


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"version": 1}', '{"version": 1, "class": "Linear", "layers": {"": 3}, "shared": {}}']
)
def test_a_description_that_is_none_is_refused(text: str, tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    compact.save_compact(nn.Linear(4, 4), path)
    path.with_suffix(".json").write_text(text)
    with pytest.raises(
        ValueError, match=r"small.safetensors and small.json are not a compact checkpoint .* Write them anew"
    ):
        compact.load_compact(nn.Linear(4, 4), path)


def test_files_that_are_none_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small.safetensors"
    with pytest.raises(
        FileNotFoundError, match=r"There is no file .*small.safetensors. A compact checkpoint is two files, 'small.saf"
    ):
        compact.load_compact(nn.Linear(4, 4), path)
    compact.save_compact(nn.Linear(4, 4), path)
    path.write_bytes(path.read_bytes()[:9])
    with pytest.raises(ValueError, match="are not a compact checkpoint of this library"):
        compact.load_compact(nn.Linear(4, 4), path)
    path.with_suffix(".json").write_text('{"version": 9}')
    compact.save_compact(nn.Linear(4, 4), tmp_path / "whole")
    (tmp_path / "whole.json").write_text('{"version": 9}')
    with pytest.raises(ValueError, match="is of version 9, and this release reads versions 1, 2, 3"):
        compact.load_compact(nn.Linear(4, 4), tmp_path / "whole")
    with pytest.raises(FileNotFoundError, match=r"There is no folder .*nowhere to write small.safetensors to"):
        compact.save_compact(nn.Linear(4, 4), tmp_path / "nowhere" / "small.safetensors")


def test_every_name_has_a_description_of_its_own(tmp_path: Path) -> None:
    nets = {
        name: nn.Linear(4, size) for size, name in enumerate(["net-0.5", "net-0.3", "net.st", "net.safetensors"], 1)
    }
    for name, net in nets.items():
        compact.save_compact(net, tmp_path / name)
    for name, net in nets.items():
        assert torch.equal(compact.load_compact(nn.Linear(4, 9), tmp_path / name).weight, net.weight)
    with pytest.raises(ValueError, match=r"net.json would hold the tensors, and .json is for"):
        compact.save_compact(nn.Linear(4, 4), tmp_path / "net.json")


class Talkative(nn.Linear):
    def get_extra_state(self) -> str:
        return "a word"

    def set_extra_state(self, state: str) -> None: ...


def test_what_is_no_tensor_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"_extra_state in the state dict is not a tensor, and a compact checkpoint holds tensors only"
    ):
        compact.save_compact(Talkative(2, 2), tmp_path / "x.safetensors")


class Aliased(nn.Module):
    """Every norm has two names, and one convolution too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.norms = nn.ModuleList([nn.BatchNorm2d(8) for _ in range(3)])
        self.one, self.two, self.three = self.norms
        self.again = self.last

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for norm in self.norms:
            x = norm(x).relu()
        return self.again(x)


def test_modules_with_two_names_are_cut_once_and_loaded_as_they_were(tmp_path: Path) -> None:
    net, x = made(Aliased), torch.randn(IMAGE)
    mask = (torch.arange(8) % 2 == 0).view(1, 8, 1, 1)
    small, _ = slim(net, {"again.weight": mask}, x)
    assert small.first.out_channels == small.one.num_features == small.last.in_channels == 4
    torch.testing.assert_close(outputs(small, x), outputs(masked(net, {"last.weight": mask}), x))
    for model in (net, small):
        compact.save_compact(model, tmp_path / "aliased.safetensors")
        again = compact.load_compact(Aliased().eval(), tmp_path / "aliased.safetensors")
        assert differences(again.state_dict(), model.state_dict()) == []
        assert torch.equal(outputs(again, x), outputs(model, x))
