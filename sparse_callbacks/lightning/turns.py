"""Callbacks of several networks that train in turn, or one on each rank."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from pytorch_lightning import LightningModule
from torch import Tensor, nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.optimizer_modes import has_modes
from sparse_callbacks.core.two_pass import stepping
from sparse_callbacks.lightning.callback import SparsityCallback, peers_of
from sparse_callbacks.lightning.namespaces import Trainer
from sparse_callbacks.lightning.trainer_host import TrainerHost


class TurnsTrainerHost(TrainerHost):
    """The :class:`~sparse_callbacks.core.host.TurnsHost` of a callback."""

    def _share_of_data(self) -> tuple[int, int]:
        return 1, 0  # (processes, rank) as in a run of one process: each network passes over all the data

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
    """A callback whose networks train in turn, or one on each rank, and are combined into one from time to time."""

    @property
    @abstractmethod
    def workers(self) -> int:
        """The number of networks, which train in turn or one on each rank."""

    @property
    @abstractmethod
    def trains_apart(self) -> bool:
        """Whether every rank currently trains a network of its own."""

    @abstractmethod
    def data_epoch(self, epoch: int) -> int:
        """The epoch number that samplers receive in place of ``epoch`` and derive the order of the data from."""

    @abstractmethod
    def own_state(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """The part of ``state``, saved with the networks of all ranks, that this rank resumes from."""

    @property
    def trainer_host(self) -> TurnsTrainerHost:
        """The host of the run, with the operations for networks that train in turn."""
        assert isinstance(self.host, TurnsTrainerHost)
        return self.host

    def _host_of(self, trainer: Trainer, module: LightningModule) -> TurnsTrainerHost:
        return TurnsTrainerHost(trainer, module, self.engine)

    def _refuse_neighbours(self, trainer: Trainer, names: Sequence[str]) -> None:
        peers = peers_of(trainer)
        if len(peers) > 1:
            raise ValueError(
                f"{type(self).__name__} trains several copies of the whole network, and {len(peers)} sparsity "
                "callbacks are in callbacks=. Leave it alone there, or use GaP."
            )
        for optimizer in filter(has_modes, trainer.optimizers):
            raise ValueError(
                f"{type(optimizer).__name__} has a point for training and one for evaluation, and {type(self).__name__} "
                "loads other networks between the two. Use an optimizer without modes, such as AdamW, or GaP."
            )
        for optimizer in trainer.optimizers:
            if stepping(optimizer) is not optimizer:
                raise ValueError(
                    f"{type(optimizer).__name__} holds the optimizer that takes its steps, and {type(self).__name__} puts "
                    "the optimizers of other networks in its place. Use an optimizer with one gradient a step, or GaP."
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
        translate_epochs(trainer, self.data_epoch)  # again: the loaders may be new in this epoch
        reseed(trainer, self.data_epoch(trainer.current_epoch))
        # in these epochs Lightning made the iterator before this hook, so it drew from the old seed
        if trainer.current_epoch == 0 or trainer.fit_loop.restarting:
            restart_data_iterator(trainer)

    def state_dict(self) -> dict[str, Any]:
        state = super().state_dict()
        if self.attachment.in_training and self.trains_apart:
            # Lightning writes the checkpoint of rank 0 only, so that one must hold the networks of all ranks
            weights = {k: t.detach() for k, t in self.model.state_dict().items() if isinstance(t, Tensor)}
            optimizers = [o.state_dict() for o in self.owners.optimizers]
            mine = {"weights": weights, "optimizers": optimizers, "loaders": self.trainer_host.loader_states()}
            # gradients of an open window are in it too: each rank accumulates those of its own network
            open_window = {key: state.pop(key, {}) for key in ("grads", "dense_grads")}
            state["workers"] = distributed.gather({**mine, **open_window})
        return state

    def _gradients_to_save(self, held: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(held)  # not averaged over ranks: each network has its own gradients

    def _leave(self, module: LightningModule) -> None:
        if self.attachment.host is not None:
            stop_translating(self.trainer_host.trainer)
        super()._leave(module)


def refuse_ranks(trainer: Trainer, module: nn.Module, ranks: int, workers: int) -> None:
    """Refuse a run of several processes in which workers would depend on each other or would not see all the data.

    Args:
        trainer: a Trainer with its strategy set up.
        module: the LightningModule of the run.
        ranks: the number of processes in the run.
        workers: the number of networks that train at once or in turn.

    Raises:
        ValueError: the number of processes is neither one nor the number of workers, the data is split over ranks, or
            gradients or batch statistics are averaged over ranks in a way that cannot be switched off.
    """
    if ranks == 1:
        return
    if ranks != workers:
        raise ValueError(
            f"the run has {ranks} processes and partitions= makes {workers} workers. Give Trainer(devices={workers}), "
            "one process for each, or devices=1, where they train one after another."
        )
    if trainer._accelerator_connector.use_distributed_sampler:
        raise ValueError(
            "each worker sees all the data, and this Trainer gives every process a part of it. Give "
            "Trainer(use_distributed_sampler=False)."
        )
    # the switch by which DistributedDataParallel lets ranks keep gradients of their own
    if not hasattr(trainer.strategy.model, "require_backward_grad_sync"):
        raise ValueError(
            f"{type(trainer.strategy).__name__} does not let its processes train different networks. Use "
            "strategy='ddp', or one process."
        )
    if not getattr(module, "automatic_optimization", True):
        raise ValueError(
            "in manual optimization Lightning averages gradients over all processes, and the workers are different "
            "networks. Use automatic optimization, or one process (devices=1)."
        )
    if synced := [name for name, m in module.named_modules() if isinstance(m, nn.SyncBatchNorm)]:
        raise ValueError(
            f"{', '.join(synced)} average batch statistics over processes, and the workers are different networks. Use "
            "ordinary batch norms (Trainer(sync_batchnorm=False)), or one process (devices=1)."
        )


def refuse_split_data(trainer: Trainer) -> None:
    """Refuse a sampler, set by the user, that gives each process a part of the data.

    Raises:
        ValueError: a training loader has such a sampler.
    """
    for sampler in _all_samplers(trainer):
        if getattr(sampler, "num_replicas", 1) > 1:
            raise ValueError(
                f"each worker sees all the data, and {type(sampler).__name__}(num_replicas={sampler.num_replicas}) "
                "gives this process a part of it. Give num_replicas=1, rank=0, or a loader without it."
            )


def average_gradients(trainer: Trainer, on: bool) -> None:
    """Switch on or off that DistributedDataParallel averages gradients over ranks and copies buffers from rank 0."""
    model = trainer.strategy.model
    if hasattr(model, "require_backward_grad_sync"):
        model.require_backward_grad_sync = model.require_forward_param_sync = on


# ---------------------------------------------------------------------- data order


def _loaders(trainer: Trainer) -> Sequence[Any]:
    """The training loaders; none before Lightning has made them."""
    combined = getattr(trainer.fit_loop, "_combined_loader", None)
    found: Sequence[Any] = [] if combined is None else combined.flattened
    return found


def _all_samplers(trainer: Trainer) -> Iterator[Any]:
    """Everything that may decide the order of the data: samplers, batch samplers and the training loaders."""
    for loader in _loaders(trainer):
        batches = getattr(loader, "batch_sampler", None)
        yield from (getattr(loader, "sampler", None), getattr(batches, "sampler", None), batches, loader)


def _samplers(trainer: Trainer) -> Iterator[Any]:
    """Samplers of the training loaders that have ``set_epoch``, through which Lightning reports the epoch."""
    return (s for s in _all_samplers(trainer) if callable(getattr(s, "set_epoch", None)))


def reseed(trainer: Trainer, seed: int) -> None:
    """Seed the random generators that training loaders and samplers hold themselves."""
    for holder in _all_samplers(trainer):
        if isinstance(generator := getattr(holder, "generator", None), torch.Generator):
            generator.manual_seed(seed)


def translate_epochs(trainer: Trainer, translate: Callable[[int], int]) -> None:
    """Replace ``set_epoch`` of every sampler of the training loaders, so that it receives ``translate(epoch)``.

    No hook could do it in time: where Lightning resumes in the middle of an epoch, it calls ``set_epoch`` before the
    first batch without calling a hook.
    """
    for sampler in _samplers(trainer):
        if "set_epoch" not in vars(sampler):  # an attribute of the instance: it is replaced already
            original = sampler.set_epoch
            # `original` as a default is bound now: later the name stands for the method of the loop's last sampler
            sampler.set_epoch = lambda epoch, original=original: original(translate(epoch))
            # Lightning may have reported the current epoch before, to the method that is replaced here
            sampler.set_epoch(trainer.current_epoch)


def stop_translating(trainer: Trainer) -> None:
    """Undo :func:`translate_epochs`."""
    for sampler in _samplers(trainer):
        vars(sampler).pop("set_epoch", None)  # the method of its class is found again


def loader_states(trainer: Trainer) -> list[Any]:
    """The state of each training loader of this rank; None for a loader that cannot save one.

    Lightning itself saves the states of rank 0 only.
    """
    return [loader.state_dict() if _has_state(loader) else None for loader in _loaders(trainer)]


def load_loader_states(trainer: Trainer, states: Sequence[Any]) -> None:
    """Load the states from :func:`loader_states` into the training loaders of this rank, before the first batch."""
    for loader, state in zip(_loaders(trainer), states, strict=True):
        if state is not None:
            loader.load_state_dict(state)
    # Lightning has made the iterator before, from the positions that it restored itself
    restart_data_iterator(trainer)


def _has_state(loader: Any) -> bool:
    return callable(getattr(loader, "state_dict", None)) and callable(getattr(loader, "load_state_dict", None))


def restart_data_iterator(trainer: Trainer) -> None:
    """Make the training iterator again at the beginning of an epoch, so that the loaders' current seeds and states
    decide all of its batches."""
    fetcher = trainer.fit_loop._data_fetcher
    if fetcher is not None:
        iter(fetcher)  # Lightning's fetcher makes new iterators of its loaders each time that it is iterated
