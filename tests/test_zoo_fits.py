"""The benchmark of short fits: what it measures, on small networks and without the packages of its models."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
PUBLISHED = ROOT / "benchmarks" / "results" / "zoo_fits.json"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from zoo_parts import entries, fits, fits_page

    return SimpleNamespace(entries=entries, fits=fits, page=fits_page)


class Net(nn.Module):
    """Eight channels, four heads and 32 MLP units that can go."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.bn, self.mix = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 16, 1)
        self.layer, self.head = nn.TransformerEncoderLayer(16, 4, 32, dropout=0.0, batch_first=True), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.mix(self.bn(self.stem(x)).relu())
        return self.head(self.layer(x.flatten(2).transpose(1, 2)).mean(1))


def entry(parts: Any) -> Any:
    torch.manual_seed(0)
    model = Net().eval()
    parts.entries.shake(model)
    found = parts.entries.Entry(model, parts.entries.images(6), ("head",))
    parts.entries.settle(found)
    return found


@pytest.mark.parametrize("side", ["smcp", "pruning", "l0"])
def test_a_fit_is_slimmed_saved_loaded_and_exported(parts: Any, side: str) -> None:
    for module in ("onnx", "onnxscript", "onnxruntime", "safetensors"):
        pytest.importorskip(module)
    [(name, row)] = parts.fits.fits(lambda: entry(parts), [side])
    assert name == side
    assert row.get("right"), row
    assert row["parameters"][1] < row["parameters"][0]
    assert {kind: every for kind, (_, every) in row["units"].items()} == {"channels": 8, "MLP units": 32, "heads": 4}
    assert sum(gone for gone, _ in row["units"].values()) > 0
    assert (row["batch"], row["loaded"], row["foreign"]) == (3, 0, 0)
    text = parts.page.text(
        [{"name": "net", "smcp": row, "pruning": row, "l0": {"failed": "it does not run"}}], "Written by hand."
    )
    assert f"{row['parameters'][0]:,} | {row['parameters'][1]:,}" in text
    assert "- net, l0: it does not run" in text


def test_a_fit_that_fails_says_why(parts: Any) -> None:
    def make() -> Any:
        raise ValueError("there is no such model")

    [(_, row)] = parts.fits.fits(make, ["smcp"])
    assert row["failed"] == "ValueError: there is no such model"


def test_files_of_another_network_are_apart(parts: Any) -> None:
    one, other = entry(parts), entry(parts)
    assert parts.fits.apart(one.model, other.model, one) == 0
    with torch.no_grad():
        other.model.head.bias.add_(1)
    assert parts.fits.apart(one.model, other.model, one) > 0.01


@pytest.mark.skipif(not PUBLISHED.exists(), reason="no results are published")
def test_the_published_fits_are_right_and_remove_something(parts: Any) -> None:
    rows = json.loads(PUBLISHED.read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        for side in parts.fits.SIDES:
            found = row[side]
            assert found["right"], (row["name"], side)
            assert found["parameters"][1] < 0.9 * found["parameters"][0], (row["name"], side)
