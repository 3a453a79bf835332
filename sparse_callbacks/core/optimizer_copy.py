"""Copies of what an optimizer holds, for stand-ins that take the place of its parameters."""

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.optimizer_state import is_coded, tensors_within

_DEEPEST = 4  # containers within containers that are looked into


def deep_copied(value: Any, memo: dict[int, Any]) -> Any:
    """A deep copy with the replacements that ``memo`` has for ids of objects; ``value`` itself where it has none."""
    try:
        return copy.deepcopy(value, memo)
    # a lock, a process group: nothing that a step writes
    except Exception:
        return value


def emptied(container: Any) -> Any:
    """A container of the same kind without anything in it."""
    made = copy.copy(container)
    made.clear()
    return made


def like_new(tensor: Tensor, parameter: Tensor, stand_in: Tensor) -> Tensor | None:
    """What an optimizer keeps of a stand-in where it keeps ``tensor`` of its parameter: the parameter's values or one
    number; None where it is anything else."""
    if is_coded(tensor) or tensor.shape != parameter.shape:
        return None
    tensor = tensor.detach()
    if torch.equal(tensor, parameter.detach()):
        return stand_in.detach().clone()
    if tensor.numel() and bool((tensor == tensor.flatten()[0]).all()):
        return torch.full(stand_in.shape, tensor.flatten()[0].item(), dtype=tensor.dtype, device=tensor.device)
    return None


def note_tensors(held: Any, parameters: Mapping[int, Tensor], memo: dict[int, Any]) -> None:
    """Note in ``memo`` what stands for the tensors in ``held`` that a constructor has made of a parameter, such as a copy of
    its values or zeros of its shape.

    Args:
        held: what the optimizer holds besides its state.
        parameters: its parameters by their ids.
        memo: a memo of ``deepcopy``, which has the stand-ins of the parameters.
    """
    for _, tensor in tensors_within(held, ()):
        alike = (i for i, p in parameters.items() if p.shape == tensor.shape and p.device == tensor.device)
        for i in alike if id(tensor) not in memo else ():
            made = like_new(tensor, parameters[i], memo[i])
            # of several of its shape the one whose values it has, and any where it is one number
            if made is not None:
                memo[id(tensor)] = made
                break


def note_dictionaries(held: Any, parameters: Iterable[int], memo: dict[int, Any], depth: int = 0) -> None:
    """Note in ``memo`` copies of the dictionaries in ``held`` whose keys are ids of parameters, with those of the
    stand-ins.

    Args:
        held: what the optimizer holds besides its state.
        parameters: ids of its parameters.
        memo: a memo of ``deepcopy``, which has the stand-ins of the parameters.
        depth: how many containers ``held`` is in.
    """
    if id(held) in memo or depth > _DEEPEST or not isinstance(held, dict | list | tuple):
        return
    for value in held.values() if isinstance(held, dict) else held:
        note_dictionaries(value, parameters, memo, depth + 1)
    if isinstance(held, dict) and any(key in parameters for key in held if isinstance(key, int)):
        made = memo[id(held)] = emptied(held)
        for key, value in held.items():
            made[id(memo[key]) if isinstance(key, int) and key in parameters else key] = deep_copied(value, memo)
