"""The checkpoint file that a fit resumes from, looked at before anything is loaded from it."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from sparse_callbacks.core.checkpoint import SavedRun, check_state
from sparse_callbacks.core.checkpoint_file import refuse_broken
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.state_layout import shown_short
from sparse_callbacks.lightning.refusals import is_tuner_checkpoint

_ADVICE = "Resume from another checkpoint of the run (ckpt_path=)."
# what Lightning reads of a checkpoint, and the types that it has
_PARTS: Mapping[str, type | tuple[type, ...]] = {
    "pytorch-lightning_version": str,
    "state_dict": Mapping,
    "callbacks": Mapping,
    "optimizer_states": list,
    "lr_schedulers": list,
    "loops": Mapping,
    "epoch": int,
    "global_step": int,
}


def refuse_damaged_checkpoint(method: Method, trainer: Any, module: nn.Module) -> None:
    """Refuse to resume from a damaged file, while model, optimizers and callbacks still are as they were.

    Lightning loads a checkpoint part by part, so that an error in a later one leaves a model with other weights. A path
    that is not a local file, one that is missing, and one that a CheckpointIO of the user's reads are left to Lightning.

    Args:
        method: the callback that resumes.
        trainer: the Trainer, in ``setup`` of a fit.
        module: the LightningModule.

    Raises:
        ValueError: the file is damaged or of another kind, or the callback cannot go on from what it holds.
    """
    path = trainer.ckpt_path
    own_files = type(trainer.strategy.checkpoint_io).__name__ == "TorchCheckpointIO"
    if not path or not own_files or not Path(path).exists():
        return
    refuse_broken(Path(path), _ADVICE)
    found = _content(Path(path))
    if found is None:
        return
    _refuse_other_parts(found, path)
    if method.fresh_start or is_tuner_checkpoint(path):
        return
    state = found["callbacks"].get(getattr(method, "state_key", None))
    saved = SavedRun.of(check_state(state, method.arguments, type(method).__name__, path), path)
    _refuse_other_weights(saved, found["state_dict"], module, path)


def _content(path: Path) -> Any:
    """What the file holds; None where Lightning, which may have been told to trust it, has to decide."""
    try:
        # mapped into memory: the tensors of a large checkpoint are not read for this look at it
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        return None  # hyperparameters of the user's own classes
    except Exception as error:  # whatever torch's reader finds in a file that is another one
        text = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{path} cannot be read as a checkpoint ({type(error).__name__}: {text}). {_ADVICE}"
        ) from error


def _refuse_other_parts(found: Any, path: object) -> None:
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds {shown_short(found)} and not a checkpoint of Lightning. {_ADVICE}")
    for key, types in _PARTS.items():
        if not isinstance(found.get(key), types) or isinstance(found.get(key), bool):
            has = shown_short(found[key]) if key in found else "missing"
            raise ValueError(
                f"{path} is not a checkpoint that a Trainer has written to resume from: {key!r} in it is {has}. {_ADVICE}"
            )
    for key in ("epoch", "global_step"):
        if found[key] < 0:
            raise ValueError(f"{path} is damaged: {key!r} in it is {found[key]}. {_ADVICE}")


def _refuse_other_weights(saved: SavedRun, weights: Mapping[str, Any], module: nn.Module, path: object) -> None:
    """Refuse masks without weights of their shape beside them, and weights that the model cannot take."""
    parameters = dict(module.named_parameters())
    for name, mask in saved.masks.items():
        there = weights.get(name)
        if not isinstance(there, Tensor) or there.shape != mask.shape:
            raise ValueError(
                f"{path} is damaged: it has a mask {list(mask.shape)} of {name}, and as weights {shown_short(there)}. "
                f"{_ADVICE}"
            )
        here = parameters.get(name)
        if here is not None and not is_lazy(here) and here.shape != mask.shape:
            raise ValueError(
                f"the checkpoint's masks do not fit the model: {name} differs in name or shape ({path}). Resume with the "
                "model and the include=, exclude=, keep_dense= of the interrupted run, or give fresh_start=True to "
                "make new masks."
            )
