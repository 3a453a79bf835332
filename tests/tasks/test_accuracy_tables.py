"""The accuracy tables: which runs they make and keep, and that every row is a run that can begin."""

import sys
from pathlib import Path
from types import ModuleType

import pytest
from conftest import ROOT
from hydra import compose, initialize_config_dir

from sparse_callbacks import GMP
from sparse_callbacks.core.calendar import RunLength, resolve_times
from sparse_callbacks.tasks import build, checks


@pytest.fixture
def accuracy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import accuracy

    return accuracy


@pytest.fixture
def training_runs(accuracy: ModuleType) -> ModuleType:
    import training_runs

    return training_runs


TABLES = ["digits", "lenet5", "lenet5_rescaled", "starts", "sup_tickets", "snip", "patterns"]


def test_all_tables_are_tested(accuracy: ModuleType) -> None:
    assert set(TABLES) == set(accuracy.REPORTS)


@pytest.mark.parametrize("table", TABLES)
def test_every_run_composes_and_builds_its_method_at_the_sparsity_of_its_table(
    accuracy: ModuleType, table: str
) -> None:
    rows = dict[tuple[str, ...], tuple[str, ...]]()
    for words in accuracy.runs(accuracy.REPORTS[table], 1):
        # a row that differs in the sparsity alone composes as the first one
        rows.setdefault(tuple(word for word in words if not word.startswith("sparsity=0")), words)
    for words in rows.values():
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            cfg = compose("train", list(words))
        checks.check_choices(cfg)
        method = build.build_method(cfg)
        assert (method is None) == ("method=none" in words)
        if table in ("starts", "sup_tickets", "snip"):
            assert method is None or f"sparsity={getattr(method, 'base', method).sparsity}" in words
        if table == "patterns" and isinstance(method, GMP):  # its times are steps of so long a run
            resolve_times(method.every, method.start, method.stop, 1, RunLength(lambda: 860, lambda: 215))
        if table == "lenet5":
            assert (cfg.trainer.max_epochs, cfg.optim.lr) == (12, 0.05)
            assert method is None or f"sparsity={method.sparsity}" in words


def test_the_dense_run_of_both_sparsities_is_one_run(accuracy: ModuleType) -> None:
    made = accuracy.runs(accuracy.REPORTS["lenet5"], 3)
    assert len(made) == len(set(made))
    assert [words[-1] for words in made if "method=none" in words] == ["seed=0", "seed=1", "seed=2"]
    rows = [words[-1] for words in made[len(accuracy.GAP_TRIED) :]]
    assert rows == sorted(rows)  # a stopped script has all methods at the same seeds


def test_the_row_of_gap_is_one_of_those_tried(accuracy: ModuleType) -> None:
    assert accuracy.LENET5_ROWS["GaP"] in accuracy.GAP_TRIED.values()


def test_a_row_has_mean_sample_spread_and_range_in_percent(accuracy: ModuleType) -> None:
    found = [
        {"test/acc": a, "val/acc": a + 0.1, "sparsity/total": 0.95, "seconds": s}
        for a, s in ((0.5, 1.0), (0.6, 2.0), (0.7, 6.0))
    ]
    assert accuracy.line("X", "method=x", found) == (
        "| X | 60.00 % | 10.00 | 50.00 to 70.00 % | 70.00 % | 95.00 % | 3.0 | 3 | `method=x` |"
    )
    assert "not run yet" in accuracy.line("X", "method=x", [])
    assert "| 50.00 % |  | 50.00 to 50.00 % |" in accuracy.line("X", "method=x", found[:1])


def test_a_search_lists_what_was_tried_best_validation_first(accuracy: ModuleType) -> None:
    group = accuracy.Group("Tried", "sparsity=0.5", {"a": "method=a", "b": "method=b", "c": "method=c"}, search=True)
    found = {
        accuracy.overrides(group.shared, f"method={m}", 0): {"val/acc": v, "test/acc": 1 - v}
        for m, v in (("a", 0.8), ("b", 0.9))
    }
    assert accuracy.section(group, found, 3) == "Tried, by validation accuracy: b 90.00 %; a 80.00 %."


def test_a_finished_run_is_not_repeated_and_the_others_are_made(
    accuracy: ModuleType, training_runs: ModuleType, tmp_path: Path
) -> None:
    shared = "trainer.max_epochs=1 trainer.limit_train_batches=2 sparsity=0.5"
    old, new = (accuracy.overrides(shared, "method=static", seed) for seed in (0, 1))
    (tmp_path / ",".join(old)).mkdir()
    (tmp_path / ",".join(old) / "metrics.json").write_text('{"test/acc": 0.25}')
    found = dict(training_runs.results([old, new], None, tmp_path, 1, training_runs.Figures(tmp_path / "t.json")))
    assert found[old] == {"test/acc": 0.25}
    assert found[new]["steps"] == 2
    assert found[new]["sparsity/total"] == pytest.approx(0.5, abs=1e-3)
    assert (tmp_path / ",".join(new) / "metrics.json").exists()
    # the figures alone are enough, where the folders of the runs are gone
    kept = training_runs.Figures(tmp_path / "t.json", go_on=True)
    assert dict(training_runs.results([old, new], None, tmp_path / "empty", 1, kept)) == found
    assert not (tmp_path / "empty").exists()
    assert training_runs.Figures(tmp_path / "t.json").found == {}


def test_a_failed_run_leaves_the_others_to_be_made_and_is_named_at_the_end(
    training_runs: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def made(words: tuple[str, ...], *_: object) -> dict[str, float]:
        if words == ("b",):
            raise RuntimeError("b is not there")
        return {"test/acc": 0.5}

    monkeypatch.setattr(training_runs, "run", made)
    figures = training_runs.Figures(tmp_path / "t.json")
    made_one_by_one = training_runs.results([("a",), ("b",), ("c",)], None, tmp_path, 1, figures)
    with pytest.raises(RuntimeError, match=r"^1 of 3 runs failed\.\n\nb is not there$"):
        list(made_one_by_one)
    assert list(figures.found) == [("a",), ("c",)]


def test_figures_hold_overrides_as_a_shell_takes_them(training_runs: ModuleType, tmp_path: Path) -> None:
    words = ("method=gmp", "method.distribution={_target_:sparse_callbacks.Spdy,budget:0.3}", "data.root='it\\'s here'")
    figures = training_runs.Figures(tmp_path / "t.json")
    figures.add(words, {"test/acc": 0.123456789, "steps": 860})
    figures.add(("seed=1",), {"test/acc": 0.5})
    assert training_runs.Figures(tmp_path / "t.json", go_on=True).found == {
        words: {"test/acc": 0.1234568, "steps": 860.0},
        ("seed=1",): {"test/acc": 0.5},
    }
    assert len((tmp_path / "t.json").read_text().splitlines()) == 4  # a line for each run


@pytest.mark.parametrize("text", ["{}", "not json", '{"runs": [1]}'], ids=["empty", "words", "list"])
def test_a_file_without_figures_is_refused_in_words(training_runs: ModuleType, tmp_path: Path, text: str) -> None:
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match="does not hold the figures of runs"):
        training_runs.Figures(tmp_path / "t.json", go_on=True)


def test_a_path_with_any_character_reaches_the_run(
    accuracy: ModuleType, training_runs: ModuleType, tmp_path: Path
) -> None:
    folder = tmp_path / "it's = a, folder"
    words = accuracy.overrides("data=fashion_mnist sparsity=0.5", "method=static", 0)
    with pytest.raises(
        RuntimeError, match=r"(?s)train\.py method=static .*failed.*cannot read the set from .*it's = a, folder/none,"
    ):
        training_runs.run(words, str(folder / "none"), folder)
    assert (folder / ".hydra" / "config.yaml").exists()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [(["--table", "lenet5"], "needs --root FOLDER"), (["--root", "here"], "takes no --root FOLDER")],
)
def test_a_table_without_its_data_is_refused(
    accuracy: ModuleType,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", *arguments])
    with pytest.raises(SystemExit, match="2"):
        accuracy.main()
    assert says in capsys.readouterr().err


def test_the_help_says_which_table_reads_files(
    accuracy: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--help"])
    with pytest.raises(SystemExit, match="0"):
        accuracy.main()
    assert "folder of torchvision's files, for --table lenet5" in " ".join(capsys.readouterr().out.split())


def test_the_file_is_written_after_each_run(
    accuracy: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    group = accuracy.Group("Two", "sparsity=0.5", {"a": "method=a", "b": "method=b"})
    monkeypatch.setitem(accuracy.REPORTS, "digits", accuracy.Report("T", "About.", "python it", "t.md", (group,)))
    metrics = {"test/acc": 0.5, "val/acc": 0.5, "sparsity/total": 0.5, "seconds": 1.0}

    def stopped(todo: list[tuple[str, ...]], *_: object):  # type: ignore[no-untyped-def]
        yield todo[0], metrics
        raise RuntimeError("stopped")

    monkeypatch.setattr(accuracy, "results", stopped)
    monkeypatch.setattr(sys, "argv", ["accuracy.py", "--seeds", "1", "--out", str(tmp_path / "new" / "t.md")])
    with pytest.raises(RuntimeError, match="stopped"):
        accuracy.main()
    written = (tmp_path / "new" / "t.md").read_text()
    assert "| a | 50.00 %" in written
    assert "| b | not run yet" in written
    assert "python it" in written
