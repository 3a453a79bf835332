"""Every run of train.py is recorded in its folder, and ends with a report that cannot lose its results."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hydra.core.hydra_config import HydraConfig

from sparse_callbacks.core.record.record_file import has_record, read_record
from sparse_callbacks.tasks.reports import typed_command

Run = Callable[..., dict[str, float]]

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def run(run: Run) -> Run:
    """A run that is recorded, which those of other tests are not."""
    return lambda *overrides, **options: run("report=true", *overrides, **options)


@pytest.fixture
def pages(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Path, Path | None]]:
    """The pages that were asked for, by folder and dense run; nothing is drawn."""
    asked: list[tuple[Path, Path | None]] = []

    def write(folder: Path, dense: Path | None = None) -> Path:
        asked.append((folder, dense))
        (folder / "report.html").write_text("a page")
        return folder / "report.html"

    monkeypatch.setattr("sparse_callbacks.tasks.reports.write_page", write)
    monkeypatch.setattr("sparse_callbacks.tasks.reports.why_no_page", lambda: "")
    return asked


def test_a_run_is_recorded_with_its_results(
    run: Run, pages: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run("method=rigl", "sparsity=0.8", "trainer.max_epochs=1")
    found = read_record(tmp_path / "run")
    assert found.run.results == pytest.approx(metrics)
    assert (found.run.method, found.run.status, found.run.seed) == ("RigL", "finished", 0)
    assert found.run.configuration["model"]["hidden"] == [24]
    assert found.rows[-1]["step"] == metrics["steps"]
    assert found.rows[-1]["sparsity/total"] == metrics["sparsity/total"]
    assert found.rows[-1]["val/acc"] == metrics["val/acc"]
    assert pages == [(tmp_path / "run", None)]
    assert "report.html" in capsys.readouterr().out


def test_a_dense_run_is_compared_with(run: Run, pages: Any, tmp_path: Path) -> None:
    run("method=none", "trainer.max_epochs=1", folder="dense")
    assert read_record(tmp_path / "dense").run.method == "dense"
    run("method=static", "trainer.max_epochs=1", f"dense_run={tmp_path / 'dense'}")
    assert pages[1] == (tmp_path / "run", tmp_path / "dense")


def test_the_proof_of_slimming_is_in_the_record(run: Run, pages: Any, tmp_path: Path) -> None:
    metrics = run("method=rigl", "sparsity=0.9", "slim=true", "trainer.max_epochs=1")
    channels = read_record(tmp_path / "run").run.channels
    assert channels["after"]["parameters"] == metrics["slim/parameters"]
    # of one image, as those of the rows, of which none has an attention product
    assert channels["before"]["flops"] == read_record(tmp_path / "run").rows[-1]["flops/inference_dense"]
    assert channels["after"]["flops"] == metrics["slim/flops"] <= channels["before"]["flops"]
    assert channels["samples"] == 8
    first = next(line for line in channels["proof"].splitlines() if line.startswith("FLOPs "))
    assert float(first.split()[1].replace(",", "")) == channels["before"]["flops"]
    assert "latency, batch of 8 " in channels["proof"]
    assert sum(group["removed"] for group in channels["groups"]) == metrics["slim/removed"]
    assert "outputs on given inputs" in channels["proof"]


@pytest.mark.parametrize(
    ("own", "kept"),
    [
        (["hydra.run.dir=/a b/run", "hydra.mode=RUN"], "python train.py method=rigl seed=3 'hydra.run.dir=/a b/run'"),
        (["hydra.job.chdir=true"], "python train.py method=rigl seed=3 hydra.job.chdir=true"),
        (["hydra.sweep.dir=/x", "hydra/launcher=joblib", "hydra.mode=MULTIRUN"], "python train.py method=rigl seed=3"),
    ],
)
def test_the_command_has_the_arguments_of_hydra_that_belong_to_the_run(
    own: list[str], kept: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = SimpleNamespace(overrides=SimpleNamespace(task=["method=rigl", "seed=3"], hydra=own))
    monkeypatch.setattr(HydraConfig, "initialized", lambda: True)
    monkeypatch.setattr(HydraConfig, "get", lambda: typed)
    monkeypatch.setattr("sys.argv", ["/somewhere/train.py"])
    assert typed_command() == kept


def test_a_report_that_fails_loses_no_results(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(*_: Any) -> Path:
        raise ValueError("no ink")

    monkeypatch.setattr("sparse_callbacks.tasks.reports.write_page", fails)
    monkeypatch.setattr("sparse_callbacks.tasks.reports.why_no_page", lambda: "")
    metrics = run("method=static", "trainer.max_epochs=1")
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == pytest.approx(metrics)
    assert "noink" in re.sub(r"[│\s]", "", capsys.readouterr().out)  # long lines are folded


def test_a_missing_extra_is_named_in_the_table(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sparse_callbacks.tasks.reports.why_no_page", lambda: "pip install 'sparse-callbacks[report]'")
    run("method=static", "trainer.max_epochs=1")
    assert "[report]" in capsys.readouterr().out
    assert has_record(tmp_path / "run")


def test_nothing_is_recorded_where_nobody_wants_it(run: Run, pages: Any, tmp_path: Path) -> None:
    run("method=static", "trainer.max_epochs=1", "report=false")
    assert not has_record(tmp_path / "run")
    assert pages == []


def test_a_dense_run_without_a_record_is_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"dense_run=.* holds no record"):
        run("method=static", f"dense_run={tmp_path}")
    with pytest.raises(ValueError, match="report=false writes none"):
        run("method=static", f"dense_run={tmp_path}", "report=false")
