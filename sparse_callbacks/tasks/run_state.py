"""What a checkpoint of `train.py` holds beyond Lightning's: random states, and gradients inside an accumulation window."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, distributed, nn

from sparse_callbacks.core.randomness import random_states, restore_random_states

KEY = "run_state"


def states_to_save() -> dict[str, Any]:
    """The states of `random_states` in tensors, numbers and words, which a checkpoint may hold under ``weights_only=True``."""
    if torch.cuda.is_available():
        # a run on the CPU has not used CUDA so far, and its checkpoint holds the device's state all the same
        torch.cuda.init()  # type: ignore[no-untyped-call]
    states = random_states()
    name, keys, position, has_gauss, cached = states["numpy"]
    version, numbers, gauss = states["python"]
    saved = {
        "torch": states["torch"],
        "numpy": {
            "name": str(name),
            # torch has no tensors of numpy's uint32 that can be saved everywhere, so the words are widened
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "rest": [int(position), int(has_gauss), float(cached)],
        },
        "python": {"version": version, "numbers": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss},
    }
    if states["cuda"]:
        saved["cuda"] = states["cuda"][torch.cuda.current_device()]
    return saved


def restore_saved_states(saved: Mapping[str, Any]) -> None:
    """Put back what `states_to_save` took; a CUDA state needs a CUDA device and is left where there is none."""
    position, has_gauss, cached = saved["numpy"]["rest"]
    keys = saved["numpy"]["keys"].cpu().numpy().astype(np.uint32)
    python = saved["python"]
    states: dict[str, Any] = {
        "torch": saved["torch"].cpu(),
        "numpy": (saved["numpy"]["name"], keys, int(position), int(has_gauss), cached),
        "python": (python["version"], tuple(python["numbers"].tolist()), python["gauss"]),
        "cuda": {},
    }
    if "cuda" in saved and torch.cuda.is_available():
        states["cuda"][torch.cuda.current_device()] = saved["cuda"].cpu()
    restore_random_states(states)


def accumulated_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by parameter name; parameters without one are absent."""
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def inside_window(trainer: pl.Trainer) -> bool:
    """Whether the batch just done was no optimizer step but part of an accumulation window."""
    return trainer.training and trainer.fit_loop._should_accumulate()


class RunState(pl.Callback):
    """Saves and restores what a bitwise resume needs and neither Lightning nor the sparsity callback saves.

    Random states of every process, taken at the checkpoint and put back in `on_train_start`, after everything that
    draws numbers while the run is set up; with `gradients`, also every `.grad` of an unfinished accumulation window
    (the sparsity callbacks save them themselves).
    """

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        states: list[Any] = [states_to_save()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            distributed.all_gather_object(states, states_to_save())
        checkpoint[KEY] = {"random": states}
        if self.gradients and inside_window(trainer):
            checkpoint[KEY]["gradients"] = accumulated_gradients(pl_module)

    def on_load_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint.get(KEY)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        restored, self._restored = self._restored, None
        if restored is None:
            return
        processes = len(restored["random"])
        if processes != trainer.world_size:
            raise ValueError(
                f"ckpt_path: the checkpoint is of a run with {processes} processes and this run has "
                f"{trainer.world_size}, so data order and random states would differ. "
                f"Resume with trainer.devices={processes}."
            )
        # earlier the Trainer would zero the gradients again
        for name, parameter in pl_module.named_parameters():
            if name in restored.get("gradients", {}):
                parameter.grad = restored["gradients"][name].to(parameter.device)
        restore_saved_states(restored["random"][trainer.global_rank])
