"""Combination of networks that trained one partition each: one owner for every tensor."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_callbacks.core.argument_types import checked


def names_by_partition(keys: Iterable[str], partitions: Sequence[Sequence[str]]) -> list[list[str]]:
    """The names that each partition owns in a model, for :func:`tensor_owners`: masked parameters and whole modules.

    A module with masked parameters belongs to the partition of the first of them. One without (a norm, an embedding)
    belongs to that of the last masked layer before it, in the order of ``keys``; before the first, and for tensors of
    the outermost module itself, to partition 0.

    Args:
        keys: keys of the model's state dict, in its order.
        partitions: names of the masked parameters of each partition.
    """
    partition_of = {name: i for i, part in enumerate(partitions) for name in part}
    owned = [list(part) for part in partitions]
    keys = list(keys)
    first: dict[str, int] = {}
    for key in keys:
        if key in partition_of:
            first.setdefault(key.rpartition(".")[0], partition_of[key])
    latest = 0
    modules = dict.fromkeys(key.rpartition(".")[0] for key in keys)  # each once, in order
    for module in modules:
        latest = first.get(module, latest)
        if module:  # "" is the outermost module: all tensors would be inside it
            owned[latest].append(module)
    return owned


def tensor_owners(state: Mapping[str, Any], owned: Sequence[Sequence[str]]) -> dict[str, int]:
    """The one partition, by index, that owns each tensor of a state dict.

    It is the partition that owns the tensor's key, or else the innermost module around it.
    What no partition owns belongs to partition 0. Tensors that share their memory (tied weights) have one owner: that
    of the one owned by its own name, otherwise of the first.

    Args:
        state: tensors by key; of a value that is not a tensor only the key counts.
        owned: keys and names of modules in each partition, for example from :func:`names_by_partition`.

    Raises:
        ValueError: a name is owned by two partitions.
    """
    partition_of: dict[str, int] = {}
    for index, names in enumerate(owned):
        for name in names:
            if partition_of.setdefault(name, index) != index:
                raise ValueError(
                    f"{name} is held by partitions {partition_of[name]} and {index}, and a tensor has one owner. Keep "
                    "one of them."
                )
    owner = {key: next((partition_of[path] for path in _paths(key) if path in partition_of), 0) for key in state}
    owner_of_memory: dict[int, int] = {}
    # keys that a partition owns by name come first (the sort is stable), so that they decide for shared memory
    for key in sorted(state, key=lambda k: k not in partition_of):
        value = state[key]
        if isinstance(value, Tensor) and value.data_ptr():  # empty tensors have the address 0 and share nothing
            owner[key] = owner_of_memory.setdefault(value.data_ptr(), owner[key])
    return owner


def _paths(key: str) -> Iterable[str]:
    """``a.b.c``, ``a.b``, ``a``: the key, and the modules around it from the innermost outwards."""
    parts = key.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


@checked
def combine(workers: Sequence[Mapping[str, Any]], owner: Mapping[str, int]) -> dict[str, Any]:
    """One state dict in which every tensor is a copy of its owner's (parallel Grow-and-Prune, Ma et al. 2022).

    Args:
        workers: state dicts with the same keys, one for each partition.
        owner: index of the worker that each key comes from, see :func:`tensor_owners`.

    Raises:
        ValueError: no workers, keys that a worker or ``owner`` lacks or has beyond the others, or an owner that is not a worker.

    Example:
        >>> import torch
        >>> from sparse_callbacks import combine
        >>> first = {"a": torch.tensor(1), "b": torch.tensor(2)}
        >>> second = {"a": torch.tensor(3), "b": torch.tensor(4)}
        >>> combine([first, second], {"a": 0, "b": 1})
        {'a': tensor(1), 'b': tensor(4)}
    """
    if not workers:
        raise ValueError(
            "workers=[] leaves nothing to combine. Give one state dict for each partition, in their order."
        )
    for index, worker in enumerate(workers):
        if worker.keys() != owner.keys():
            raise ValueError(
                f"worker {index} and owner= differ in {', '.join(sorted(worker.keys() ^ owner.keys()))}: every tensor "
                "needs exactly one owner. Make owner= from the state dict that the workers share."
            )
    wrong = [key for key, index in owner.items() if not 0 <= index < len(workers)]
    if wrong:
        raise ValueError(
            f"{', '.join(wrong)} have an owner outside the {len(workers)} workers. Give one worker for each partition, "
            "in their order."
        )
    chosen = {key: workers[index][key] for key, index in owner.items()}
    # copies, so that the combined network shares no memory with a worker that trains on
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in chosen.items()}
