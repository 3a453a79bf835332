"""A run in a hand-written loop that keeps a record of itself where it is asked to."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from sparse_callbacks.core.calendar import RunLength
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.loop_driver import LoopDriver
from sparse_callbacks.core.loop_host import LoopHost
from sparse_callbacks.core.loop_optimizers import LoopOptimizers
from sparse_callbacks.core.record.loop_record import LoopRecord, Wishes
from sparse_callbacks.core.record.record_file import refuse_unrecorded
from sparse_callbacks.core.record.row_times import refuse_interval


class RecordedLoop:
    """What :class:`~sparse_callbacks.core.sparse_run.SparseRun` is, as far as its record is concerned."""

    _model: nn.Module
    _called: nn.Module
    _engine: Engine
    _driver: LoopDriver
    _host: LoopHost
    _optimizers: LoopOptimizers
    _length: RunLength
    _epoch: int

    def __init__(self) -> None:
        self._record: LoopRecord | None = None
        self._saved_record: Mapping[str, Any] | None = None  # of the state that the run goes on from

    def report(
        self,
        path: str | Path,
        *,
        every: int | None = None,
        dense: str | Path | None = None,
        title: str = "",
        page: bool = True,
    ) -> Path:
        """Keep a record of the run in a folder, and write its page, ``report.html``, when the run is over.

        The first call comes before the first step and begins the record; a later one with the same folder writes the page of
        the run so far. :meth:`epoch_end` adds a row with the metrics of a validation. See ``docs/recording.md``.

        Args:
            path: the folder of the run; it is made where it is absent, and an earlier record in it is replaced.
            every: optimizer steps between two rows; at most one update in so many has a row. None: about 200 rows of
                the run, at least 50 steps apart.
            dense: the folder of a recorded dense run, which the page compares with.
            title: the headline of the page; default: the method.
            page: whether the page is written at the end.

        Returns:
            The path of the page.

        Raises:
            ValueError: ``every`` is not a number of steps.
            FileNotFoundError: ``dense`` holds no record.
            RuntimeError: the record is to begin, and steps were taken already; or the run is recorded in another folder.

        Example:
            >>> import tempfile, torch
            >>> from sparse_callbacks import sparsify
            >>> from sparse_callbacks.methods import Static
            >>> model = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> with sparsify(Static(0.5, print_plan=False), model, optimizer, steps=2) as run:
            ...     _ = run.report(tempfile.mkdtemp(), page=False)
            ...     for _ in range(2):
            ...         model(torch.randn(4, 8)).square().mean().backward()
            ...         optimizer.step()
            ...         optimizer.zero_grad()
        """
        folder = Path(path)
        if self._record is not None:
            return self._record.write_page(folder)
        self._refuse_closed()
        if self._driver.has_stepped:
            raise RuntimeError(
                "report() comes too late: steps were taken already, and a record holds the whole run. Call it right after "
                "sparsify()."
            )
        refuse_interval(every)
        if dense is not None:
            refuse_unrecorded(Path(dense), "dense")
        wishes = Wishes(folder, every, None if dense is None else Path(dense), title, page)
        length, epoch, steppers = self._length.total(), self._length.epoch(), self._optimizers
        self._record = LoopRecord(
            wishes, self._engine, self._model, self._called, lambda: steppers.steppers, length, epoch, self._host.warn
        )
        self._begin_record(self._saved_record)
        return self._record.page

    def _refuse_closed(self) -> None:
        """Refuse what a run cannot do any more once it is over."""
        raise NotImplementedError

    def _begin_record(self, saved: Mapping[str, Any] | None) -> None:
        """The run begins or goes on: so does its record, if the loop has asked for one.

        Args:
            saved: the state of the record that it goes on from; None for a new one.
        """
        self._saved_record = saved
        if self._record is not None:
            self._record.begin(saved, self._epoch)
            self._driver.record = self._record

    def _end_record(self, status: str) -> None:
        if self._driver.record is not None:
            self._driver.record.finish(status)
            self._driver.record = None

    def _record_state(self) -> dict[str, Any]:
        return {} if self._record is None else {"record": self._record.state()}
