"""Truly sparse layers in ONNX: groups as Gather and MatMul, at the size of their live weights, the others dense."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support.nets import mlp
from torch import Tensor, nn

from sparse_callbacks import SparseLinear, convert, export_onnx, to_inference

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def net(storage: str, width: int = 16, fan_in: int = 4) -> nn.Sequential:
    torch.manual_seed(0)
    layers = [SparseLinear.random(width, width, fan_in, storage=storage, group=8), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(width, 3))


def operations(path: Path) -> list[str]:
    model = onnx.load(str(path))
    onnx.checker.check_model(model, full_check=True)
    return [node.op_type for node in model.graph.node]


def computed(path: Path, x: Tensor) -> Tensor:
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def test_groups_are_written_as_gather_and_matmul_for_batches_of_any_size(tmp_path: Path) -> None:
    module, path = net("grouped"), tmp_path / "net.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        assert export_onnx(module, path, torch.randn(3, 16)).relative < 1e-5
    found = operations(path)
    assert {"Gather", "MatMul"} <= set(found)
    assert not {"Loop", "Scan", "If"} & set(found)
    for rows in (1, 7, 200):
        x = torch.randn(rows, 16)
        torch.testing.assert_close(computed(path, x), module(x).detach(), atol=1e-5, rtol=0)


def test_a_file_of_groups_is_about_a_tenth_of_a_dense_one_at_ninety_percent(tmp_path: Path) -> None:
    sizes = []
    for module in (nn.Linear(640, 640), SparseLinear.random(640, 640, 64, storage="grouped")):
        export_onnx(nn.Sequential(module), tmp_path / "net.onnx", torch.randn(2, 640))
        sizes.append((tmp_path / "net.onnx").stat().st_size)
    assert sizes[1] < 0.12 * sizes[0]


def test_sequences_of_groups_are_written(tmp_path: Path) -> None:
    module, path, x = net("grouped"), tmp_path / "net.onnx", torch.randn(2, 5, 16)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # of a fixed size of the batch
        export_onnx(module, path, x)
    x = torch.randn(7, 5, 16)
    torch.testing.assert_close(computed(path, x), module(x).detach(), atol=1e-5, rtol=0)


def test_unstructured_layers_are_written_dense_and_the_words_say_why(tmp_path: Path) -> None:
    module, path, x = net("sparse"), tmp_path / "net.onnx", torch.randn(2, 16)
    with pytest.warns(UserWarning, match=r"net.onnx holds 0 as dense matrices with zeros, as ONNX has no product"):
        export_onnx(module, path, x)
    assert set(operations(path)) <= {"Gemm", "MatMul", "Add", "Relu"}
    torch.testing.assert_close(computed(path, x), module(x).detach(), atol=1e-5, rtol=0)
    assert type(module[0]) is SparseLinear
    assert module.training


def test_a_layer_alone_is_written(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"holds the model as dense matrices"):
        export_onnx(SparseLinear.random(8, 6, 2), tmp_path / "layer.onnx", torch.randn(2, 8))


@pytest.mark.filterwarnings("ignore:.*as dense matrices:UserWarning")
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_networks_for_inference_are_written(storage: str, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(
        "sparse_callbacks.core.inference.milliseconds",
        lambda calls, *args, **words: [float(isinstance(call.func, nn.Linear)) for call in calls],
    )
    module, x = to_inference(net(storage)), torch.randn(2, 16)
    export_onnx(module, tmp_path / "net.onnx", x)
    torch.testing.assert_close(computed(tmp_path / "net.onnx", x), module(x), atol=1e-5, rtol=0)


def test_dense_networks_are_not_copied(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("sparse_callbacks.channels.onnx.copied", lambda model: pytest.fail("a copy is made"))
    export_onnx(mlp(4, 5, 3), tmp_path / "net.onnx", torch.randn(2, 4))


def test_a_file_of_a_converted_network_has_its_zeros(tmp_path: Path) -> None:
    """Also where the exporter folds a norm into the convolution in front of it, which scales whole filters."""
    torch.manual_seed(0)
    convolutions = [
        nn.Conv2d(3, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
    ]
    network = nn.Sequential(*convolutions, nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    x = torch.randn(64, 3, 6, 6)
    small, report = convert(network, "2:4", data=[x])
    assert export_onnx(small, tmp_path / "net.onnx", x[:4]).relative < 1e-5
    written = [
        torch.from_numpy(onnx.numpy_helper.to_array(t).copy())
        for t in onnx.load(str(tmp_path / "net.onnx")).graph.initializer
    ]
    assert len(report.masks) == 2
    for mask in report.masks.values():
        same = [t for t in written if t.shape == mask.shape] + [
            t.T for t in written if t.ndim == 2 and t.T.shape == mask.shape
        ]
        assert any(torch.equal(t != 0, mask) for t in same)
