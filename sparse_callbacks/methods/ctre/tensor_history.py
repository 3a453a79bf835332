"""What an operation leaves of a layer's output: how it was changed, and where its neurons are."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.methods.ctre.similarity import feature_dimension

SAME, AFFINE, ACTIVATED = 0, 1, 2  # what happened to a layer's output: copied or reshaped, scaled and shifted, anything else
_RESHAPES = {
    "view", "_unsafe_view", "reshape", "_reshape_alias", "squeeze", "unsqueeze", "expand", "slice", "select", "split",
    "split_with_sizes", "unbind", "cat", "stack", "as_strided",
}  # fmt: skip
_COPIES = {"alias", "detach", "clone", "_to_copy", "copy", "lift_fresh", "native_dropout"}
_TURNS = {"t", "transpose", "permute"}
_AFFINE = {
    "add", "sub", "rsub", "mul", "div", "neg", "mean", "sum", "lerp", "native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm",
    "_native_batch_norm_legit_no_training", "_batch_norm_no_update",
}  # fmt: skip
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot", "linear", "_trilinear", "_scaled_dot_product", "_transformer")
_RECURRENT = ("rnn", "lstm", "gru", "convolution")

Held = tuple[Tensor, int]  # with the version counter, which tells of writes since


@dataclass(eq=False)
class Use:
    """One call of a sparse layer in a forward pass.

    ``inputs`` as they entered the layer; ``activations`` after its activation function, in the ``shape`` of its output.
    """

    name: str
    module: nn.Module
    inputs: Held
    shape: torch.Size
    activations: Held | None = None
    bare: Held | None = None
    """The output where the next layer takes it as it is."""
    product: str = ""
    """The operation, or the layer, after which the neurons cannot be told apart."""


@dataclass(frozen=True)
class Trail:
    """What a tensor owes to one use: the ``level`` of what happened on the way, the ``order`` of the dimensions of the layer's
    output ( () after a reshape, None where it is lost), and the latest tensor of the output's shape, with its level."""

    level: int
    order: tuple[int, ...] | None
    product: str = ""
    aligned: Tensor | None = None
    aligned_level: int = SAME


def tensors_in(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from tensors_in(value)


@dataclass(frozen=True)
class Step:
    """What an operation does to whatever comes in."""

    name: str
    level: int
    product: bool
    turn: tuple[int, ...] = ()

    @classmethod
    def of(cls, name: str, args: tuple[Any, ...]) -> "Step":
        plain = name.rstrip("_")
        product = plain.startswith(_PRODUCTS) or any(part in plain for part in _RECURRENT)
        if plain in _TURNS:
            return cls(plain, SAME, False, _turn(plain, args))
        if plain in _RESHAPES or plain in _COPIES:
            return cls(plain, SAME, product)
        affine = plain in _AFFINE or "avg_pool" in plain or plain.startswith("upsample")
        return cls(plain, AFFINE if affine else ACTIVATED, product)


def _turn(name: str, args: tuple[Any, ...]) -> tuple[int, ...]:
    """Order of the input's dimensions in the output of a transposition."""
    count = args[0].dim()
    if name == "permute":
        return tuple(int(d) % count for d in args[1])
    order = list(range(count))
    one, other = (0, count - 1) if name == "t" else (args[1] % count, args[2] % count)
    order[one], order[other] = order[other], order[one]
    return tuple(order)


def joined(sources: list[tuple[Tensor, dict[Use, Trail]]], step: Step, out: Tensor) -> dict[Use, Trail]:
    """Trails of the output of an operation; of several ways from one use, the one on which most happened counts."""
    found: dict[Use, Trail] = {}
    for source, trails in sources:
        for use, trail in trails.items():
            passed = _passed(use, trail, step, source, out)
            if use not in found or passed.level > found[use].level:
                found[use] = replace(passed, product=passed.product or (found[use].product if use in found else ""))
    return found


def _passed(use: Use, trail: Trail, step: Step, source: Tensor, out: Tensor) -> Trail:
    """The trail after one operation from ``source`` to ``out``."""
    order, whole = trail.order, tuple(range(len(use.shape)))
    if step.turn:
        order = tuple(order[d] for d in step.turn) if order else None
    elif out.shape != source.shape and (step.name in _RESHAPES or out.dim() != source.dim()):
        kept = step.name in _RESHAPES and order in ((), whole)
        order = () if kept else None
    product = trail.product or (step.name if step.product else "")
    level = max(trail.level, step.level)
    if order == whole and out.shape == use.shape:
        return Trail(level, order, product)  # nothing older is needed, and nothing older is held in memory
    here = trail.order == whole and source.shape == use.shape
    last = (source, trail.level) if here else (trail.aligned, trail.aligned_level)
    return Trail(level, order, product, *last)


def aligned(use: Use, trail: Trail, x: Tensor) -> tuple[Tensor | None, int]:
    """``x``, or else the latest tensor on its way from ``use``, in the shape of the layer's output, and what happened up to it."""
    order, size = trail.order, tuple(use.shape)
    if order and len(order) == len(size):
        turned = x.permute(sorted(range(len(order)), key=order.__getitem__))
        if turned.shape == use.shape:
            return turned, trail.level
        batched = isinstance(use.module, _ConvNd) and feature_dimension(use.module, turned) == 1
        if batched and trail.aligned_level < trail.level and turned.shape[:2] == use.shape[:2]:  # pooled before the activation function
            return functional.interpolate(turned, size=size[2:], mode="nearest"), trail.level
    elif order == () and x.numel() == use.shape.numel() and trail.level > trail.aligned_level:
        return x.reshape(use.shape), trail.level
    return trail.aligned, trail.aligned_level
