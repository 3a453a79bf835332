"""Ctrl-C, SIGTERM and periodic checkpoints: taken only where Lightning resumes bitwise."""

import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import Checkpoint

from sparse_callbacks.tasks.run_state import inside_window

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class RunStopped(Exception):  # noqa: N818  not an error: somebody asked for it
    """A signal ended the run; `checkpoint` (None before the first batch) resumes it.

    Attributes:
        signum: the signal.
        checkpoint: where the state lies.
    """

    def __init__(self, signum: int, checkpoint: Path | None) -> None:
        self.signum, self.checkpoint = signum, checkpoint
        where = f"state saved in {checkpoint}" if checkpoint else "nothing was trained yet"
        super().__init__(f"stopped by {signal.Signals(signum).name}; {where}")

    @property
    def exit_code(self) -> int:
        """128 + signal, as a shell reports it."""
        return 128 + self.signum


class SafeStop(Checkpoint):
    """Checkpoints that resume to bitwise the same end: every `every` steps, at a signal, and at the end of training.

    Signals are deferred to a batch boundary, as Lightning counts a batch only after its step. A checkpoint that falls
    on an epoch's last batch, or on one with a validation behind it, waits for the next batch boundary without: Lightning
    would resume it without the validation, its metrics and the epoch-end hooks. (If an epoch has no such boundary, it is
    taken at the end of the following epoch's hooks.) With several processes it also waits for the end of an accumulation
    window, whose gradients differ by rank. A second Ctrl-C ends the process at once.

    It is a `Checkpoint` so that Lightning calls it after all other callbacks.

    Args:
        path: the one file, replaced atomically, so that a kill while writing leaves the one before.
        every: optimizer steps between periodic checkpoints; None for none.
    """

    def __init__(self, path: Path, every: int | None = None) -> None:
        if every is not None and every < 1:
            raise ValueError(f"checkpoint_every={every} is no number of optimizer steps. Give 1 or more, or null for none.")
        self.path, self.every = path, every
        self._signal: int | None = None
        self._due = self._waited = False
        self._saved_at = -1
        self._previous: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.received_sigterm:  # Lightning's own handler took it while the run was set up
            raise RunStopped(signal.SIGTERM, None)
        self._saved_at = trainer.global_step
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in SIGNALS}

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        step = trainer.global_step
        if self.every is not None and step % self.every == 0 and step != self._saved_at:
            self._due = True
        if (self._due or self._stopping(trainer)) and resumes_exactly(trainer, batch_idx):
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        pending = self._due or self._stopping(trainer)
        if pending and self._waited:
            self._save(trainer)
        self._waited = pending and not self._waited

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._save(trainer)
        # here, not in teardown: by then Lightning has put back the handlers of before the run
        self._restore_handlers()

    def on_exception(self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException) -> None:
        self._restore_handlers()

    def _save(self, trainer: Any) -> None:
        """Write the checkpoint, and end the run if a signal asked for it."""
        self._due = self._waited = False
        self._saved_at = trainer.global_step
        if not trainer.fast_dev_run:
            save_atomically(trainer, self.path)
        if self._stopping(trainer):
            self._restore_handlers()
            raise RunStopped(self._signal or signal.SIGTERM, self.path)

    def _stopping(self, trainer: pl.Trainer) -> bool:
        """Whether any process was signalled; all must stop at the same batch."""
        stopping = self._signal is not None
        if trainer.world_size == 1:
            return stopping
        return bool(trainer.strategy.reduce_boolean_decision(stopping, all=False))

    def _remember(self, signum: int, frame: FrameType | None) -> None:
        if self._signal == signal.SIGINT and signum == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        self._signal = signum
        # os.write, since a signal may arrive in the middle of a print
        again = " Press Ctrl-C again to exit at once." if signum == signal.SIGINT else ""
        os.write(2, f"\n{signal.Signals(signum).name}: saving at the next batch boundary.{again}\n".encode())

    def _restore_handlers(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}


def resumes_exactly(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a checkpoint at the end of this batch resumes bitwise: nothing but the next batch may follow."""
    ends_epoch = trainer.is_last_batch or batch_idx + 1 >= trainer.num_training_batches
    ends_run = trainer.should_stop or 0 <= trainer.max_steps <= trainer.global_step
    window = trainer.world_size > 1 and inside_window(trainer)
    return not (ends_epoch or ends_run or window or validates_after(trainer, batch_idx))


def validates_after(trainer: pl.Trainer, batch_idx: int) -> bool:
    """Whether a validation follows this batch (`val_check_interval`)."""
    epochs, batches = trainer.check_val_every_n_epoch, trainer.val_check_batch
    if not trainer.enable_validation or batches is None or batches == float("inf"):
        return False
    if epochs is not None and (trainer.current_epoch + 1) % epochs:
        return False
    done = batch_idx if epochs is not None else trainer.fit_loop.total_batch_idx
    return bool((done + 1) % batches == 0)


def save_atomically(trainer: pl.Trainer, path: Path) -> None:
    """Write a checkpoint beside `path`, then put it in its place in one move. Called on every process."""
    beside = path.with_suffix(".partial")
    trainer.save_checkpoint(beside, weights_only=False)
    if trainer.is_global_zero:
        os.replace(beside, path)
    trainer.strategy.barrier("save_atomically")
