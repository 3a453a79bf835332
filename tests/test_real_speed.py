"""The benchmark of truly sparse storage: its runs, its tables, and that what is published is what was measured."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The modules of the benchmark."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    from real_speed_parts import layers, memory, networks, page, peers, report, steps, updates

    return SimpleNamespace(
        layers=layers, memory=memory, networks=networks, page=page, peers=peers, report=report, steps=steps, updates=updates
    )  # fmt: skip


@pytest.fixture
def tiny(parts: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a network that is quick to train; 32 rows read the same inputs in grouped storage."""
    networks = parts.networks
    network = networks.Network("tiny", lambda: networks.mlp(32, 64, 64), (8, 32), 2, 32, (0.5, 0.5))
    monkeypatch.setitem(networks.NETWORKS, "tiny", network)
    return "tiny"


# ---------------------------------------------------------------------- runs


def test_every_storage_and_the_dense_network_take_their_steps(parts: Any, tiny: str) -> None:
    rows = list(parts.steps.measure((tiny,), (0.9,), ("sgd", "adamw"), parts.networks.STORAGES, 1))
    labels = {row["storage"] for row in rows}
    assert labels - {parts.peers.PEER} == {"dense", *parts.networks.STORAGES}
    assert all(row["ms"][0] > 0 for row in rows)
    assert all(row["ratio"] == [1, 1, 1] for row in rows if row["storage"] == "dense")


def test_layers_are_of_the_storage_of_their_row(parts: Any, tiny: str) -> None:
    network = parts.networks.NETWORKS[tiny]
    for storage, name in (("masked", "Linear"), ("sparse", "SparseLinear"), ("grouped", "SparseLinear")):
        workload = network.workload("sgd")
        module = parts.networks.TrainedNet(workload)
        callback = parts.steps.callback_of(network, 0.9, storage, 2)
        list(parts.steps.lightning_run(workload, [2], module, callback))
        kinds = [type(layer).__name__ for layer in module.net if hasattr(layer, "in_features")]
        assert kinds == [name, name, "Linear"], storage


def test_memory_of_a_run_is_counted_in_a_process_of_its_own(parts: Any) -> None:
    row = next(parts.memory.measure(["mlp-1000"]))
    # weights, gradients and AdamW's two tensors of a dense network of 2.8 million weights
    assert row["steps"] > 4 * 4 * 2.7e6
    assert row["checkpoint"] > 3 * 4 * 2.7e6


def test_the_gpu_script_runs_on_a_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import real_speed_gpu

    sizes = ["--widths", "64", "--rows", "8", "--rounds", "1", "--steps", "1"]
    real_speed_gpu.main(["--device", "cpu", "--eager", *sizes, "--out", str(tmp_path / "gpu.md")])
    text = (tmp_path / "gpu.md").read_text()
    assert all(f"| 64 | {name} |" in text for name in ("Static", "SET", "RigL"))


# ---------------------------------------------------------------------- SET-MLP

STAND_IN = """
import numpy as np
from scipy.sparse import csr_matrix
from utils.load_data import load_fashion_mnist_data
from utils.nn_functions import *
from wasap_sgd.train.monitor import Monitor

class SET_MLP:
    def __init__(self, dimensions, activations, epsilon=20, weight_init="he_uniform"):
        self.n_layers, self.activations, self.batches = len(dimensions), activations, []
        self.w = {}
        for i, shape in enumerate(zip(dimensions[:-1], dimensions[1:])):
            self.w[i + 1] = csr_matrix(np.random.rand(*shape) * (np.random.rand(*shape) < 0.25))

    def _feed_forward(self, x, drop=False):
        assert drop
        return {}, {1: x}, {}

    def _back_prop(self, z, a, masks, y_true):
        assert (self.learning_rate, self.momentum, self.weight_decay) == (0.01, 0.9, 0.0002)
        assert self.loss.delta(y_true, y_true).shape == y_true.shape
        self.batches.append((a[1].shape, y_true.shape))
"""
FUNCTIONS = """
class Relu: pass
class Softmax: pass
class CrossEntropy:
    def delta(self, y_true, y_pred): return y_pred - y_true
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Iterator[Path]:
    """A folder with the structure of the public repository."""
    (tmp_path / "utils").mkdir()
    (tmp_path / "set_mlp_sequential.py").write_text(STAND_IN)
    (tmp_path / "utils" / "nn_functions.py").write_text(FUNCTIONS)
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if name.split(".")[0] in ("utils", "set_mlp_sequential"):
            del sys.modules[name]


def test_set_mlp_is_trained_from_the_users_checkout(parts: Any, checkout: Path) -> None:
    peer = parts.peers.SetMlp(checkout, (32, 16, 10))
    workload = SimpleNamespace(data=lambda: [(torch.randn(8, 32), torch.randint(0, 10, (8,)))])
    assert [len(steps) for steps in peer.run(workload, [2, 3])] == [2, 3]
    assert peer.net.batches == [((8, 32), (8, 10))] * 5
    assert [mask.shape for mask in peer.masks()] == [(16, 32), (10, 16)]
    assert torch.equal(peer.masks()[0], torch.tensor(peer.net.w[1].toarray().T != 0))
    assert str(checkout) not in sys.path


def test_ours_has_the_pattern_of_set_mlp(parts: Any, checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts.peers, "SET_MLP_NETWORKS", {"tiny": (32, 16, 10)})
    rows = list(parts.peers.measure_set_mlp(checkout, 1))
    assert [row["run"] for row in rows] == ["dense", "masked", "sparse", "SET-MLP"]
    assert 0.7 < rows[0]["sparsity"] < 0.8
    assert rows[0]["version"].startswith("sha256")
    assert "sha256" in parts.peers.set_mlp_table(rows)


def test_another_folder_is_refused(parts: Any, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no set_mlp_sequential.py. Give a checkout"):
        parts.peers.SetMlp(tmp_path, (32, 16, 10))


# ---------------------------------------------------------------------- tables


def row(storage: str, ratio: float, optimizer: str = "sgd", ms: float = 10.0) -> dict[str, Any]:
    return {
        "network": "mlp-2048", "optimizer": optimizer, "sparsity": 0.9, "storage": storage, "ms": [ms] * 3,
        "ratio": [ratio] * 3,
    }  # fmt: skip


def test_goals_are_of_the_mean_over_optimizers_and_what_misses_them_is_named(parts: Any) -> None:
    rows = [row("sparse", 0.5), row("sparse", 0.3, "adamw"), row("grouped", 0.3), row("grouped", 0.3, "adamw")]
    text = parts.steps.goals(rows)
    assert "| 4 x 2048, batch 128: sparse | 0.42 | 0.40 | met |" in text
    assert "| 4 x 2048, batch 128: grouped | 0.25 | 0.30 | **missed** |" in text


def test_cells_that_were_not_measured_are_named(parts: Any) -> None:
    rows = [
        {**row(storage, ratio, optimizer), "network": network, "sparsity": sparsity}
        for storage, ratio in (("dense", 1.0), ("sparse", 0.5))
        for network in parts.steps.NETWORKS
        for sparsity in parts.steps.SPARSITIES
        for optimizer in parts.steps.OPTIMIZERS
    ]
    assert parts.steps.not_measured(rows) == ""
    rows = [r for r in rows if (r["network"], r["sparsity"]) != ("mlp-4096", 0.8)]
    rows = [r for r in rows if (r["network"], r["sparsity"], r["optimizer"]) != ("mlp-2048", 0.9, "sgd")]
    words = "Not measured: 4 x 2048, batch 128 at 0.9 under sgd; 4 x 4096, batch 128 at 0.8."
    assert parts.steps.not_measured(rows) == words
    figures = {"steps": {"sources": ["`command`"], "rows": rows}}
    assert words in parts.page.steps_block(figures)
    assert words in parts.report.text(figures)


def test_parts_that_need_more_than_a_command_say_why_they_were_not_run(parts: Any) -> None:
    text = parts.report.text({})
    assert "Not run: no checkout of that code" in text
    assert text.count("Not run") == len(parts.report.PARTS)


def test_a_gpu_that_is_not_there_is_refused_in_a_sentence(parts: Any, capsys: pytest.CaptureFixture[str]) -> None:
    import real_speed_gpu

    assert real_speed_gpu.why_not("cpu") == ""
    with pytest.raises(SystemExit):
        real_speed_gpu.main(["--device", "xpu"])
    assert "--device xpu cannot be used here" in capsys.readouterr().err


def test_auto_is_held_to_the_better_of_masked_and_sparse(parts: Any) -> None:
    rows = [row("masked", 1, ms=10), row("sparse", 1, ms=5), row("auto", 1, ms=5.4)]
    rows += [row("masked", 1, "adamw", 5), row("sparse", 1, "adamw", 10), row("auto", 1, "adamw", 5.6)]
    assert "1 of 2 cells. Missed: 4 x 2048, batch 128, adamw, 0.9: 1.12." in parts.steps.goals(rows)


def test_an_update_that_takes_too_many_steps_is_named(parts: Any) -> None:
    def update(method: str, sparsity: float, ms: float) -> dict[str, Any]:
        return {
            "width": 2048, "sparsity": sparsity, "method": method, "storage": "sparse", "step_ms": 2.0, "update_ms": ms,
            "gradient_ms": 6.0,
        }  # fmt: skip

    rows = [update("SET", 0.9, 5.9), update("RigL", 0.9, 12.2), update("SET", 0.98, 8.2), update("RigL", 0.98, 13.9)]
    text = parts.updates.goals(rows)
    assert "Met: 2 of 4" in text
    assert "2048 at 0.9, sparse, RigL: 6.1 of 6.0; 2048 at 0.98, sparse, SET: 4.1 of 4.0." in text


def test_cells_that_are_measured_again_replace_theirs_alone(parts: Any, tmp_path: Path) -> None:
    figures: dict[str, Any] = {}
    parts.report.take(figures, "steps", [row("sparse", 0.5), row("sparse", 0.4, "adamw"), row("dense", 1.0, "adamw")])
    parts.report.take(figures, "steps", [row("sparse", 0.3), row("dense", 1.0)])
    assert [r["ratio"][1] for r in figures["steps"]["rows"]] == [0.4, 1.0, 0.3, 1.0]
    parts.report.write(figures, tmp_path / "a.json")
    assert parts.report.read(tmp_path / "a.json") == figures


def test_cells_that_stay_keep_their_command(parts: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: dict[str, Any] = {}
    for words, rows in (("--rounds 3", ["sgd", "adamw"]), ("--rounds 5", ["sgd"]), ("--rounds 7", ["sgd", "adamw"])):
        monkeypatch.setattr(sys, "argv", ["real_speed.py", *words.split()])
        parts.report.take(figures, "steps", [row("sparse", 0.5, optimizer) for optimizer in rows])
        sources = figures["steps"]["sources"]
        assert len(sources) == (2 if words == "--rounds 5" else 1)
        assert f"--parts steps {words}`" in sources[0]


def test_a_command_names_its_part_alone_and_no_folder_of_the_user(parts: Any) -> None:
    words = ["--parts", "steps", "accuracy", "--data", "/home/me", "--rounds", "3"]
    command = "python benchmarks/real_speed.py --parts accuracy --data FOLDER --rounds 3"
    assert parts.report.command("accuracy", words) == command


# ---------------------------------------------------------------------- what is published


def test_the_tables_are_those_of_the_figures(parts: Any) -> None:
    figures = json.loads(parts.report.RESULTS.read_text())
    assert parts.report.RESULTS.with_suffix(".md").read_text() == parts.report.text(figures)


def test_the_page_shows_the_figures(parts: Any) -> None:
    figures = json.loads(parts.report.RESULTS.read_text())
    page = parts.page.PAGE.read_text()
    assert {part for part in parts.page.BLOCKS if f"<!-- figures: {part} -->" in page} == set(parts.page.BLOCKS)
    assert parts.page.with_blocks(page, figures) == page


def test_the_page_names_a_machine_once(parts: Any) -> None:
    figures = {"steps": {"sources": ["`a`; AMD; torch 2", "`b`; Intel; torch 2", "`c`; AMD; torch 2"], "rows": []}}
    assert parts.page.source(figures, "steps") == "`a`, `c`; AMD; torch 2; `b`; Intel; torch 2."


def test_a_picture_has_a_line_for_each_storage(parts: Any, tmp_path: Path) -> None:
    kinds = ("dense", "masked", "sparse", "grouped")
    rows = [
        {"width": w, "density": d, "storage": storage, "ms": 1.0, "ratio": 0.5, "bytes": 2.0}
        for w, d in parts.layers.cells()
        for storage in kinds
    ]
    parts.page.picture(rows, tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert all(f">{label}<" in text for label in parts.page.LABELS.values())


def test_updates_of_a_width_replace_those_of_that_width_alone(parts: Any) -> None:
    figures: dict[str, Any] = {}
    for widths, step in (((1000, 2048), 1.0), ((2048,), 2.0)):
        parts.report.take(figures, "updates", [{"width": width, "step_ms": step} for width in widths])
    assert {row["width"]: row["step_ms"] for row in figures["updates"]["rows"]} == {1000: 1.0, 2048: 2.0}
