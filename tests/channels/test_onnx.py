"""ONNX: the file computes the same, takes any batch where it can, and says what it cannot."""

import re
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.channel_nets import IMAGE, NETS, Residual, half, made
from torch import Tensor, nn

from sparse_callbacks.channels import compact
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.onnx import export_onnx
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.core.inspection import tensors_in

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")


@pytest.mark.parametrize("name", ["residual", "grouped"])
def test_onnxruntime_computes_the_same(name: str, tmp_path: Path) -> None:
    net, x = made(NETS[name]).train(), torch.randn(IMAGE)
    small, _ = slim(net, half(net, [g for g in channel_groups(net, x) if not g.reason]), x)
    difference = export_onnx(small, tmp_path / "small.onnx", x)
    assert difference.relative < 1e-5
    assert small.training
    assert [p.name for p in tmp_path.iterdir()] == ["small.onnx"]
    with pytest.raises(ValueError, match=r"onnxruntime computes something else from .*tolerance=-1 is allowed"):
        export_onnx(small, tmp_path / "small.onnx", {"input" if name == "grouped" else "x": x}, tolerance=-1)


def shapes(path: Path) -> list[object]:
    return [slot.shape for slot in onnxruntime().InferenceSession(str(path)).get_inputs()]


def onnxruntime() -> Any:
    return pytest.importorskip("onnxruntime")


class Mapped(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor, more: dict[str, Tensor], scale: float = 1.0) -> dict[str, Tensor]:
        return {"y": self.last(self.first(x).relu() + more["z"]) * scale}


@pytest.mark.parametrize(
    "example",
    [
        (torch.randn(1, 4), {"z": torch.randn(1, 6)}),
        {"more": {"z": torch.randn(3, 6)}, "x": torch.randn(3, 4), "scale": 2.0},
    ],
    ids=type,
)
def test_onnx_files_take_any_batch(example: Any, tmp_path: Path) -> None:
    net, path = Mapped(), tmp_path / "x.onnx"
    assert export_onnx(net, path, example).relative < 1e-5
    assert all(isinstance(shape[0], str) for shape in shapes(path))
    session, x, z = onnxruntime().InferenceSession(str(path)), torch.randn(7, 4), torch.randn(7, 6)
    fed = {slot.name: (x if slot.shape[1] == 4 else z).numpy() for slot in session.get_inputs()}
    expected = net(x, {"z": z}, *([2.0] if isinstance(example, dict) else []))["y"]
    torch.testing.assert_close(torch.from_numpy(session.run(None, fed)[0]), expected.detach(), rtol=1e-4, atol=1e-5)
    export_onnx(net, path, example, dynamic_batch=False)
    assert shapes(path)[0][0] in (1, 3)


class HandsOn(nn.Module):
    """A wrapper that takes whatever its network takes."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.net(*args, **kwargs)


class ByName(HandsOn):
    """The same with named arguments alone."""

    def forward(self, **kwargs: Any) -> Any:
        return self.net(**kwargs)


class Handing(pl.LightningModule):
    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return self.net(x, *args, **kwargs)


NESTED = torch.randn(2, 4), {"z": torch.randn(2, 6)}


@pytest.mark.parametrize(
    ("wrap", "example"),
    [
        (HandsOn, NESTED),
        (lambda net: HandsOn(HandsOn(net)), NESTED),
        (lambda net: HandsOn(ByName(net)), {"more": NESTED[1], "scale": 2.0, "x": NESTED[0]}),
        (ByName, {"x": NESTED[0], "more": NESTED[1]}),
        (Handing, NESTED),
        (lambda net: Handing(HandsOn(net)), {"more": NESTED[1], "x": NESTED[0]}),
    ],
    ids=["args", "twice", "names_in_args", "names", "module", "module_by_name"],
)
@pytest.mark.filterwarnings("error:.*takes batches of the size of example_input only")
def test_wrappers_that_hand_on_their_arguments_take_any_batch(
    wrap: Callable[[nn.Module], nn.Module], example: Any, tmp_path: Path
) -> None:
    net, path = Mapped(), tmp_path / "x.onnx"
    assert export_onnx(wrap(net), path, example).relative < 1e-5
    assert all(isinstance(shape[0], str) for shape in shapes(path))


class Fixed(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * torch.arange(8.0).view(2, 4)


class Decides(nn.Module):
    """Which branch runs depends on the data, which a graph cannot hold; a batch of two is left as it is."""

    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) == 2 or float(x.sum()) > 0 else -x


class Unknown(nn.Module):
    """An operation that the exporter has no translation for, unless the batch is of two."""

    def forward(self, x: Tensor) -> Tensor:
        return x if len(x) == 2 else torch.linalg.eigvalsh(x)


@pytest.mark.parametrize(
    ("net", "example", "reason"),
    [
        (Fixed(), torch.randn(2, 4), "With another size: RuntimeError: The size of tensor a"),
        (Decides(), torch.randn(2, 4), "With another size: GuardOnDataDependentSymNode: Could not"),
        (Unknown(), torch.randn(2, 4, 4), "With another size: DispatchError: No ONNX function found for .*eigh"),
        (nn.Bilinear(4, 3, 2), (torch.randn(1, 4), torch.randn(1, 3)), ""),
        (
            Mapped(),
            (torch.randn(4), {"z": torch.randn(6)}),
            r"the inputs have no common size of dimension 0, but \[4, 6\]",
        ),
    ],
    ids=["fixed", "decides", "unknown", "bilinear", "vector"],
)
def test_onnx_files_of_one_batch_size_come_with_a_warning(
    net: nn.Module, example: Any, reason: str, tmp_path: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert export_onnx(net, tmp_path / "x.onnx", example).relative < 1e-5
    told = [str(w.message) for w in caught if "takes batches of the size of example_input only" in str(w.message)]
    assert bool(told) == bool(reason)
    if reason:
        assert re.search(reason, told[0])
        assert "\x1b" not in told[0]
        assert "\n" not in told[0]
        assert len(shapes(tmp_path / "x.onnx")) == len(tensors_in(example))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.filterwarnings("ignore")
def test_types_that_onnxruntime_lacks_are_named(dtype: torch.dtype, tmp_path: Path) -> None:
    net = nn.Conv2d(3, 4, 3).to(dtype)
    with pytest.raises(
        ValueError, match=r"onnxruntime cannot run .*x.onnx .* give the model and example_input in float32"
    ):
        export_onnx(net, tmp_path / "x.onnx", torch.randn(IMAGE, dtype=dtype))


def test_half_precision_has_a_tolerance_of_its_own(tmp_path: Path) -> None:
    net, x = made(Residual).half(), torch.randn(IMAGE).half()
    assert 1e-4 < export_onnx(net, tmp_path / "x.onnx", x).relative < 5e-2
    with pytest.raises(ValueError, match="tolerance=1e-06 is allowed"):
        export_onnx(net, tmp_path / "x.onnx", x, tolerance=1e-6)


@pytest.mark.parametrize(
    ("module", "name"), [("safetensors.torch", "channels"), ("onnxscript", "onnx"), ("onnxruntime", "onnx")]
)
def test_without_the_extra_the_error_names_it(
    module: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    write = compact.save_compact if name == "channels" else lambda net, path: export_onnx(net, path, torch.zeros(1, 2))
    with pytest.raises(ImportError, match=rf"pip install 'sparse-callbacks\[{name}\]'"):
        write(nn.Linear(2, 2), tmp_path / "x")


def test_a_model_that_has_no_graph_says_so_first(tmp_path: Path) -> None:
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate, self.experts = nn.Linear(6, 2), nn.ModuleList(nn.Linear(6, 3) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            chosen, y = self.gate(x).argmax(1), x.new_zeros(len(x), 3)
            for number, expert in enumerate(self.experts):
                rows = (chosen == number).nonzero()[:, 0]
                if len(rows) > 1:
                    y = y.index_add(0, rows, expert(x[rows]))
            return y

    with pytest.raises(ValueError, match=r"^Experts cannot be exported to ONNX \(.*data-dependent") as caught:
        export_onnx(Experts().eval(), tmp_path / "net.onnx", torch.randn(9, 6), dynamic_batch=False)
    assert len(str(caught.value)) < 800
    assert len(str(caught.value).splitlines()) == 1
