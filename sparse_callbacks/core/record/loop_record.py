"""The record of a hand-written loop: what its driver tells, and the page at its end."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparse_callbacks.core import distributed
from sparse_callbacks.core.engine import Engine
from sparse_callbacks.core.record.description import command, libraries, machine
from sparse_callbacks.core.record.page import PAGE, page_or_warning, why_no_page, write_page
from sparse_callbacks.core.record.recorder import RunRecorder
from sparse_callbacks.core.record.row_times import steps_between_rows
from sparse_callbacks.core.record.samples import LoopSamples


@dataclass(frozen=True)
class Wishes:
    """What the user wants of a record.

    Attributes:
        folder: the folder of the run.
        every: optimizer steps between two rows; None: about 200 rows of the run, and 50 steps at least.
        dense: the folder of a dense run to compare with; None for none.
        title: the headline of the page.
        page: whether it is written when the run is over.
    """

    folder: Path
    every: int | None
    dense: Path | None
    title: str
    page: bool


class LoopRecord:
    """Keeps the record of a run in a hand-written loop.

    Args:
        wishes: what the user wants.
        engine: the engine of the run.
        model: its model.
        called: what the loop calls, the model or a wrapper of it.
        optimizers: a function that gives its optimizers.
        length: optimizer steps of the run; infinite where nobody knows.
        epoch: optimizer steps of an epoch; infinite where nobody knows.
        warn: warns the user.
    """

    def __init__(
        self,
        wishes: Wishes,
        engine: Engine,
        model: nn.Module,
        called: nn.Module,
        optimizers: Callable[[], Sequence[Optimizer]],
        length: float,
        epoch: float,
        warn: Callable[[str], object],
    ) -> None:
        self.wishes, self._engine, self._model, self._called = wishes, engine, model, called
        self._optimizers, self._length, self._epoch_length, self._warn = optimizers, length, epoch, warn
        self._without_page = not wishes.page
        if wishes.page and (text := why_no_page()):
            self._without_page = True
            warn(text)

    @property
    def page(self) -> Path:
        """Where the page of the run is written."""
        return self.wishes.folder / PAGE

    def begin(self, state: Mapping[str, Any] | None, epoch: int) -> None:
        """The run begins, or goes on from the ``state`` of its record, in ``epoch`` (from 0)."""
        self._samples, self._epoch = LoopSamples(), epoch
        self._in_epoch: int = 0 if state is None else state["in_epoch"]
        self._metrics: dict[str, float] = {} if state is None else dict(state["metrics"])
        device = next((p.device for p in self._model.parameters()), None)
        said = {
            "libraries": libraries(),
            "machine": {} if device is None else machine(device),
            "length": None if math.isinf(self._length) else int(self._length),
            "command": command(),
            "title": self.wishes.title,
        }
        every = steps_between_rows(self.wishes.every, self._length)
        method = self._engine.method
        self._recorder = RunRecorder(
            self.wishes.folder, self._model, [method], self._optimizers, every, said, self._warn
        )
        self._engine.record_by(self._recorder)
        self._recorder.begin(state)
        # in a resumed run too, for the samples of its batches
        around = None if self._called is self._model else self._called
        self._recorder.measure(around=around, called=self._samples.follow)

    # ------------------------------------------------------------------ what the driver tells

    def backward(self, optimizer: int, skipped: bool) -> None:
        """A backward pass has reached the parameters of an optimizer.

        Args:
            optimizer: its position in the run.
            skipped: the step before it was skipped by a GradScaler.
        """
        if skipped and not self._recorder.measures:
            self._recorder.add_samples(self._samples.take(self._engine.has_two_passes))
            self._recorder.skipped()
        self._samples.backward(optimizer)

    def batch_over(self) -> None:
        """Every optimizer has stepped."""
        self._in_epoch += 1
        self._recorder.add_samples(self._samples.take(self._engine.has_two_passes))
        self._recorder.window_over(self._recorder.step + 1, self._epochs_done(), dict)

    def _epochs_done(self) -> float:
        return self._epoch + (0.0 if math.isinf(self._epoch_length) else self._in_epoch / self._epoch_length)

    def epoch_end(self, metrics: Mapping[str, Any]) -> None:
        """An epoch and its validation are over."""
        self._epoch, self._in_epoch, self._metrics = self._epoch + 1, 0, dict(metrics)
        self._recorder.validated(float(self._epoch), metrics)

    def finish(self, status: str) -> None:
        """The loop is over."""
        self._engine.recorder = None
        self._samples.stop()
        self._recorder.finish(status, self._epochs_done(), self._metrics)

        if not self._without_page and status == "finished" and distributed.rank() == 0:
            page_or_warning(self.wishes.folder, self.wishes.dense, self._warn)

    # ------------------------------------------------------------------ what the user asks for

    def write_page(self, folder: Path) -> Path:
        """Write the page now, of the record so far.

        Raises:
            RuntimeError: the run is recorded in another folder.
            ImportError: the extra ``report`` is not installed.
        """
        if folder.absolute() != self.wishes.folder.absolute():
            raise RuntimeError(
                f"this run is recorded in {self.wishes.folder}, and a run has one record. Call report() with that folder, "
                "or give another folder before the first step."
            )
        if distributed.rank() == 0:
            self._recorder.file.flush()
            write_page(self.wishes.folder, self.wishes.dense)
        return self.page

    def state(self) -> dict[str, Any]:
        """The state of the record, for a checkpoint."""
        return {**self._recorder.state(gather=False), "in_epoch": self._in_epoch, "metrics": self._metrics}
