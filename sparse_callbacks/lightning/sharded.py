"""A Trainer that shards the model: what is refused of it, and its checkpoints."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_callbacks import methods
from sparse_callbacks.core.checkpoint_file import refuse_broken
from sparse_callbacks.core.initial_masks import StartsSparse
from sparse_callbacks.core.local_parts import is_sharded, why_not_in_parts
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizers import is_elementwise
from sparse_callbacks.core.scored_start import first_score
from sparse_callbacks.core.selection import NOT_TRAINED, Entry
from sparse_callbacks.lightning.averaging import averaging_callbacks
from sparse_callbacks.lightning.refusals import has_class_named
from sparse_callbacks.lightning.trainer_optimizers import scaler_of

_STRATEGY = "ModelParallelStrategy"
_EXACT = (methods.Static, methods.SET, methods.RigL, methods.GMP, methods.DPF)
_BY_WEIGHTS = ("magnitude", "nonzero")  # first masks that are made of the weights
_INSTEAD = "Use strategy='ddp', or one device."
_META = "meta.pt"  # what Lightning writes beside the shards of a folder


def shards_model(trainer: Any) -> bool:
    """Whether the Trainer's strategy lets the module shard its parameters (FSDP2)."""
    return has_class_named(trainer.strategy, (_STRATEGY,))


def refuse_sharding(trainer: Any, method: Method) -> None:
    """Refuse a run with sharded parameters that would not be exact.

    Args:
        trainer: a Trainer whose processes are set up.
        method: the method of the run.

    Raises:
        ValueError: another method or start, tensor parallelism, averages, or a GradScaler.
    """
    if not shards_model(trainer):
        return
    name = type(method).__name__
    if why := _why_not_exact(method):
        raise ValueError(f"{name} under {_STRATEGY}: {why}. {_INSTEAD}")
    for callback in averaging_callbacks(trainer):
        raise ValueError(
            f"{type(callback).__name__} under {_STRATEGY} averages whole weights, and each process has a part of them. "
            f"Remove it from callbacks=. {_INSTEAD}"
        )
    tensor_parallel = trainer.strategy.device_mesh["tensor_parallel"].size()
    if tensor_parallel > 1:
        raise ValueError(
            f"{name} under {_STRATEGY}: tensor_parallel_size={tensor_parallel} cuts layers along with their inputs and "
            "outputs, and masks are made for parameters that data parallelism alone shards. Give "
            "tensor_parallel_size=1 and data_parallel_size= the number of devices."
        )
    if scaler_of(trainer) is not None:
        raise ValueError(
            f"{name} under {_STRATEGY}: a GradScaler skips a step by the gradients of its own process, so the processes "
            "would not take the same steps. Use precision='bf16-mixed' or 32."
        )


def _why_not_exact(method: Method) -> str:
    """Why the masks of a method are not those of one process where parameters are sharded; empty where they are."""
    listed = ", ".join(c.__name__ for c in _EXACT)
    ours = [c for c in type(method).__mro__ if issubclass(c, Method) and c.__module__.startswith("sparse_callbacks.")]
    others = [c for c in type(method).__mro__ if issubclass(c, Method) and c not in ours]
    if others or not isinstance(method, _EXACT):
        return f"it reads whole parameters, of which each process has a part. Exact on shards are {listed}"
    if isinstance(method, methods.SupTickets):
        return "the merged ticket is made of whole parameters, of which each process has a part. Give the base method alone"
    by_weights = isinstance(method, StartsSparse) and (first_score(method) or method.initial_mask in _BY_WEIGHTS)
    if by_weights or (isinstance(method, StartsSparse) and method.rescale is not None):
        return "its start reads whole layers, of which each process has a part. Leave initial_mask= and rescale= out, or give a file"
    if isinstance(method, StartsSparse) and method.pattern is not None:
        return f"pattern={method.pattern!r} is one of groups of weights, of which each process may have a part. Leave it out"
    if isinstance(method, methods.SET) and method.neuron_importance is not None:
        return "neuron_importance= sums whole rows, of which each process may have a part. Leave it out"
    if isinstance(method, methods.DPF) and method.unit != "weight":
        return f"unit={method.unit!r} compares whole filters, of which each process may have a part. unit='weight' is exact"
    return ""


def refuse_steps(trainer: Any, module: Any) -> None:
    """Refuse steps that do not treat each weight of a sharded parameter by itself, or that nobody announces.

    Args:
        trainer: a Trainer whose optimizers are set up.
        module: its module.

    Raises:
        ValueError: manual optimization, or an optimizer that mixes the weights of a layer.
    """
    if not shards_model(trainer):
        return
    if not module.automatic_optimization:
        raise ValueError(
            f"manual optimization under {_STRATEGY}: how often torch adds to a sharded gradient between two steps cannot be "
            f"seen. Use automatic optimization. {_INSTEAD}"
        )
    if mixing := [type(o).__name__ for o in trainer.optimizers if not is_elementwise(o)]:
        raise ValueError(
            f"{mixing[0]} under {_STRATEGY}: what it does to parts of weights is not known. Use an optimizer of torch that "
            f"steps each weight by itself, such as torch.optim.AdamW. {_INSTEAD}"
        )


def refuse_parts(trainer: Any, module: Any, entries: Sequence[Entry]) -> None:
    """Refuse sharded parameters whose parts are not known to be slices along one dimension, and layers that would join.

    Args:
        trainer: a Trainer whose model is set up.
        module: its module.
        entries: all parameters; those without a reason become sparse.

    Raises:
        ValueError: parameters that lie otherwise, or that are not trained yet.
    """
    parameters = dict(module.named_parameters())
    names = [e.name for e in entries if not e.reason]
    sharded = [n for n in names if is_sharded(parameters[n])]
    if not shards_model(trainer):
        if sharded:
            raise ValueError(
                f"{sharded[0]} is a DTensor under {type(trainer.strategy).__name__}, which does not load and save it as "
                f"one. Use {_STRATEGY}, and shard in configure_model()."
            )
        return
    if waiting := [e.name for e in entries if e.reason in NOT_TRAINED]:
        raise ValueError(
            f"{', '.join(waiting)} frozen or in no optimizer under {_STRATEGY}, where no layer joins a run that has begun. "
            "Train them from the start, or keep them dense with exclude=."
        )
    if whole := [n for n in names if not is_sharded(parameters[n])]:
        raise ValueError(
            f"{', '.join(whole)} not sharded, so nobody averages their gradients over processes. Call "
            "fully_shard(network, mesh=self.device_mesh['data_parallel']) last in configure_model(), for the module whose forward "
            "training_step calls, or give exclude=."
        )
    if wrong := {n: why for n in sharded if (why := why_not_in_parts(parameters[n]))}:
        name, why = next(iter(wrong.items()))
        raise ValueError(
            f"{name}: {why}, and masks need slices along one dimension over a mesh of one. Call fully_shard(..., "
            "mesh=self.device_mesh['data_parallel']) and nothing else that shards."
        )


def reshard(trainer: Any, module: nn.Module) -> None:
    """Let each process have its parts alone, where a forward pass without a backward pass has left whole parameters.

    A validation does so. Until then the module holds other parameters than its optimizers, and the next forward pass would
    not see what is written into the parts.
    """
    if shards_model(trainer):
        from torch.distributed.fsdp import FSDPModule  # not in every build of torch

        for child in module.modules():
            if isinstance(child, FSDPModule):
                child.reshard()


def content_of(path: Any, advice: str) -> Any:
    """What is in a checkpoint, before the strategy loads it into the model; of a folder all but weights and optimizers,
    whose places are empty.

    Args:
        path: the file, or the folder of a distributed checkpoint.
        advice: what to do instead where it is damaged, as a sentence.
    """
    path = Path(path)
    if not (path / _META).is_file():
        refuse_broken(path, advice)
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    refuse_broken(path / _META, advice)
    found = torch.load(path / _META, map_location="cpu", weights_only=True)
    return {**found, "state_dict": {}, "optimizer_states": [{}]} if isinstance(found, dict) else found
