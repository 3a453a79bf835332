"""The page of a recorded run, written by the package that reads records."""

import importlib
from pathlib import Path
from types import ModuleType

from sparse_callbacks.core.inspection import extra


def write_page(folder: Path, dense: Path | None = None) -> Path:
    """Write ``report.html`` into the folder of a recorded run; see ``sparse_callbacks.reporting.page.write_report``.

    Args:
        folder: the folder of the run.
        dense: the folder of a dense run to compare with; None for none.

    Raises:
        ImportError: the extra ``report`` is not installed.
    """
    return Path(_reporting().write_report(folder, dense))


def refuse_missing_extra() -> None:
    """Say before a run that its page will need the extra ``report``.

    Raises:
        ImportError: the extra is not installed.
    """
    for module in ("matplotlib", "pandas"):
        extra(module, "report")


def _reporting() -> ModuleType:
    # the one import upwards: a loop's run writes its page when it ends, and records know nothing of pages
    return importlib.import_module("sparse_callbacks.reporting.page")
