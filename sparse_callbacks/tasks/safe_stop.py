"""Checkpoints at Ctrl-C, at SIGTERM and every few steps, only where Lightning resumes them bitwise."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from sparse_callbacks.lightning.safe_files import save_atomically
from sparse_callbacks.tasks.run_state import inside_window

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStopped(Exception):  # noqa: N818  it is not an error: somebody asked for it
    """Raised where a signal has ended the run.

    Attributes:
        signum: the number of the signal.
        checkpoint: the path of the checkpoint that resumes the run; None before the first batch.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        self.signum, self.checkpoint = signum, checkpoint
        where = f"state saved in {checkpoint}" if checkpoint else "nothing was trained yet"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {where}")

    @property
    def exit_code(self) -> int:
        """128 + the number of the signal, as a shell reports it."""
        return 128 + self.signum


class SafeStop(Checkpoint):
    """Writes checkpoints that resume to bitwise the same end: every `every` steps, at a signal, and after training.

    A signal is acted on at the end of a batch, because Lightning counts a batch only after its step. A checkpoint that
    is due at the last batch of an epoch, or at a batch that a validation follows, waits for the end of a later batch:
    Lightning would resume it without the validation, its metrics and the hooks at the end of the epoch. If a whole
    epoch has no suitable batch, the checkpoint is written in the hooks at the end of that epoch. With several
    processes it also waits for the end of an accumulation window, since gradients inside it differ by rank. A second
    Ctrl-C ends the process at once.

    It is a `Checkpoint` so that Lightning calls it after all other callbacks.

    Args:
        path: the one file, replaced atomically: if the process is killed while it writes, the old file is still there.
        every: the number of optimizer steps between periodic checkpoints; None for no periodic checkpoints.

    Raises:
        ValueError: `every` is below 1.
        RunStopped: from its hooks, after a signal.
    """

    def __init__(self, path: Path, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(
                f"checkpoint_every={every} is not a number of optimizer steps. Give 1 or more, or null for none."
            )
        self.path, self.every = path, every
        self._signal: int | None = None
        self._due = False
        # a checkpoint was pending at the end of the last epoch already
        self._waited_an_epoch = False
        self._saved_at = -1
        self._previous_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # while the run was set up, Lightning's own handler was in place, and it only remembers the signal
        if trainer.received_sigterm:
            raise RunStopped(signal.SIGTERM, None)
        self._saved_at = trainer.global_step
        # Python lets only the main thread set handlers
        if threading.current_thread() is threading.main_thread():
            self._previous_handlers = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        # inside an accumulation window several batches end at the same step, and one checkpoint of it is enough
        if self.every is not None and step % self.every == 0 and step != self._saved_at:
            self._due = True
        if (self._due or self._stopping(trainer)) and resumes_exactly(trainer, batch_idx):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pending = self._due or self._stopping(trainer)
        if pending and self._waited_an_epoch:
            # no batch of a whole epoch was suitable, and none of the next one will be
            self._save(trainer)
        self._waited_an_epoch = pending

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)
        # not in teardown: by then Lightning has put back the handlers from before the run, and this would undo it
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _save(self, trainer: Any) -> None:
        """Write the checkpoint, and end the run if a signal asked for it."""
        self._due = self._waited_an_epoch = False
        self._saved_at = trainer.global_step
        if not trainer.fast_dev_run:
            save_atomically(trainer, self.path)
        if self._stopping(trainer):
            self._restore_handlers()
            raise RunStopped(self._signal or signal.SIGTERM, self.path)

    def _stopping(self, trainer: pl.Trainer) -> bool:
        """Whether any process got a signal."""
        stopping = self._signal is not None
        if trainer.world_size == 1:
            return stopping
        # all must stop at the same batch, or those that go on would wait for the others forever
        return bool(trainer.strategy.reduce_boolean_decision(stopping, all=False))

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        # at the second Ctrl-C somebody does not want to wait: the default handler ends the process
        if self._signal == signal.SIGINT and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._signal = signum
        # not `print`: a signal may arrive in the middle of another one, which cannot be entered twice
        again = " Press Ctrl-C again to exit at once." if signum == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(signum).name}: saving at the next batch boundary.{again}\n".encode())

    def _restore_handlers(self) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)
        self._previous_handlers = {}


def resumes_exactly(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint at the end of this batch resumes bitwise: nothing but the next batch may follow it."""
    ends_epoch = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    # max_steps is -1 for a run that only its epochs end
    ends_run = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    # inside a window each rank has gradients of its own, and one file holds those of rank 0 only
    splits_window = trainer.world_size > 1 and inside_window(trainer)
    return not (ends_epoch or ends_run or splits_window or validates_after(trainer, batch_idx))


def validates_after(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch (`val_check_interval`)."""
    epochs, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or batches is None or batches == float("inf"):
        return False
    if epochs is not None and (trainer.current_epoch + 1) % epochs:
        return False
    # with check_val_every_n_epoch=None Lightning counts batches over all epochs
    last = batch_idx if epochs is not None else trainer.fit_loop.total_batch_idx
    return bool((last + 1) % batches == 0)
