"""Random states, unfinished gradients and metrics in a checkpoint, so that a run resumes bitwise."""

import copy
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import Tensor, distributed, nn
from torchmetrics import Metric

from sparse_callbacks.core.randomness import random_states, restore_random_states
from sparse_callbacks.core.state_layout import shown_short, why_not_whole

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


def _states_from(saved: Mapping[str, Any]) -> dict[str, Any]:
    """The states of `random_states` in what `states_to_save` took, without that of CUDA."""
    position, has_gauss, cached = saved["numpy"]["rest"]
    keys = saved["numpy"]["keys"].cpu().numpy().astype(np.uint32)
    python = saved["python"]
    return {
        "torch": saved["torch"].cpu(),
        "numpy": (saved["numpy"]["name"], keys, int(position), int(has_gauss), cached),
        "python": (python["version"], tuple(python["numbers"].tolist()), python["gauss"]),
        "cuda": {},
    }


def restore_saved_states(saved: Mapping[str, Any]) -> None:
    """Put back what `states_to_save` took; a CUDA state needs a CUDA device and is left where there is none."""
    states = _states_from(saved)
    # restored for the device of this process, which may have another index than in the run that saved it
    if "cuda" in saved and torch.cuda.is_available():
        states["cuda"][torch.cuda.current_device()] = saved["cuda"].cpu()
    restore_random_states(states)


def accumulated_gradients(module: nn.Module) -> dict[str, Tensor]:
    """Copies of the gradients by parameter name; parameters without a gradient are absent."""
    return {name: p.grad.detach().clone() for name, p in module.named_parameters() if p.grad is not None}


def begun_metrics(module: nn.Module) -> dict[str, dict[str, Any]]:
    """The states of the metrics that have seen a batch since their last reset, by the name of the metric."""
    begun = {n: m for n, m in module.named_modules() if isinstance(m, Metric) and m.update_called}
    return {name: copy.deepcopy(metric.metric_state) for name, metric in begun.items()}


def restore_metrics(module: nn.Module, saved: Mapping[str, Mapping[str, Any]]) -> None:
    """Let metrics go on from what `begun_metrics` gave."""
    metrics = {n: m for n, m in module.named_modules() if isinstance(m, Metric)}
    for name in saved.keys() & metrics.keys():
        for key, value in saved[name].items():
            setattr(metrics[name], key, value)
        metrics[name].to(metrics[name].device)


def inside_window(trainer: pl.Trainer) -> bool:
    """Whether the last micro-batch was not followed by an optimizer step, so that its window is unfinished."""
    return trainer.training and trainer.fit_loop._should_accumulate()


def refuse_damaged(restored: Any, module: nn.Module, path: object) -> None:
    """Refuse an entry of a checkpoint that `RunState` cannot have written.

    Args:
        restored: what the checkpoint holds under `KEY`.
        module: the module whose gradients may be in it.
        path: the checkpoint's path, for the error.

    Raises:
        ValueError: says what is wrong.
    """
    if why := _why_damaged(restored, dict(module.named_parameters())) or _why_other_metrics(restored, module):
        raise ValueError(
            f"ckpt_path={path} is damaged: its {KEY} {why}, so the run would not go on as it was. Give another checkpoint "
            "of the run."
        )


def _why_damaged(restored: Any, parameters: Mapping[str, nn.Parameter]) -> str:
    if not isinstance(restored, Mapping) or not isinstance(restored.get("random"), list) or not restored["random"]:
        return f"is {shown_short(restored)} and has no random states"
    for saved in restored["random"]:
        try:
            # other generators than those of the run take the states first, because nothing may change where one is wrong
            states = _states_from(saved)
            torch.Generator().set_state(states["torch"])
            np.random.RandomState().set_state(states["numpy"])
            random.Random().setstate(states["python"])
            # the generators take any position and any number that is kept for later
            whole = 0 <= states["numpy"][2] <= len(states["numpy"][1]) and isinstance(states["python"][2], float | None)
        except Exception as error:  # each generator has errors of its own for what is not a state of it
            return f"has random states that are none ({type(error).__name__}: {error})"
        if not whole:
            return f"has a generator at {states['numpy'][2]}, {shown_short(states['python'][2])}"
    gradients = restored.get("gradients", {})
    if not isinstance(gradients, Mapping):
        return f"has {shown_short(gradients)} as gradients"
    for name, gradient in gradients.items():
        fits = name in parameters and isinstance(gradient, Tensor) and gradient.shape == parameters[name].shape
        if not fits or not gradient.is_floating_point() or why_not_whole(gradient):
            return f"has {shown_short(gradient)} as the gradient of {shown_short(name)}"
    return ""


def _why_other_metrics(restored: Mapping[str, Any], module: nn.Module) -> str:
    """Why the saved metrics cannot be those of ``module``; empty where they can, or none were saved."""
    metrics = {n: m for n, m in module.named_modules() if isinstance(m, Metric)}
    saved = restored.get("metrics", [{}] * len(restored["random"]))
    if not isinstance(saved, list) or len(saved) != len(restored["random"]):
        return f"has {shown_short(saved)} as metrics of {len(restored['random'])} processes"
    for of_process in saved:
        if not isinstance(of_process, Mapping):
            return f"has {shown_short(of_process)} as metrics"
        for name in of_process.keys() & metrics.keys():
            state, own = of_process[name], metrics[name].metric_state
            if not isinstance(state, Mapping) or state.keys() != own.keys():
                return f"has {shown_short(state)} as the state of {name}"
            for key, value in state.items():
                if not _is_like(value, own[key]):
                    return f"has {shown_short(value)} as {key} of {name}"
    return ""


def _is_like(value: Any, own: Any) -> bool:
    """A saved value may be the state of a metric whose present state is ``own``."""
    if not isinstance(own, Tensor):
        return isinstance(value, list) and all(isinstance(v, Tensor) for v in value)
    same = isinstance(value, Tensor) and value.dtype == own.dtype and value.shape == own.shape
    return same and not why_not_whole(value)


class RunState(pl.Callback):
    """Saves and restores what a bitwise resume needs and what neither Lightning nor a sparsity callback saves.

    These are the random states of every process, put back in `on_train_start`, after everything that draws numbers
    while the run is set up; and within an epoch what its metrics have counted so far, or the epoch's training accuracy
    would be that of the batches after the resume.

    Args:
        gradients: whether every `.grad` of an unfinished accumulation window is saved too. Sparsity callbacks save
            them themselves, so this is for dense runs.

    Raises:
        ValueError: a damaged checkpoint, where it is loaded; in `on_train_start`, one of a run with another number of
            processes.
    """

    def __init__(self, gradients: bool) -> None:
        self.gradients = gradients
        self._restored: dict[str, Any] | None = None

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        checkpoint[KEY] = {"random": _of_all_processes(trainer, states_to_save())}
        # at the end of an epoch Lightning resets them, and a resumed run would not
        if trainer.training and not trainer.is_last_batch:
            checkpoint[KEY]["metrics"] = _of_all_processes(trainer, begun_metrics(pl_module))
        if self.gradients and inside_window(trainer):
            checkpoint[KEY]["gradients"] = accumulated_gradients(pl_module)

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if KEY in checkpoint:
            refuse_damaged(checkpoint[KEY], pl_module, trainer.ckpt_path)
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
        if "metrics" in restored:  # not in checkpoints of version 0.1
            restore_metrics(pl_module, restored["metrics"][trainer.global_rank])
        restore_saved_states(restored["random"][trainer.global_rank])


def _of_all_processes(trainer: pl.Trainer, mine: Any) -> list[Any]:
    """What each process gives, by rank: Lightning writes the checkpoint of one, which must hold the states of all."""
    states: list[Any] = [mine]
    if trainer.world_size > 1:
        states = [None] * trainer.world_size
        distributed.all_gather_object(states, mine)
    return states
