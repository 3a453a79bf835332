"""AllReLU: its table, its gradient, and that nothing of it is state."""

import copy
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_callbacks import AllReLU, export_onnx, slim

INPUTS, ALPHA = [-2.0, -0.5, 0.0, 1.5], 0.6
EXPECTED = {"even": [1.2, 0.3, 0.0, 1.5], "odd": [-1.2, -0.3, 0.0, 1.5]}


@pytest.mark.parametrize(("layer", "kind"), [(0, "even"), (1, "odd"), (2, "even"), (7, "odd")])
def test_the_table(layer: int, kind: str) -> None:
    made = AllReLU(ALPHA, layer=layer)
    assert made(torch.tensor(INPUTS)).tolist() == pytest.approx(EXPECTED[kind])
    assert made.slope == (-0.6 if kind == "even" else 0.6)
    assert AllReLU(layer=layer).alpha == ALPHA


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layer", [0, 1])
def test_the_gradient_is_the_slope(layer: int, dtype: torch.dtype) -> None:
    x = torch.tensor([[-2.0, -0.5], [0.25, 1.5]], dtype=dtype, requires_grad=True)
    AllReLU(0.25, layer=layer)(x).sum().backward()
    slope = 0.25 if layer else -0.25
    assert x.grad is not None
    assert x.grad.tolist() == [[slope, slope], [1.0, 1.0]]


def test_it_has_no_parameters_and_no_state() -> None:
    made = AllReLU(0.3, layer=2)
    assert not list(made.parameters())
    assert not list(made.buffers())
    assert made.state_dict() == {}
    assert repr(made) == "AllReLU(alpha=0.3, layer=2)"
    model = nn.Sequential(nn.Linear(3, 3), AllReLU(layer=0))
    model.load_state_dict(nn.Sequential(nn.Linear(3, 3), nn.ReLU()).state_dict())


def test_copies_and_files_compute_the_same() -> None:
    made, x = AllReLU(0.3, layer=1), torch.randn(5)
    buffer = io.BytesIO()
    torch.save(made, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(made), torch.load(buffer, weights_only=False)):
        assert torch.equal(other(x), made(x))
        assert repr(other) == repr(made)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), AllReLU(layer=0), nn.Linear(8, 8), AllReLU(layer=1), nn.Linear(8, 3))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles_in_one_graph_and_trains(backend: str) -> None:
    model, x = network(), torch.randn(4, 6)
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    assert torch.allclose(compiled(x), model(x))
    compiled(x).square().sum().backward()
    through = [p.grad.clone() for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    model(x).square().sum().backward()
    assert all(
        torch.allclose(a, p.grad) for a, p in zip(through, model.parameters(), strict=True) if p.grad is not None
    )
    assert len(through) == 6


def test_it_is_exported_to_onnx(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    assert export_onnx(network(), tmp_path / "net.onnx", torch.randn(4, 6)).relative < 1e-5


def test_dead_neurons_before_it_are_removed() -> None:
    model, x = network().eval(), torch.randn(4, 6)
    with torch.no_grad():
        model[0].weight[[1, 5]] = 0.0
        model[0].bias[1] = -1.0  # its output is a constant all the same: 0.6
    small, _ = slim(model, {"0.weight": model[0].weight != 0}, x)
    assert small[0].out_features == 6
    assert torch.allclose(small(x), model(x), atol=1e-6)


@pytest.mark.parametrize("layer", [-1, 0.5, True, "1", None], ids=repr)
def test_what_is_not_a_layer_is_refused(layer: Any) -> None:
    with pytest.raises(ValueError, match=r"layer=.* is not the number of a hidden layer. Give 0 for the first one"):
        AllReLU(layer=layer)


@pytest.mark.parametrize("alpha", [-0.1, float("nan"), float("inf"), True, "0.6", {"*": 0.6}], ids=repr)
def test_what_is_not_a_slope_is_refused(alpha: Any) -> None:
    with pytest.raises(ValueError, match=r"alpha=.* is not the magnitude of a slope"):
        AllReLU(alpha, layer=0)


def test_the_layer_is_asked_for_by_name() -> None:
    with pytest.raises(TypeError, match="layer"):
        AllReLU(0.6)  # type: ignore[call-arg]
