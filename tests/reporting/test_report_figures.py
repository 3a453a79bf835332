"""What pages are made of: readable numbers, curves of rows with gaps, heat maps, pictures of masks, and their style."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from support.pages import read_page
from support.recorded import recorded

from sparse_callbacks.core.record.record_file import LayerRecord, RecordedRun, RunRecord, append_rows, read_record
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.charts import Chart, Line, chart_figure, chart_label
from sparse_callbacks.reporting.gains import gains, main_metric, tiles
from sparse_callbacks.reporting.heat_maps import HeatMap, heat_map_figure, heat_map_label, heat_maps, short_names
from sparse_callbacks.reporting.mask_pictures import SIDE, STATES, as_picture, input_picture, mask_picture
from sparse_callbacks.reporting.page import write_report
from sparse_callbacks.reporting.run_charts import dead_charts, movement_charts, progress_charts
from sparse_callbacks.reporting.series import POINTS, curve, events_of, metrics, thinned
from sparse_callbacks.reporting.style import METHODS, colour, drawing, figure_svg, marker


def of_rows(rows: list[dict[str, Any]], method: str = "RigL", **said: Any) -> RecordedRun:
    return RecordedRun(Path("run"), RunRecord(method, {}, **{"layers": [], "started": "", **said}), rows)


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (readable.count, 0, "0"),
        (readable.count, 9999, "9,999"),
        (readable.count, 12_345_678, "12.3 M"),
        (readable.count, 999_999, "1 M"),
        (readable.count, 1.5e16, "15 P"),
        (readable.count, -2.5e6, "-2.5 M"),
        (readable.count, float("inf"), "not recorded"),
        (readable.tick, 0.1025, "0.1025"),
        (readable.tick, 2000, "2,000"),
        (readable.size, 512, "512 B"),
        (readable.size, 4_200_000, "4.2 MB"),
        (readable.share, 0.5, "50 %"),
        (readable.share, 0.99987, "99.987 %"),
        (readable.share, 0.0001, "0.01 %"),
        (readable.share, 1.0, "100 %"),
        (readable.seconds, 0.25, "0.25 s"),
        (readable.seconds, 59.99, "1 min"),
        (readable.seconds, 250, "4 min 10 s"),
        (readable.seconds, 3599.9, "1 h"),
        (readable.seconds, 7500, "2 h 5 min"),
        (readable.moment, "2026-01-02T03:04:05+00:00", "2026-01-02 03:04 UTC"),
        (readable.moment, "2026-01-02T03:04:05+02:00", "2026-01-02 03:04 +0200"),
        (readable.moment, "yesterday", "yesterday"),
    ],
)
def test_numbers_are_written_as_people_read_them(write: Any, value: Any, text: str) -> None:
    assert write(value) == text


@pytest.mark.parametrize("write", [readable.count, readable.tick, readable.size, readable.share, readable.seconds])
def test_a_number_that_nobody_knows_is_said_to_be_unknown(write: Any) -> None:
    assert write(None) == write(math.nan) == "not recorded"


def test_how_many_times_fewer_is_said_where_both_are_known() -> None:
    assert readable.fewer(10, 41, "dense") == f"4.1 {readable.TIMES} fewer than dense"
    assert readable.fewer(12, 10) == f"1.2 {readable.TIMES} more"
    assert readable.fewer(1, 2, words=("faster", "slower")) == f"2 {readable.TIMES} faster"
    assert readable.fewer(10, 10, "dense") == "the same as dense"
    for value, reference in ((0, 1), (1, 0), (None, 1), (1, None), (-1, 1)):
        assert readable.fewer(value, reference) == ""


def test_accuracies_are_percent_and_losses_are_numbers() -> None:
    assert readable.score("val/acc", 0.9312) == "93.12 %"
    assert readable.score("val/acc", 93.12) == "93.12"
    assert readable.score("val/loss", 0.5) == "0.5"


def test_gaps_of_rows_leave_no_points() -> None:
    rows = [{"step": 0, "a": None}, {"step": 1, "a": 2.0}, {"a": 3.0}, {"step": 3, "a": True}, {"step": 4, "a": "5"}]
    assert curve(of_rows(rows), "a") == ([1], [2.0])
    assert metrics(of_rows(rows)) == ["a"]


def test_long_curves_keep_their_ends() -> None:
    xs, _ = curve(of_rows([{"step": step, "a": 0.5} for step in range(10_001)]), "a")
    assert len(xs) == POINTS
    assert (xs[0], xs[-1]) == (0, 10_000)
    assert thinned([1, 2, 3], 3) == [1, 2, 3]


def test_metrics_of_validations_are_not_drawn_where_rows_repeat_them() -> None:
    rows = [
        {"step": 1, "event": "validation", "val/acc": 0.1, "lr": 1.0},
        {"step": 2, "event": "log", "val/acc": 0.1, "lr": 0.5},
        {"step": 3, "event": "validation", "val/acc": 0.3, "lr": 0.5},
        {"step": 4, "event": "end", "val/acc": 0.3, "lr": 0.25},
    ]
    run = of_rows(rows)
    assert curve(run, "val/acc", events=events_of(run, "val/acc")) == ([1, 3, 4], [0.1, 0.3, 0.3])
    assert curve(run, "lr", events=events_of(run, "lr")) == ([1, 2, 3, 4], [1.0, 0.5, 0.5, 0.25])
    # a loss of an epoch is repeated until the next one
    rows = [{"step": step, "loss": loss} for step, loss in enumerate([3.0, 3.0, 2.0, 2.0, 2.0, 1.0, 1.0])]
    assert curve(of_rows(rows), "loss", repeated=False) == ([0, 2, 5, 6], [3.0, 2.0, 1.0, 1.0])
    # a run without validations has all of its points
    assert events_of(of_rows([{"step": 1, "event": "log", "loss": 1.0}]), "loss") == ()


def test_learning_rates_share_a_chart_and_other_metrics_do_not() -> None:
    rows = [{"step": 1, "train/lr": 0.1, "lr-SGD/pg1": 0.2, "lr-SGD/pg2": 0.3, "colr": 1.0, "train/grad_norm": 2.0}]
    charts = {chart.title: [line.label for line in chart.lines] for chart in progress_charts(of_rows(rows), None)}
    assert charts["Learning rate"] == ["train/lr", "lr-SGD/pg1", "lr-SGD/pg2"]
    assert charts["colr"] == ["colr"]
    assert charts["train/grad_norm"] == ["train/grad_norm"]


def test_lines_of_zeros_are_sentences(tmp_path: Path) -> None:
    rows = [
        {"step": step, "topology/distance_first": 0.0, "topology/dead_units": 0, "topology/churn": 0.0}
        for step in (0, 9)
    ]
    still = of_rows(rows, method="Static")
    assert movement_charts(still) == dead_charts(still) == []
    moved = of_rows([*rows, {"step": 10, "topology/distance_first": 0.1, "topology/dead_units": 1}])
    assert len(movement_charts(moved)) == 4
    assert len(dead_charts(moved)) == 1
    folder = recorded(tmp_path, method="Static", steps=20)
    (folder / "record" / "rows.jsonl").unlink()
    append_rows(folder, rows)
    text = read_page(write_report(folder, png=False)).text
    assert "The masks stayed as they began." in text
    assert "Every unit had active inputs" in text


def test_the_main_metric_is_an_accuracy_of_tests_if_there_is_one() -> None:
    rows = [{"step": 1, "train/loss": 1.0, "val/loss": 2.0, "train/acc": 0.3, "val/acc": 0.4}]
    assert main_metric(of_rows(rows, results={"test/acc": 0.5, "slim/test/acc": 0.6})) == "test/acc"
    assert main_metric(of_rows(rows)) == "val/acc"
    assert main_metric(of_rows([{"step": 1, "train/loss": 1.0, "val/loss": 2.0}])) == "val/loss"
    assert main_metric(of_rows([{"step": 1, "reward": 1.0}])) == ""


def test_latency_is_that_of_slimming_or_not_measured() -> None:
    assert tiles(of_rows([]), None)[-1][:2] == ("latency", "not measured")
    assert tiles(of_rows([], results={"slim/latency": 1.5}), None)[-1][1] == "1.5 ms"
    assert tiles(of_rows([], results={"slim/latency": 0.0713}), None)[-1][1] == "71.3 \N{MICRO SIGN}s"
    costs = {"before": {"latency": 4.0}, "after": {"latency": 2.0}}
    assert tiles(of_rows([], channels=costs), None)[-1] == ("latency, slim network", "2 ms", "masked: 4 ms")
    named = tiles(of_rows([], channels={**costs, "samples": 8}), None)[-1][0]
    assert named == "latency of 8 samples, slim network"
    [gain] = gains(of_rows([], channels=costs), None)["FLOPs, memory and time"]
    assert (gain.own, gain.dense) == ("2 ms", "4 ms")


def test_a_chart_says_what_it_shows_and_is_none_without_points() -> None:
    run = of_rows([{"step": 0, "a": 1.0}, {"step": 5, "a": 3.0}])
    chart = Chart("a", "A", [Line("first", run, "a", "#000000"), Line("second", run, "b", "#000000")])
    assert chart_label(chart, "steps") == "A against optimizer steps: first from 1 to 3"
    assert chart_figure(chart, "epochs") is None
    figure = chart_figure(chart)
    assert figure is not None
    assert [line.get_label() for line in figure.axes[0].lines] == ["first"]


def test_a_point_alone_is_seen() -> None:
    run = of_rows([{"step": 3, "a": 1.0}])
    figure = chart_figure(Chart("a", "A", [Line("a", run, "a", "#000000", "--")], limits=(0.0, None)))
    assert figure is not None
    assert figure.axes[0].lines[0].get_marker() == "."


LAYERS = [LayerRecord("a.weight", (10, 10), True, 0.9), LayerRecord("b.weight", (4, 5), True, 0.5)]


def test_heat_maps_hold_the_figures_of_each_layer_over_time() -> None:
    rows = [
        {
            "step": 0,
            "event": "start",
            "layers": {"a.weight": {"active": 50, "churn": None}, "b.weight": {"active": 20}},
        },
        {"step": 10, "event": "update", "layers": {"a.weight": {"active": 40, "churn": 0.5}}},
        {"step": 15, "event": "validation", "layers": {"a.weight": {"active": 40, "churn": 0.0}}},
        {"step": 20, "event": "update", "layers": {"a.weight": {"active": 10, "churn": 0.25}, "c": {"churn": 1}}},
    ]
    sparsity, churn = heat_maps(of_rows(rows, layers=LAYERS))
    assert (sparsity.name, sparsity.names, sparsity.steps) == ("layers_sparsity", ["a", "b"], [0, 10, 15, 20])
    assert sparsity.values[0].tolist() == pytest.approx([0.5, 0.6, 0.6, 0.9])
    assert sparsity.values[1].isnan().tolist() == [False, True, True, True]
    # between updates nothing moves
    assert (churn.steps, churn.values[0].tolist()) == ([10, 20], [0.5, 0.25])
    assert heat_map_label(sparsity).endswith("2 layers: at the end from 0 % in b to 90 % in a")


def test_columns_of_heat_maps_are_at_even_distances_in_steps() -> None:
    heat = HeatMap("h", "H", "", ["a"], [0, 10, 100], torch.tensor([[0.0, 0.5, 1.0]]))
    image = heat_map_figure(heat).axes[0].images[0].get_array()
    shown = torch.tensor(image.tolist())[0]
    assert shown[0] == 0
    assert shown[-1] == 1
    assert int((shown == 0).sum()) == 15  # a tenth of 160 columns, less the one that ends at step 10
    assert int((shown == 1).sum()) == 1


def test_names_of_layers_are_as_short_as_they_differ() -> None:
    assert short_names(["net.0.weight", "net.2.weight"]) == ["net.0", "net.2"]
    long = [f"backbone.features.stage.{i}.conv.weight" for i in range(2)]
    assert short_names(long) == ["0.conv", "1.conv"]
    assert short_names(["encoder." * 5 + "a", "encoder." * 5 + "a.b"]) == ["a", "a.b"]
    assert short_names(["a" * 50]) == ["aaaaaaaaa…aaaaaaaaa"]


def test_kernels_are_tiles_and_towers_are_folded() -> None:
    matrix = torch.arange(6).reshape(2, 3)
    assert torch.equal(as_picture(matrix), matrix)
    kernels = torch.arange(2 * 3 * 2 * 2).reshape(2, 3, 2, 2)
    picture = as_picture(kernels)
    assert picture.shape == (4, 6)
    assert torch.equal(picture[2:, 4:], kernels[1, 2])
    folded = as_picture(torch.arange(16 * 9).reshape(16, 1, 3, 3))
    assert folded.shape == (12, 12)
    assert torch.equal(folded[3:6, :3].flatten(), torch.arange(4 * 9, 5 * 9))
    # outputs side by side, each with its inputs side by side
    both = torch.arange(8 * 2 * 9).reshape(8, 2, 3, 3)
    assert as_picture(both).shape == (12, 12)
    assert torch.equal(as_picture(both)[:3, 3:6], both[0, 1])
    assert torch.equal(as_picture(both)[:3, 6:9], both[1, 0])
    assert as_picture(torch.ones(7)).shape == (1, 7)
    assert as_picture(torch.ones(4, 2, 3)).shape == (4, 6)
    # all weights are there, whatever the shape
    for shape in ((5, 1, 3, 3), (7, 2, 3), (3, 5, 2, 2, 2), (1, 1, 1, 1), (50, 1, 1, 1)):
        assert int(as_picture(torch.ones(shape)).sum()) == math.prod(shape)


def test_pictures_of_masks_tell_kept_grown_and_dropped_apart() -> None:
    first = torch.tensor([[True, False, True, False]])
    last = torch.tensor([[True, True, False, False]])
    picture = mask_picture(first, last)[0]
    for pixel, state in zip(picture, ("kept", "grown", "dropped"), strict=False):
        shade, opacity, _ = STATES[state]
        assert [round(255 * c) for c in pixel[:3].tolist()] == [int(shade[i : i + 2], 16) for i in (1, 3, 5)]
        assert float(pixel[3]) == pytest.approx(opacity)
    assert picture[3, 3] == 0


def test_large_masks_are_averaged_and_sparse_ones_stay_visible() -> None:
    mask = torch.zeros(2000, 700, dtype=torch.bool)
    mask[::10] = True
    picture = mask_picture(mask, mask)
    assert max(picture.shape[:2]) <= SIDE
    assert picture[..., 3].mean() == pytest.approx(0.1**0.5, abs=0.1)
    assert float(picture[..., 3].max()) <= 1


def test_inputs_are_a_picture_where_they_are_square_images() -> None:
    layer = LayerRecord("a", (5, 3 * 64), True)
    mask = torch.zeros(5, 3, 8, 8, dtype=torch.bool)
    mask[:, :, 2, 6] = True
    seen = input_picture(layer, mask.reshape(5, -1))
    assert seen is not None
    assert seen.shape == (8, 8)
    assert seen[2, 6] == 15
    assert seen.sum() == 15
    assert input_picture(LayerRecord("a", (5, 63), True), torch.ones(5, 63)) is None
    assert input_picture(LayerRecord("a", (5, 64, 1, 1), True), torch.ones(5, 64, 1, 1)) is None


def test_every_method_has_its_own_look() -> None:
    assert len(set(METHODS.values())) == len(METHODS)
    looks = {name: (colour(name), marker(name)) for name in METHODS}
    assert looks == METHODS
    # a method of somebody else has one too, the same in every process
    assert (colour("Mine"), marker("Mine")) == ("#AA4499", "<")


def test_settings_of_users_neither_change_figures_nor_are_changed() -> None:
    import matplotlib

    run = of_rows([{"step": 0, "a": 1.0}, {"step": 5, "a": 3.0}])
    chart = Chart("a", "A", [Line("a", run, "a", "#000000")])

    def drawn() -> str:
        figure = chart_figure(chart)
        assert figure is not None
        return figure_svg(figure, "a")

    plain = drawn()
    with matplotlib.rc_context(
        {"font.size": 30, "axes.facecolor": "black", "svg.fonttype": "path", "savefig.bbox": "tight"}
    ):
        assert drawn() == plain
        assert matplotlib.rcParams["font.size"] == 30


@pytest.mark.parametrize(
    ("written", "expected"),
    [
        ("font: 8.5px 'DejaVu Sans', 'Verdana'; fill: #1b1f26", "font-size: 8.5px; fill: currentColor"),
        ("fill: #1b1f26; font: 700 9px 'DejaVu Sans'", "fill: currentColor; font-weight: 700; font-size: 9px"),
        ("font-size: 9px; font-family: 'DejaVu Sans'; stroke: #d5d9e0", "font-size: 9px; stroke: var(--grid)"),
        ("stroke: #1b1f267f", "stroke: #1b1f267f"),
    ],
)
def test_fonts_of_drawings_are_those_of_the_page_in_every_version(
    written: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with drawing() as made:
        figure = made.Figure(figsize=(1, 1))
    monkeypatch.setattr(
        type(figure),
        "savefig",
        lambda self, file, **options: file.write(f'<svg viewBox="0 0 1 1"><text style="{written}"/></svg>'),
    )
    assert f'<text style="{expected}"/>' in figure_svg(figure, "a")


def test_drawings_of_one_page_share_no_ids() -> None:
    with drawing() as made:
        figure = made.Figure(figsize=(2, 2))
        figure.subplots().plot([0, 1], marker="o")
    first, second = (figure_svg(figure, label) for label in ("one", "two"))
    ids = [{part.split('"')[0] for part in text.split(' id="')[1:]} for text in (first, second)]
    assert ids[0]
    assert not ids[0] & ids[1]


def test_a_run_of_several_methods_and_an_unknown_one_has_charts(tmp_path: Path) -> None:
    run = read_record(recorded(tmp_path, method="RigL + Mine", steps=20))
    assert [chart.name for chart in progress_charts(run, run)][:3] == ["sparsity", "accuracy", "loss"]
