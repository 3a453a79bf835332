"""Figures of a comparison show settings that lie close together, whatever has collapsed beside them."""

from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparse_callbacks.reporting.compared_runs import ComparedRun
from sparse_callbacks.reporting.compared_settings import Problem, Setting
from sparse_callbacks.reporting.comparison_figures import comparison_figure, figure_label, has_off_axis
from sparse_callbacks.reporting.shown_range import worst_shown

LEVELS = (0.9, 0.95, 0.98)
CLOSE = {"GMP": (0.981, 0.976, 0.958), "RigL": (0.967, 0.964, 0.953), "SNFS": (0.967, 0.959, 0.949)}
COLLAPSED = CLOSE | {"SET": (0.961, 0.954, 0.629), "Static": (0.965, 0.943, 0.407)}


def problem(accuracies: Mapping[str, tuple[float, ...]]) -> Problem:
    settings = []
    for method, means in accuracies.items():
        for level, mean in zip(LEVELS, means, strict=True):
            values = [
                {"test/acc": mean + d, "test/loss": 1 - mean - d, "sparsity/total": level} for d in (-0.002, 0.002)
            ]
            runs = [ComparedRun(Path(method), method, seed, {}, {}, each) for seed, each in enumerate(values)]
            settings.append(Setting(method, method, level, level, runs))
    return Problem("digits, mlp", settings, {}, [])


def test_settings_that_have_collapsed_leave_the_others_their_axis_and_are_told() -> None:
    figure = comparison_figure(problem(COLLAPSED), "test/acc", "sparsity")
    assert figure is not None
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 0.9 < low < 0.943
    assert 0.981 < high < 1
    said = {text.get_text(): text.xy[1] for text in axes.texts}
    assert said.keys() == {"↓ 62.9 %", "↓ 40.7 %"}
    assert 0 < said["↓ 40.7 %"] < said["↓ 62.9 %"] < 0.3  # at the lower end, the worst lowest, and not on each other
    label = figure_label(problem(COLLAPSED), "test/acc", "sparsity", lambda s: "a score")
    assert label.endswith("Off the axis: SET, 0.98: a score; Static, 0.98: a score.")
    assert has_off_axis(problem(COLLAPSED), "test/acc", "sparsity")


def test_of_a_loss_it_is_the_upper_end() -> None:
    figure = comparison_figure(problem(COLLAPSED), "test/loss", "sparsity")
    assert figure is not None
    (axes,) = figure.axes
    low, high = axes.get_ylim()
    assert 0 < low < 0.019
    assert 0.057 < high < 0.1
    said = {text.get_text(): text.xy[1] for text in axes.texts}
    assert 0.7 < said["↑ 0.371"] < said["↑ 0.593"] < 1


def test_without_a_collapse_every_setting_lies_on_the_axis() -> None:
    wide = {"GMP": (0.98, 0.9, 0.8), "RigL": (0.97, 0.85, 0.7), "Static": (0.9, 0.7, 0.4)}
    for given_problem, worst in ((problem(CLOSE), 0.949), (problem(wide), 0.4)):
        figure = comparison_figure(given_problem, "test/acc", "sparsity")
        assert figure is not None
        assert figure.axes[0].get_ylim()[0] < worst
        assert not figure.axes[0].texts
        assert "Off the axis" not in figure_label(given_problem, "test/acc", "sparsity", lambda s: "")
        assert not has_off_axis(given_problem, "test/acc", "sparsity")


@given(st.lists(st.floats(0, 1), max_size=30))
def test_at_most_a_third_is_left_off_and_only_where_the_axis_becomes_three_times_shorter(scores: list[float]) -> None:
    limit = worst_shown(scores)
    if limit is None:
        return
    off = [score for score in scores if score < limit]
    assert 0 < len(off) <= len(scores) / 3
    assert max(scores) - min(scores) > 3 * (max(scores) - limit) > 0


def test_the_part_that_is_shown_goes_with_the_scores() -> None:
    scores = [score for means in COLLAPSED.values() for score in means]
    limit = worst_shown(scores)
    assert limit is not None
    assert worst_shown([100 * score - 7 for score in scores]) == pytest.approx(100 * limit - 7)
    assert worst_shown([0.9, 0.9, 0.9, 0.9, 0.1]) is None  # nothing is to be told apart
    assert worst_shown([0.9, 0.1]) is None
