"""Truth values packed eight in a byte: the first of them in the lowest bit."""

import torch
from torch import Tensor, nn


def packed(truths: Tensor) -> Tensor:
    """Truth values in the order of their elements, eight in a byte; the last byte is filled up with false.

    >>> packed(torch.tensor([True, False, True])).tolist()
    [5]
    """
    flat = truths.reshape(-1)
    if flat.numel() % 8:
        flat = nn.functional.pad(flat, (0, -flat.numel() % 8))
    elif flat.storage_offset() % 8:  # of a view, which integers cannot be read from
        flat = flat.clone()
    # eight bytes of 0 or 1 as one integer: the product moves the lowest bit of byte i to bit 56 + i, and no two terms meet
    words = flat.contiguous().view(torch.int64) * 0x0102040810204080
    return (words >> 56).to(torch.uint8)


def unpacked(field: Tensor, count: int) -> Tensor:
    """The first ``count`` truth values of a field, ``[count]``.

    >>> unpacked(torch.tensor([5], dtype=torch.uint8), 3).tolist()
    [True, False, True]
    """
    bits = (field.unsqueeze(1) >> torch.arange(8, dtype=torch.uint8, device=field.device)) & 1
    return bits.view(torch.bool).reshape(-1)[:count]


def count_of_bits(field: Tensor) -> int:
    """How many bits of a field (uint8) are set."""
    # the bits of 64 at a time: sums of two bits, of four, of a byte, and by the product of all eight bytes in the highest one
    words = nn.functional.pad(field, (0, -field.numel() % 8)).view(torch.int64)
    words = words - ((words >> 1) & 0x5555555555555555)
    words = (words & 0x3333333333333333) + ((words >> 2) & 0x3333333333333333)
    words = (words + (words >> 4)) & 0x0F0F0F0F0F0F0F0F
    return int((words * 0x0101010101010101 >> 56).sum())
