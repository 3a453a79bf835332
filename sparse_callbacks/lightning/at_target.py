"""The best checkpoint and early stopping, which count only epochs at target sparsity."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pytorch_lightning.callbacks import EarlyStopping, ModelCheckpoint

from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.lightning.logged_network import summarize
from sparse_callbacks.lightning.namespaces import Trainer, classes_elsewhere
from sparse_callbacks.lightning.safe_files import save_atomically

if TYPE_CHECKING:
    from pytorch_lightning.callbacks import EarlyStopping as AnyEarlyStopping
    from pytorch_lightning.callbacks import ModelCheckpoint as AnyModelCheckpoint
else:
    # a Trainer of the other Lightning knows these by its own classes: a checkpoint is called behind all other callbacks
    AnyModelCheckpoint = type("AnyModelCheckpoint", (ModelCheckpoint, *classes_elsewhere("Checkpoint")), {})
    AnyEarlyStopping = type("AnyEarlyStopping", (EarlyStopping, *classes_elsewhere("Callback")), {})


def at_target(trainer: Trainer) -> bool:
    """Whether every sparsity callback of a Trainer has reached its target; always true in a dense run, which has no target."""
    return all(callback.at_target for callback in trainer.callbacks if isinstance(callback, SparsityCallback))


def _is_validated(trainer: Trainer) -> bool | None:
    """Whether a validation belongs to the current epoch; None where there is none in any, or batches are counted over epochs."""
    every = trainer.check_val_every_n_epoch
    if every is None or not trainer.enable_validation:
        return None
    return bool((trainer.current_epoch + 1) % every == 0)


def _refuse_empty(name: str, value: str) -> None:
    if not value:
        raise ValueError(
            f"{name}='' names nothing. Give for example {name}='best'."
            if name == "filename"
            else f"{name}='' names no metric. Give one that the module logs, such as {name}='val_loss'."
        )


class BestAtTarget(AnyModelCheckpoint):
    """Keeps the checkpoint of the best epoch at target sparsity.

    Under gradual pruning the best epoch of all would be an early one, with an almost dense network. An epoch counts where
    every sparsity callback is at its target at the epoch's end; in a dense run each of them does. The one file is replaced
    in a single operation, so that a run that is killed leaves the best checkpoint so far whole.

    Args:
        monitor: the metric that epochs are compared by, as the module logs it, such as ``"val_loss"``.
        mode: ``"min"`` or ``"max"``: which of two values is better.
        dirpath: the folder of the file. None: the folder of the Trainer's first logger, or its ``default_root_dir``.
        filename: the file's name without ``.ckpt``.

    Attributes:
        best_model_path: the path of the file; empty where no epoch was at the target with a value of ``monitor``.
        best_model_score: the value of ``monitor`` in that epoch, a scalar tensor; None where there is none.

    Raises:
        TypeError, ValueError: an argument of another type, another ``mode``, or an empty name.
        MisconfigurationException: from Lightning, at the end of the first epoch that counts: it was validated and the module
            has not logged ``monitor``.

    Example:
        >>> from sparse_callbacks import BestAtTarget
        >>> BestAtTarget("val_loss", dirpath="checkpoints").filename
        'best'
    """

    # by this attribute sparsity callbacks know that no early dense network can win here, so they do not warn
    only_at_target = True

    @checked
    def __init__(
        self,
        monitor: str,
        mode: Literal["min", "max"] = "min",
        dirpath: str | Path | None = None,
        filename: str = "best",
    ) -> None:
        _refuse_empty("monitor", monitor)
        _refuse_empty("filename", filename)
        super().__init__(
            dirpath,
            filename=filename,
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # without a validation there may be no value to compare yet; behind one a missing value is refused by Lightning
        if at_target(trainer) and (self.monitor in trainer.callback_metrics or _is_validated(trainer)):
            super().on_train_epoch_end(trainer, pl_module)

    def _save_checkpoint(self, trainer: Trainer, filepath: str) -> None:
        # where temporary files lie on another disk, Lightning copies the new file over the best one so far: a kill or
        # a full disk would leave half of it
        save_atomically(trainer, Path(filepath))
        self._last_global_step_saved = trainer.global_step
        self._last_checkpoint_saved = filepath
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
            # only the best epoch so far is saved here, and a run that is killed has told it already
            best = float(trainer.callback_metrics[str(self.monitor)])
            summarize(trainer.loggers, {f"best/{self.monitor}": best, "best/epoch": trainer.current_epoch})


class EarlyStoppingAtTarget(AnyEarlyStopping):
    """Stops after ``patience`` epochs at target sparsity without a better value.

    Epochs before every sparsity callback is at its target neither stop the run nor set the value to beat, since an almost
    dense network is better than the sparse one that comes of it. Of a run with validations only epochs with one count.

    Args:
        monitor: the metric that epochs are compared by, as the module logs it, such as ``"val_loss"``.
        mode: ``"min"`` or ``"max"``: which of two values is better.
        patience: number of epochs to wait, 1 or more.
        min_delta: by how much a value has to be better to count, 0 or more.

    Raises:
        TypeError, ValueError: an argument of another type, another ``mode``, ``patience`` below 1, ``min_delta`` below 0, or an
            empty name.
        RuntimeError: from Lightning: the module has not logged ``monitor`` by the first epoch that counts.

    Example:
        >>> from sparse_callbacks import EarlyStoppingAtTarget
        >>> EarlyStoppingAtTarget("val_loss", patience=5).patience
        5
    """

    # as in `BestAtTarget`
    only_at_target = True

    @checked
    def __init__(
        self, monitor: str, mode: Literal["min", "max"] = "min", patience: int = 3, min_delta: float = 0.0
    ) -> None:
        _refuse_empty("monitor", monitor)
        if patience < 1:
            raise ValueError(f"patience={patience!r} is not a number of epochs to wait. Give 1 or more.")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta={min_delta!r} is not by how much a value has to be better. Give 0 or more.")
        super().__init__(monitor, min_delta=min_delta, patience=patience, mode=mode, check_on_train_epoch_end=True)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        # the value of an epoch without a validation is that of an earlier one, and would count a second time
        if at_target(trainer) and _is_validated(trainer) is not False:
            super().on_train_epoch_end(trainer, pl_module)
