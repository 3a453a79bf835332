"""One forward pass over the training data that leaves no trace, for methods that look at activations."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset

from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.randomness import undisturbed

ITEMS_COMPARED = 8  # a random flip with probability 1/2 in each fetch goes unnoticed in 1 of 256 runs
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
) -> Iterator[Any]:
    """Outputs of the network for each batch of one pass: eval mode, no gradients, training's precision and device.

    Afterwards, also after an exception and where the iterator is closed early, every random generator and every
    module's ``training`` flag is as before; the training loader keeps its position. Compiled modules run eagerly, so
    their hooks fire.

    Args:
        trainer: the Trainer of the run.
        module: the LightningModule of the run.
        forward: a function of ``module`` and a batch that returns the output. None: the function :func:`call`.
        loader_given: a loader that is iterated as it is; the ranks take its batches in turn. None: the training loader,
            as :func:`in_order` arranges it.
        fraction: the share of the batches, in (0, 1], that is used, beginning with the first; at least one batch. Where
            the Trainer limits the batches of an epoch, it is a share of the limited number.
        world: the number of processes in the run.
        rank: the rank of this process.
        train: the modules that stay in train mode, such as norms whose running statistics are collected.

    Raises:
        ValueError: the data cannot be iterated in order, or the network does not accept its batches.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(
            f"data_fraction={fraction!r} is not a share of the batches in (0, 1]. For all of them give 1.0."
        )
    with undisturbed(module):
        if loader_given is None:
            batches = in_order(trainer.train_dataloader, world, rank, whole=bool(train))
            _warn_if_random(trainer, batches, rank)
        else:
            batches = _EveryNthBatch(loader_given, world, rank)
        module.eval()
        for part in train:
            part.train()
        # the Trainer's limits are about its own loaders; a loader that was given for this pass is taken as it is
        limit = None if loader_given is not None else _limit(trainer)
        for batch in islice(iter(batches), _batch_count(batches, fraction, limit)):
            with torch.no_grad(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
                moved = _as_in_training(trainer, module, batch)
                found = call(module, moved) if forward is None else forward(module, moved)
            yield found  # outside of the contexts, so that the caller's code between two batches runs in its own mode


def call(module: nn.Module, batch: Any) -> Any:
    """``module(batch)`` for a tensor, ``module(batch[0])`` for a tuple or list, ``module(**batch)`` for a mapping.

    Raises:
        ValueError: the batch has another type, or the module does not accept it.
    """
    try:
        if isinstance(batch, Tensor):
            return module(batch)
        if isinstance(batch, Mapping):
            return module(**batch)
        if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
            return module(batch[0])  # by convention the inputs come first and the labels after them
    except Exception as error:  # whatever a forward pass raises on inputs that it is not made for
        raise ValueError(
            f"{type(module).__name__}.forward failed on a batch of the training data ({type(error).__name__}: "
            f"{error}). A pass over the data calls module(batch), module(batch[0]) or module(**batch), by the batch's "
            "type. Give forward=, a function of module and batch that returns the network's output, e.g. "
            "forward=lambda module, batch: module.net(batch[0])."
        ) from error
    raise ValueError(
        f"a batch of the training data is a {type(batch).__name__}, and there is no general way to put it through a "
        "network. Give forward=, a function of module and batch that returns the network's output."
    )


def in_order(loader: Any, world: int = 1, rank: int = 0, whole: bool = False) -> Any:
    """A loader of the same batches in the order of the data set, without shuffling or dropping.

    Each rank sees every ``world``-th sample, and each sample is seen once. Where the sampler holds ``indices`` (such as
    ``SubsetRandomSampler``), only the samples at these indices are seen. A loader that has a method ``in_order()``
    returns the ordered loader itself.

    Args:
        loader: the loader of the training data.
        world: the number of processes in the run.
        rank: the rank of this process.
        whole: True to leave out an incomplete last batch that the loader itself drops, or that is a single sample, from
            which norms cannot take statistics.

    Raises:
        ValueError: the loader is not a DataLoader over a data set with indices, or its batch size is not known.
    """
    if callable(own := getattr(loader, "in_order", None)):
        return own()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = f"{type(loader).__name__}{' over an IterableDataset' if isinstance(loader, DataLoader) else ''}"
        raise ValueError(
            "a pass over the training data needs a torch DataLoader over a data set with indices, and this is a "
            f"{kind}. Give statistics_dataloader=, a loader with the batches that the statistics are taken from."
        )
    size = loader.batch_size if loader.batch_sampler is None else getattr(loader.batch_sampler, "batch_size", None)
    if loader.batch_sampler is not None and not isinstance(size, int):
        raise ValueError(
            f"{type(loader.batch_sampler).__name__} makes the batches and has no batch_size, so they cannot be made in "
            "order. Give statistics_dataloader=, a loader with the batches that the statistics are taken from."
        )
    # not as a DistributedSampler does, which repeats samples until all ranks have the same number
    indices = _indices(loader)[rank::world]
    if whole and size is not None and (loader.drop_last or len(indices) % size == 1) and len(indices) > size:
        indices = indices[: len(indices) // size * size]
    # without the generator of the loader, which a second iteration would move on
    return DataLoader(
        loader.dataset,
        batch_size=size,
        sampler=indices,
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        worker_init_fn=loader.worker_init_fn,
        multiprocessing_context=loader.multiprocessing_context,
        pin_memory=loader.pin_memory,
    )


def _indices(loader: DataLoader[Any]) -> Sequence[int]:
    """Indices that the loader draws from, whichever samplers Lightning has wrapped around the user's."""
    sampler: Any = (
        loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", loader.sampler)
    )
    # Lightning puts the user's sampler into a data set of its own in order to split it over ranks: unwrap it.
    while (inner := getattr(getattr(sampler, "dataset", None), "_sampler", None)) is not None:
        sampler = inner
    listed = sampler if isinstance(sampler, Sequence) else getattr(sampler, "indices", None)
    return range(len(loader.dataset)) if listed is None else [int(i) for i in listed]  # type: ignore[arg-type]


class _EveryNthBatch:
    """Every ``world``-th batch of a loader, from number ``rank`` on."""

    def __init__(self, loader: Any, world: int, rank: int) -> None:
        self._loader, self._world, self._rank = loader, world, rank

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._loader), self._rank, None, self._world)

    def __len__(self) -> int:
        return len(range(self._rank, len(self._loader), self._world))


def _limit(trainer: Any) -> int | None:
    """Batches of an epoch where the Trainer limits them (``limit_train_batches``, ``overfit_batches``); else None."""
    try:
        return trainer.num_training_batches if trainer.num_training_batches < len(trainer.train_dataloader) else None
    except TypeError:  # no length
        return None


def _batch_count(batches: Any, fraction: float, limit: int | None) -> int | None:
    """The number of batches that the pass takes; None for all."""
    # before the whole fraction is looked at: a limited loader ends early with all of its batches too
    if limit is not None:
        return max(1, round(fraction * limit))
    if fraction == 1.0:
        return None
    try:
        return max(1, round(fraction * len(batches)))
    except TypeError as error:
        raise ValueError(
            f"data_fraction={fraction:g} of a loader without a length is not a number of batches. "
            "Give data_fraction=1.0, or a loader with __len__."
        ) from error


def _as_in_training(trainer: Any, module: nn.Module, batch: Any) -> Any:
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
    if (
        rank == 0
        and isinstance(loader, DataLoader)
        and any(not _same_item(loader.dataset[i], loader.dataset[i]) for i in _first_indices(loader))
    ):
        warnings.warn(
            "the training data differs each time that it is fetched (random augmentation), and the statistics are "
            "taken of it as it is. To take them of data that is not augmented, give statistics_dataloader=.",
            stacklevel=3,
        )


def _first_indices(loader: DataLoader[Any]) -> list[int]:
    """Indices of the first items, as many as are compared."""
    return list(islice(iter(loader.sampler), ITEMS_COMPARED))


def _same_item(one: Any, other: Any) -> bool:
    """Whether two items of a data set are equal; parts of types other than those below count as equal."""
    if hasattr(one, "__array__"):  # one != one holds for NaN only: two NaN at the same place count as equal
        return bool(one.shape == other.shape and ((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping):
        return (
            isinstance(other, Mapping) and one.keys() == other.keys() and all(_same_item(one[k], other[k]) for k in one)
        )
    if isinstance(one, Sequence) and not isinstance(one, str | bytes):
        return isinstance(other, Sequence) and len(one) == len(other) and all(map(_same_item, one, other))
    # as above, NaN counts as equal to NaN
    return not isinstance(one, int | float | str | bytes) or one == other or one != one
