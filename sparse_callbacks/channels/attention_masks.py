"""Masks of attention: checked, and brought into one form that is added to the scores."""

import math

import torch
from torch import Tensor

Mask = Tensor | None


def added_mask(mask: Mask, padding: Mask, sizes: tuple[int, int, int, int], dtype: torch.dtype) -> Mask:
    """What is added to the scores, [N or 1, heads or 1, L or 1, S]; None for nothing.

    Args:
        mask: attention mask [L, S] or [N * heads, L, S].
        padding: mask of keys [N, S].
        sizes: batch, heads, length of queries, length of keys.
        dtype: of the scores.
    """
    batch, heads, length, keys = sizes
    _refuse_mask("attn_mask", mask, [(length, keys), (batch * heads, length, keys)])
    _refuse_mask("key_padding_mask", padding, [(batch, keys)])
    over_pairs = (
        None if mask is None else _as_scores(mask, dtype).view(batch if mask.ndim == 3 else 1, -1, length, keys)
    )
    over_keys = None if padding is None else _as_scores(padding, dtype).view(batch, 1, 1, keys)
    return over_keys if over_pairs is None else over_pairs if over_keys is None else over_pairs + over_keys


def _refuse_mask(name: str, mask: Mask, allowed: list[tuple[int, ...]]) -> None:
    """Refuse a mask of another shape than the ``allowed`` ones, or of another type than bool and floats."""
    if mask is None:
        return
    if tuple(mask.shape) not in allowed:
        fitting = " or ".join(str(list(shape)) for shape in allowed)
        raise ValueError(
            f"{name} has shape {list(mask.shape)}, which does not fit the inputs and heads that there are. Give {fitting}."
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(f"{name} is of {mask.dtype}. Give bools, True where nothing is attended to, or floats to add.")


def _as_scores(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """A float mask as it is, and for a bool one minus infinity where it is True."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill_(mask, -math.inf) if mask.dtype == torch.bool else mask
