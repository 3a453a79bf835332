"""The sweep files of W&B: what an agent makes of them starts a run, whatever values it draws."""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import ROOT
from omegaconf import DictConfig
from support import wandb_file

from sparse_callbacks.tasks import build, checks, slim

SWEEPS = sorted((ROOT / "conf" / "sweep").glob("*.yaml"))
METRICS = ("val/acc", "test/acc")  # `check_logged` finds them in runs
SHORT = ("report=false", "trainer.enable_progress_bar=false", "data.batch_size=128", "model.hidden=[24]")


def read(path: Path) -> dict[str, Any]:
    sweep = yaml.safe_load(path.read_text())
    assert isinstance(sweep, dict)
    return sweep


def values_of(choice: Mapping[str, Any]) -> list[Any]:
    """All values of a parameter, or the ends of its range."""
    if "value" in choice:
        return [choice["value"]]
    return list(choice["values"]) if "values" in choice else [choice["min"], choice["max"]]


def arguments(point: Mapping[str, Any]) -> list[str]:
    """What an agent puts in the place of ${args_no_hyphens} for a point of the sweep."""
    # here, as its import takes seconds of every process that collects tests
    from wandb.sdk.launch.sweeps.utils import create_sweep_command_args

    made = create_sweep_command_args({"args": {key: {"value": value} for key, value in point.items()}})
    return list(made["args_no_hyphens"])


def points(sweep: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Points that have each value at least once."""
    choices = {key: values_of(choice) for key, choice in sweep["parameters"].items()}
    count = max(len(values) for values in choices.values())
    return [{key: values[index % len(values)] for key, values in choices.items()} for index in range(count)]


def test_every_method_has_a_sweep_of_its_name() -> None:
    methods = {path.stem for path in (ROOT / "conf" / "method").glob("*.yaml")} - {"none"}
    assert methods <= {path.stem for path in SWEEPS}
    for path in SWEEPS:
        if path.stem in methods:
            assert read(path)["parameters"]["method"] == {"value": path.stem}


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_an_agent_can_run_every_value(path: Path, composed: Callable[..., DictConfig]) -> None:
    sweep = read(path)
    assert sweep["command"] == ["${env}", "${interpreter}", "${program}", "${args_no_hyphens}"]
    assert (ROOT / sweep["program"]).is_file()
    assert sweep["metric"] == {"name": sweep["metric"]["name"], "goal": "maximize"}
    assert sweep["metric"]["name"] in METRICS
    assert path.name in path.read_text().splitlines()[0]
    for point in points(sweep):
        cfg = composed(*arguments(point))
        checks.check_choices(cfg)
        method = build.build_method(cfg)
        assert method is not None
        for key, value in point.items():
            # under schedule= the drop fraction begins a curve
            if key.startswith("method.") and (key != "method.drop_fraction" or "schedule" not in point):
                assert getattr(method, key.removeprefix("method.")) == value
        if cfg.slim:
            slim.check(method)


def test_the_command_of_an_agent_runs(tmp_path: Path) -> None:
    """In a process of its own; what it prints is kept in the run, and stands on the terminal once."""
    sweep = read(ROOT / "conf" / "sweep" / "gap.yaml")
    command = [
        sys.executable,
        str(ROOT / sweep["program"]),
        *arguments(points(sweep)[0]),
        *SHORT,
        "trainer.max_epochs=3",
    ]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    environment |= {"PYTHONPATH": str(ROOT), "NETRC": str(tmp_path / "none"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    (log,) = tmp_path.rglob("*.wandb")
    kept = (log.parent / "files" / "output.log").read_text()
    for text in ("parameter       shape", "test accuracy", "checkpoints/last.ckpt"):
        assert done.stdout.count(text) == kept.count(text) == 1, text
    check_logged(log, "gap-0.8-mlp-s0", 0.8)


def test_a_sweep_of_a_method_without_a_sparsity_runs(run: Callable[..., dict[str, float]], tmp_path: Path) -> None:
    run(*arguments(points(read(ROOT / "conf" / "sweep" / "l0.yaml"))[0]), "logger=[wandb]", "trainer.max_epochs=1")
    (log,) = tmp_path.rglob("*.wandb")
    check_logged(log, "l0-0.9-mlp-s0", 0.9)


def check_logged(log: Path, name: str, sparsity: float) -> None:
    """A run has its name, the one column of its sparsity, and the metrics that sweeps look for."""
    assert wandb_file.named(log)[0] == name
    assert wandb_file.config(log)["sparsity"] == sparsity
    (written,) = log.parents[2].glob("metrics.json")
    for metric in METRICS:
        assert wandb_file.curves(log)[metric][-1][1] == json.loads(written.read_text())[metric]
