"""Truly sparse layers and their dense twins."""

from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks import SparseLinear

STORAGES = ["sparse", "grouped"]
GROUP = 4


def mask_of(storage: str, outputs: int = 12, inputs: int = 10, seed: int = 0) -> Tensor:
    """A random mask of the storage's pattern; of "sparse" with an empty row and an empty column."""
    source = torch.Generator().manual_seed(seed)
    if storage == "sparse":
        mask = torch.rand(outputs, inputs, generator=source) < 0.4
        mask[2], mask[:, 3] = False, False
        return mask
    numbers = torch.rand(outputs // GROUP, inputs, generator=source)
    chosen = torch.zeros(outputs // GROUP, inputs, dtype=torch.bool).scatter(1, numbers.topk(3).indices, True)
    return chosen.repeat_interleave(GROUP, 0)


def twins(storage: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[nn.Linear, SparseLinear]:
    """A dense layer whose weight is masked, and the sparse layer of the same weights."""
    torch.manual_seed(options.pop("seed", 0))
    bias = options.pop("bias", True)
    linear = nn.Linear(10, 12, bias=bias, dtype=dtype)
    mask = mask_of(storage)
    with torch.no_grad():
        linear.weight.mul_(mask)
    return linear, SparseLinear.from_dense(linear, mask, storage=storage, group=GROUP, **options)  # type: ignore[arg-type]


def called(layer: SparseLinear, values: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    """The layer as a function of its parameters."""
    result: Tensor = torch.func.functional_call(layer, {"weight": values, "bias": bias}, (x,))
    return result
