"""One model of the zoo with its inputs, and the random numbers that it gets."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Inputs = Callable[[torch.Generator, int], Any]
"""Random inputs of a batch size: a tensor, a tuple of positional arguments or a mapping of named ones."""


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        model: the network, in eval mode, with random weights.
        inputs: draws inputs for it.
        heads: globs of the modules that make the outputs. torch-pruning has to be told to leave them alone.
        embeddings: globs of the parameters that embed tokens, positions or patches.
    """

    model: nn.Module
    inputs: Inputs
    heads: tuple[str, ...]
    embeddings: tuple[str, ...] = ()


# ---------------------------------------------------------------------- inputs


def images(side: int) -> Inputs:
    """Square images with three channels."""
    return lambda generator, batch: torch.randn(batch, 3, side, side, generator=generator)


def image_lists(side: int) -> Inputs:
    """A list of images, as detectors take them."""
    return lambda generator, batch: ([torch.rand(3, side, side, generator=generator) for _ in range(batch)],)


def named(**parts: Inputs) -> Inputs:
    """Named arguments, each drawn by its own function."""
    return lambda generator, batch: {name: draw(generator, batch) for name, draw in parts.items()}


def tokens(length: int, vocabulary: int = 100) -> Inputs:
    """Rows of random tokens."""
    return lambda generator, batch: torch.randint(0, vocabulary, (batch, length), generator=generator)


def attended(length: int, padding: int = 3) -> Inputs:
    """The mask of rows whose last tokens are padding."""
    return lambda generator, batch: (torch.arange(length) < length - padding).long().expand(batch, -1).clone()


def numbers(*shape: int) -> Inputs:
    """Normal numbers of this shape, after the batch dimension."""
    return lambda generator, batch: torch.randn(batch, *shape, generator=generator)


def call(model: nn.Module, inputs: Any) -> Any:
    """The outputs of ``model`` for a tensor, a tuple of positional arguments or a mapping of named arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, tuple) else model(inputs)


# ---------------------------------------------------------------------- random weights


@torch.no_grad()
def shake(model: nn.Module) -> None:
    """Random numbers in place of constant ones, in norms, biases and scales, so that a wrong cut shows in the outputs."""
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        local = name.rpartition(".")[2]
        is_statistic = local in ("running_mean", "running_var")
        if not tensor.is_floating_point() or not (is_statistic or _is_constant(tensor, local)):
            continue
        if local in ("running_mean", "bias", "beta"):
            tensor.normal_(0, 0.1)
        elif tensor.numel() == max(tensor.shape, default=1):  # a gain, a variance or a scale
            tensor.uniform_(0.5, 1.5)
        else:
            tensor.normal_(0, 0.02)


def _is_constant(tensor: Tensor, local: str) -> bool:
    """Whether a parameter, or a buffer in the place of one, holds the same number everywhere."""
    is_weight = isinstance(tensor, nn.Parameter) or local in ("weight", "bias")
    return is_weight and tensor.numel() > 0 and bool((tensor == tensor.flatten()[0]).all())


@torch.no_grad()
def settle(entry: Entry, batch: int = 4) -> None:
    """Give norms the statistics of a batch of random inputs, as training would.

    With others the signal of a deep network dies away among its biases, and the outputs are the same for all inputs.
    """
    norms = [
        m
        for m in entry.model.modules()
        if isinstance(getattr(m, "running_mean", None), Tensor) and hasattr(m, "momentum")
    ]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.training, norm.momentum = True, 1.0
    try:
        call(entry.model, entry.inputs(torch.Generator().manual_seed(0), batch))
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.training, norm.momentum = False, momentum
