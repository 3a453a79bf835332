"""Weights that a run begins with, from the checkpoint of another run."""

from pathlib import Path

import pytorch_lightning as pl

from sparse_callbacks.core.checkpoint_file import read_mapping

ADVICE = "Give initial_weights= the checkpoint of a run of the same model, such as checkpoints/last.ckpt in its folder."


def refuse_missing(path: Path) -> None:
    """Refuse a path where no file is.

    Raises:
        FileNotFoundError: the file is not there.
    """
    if not path.is_file():
        raise FileNotFoundError(f"initial_weights={path} is not there (looked at {path.absolute()}). {ADVICE}")


def load_initial_weights(module: pl.LightningModule, path: Path) -> None:
    """Load the weights of a checkpoint into a model that has not been trained: those of its dense run, to prune and fine-tune.

    Nothing else of the checkpoint is taken: the run begins at step 0 with a new optimizer.

    Args:
        module: the module of the run.
        path: a checkpoint of a run of the same module.

    Raises:
        FileNotFoundError: the file is not there.
        ValueError: it is not a checkpoint, or of another model.
    """
    refuse_missing(path)
    saved = read_mapping(path, ADVICE).get("state_dict", {})
    own = module.state_dict()
    odd = sorted(own.keys() ^ saved.keys())
    odd += [name for name in own if name in saved and saved[name].shape != own[name].shape]
    if odd:
        raise ValueError(f"initial_weights={path} is of another model: {', '.join(odd[:4])} do not fit. {ADVICE}")
    module.load_state_dict(saved)
