"""Checkpoints of a Trainer that are written whole or not at all."""

from pathlib import Path

from sparse_callbacks.core.files import replacing
from sparse_callbacks.lightning.namespaces import Trainer


def save_atomically(trainer: Trainer, path: Path) -> None:
    """Write a checkpoint beside `path`, then move it there in one operation; every process has to call this.

    Args:
        trainer: the Trainer, during or after a fit.
        path: the file; the folder is made where it is absent.
    """
    if trainer.is_global_zero:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as beside:
            trainer.save_checkpoint(beside, weights_only=False)
    else:  # it takes part in collecting the state, and writes nothing
        trainer.save_checkpoint(path, weights_only=False)
    trainer.strategy.barrier("save_atomically")
