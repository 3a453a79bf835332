"""Outputs of the masked and the slim model on fresh inputs, and how far they are apart."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from zoo_parts.entries import Entry, call

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
"""Largest difference of outputs that counts as equal, relative to the largest output of the same tensor."""
TELLING = 100
"""How many tolerances outputs must move with the inputs and with the masks, or being equal would say nothing."""
BATCHES = (1, 3)
"""Sizes of the batches of fresh inputs on which the two models are compared."""
FRESH = 1234
"""Seed of the fresh inputs; the example is drawn with seed 0."""


def tensors_of(nest: Any) -> list[Tensor]:
    """The tensors in nested lists, tuples and mappings, in order."""
    if isinstance(nest, Tensor):
        return [nest]
    parts = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, tuple | list) else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


def in_double(nest: Any) -> Any:
    """Inputs with their floating-point tensors in float64."""
    if isinstance(nest, Tensor):
        return nest.double() if nest.is_floating_point() else nest
    if isinstance(nest, Mapping):
        return {key: in_double(part) for key, part in nest.items()}
    return type(nest)(in_double(part) for part in nest)


def gap(expected: Sequence[Tensor], found: Sequence[Tensor]) -> float:
    """Largest difference of two lists of tensors, relative to the largest number of the same tensor.

    Infinite where shapes differ, or values that are not finite.
    """
    if [t.shape for t in expected] != [t.shape for t in found]:
        return float("inf")
    worst = 0.0
    for a, b in zip(expected, found, strict=True):
        if a.numel() == 0 or torch.equal(a, b):
            continue
        a, b = a.double(), b.double()
        finite = a.isfinite()
        if not torch.equal(finite, b.isfinite()) or not torch.equal(a[~finite], b[~finite]):
            return float("inf")
        # outputs that are all zero have no scale, and any difference from them is huge
        worst = max(worst, float((a - b)[finite].abs().max() / a[finite].abs().max().clamp(min=1e-300)))
    return worst


@torch.no_grad()
def equality(dense: nn.Module, masked: nn.Module, small: nn.Module, entry: Entry) -> dict[str, Any]:
    """Whether the masked and the slim model agree on fresh inputs, in float64 where the masked model runs in it.

    Args:
        dense: the model before it was masked.
        masked, small: the models to compare.
        entry: draws the inputs.

    Returns:
        ``equal``; ``difference`` relative to the largest output; its ``precision``; and ``why`` they are not equal, or
        why that could not be told: outputs that do not move with the inputs or with the masks, or that are empty.
    """
    generator = torch.Generator().manual_seed(FRESH)
    batches = [entry.inputs(generator, size) for size in BATCHES]
    models, precision = [copy.deepcopy(m).double() for m in (dense, masked, small)], torch.float64
    try:
        call(models[1], in_double(batches[0]))
        batches = [in_double(inputs) for inputs in batches]
    except Exception:  # models may make float32 tensors themselves
        models, precision = [dense, masked, small], torch.float32
    expected = [tensors_of(call(models[1], inputs)) for inputs in batches]
    try:
        difference = max(gap(e, tensors_of(call(models[2], x))) for e, x in zip(expected, batches, strict=True))
        why = "" if difference <= TOLERANCES[precision] else "outputs differ"
    except Exception as error:  # a network that does not run is a wrong one
        difference, why = float("inf"), f"{type(error).__name__}: {str(error)[:200]}"
    other = entry.inputs(generator, BATCHES[0])
    by_inputs = gap(expected[0], tensors_of(call(models[1], in_double(other) if precision == torch.float64 else other)))
    by_masks = gap(expected[0], tensors_of(call(models[0], batches[0])))
    if not any(t.numel() for t in expected[0]) or min(by_inputs, by_masks) < TELLING * TOLERANCES[precision]:
        why = (
            why or f"the outputs say nothing: empty, or moved by {by_inputs:.0e} with inputs, {by_masks:.0e} with masks"
        )
    return {"equal": not why, "difference": difference, "precision": str(precision).removeprefix("torch."), "why": why}
