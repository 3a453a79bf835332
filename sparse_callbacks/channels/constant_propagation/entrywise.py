"""Constants in operations that treat each entry by itself, and in tensors that are made."""

from functools import reduce

import torch
from torch import Tensor

from sparse_callbacks.channels.constant_propagation.table import (
    Step,
    broadcast,
    constant_rule,
    everywhere,
    returned,
    varying,
)
from sparse_callbacks.channels.operations.entrywise import entry_by_entry
from sparse_callbacks.channels.operations.table import RULES as OF_AXES

BY_CHANCE = ("aten.bernoulli", "aten.native_dropout", "aten.uniform", "aten.normal")
OTHER_NUMBERS = ("aten.view_as_real", "aten.copy", "aten.fill", "aten.zero")


def _all_constant(step: Step) -> Tensor:
    tensors, made = step.tensors(), returned(step)[0]
    return reduce(torch.logical_and, broadcast([step.known(t).constant for t in tensors], made))


def _some_zero(step: Step, *names: str) -> Tensor:
    """Where one of these arguments is always 0; numbers tell nothing."""
    made = returned(step)[0]
    zeros = [step.zero(n) for n in names if isinstance(step.named[n], Tensor)]
    return reduce(torch.logical_or, broadcast(zeros, made), varying(made))


@constant_rule(
    *(name for name, of_axes in OF_AXES.items() if of_axes is entry_by_entry and name not in BY_CHANCE + OTHER_NUMBERS)
)
def _entry_by_entry(step: Step) -> list[Tensor]:
    return [_all_constant(step)]


@constant_rule("mul")
def _multiplied(step: Step) -> list[Tensor]:
    return [_all_constant(step) | _some_zero(step, "self", "other")]


@constant_rule("div")
def _divided(step: Step) -> list[Tensor]:
    return [_all_constant(step) | _some_zero(step, "self")]


@constant_rule("masked_fill")
def _filled_under_a_mask(step: Step) -> list[Tensor]:
    value = step.named["value"]
    same = _some_zero(step, "self") if not isinstance(value, Tensor) and value == 0 else varying(step.output)
    return [_all_constant(step) | same]


@constant_rule("where")
def _chosen(step: Step) -> list[Tensor]:
    if not all(isinstance(step.named.get(n), Tensor) for n in ("self", "other")):
        return [_all_constant(step)]
    zeros = broadcast([step.zero("self"), step.zero("other")], step.output)
    return [_all_constant(step) | (zeros[0] & zeros[1])]


@constant_rule("copy")
def _copied(step: Step) -> list[Tensor]:
    return broadcast([step.constant("src")], step.output)


@constant_rule("fill")
def _filled(step: Step) -> list[Tensor]:
    value = step.named["value"]
    if isinstance(value, Tensor):
        return broadcast([step.known(value).constant], step.output)
    return [everywhere(step.output)]


@constant_rule(
    "zero", "zeros", "ones", "full", "scalar_tensor", "new_zeros", "new_ones", "new_full", "zeros_like", "ones_like"
)
def _made(step: Step) -> list[Tensor]:
    return [everywhere(t) for t in returned(step)]
