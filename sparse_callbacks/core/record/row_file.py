"""Writes the files of a record on the first process, and never lets a full disk end a training run."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.record.record_file import (
    RunRecord,
    append_rows,
    begin_files,
    copy_files,
    cut_rows,
    has_record,
    read_record,
    write_masks,
    write_run,
)

MOST_WAITING = 50  # rows that are kept in memory until they are written
LONGEST = 5.0  # seconds that they are kept


class RowFile:
    """The files of a record, written by the first process.

    Where they cannot be written the run goes on without a record, and says so once.

    Args:
        folder: the folder of the run.
        warn: warns the user.
    """

    def __init__(self, folder: Path, warn: Callable[[str], object]) -> None:
        self.folder = folder
        self.written = 0
        """Rows of the run so far, those that wait included."""
        self._warn, self._writes = warn, distributed.rank() == 0
        self._waiting: list[Mapping[str, Any]] = []
        self._flushed = time.monotonic()

    def _try(self, write: Callable[..., object], *args: Any) -> None:
        if not self._writes:
            return
        try:
            write(self.folder, *args)
        except OSError as error:
            self._writes = False
            self._warn(
                f"the record of this run cannot be written into {self.folder} ({error}), and ends here; training goes on. "
                "Make room, or give another folder."
            )

    def begin(self) -> None:
        """A new record begins: that of an earlier run in this folder is removed."""
        self._try(begin_files)

    def go_on(self, earlier: Path, started: str, step: int, rows: int) -> dict[str, Tensor]:
        """The record goes on after a step from which the run is resumed.

        Args:
            earlier: the folder in which the run was recorded.
            started: when the run has begun, by which its record is known again.
            step: the step.
            rows: rows that the run had written by then.

        Returns:
            The first masks that the record keeps.
        """
        found = _run_in(self.folder, started)
        if not found and _run_in(earlier, started):
            self._try(lambda folder: copy_files(earlier, folder))
        elif not found:
            self._try(begin_files)
        self._try(cut_rows, step, rows)
        self.written = rows if found or _run_in(self.folder, started) else 0
        masks = read_record(self.folder).masks if _run_in(self.folder, started) else {}
        return {name: pair["first"] for name, pair in masks.items()}

    def say(self, run: RunRecord) -> None:
        """Write what is said once, and all rows that wait."""
        self._try(write_run, run)
        self.flush()

    def keep_masks(self, first: Mapping[str, Tensor], last: Mapping[str, Tensor]) -> None:
        """Write first and last masks by parameter name."""
        self._try(
            write_masks, {name: {"first": mask, "last": last[name]} for name, mask in first.items() if name in last}
        )

    def add(self, rows: Sequence[Mapping[str, Any]], at_once: bool) -> None:
        """Add rows; they reach the file at once, or when many have come together or some seconds have passed."""
        self.written += len(rows)
        if self._writes:
            self._waiting += rows
        if at_once or len(self._waiting) >= MOST_WAITING or time.monotonic() - self._flushed > LONGEST:
            self.flush()

    def flush(self) -> None:
        """Write all rows that wait."""
        self._flushed = time.monotonic()
        waiting, self._waiting = self._waiting, []
        if waiting:
            self._try(append_rows, waiting)


def _run_in(folder: Path, started: str) -> bool:
    """Whether a folder holds the record of the run that has begun at that time."""
    if not has_record(folder):
        return False
    try:
        return read_record(folder).run.started == started
    except ValueError:  # damaged, by a full disk perhaps: the record begins anew
        return False
