"""Callbacks of several networks that train in turn, or one on each rank."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.lightning.callback import SparsityCallback, peers_of
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.trainer_host import TrainerHost


class TurnsTrainerHost(TrainerHost):
    """The :class:`~sparse_callbacks.core.host.TurnsHost` of a callback."""

    def _share_of_data(self) -> tuple[int, int]:
        return 1, 0  # each network passes over all the data

    def average_gradients(self, on: bool) -> None:
        """See :meth:`~sparse_callbacks.core.host.TurnsHost.average_gradients`."""
        average_gradients(self.trainer, on)

    def loader_states(self) -> list[Any]:
        """See :meth:`~sparse_callbacks.core.host.TurnsHost.loader_states`."""
        return loader_states(self.trainer)

    def load_loader_states(self, states: Sequence[Any]) -> None:
        """See :meth:`~sparse_callbacks.core.host.TurnsHost.load_loader_states`."""
        load_loader_states(self.trainer, states)


class TurnTaking(SparsityCallback):
    """A callback whose networks train in turn, or one on each rank, and become one network now and then."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """Networks that take turns."""

    @property
    @abstractmethod
    def trains_apart(self) -> bool:
        """Every rank has a network of its own now."""

    @abstractmethod
    def data_epoch(self, epoch: int) -> int:
        """The number that samplers are given in place of ``epoch``."""

    @abstractmethod
    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """What this rank resumes from, of a checkpoint that holds the networks of all ranks."""

    @property
    def turns_host(self) -> TurnsTrainerHost:
        """The host of the run, with what networks that take turns need of it."""
        assert isinstance(self.host, TurnsTrainerHost)
        return self.host

    def _host_of(self, trainer: Trainer, module: LightningModule) -> TurnsTrainerHost:
        return TurnsTrainerHost(trainer, module, self.engine)

    def _refuse_neighbours(self, trainer: Trainer, names: Sequence[str]) -> None:
        peers = peers_of(trainer)
        if len(peers) > 1:
            raise ValueError(
                f"{type(self).__name__} trains several copies of the whole network, and {len(peers)} sparsity "
                "callbacks are in "
                "callbacks=. Leave it alone there, or use GaP."
            )
        super()._refuse_neighbours(trainer, names)

    def _state_to_resume(self, trainer: Trainer, module: LightningModule) -> Mapping[str, Any] | None:
        state = super()._state_to_resume(trainer, module)
        refuse_ranks(trainer, module, distributed.world_size(), self.workers)
        return None if state is None else self.own_state(state)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if distributed.world_size() > 1:
            refuse_split_data(trainer)
        super().on_train_start(trainer, pl_module)
        translate_epochs(trainer, self.data_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_epoch_start(trainer, pl_module)
        translate_epochs(trainer, self.data_epoch)  # of loaders that are made anew for the epoch
        reseed(trainer, self.data_epoch(trainer.current_epoch))
        if trainer.current_epoch == 0 or trainer.fit_loop.restarting:  # Lightning has made the iterator before
            draw_anew(trainer)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.in_training and self.trains_apart:
            # Lightning writes rank 0's checkpoint alone, so it carries the networks of all ranks
            weights = {k: t.detach() for k, t in self.model.state_dict().items() if isinstance(t, Tensor)}
            optimizers = [o.state_dict() for o in self.owners.optimizers]
            mine = {"weights": weights, "optimizers": optimizers, "loaders": self.turns_host.loader_states()}
            state["workers"] = distributed.gather({**mine, "grads": state.pop("grads", {})})
        return state

    def _gradients_to_save(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(held)  # each network has its own

    def _leave(self, module: LightningModule) -> None:
        if self.is_in_run:
            stop_translating(self.turns_host.trainer)
        super()._leave(module)


def refuse_ranks(trainer: Trainer, module: nn.Module, ranks: int, workers: int) -> None:
    """Refuse a run of several processes in which the workers would not be independent of each other, or not see all the
    data.

    Args:
        trainer: a Trainer with its strategy set up.
        module: the LightningModule of the run.
        ranks: the number of processes in the run.
        workers: the number of networks that train at once or in turn.

    Raises:
        ValueError: another number of processes than one or one for each worker, data split over ranks, gradients or
            batch statistics that are averaged over ranks whatever is asked.
    """
    if ranks == 1:
        return
    if ranks != workers:
        raise ValueError(
            f"the run has {ranks} processes and partitions= makes {workers} workers. Give Trainer(devices={workers}), "
            "one process for "
            "each, or devices=1, where they train one after another."
        )
    if trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            "each worker sees all the data, and this Trainer gives every process a part of it. Give "
            "Trainer(use_distributed_sampler=False)."
        )
    if not hasattr(trainer.strategy.model, "require_backward_grad_sync"):
        raise ValueError(
            f"{type(trainer.strategy).__name__} does not let its processes train different networks. Use "
            "strategy='ddp', or one process."
        )
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            "in manual optimization Lightning averages gradients over all processes, and the workers are different "
            "networks. Use "
            "automatic optimization, or one process (devices=1)."
        )
    if synced := [name for name, m in module.named_modules() if isinstance(m, nn.SyncBatchNorm)]:
        raise ValueError(
            f"{', '.join(synced)} average batch statistics over processes, and the workers are different networks. Use "
            "ordinary batch "
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
                f"each worker sees all the data, and {type(sampler).__name__}(num_replicas={sampler.num_replicas}) "
                "gives this process a "
                "part of it. Give num_replicas=1, rank=0, or a loader without it."
            )


def average_gradients(trainer: Trainer, on: bool) -> None:
    """Whether DistributedDataParallel averages gradients over ranks, and copies buffers from rank 0, from here on."""
    model = trainer.strategy.model
    if hasattr(model, "require_backward_grad_sync"):
        model.require_backward_grad_sync = model.require_forward_param_sync = on


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
    """Announce ``translate(epoch)`` in place of the epoch to every sampler of the training loaders that has
    ``set_epoch``.

    Lightning announces it before the first batch also where it goes on in the middle of an epoch, and calls no hook
    there.
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
    """What the training loaders of this rank resume from, None for those that cannot. Lightning saves those of rank 0
    alone."""
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
    """Make the training iterator of an epoch that has not begun yet again, so that nothing of it was drawn before
    now."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)
