"""A pass over the training data of a Trainer, with its limits, its precision and its device."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

from torch import nn

from sparse_callbacks.core import data_pass
from sparse_callbacks.core.host import Forward

_compared: WeakSet[Any] = WeakSet()  # trainers whose data was already checked for randomness: one warning for each


def outputs(
    trainer: Any,
    module: nn.Module,
    forward: Forward | None,
    loader_given: Any | None,
    fraction: float,
    world: int,
    rank: int,
    train: Sequence[nn.Module] = (),
    passed: Callable[[Any], object] | None = None,
    values: bool = True,
) -> Iterator[Any]:
    """Outputs of the network for each batch of one pass: eval mode, no gradients, training's precision and device.

    Afterwards, also after an exception and where the iterator is closed early, everything is as before that
    :func:`~sparse_callbacks.core.undisturbed.undisturbed` puts back; the training loader keeps its position, and what
    the network logs in the pass is dropped. Compiled modules run eagerly, so their hooks fire.

    Args:
        trainer: the Trainer of the run.
        module: the LightningModule of the run.
        forward: a function of ``module`` and a batch that returns the output. None: the function
            :func:`~sparse_callbacks.core.data_pass.call`.
        loader_given: a loader that is iterated as it is; the ranks take its batches in turn. None: the training loader,
            as :func:`~sparse_callbacks.core.data_pass.in_order` arranges it.
        fraction: the share of the batches, in (0, 1], that is used, beginning with the first; at least one batch. Where
            the Trainer limits the batches of an epoch, it is a share of the limited number.
        world: the number of processes in the run.
        rank: the rank of this process.
        train: the modules that stay in train mode and keep what the pass makes of them, such as norms whose running
            statistics are collected.
        passed: called with each batch that has passed through the network. None: nobody counts them.
        values: whether data that differs each time that it is fetched is warned of.

    Raises:
        ValueError: the data cannot be iterated in order, or the network does not accept its batches.
    """
    data_pass.check_fraction(fraction)

    def choose() -> tuple[Iterable[Any], int | None]:
        if loader_given is not None:
            # the Trainer's limits are about its own loaders; a loader that was given for this pass is taken as it is
            given = data_pass.EveryNthBatch(loader_given, world, rank)
            return given, data_pass.batch_count(given, fraction)
        batches = data_pass.in_order(training_loader(trainer), world, rank, bool(train), users_sampler)
        if values:
            _warn_if_random(trainer, batches, rank)
        return batches, data_pass.batch_count(batches, fraction, _limit(trainer))

    @contextmanager
    def context() -> Iterator[None]:
        with trainer.precision_plugin.forward_context(), unlogged(module):
            yield

    yield from data_pass.outputs(
        module,
        choose,
        forward=forward,
        train=train,
        move=lambda batch: as_in_training(trainer, module, batch),
        precision=context,
        passed=passed,
    )


def training_loader(trainer: Any) -> Any:
    """The training loader of the run; before the Trainer has made its own one of the same data. None where there is none."""
    source = trainer.fit_loop._data_source
    made = trainer.train_dataloader
    return source.dataloader() if made is None and source.is_defined() else made


@contextmanager
def unlogged(module: nn.Module) -> Iterator[None]:
    """``log`` and ``log_dict`` of all LightningModules in ``module`` do nothing: a pass is none of the hooks that log."""
    modules = [m for m in module.modules() if callable(getattr(m, "log", None)) and hasattr(m, "log_dict")]
    # the instance's attributes hide the methods of the class
    before = [{n: v for n, v in vars(m).items() if n in ("log", "log_dict")} for m in modules]
    for logs in modules:
        vars(logs).update(log=_nothing, log_dict=_nothing)
    try:
        yield
    finally:
        for logs, own in zip(modules, before, strict=True):
            del vars(logs)["log"], vars(logs)["log_dict"]
            vars(logs).update(own)


def _nothing(*_: object, **__: object) -> None:
    return None


def users_sampler(sampler: Any) -> Any:
    """The sampler that the user gave: Lightning puts it into a data set of its own, to split that over ranks."""
    while (inner := getattr(getattr(sampler, "dataset", None), "_sampler", None)) is not None:
        sampler = inner
    return sampler


def _limit(trainer: Any) -> int | None:
    """Batches of an epoch where the Trainer limits them (``limit_train_batches``, ``overfit_batches``); else None."""
    try:
        return trainer.num_training_batches if trainer.num_training_batches < len(trainer.train_dataloader) else None
    except TypeError:  # no length
        return None


def as_in_training(trainer: Any, module: nn.Module, batch: Any) -> Any:
    """The batch with the precision and on the device that the training step would receive it."""
    # in the order of a training step: the hooks of a LightningModule see the batch before it moves to the device
    batch = trainer.precision_plugin.convert_input(batch)
    before = getattr(module, "_on_before_batch_transfer", None)
    if before is not None:
        batch = before(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _warn_if_random(trainer: Any, loader: Any, rank: int) -> None:
    """Warn once for each Trainer if fetching the same items of the data set twice gives different values."""
    if trainer in _compared:
        return
    _compared.add(trainer)
    if rank == 0 and data_pass.differs_when_fetched_again(loader):
        warnings.warn(data_pass.RANDOM_DATA, stacklevel=3)
