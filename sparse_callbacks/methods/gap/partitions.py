"""Partitions of a network's layers, from a count, cuts or globs."""

import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from numbers import Integral

import torch

Partitions = int | str | Sequence[str | Sequence[str]]
"""A count, cuts (``"2-5"``), ``"random(4)"``, or for each partition a glob or a list of globs on parameter names."""

_RANDOM = re.compile(r"random\((\d+)\)")
_CUTS = re.compile(r"\d+(-\d+)*")
_WAYS = (
    "Give their number (4), the layers at which new ones begin ('2-5'), 'random(4)', or for each partition a glob or "
    "a list of globs (['conv*', ['fc1*', 'fc2*']])."
)


def check_partitions(partitions: object) -> int | str | list[list[str]]:
    """``partitions`` in its plain form, globs as one list for each partition.

    Raises:
        ValueError: it is none of the forms of :data:`Partitions`, or makes no partition.
    """
    # True is an Integral in Python, and 1 is a count that nobody means by it
    if isinstance(partitions, Integral) and not isinstance(partitions, bool) and int(partitions) >= 1:
        return int(partitions)
    if isinstance(partitions, str):
        shuffled = _RANDOM.fullmatch(partitions)
        if shuffled is not None and int(shuffled[1]) >= 1:
            return partitions
        if _CUTS.fullmatch(partitions):
            return partitions
    elif isinstance(partitions, Sequence):
        listed = [_globs_of(partition) for partition in partitions]
        if listed and all(listed):
            return listed
    raise ValueError(f"partitions={partitions!r} does not say which layers belong together. {_WAYS}")


def _globs_of(partition: object) -> list[str]:
    """The globs of one partition; empty where there is none, or where one of them is not a glob."""
    if isinstance(partition, str):
        return [partition] if partition else []
    globs = list(partition) if isinstance(partition, Sequence) else []
    return globs if all(isinstance(g, str) and g for g in globs) else []


def number_of(partitions: Partitions) -> int:
    """Number of partitions that ``partitions`` makes of any network."""
    if isinstance(partitions, int):
        return partitions
    if not isinstance(partitions, str):
        return len(partitions)
    shuffled = _RANDOM.fullmatch(partitions)
    return int(shuffled[1]) if shuffled else len(partitions.split("-")) + 1


def split_layers(partitions: Partitions, sizes: Mapping[str, int], generator: torch.Generator) -> list[list[str]]:
    """Names of the masked parameters in each partition, in the order of ``sizes``.

    A layer is a module: its masked parameters (several in an LSTM) stay together, except where globs part them.

    Args:
        partitions: see :data:`Partitions`. A count cuts the layers, in their order, where the largest partition has as
            few weights as possible (then the second largest, and so on); ``"random(k)"`` does so after shuffling them.
        sizes: number of weights of every masked parameter by name, in the order of the model.
        generator: a generator on the CPU, for ``"random(k)"``.

    Raises:
        ValueError: fewer layers than partitions, cuts outside the layers, or globs that match a parameter twice or not
            at all.
    """
    if not isinstance(partitions, int | str):
        return parts_by_globs([[p] if isinstance(p, str) else p for p in partitions], list(sizes))
    # by module: an LSTM's matrices are of one layer, which should not be half dense
    layers: dict[str, list[str]] = {}
    for name in sizes:
        layers.setdefault(name.rpartition(".")[0], []).append(name)
    count = number_of(partitions)
    if len(layers) < count:
        raise ValueError(
            f"partitions={partitions!r} asks for {count} partitions, and the sparse layers are only {len(layers)}: "
            f"{', '.join(sizes)}. Give fewer partitions, or make more layers sparse (include=, exclude=, keep_dense=)."
        )
    groups = list(layers.values())
    if isinstance(partitions, str) and _RANDOM.fullmatch(partitions):
        groups = [groups[i] for i in torch.randperm(len(groups), generator=generator).tolist()]
    if isinstance(partitions, str) and _CUTS.fullmatch(partitions):
        parts = parts_between_cuts(partitions, len(groups))
    else:
        parts = balanced_parts([sum(sizes[name] for name in group) for group in groups], count)
    # whatever order the layers were shuffled into, the names in a partition are in the order of the model
    chosen = [{name for i in part for name in groups[i]} for part in parts]
    return [[name for name in sizes if name in names] for names in chosen]


def balanced_parts(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Indices of ``sizes`` in ``count`` contiguous parts, none of them empty.

    The sums of the parts, compared from the largest down, are the smallest possible.

    >>> balanced_parts([4, 1, 1, 4, 2], 3)
    [[0, 1], [2, 3], [4]]
    """
    # Dynamic programming over the number of parts. best[i]: sums (from the largest down) and ends of the best parts of
    # the first i sizes. It is enough to keep the best of each i: one more sum, put into two sorted lists, leaves their
    # order as it is
    best: dict[int, tuple[list[int], list[int]]] = {0: ([], [0])}
    total_before = [0, *accumulate(sizes)]
    for _ in range(count):
        longer: dict[int, tuple[list[int], list[int]]] = {}
        for end in range(min(best) + 1, len(sizes) + 1):
            candidates = []
            for begin, (sums, ends) in best.items():
                if begin < end:
                    last = total_before[end] - total_before[begin]
                    candidates.append((sorted([*sums, last], reverse=True), [*ends, end]))
            longer[end] = min(candidates)
        best = longer
    ends = best[len(sizes)][1]
    return [list(range(begin, end)) for begin, end in pairwise(ends)]


def parts_between_cuts(cuts: str, layers: int) -> list[list[int]]:
    """Indices of ``layers`` layers in contiguous parts; a new part begins at each index in ``cuts``.

    >>> parts_between_cuts("2-5", 8)
    [[0, 1], [2, 3, 4], [5, 6, 7]]

    Raises:
        ValueError: the cuts do not rise, or lie outside the layers.
    """
    bounds = [0, *map(int, cuts.split("-")), layers]
    if any(begin >= end for begin, end in pairwise(bounds)):
        raise ValueError(
            f"partitions={cuts!r} leaves a partition empty: a new one begins at each of these layers, of {layers} "
            f"counted from 0. Give rising numbers from 1 to {layers - 1}."
        )
    return [list(range(begin, end)) for begin, end in pairwise(bounds)]


def parts_by_globs(globs: Sequence[Sequence[str]], names: Sequence[str]) -> list[list[str]]:
    """The ``names`` that each list of globs matches.

    Raises:
        ValueError: a name that two lists match, or none, or a glob that matches nothing.
    """
    found: dict[str, list[int]] = {}
    for name in names:
        # fnmatchcase: fnmatch would follow the file system, and on Windows take upper and lower case for the same
        found[name] = [i for i, own in enumerate(globs) if any(fnmatchcase(name, glob) for glob in own)]
    # a glob that matches nothing is mostly a typing error, and its layers would then be in no partition
    unused = [glob for own in globs for glob in own if not any(fnmatchcase(name, glob) for name in names)]
    for wrong, what in (
        (unused, "match no sparse parameter"),
        ([name for name, parts in found.items() if not parts], "are in no partition"),
        ([name for name, parts in found.items() if len(parts) > 1], "are in several partitions"),
    ):
        if wrong:
            raise ValueError(
                f"partitions=: {', '.join(wrong)} {what}, and every sparse parameter belongs to exactly one. The "
                f"sparse parameters: {', '.join(names)}."
            )
    return [[name for name in names if found[name] == [i]] for i in range(len(globs))]
