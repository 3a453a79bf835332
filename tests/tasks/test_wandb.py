"""What an offline W&B run holds, read back from its file: every chart's data, names, configuration, summary, artifacts."""

import csv
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import wandb
import yaml
from conftest import ROOT, SHORT
from hydra import compose, initialize_config_dir
from support import wandb_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from sparse_callbacks.tasks import loggers, reports

Run = Callable[..., dict[str, float]]
LAYERS = ("model.1.weight", "model.3.weight")
STEPS = 27


@dataclass
class Recorded:
    """A run with all three loggers."""

    folder: Path
    home: Path
    metrics: dict[str, float]

    @cached_property
    def file(self) -> Path:
        (path,) = self.folder.rglob("*.wandb")
        return path

    @cached_property
    def curves(self) -> dict[str, list[tuple[float, Any]]]:
        return wandb_file.curves(self.file)

    @cached_property
    def rows(self) -> list[dict[str, str]]:
        (path,) = self.folder.glob("csv/version_*/metrics.csv")
        with path.open() as lines:
            return list(csv.DictReader(lines))

    @cached_property
    def board(self) -> EventAccumulator:
        board = EventAccumulator(str(self.folder / "tensorboard" / "version_0"))
        board.Reload()
        return board

    def steps(self, key: str) -> list[float]:
        return [step for step, _ in self.curves[key]]


def draw_one(folder: Path, dense: Path | None = None) -> None:
    """Stands in for the report, whose figures take seconds."""
    (folder / "report").mkdir()
    matplotlib.image.imsave(folder / "report" / "training_flops.png", np.linspace(0, 1, 48).reshape(4, 4, 3))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Recorded:
    from train import train

    folder, home = tmp_path_factory.mktemp("run"), tmp_path_factory.mktemp("home")
    short = [text for text in SHORT if not text.startswith("logger")]
    options = ("method=rigl", "sparsity=0.8", "method.every=5", "optim.lr=0.07", "slim=true", "seed=3", "report=true")
    with pytest.MonkeyPatch.context() as patch, initialize_config_dir(str(ROOT / "conf"), version_base=None):
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patch.delenv(name)
        patch.setenv("HOME", str(home))
        patch.setenv("NETRC", str(home / "no-netrc"))
        patch.setattr(reports, "write_page", draw_one)
        loggers = ("logger=[wandb,csv,tensorboard]", "trainer.log_every_n_steps=3", f"output_dir={folder}")
        metrics = train(compose("train", overrides=[*short, *options, *loggers]))
        assert "WANDB_DATA_DIR" not in os.environ
    return Recorded(folder, home, metrics)


def test_the_run_is_named_by_what_it_is(recorded: Recorded) -> None:
    name, group, tags = wandb_file.named(recorded.file)
    assert name == "rigl-0.8-mlp-s3"
    assert re.fullmatch(r"rigl-0\.8-mlp-digits-[0-9a-f]{6}", group)
    assert tags == ["rigl", "mlp", "digits"]


def test_every_chart_has_its_data(recorded: Recorded) -> None:
    layers = {f"sparsity/{name}" for name in LAYERS}
    updates = {"update/drop_fraction", "update/changed", "update/ever_active"}
    wanted = {"sparsity/total", "sparsity/model", "train/lr", "train/grad_norm", "train/loss", "train/acc", "test/acc"}
    wanted |= layers | updates | {"val/acc", "val/loss", "epoch"}
    assert wanted <= recorded.curves.keys()
    assert wandb_file.step_metrics(recorded.file) == {"trainer/global_step"}
    for key in wanted:
        steps = recorded.steps(key)
        assert steps == sorted(steps)
        assert 0 <= steps[0] <= steps[-1] <= STEPS
    assert recorded.curves["train/lr"][0][1] == pytest.approx(0.07, rel=0.05)
    assert recorded.curves["train/lr"][-1][1] < 0.01
    assert wandb_file.exit_codes(recorded.file) == [0]


def test_rows_of_one_step_join(recorded: Recorded) -> None:
    """In W&B and in the CSV file: losses, rates and sparsities of every third step, an update's row at its step."""
    due = [*range(2, STEPS, 3)]
    assert recorded.steps("train/loss") == recorded.steps("train/lr") == due
    assert set(due) <= set(recorded.steps("sparsity/total"))
    assert recorded.steps("update/changed") == [0, 6, 12, 18]  # RigL's updates replace their steps
    assert recorded.steps("val/acc") == recorded.steps("train/acc") == [8, 17, 26]
    joined: dict[int, set[str]] = {}
    for row in recorded.rows:
        joined.setdefault(int(row["step"]), set()).update(key for key, value in row.items() if value)
    for step in due:
        assert {"train/loss", "train/lr", "sparsity/total", "epoch"} <= joined[step]


def test_one_column_has_the_sparsity_and_the_calendar_is_resolved(recorded: Recorded) -> None:
    config = wandb_file.config(recorded.file)
    assert config["sparsity"] == config["method"]["sparsity"] == 0.8
    assert config["calendar"] == {"every": 5, "start": 0, "stop": 20}
    assert config["method"]["_target_"] == "sparse_callbacks.RigL"
    assert config["optim"]["lr"] == 0.07
    for name in ("csv", "tensorboard"):
        told = yaml.safe_load((recorded.folder / name / "version_0" / "hparams.yaml").read_text())
        assert {key: told[key] for key in told} == {key: config[key] for key in told}
        assert told["calendar"] == config["calendar"]


def test_the_slim_network_is_in_every_logger(recorded: Recorded) -> None:
    slim = {key: value for key, value in recorded.metrics.items() if key.startswith("slim/")}
    assert {"slim/parameters", "slim/flops", "slim/latency", "slim/test/acc"} <= slim.keys()
    (row,) = [row for row in recorded.rows if row["slim/parameters"]]
    assert {key: float(row[key]) for key in slim} == pytest.approx(slim)
    assert {key: recorded.curves[key][-1][1] for key in slim} == pytest.approx(slim)
    assert {key: recorded.board.Scalars(key)[-1].value for key in slim} == pytest.approx(slim, rel=1e-5)
    assert int(row["step"]) == recorded.steps("test/acc")[0] == recorded.steps("slim/flops")[0] == STEPS


def test_the_summary_has_the_best_and_the_last_of_everything(recorded: Recorded) -> None:
    summary = wandb_file.summary(recorded.file)
    assert {key: summary[key] for key in recorded.metrics} == pytest.approx(recorded.metrics)
    validated = [value for _, value in recorded.curves["val/acc"]]
    assert summary["val/acc"] == validated[-1] == recorded.metrics["val/acc"]
    assert summary["best/val/acc"] == pytest.approx(max(validated))
    assert summary["best/epoch"] == validated.index(max(validated))
    assert summary["train/loss"] == recorded.curves["train/loss"][-1][1]


def test_the_layers_are_a_table_and_histograms(recorded: Recorded) -> None:
    (path,) = recorded.file.parent.glob("files/media/table/layers*.table.json")
    table = json.loads(path.read_text())
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [row["parameter"] for row in rows] == list(LAYERS)
    assert [row["shape"] for row in rows] == ["24x64", "10x24"]
    for row in rows:
        assert row["sparsity"] == pytest.approx(recorded.metrics[f"sparsity/{row['parameter']}"])
        assert row["sparsity"] == pytest.approx(row["target"])
        name, units = row["parameter"], int(row["shape"].split("x")[0])
        (_, counts), (_, inputs) = (recorded.curves[f"{kind}/{name}/values"][0] for kind in ("weights", "fan_in"))
        assert sum(counts) == row["active"] == round((1 - row["sparsity"]) * row["weights"])
        assert sum(inputs) == units
        assert row["fewest inputs"] <= row["active"] / units <= row["most"]
        (histogram,) = recorded.board.Histograms(f"weights/{name}")
        assert histogram.histogram_value.num == row["active"]
        assert recorded.board.Histograms(f"fan_in/{name}")[0].histogram_value.sum == row["active"]
    assert b"| model.1.weight | 24x64 |" in recorded.board.Tensors("layers/text_summary")[0].tensor_proto.string_val[0]


def test_figures_of_the_report_are_images(recorded: Recorded) -> None:
    assert recorded.curves["figures/training_flops/_type"][0][1] == "images/separated"
    assert recorded.steps("figures/training_flops/count") == [STEPS]
    assert list(recorded.file.parent.glob("files/media/images/figures/training_flops*.png"))
    assert recorded.board.Images("figures/training_flops")[0].height == 4


def test_costs_and_topology_are_curves(recorded: Recorded) -> None:
    for key in ("flops/training", "flops/training_dense", "flops/inference", "bytes/weights", "active/mean"):
        assert recorded.curves[key][-1][1] == recorded.board.Scalars(key)[-1].value > 0
        assert set(range(2, STEPS, 3)) <= set(recorded.steps(key))
    assert recorded.steps("topology/churn")[-1] == STEPS - 1


def test_the_runs_compare_in_the_table_of_tensorboard(recorded: Recorded) -> None:
    from tensorboard.plugins.hparams import plugin_data_pb2

    content = recorded.board.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    start = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info
    assert start.hparams["sparsity"].number_value == 0.8
    assert start.hparams["calendar/every"].number_value == 5
    assert "hp_metric" not in recorded.board.Tags()["scalars"]


def test_an_offline_run_leaves_nothing_in_the_home_of_the_user(recorded: Recorded) -> None:
    left = {path.relative_to(recorded.home).parts[0] for path in recorded.home.rglob("*") if path.is_file()}
    assert left <= {".cache"}, left  # logs of W&B itself
    assert not list(recorded.home.rglob("*artifact*"))


# ---------------------------------------------------------------------- artifacts


class Config(dict[str, Any]):
    def update(self, values: Any, allow_val_change: bool = False) -> None:  # type: ignore[override]
        super().update(values)


class OnlineRun:
    """Stands in for an online run: remembers the artifacts that it is given."""

    id = "abc"

    def __init__(self) -> None:
        self.artifacts: list[tuple[str, str, list[str], Any]] = []
        self.summary: dict[str, Any] = {}
        self.config = Config()
        self.settings = wandb.Settings(mode="offline")
        self.dir = "."

    def log_artifact(self, artifact: Any, aliases: Any = None) -> None:
        self.artifacts.append((artifact.name, artifact.type, sorted(artifact.manifest.entries), aliases))

    def log(self, row: dict[str, Any]) -> None: ...

    def finish(self, exit_code: int) -> None: ...


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> OnlineRun:
    """W&B with a login, whose runs are stand-ins."""
    run = OnlineRun()
    monkeypatch.setenv("WANDB_API_KEY", "k")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path / "staged"))
    monkeypatch.setattr(wandb, "init", lambda **_: run)
    monkeypatch.setattr(loggers, "place", lambda logger: ("wandb", "online"))
    return run


def test_an_online_run_keeps_checkpoint_and_slim_network_where_that_is_wanted(
    run: Run, online: OnlineRun, tmp_path: Path
) -> None:
    options = ("logger=[wandb]", "method=static", "slim=true", "trainer.max_epochs=1")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "report.html").write_text("a report")
    run(*options, "logger.wandb.log_model=true")
    assert online.artifacts == [
        ("model-abc", "model", ["model.ckpt"], ["latest", "best"]),
        ("results-abc", "results", ["report.html", "slim.safetensors"], None),
    ]
    online.artifacts.clear()
    run(*options)
    assert online.artifacts == []


def test_an_offline_run_says_that_it_keeps_no_artifacts(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"log_model=True, and this run is offline: checkpoint and report stay"):
        logger = loggers.wandb_logger(str(tmp_path), "project", log_model=True)
    assert not logger._log_model
