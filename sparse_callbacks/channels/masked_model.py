"""A copy of a model under masks, and the masks in one form."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.module_sizes import output_dim
from sparse_callbacks.core.inspection import copied


class Masked(NamedTuple):
    """A model under masks.

    Attributes:
        model: a copy of the model with zeros where the masks say so. A parameter that several modules share stays one.
        masks: bool masks on the CPU by the first name of each parameter, with as many dimensions as the parameter, and of
            size 1 where the mask was given so: [1, C, 1, 1] for the inputs of a convolution.
        cut: how many weights that are not zero the masks cut, by the names of the parameters that have any.
    """

    model: nn.Module
    masks: dict[str, Tensor]
    cut: dict[str, int]


def under_masks(model: nn.Module, masks: Mapping[str, Tensor]) -> Masked:
    """A copy of ``model`` under ``masks``.

    If there are masks for several names of one parameter, a weight is active where all of them keep it.

    Args:
        model: the model; it is left as it is.
        masks: see :func:`~sparse_callbacks.channels.slim.slim`.

    Raises:
        ValueError: there is no mask, a mask belongs to no parameter, is not bool or has another shape, or the model
            cannot be copied.
    """
    if not masks:
        raise ValueError(
            "masks= is empty, so no channel is dead and the slim network would be the dense one. Give masks by parameter "
            "name; a callback has them once its fit has begun."
        )
    # masks may be given under any name of a shared parameter
    every = dict(model.named_parameters(remove_duplicate=False))
    first = {p: n for n, p in model.named_parameters()}
    full: dict[str, Tensor] = {}
    for given, mask in masks.items():
        fitted = _fitted(given, mask, model, every)
        name = first[every[given]]
        full[name] = full[name] & fitted if name in full else fitted
    # what the copy has in the place of masked parameters, so that these are copied once, and stay shared where they are
    known: dict[int, Any] = {}
    cut: dict[str, int] = {}
    for name, mask in full.items():
        old = every[name].detach()
        new = old.clone().masked_fill_(~mask, 0)  # clone() keeps the memory format, masked_fill() does not
        known[id(every[name])] = nn.Parameter(new, requires_grad=every[name].requires_grad)
        count = int(old.count_nonzero() - new.count_nonzero())
        if count:
            cut[name] = count
    return Masked(copied(model, known), {name: mask.cpu() for name, mask in full.items()}, cut)


def active_slices(mask: Tensor, dim: int, slices: int) -> Tensor:
    """Bool [slices]: where some entry of a slice is active.

    Args:
        mask: a mask of :class:`Masked`.
        dim: dimension of the parameter that the slices lie along.
        slices: size of the parameter along it.
    """
    return mask.movedim(dim, 0).reshape(mask.shape[dim], -1).any(1).expand(slices)


def _fitted(name: str, mask: Tensor, model: nn.Module, parameters: Mapping[str, Tensor]) -> Tensor:
    """``mask`` with as many dimensions as its parameter."""
    if name not in parameters:
        known = ", ".join([*parameters][:6])
        raise ValueError(f"masks names {name!r}, and the model has no such parameter. There are for example {known}.")
    shape = parameters[name].shape
    if not isinstance(mask, Tensor):
        raise ValueError(f"The mask of {name} is a {type(mask).__name__}. Give a bool tensor.")
    mask = mask.to(parameters[name].device)
    if mask.ndim == 1 and len(shape) > 2:  # a mask of input channels
        inputs = 1 - output_dim(model.get_submodule(name.rpartition(".")[0]))
        mask = mask.view([-1 if d == inputs else 1 for d in range(len(shape))])
    try:
        mask.expand(shape)
    except RuntimeError as error:
        raise ValueError(
            f"The mask of {name} has shape {list(mask.shape)} and the parameter {list(shape)}. Give a mask of that "
            "shape, or one that broadcasts against it."
        ) from error
    if mask.dtype != torch.bool:
        raise ValueError(
            f"The mask of {name} is not of bool but of {mask.dtype}, and which of its values mean an active weight is not "
            "known. Give `mask != 0` where zeros are pruned weights, also of gates and other soft masks."
        )
    return mask.view([1] * (len(shape) - mask.ndim) + list(mask.shape))
