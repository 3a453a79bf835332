"""2:4 in a GPU's own form: what is packed comes back, who stays dense and why, and the exchange with stand-ins for a GPU."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass,
    sparse_semi_structured_to_dense_cutlass,
)

from sparse_callbacks import SparseLinear, convert, to_semi_structured
from sparse_callbacks.core.conversion import semi_structured
from sparse_callbacks.core.nm_masks import in_groups, nm_mask

ROOT = Path(__file__).parents[2]


def two_of_four(inputs: int, outputs: int, dtype: torch.dtype = torch.bfloat16) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, dtype=dtype)
    with torch.no_grad():
        layer.weight.mul_(nm_mask(layer.weight.abs(), 2, 4))
    return layer


def test_weights_of_a_converted_network_are_packed_and_unpacked_exactly() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 96), nn.ReLU(), nn.Linear(96, 8)).eval()
    made, report = convert(network, "2:4", data=[torch.randn(256, 64)])
    assert list(report.masks) == ["2.weight"]
    weight = made.to(torch.bfloat16)[2].weight.detach()
    values, places = sparse_semi_structured_from_dense_cutlass(weight)
    assert values.shape == (96, 64)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(values, places), weight)


def test_groups_with_fewer_than_two_weights_are_packed_and_unpacked_exactly() -> None:
    torch.manual_seed(0)
    weight = torch.randn(64, 128, dtype=torch.bfloat16)
    weight *= nm_mask(weight.abs(), 2, 4) & (torch.rand(64, 128) < 0.6)
    assert {0, 1, 2} == set(in_groups(weight != 0, 4).sum(-1).flatten().tolist())
    packed = sparse_semi_structured_from_dense_cutlass(weight)
    assert torch.equal(sparse_semi_structured_to_dense_cutlass(*packed), weight)


class Odd(nn.Module):
    """A layer of each kind that stays, and two that need not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.live = nn.Conv1d(8, 8, 1), SparseLinear.random(64, 32, fan_in=4)
        self.attention = nn.MultiheadAttention(64, 2)
        self.full, self.narrow = nn.Linear(64, 32), nn.Linear(6, 32)
        self.single, self.one, self.other = two_of_four(64, 32, torch.float32), nn.Linear(64, 64), nn.Linear(64, 64)
        self.fast, self.slow = two_of_four(64, 128), two_of_four(64, 32)
        self.other.weight = self.one.weight
        for name in ("full", "narrow"):
            self.get_submodule(name).to(torch.bfloat16)


def test_on_a_cpu_all_layers_stay_and_the_table_says_why() -> None:
    module = nn.Sequential(nn.Conv1d(8, 8, 1), two_of_four(64, 32))
    made, table = to_semi_structured(module)
    assert {layer.name: layer.reason for layer in table.layers} == {
        "0.weight": "a convolution, for which torch has no 2:4 product",
        "1.weight": "on cpu: only GPUs of CUDA have 2:4 products",
    }
    assert table.compressed == []
    assert str(table).splitlines()[0] == "2:4 products: 0 of 2 layers, timed with 1024 rows"
    assert torch.equal(made[1].weight, module[1].weight)
    assert module[1].weight.requires_grad
    assert not made[1].weight.requires_grad


def test_an_old_gpu_has_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert semi_structured.why_not_on(torch.device("cuda")) == (
        "its GPU has compute capability 7.5, and 2:4 products come with 8.0"
    )
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert semi_structured.why_not_on(torch.device("cuda")) == ""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that counts as a GPU, whose compressed weights are twice their numbers, so that they can be told."""
    monkeypatch.setattr(semi_structured, "why_not_on", lambda device: "")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: 2 * weight)


def timed(times: Callable[[int], tuple[float, float]]) -> Callable[..., list[float]]:
    def milliseconds(calls: Sequence[Callable[[], Tensor]], readings: int, devices: Any, **more: Any) -> list[float]:
        dense, compressed = (call() for call in calls)
        assert dense.shape == compressed.shape == (48, dense.shape[1])
        return list(times(dense.shape[1]))

    return milliseconds


@pytest.mark.usefixtures("gpu")
def test_layers_of_two_of_four_are_compressed_where_that_is_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(semi_structured, "milliseconds", timed(lambda n: (1.0, 0.85 if n == 128 else 0.95)))
    module = Odd()
    made, table = to_semi_structured(module, rows=48)
    assert table.compressed == ["fast.weight"]
    full = "not 2:4: 512 of 512 groups have more than two weights"
    assert {layer.name: layer.reason for layer in table.layers if layer.reason} == {
        "conv.weight": "a convolution, for which torch has no 2:4 product",
        "live.weight": "a SparseLinear, which may compute otherwise than nn.Linear",
        "attention.out_proj.weight": "a NonDynamicallyQuantizableLinear, which may compute otherwise than nn.Linear",
        "full.weight": full,
        "narrow.weight": "6 inputs do not divide into groups of 4",
        "single.weight": "float32: 2:4 products are of float16 and bfloat16, which module.to(torch.bfloat16) makes it",
        "one.weight": "tied: several modules have this weight",
        "slow.weight": "its 2:4 product is not faster by a tenth",
    }
    assert torch.equal(made.fast.weight, 2 * module.fast.weight)
    assert torch.equal(made.slow.weight, module.slow.weight)
    row = next(layer for layer in table.layers if layer.name == "slow.weight")
    assert (row.dense, row.compressed) == (1.0, 0.95)
    line = next(line for line in str(table).splitlines() if line.startswith("fast.weight"))
    assert line.split() == ["fast.weight", "128x64", "1.0000", "0.8500"]


@pytest.mark.usefixtures("gpu")
def test_a_layer_that_torch_refuses_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    def refusing(weight: Tensor) -> Tensor:
        raise RuntimeError("Error original_tensor.shape is not supported!\nmore")

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", refusing)
    _, table = to_semi_structured(nn.Sequential(two_of_four(64, 32)), rows=48)
    assert table.layers[0].reason == "torch cannot compress it: Error original_tensor.shape is not supported!"


@pytest.mark.usefixtures("gpu")
def test_layers_inside_of_a_block_that_torch_computes_at_once_stay() -> None:
    block = nn.TransformerEncoderLayer(64, 2, 128, dtype=torch.bfloat16)
    _, table = to_semi_structured(block, rows=48)
    assert {layer.reason for layer in table.layers if "linear" in layer.name} == {
        "inside of a TransformerEncoderLayer, whose kernel reads the dense weight"
    }


def test_no_rows_are_refused() -> None:
    with pytest.raises(ValueError, match=r"rows=0 is no batch that could be timed. Give the rows"):
        to_semi_structured(nn.Linear(4, 4), rows=0)


def test_the_gpu_script_says_what_it_needs_and_runs_with_a_stand_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import semi_structured_gpu

    with pytest.raises(SystemExit):
        semi_structured_gpu.main(["--device", "cpu"])
    assert (
        "--device cpu cannot be used here (on cpu: only GPUs of CUDA have 2:4 products). Run this on"
        in capsys.readouterr().err
    )
    monkeypatch.setattr(semi_structured_gpu, "why_not_on", lambda device: "")
    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())
    sizes = ["--widths", "64", "--rows", "8", "--images", "1", "--block-width", "64", "--rounds", "1", "--steps", "1"]
    semi_structured_gpu.main(["--device", "cpu", *sizes, "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert text.count("| 64 |") == 2
    assert "| step |" in text


def test_the_scripts_product_has_the_gradients_of_a_masked_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import semi_structured_gpu

    monkeypatch.setattr(torch.sparse, "to_sparse_semi_structured", lambda weight: weight.clone())
    torch.manual_seed(0)
    layer, x = (
        semi_structured_gpu.SparseLayer(16, 8).double(),
        torch.randn(3, 5, 16, dtype=torch.float64, requires_grad=True),
    )
    out = torch.randn(3, 5, 8, dtype=torch.float64)
    masked = (layer.weight * layer.mask).detach().requires_grad_()
    found = torch.autograd.grad(layer(x), [x, layer.weight], out)
    expected = torch.autograd.grad(nn.functional.linear(x, masked), [x, masked], out)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
