"""`slim` removes whole heads of ``nn.MultiheadAttention`` and puts a SlimAttention there; groups are given by hand."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import SlimAttention, load_compact, save_compact, slim
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.slim import slimmable_groups

pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")
slim_module = importlib.import_module("sparse_callbacks.channels.slim")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(16, 4, 8, batch_first=True, dropout=0.1)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=True)
        self.head = nn.Linear(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(x))


ATTENTION = "encoder.layers.0.self_attn"
UNITS = torch.arange(4).repeat_interleave(4)
GROUP = Group(
    ATTENTION,
    4,
    tuple(Member(ATTENTION, f"{ATTENTION}.in_proj_{kind}", 0, "out", UNITS.repeat(3)) for kind in ("weight", "bias")),
    (Member(f"{ATTENTION}.out_proj", f"{ATTENTION}.out_proj.weight", 1, "in", UNITS),),
    (),
)
MASKS = {f"{ATTENTION}.out_proj.weight": (UNITS != 1).expand(16, 16)}
X = torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The models that groups are searched in; what is found is the heads of the first layer."""
    models: list[nn.Module] = []

    def groups(model: nn.Module, *_: Any) -> list[Group]:
        models.append(model)
        return [GROUP]

    monkeypatch.setattr(slim_module, "groups_of_copy", groups)
    return models


def test_a_masked_head_goes_and_the_others_stay(seen: list[nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Net().eval()
    calls: list[int] = []
    net.encoder.layers[0].self_attn.register_forward_hook(lambda *_: calls.append(1))
    small, proof = slim(net, MASKS, X)
    assert [type(layer.self_attn) for layer in net.encoder.layers] == [nn.MultiheadAttention] * 2
    assert [type(layer.self_attn) for layer in small.encoder.layers] == [SlimAttention, nn.MultiheadAttention]
    assert [(r.units, r.channels, r.reason) for r in proof.rows] == [(1, 12, "")]
    first = small.encoder.layers[0].self_attn
    assert (first.num_heads, first.out_proj.in_features) == (3, 12)
    with torch.no_grad():
        net.encoder.layers[0].self_attn.out_proj.weight[:, 4:8] = 0
        padding = torch.arange(5) >= torch.tensor([[5], [3]])
        for options in ({}, {"src_key_padding_mask": padding}):
            torch.testing.assert_close(small.encoder(X, **options), net.encoder(X, **options), rtol=1e-5, atol=1e-5)
    calls.clear()
    small(X)
    assert calls == [1]  # the hook moved along
    save_compact(small, tmp_path / "small.safetensors")
    again = load_compact(Net().eval(), tmp_path / "small.safetensors")
    assert torch.equal(again(X), small(X))


def test_without_replacing_modules_attention_is_searched_as_it_is(seen: list[nn.Module]) -> None:
    net = Net().eval()
    slim(net, {"head.weight": torch.ones(3, 16, dtype=torch.bool)}, X, replace_modules=False)
    slimmable_groups(net, X, replace_modules=False)
    slimmable_groups(net, X)
    kinds = [{type(m) for m in model.modules() if isinstance(m, nn.MultiheadAttention)} for model in seen]
    assert kinds == [{nn.MultiheadAttention}, {nn.MultiheadAttention}, {SlimAttention}]
    assert all(type(layer.self_attn) is nn.MultiheadAttention for layer in net.encoder.layers)


def test_heads_are_tried_out(seen: list[nn.Module]) -> None:
    assert [g.reason for g in slimmable_groups(Net().eval(), X)] == [""]
    # nn.MultiheadAttention cannot run without them
    assert slimmable_groups(Net().eval(), X, replace_modules=False)[0].reason != ""


class Mixed(nn.Module):
    def __init__(self, **arguments: bool) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(16, 16), nn.Linear(16, 3)
        self.attention = nn.MultiheadAttention(16, 4, batch_first=True, **arguments)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x + self.attention(x, x, x, need_weights=False)[0])


@pytest.mark.parametrize(
    ("arguments", "biases", "heads"),
    [
        ({}, False, 3),
        ({}, True, 3),  # the softmax sums to 1, so the bias of the values arrives as it is
        ({"bias": False}, False, 3),
        ({"add_zero_attn": True}, False, 3),
        # a bias has a share of the softmax that depends on the number of keys
        ({"add_zero_attn": True}, True, 4),
        ({"add_bias_kv": True}, False, 4),
    ],
)
def test_a_head_that_nothing_makes_goes(arguments: dict[str, bool], biases: bool, heads: int) -> None:
    torch.manual_seed(0)
    net = Mixed(**arguments).eval()
    mask = torch.ones(3, 4, 4, 16, dtype=torch.bool)
    mask[:, 1] = False
    mask = mask.flatten(0, 2)
    with torch.no_grad():
        net.attention.in_proj_weight.mul_(mask)
        if biases:
            net.attention.in_proj_bias.normal_()
    small, proof = slim(net, {"attention.in_proj_weight": mask}, torch.randn(2, 5, 16))
    assert small.attention.num_heads == heads
    reasons = [r.reason for r in proof.rows if "constant" in r.reason]
    assert len(reasons) == heads - 3
    assert all(r.startswith("1 units stay: what they hold is not a constant for all inputs and sizes") for r in reasons)
    for length in (5, 9):  # also of another length than those that it was slimmed on
        x = torch.randn(2, length, 16)
        torch.testing.assert_close(small(x), net(x))
