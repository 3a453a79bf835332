"""Masks and other tensors of truth values as a saved state holds them: one bit for each weight."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeGuard

import torch
from torch import Tensor

from sparse_callbacks.core.packed_bits import count_of_bits, packed, unpacked

PARTS = ("masks", "aux")
"""Parts of a state whose tensors of truth values are saved as bits; those of averages are one level deeper."""

SavedBits = Mapping[str, Any]
"""``{"bits": uint8 [ceil(n / 8)], "shape": list of int}``: n truth values in the order of their elements, eight in a byte, the
first of them in the lowest bit; the last byte is filled up with zeros."""


def as_bits(truths: Tensor) -> dict[str, Any]:
    """Truth values as a state holds them.

    >>> as_bits(torch.tensor([[True, False], [True, True]]))
    {'bits': tensor([13], dtype=torch.uint8), 'shape': [2, 2]}
    """
    return {"bits": packed(truths), "shape": list(truths.shape)}


def is_bits(value: object) -> TypeGuard[SavedBits]:
    """Whether ``value`` stands for a tensor of truth values; :func:`why_not_bits` says whether it is whole."""
    return isinstance(value, Mapping) and value.keys() == {"bits", "shape"}


def why_not_bits(value: SavedBits) -> str:
    """Why a value with these keys holds no truth values, as the end of a sentence; empty where it does."""
    bits, shape = value["bits"], value["shape"]
    if not isinstance(shape, list | tuple) or not all(type(size) is int and size >= 0 for size in shape):
        return f"has the shape {str(shape)[:60]}, which is not a list of whole numbers"
    count = math.prod(shape)
    if not isinstance(bits, Tensor) or bits.layout != torch.strided or bits.dtype != torch.uint8 or bits.is_meta:
        return "has bits that are not a tensor of bytes"
    # before anything is computed with it: a stride of 0 gives a tensor of any size to a file of some bytes
    if bits.shape != (-(-count // 8),) or bits.numel() > bits.untyped_storage().nbytes():
        return f"has bits of shape {list(bits.shape)}, and {count} truth values have {-(-count // 8)} bytes"
    if count % 8 and int(bits[-1]) >> count % 8:
        return f"has bits beyond its {count} truth values"
    return ""


def truths_of(value: Tensor | SavedBits) -> Tensor:
    """The tensor of truth values that was saved: bool, of its own shape; a tensor is given back as it is.

    >>> truths_of({"bits": torch.tensor([13], dtype=torch.uint8), "shape": [2, 2]}).tolist()
    [[True, False], [True, True]]
    """
    if isinstance(value, Tensor):
        return value
    # a copy where the last byte is not full: no memory is left behind the elements
    count = math.prod(value["shape"])
    truths = unpacked(value["bits"], count)
    return (truths.clone() if count % 8 else truths).view(value["shape"])


def count_of_false(value: Tensor | SavedBits) -> int:
    """How many of the truth values are False."""
    if isinstance(value, Tensor):
        return int((~value).sum())
    return math.prod(value["shape"]) - count_of_bits(value["bits"])


def with_bits(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """``tensors`` as a state holds them: those of truth values as bits, others (and single truth values) as they are."""
    return {key: as_bits(t) if t.dtype == torch.bool and t.ndim else t for key, t in tensors.items()}


def why_damaged(state: Mapping[str, Any]) -> str:
    """Which bits in a state hold no truth values, and why, as a clause; empty where all do."""
    for part, held in _held_in(state):
        for name, value in held.items():
            if is_bits(value) and (why := why_not_bits(value)):
                return f"what the state holds in {part!r} under {str(name)[:60]!r} {why}"
    return ""


def with_truths(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state whose bits are tensors of truth values, as states of version 1 hold them; one without bits as it is.

    Args:
        state: what was saved, for which :func:`why_damaged` has nothing to say.
    """
    found = dict(state)
    for part in PARTS:
        if isinstance(state.get(part), Mapping):
            found[part] = _unpacked(state[part])
    averages = state.get("averages")
    if isinstance(averages, Mapping):
        found["averages"] = {
            key: {k: _unpacked(v) if isinstance(v, Mapping) else v for k, v in kept.items()}
            if isinstance(kept, Mapping)
            else kept
            for key, kept in averages.items()
        }
    return found


def _held_in(state: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The mappings in a state that may hold bits, each with the name of its part."""
    yield from ((part, state[part]) for part in PARTS if isinstance(state.get(part), Mapping))
    averages = state.get("averages")
    for kept in averages.values() if isinstance(averages, Mapping) else ():
        if isinstance(kept, Mapping):
            yield from (("averages", held) for held in kept.values() if isinstance(held, Mapping))


def _unpacked(held: Mapping[str, Any]) -> dict[str, Any]:
    return {name: truths_of(value) if is_bits(value) else value for name, value in held.items()}
