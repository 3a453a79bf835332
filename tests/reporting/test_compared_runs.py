"""Which folders are compared, and what is read of them."""

import json
from pathlib import Path

import pytest
from support.recorded import SHAPES, recorded

from sparse_callbacks.reporting.compared_runs import FAILURE, left_out_lines, read_runs, run_folders


def older(
    folder: Path, metrics: object, config: str = "seed: 3\nmethod: {_target_: sparse_callbacks.SET, sparsity: 0.8}\n"
) -> Path:
    """A run without a record, as version 0.1 has left them."""
    (folder / ".hydra").mkdir(parents=True)
    (folder / ".hydra" / "config.yaml").write_text(config)
    (folder / "metrics.json").write_text(metrics if isinstance(metrics, str) else json.dumps(metrics))
    return folder


def test_runs_are_found_at_any_depth_by_number_and_once(tmp_path: Path) -> None:
    folders = [recorded(tmp_path / "sweep" / name) for name in ("10", "9", "deep/er")]
    (tmp_path / "sweep" / ".hidden").mkdir()
    recorded(tmp_path / "sweep" / ".hidden" / "run")
    (tmp_path / "sweep" / "back").symlink_to(tmp_path / "sweep")
    assert list(run_folders(tmp_path)) == [folders[2], folders[1], folders[0]]
    runs, left_out = read_runs([folders[0], tmp_path, tmp_path / "sweep"], "test/acc")
    assert [run.folder for run in runs] == [folders[0], folders[2], folders[1]]
    assert left_out == []


def test_what_is_no_run_is_left_out_with_the_reason(tmp_path: Path) -> None:
    recorded(tmp_path / "run")
    (tmp_path / "file.csv").write_text("")
    (tmp_path / "empty").mkdir()
    paths = [tmp_path / name for name in ("run", "file.csv", "empty", "gone")]
    runs, left_out = read_runs(paths, "test/acc")
    assert len(runs) == 1
    reasons = {path.name: reason for path, reason in left_out}
    assert reasons.keys() == {"file.csv", "empty", "gone"}
    assert "a file" in reasons["file.csv"]
    assert "holds no run" in reasons["empty"]
    assert "not there" in reasons["gone"]


def test_folders_beside_runs_are_left_out_with_the_reason_wherever_they_lie(tmp_path: Path) -> None:
    folder = recorded(tmp_path / "sweep/deep/0")
    recorded(tmp_path / "elsewhere")
    for name in ("empty/in it", "deep/checkpoints"):
        (tmp_path / "sweep" / name).mkdir(parents=True)
    recorded(tmp_path / "sweep/half")
    (tmp_path / "sweep/half/record/run.json").unlink()
    older(tmp_path / "sweep/9", {"test/acc": 0.5})
    (tmp_path / "sweep/9/.hydra/config.yaml").unlink()
    (tmp_path / "sweep/link").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "sweep/deep/gone").symlink_to(tmp_path / "nowhere")
    (tmp_path / "sweep/notes.txt").write_text("a file beside runs is nobody's question")
    runs, left_out = read_runs([tmp_path / "sweep"], "test/acc")
    assert [run.folder for run in runs] == [folder]
    reasons = {path.relative_to(tmp_path / "sweep").as_posix(): reason for path, reason in left_out}
    assert reasons.keys() == {"empty", "deep/checkpoints", "half", "9", "link"}
    assert reasons["empty"].startswith("holds no run (record/run.json, or")
    assert reasons["half"] == "holds a part of a run alone (record without record/run.json)"
    assert reasons["9"] == "holds a part of a run alone (metrics.json without .hydra/config.yaml)"
    assert "give the folder that it leads to" in reasons["link"]


def test_runs_without_results_are_left_out_with_the_reason(tmp_path: Path) -> None:
    recorded(tmp_path / "0", status="running", results={})
    recorded(tmp_path / "1", status="failed", results={})
    (tmp_path / "1" / FAILURE).write_text("ValueError: lr=-1 is not positive.\n")
    recorded(tmp_path / "2", results={"accuracy": 0.9})
    recorded(tmp_path / "3")
    (tmp_path / "3" / "record" / "run.json").write_text("{")
    older(tmp_path / "4", "[1")
    older(tmp_path / "5", {"test/acc": None})
    older(tmp_path / "6", {"test/acc": 0.5}, config="- a list")
    runs, left_out = read_runs([tmp_path], "test/acc")
    assert runs == []
    reasons = {path.name: reason for path, reason in left_out}
    assert reasons["0"].startswith("has no results")
    assert reasons["1"] == "failed: ValueError: lr=-1 is not positive"
    assert reasons["2"] == "has no test/acc, but accuracy, train/loss, val/acc"
    assert "cannot be read" in reasons["3"]
    assert "metrics.json cannot be read" in reasons["4"]
    assert reasons["5"].startswith("has no results")
    assert "is not a configuration" in reasons["6"]


def test_a_record_gives_shrinkbenchs_measures_over_all_parameters(tmp_path: Path) -> None:
    recorded(tmp_path / "sparse", sparsity=0.9)
    recorded(tmp_path / "dense", method="dense")
    (dense, sparse), _ = read_runs([tmp_path], "test/acc")
    sizes = [rows * columns for rows, columns in SHAPES.values()]
    left = [-(-size // 10) for size in sizes]  # as the made-up record rounds
    assert sparse.values["compression"] == pytest.approx((sum(sizes) + 60) / (sum(left) + 60))
    assert sparse.values["speedup"] == pytest.approx(sum(sizes) / sum(left))
    assert (dense.values["compression"], dense.values["speedup"]) == (1, 1)
    assert sparse.values["flops/training"] == 6 * sum(left) * 64 * 200
    assert (sparse.method, sparse.seed, dense.method) == ("RigL", 0, "dense")


def test_a_finished_run_has_metrics_that_were_only_logged(tmp_path: Path) -> None:
    recorded(tmp_path / "0")
    recorded(tmp_path / "1", status="stopped", results={})
    (run,), left_out = read_runs([tmp_path], "train/loss")
    assert run.values["train/loss"] == pytest.approx(0.3)
    assert len(left_out) == 1


def test_a_run_without_a_record_is_read_as_far_as_it_goes(tmp_path: Path) -> None:
    older(tmp_path / "0", {"test/acc": 0.7, "sparsity/total": 0.8, "sparsity/model": 0.75})
    older(
        tmp_path / "1",
        {"test/acc": 0.9, "sparsity/model": 0.0},
        config="seed: 1\nmethod: {seed: 1}\nmodel: {hidden: [2]}\n",
    )
    (sparse, dense), _ = read_runs([tmp_path], "test/acc")
    assert (sparse.method, sparse.seed, dense.method, dense.seed) == ("SET", 3, "dense", 1)
    assert sparse.values["compression"] == 4
    assert "speedup" not in sparse.values
    assert dense.configuration["model.hidden"] == [2]


def test_reasons_that_many_runs_share_take_one_line(tmp_path: Path) -> None:
    pairs = [(tmp_path / str(number), "failed: OSError") for number in range(9)]
    (line,) = left_out_lines(pairs)
    assert line.endswith("/5 and 3 more: failed: OSError")
