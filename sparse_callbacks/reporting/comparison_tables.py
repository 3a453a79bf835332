"""Tables of a comparison: accuracy by sparsity, every setting, rank correlations, every run."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.compared_runs import ComparedRun, shown_path
from sparse_callbacks.reporting.compared_settings import Problem, Setting, Spread
from sparse_callbacks.reporting.comparison import (
    COMPARED_AXES,
    best_setting,
    by_level,
    front,
    level_texts,
    levels,
    means_by_level,
    rank_correlations,
    transposed,
)

MISSING = "-"
_OF_SETTINGS = ("method", "target", "runs", "sparsity", "compression", "speedup", "time", "fronts")
_OF_RUNS = ("setting", "seed", "folder")


@dataclass(frozen=True)
class ComparedTable:
    """A table of texts.

    Attributes:
        title: what it shows.
        explanation: how it is read; may be empty.
        head: titles of the columns.
        rows: texts, of which the first names the row.
        best: (row, column) of the cells that are better than the others of their column.
    """

    title: str
    explanation: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    best: frozenset[tuple[int, int]] = frozenset()


def as_score(metric: str, spread: Spread | None) -> str:
    """Mean and spread of a metric: ``"97.21 ± 0.31 %"`` of an accuracy, else four digits; without ± for a single run."""
    text = in_cell(metric, spread)
    return f"{text} %" if readable.is_accuracy(metric) and spread is not None else text


def in_cell(metric: str, spread: Spread | None) -> str:
    """The same without the sign of percent, which the title of the column has."""
    if spread is None:
        return MISSING
    if readable.is_accuracy(metric):
        return _with_deviation(spread, lambda value: f"{100 * value:.2f}")
    return _with_deviation(spread, lambda value: f"{value:.4g}")


def _titled(metric: str, beside: Sequence[str] = ()) -> str:
    """The title of the metric's column; another one than those beside it, whatever a run has called its results."""
    if metric in beside:
        return f"metric {metric}"
    return f"{metric}, %" if readable.is_accuracy(metric) else metric


def _with_deviation(spread: Spread, written: Callable[[float], str]) -> str:
    return written(spread.mean) + ("" if spread.deviation is None else f" ± {written(spread.deviation)}")


def sparsity_table(problem: Problem, metric: str) -> ComparedTable | None:
    """The metric of each line at each sparsity; None where no method was asked for one."""
    columns, rows = levels(problem), list(by_level(problem).items())
    if not columns:
        return None
    texts = [[line, *(_score_of(row.get(level), metric) for level in columns)] for line, row in rows]
    best = set()
    for column, level in enumerate(columns, start=1):
        settings = [row[level] for _, row in rows if level in row]
        chosen = best_setting(settings, metric)
        if chosen is not None and len(settings) > 1:
            best.add(([line for line, _ in rows].index(chosen.line), column))
    dense = [setting for setting in problem.settings if setting.method == "dense"]
    texts += [[setting.name, _score_of(setting, metric), *[""] * (len(columns) - 1)] for setting in dense]
    counts = sorted({len(s.runs) for s in problem.settings})
    if counts == [1]:
        explanation = "One run each, so without a standard deviation; the best of each column stands out."
    else:
        runs = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
        explanation = f"Mean ± standard deviation over {runs} runs; the best of each column stands out."
    if dense:
        explanation += " A dense network has no sparsity: its row has one value."
    return ComparedTable(
        f"{_titled(metric)} by sparsity",
        explanation,
        ["method", *level_texts(columns).values()],
        texts,
        frozenset(best),
    )


def _score_of(setting: Setting | None, metric: str) -> str:
    return MISSING if setting is None else in_cell(metric, setting.over_seeds(metric))


# ---------------------------------------------------------------------- every setting


def settings_table(problem: Problem, metric: str) -> ComparedTable:
    """Every setting with what it reached and what it cost; columns that nobody has are left out."""
    dense = next((s for s in problem.settings if s.method == "dense"), None)
    fronts = {name: front(problem, metric, axis) for name, axis in COMPARED_AXES.items()}
    top_5 = f"{metric}5"
    columns: dict[str, Callable[[Setting], str]] = {
        "target": lambda s: MISSING if s.target is None else _target(s),
        "runs": lambda s: str(len(s.runs)),
        _titled(metric, _OF_SETTINGS): lambda s: _score_of(s, metric),
        _titled(top_5): lambda s: _score_of(s, top_5),
        "to dense": lambda s: _difference(s, dense, metric),
        "sparsity": lambda s: _mean(s, "sparsity/total", lambda v: f"{v:.4f}"),
        "compression": lambda s: _mean(s, "compression", _times),
        "speedup": lambda s: _mean(s, "speedup", _times),
        "inference FLOPs": lambda s: _mean(s, "flops/inference", readable.count),
        "training FLOPs": lambda s: _mean(s, "flops/training", readable.count),
        "of dense training": _training_share,
        "time": lambda s: _mean(s, "seconds", readable.seconds),
        "fronts": lambda s: " ".join(name[0].upper() for name, found in fronts.items() if s in found) or MISSING,
    }
    cells = {title: [write(s) for s in problem.settings] for title, write in columns.items()}
    kept = [title for title, texts in cells.items() if set(texts) != {MISSING}]
    rows = [[s.line, *(cells[title][index] for title in kept)] for index, s in enumerate(problem.settings)]
    letters = ", ".join(f"{name[0].upper()} {axis.short}" for name, axis in COMPARED_AXES.items())
    explanation = f"Means over its runs. Fronts: the Pareto fronts that it is on, against {letters}."
    return ComparedTable("Every setting", explanation, ["method", *kept], rows)


def _target(setting: Setting) -> str:
    return setting.target if isinstance(setting.target, str) else f"{setting.target:.4g}"


def _mean(setting: Setting, key: str, written: Callable[[float], str]) -> str:
    spread = setting.over_seeds(key)
    return MISSING if spread is None else written(spread.mean)


def _times(value: float) -> str:
    return f"{value:.3g} x"


def _difference(setting: Setting, dense: Setting | None, metric: str) -> str:
    """The metric less that of the dense runs; accuracies in points of a percent."""
    mine, theirs = setting.over_seeds(metric), dense.over_seeds(metric) if dense is not None else None
    if mine is None or theirs is None or setting is dense:
        return MISSING
    difference = mine.mean - theirs.mean
    return f"{100 * difference:+.2f}" if readable.is_accuracy(metric) else f"{difference:+.4g}"


def _training_share(setting: Setting) -> str:
    training, dense = setting.over_seeds("flops/training"), setting.over_seeds("flops/training_dense")
    return readable.share(training.mean / dense.mean) if training and dense and dense.mean else MISSING


# ---------------------------------------------------------------------- rank correlations


def method_correlations(problem: Problem, metric: str) -> ComparedTable | None:
    """Rank correlation of each two methods over the sparsities."""
    explanation = (
        "Spearman's, over the settings that two methods share: 1 where both put them in the same order, as they do when both "
        "only lose accuracy with sparsity."
    )
    return _correlation_table(means_by_level(problem, metric), "method", explanation)


def level_correlations(problem: Problem, metric: str) -> ComparedTable | None:
    """Rank correlation of each two sparsities over the methods."""
    explanation = (
        "Spearman's, over methods: 1 where two sparsities put the methods in the same order, so that one tells which method "
        "to take at the other."
    )
    return _correlation_table(transposed(means_by_level(problem, metric)), "sparsity", explanation)


def _correlation_table(rows: Mapping[str, Mapping[Any, float]], what: str, explanation: str) -> ComparedTable | None:
    found = rank_correlations(rows)
    if not found:
        return None
    names = [name for name in rows if any(name in pair for pair in found)]
    texts = [
        [first, *("1" if first == second else _correlation(found.get((first, second))) for second in names)]
        for first in names
    ]
    plural = {"method": "methods", "sparsity": "sparsities"}[what]
    return ComparedTable(f"Rank correlation of {plural}", explanation, [what, *names], texts)


def _correlation(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


# ---------------------------------------------------------------------- every run


def runs_table(problem: Problem, metric: str) -> ComparedTable:
    """Every run with its folder."""
    rows = [
        [s.name, _seed(run), _score(run, metric), shown_path(run.folder)] for s in problem.settings for run in s.runs
    ]
    return ComparedTable("Every run", "", ["setting", "seed", _titled(metric, _OF_RUNS), "folder"], rows)


def _seed(run: ComparedRun) -> str:
    return MISSING if run.seed is None else str(run.seed)


def _score(run: ComparedRun, metric: str) -> str:
    return in_cell(metric, Spread(run.values[metric], None, 1)) if metric in run.values else MISSING


def problem_tables(problem: Problem, metric: str) -> list[ComparedTable]:
    """The tables of a problem that say something, that of every run last."""
    tables = [
        sparsity_table(problem, metric),
        settings_table(problem, metric),
        method_correlations(problem, metric),
        level_correlations(problem, metric),
        runs_table(problem, metric),
    ]
    return [table for table in tables if table is not None]
