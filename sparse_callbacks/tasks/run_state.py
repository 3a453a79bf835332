"""Random states and unfinished gradients in a checkpoint, so that a run resumes bitwise."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, distributed, nn

from sparse_callbacks.core.randomness import random_states, restore_random_states

KEY = "run_state"  # the entry of the checkpoint


def states_to_save() -> dict[str, Any]:
    """The current states of `random_states` as tensors, numbers and strings.

    A checkpoint may hold nothing else if it is to be loaded with ``weights_only=True``.
    """
    if torch.cuda.is_available():
        # the format holds the state of the current device also where the run has not used CUDA so far
        torch.cuda.init()  # type: ignore[no-untyped-call]
    states = random_states()
    name, keys, position, has_gauss, cached = states["numpy"]
    version, numbers, gauss = states["python"]
    saved = {
        "torch": states["torch"],
        "numpy": {
            "name": str(name),
            # numpy's keys are uint32, which few functions of torch know; int64 holds them all
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
    # restored for the device of this process, which may have another index than in the run that saved it
    if "cuda" in saved and torch.cuda.is_available():
        states["cuda"][torch.cuda.current_device()] = saved["cuda"].cpu()
    restore_random_states(states)


def accumulated_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by parameter name; parameters without a gradient are absent."""
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def inside_window(trainer: pl.Trainer) -> bool:
    """Whether the last micro-batch was not followed by an optimizer step, so that its window is unfinished."""
    return trainer.training and trainer.fit_loop._should_accumulate()


class RunState(pl.Callback):
    """Saves and restores what a bitwise resume needs and what neither Lightning nor a sparsity callback saves.

    These are the random states of every process, put back in `on_train_start`, after everything that draws numbers
    while the run is set up.

    Args:
        gradients: whether every `.grad` of an unfinished accumulation window is saved too. Sparsity callbacks save
            them themselves, so this is for dense runs.

    Raises:
        ValueError: in `on_train_start`, a checkpoint of a run with another number of processes.
    """

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        states: list[Any] = [states_to_save()]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            # Lightning writes the checkpoint of one process, so that one must hold the states of all
            distributed.all_gather_object(states, states_to_save())
        checkpoint[KEY] = {"random": states}
        if self.gradients and inside_window(trainer):
            checkpoint[KEY]["gradients"] = accumulated_gradients(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
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
        # not when the checkpoint is loaded: between then and now Lightning sets the gradients to zero
        for name, parameter in pl_module.named_parameters():
            if name in restored.get("gradients", {}):
                parameter.grad = restored["gradients"][name].to(parameter.device)
        restore_saved_states(restored["random"][trainer.global_rank])
