"""The page of a recorded run, written by the package that reads records."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.inspection import extra

PAGE = "report.html"


def write_page(folder: Path, dense: Path | None = None) -> Path:
    """Write ``report.html`` into the folder of a recorded run; see ``sparse_callbacks.reporting.page.write_report``.

    Args:
        folder: the folder of the run.
        dense: the folder of a dense run to compare with; None for none.

    Raises:
        ImportError: the extra ``report`` is not installed.
    """
    return Path(_reporting().write_report(folder, dense))


def page_or_warning(folder: Path, dense: Path | None, warn: Callable[[str], object]) -> None:
    """Write the page of a run that is over; what it fails of is a warning, as the run and its record stay as they are."""
    try:
        write_page(folder, dense)
    except Exception as error:  # whatever reading records and drawing may raise
        warn(
            f"{PAGE} was not written ({with_class(error)}). The record of the run is complete: write the page with python -m "
            f"sparse_callbacks.report {folder}."
        )


def why_no_page() -> str:
    """What is missing to write a page, as a sentence for the user; empty where nothing is."""
    try:
        extra("matplotlib", "report")
    except ImportError as error:
        return f"the run is recorded, and its page {PAGE} will not be written at its end: {error}"
    return ""


def _reporting() -> ModuleType:
    # the one import upwards: a loop's run writes its page when it ends, and records know nothing of pages
    return importlib.import_module("sparse_callbacks.reporting.page")
