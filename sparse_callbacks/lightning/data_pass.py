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

ITEMS_COMPARED = 8  # a flip with probability one half is missed once in 256 times
_compared: WeakSet[Any] = WeakSet()  # trainers whose data was fetched twice to see whether it differs


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
    """What the network gives for each batch of one pass: eval mode, no gradients, precision and device as in training.

    Afterwards, also after an exception and where the iterator is closed early, every random generator and every
    module's ``training`` flag is as before; the training loader keeps its position. Compiled modules run eagerly, so
    their hooks fire.

    Args:
        trainer: the host.
        module: of the run.
        forward: function of ``module`` and a batch; None: see :func:`call`.
        loader_given: iterated as it is, ranks taking its batches in turn; None: see :func:`in_order`.
        fraction: share of the batches, from the first on, in (0, 1]; at least one batch. Of those that an epoch of
            training takes, where the host limits them.
        world: processes in the run.
        rank: of this one.
        train: modules that stay in train mode, such as norms whose running statistics are taken.

    Raises:
        ValueError: data that cannot be passed over, or batches that the network does not take.
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(f"data_fraction={fraction!r} is no share of the batches in (0, 1]. For all of them give 1.0.")
    with undisturbed(module):
        if loader_given is None:
            batches = in_order(trainer.train_dataloader, world, rank, whole=bool(train))
            _warn_if_random(trainer, batches, rank)
        else:
            batches = _Dealt(loader_given, world, rank)
        module.eval()
        for part in train:
            part.train()
        limit = None if loader_given is not None else _limit(trainer)
        for batch in islice(iter(batches), _count(batches, fraction, limit)):
            with torch.no_grad(), trainer.precision_plugin.forward_context(), torch.compiler.set_stance("force_eager"):
                moved = _moved(trainer, module, batch)
                found = call(module, moved) if forward is None else forward(module, moved)
            yield found  # outside: what the caller does between two batches is done in its own mode


def call(module: nn.Module, batch: Any) -> Any:
    """``module(batch)`` for a tensor, ``module(batch[0])`` for a tuple or list, ``module(**batch)`` for a mapping.

    Raises:
        ValueError: another type, or the module does not take it.
    """
    try:
        if isinstance(batch, Tensor):
            return module(batch)
        if isinstance(batch, Mapping):
            return module(**batch)
        if isinstance(batch, Sequence) and not isinstance(batch, str) and batch:
            return module(batch[0])
    except Exception as error:
        raise ValueError(
            f"{type(module).__name__}.forward failed on a batch of the training data ({type(error).__name__}: "
            f"{error}). A pass over the "
            "data calls module(batch), module(batch[0]) or module(**batch), by the batch's type. Give forward=, a "
            "function of module "
            "and batch that returns the network's output, e.g. forward=lambda module, batch: module.net(batch[0])."
        ) from error
    raise ValueError(
        f"a batch of the training data is a {type(batch).__name__}, and there is no general way to put it through a "
        "network. Give "
        "forward=, a function of module and batch that returns the network's output."
    )


def in_order(loader: Any, world: int = 1, rank: int = 0, whole: bool = False) -> Any:
    """A loader of the same batches in the order of the data set, without shuffling or dropping.

    Each rank sees every ``world``-th sample, and each sample is seen once. Of a sampler that holds ``indices`` (such as
    ``SubsetRandomSampler``) only those are seen. A loader with a method ``in_order()`` says itself what the order is.

    Args:
        loader: of the training data.
        world, rank: processes in the run, and this one.
        whole: leave out a last batch that the loader itself drops, or that is a single sample, of which norms take no
            statistics.

    Raises:
        ValueError: no such order is known.
    """
    if callable(own := getattr(loader, "in_order", None)):
        return own()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = f"{type(loader).__name__}{' over an IterableDataset' if isinstance(loader, DataLoader) else ''}"
        raise ValueError(
            "a pass over the training data needs a torch DataLoader over a data set with indices, and this is a "
            f"{kind}. Give "
            "statistics_dataloader=, a loader with the batches that the statistics are taken from."
        )
    size = loader.batch_size if loader.batch_sampler is None else getattr(loader.batch_sampler, "batch_size", None)
    if loader.batch_sampler is not None and not isinstance(size, int):
        raise ValueError(
            f"{type(loader.batch_sampler).__name__} makes the batches and has no batch_size, so they cannot be made in "
            "order. Give "
            "statistics_dataloader=, a loader with the batches that the statistics are taken from."
        )
    indices = _indices(loader)[rank::world]
    if whole and size is not None and (loader.drop_last or len(indices) % size == 1) and len(indices) > size:
        indices = indices[: len(indices) // size * size]
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
    while (inner := getattr(getattr(sampler, "dataset", None), "_sampler", None)) is not None:
        sampler = inner
    listed = sampler if isinstance(sampler, Sequence) else getattr(sampler, "indices", None)
    return range(len(loader.dataset)) if listed is None else [int(i) for i in listed]  # type: ignore[arg-type]


class _Dealt:
    """Every ``world``-th batch of a loader, from number ``rank`` on."""

    def __init__(self, loader: Any, world: int, rank: int) -> None:
        self._loader, self._world, self._rank = loader, world, rank

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._loader), self._rank, None, self._world)

    def __len__(self) -> int:
        return len(range(self._rank, len(self._loader), self._world))


def _limit(trainer: Any) -> int | None:
    """Batches of an epoch where the host takes fewer than there are (``limit_train_batches``, ``overfit_batches``)."""
    try:
        return trainer.num_training_batches if trainer.num_training_batches < len(trainer.train_dataloader) else None
    except TypeError:  # no length
        return None


def _count(batches: Any, fraction: float, limit: int | None) -> int | None:
    if limit is not None:
        return max(1, round(fraction * limit))
    if fraction == 1.0:
        return None
    try:
        return max(1, round(fraction * len(batches)))
    except TypeError as error:
        raise ValueError(
            f"data_fraction={fraction:g} of a loader without a length is no number of batches. Give data_fraction=1.0, "
            "or a loader with "
            "__len__."
        ) from error


def _moved(trainer: Any, module: nn.Module, batch: Any) -> Any:
    """The batch as the training step would get it."""
    batch = trainer.precision_plugin.convert_input(batch)
    before = getattr(module, "_on_before_batch_transfer", None)
    if before is not None:
        batch = before(batch, dataloader_idx=0)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=0)


def _warn_if_random(trainer: Any, loader: Any, rank: int) -> None:
    if trainer in _compared:
        return
    _compared.add(trainer)
    if (
        rank == 0
        and isinstance(loader, DataLoader)
        and any(not _same(loader.dataset[i], loader.dataset[i]) for i in _first(loader))
    ):
        warnings.warn(
            "the training data differs each time that it is fetched (random augmentation), and the statistics are "
            "taken of it as it is. "
            "To take them of data that is not augmented, give statistics_dataloader=.",
            stacklevel=3,
        )


def _first(loader: DataLoader[Any]) -> list[int]:
    return list(islice(iter(loader.sampler), ITEMS_COMPARED))


def _same(one: Any, other: Any) -> bool:
    """Whether two items of a data set are equal, as far as they are made of tensors, arrays, containers and numbers."""
    if hasattr(one, "__array__"):  # NaN equals NaN
        return bool(one.shape == other.shape and ((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, Sequence) and not isinstance(one, str | bytes):
        return isinstance(other, Sequence) and len(one) == len(other) and all(map(_same, one, other))
    return not isinstance(one, int | float | str | bytes) or one == other or one != one
