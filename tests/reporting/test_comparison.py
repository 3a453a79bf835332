"""What a comparison finds, and the page, Markdown and CSV of it."""

import csv
import html.parser
import re
from collections.abc import Sequence
from pathlib import Path

import pytest
from support.pages import read_page, refuse_faults
from support.recorded import recorded

from sparse_callbacks.core.record.record_file import append_rows
from sparse_callbacks.reporting import comparison_command
from sparse_callbacks.reporting.compared_runs import ComparedRun
from sparse_callbacks.reporting.compared_settings import Problem, Setting
from sparse_callbacks.reporting.comparison import (
    COMPARED_AXES,
    best_run,
    best_setting,
    compared,
    front,
    rank_correlations,
    transposed,
    validation_metric,
)
from sparse_callbacks.reporting.comparison_page import notes, write_comparison
from sparse_callbacks.reporting.comparison_tables import method_correlations, settings_table, sparsity_table


def setting(line: str, accuracies: Sequence[float], sparsity: float, flops: float = 1.0) -> Setting:
    costs = {"sparsity/total": sparsity, "flops/training": flops}
    values = [{"test/acc": accuracy, "test/loss": 1 - accuracy} | costs for accuracy in accuracies]
    runs = [ComparedRun(Path(f"{line}{seed}"), line, seed, {}, {}, each) for seed, each in enumerate(values)]
    return Setting(line, line, sparsity, sparsity, runs)


def problem(*settings: Setting) -> Problem:
    return Problem("digits, mlp", settings, {}, [])


# ---------------------------------------------------------------------- findings


def test_fronts_take_means_costs_downwards_and_losses_downwards() -> None:
    a, b, c = setting("A", [0.9, 0.8], 0.9, 30), setting("B", [0.84], 0.95, 20), setting("C", [0.84], 0.9, 25)
    given = problem(a, b, c)
    assert front(given, "test/acc", COMPARED_AXES["sparsity"]) == [a, b]
    assert front(given, "test/acc", COMPARED_AXES["training"]) == [b, a]
    assert front(given, "test/loss", COMPARED_AXES["sparsity"]) == [a, b]
    assert front(given, "test/acc", COMPARED_AXES["inference"]) == []  # nobody has recorded it


def test_the_best_is_the_largest_accuracy_and_the_smallest_loss() -> None:
    a, b = setting("A", [0.9, 0.7], 0.9), setting("B", [0.85, 0.84], 0.9)
    assert best_setting([a, b], "test/acc") is b
    assert best_setting([a, b], "test/loss") is b
    assert best_setting([a, b], "test/f1") is None
    assert best_run([*a.runs, *b.runs], "test/loss") is a.runs[0]
    assert validation_metric("test/acc") == "val/acc"
    assert validation_metric("accuracy") is None


def test_rank_correlations_need_three_shared_settings() -> None:
    rows = {"A": {0.9: 3.0, 0.95: 2.0, 0.98: 1.0}, "B": {0.9: 1.0, 0.95: 2.0, 0.98: 3.0}, "C": {0.9: 1.0, 0.95: 2.0}}
    found = rank_correlations(rows)
    assert found == {("A", "B"): pytest.approx(-1), ("B", "A"): pytest.approx(-1)}


def test_tables_mark_the_best_and_give_differences_in_points() -> None:
    given = problem(
        Setting("dense", "dense", None, 0.0, setting("dense", [0.95], 0.0).runs),
        setting("A", [0.9, 0.8], 0.9), setting("A", [0.7], 0.95), setting("B", [0.84], 0.9), setting("B", [0.8], 0.95),
    )  # fmt: skip
    by_sparsity = sparsity_table(given, "test/acc")
    assert by_sparsity is not None
    assert by_sparsity.rows == [["A", "85.00 ± 7.07", "70.00"], ["B", "84.00", "80.00"], ["dense", "95.00", ""]]
    assert by_sparsity.best == {(0, 1), (1, 2)}
    every = settings_table(given, "test/acc")
    assert [row[every.head.index("to dense")] for row in every.rows] == ["-", "-10.00", "-25.00", "-11.00", "-15.00"]
    assert "speedup" not in every.head  # nobody has recorded it
    assert method_correlations(given, "test/acc") is None  # two sparsities say nothing


# ---------------------------------------------------------------------- files


class Page(html.parser.HTMLParser):
    """What a page consists of."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.headings: list[int] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if re.fullmatch(r"h\d", tag):
            self.headings.append(int(tag[1]))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine runs of three methods on one data set, two dense ones on another, and one that has failed."""
    folder = tmp_path_factory.mktemp("runs")
    number = 0
    for method in ("RigL", "SET", "<b>&"):
        for sparsity in (0.9, 0.95, 0.98):
            accuracy = 0.99 - sparsity / 10 - len(method) / 100
            arguments = {"sparsity": str(sparsity)}
            results = {"test/acc": accuracy, "test/acc5": accuracy + 0.01, "val/acc": accuracy}
            recorded(
                folder / str(number), method, sparsity, 0, 40, arguments=arguments, configuration={}, results=results
            )
            number += 1
    other = {"seed": 0, "data": {"_target_": "x.mnist"}, "model": {"_target_": "x.<i>"}}
    recorded(folder / "dense", "dense", seed=0, steps=40, configuration=other)
    recorded(folder / "bad", status="failed", results={})
    return folder


@pytest.fixture(scope="module")
def files(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    out = tmp_path_factory.mktemp("out")
    written = write_comparison(compared([folder], axis="training"), out, [folder])
    return {path.name: path.read_text() for path in written}


def test_the_page_stands_alone_and_is_in_order(files: dict[str, str]) -> None:
    text = files["compare.html"]
    page = Page(text)
    ids = [value for name, value in page.attributes if name == "id"]
    assert len(ids) == len(set(ids))
    assert "script" not in page.tags
    assert not re.search(r"https?://|url\(['\"]?[^#'\")]", text)
    assert page.headings[0] == 1
    assert all(after <= before + 1 for before, after in zip(page.headings, page.headings[1:], strict=False))
    assert len(text) < 1_000_000


def test_the_page_of_a_comparison_has_no_faults(tmp_path: Path) -> None:
    recorded(tmp_path / "0")
    refuse_faults(read_page(write_comparison(compared([tmp_path]), tmp_path, [tmp_path])[0]))


def test_the_page_has_the_figures_of_every_axis_and_a_legend(files: dict[str, str]) -> None:
    labels = [value for name, value in Page(files["compare.html"]).attributes if name == "aria-label"]
    drawn = [label for label in labels if " against FLOPs" in label or " against sparsity" in label]
    assert len(drawn) == 3 + 2  # a dense run has no place on the axis of sparsity
    assert "against FLOPs of the whole training" in drawn[0]  # the axis that was asked for
    assert sum("colours and markers" in label for label in labels) == 2
    assert "Not drawn, as no run has it: sparsity of the sparse layers." in files["compare.html"]


def test_names_of_users_are_text(files: dict[str, str]) -> None:
    assert "&lt;b&gt;&amp;" in files["compare.html"]
    tags = Page(files["compare.html"]).tags
    assert (tags.count("i"), tags.count("b")) == (0, 3)  # three facts below the title


def test_the_markdown_has_whole_tables(files: dict[str, str]) -> None:
    text = files["compare.md"]
    lines = text.splitlines()
    tables = [line for line in lines if line.startswith("|")]
    blocks = re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE)
    assert len(blocks) == 7  # by sparsity, settings, two rank correlations, runs; settings and runs of the dense one
    assert all(len({line.count("|") for line in block.splitlines()}) == 1 for block in blocks)
    assert any("**" in line for line in tables)
    assert "- Left out:" in text
    assert "2 data sets and models are kept apart" in text
    assert "Pareto front against training FLOPs: " in text


def test_the_csv_files_have_every_setting_and_every_run(files: dict[str, str]) -> None:
    settings = list(csv.DictReader(files["compare.csv"].splitlines()))
    runs = list(csv.DictReader(files["compare_runs.csv"].splitlines()))
    assert len(settings) == len(runs) == 10
    assert {row["method"] for row in settings} == {"RigL", "SET", "<b>&", "dense"}
    by_method = {(row["method"], row["target"]): row for row in settings}
    assert float(by_method["RigL", "0.9"]["test/acc mean"]) == pytest.approx(0.99 - 0.09 - 0.04)
    assert by_method["RigL", "0.9"]["test/acc sd"] == ""
    assert all(float(row["flops/training"]) > 0 for row in runs)


def test_no_table_has_two_columns_of_one_name(tmp_path: Path) -> None:
    """Whatever is compared by, and whatever the results are called."""
    for number, level in enumerate((0.99991, 0.99992)):
        results = {"test/acc": 0.9, "seed": 3.0, "folder": 1.0, "compression": 2.0, "target": 0.5}
        recorded(
            tmp_path / str(number), "SET", level, arguments={"sparsity": str(level)}, configuration={}, results=results
        )
    recorded(tmp_path / "2", "SMCP", arguments={"budget": "0.5"}, configuration={}, results={"test/acc": 0.5})
    for metric in ("test/acc", "sparsity/total", "compression", "flops/training", "seed", "target"):
        found = compared([tmp_path], metric)
        assert len(found.runs) > 1
        for path in write_comparison(found, tmp_path, [tmp_path]):
            if path.suffix == ".csv":
                lines = path.read_text().splitlines()
                head = next(csv.reader(lines))
                assert len(set(head)) == len(head) == len(next(csv.DictReader(lines)))
            if path.suffix == ".md":
                heads = re.findall(r"^(\|.*)\n\| ---", path.read_text(), re.MULTILINE)
                columns = [[cell.strip() for cell in head.strip("|").split("|")] for head in heads]
                assert columns
                assert all(len(set(each)) == len(each) for each in columns), columns
    runs = list(csv.DictReader((tmp_path / "compare_runs.csv").read_text().splitlines()))
    assert {(row["seed"], row["metric seed"]) for row in runs} == {("0", "3.0")}
    assert transposed({"A": {0.99991: 1.0, 0.99992: 2.0}, "B": {0.99991: 3.0}}) == {
        "0.99991": {"A": 1.0, "B": 3.0},
        "0.99992": {"A": 2.0},
    }


def test_one_run_is_not_called_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recorded(tmp_path / "0")
    comparison_command.compare_main([str(tmp_path)])
    said = capsys.readouterr().out + (tmp_path / "compare.md").read_text() + (tmp_path / "compare.html").read_text()
    assert ": 1 setting\n" in said
    assert not re.search(r"\b1 (runs|settings|seeds)\b", said)
    assert "One run each, so without a standard deviation" in said


def test_few_seeds_and_what_is_left_out_are_noted(folder: Path) -> None:
    found = notes(compared([folder]))
    assert any("bad: has no results" in line for line in found)
    assert any("9 of 9 settings have fewer than 3 seeds" in line for line in found)


def test_equal_settings_and_single_points_can_be_drawn(tmp_path: Path) -> None:
    for seed in range(2):
        recorded(tmp_path / str(seed), seed=seed, steps=20, results={"test/acc": 0.5})
    assert (write_comparison(compared([tmp_path]), tmp_path, [tmp_path]))[0].stat().st_size > 10_000


# ---------------------------------------------------------------------- the command


def test_the_command_says_what_it_wrote_and_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    comparison_command.compare_main(
        [str(folder), str(tmp_path / "x.csv"), "--out", str(tmp_path / "new/out"), "--x", "inference"]
    )
    printed = capsys.readouterr()
    assert "best sparse setting: " in printed.out
    assert "not there" in printed.err
    assert {path.name for path in (tmp_path / "new/out").iterdir()} == {
        "compare.html", "compare.md", "compare.csv", "compare_runs.csv",
    }  # fmt: skip
    # a page among runs is no run
    comparison_command.compare_main([str(folder)])
    assert (folder / "compare.html").is_file()


def test_the_command_refuses_what_holds_no_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        comparison_command.compare_main([str(tmp_path)])
    assert "no run to compare" in capsys.readouterr().err
    with pytest.raises(ValueError, match=r"axis='time' is not known. Choose one of sparsity, inference, training"):
        compared([tmp_path], axis="time")
    with pytest.raises(ValueError, match="no run to compare"):
        write_comparison(compared([tmp_path]), tmp_path, [])


def test_runs_that_were_not_tested_are_compared_by_their_validation(tmp_path: Path) -> None:
    """As those of a Trainer that is never asked to test."""
    recorded(tmp_path / "a", results={"val/acc": 0.8})
    recorded(tmp_path / "b", method="SET", results={"val/acc": 0.7})
    found = compared([tmp_path])
    assert (found.metric, len(found.runs)) == ("val/acc", 2)
    recorded(tmp_path / "c", method="GMP", results={"val/acc": 0.7, "test/acc": 0.6})
    assert (compared([tmp_path]).metric, len(compared([tmp_path]).runs)) == ("test/acc", 1)


def test_without_matplotlib_the_command_names_the_extra(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(SystemExit, match="2"):
        comparison_command.compare_main([str(folder), "--out", str(tmp_path)])
    assert "pip install 'sparse-callbacks[report]'" in " ".join(capsys.readouterr().err.split())


def test_any_record_can_be_compared(tmp_path: Path) -> None:
    """Rows without figures, without layers, with null, and none at all."""
    odd = [
        {
            "step": 0,
            "event": "end",
            "layers": {"net.0.weight": {"churn": 0.1}},
            "flops/inference": None,
            "sparsity/total": 1.0,
        },
        {"step": 1, "event": "end", "layers": {}, "flops/training": 0},
        {"step": 2, "event": "end", "layers": {"net.0.weight": {"active": 1920}}, "flops/inference_dense": 5},
    ]
    for number, rows in enumerate([odd, odd[:1], odd[1:2], []]):
        folder = recorded(tmp_path / str(number), seed=number, configuration={"seed": "x" if number else number})
        (folder / "record" / "rows.jsonl").unlink()
        append_rows(folder, rows)
    text = write_comparison(compared([tmp_path]), tmp_path, [tmp_path])[0].read_text()
    assert "Comparison of 4 runs" in text
    assert "FLOPs of inference for one sample, FLOPs of the whole training." in text
