"""Partitions of a network's layers, and the network put together from workers that each trained one of them."""

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

Partitions = int | str | Sequence[str | Sequence[str]]
"""A count, cuts (``"2-5"``), ``"random(4)"``, or for each partition a glob or a list of globs on parameter names."""

_RANDOM = re.compile(r"random\((\d+)\)")
_CUTS = re.compile(r"\d+(-\d+)*")
_WAYS = (
    "Give their number (4), the layers at which new ones begin ('2-5'), 'random(4)', or for each partition a glob or a list of globs "
    "(['conv*', ['fc1*', 'fc2*']])."
)


def check_partitions(partitions: object) -> int | str | list[list[str]]:
    """``partitions`` in its plain form, globs as one list for each partition.

    Raises:
        ValueError: it is none of the forms of :data:`Partitions`, or makes no partition.
    """
    if isinstance(partitions, Integral) and not isinstance(partitions, bool) and int(partitions) >= 1:
        return int(partitions)
    if isinstance(partitions, str):
        drawn = _RANDOM.fullmatch(partitions)
        if int(drawn[1]) >= 1 if drawn else _CUTS.fullmatch(partitions):
            return partitions
    elif isinstance(partitions, Sequence):
        listed = [[p] if isinstance(p, str) else list(p) if isinstance(p, Sequence) else [] for p in partitions]
        if listed and all(globs and all(isinstance(g, str) and g for g in globs) for globs in listed):
            return listed
    raise ValueError(f"partitions={partitions!r} does not say which layers belong together. {_WAYS}")


def number_of(partitions: Partitions) -> int:
    """How many partitions ``partitions`` makes of any network."""
    if isinstance(partitions, int):
        return partitions
    if not isinstance(partitions, str):
        return len(partitions)
    drawn = _RANDOM.fullmatch(partitions)
    return int(drawn[1]) if drawn else len(partitions.split("-")) + 1


def split(partitions: Partitions, sizes: Mapping[str, int], generator: torch.Generator) -> list[list[str]]:
    """Names of the masked parameters in each partition, in the order of ``sizes``.

    A layer is a module: its masked parameters (several in an LSTM) stay together, except where globs part them.

    Args:
        partitions: see :data:`Partitions`. A count cuts the layers, in their order, where the largest partition has as few weights
            as possible (then the second largest, and so on); ``"random(k)"`` does so after shuffling them.
        sizes: weights of every masked parameter by name, in the order of the model.
        generator: on the CPU, for ``"random(k)"``.

    Raises:
        ValueError: fewer layers than partitions, cuts outside the layers, or globs that match a parameter twice or not at all.
    """
    if not isinstance(partitions, int | str):
        return by_globs([[p] if isinstance(p, str) else p for p in partitions], list(sizes))
    layers: dict[str, list[str]] = {}
    for name in sizes:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    if len(layers) < number_of(partitions):
        raise ValueError(
            f"partitions={partitions!r} asks for {number_of(partitions)} partitions, and the sparse layers are only {len(layers)}: "
            f"{', '.join(sizes)}. Give fewer partitions, or make more layers sparse (include=, exclude=, keep_dense=)."
        )
    groups = list(layers.values())
    if isinstance(partitions, str) and _RANDOM.fullmatch(partitions):
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    if isinstance(partitions, str) and _CUTS.fullmatch(partitions):
        found = by_indices(partitions, len(groups))
    else:
        found = balanced([sum(sizes[n] for n in group) for group in groups], number_of(partitions))
    chosen = [{n for i in part for n in groups[i]} for part in found]
    return [[n for n in sizes if n in names] for names in chosen]


def balanced(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of ``sizes`` in ``count`` contiguous parts, none empty, whose sums from the largest down are the smallest possible.

    >>> balanced([4, 1, 1, 4, 2], 3)
    [[0, 1], [2, 3], [4]]
    """
    # best[i]: sums (from the largest down) and ends of the best parts of the first i; adding one sum to two lists keeps their order
    best: dict[int, tuple[list[int], list[int]]] = {0: ([], [0])}
    upto = [0, *accumulate(sizes)]
    for _ in range(count):
        best = {
            end: min(
                (sorted([*sums, upto[end] - upto[begin]], reverse=True), [*ends, end])
                for begin, (sums, ends) in best.items() if begin < end
            )
            for end in range(min(best) + 1, len(sizes) + 1)
        }  # fmt: skip
    return [list(range(begin, end)) for begin, end in pairwise(best[len(sizes)][1])]


def by_indices(cuts: str, layers: int) -> list[list[int]]:
    """Indices of ``layers`` layers, a new part at each index in ``cuts``.

    >>> by_indices("2-5", 8)
    [[0, 1], [2, 3, 4], [5, 6, 7]]

    Raises:
        ValueError: the cuts do not rise, or lie outside the layers.
    """
    bounds = [0, *map(int, cuts.split("-")), layers]
    if any(begin >= end for begin, end in pairwise(bounds)):
        raise ValueError(
            f"partitions={cuts!r} leaves a partition empty: a new one begins at each of these layers, of {layers} counted from 0. Give "
            f"rising numbers from 1 to {layers - 1}."
        )
    return [list(range(begin, end)) for begin, end in pairwise(bounds)]


def by_globs(globs: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[str]]:
    """The ``names`` that each list of globs matches.

    Raises:
        ValueError: a name that two lists match, or none, or a glob that matches nothing.
    """
    found = {n: [i for i, some in enumerate(globs) if any(fnmatchcase(n, g) for g in some)] for n in names}
    idle = [g for some in globs for g in some if not any(fnmatchcase(n, g) for n in names)]
    for wrong, what in (
        (idle, "match no sparse parameter"),
        ([n for n, parts in found.items() if not parts], "are in no partition"),
        ([n for n, parts in found.items() if len(parts) > 1], "are in several partitions"),
    ):
        if wrong:
            raise ValueError(
                f"partitions=: {', '.join(wrong)} {what}, and every sparse parameter belongs to exactly one. The sparse parameters: "
                f"{', '.join(names)}."
            )
    return [[n for n in names if found[n] == [i]] for i in range(len(globs))]


# ---------------------------------------------------------------------- one owner for every tensor


def holdings(keys: Iterable[str], partitions: Sequence[Sequence[str]]) -> list[list[str]]:
    """What each partition holds of a model: its masked parameters and, for :func:`owners`, whole modules by name.

    A module with masked parameters belongs to the partition of the first of them. One without (a norm, an embedding) belongs to
    that of the last masked layer before it, in the order of ``keys``; before the first, and for tensors of the outermost module
    itself, to partition 0.

    Args:
        keys: of the model's state dict, in its order.
        partitions: names of the masked parameters of each.
    """
    masked = {name: i for i, part in enumerate(partitions) for name in part}
    held = [list(part) for part in partitions]
    listed = list(keys)
    first: dict[str, int] = {}
    for key in listed:
        if key in masked:
            first.setdefault(key.rpartition(".")[0], masked[key])
    latest = 0
    for module in dict.fromkeys(key.rpartition(".")[0] for key in listed):
        latest = first.get(module, latest)
        if module:
            held[latest].append(module)
    return held


def owners(state: Mapping[str, Any], held: Sequence[Sequence[str]]) -> dict[str, int]:
    """The one partition, by index, that owns each tensor of a state dict: that which holds it, or the innermost module around it.

    What no partition holds belongs to partition 0. Tensors that share their memory (tied weights) have one owner: that of the
    one held by its own name, otherwise of the first.

    Args:
        state: tensors by key; of what is no tensor only the key counts.
        held: keys and names of modules in each partition, for example from :func:`holdings`.

    Raises:
        ValueError: a name is held by two partitions.
    """
    where: dict[str, int] = {}
    for index, names in enumerate(held):
        for name in names:
            if where.setdefault(name, index) != index:
                raise ValueError(f"{name} is held by partitions {where[name]} and {index}, and a tensor has one owner. Keep one of them.")
    owner = {key: next((where[path] for path in _paths(key) if path in where), 0) for key in state}
    tied: dict[int, int] = {}
    for key in sorted(state, key=lambda k: k not in where):  # stable: the order of the state otherwise
        value = state[key]
        if isinstance(value, Tensor) and value.data_ptr():
            owner[key] = tied.setdefault(value.data_ptr(), owner[key])
    return owner


def _paths(key: str) -> Iterable[str]:
    """``a.b.c``, ``a.b``, ``a``."""
    parts = key.split(".")
    return (".".join(parts[:end]) for end in range(len(parts), 0, -1))


def combine(workers: Sequence[Mapping[str, Any]], owner: Mapping[str, int]) -> dict[str, Any]:
    """One state dict in which every tensor is a copy of its owner's (parallel Grow-and-Prune, Ma et al. 2022).

    Args:
        workers: state dicts with the same keys, one for each partition.
        owner: index of the worker that each key comes from, see :func:`owners`.

    Raises:
        ValueError: keys that a worker or ``owner`` lacks or has beyond the others, or an owner that is no worker.

    >>> combine([{"a": torch.tensor(1), "b": torch.tensor(2)}, {"a": torch.tensor(3), "b": torch.tensor(4)}], {"a": 0, "b": 1})
    {'a': tensor(1), 'b': tensor(4)}
    """
    for index, worker in enumerate(workers):
        if worker.keys() != owner.keys():
            raise ValueError(
                f"worker {index} and owner= differ in {', '.join(sorted(worker.keys() ^ owner.keys()))}: every tensor needs exactly one "
                "owner. Make owner= from the state dict that the workers share."
            )
    if wrong := [key for key, index in owner.items() if not 0 <= index < len(workers)]:
        raise ValueError(
            f"{', '.join(wrong)} have an owner outside the {len(workers)} workers. Give one worker for each partition, in their order."
        )
    chosen = {key: workers[index][key] for key, index in owner.items()}
    return {k: v.detach().clone() if isinstance(v, Tensor) else copy.deepcopy(v) for k, v in chosen.items()}
