"""Compact checkpoints of networks that lost attention heads, and files of earlier releases for networks with attention."""

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks import SlimAttention, load_compact, save_compact
from sparse_callbacks.channels.attention_exchange import put_back_attention, put_slim_attention
from sparse_callbacks.channels.attention_heads import update_heads


class _Known(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.attn_dim = 3, 4, 12
        self.qkv, self.proj = nn.Linear(8, 36), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).reshape(*x.shape[:2], 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        out = nn.functional.scaled_dot_product_attention(q, k, v)
        return self.proj(out.transpose(1, 2).reshape(*x.shape[:2], self.attn_dim))


_Known.__module__, _Known.__qualname__ = "timm.layers.attention", "Attention"


class _Conv1D(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.nx, self.nf = 8, 6
        self.weight, self.bias = nn.Parameter(torch.randn(8, 6)), nn.Parameter(torch.randn(6))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x.view(-1, x.size(-1)), self.weight).view(*x.shape[:-1], self.nf)


_Conv1D.__module__, _Conv1D.__qualname__ = "transformers.pytorch_utils", "Conv1D"


class Net(nn.Module):
    """Three attentions over embedded tokens; the attention of torch is called in two ways."""

    def __init__(self, tokens: int = 7) -> None:
        super().__init__()
        self.embed, self.known = nn.Embedding(tokens, 8), _Known()
        self.torchs = nn.MultiheadAttention(8, 2, batch_first=True)
        self.cross = nn.MultiheadAttention(8, 4, kdim=5, vdim=6, add_bias_kv=True, batch_first=True)
        self.conv = _Conv1D()

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.known(x)
        x = x + self.torchs(x, x, x, need_weights=False)[0]
        return self.conv(x + self.cross(x, x[..., :5], x[..., :6])[0])


def keep(layer: nn.Module, name: str, dim: int, index: list[int] | Tensor) -> None:
    old = layer.get_parameter(name)
    layer.register_parameter(name, nn.Parameter(old.detach().index_select(dim, torch.as_tensor(index))))


def smaller(net: Net) -> Net:
    """Without the last head of each attention, and with one channel of the last layer less."""
    put_slim_attention(net)
    keep(net.known.qkv, "weight", 0, torch.arange(36).view(3, 12)[:, :8].flatten())
    keep(net.known.qkv, "bias", 0, torch.arange(36).view(3, 12)[:, :8].flatten())
    keep(net.known.proj, "weight", 1, torch.arange(8))
    net.known.qkv.out_features, net.known.proj.in_features = 24, 8
    update_heads(net.known)
    for name in ("q_proj_weight", "k_proj_weight", "v_proj_weight"):
        keep(net.cross, name, 0, torch.arange(6))
    keep(net.cross, "in_proj_bias", 0, torch.arange(24).view(3, 8)[:, :6].flatten())
    keep(net.cross, "bias_k", 2, torch.arange(6))
    keep(net.cross, "bias_v", 2, torch.arange(6))
    keep(net.cross.out_proj, "weight", 1, torch.arange(6))
    net.cross.out_proj.in_features = 6
    keep(net.conv, "weight", 1, torch.arange(5))
    keep(net.conv, "bias", 0, torch.arange(5))
    net.conv.nf = 5
    put_back_attention(net)
    return net.eval()


TOKENS = torch.tensor([[1, 5, 3, 2], [0, 6, 6, 4]])


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_network_that_lost_heads_loads_onto_the_original_class(device: str, tmp_path: Path) -> None:
    small = smaller(Net())
    save_compact(small, tmp_path / "small.safetensors")
    description = json.loads((tmp_path / "small.json").read_text())
    assert description["version"] == 3
    assert description["layers"]["cross"]["heads"] == {"num_heads": 3, "head_dim": 2}
    with torch.device(device):
        fresh = Net()
    again = load_compact(fresh.eval(), tmp_path / "small.safetensors")
    assert torch.equal(again(TOKENS), small(TOKENS))
    assert type(again.torchs) is nn.MultiheadAttention
    assert (type(again.cross), again.cross.num_heads) == (SlimAttention, 3)
    assert (again.known.num_heads, again.known.attn_dim, again.conv.nf) == (2, 8, 5)
    # and again, onto a network that has lost them already
    assert torch.equal(load_compact(smaller(Net()), tmp_path / "small.safetensors")(TOKENS), small(TOKENS))


def test_an_attention_may_be_the_whole_network(tmp_path: Path) -> None:
    slim = SlimAttention(8, 3, head_dim=2)
    save_compact(slim, tmp_path / "slim.safetensors")
    again = load_compact(nn.MultiheadAttention(8, 4), tmp_path / "slim.safetensors")
    x = torch.randn(3, 2, 8)
    assert torch.equal(again(x, x, x)[0], slim(x, x, x)[0])


def changed(path: Path, change: Callable[[dict], None]) -> None:
    description = json.loads(path.with_suffix(".json").read_text())
    change(description)
    path.with_suffix(".json").write_text(json.dumps(description))


def as_before(description: dict) -> None:
    """As releases before heads were cut wrote it."""
    description["version"] = 1
    for layer in description["layers"].values():
        for key in ("heads", "embedding_dim", "nx", "nf"):
            layer.pop(key, None)


def test_a_file_of_an_earlier_release_loads(tmp_path: Path) -> None:
    net = Net().eval()
    save_compact(net, tmp_path / "old.safetensors")
    changed(tmp_path / "old", as_before)
    again = load_compact(Net().eval(), tmp_path / "old.safetensors")
    assert torch.equal(again(TOKENS), net(TOKENS))
    assert type(again.cross) is nn.MultiheadAttention
    with pytest.raises(ValueError, match=r"embed.weight has shape \[9, 8\] here and \[7, 8\] there"):
        load_compact(Net(9), tmp_path / "old.safetensors")


def test_what_holds_neither_heads_nor_conv1d_is_written_as_before(tmp_path: Path) -> None:
    save_compact(nn.Sequential(nn.Embedding(3, 4), nn.Linear(4, 2)), tmp_path / "plain.safetensors")
    assert json.loads((tmp_path / "plain.json").read_text())["version"] == 1


def test_tables_of_one_width_load_and_of_another_length_are_refused(tmp_path: Path) -> None:
    table = nn.Embedding(7, 4)
    keep(table, "weight", 1, [0, 2])
    table.embedding_dim = 2
    model = nn.ModuleList([table, table])  # under two names
    save_compact(model, tmp_path / "table.safetensors")
    original = nn.Embedding(7, 4)
    again = load_compact(nn.ModuleList([original, original]), tmp_path / "table.safetensors")
    assert again[1](torch.tensor(3)).tolist() == table(torch.tensor(3)).tolist()
    assert again[0].embedding_dim == 2
    other = nn.Embedding(9, 4)
    with pytest.raises(ValueError, match=r"0.weight has shape \[9, 4\] here and \[7, 2\] there"):
        load_compact(nn.ModuleList([other, other]), tmp_path / "table.safetensors")


def test_heads_that_are_not_those_of_the_weights_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "small"
    small, fresh = smaller(Net()), Net()
    before = copy.deepcopy(fresh.state_dict())
    for layer, attribute, message in [
        ("known", "num_heads", "num_heads of 'known' is 9 there, where its weights mean 2"),
        ("cross", "num_heads", "num_heads of 'cross' is 9 there, where its weights mean 3"),
        ("cross", "head_dim", "head_dim of 'cross' is 9 there, where its weights mean 2"),
    ]:
        save_compact(small, path.with_suffix(".safetensors"))
        changed(path, lambda d, at=layer, key=attribute: d["layers"][at]["heads"].update({key: 9}))
        with pytest.raises(ValueError, match=message):
            load_compact(fresh, path.with_suffix(".safetensors"))
    save_compact(small, path.with_suffix(".safetensors"))
    changed(path, lambda d: d["layers"]["cross"].update({"heads": 3}))
    with pytest.raises(ValueError, match="heads of 'cross' is 3 there"):
        load_compact(fresh, path.with_suffix(".safetensors"))
    keep(small.cross, "bias_k", 2, torch.arange(4))
    save_compact(small, path.with_suffix(".safetensors"))
    with pytest.raises(ValueError, match="num_heads of 'cross' is 3 there, where its weights mean not one number"):
        load_compact(fresh, path.with_suffix(".safetensors"))
    # a refused model stays as it is
    assert type(fresh.cross) is nn.MultiheadAttention
    assert all(torch.equal(before[n], t) for n, t in fresh.state_dict().items())
