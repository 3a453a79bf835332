"""What a checkpoint of `train.py` holds beyond Lightning's: random states, and gradients inside an accumulation window."""

import random
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, distributed, nn

KEY = "run_state"


def random_states() -> dict[str, Any]:
    """States of the generators of torch (CPU and the current CUDA device), numpy and Python, as tensors and numbers."""
    name, keys, position, has_gauss, cached = np.random.get_state(legacy=True)
    version, numbers, gauss = random.getstate()
    states = {
        "torch": torch.get_rng_state(),
        "numpy": {
            "name": str(name),
            "keys": torch.from_numpy(np.asarray(keys).astype(np.int64)),
            "rest": [int(position), int(has_gauss), float(cached)],
        },
        "python": {"version": version, "numbers": torch.tensor(numbers, dtype=torch.int64), "gauss": gauss},
    }
    if torch.cuda.is_available():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` took; a CUDA state needs a CUDA device and is left where there is none."""
    torch.set_rng_state(states["torch"].cpu())
    saved = states["numpy"]
    position, has_gauss, cached = saved["rest"]
    keys = saved["keys"].cpu().numpy().astype(np.uint32)
    np.random.set_state((saved["name"], keys, int(position), int(has_gauss), cached))
    saved = states["python"]
    random.setstate((saved["version"], tuple(saved["numbers"].tolist()), saved["gauss"]))
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


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
        states: list[Any] = [random_states()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            distributed.all_gather_object(states, random_states())
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
        set_random_states(restored["random"][trainer.global_rank])
