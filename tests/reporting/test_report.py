"""The page of a recorded run: its sections, what it says, what it refuses, and that any record gives one."""

import json
import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.figure import Figure
from support.pages import Page, read_page, refuse_faults
from support.recorded import SHAPES, recorded

import sparse_callbacks.report
from sparse_callbacks.core.record.record_file import (
    LayerRecord,
    RecordedRun,
    RunRecord,
    append_rows,
    read_record,
    write_masks,
    write_run,
)
from sparse_callbacks.reporting import gains, pictures, tables
from sparse_callbacks.reporting.page import figures, write_report
from sparse_callbacks.reporting.report_command import main

SECTIONS = [
    "What was gained", "Sparsity and accuracy over time", "Layers over time", "What moved", "Training FLOPs", "Masks",
    "Dead units", "Plan", "Channels before and after", "Configuration", "How to reproduce it",
]  # fmt: skip
NASTY = "_\\1\\g<2>\u4e2d<i>&\"'$x_1${{ 7*7 }}</style><script>alert(1)</script>"
CHANNELS = {
    "before": {"parameters": 1000, "flops": 5440, "latency": 2.0},
    "after": {"parameters": 250, "flops": 272, "latency": 1.0},
    "samples": 8,
    "groups": [{"name": "net.0", "units": 30, "removed": 12, "reason": f"the rest is read {NASTY}"}],
    "proof": "outputs in float64: the same",
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("run"), channels=CHANNELS, warnings=["Layer a has collapsed. Use erk."])


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return recorded(tmp_path_factory.mktemp("dense"), method="dense")


@pytest.fixture(scope="module")
def page(run: Path, dense: Path) -> Page:
    return read_page(write_report(run, dense))


def test_the_sections_stand_in_their_order_on_a_page_that_needs_nothing_else(page: Page) -> None:
    refuse_faults(page)
    assert [text for level, text in page.headings if level == 2] == ["Warning", *SECTIONS]
    assert page.headings[0] == (1, "RigL at sparsity 0.9")
    assert len(page.source) < 3_000_000


def test_a_page_says_what_was_gained_beside_the_dense_run(page: Page) -> None:
    assert "test/acc 87.20 % dense run: 89.00 %" in page.text
    assert "zeros 90 % of the sparse layers; whole model 90.2 %" in page.text
    assert "inference FLOPs 544 10 x fewer than dense; slim network: 272" in page.text
    assert "training FLOPs 20.9 M 10 x fewer than dense" in page.text
    assert "latency of 8 samples, slim network 1 ms masked: 2 ms" in page.text
    assert "test/acc 87.20 % 89.00 % -1.80 points" in page.text
    assert "weights in the sparse layers 272 2,720 10 x fewer" in page.text
    assert "FLOPs of the training, beside the dense run 20.9 M 209 M 10 x fewer" in page.text
    assert "latency of 8 samples, slim beside masked 1 ms 2 ms 2 x faster" in page.text
    # of one sample, as all FLOPs of the page: a record holds those of slimming so
    assert "FLOPs of one sample at inference 544 5,440 10 x fewer" in page.text
    assert "… of the slim network 272 5,440 20 x fewer" in page.text
    assert "FLOPs of one sample at inference 5,440 272 20 x fewer latency of 8 samples 2 ms 1 ms" in page.text


def test_a_page_tells_plan_channels_configuration_and_command(page: Page) -> None:
    assert "net.2.weight 20 x 30 600 90 % 90 % 60" in page.text
    assert "net.0.bias 30 30 a vector" in page.text
    assert "parameters 1,000 250 4 x fewer" in page.text
    assert "net.0 30 12 18" in page.text
    assert "outputs in float64: the same" in page.text
    assert "model._target_=mlp" in page.text
    assert "python train.py method=rigl" in page.text
    assert "updates of the masks start 0, stop 150, every 20 (optimizer steps)" in page.text


def test_lines_that_are_wider_than_a_phone_break_or_show_that_they_scroll(page: Page) -> None:
    classes = [str(given.get("class") or "") for tag, given in page.attributes if tag == "pre"]
    assert classes == ["", "tall", "wrapped", "columns", "wrapped"]  # plan, proof, method, configuration, command
    assert (
        "pre.columns { columns: 340px 3; column-gap: 28px; white-space: pre-wrap; overflow-wrap: anywhere; }"
        in page.source
    )
    assert "overflow-wrap: normal" not in page.source
    (rule,) = re.findall(r"\.scroll, pre \{(.*?)\}", page.source.partition("@media print")[0], re.DOTALL)
    assert rule.count("var(--shade)") == rule.count(" local") == rule.count(" scroll") == 2


def test_warnings_stand_before_everything_else(page: Page) -> None:
    assert page.text.index("Layer a has collapsed. Use erk.") < page.text.index("test/acc")


def test_curves_are_drawn_against_whatever_is_chosen(page: Page) -> None:
    chosen = [given for given in page.all("input") if given["name"] == "x"]
    assert [given["id"] for given in chosen] == ["x-steps", "x-epochs", "x-samples", "x-flops"]
    assert [given["id"] for given in chosen if "checked" in given] == ["x-steps"]
    labels = [str(given["aria-label"]) for given in page.all("svg")]
    for axis in ("optimizer steps", "epochs", "samples", "training FLOPs"):
        # with the dense run's own places on that axis
        assert f"Accuracy against {axis}: val/acc from 49.8 % to 88.2 %; dense: val/acc from 50 % to 90 %" in [
            label.replace("48.2", "49.8") for label in labels
        ]
    for axis in ("steps", "epochs", "samples", "flops"):
        assert f":root:has(#x-{axis}:checked) .x-{axis} {{ display: block; }}" in page.source
    shown = [given for tag, given in page.attributes if tag == "div" and "by-x" in str(given.get("class"))]
    assert {str(given["class"]).split("x-")[-1] for given in shown} == {"steps", "epochs", "samples", "flops"}


def test_drawings_take_the_colours_of_the_page(page: Page) -> None:
    drawn = page.source[page.source.index("<svg") :]
    assert "currentColor" in drawn
    assert "var(--grid)" in drawn
    assert "#1b1f26" not in drawn
    assert "font-family" not in drawn


@pytest.fixture(scope="module")
def drawn(run: Path, dense: Path) -> list[pictures.Picture]:
    return [p for section in pictures.pictures(read_record(run), read_record(dense)).values() for p in section]


def test_figures_are_written_as_png_under_names_that_say_what_they_are(
    run: Path, page: Page, drawn: list[pictures.Picture]
) -> None:
    names = {path.stem for path in (run / "report").glob("*.png")}
    assert {"sparsity", "accuracy", "loss", "churn", "training_flops", "layers_churn", "mask_net.0.weight"} <= names
    assert names == {p.name for p in drawn}
    for path in (run / "report").glob("*.png"):
        assert path.read_bytes()[:4] == b"\x89PNG"


def test_a_dense_run_has_a_page_that_says_what_it_lacks(dense: Path) -> None:
    page = read_page(write_report(dense, png=False))
    refuse_faults(page)
    assert page.headings[0] == (1, "Dense run")
    assert page.text.count("A dense run has no masks.") >= 3
    assert "latency not measured" in page.text
    assert "Nothing was slimmed." in page.text


def test_names_and_values_of_users_are_texts_and_nothing_else(tmp_path: Path) -> None:
    layers = [LayerRecord(NASTY + "a", (4, 4), True, 0.5, NASTY, 1), LayerRecord(NASTY + "b", (4, 4), True, 0.5, "", 1)]
    folder = recorded(
        tmp_path, layers=layers, method=NASTY, arguments={NASTY: NASTY}, configuration={NASTY: {NASTY: [NASTY]}}, command=NASTY,
        plan=NASTY, libraries={NASTY: NASTY}, machine={NASTY: NASTY}, warnings=[NASTY], title=NASTY, chain_reason=NASTY, chain=[],
        channels={"proof": NASTY, "groups": [{"name": NASTY}]}, results={NASTY: 0.5, f"acc{NASTY}": 0.25}, calendar={NASTY: 3},
    )  # fmt: skip
    row = {"step": 300, NASTY: 1.0, f"acc{NASTY}": 0.5, "layers": {NASTY + "a": {"active": 3, "dead_in": 1}}}
    rewrite(folder, [row])
    write_masks(folder, {NASTY + "a": {"first": torch.ones(4, 4).bool(), "last": torch.eye(4).bool()}})
    page = read_page(write_report(folder))
    refuse_faults(page)
    assert not page.all("i")
    assert page.headings[0] == (1, NASTY)
    assert page.text.count(NASTY) >= 12
    # pictures have names that are files in their folder, whatever the layers are called
    assert all(path.parent == folder / "report" for path in (folder / "report").rglob("*.png"))


def without_rows(folder: Path) -> None:
    (folder / "record" / "rows.jsonl").unlink()


def with_one_row(folder: Path) -> None:
    rewrite(
        folder,
        [
            {
                "step": 3,
                "sparsity/total": 0.9,
                "val/acc": 0.5,
                "topology/churn": 0.1,
                "layers": {"net.0.weight": {"active": 3}},
            }
        ],
    )


def with_nothing_in_its_rows(folder: Path) -> None:
    rows = [{**dict.fromkeys(row), "step": row["step"], "layers": {}} for row in read_record(folder).rows]
    rewrite(folder, rows)


def with_bare_rows(folder: Path) -> None:
    rewrite(folder, [{"step": 0}, {"step": 1}])


def rewrite(folder: Path, rows: list[dict[str, Any]]) -> None:
    (folder / "record" / "rows.jsonl").unlink()
    append_rows(folder, rows)


@pytest.mark.parametrize("change", [without_rows, with_one_row, with_nothing_in_its_rows, with_bare_rows])
def test_a_run_with_few_figures_has_every_section_with_a_reason(tmp_path: Path, change: Callable[[Path], None]) -> None:
    folder = recorded(tmp_path)
    change(folder)
    page = read_page(write_report(folder, png=False))
    refuse_faults(page)
    assert [text for level, text in page.headings if level == 2] == SECTIONS
    if change is not with_one_row:
        assert "not recorded" in page.text
        assert page.text.count("No row holds") + page.text.count("The record has no rows") >= 5


def test_a_run_that_records_nothing_but_its_method_has_a_page(tmp_path: Path) -> None:
    write_run(tmp_path, RunRecord("Static", {}, [], ""))
    page = read_page(write_report(tmp_path))
    refuse_faults(page)
    assert "The record names no parameter." in page.text
    assert "status running" in page.text


def large(folder: Path, layers: int = 300, rows: int = 40, **said: Any) -> Path:
    """The record of a run with many layers, convolutions among them."""
    shapes = {f"backbone.stage{i // 30}.block{i % 30}.conv.weight": (64, 32, 3, 3) for i in range(layers)}
    records = [LayerRecord(name, shape, True, 0.9, "", 64) for name, shape in shapes.items()]
    folder = recorded(folder, layers=records, steps=20, **said)
    source = torch.Generator().manual_seed(0)
    made = []
    for step in range(rows):
        figures = {
            name: {
                "active": 1843 - i, "churn": 0.3 * (1 - step / rows), "distance_first": step / rows, "ever_active": 0.2,
                "fan_in": [1, 20.5, 60], "fan_out": [0, 10, 20], "dead_in": i % 3, "dead_out": 0, "on_no_path": None,
            }
            for i, name in enumerate(shapes)
        }  # fmt: skip
        made.append({"step": 40 + step, "epoch": step / 10, "val/acc": 0.5, "sparsity/total": 0.9, "layers": figures})
    append_rows(folder, made)
    masks = {
        name: {when: torch.rand(shape, generator=source) < 0.1 for when in ("first", "last")}
        for name, shape in list(shapes.items())[:20]
    }
    write_masks(folder, masks)
    return folder


def test_a_long_run_of_300_layers_has_a_page_of_a_fair_size_with_few_drawings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    configuration = {f"key{i}": "value" * 20 for i in range(20_000)}
    folder = large(tmp_path, configuration=configuration, plan="p" * 2_000_000)
    append_rows(folder, [{"step": i, "epoch": i / 9, "val/acc": math.sin(i)} for i in range(200, 6_000)])
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(
        Figure, "savefig", lambda self, *given, **named: (drawn.append(named["format"]), save(self, *given, **named))
    )
    path = write_report(folder)
    # a drawing takes up to 30 ms, and all time is theirs: a page may take 5 s, which a test beside others cannot measure
    assert drawn.count("png") == len(list((folder / "report").iterdir())) <= 30
    assert drawn.count("svg") <= 75
    assert path.stat().st_size < 3_000_000
    page = read_page(path)
    refuse_faults(page)
    assert "backbone.stage9.block29.conv.weight" in page.text
    assert "1 / 20.5 / 60" in page.text
    assert "12 of 20 masks in the record are shown" in page.text


def test_tables_of_thousands_of_layers_are_cut() -> None:
    layers = [LayerRecord(f"layer{i}.weight", (8, 8), True, 0.5, "", 1) for i in range(3000)]
    table = tables.plan_table(RecordedRun(Path("run"), RunRecord("RigL", {}, layers, ""), []))
    assert (len(table.rows), table.left_out) == (400, 2600)


def test_another_kind_of_run_is_not_taken_for_the_dense_one(run: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"is a run of RigL and not a dense one\. Give the folder of a dense run"):
        write_report(run, run)
    with pytest.raises(FileNotFoundError, match="holds no record of a run"):
        write_report(tmp_path)


def test_the_missing_extra_is_named(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'sparse-callbacks\[report\]'"):
        write_report(run)


def test_the_command_writes_what_it_can_and_says_what_it_cannot(
    tmp_path: Path, dense: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = recorded(tmp_path / "run", steps=20)
    with_bare_rows(folder)
    (tmp_path / "other").mkdir()
    with pytest.raises(SystemExit, match="2"):
        main([str(tmp_path / "other"), str(folder), "--dense", str(dense), "--no-pictures"])
    told = capsys.readouterr()
    assert told.out == f"{folder / 'report.html'}\n"
    assert f"python -m sparse_callbacks.report: {tmp_path / 'other'} holds no record of a run" in told.err
    assert not (folder / "report").exists()
    with pytest.raises(SystemExit, match="2"):
        main([str(folder), "--dense", str(tmp_path / "other")])
    assert "holds no record. Give the folder of a dense run" in capsys.readouterr().err


def test_the_command_is_a_module_of_the_root(capsys: pytest.CaptureFixture[str]) -> None:
    assert sparse_callbacks.report.main is main
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "--dense RUN" in capsys.readouterr().out


KEYS = [
    "step", "epoch", "samples", "seconds", "event", "sparsity/total", "sparsity/model", "flops/inference", "flops/training",
    "flops/training_dense", "flops/passes", "active/mean", "bytes/masks", "topology/churn", "val/acc", "a <metric>", "loss",
]  # fmt: skip
ODD = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**18),
    st.floats(-1e300, 1e300),
    st.text(max_size=5),
    st.lists(st.integers()),
)
FIGURES = st.dictionaries(
    st.sampled_from(["active", "churn", "dead_in", "dead_out", "on_no_path", "fan_in", "fan_out", "ever_active"]), ODD
)
ROWS = st.lists(
    st.builds(
        lambda row, step, layers: {**row, "step": step, "layers": layers},
        st.dictionaries(st.sampled_from(KEYS), ODD, max_size=6),
        st.integers(0, 10**9),
        st.one_of(st.none(), st.dictionaries(st.sampled_from(list(SHAPES)), FIGURES | ODD)),
    ),
    max_size=5,
)


@settings(max_examples=6, deadline=None)
@given(ROWS)
def test_any_record_gives_a_page(tmp_path_factory: pytest.TempPathFactory, rows: list[dict[str, Any]]) -> None:
    folder = recorded(tmp_path_factory.mktemp("any"), steps=20)
    rewrite(folder, sorted(rows, key=lambda row: row["step"]))
    page = read_page(write_report(folder, png=False))
    refuse_faults(page)
    assert [text for level, text in page.headings if level == 2] == SECTIONS


@settings(max_examples=200, deadline=None)
@given(ROWS, st.dictionaries(st.sampled_from(["before", "after", "groups", "proof"]), ODD))
def test_any_record_gives_tables(rows: list[dict[str, Any]], channels: dict[str, Any]) -> None:
    layers = [LayerRecord(name, shape, True, None, "", None) for name, shape in SHAPES.items()]
    said = RunRecord("RigL", {}, layers, "yesterday", channels=channels)
    run = RecordedRun(Path("run"), said, json.loads(json.dumps(rows)))
    assert tables.plan_table(run).rows
    assert gains.tiles(run, replace(run, run=replace(said, method="dense")))
    made = (tables.dead_table(run), tables.cost_table(run), tables.group_table(run), tables.reproduction_table(run))
    for table in filter(None, made):
        assert all(len(row) == len(table.head) for row in table.rows)
        assert all(isinstance(cell, str) for row in table.rows for cell in row)
    assert all(
        isinstance(text, str) for given in gains.gains(run, run).values() for g in given for text in vars(g).values()
    )


def test_every_picture_has_a_description_and_its_own_name(drawn: list[pictures.Picture]) -> None:
    assert len({p.name.lower() for p in drawn}) == len(drawn)
    assert all(len(p.label) > 20 for p in drawn)


def test_figures_are_given_by_their_names(tmp_path: Path) -> None:
    folder = recorded(tmp_path, steps=20)
    with_one_row(folder)
    write_masks(folder, {})
    found = figures(read_record(folder))
    assert list(found) == ["sparsity", "accuracy", "layers_sparsity", "churn"]
    assert found["sparsity"].axes[0].get_title(loc="left") == "Sparsity"
