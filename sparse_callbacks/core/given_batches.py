"""Batches that somebody gave are iterated without a trace in their loader."""

import copy
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.data import DataLoader

from sparse_callbacks.core.inspection import map_tensors


@contextmanager
def iterated_apart(batches: Iterable[Any]) -> Iterator[Iterable[Any]]:
    """Inside, the same batches to iterate over, also while somebody else iterates over them, such as the training.

    Generators of a loader and its samplers are put back, so that it gives the same batches the next time. Tensors of a list
    are copied, as hooks may write into a batch.

    Args:
        batches: a list or a loader.
    """
    states = [(generator, generator.get_state()) for generator in _generators(batches)]
    try:
        yield _apart(batches)
    finally:
        for generator, state in states:
            generator.set_state(state)


def _apart(batches: Iterable[Any]) -> Iterable[Any]:
    if isinstance(batches, list | tuple):
        return (map_tensors(torch.clone, batch) for batch in batches)
    if not isinstance(batches, DataLoader) or not batches.persistent_workers:
        return batches
    own = copy.copy(batches)
    # a loader with lasting workers has one iterator, which begins again for everybody
    vars(own).update(_iterator=None)
    return own


def _generators(loader: Any) -> list[torch.Generator]:
    """The random generators of a loader and its samplers, each once."""
    batched = getattr(loader, "batch_sampler", None)
    holders = [loader, getattr(loader, "sampler", None), batched, getattr(batched, "sampler", None)]
    found = [getattr(holder, "generator", None) for holder in holders if holder is not None]
    return list({id(g): g for g in found if isinstance(g, torch.Generator)}.values())
