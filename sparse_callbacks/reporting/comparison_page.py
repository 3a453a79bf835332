"""The files of a comparison: a page, Markdown, and CSV of settings and of runs."""

import csv
import io
import shlex
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from sparse_callbacks.core.files import replacing
from sparse_callbacks.reporting.compared_runs import ComparedRun, left_out_lines, shown_path
from sparse_callbacks.reporting.compared_settings import Problem, Setting
from sparse_callbacks.reporting.comparison import (
    COMPARED_AXES,
    Comparison,
    best_run,
    best_setting,
    front,
    validation_metric,
)
from sparse_callbacks.reporting.comparison_figures import comparison_figure, figure_label, has_off_axis, legend_figure
from sparse_callbacks.reporting.comparison_tables import ComparedTable, as_score, problem_tables
from sparse_callbacks.reporting.html_pages import write_page
from sparse_callbacks.reporting.readable import plural
from sparse_callbacks.reporting.style import figure_svg

HTML, MARKDOWN, CSV, RUNS_CSV = "compare.html", "compare.md", "compare.csv", "compare_runs.csv"
ENOUGH_SEEDS = 3
_MEANS = ("sparsity/total", "sparsity/model", "compression", "speedup", *(axis.key for axis in COMPARED_AXES.values()))


def write_comparison(comparison: Comparison, folder: Path, paths: Sequence[Path]) -> list[Path]:
    """Write the files of a comparison.

    Args:
        comparison: what :func:`~sparse_callbacks.reporting.comparison.compared` found.
        folder: where to; it is made.
        paths: what was compared, for the command that makes the page again.

    Returns:
        The files.

    Raises:
        ImportError: matplotlib is missing; the message names the extra `report`.
        ValueError: there are no runs.
    """
    if not comparison.runs:
        raise ValueError("there is no run to compare. Give folders of runs that have ended.")
    folder.mkdir(parents=True, exist_ok=True)
    values = {
        "title": f"Comparison of {plural(len(comparison.runs), 'run')}",
        "facts": _facts(comparison),
        "notes": notes(comparison),
        "problems": [_problem_values(problem, comparison) for problem in comparison.problems],
        "command": _command(comparison, paths),
    }
    page = write_page(folder / HTML, "compare.html.j2", **values)
    texts = {MARKDOWN: as_markdown(comparison), CSV: _settings_csv(comparison), RUNS_CSV: _runs_csv(comparison)}
    for name, text in texts.items():
        with replacing(folder / name) as beside:
            beside.write_text(text, encoding="utf-8")
    return [page, *(folder / name for name in texts)]


def _command(comparison: Comparison, paths: Sequence[Path]) -> str:
    words = ["python", "-m", "sparse_callbacks.compare", *(shown_path(path) for path in paths)]
    return shlex.join([*words, "--metric", comparison.metric, "--x", comparison.axis])


def _facts(comparison: Comparison) -> list[tuple[str, str]]:
    settings = [setting for problem in comparison.problems for setting in problem.settings]
    facts = [("settings", str(len(settings))), ("metric", comparison.metric)]
    if len(comparison.problems) > 1:
        facts.insert(0, ("data sets and models", str(len(comparison.problems))))
    return facts


def notes(comparison: Comparison) -> list[str]:
    """What a reader should know first: what is left out, kept apart, repeated, or rests on few seeds."""
    found = [f"Left out: {line}." for line in left_out_lines(comparison.left_out)]
    if len(comparison.problems) > 1:
        found.append(
            f"{len(comparison.problems)} data sets and models are kept apart: their accuracies say nothing about each other."
        )
    for problem in comparison.problems:
        found += [f"{line}." for line in problem.repeated]
        few = [setting for setting in problem.settings if len(setting.runs) < ENOUGH_SEEDS]
        if few:
            have = "has" if len(few) == 1 else "have"
            found.append(
                f"{problem.title}: {len(few)} of {plural(len(problem.settings), 'setting')} {have} fewer than {ENOUGH_SEEDS} seeds, "
                "too few to tell a difference from chance."
            )
    return found


def _problem_values(problem: Problem, comparison: Comparison) -> dict[str, Any]:
    """What the template takes of a problem."""
    metric = comparison.metric
    figures, missing = [], []
    for name in comparison.axes:
        figure = comparison_figure(problem, metric, name)
        if figure is None:
            missing.append(COMPARED_AXES[name].title)
            continue
        label = figure_label(problem, metric, name, lambda setting: as_score(metric, setting.over_seeds(metric)))
        figures.append((figure_svg(figure, label), ""))
    if figures:
        legend = figure_svg(legend_figure(problem, metric), f"{problem.title}: what the colours and markers mean")
        figures.insert(1, (legend, _legend_caption(problem, comparison)))
    return {
        "title": problem.title,
        # a line of its own is no place for a sign of percent
        "tiles": [(name, value.replace(" ", "\u00a0"), beside) for name, value, beside in highlights(problem, metric)],
        "figures": figures,
        "missing": f"Not drawn, as no run has it: {', '.join(missing)}." if missing else "",
        "tables": problem_tables(problem, metric),
        "differing": problem.differing,
        "runs": plural(sum(len(setting.runs) for setting in problem.settings), "run"),
    }


def _legend_caption(problem: Problem, comparison: Comparison) -> str:
    caption = "Points are means over seeds, bars one standard deviation to each side."
    if any(has_off_axis(problem, comparison.metric, name) for name in comparison.axes):
        caption += " An arrow gives the mean of a setting that lies off the axis."
    return caption


def highlights(problem: Problem, metric: str) -> list[tuple[str, str, str]]:
    """The best setting, the best run, the run that validation would choose, and the dense runs: name, value, beside."""
    found = []
    sparse = [setting for setting in problem.settings if setting.method != "dense"]
    best = best_setting(sparse, metric)
    if best is not None:
        found.append(("best sparse setting", as_score(metric, best.over_seeds(metric)), best.name))
    runs = {run.folder: setting for setting in sparse for run in setting.runs}
    every = [run for setting in sparse for run in setting.runs]
    chosen = {"best sparse run": best_run(every, metric)}
    validation = validation_metric(metric)
    if validation is not None:
        chosen[f"sparse run that {validation} chooses"] = best_run(every, validation)
    for name, run in chosen.items():
        if run is not None:
            found.append((name, _one(metric, run), f"{runs[run.folder].name}, seed {run.seed}"))
    dense = [setting for setting in problem.settings if setting.method == "dense"]
    found += [
        ("dense", as_score(metric, setting.over_seeds(metric)), plural(len(setting.runs), "run")) for setting in dense
    ]
    return found


def _one(metric: str, run: ComparedRun) -> str:
    return as_score(metric, Setting("", "", None, None, [run]).over_seeds(metric))


# ---------------------------------------------------------------------- Markdown and CSV


def as_markdown(comparison: Comparison) -> str:
    """The comparison as Markdown, without figures."""
    lines = [f"# Comparison of {plural(len(comparison.runs), 'run')} by {comparison.metric}", ""]
    lines += [f"- {note}" for note in notes(comparison)]
    for problem in comparison.problems:
        lines += ["", f"## {problem.title}", ""]
        lines += [f"- {name}: {value} ({beside})" for name, value, beside in highlights(problem, comparison.metric)]
        lines += [
            f"- differs between settings: `{key}`: {', '.join(values)}" for key, values in problem.differing.items()
        ]
        for axis in comparison.axes:
            at_front = front(problem, comparison.metric, COMPARED_AXES[axis])
            if at_front:
                lines.append(
                    f"- Pareto front against {COMPARED_AXES[axis].short}: {'; '.join(s.name for s in at_front)}"
                )
        for table in problem_tables(problem, comparison.metric):
            lines += [
                "",
                f"### {table.title}",
                "",
                *([table.explanation, ""] if table.explanation else []),
                *_markdown_table(table),
            ]
    return "\n".join(lines) + "\n"


def _markdown_table(table: ComparedTable) -> list[str]:
    rows = [
        [f"**{cell}**" if (number, place) in table.best else cell for place, cell in enumerate(row)]
        for number, row in enumerate(table.rows)
    ]
    return [_markdown_row(cells) for cells in (table.head, ["---"] * len(table.head), *rows)]


def _markdown_row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


def _settings_csv(comparison: Comparison) -> str:
    # the metric may be one of the costs, and sparsity is an axis too
    keys = list(dict.fromkeys([comparison.metric, f"{comparison.metric}5", *_MEANS]))
    head = [
        "problem",
        "method",
        "target",
        "runs",
        *(f"{key} {part}" for key in keys for part in ("mean", "sd")),
        "fronts",
    ]
    rows = []
    for problem in comparison.problems:
        fronts = {name: front(problem, comparison.metric, axis) for name, axis in COMPARED_AXES.items()}
        for setting in problem.settings:
            spreads = [setting.over_seeds(key) for key in keys]
            figures = [figure for s in spreads for figure in ((None, None) if s is None else (s.mean, s.deviation))]
            on = " ".join(name for name, found in fronts.items() if setting in found)
            rows.append([problem.title, setting.line, setting.target, len(setting.runs), *figures, on])
    return _csv(head, rows)


def _runs_csv(comparison: Comparison) -> str:
    keys = sorted({key for run in comparison.runs for key in run.values})
    rows = [
        [problem.title, setting.line, setting.target, run.seed, *(run.values.get(key) for key in keys), run.folder]
        for problem in comparison.problems
        for setting in problem.settings
        for run in setting.runs
    ]
    own = ["problem", "method", "target", "seed"]
    # results have whatever names their run gave them
    return _csv([*own, *(f"metric {key}" if key in {*own, "folder"} else key for key in keys), "folder"], rows)


def _csv(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table as CSV. Columns of one name would hide each other from whoever reads rows by name."""
    assert len(set(head)) == len(head), head
    text = io.StringIO()
    writer: Callable[[Iterable[Any]], Any] = csv.writer(text, lineterminator="\n").writerow
    writer(head)
    for row in rows:
        writer(row)
    return text.getvalue()
