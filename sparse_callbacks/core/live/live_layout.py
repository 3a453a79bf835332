"""What a state holds of exchanged layers: of what type patterns and records are, whatever the layer."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

STORAGE_OF_KEYS = {frozenset({"crow", "col"}): "sparse", frozenset({"idx"}): "grouped"}
"""The storage of a layer by the names of the tensors in its pattern."""


def why_not_pattern(value: Any) -> str:
    """Why a value is not the pattern of some layer, as the end of a sentence; empty where it may be."""
    tensors = isinstance(value, Mapping) and all(isinstance(t, Tensor) for t in value.values())
    if not tensors or frozenset(value) not in STORAGE_OF_KEYS:
        return "is not a pattern: it has neither 'crow' and 'col' nor 'idx'"
    dimensions = {"crow": 1, "col": 1, "idx": 2}
    for key, tensor in value.items():
        if tensor.dtype not in (torch.int32, torch.int64) or tensor.ndim != dimensions[key]:
            dtype = str(tensor.dtype).removeprefix("torch.")
            return f"has a tensor {list(tensor.shape)} of {dtype} as {key!r}, where whole numbers are"
    return ""


def units_in(pattern: Mapping[str, Tensor]) -> int:
    """How many units live in a pattern: weights, or columns of a group of rows."""
    return pattern["col" if "col" in pattern else "idx"].numel()


def why_not_records(value: Any) -> str:
    """Why a value is not the records of some layer, as the end of a sentence; empty where it may be."""
    if not isinstance(value, list) or not all(isinstance(tensors, list) for tensors in value):
        return "is not a list of records for each rank"
    for tensors in value:
        if not all(isinstance(t, Tensor) and t.ndim == 2 and t.is_floating_point() for t in tensors):
            return "is not of matrices of floating-point numbers"
        pairs = tensors[: len(tensors) // 2 * 2]  # one more is the gradient of live values beyond the products
        if [t.shape[1] for t in pairs[::2]] != [t.shape[1] for t in pairs[1::2]]:
            return "has other numbers of inputs than of output gradients"
    return ""
