"""Several networks that train in turn, or one on each rank. A Trainer is used by its attributes, not imported."""

import random
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

Trainer = Any


def refuse_ranks(trainer: Trainer, module: nn.Module, ranks: int, workers: int) -> None:
    """Refuse a run of several processes in which the workers would not be independent of each other, or not see all the data.

    Args:
        trainer: with its strategy set up.
        module: of the run.
        ranks: processes in the run.
        workers: networks that train at once or in turn.

    Raises:
        ValueError: another number of processes than one or one for each worker, data split over ranks, gradients or batch statistics
            that are averaged over ranks whatever is asked.
    """
    if ranks == 1:
        return
    if ranks != workers:
        raise ValueError(
            f"the run has {ranks} processes and partitions= makes {workers} workers. Give Trainer(devices={workers}), one process for "
            "each, or devices=1, where they train one after another."
        )
    if trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            "each worker sees all the data, and this Trainer gives every process a part of it. Give "
            "Trainer(use_distributed_sampler=False)."
        )
    if not hasattr(trainer.strategy.model, "require_backward_grad_sync"):
        raise ValueError(
            f"{type(trainer.strategy).__name__} does not let its processes train different networks. Use strategy='ddp', or one process."
        )
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            "in manual optimization Lightning averages gradients over all processes, and the workers are different networks. Use "
            "automatic optimization, or one process (devices=1)."
        )
    if synced := [name for name, m in module.named_modules() if isinstance(m, nn.SyncBatchNorm)]:
        raise ValueError(
            f"{', '.join(synced)} average batch statistics over processes, and the workers are different networks. Use ordinary batch "
            "norms (Trainer(sync_batchnorm=False)), or one process (devices=1)."
        )


def refuse_split_data(trainer: Trainer) -> None:
    """Refuse a sampler of the user's that gives each process a part of the data.

    Raises:
        ValueError: there is one.
    """
    for sampler in _all_samplers(trainer):
        if getattr(sampler, "num_replicas", 1) > 1:
            raise ValueError(
                f"each worker sees all the data, and {type(sampler).__name__}(num_replicas={sampler.num_replicas}) gives this process a "
                "part of it. Give num_replicas=1, rank=0, or a loader without it."
            )


def average_gradients(trainer: Trainer, on: bool) -> None:
    """Whether DistributedDataParallel averages gradients over ranks, and copies buffers from rank 0, from here on."""
    model = trainer.strategy.model
    if hasattr(model, "require_backward_grad_sync"):
        model.require_backward_grad_sync = model.require_forward_param_sync = on


def seed_everything(seed: int) -> None:
    """Seed torch on all devices, Python and, where it is imported, numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed % 2**32)


# ---------------------------------------------------------------------- data order


def _loaders(trainer: Trainer) -> Sequence[Any]:
    """The training loaders, as far as they are made."""
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    found: Sequence[Any] = [] if combined is None else combined.flattened
    return found


def _all_samplers(trainer: Trainer) -> Iterator[Any]:
    for loader in _loaders(trainer):
        batches = getattr(loader, "batch_sampler", None)
        yield from (getattr(loader, "sampler", None), getattr(batches, "sampler", None), batches, loader)


def _samplers(trainer: Trainer) -> Iterator[Any]:
    """Samplers of the training loaders to which Lightning announces the epoch."""
    return (s for s in _all_samplers(trainer) if callable(getattr(s, "set_epoch", None)))


def reseed(trainer: Trainer, seed: int) -> None:
    """Seed the generators that loaders and samplers have of their own."""
    for holder in _all_samplers(trainer):
        if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
            generator.manual_seed(seed)


def translate_epochs(trainer: Trainer, translate: Callable[[int], int]) -> None:
    """Announce ``translate(epoch)`` in place of the epoch to every sampler of the training loaders that has ``set_epoch``.

    Lightning announces it before the first batch also where it goes on in the middle of an epoch, and calls no hook there.
    """
    for sampler in _samplers(trainer):
        if "set_epoch" not in vars(sampler):
            announced = sampler.set_epoch
            sampler.set_epoch = lambda epoch, announced=announced: announced(translate(epoch))
            sampler.set_epoch(trainer.current_epoch)


def stop_translating(trainer: Trainer) -> None:
    """Undo :func:`translate_epochs`."""
    for sampler in _samplers(trainer):
        vars(sampler).pop("set_epoch", None)


def loader_states(trainer: Trainer) -> list[Any]:
    """What the training loaders of this rank resume from, None for those that cannot. Lightning saves those of rank 0 alone."""
    return [loader.state_dict() if _has_state(loader) else None for loader in _loaders(trainer)]


def load_loader_states(trainer: Trainer, states: Sequence[Any]) -> None:
    """Give the training loaders of this rank what :func:`loader_states` found, before the first batch is drawn."""
    for loader, state in zip(_loaders(trainer), states, strict=True):
        if state is not None:
            loader.load_state_dict(state)
    draw_anew(trainer)


def _has_state(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def draw_anew(trainer: Trainer) -> None:
    """Make the training iterator of an epoch that has not begun yet again, so that nothing of it was drawn before now."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)
