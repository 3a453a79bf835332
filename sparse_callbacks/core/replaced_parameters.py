"""A module that computes with other tensors in the place of its parameters for a while."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.inspection import map_tensors
from sparse_callbacks.core.selection import is_norm


@contextmanager
def replaced(module: nn.Module, values: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the module has new parameters with these values in the place of its own, which nobody writes.

    Args:
        module: the module.
        values: values by parameter name; a parameter that has several names is replaced under all of them.

    Yields:
        The new parameters by name.
    """
    own = dict(module.named_parameters())
    made = {name: nn.Parameter(value.detach()) for name, value in values.items()}
    stand_in = {id(own[name]): parameter for name, parameter in made.items()}
    places = [
        (m, local, p)
        for m in module.modules()
        for local, p in m._parameters.items()
        if id(p) in stand_in and p is not None
    ]
    try:
        for holder, local, p in places:
            # by the module's own attribute: recurrent modules list their weights a second time
            setattr(holder, local, stand_in[id(p)])
        yield made
    finally:
        for holder, local, p in places:
            setattr(holder, local, p)


@contextmanager
def masked(module: nn.Module, masks: Mapping[str, Tensor]) -> Iterator[dict[str, nn.Parameter]]:
    """Inside, the module has masked copies of parameters in their place.

    Args:
        module: the module.
        masks: bool masks by parameter name.

    Yields:
        The masked copies by name.
    """
    own = dict(module.named_parameters())
    values = {name: own[name].detach().masked_fill(~mask.to(own[name].device), 0) for name, mask in masks.items()}
    with replaced(module, values) as made:
        yield made


@contextmanager
def in_double_and_positive(
    module: nn.Module, masks: Mapping[str, Tensor]
) -> Iterator[tuple[dict[str, nn.Parameter], Callable[[Any], Any]]]:
    """Inside, the module has the absolute values of its parameters and of its norms' statistics, all in float64.

    Args:
        module: the module.
        masks: bool masks by parameter name, of those that have any.

    Yields:
        The new parameters by name; and a function that makes ones in float64 of all floats in nested inputs.
    """
    values = {n: p.detach().abs().double() for n, p in module.named_parameters() if p.is_floating_point()}
    values |= {n: values[n].masked_fill(~mask.to(values[n].device), 0) for n, mask in masks.items()}
    buffers = [
        (m, local, b)
        for m in module.modules()
        for local, b in m._buffers.items()
        if b is not None and b.is_floating_point()
    ]
    try:
        for holder, local, b in buffers:
            # other buffers may be negative with reason, such as the -inf of an attention's mask
            holder._buffers[local] = b.abs().double() if is_norm(holder) else b.double()
        with replaced(module, values) as made:
            yield made, _ones
    finally:
        for holder, local, b in buffers:
            holder._buffers[local] = b


def _ones(inputs: Any) -> Any:
    def one(tensor: Tensor) -> Tensor:
        return torch.ones_like(tensor, dtype=torch.float64) if tensor.is_floating_point() else tensor

    return map_tensors(one, inputs)
