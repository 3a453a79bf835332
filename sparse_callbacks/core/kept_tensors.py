"""Tensors that every step of a method computes in, so that none needs fresh memory."""

from typing import Any

import torch
from torch import Tensor


class KeptTensors:
    """Memory by key, as large as the largest tensor that was asked for under it.

    Where intermediate results are as large as the weights, fresh memory for each can cost more than computing it. What
    lies under a key is written over at the next use of the key; a copy of a method has none.
    """

    def __init__(self) -> None:
        self._flat: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def like(self, key: str, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Memory of the shape, strides and device of ``tensor``, with any values.

        Args:
            key: what it is for.
            tensor: the tensor that it resembles.
            dtype: its type; None: that of ``tensor``.
        """
        dtype, size = dtype or tensor.dtype, tensor.numel()
        flat = self._flat.get((key, dtype, tensor.device))
        if flat is None or flat.numel() < size:
            flat = self._flat[key, dtype, tensor.device] = torch.empty(size, dtype=dtype, device=tensor.device)
        if tensor.is_contiguous():
            return flat[:size].view(tensor.shape)
        # channels_last, say: sums over it are then taken in the order that they have in fresh memory
        return flat[:size].as_strided(tensor.shape, torch.empty_like(tensor, device="meta").stride())

    @property
    def nbytes(self) -> int:
        """How much memory that is."""
        return sum(flat.nbytes for flat in self._flat.values())

    def clear(self) -> None:
        """Let go of all of it; who still has a tensor of it keeps that one."""
        self._flat = {}

    def __reduce__(self) -> Any:
        return KeptTensors, ()
