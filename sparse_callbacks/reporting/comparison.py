"""What a comparison says: fronts, accuracy by sparsity, rank correlations, which run was best."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_callbacks.reporting.compared_runs import ComparedRun, read_runs
from sparse_callbacks.reporting.compared_settings import Problem, Setting, problems_of
from sparse_callbacks.reporting.measures import pareto_front, spearman

USUAL_METRICS = ("test/acc", "val/acc")
LOWER_IS_BETTER = ("loss", "error", "perplexity", "mae", "mse")
FEWEST_SHARED = 3
"""Settings that two methods must share before their rank correlation says anything."""


@dataclass(frozen=True)
class Axis:
    """What accuracy is drawn against.

    Attributes:
        key: the value of a run.
        title: what it is, in words.
        short: the same, for a heading.
        more_is_better: whether a larger value is better, as of sparsity, and not a cost.
    """

    key: str
    title: str
    short: str
    more_is_better: bool


COMPARED_AXES = {
    "sparsity": Axis("sparsity/total", "sparsity of the sparse layers", "sparsity", True),
    "inference": Axis("flops/inference", "FLOPs of inference for one sample", "inference FLOPs", False),
    "training": Axis("flops/training", "FLOPs of the whole training", "training FLOPs", False),
}


@dataclass(frozen=True)
class Comparison:
    """Runs side by side.

    Attributes:
        problems: the settings by data set and model.
        metric: what they are compared by, such as ``"test/acc"``.
        axis: the name of the axis (of ``COMPARED_AXES``) that comes first.
        left_out: each folder or file that is not compared, and why.
    """

    problems: Sequence[Problem]
    metric: str
    axis: str
    left_out: Sequence[tuple[Path, str]]

    @property
    def runs(self) -> list[ComparedRun]:
        """All runs that are compared."""
        return [run for problem in self.problems for setting in problem.settings for run in setting.runs]

    @property
    def axes(self) -> list[str]:
        """The names of the axes, the chosen one first."""
        return sorted(COMPARED_AXES, key=lambda name: name != self.axis)


def compared(paths: Sequence[Path], metric: str | None = None, axis: str = "sparsity") -> Comparison:
    """Compare the runs in folders.

    Args:
        paths: folders of runs, or folders of them.
        metric: a metric of the end; None: ``"test/acc"``, or ``"val/acc"`` where no run has been tested.
        axis: ``"sparsity"``, ``"inference"`` or ``"training"``: what comes first.

    Raises:
        ValueError: an unknown axis.
    """
    if axis not in COMPARED_AXES:
        raise ValueError(f"axis={axis!r} is not known. Choose one of {', '.join(COMPARED_AXES)}.")
    for wanted in USUAL_METRICS if metric is None else (metric,):
        runs, left_out = read_runs(paths, wanted)
        if runs:
            break
    return Comparison(problems_of(runs), wanted, axis, left_out)


def is_better_when_lower(metric: str) -> bool:
    """Whether a metric is an error, by the last part of its name."""
    return any(word in metric.rpartition("/")[2].lower() for word in LOWER_IS_BETTER)


def goodness(metric: str) -> Callable[[float], float]:
    """A function that gives of a metric's value a number of which more is better, and of that the value."""
    return (lambda value: -value) if is_better_when_lower(metric) else (lambda value: value)


def front(problem: Problem, metric: str, axis: Axis) -> list[Setting]:
    """The settings whose mean no other setting beats in both the metric and the axis, in the order of the axis."""
    good, sign = goodness(metric), 1 if axis.more_is_better else -1
    points = [(s, s.over_seeds(axis.key), s.over_seeds(metric)) for s in problem.settings]
    known = [(s, x.mean, y.mean) for s, x, y in points if x is not None and y is not None]
    chosen = pareto_front([(sign * x, good(y)) for _, x, y in known])
    return [known[index][0] for index in sorted(chosen, key=lambda index: known[index][1])]


def best_setting(settings: Sequence[Setting], metric: str) -> Setting | None:
    """The setting with the best mean; the earliest of equals."""
    known = [(spread.mean, s) for s in settings if (spread := s.over_seeds(metric)) is not None]
    return max(known, key=lambda pair: goodness(metric)(pair[0]))[1] if known else None


def best_run(runs: Sequence[ComparedRun], metric: str) -> ComparedRun | None:
    """The run with the best value; the earliest of equals."""
    known = [run for run in runs if metric in run.values]
    return max(known, key=lambda run: goodness(metric)(run.values[metric])) if known else None


def validation_metric(metric: str) -> str | None:
    """The metric of the validation that belongs to one of the test; None for another metric."""
    return metric.replace("test", "val", 1) if metric.startswith("test") else None


def levels(problem: Problem) -> list[float]:
    """The sparsities that sparse methods were asked for, ascending."""
    return sorted({s.level for s in problem.settings if s.level is not None and s.method != "dense"})


def by_level(problem: Problem) -> dict[str, dict[float, Setting]]:
    """Settings by line and the sparsity that was asked for, of lines that have one."""
    found: dict[str, dict[float, Setting]] = {}
    for setting in problem.settings:
        if setting.level is not None and setting.method != "dense":
            found.setdefault(setting.line, {})[setting.level] = setting
    return found


def rank_correlations(rows: Mapping[str, Mapping[Any, float]]) -> dict[tuple[str, str], float]:
    """Spearman's correlation of each two rows over the columns that both have; those with fewer than three are left out.

    Args:
        rows: values by row and column.
    """
    names = list(rows)
    found = {}
    for index, first in enumerate(names):
        for second in names[index + 1 :]:
            shared = [column for column in rows[first] if column in rows[second]]
            if len(shared) < FEWEST_SHARED:
                continue
            value = spearman([rows[first][c] for c in shared], [rows[second][c] for c in shared])
            if value is not None:
                found[first, second] = found[second, first] = value
    return found


def means_by_level(problem: Problem, metric: str) -> dict[str, dict[float, float]]:
    """Mean of the metric by line and level."""
    return {
        line: {level: spread.mean for level, s in row.items() if (spread := s.over_seeds(metric)) is not None}
        for line, row in by_level(problem).items()
    }


def level_texts(levels: Sequence[float]) -> dict[float, str]:
    """Sparsities as texts of four digits, or of as many as tell them apart.

    >>> level_texts([0.9, 1 - 1 / 3]), level_texts([0.99991, 0.99992])
    ({0.9: '0.9', 0.6666666666666667: '0.6667'}, {0.99991: '0.99991', 0.99992: '0.99992'})
    """
    for digits in range(4, 17):
        texts = {level: f"{level:.{digits}g}" for level in levels}
        if len(set(texts.values())) == len(texts):
            break
    return texts


def transposed(rows: Mapping[str, Mapping[float, float]]) -> dict[str, dict[str, float]]:
    """The same values by level, as text, and line."""
    texts = level_texts(sorted({level for row in rows.values() for level in row}))
    return {text: {line: row[level] for line, row in rows.items() if level in row} for level, text in texts.items()}
