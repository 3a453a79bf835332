"""The end of a multirun: a table of its runs, the page compare.html, and the jobs that failed."""

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from hydra.core.utils import JobReturn, JobStatus
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from sparse_callbacks.reporting.compared_runs import FAILURE, run_folders
from sparse_callbacks.reporting.compared_settings import Problem
from sparse_callbacks.reporting.comparison import Comparison, compared
from sparse_callbacks.reporting.comparison_page import highlights, notes, write_comparison
from sparse_callbacks.reporting.comparison_tables import settings_table

LEFT_TO_THE_PAGE = ("to dense", "sparsity", "inference FLOPs", "training FLOPs", "time", "fronts")
_unfinished: list[tuple[Path, str]] = []
"""Folder and metric of multiruns of this process whose end was not shown yet."""


class MultirunComparison(Callback):
    """Hydra's callback that compares the runs of a multirun when it ends; single runs do not concern it.

    Args:
        metric: what the runs are compared by.
    """

    def __init__(self, metric: str = "test/acc") -> None:
        self.metric = metric

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        _unfinished.append((Path(config.hydra.sweep.dir).absolute(), self.metric))

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        folder = Path(config.hydra.runtime.output_dir)
        # a folder that is used again holds the failure of the job before
        (folder / FAILURE).unlink(missing_ok=True)
        if job_return.status is not JobStatus.FAILED:
            return
        try:
            _ = job_return.return_value
        except Exception as error:
            note_failure(folder, error)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        _show_unfinished()


def note_failure(folder: Path, error: Exception) -> None:
    """Write into the folder of a run why it has failed, for the comparison of runs."""
    # the first line: the others are Hydra's advice, or a traceback of another process
    first = (str(error).strip().splitlines() or [""])[0]
    (folder / FAILURE).write_text(f"{type(error).__name__}: {first}\n", encoding="utf-8")


@contextmanager
def multirun_shown() -> Iterator[None]:
    """A context for Hydra's main: the runs of a multirun that an error or a signal has ended are compared too.

    A sweeper raises the error of a failed job once all jobs of the batch are over, and Hydra then calls no
    ``on_multirun_end``.
    """
    stopped = signal.getsignal(signal.SIGTERM)
    # SIGTERM would end the process at once, with nothing shown; in a job it is the run that answers it
    if stopped is signal.SIG_DFL and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        if signal.getsignal(signal.SIGTERM) is _leave:
            signal.signal(signal.SIGTERM, stopped)
        _show_unfinished()


def _leave(number: int, frame: FrameType | None) -> None:
    sys.exit(128 + number)


def _show_unfinished() -> None:
    while _unfinished:
        folder, metric = _unfinished.pop()
        show_comparison(folder, metric)


def show_comparison(folder: Path, metric: str) -> None:
    """Compare the runs in the folder of a multirun: a table on the terminal, and the files beside the runs.

    Nothing is raised: the runs are done, and their results are in their folders.

    Args:
        folder: the folder of the multirun.
        metric: a metric of the end of the runs.
    """
    # no job has begun, for instance as its configuration cannot be composed
    if not folder.is_dir() or not any(run_folders(folder)):
        return
    console = Console()
    comparison = compared([folder], metric)
    for problem in comparison.problems:
        table = comparison_table(problem, comparison)
        # a log file has no width that a line could exceed
        width = None if console.is_terminal else Console(width=1000).measure(table).maximum
        Console(width=width).print(table)
    for note in notes(comparison):
        console.print(note, style="yellow", highlight=False, markup=False)
    if not comparison.runs:
        return
    try:
        page, *_ = write_comparison(comparison, folder, [folder])
    except (ImportError, OSError) as error:
        console.print(
            f"The page of the comparison was not written: {error}", style="yellow", highlight=False, markup=False
        )
    else:
        # never cut: it is there to be copied
        console.print(f"compared in {page}", soft_wrap=True, highlight=False, markup=False)


def comparison_table(problem: Problem, comparison: Comparison) -> Table:
    """Every setting of a problem with what it reached and cost, and below it which was best."""
    found = settings_table(problem, comparison.metric)
    best = [f"{name}: {value} ({beside})" for name, value, beside in highlights(problem, comparison.metric)]
    out = Table(title=problem.title, title_justify="left", caption="\n".join(best), caption_justify="left")
    # the page has the others: a terminal may have 80 columns
    left_out = (*LEFT_TO_THE_PAGE, *(title for title in found.head if title.startswith(f"{comparison.metric}5")))
    places = [place for place, title in enumerate(found.head) if title not in left_out]
    longest = max(len(word) for row in found.rows for word in row[0].split())
    for place in places:
        own = {"justify": "right", "no_wrap": True} if place else {"min_width": longest}
        out.add_column(found.head[place], overflow="fold", **own)
    for row in found.rows:
        out.add_row(*(row[place] for place in places))
    return out
