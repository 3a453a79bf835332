"""One forward pass over data that leaves no trace, for methods that look at activations."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import DataLoader, IterableDataset

from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.undisturbed import undisturbed

ITEMS_COMPARED = 8  # a random flip with probability 1/2 in each fetch goes unnoticed in 1 of 256 runs
RANDOM_DATA = (
    "the training data differs each time that it is fetched (random augmentation), and the statistics are taken of it as "
    "it is. To take them of data that is not augmented, give statistics_dataloader=."
)


class NoPassError(ValueError):
    """There is no way to pass over the training data; an error of the data itself is not one."""


class OneValueError(NoPassError):
    """A norm in training mode has one value a channel in a batch, which has no variance."""


def outputs(
    module: nn.Module,
    choose: Callable[[], tuple[Iterable[Any], int | None]],
    *,
    forward: Forward | None = None,
    train: Sequence[nn.Module] = (),
    move: Callable[[Any], Any] | None = None,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    passed: Callable[[Any], object] | None = None,
) -> Iterator[Any]:
    """Outputs of the network for each batch of one pass, in eval mode and without gradients.

    Afterwards, also after an exception and where the iterator is closed early, everything is as before that
    :func:`~sparse_callbacks.core.undisturbed.undisturbed` puts back: random generators, flags, buffers and other
    tensors. Compiled modules run eagerly, so their hooks fire.

    Args:
        module: the module to run.
        choose: gives the batches of the pass and the number of them that is used (None: all); what it draws at random
            leaves no trace either.
        forward: a function of ``module`` and a batch that returns the output. None: the function :func:`call`.
        train: the modules that stay in train mode and keep what the pass makes of them, such as norms whose running
            statistics are collected. Batches of one sample, in which such norms find no variance, are left out with a warning.
        move: gives a batch as the training step would receive it. None: with its tensors on the module's device.
        precision: makes the context in which training runs its forward passes.
        passed: called with each batch that has passed through the network. None: nobody counts them.

    Raises:
        ValueError: the network does not accept the batches.
    """
    left_out = 0
    with undisturbed(module, train):
        batches, count = choose()
        module.eval()
        for part in train:
            part.train()
        for batch in islice(iter(batches), count):
            with torch.no_grad(), precision(), torch.compiler.set_stance("force_eager"):
                moved = to_device(module, batch) if move is None else move(batch)
                before = buffers_of(train)
                try:
                    found = call(module, moved) if forward is None else forward(module, moved)
                except ValueError as error:
                    # as the last batch of a loader that somebody has given
                    if not train or not (isinstance(error, OneValueError) or _is_of_one_value(error)):
                        raise
                    put_back(before)  # a norm counts a batch before it refuses it
                    left_out += 1
                    continue
            if passed is not None:
                passed(moved)
            yield found  # outside of the contexts, so that the caller's code between two batches runs in its own mode
        if left_out:
            warnings.warn(
                f"batches of one sample were left out of the statistics, as a norm finds no variance in one ({left_out} of them).",
                stacklevel=2,
            )


def to_device(module: nn.Module, batch: Any) -> Any:
    """The batch with all of its tensors on the device of the module's first parameter."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return tree_map_only(Tensor, lambda tensor: tensor.to(device), batch)


def check_fraction(fraction: float) -> None:
    """Refuse what is not a share of the batches.

    Raises:
        ValueError: a number outside of (0, 1].
    """
    if not 0.0 < fraction <= 1.0:
        raise ValueError(
            f"data_fraction={fraction!r} is not a share of the batches in (0, 1]. For all of them give 1.0."
        )


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
        if _is_of_one_value(error):
            raise OneValueError(
                f"a batch has one sample, in which a norm finds no variance ({with_class(error)}). Give batches of two samples or "
                "more, such as those of DataLoader(..., drop_last=True)."
            ) from error
        raise NoPassError(
            f"{type(module).__name__}.forward failed on a batch of the training data ({with_class(error)}"
            "). A pass over the data calls module(batch), module(batch[0]) or module(**batch), by the batch's "
            "type. Give forward=, a function of module and batch that returns the network's output, e.g. "
            "forward=lambda module, batch: module.net(batch[0])."
        ) from error
    raise NoPassError(
        f"a batch of the training data is a {type(batch).__name__}, and there is no general way to put it through a "
        "network. Give forward=, a function of module and batch that returns the network's output."
    )


def buffers_of(modules: Iterable[nn.Module]) -> list[tuple[Tensor, Tensor]]:
    """The buffers of modules, and what is in them."""
    return [(buffer, buffer.clone()) for module in modules for buffer in module.buffers()]


@torch.no_grad()
def put_back(buffers: Iterable[tuple[Tensor, Tensor]]) -> None:
    """Let buffers hold again what they held at :func:`buffers_of`."""
    for buffer, value in buffers:
        buffer.copy_(value)


def _is_of_one_value(error: Exception) -> bool:
    """Whether torch has refused to normalise a batch with one value a channel."""
    return isinstance(error, ValueError) and str(error).startswith(
        "Expected more than 1 value per channel when training"
    )


def in_order(
    loader: Any,
    world: int = 1,
    rank: int = 0,
    whole: bool = False,
    unwrap: Callable[[Any], Any] = lambda sampler: sampler,
    *,
    shuffled: torch.Generator | None = None,
    advice: str = "Give statistics_dataloader=, a loader with the batches that the statistics are taken from.",
) -> Any:
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
        unwrap: gives the user's sampler of one that a host has put around it.
        shuffled: draws the order of the samples; None: that of the data set.
        advice: what the user may do where the loader is refused, a sentence.

    Raises:
        ValueError: the loader is not a DataLoader over a data set with indices, or its batch size is not known.
    """
    if callable(own := getattr(loader, "in_order", None)):
        return own()
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        kind = f"{type(loader).__name__}{' over an IterableDataset' if isinstance(loader, DataLoader) else ''}"
        raise NoPassError(
            "a pass over the training data needs a torch DataLoader over a data set with indices, and this is a "
            f"{kind}. {advice}"
        )
    size = batch_size(loader)
    if loader.batch_sampler is not None and size is None:
        raise NoPassError(
            f"{type(loader.batch_sampler).__name__} makes the batches and has no batch_size, so they cannot be made in "
            f"order. {advice}"
        )
    # not as a DistributedSampler does, which repeats samples until all ranks have the same number
    indices = _indices(loader, unwrap)[rank::world]
    if shuffled is not None:
        indices = [indices[i] for i in torch.randperm(len(indices), generator=shuffled).tolist()]
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


def batch_size(loader: Any) -> int | None:
    """Samples in a batch of a loader, on one process; None where it does not say."""
    batches = getattr(loader, "batch_sampler", None)
    size = getattr(loader if batches is None else batches, "batch_size", None)
    return size if isinstance(size, int) else None


def _indices(loader: DataLoader[Any], unwrap: Callable[[Any], Any]) -> Sequence[int]:
    """Indices that the loader draws from."""
    sampler: Any = (
        loader.sampler if loader.batch_sampler is None else getattr(loader.batch_sampler, "sampler", loader.sampler)
    )
    sampler = unwrap(sampler)
    listed = sampler if isinstance(sampler, Sequence) else getattr(sampler, "indices", None)
    return range(len(loader.dataset)) if listed is None else [int(i) for i in listed]  # type: ignore[arg-type]


class EveryNthBatch:
    """Every ``world``-th batch of a loader, from number ``rank`` on."""

    def __init__(self, loader: Any, world: int, rank: int) -> None:
        self._loader, self._world, self._rank = loader, world, rank

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self._loader), self._rank, None, self._world)

    def __len__(self) -> int:
        return len(range(self._rank, len(self._loader), self._world))


def batch_count(batches: Any, fraction: float, limit: int | None = None) -> int | None:
    """The number of batches that a pass takes; None for all.

    Args:
        batches: the batches of the pass.
        fraction: the share of the batches, in (0, 1], that is used; at least one batch.
        limit: the number of batches that an epoch is limited to; None where it has all of them.
    """
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


def differs_when_fetched_again(loader: Any) -> bool:
    """Whether fetching the same items of the data set twice gives different values, as under random augmentation."""
    return isinstance(loader, DataLoader) and any(
        not _same_item(loader.dataset[i], loader.dataset[i]) for i in _first_indices(loader)
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
