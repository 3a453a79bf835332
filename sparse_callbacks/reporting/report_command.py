"""The command ``python -m sparse_callbacks.report``: pages of recorded runs.

python -m sparse_callbacks.report outputs/2026-01-01/12-00-00 --dense outputs/2026-01-01/11-00-00
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from sparse_callbacks.core.record.record_file import has_record
from sparse_callbacks.reporting.page import write_report


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the page of each run that the command line names, and print its path.

    Args:
        arguments: words of the command line; None: those of the process.

    Raises:
        SystemExit: with 2, a folder is not that of a recorded run, or matplotlib is missing; the pages of the other runs
            are written.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.dense is not None and not has_record(given.dense):
        parser.error(
            f"--dense {given.dense} holds no record. Give the folder of a dense run, with record/run.json in it."
        )
    failed = False
    for folder in given.runs:
        try:
            print(write_report(folder, given.dense, png=given.pictures), flush=True)
        except (OSError, ValueError, ImportError) as error:
            # one damaged run must not keep the others from their pages
            failed = True
            print(f"{parser.prog}: {error}", file=sys.stderr, flush=True)
    if failed:
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_callbacks.report",
        description="Write report.html into the folder of a recorded run: what was gained, how the topology moved, and what the "
        "training cost. The page is one file, which opens offline. Its figures are also written as PNG, to the folder report.",
    )
    parser.add_argument(
        "runs", metavar="RUN", type=Path, nargs="+", help="folder of a run, which holds the folder record"
    )
    parser.add_argument(
        "--dense", metavar="RUN", type=Path, help="folder of a dense run, which the runs are compared with"
    )
    parser.add_argument("--no-pictures", dest="pictures", action="store_false", help="write no PNG files")
    return parser
