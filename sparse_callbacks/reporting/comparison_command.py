"""The command ``python -m sparse_callbacks.compare``: its arguments, and what it prints.

python -m sparse_callbacks.compare multirun/2026-11-29/10-00-00 --x training
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_callbacks.reporting.compared_runs import common_folder, left_out_lines, shown_path
from sparse_callbacks.reporting.comparison import COMPARED_AXES, compared
from sparse_callbacks.reporting.comparison_page import highlights, write_comparison
from sparse_callbacks.reporting.readable import plural


def compare_main(arguments: Sequence[str] | None = None) -> None:
    """Compare the runs that the command line names.

    Args:
        arguments: words of the command line; None: those of the process.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    comparison = compared(given.runs, given.metric, given.x)
    for line in left_out_lines(comparison.left_out):
        print(f"left out: {line}", file=sys.stderr)
    if not comparison.runs:
        parser.error(
            "there is no run to compare. Give folders of runs that have ended, or folders of them; --metric names a metric that they "
            "have."
        )
    folder = given.out or _own_folder(given.runs)
    try:
        files = write_comparison(comparison, folder, given.runs)
    except (ImportError, OSError) as error:
        parser.error(str(error))
    for problem in comparison.problems:
        print(f"{problem.title}: {plural(len(problem.settings), 'setting')}")
        for name, value, beside in highlights(problem, comparison.metric):
            print(f"  {name}: {value} ({beside})")
    print("\n".join(shown_path(file) for file in files))


def _own_folder(paths: Sequence[Path]) -> Path:
    """Where the page goes by itself: the folder that all runs lie in, or the current one where that is not to be written to."""
    folder = common_folder([path for path in paths if path.is_dir()])
    return folder if os.access(folder, os.W_OK) and folder != Path(folder.anchor) else Path.cwd()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_callbacks.compare",
        description="Compare runs: mean and spread over seeds, accuracy against sparsity and FLOPs with Pareto fronts, rank "
        "correlations. Writes compare.html, compare.md, compare.csv (settings) and compare_runs.csv.",
    )
    add = parser.add_argument
    add(
        "runs",
        nargs="+",
        type=Path,
        metavar="RUNS",
        help="folders of runs, or folders of them, such as multirun/DAY/TIME",
    )
    add("--out", type=Path, metavar="FOLDER", help="where the files go; by default the folder that all runs lie in")
    add("--x", choices=list(COMPARED_AXES), default="sparsity", help="the axis that comes first")
    add(
        "--metric", help="a metric of the end of the runs; by default test/acc, or val/acc where no run has been tested"
    )
    return parser
