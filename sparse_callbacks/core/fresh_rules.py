"""Rules for the state of a fresh weight, found in what shadows of an optimizer keep after a step."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.optimizer_state import Path, by_weight, decoded, is_coded, state_tensors
from sparse_callbacks.core.shadow_optimizer import Shadow

Key = tuple[int, Path, type, torch.dtype]
"""A state tensor: the ``id`` of its parameter, its path, its class and its dtype."""

# What decays or noise of an unknown kind may add to fresh state, as a share of the weight.
_SHARE_OF_WEIGHT = 0.1
# Values of 4 bits are up to an eighth of the largest apart, and are rounded each time that they are coded.
_ROUNDING = 0.15


@dataclass(frozen=True)
class Fresh:
    """What a state tensor holds for a fresh weight.

    Attributes:
        value: a number; None for the weight's own value.
        coded: it is a tensor class of its own, which decodes itself (``dequantize``) and codes what is copied into it.
    """

    value: float | None
    coded: bool


def key_of(parameter: int, path: Path, tensor: Tensor) -> Key:
    """The key of a state tensor of the parameter with this ``id``."""
    return parameter, path, type(tensor), tensor.dtype


def rules_of(shadows: Sequence[Shadow]) -> dict[Key, Fresh | str | None]:
    rules: dict[Key, Fresh | str | None] = {}
    for i in shadows[0].stand_ins:
        kept = [_Kept.of(shadow, i) for shadow in shadows]
        for path, tensor in kept[0].tensors.items():
            if all(path in k.tensors for k in kept):
                of_weights = all(k.tensors[path].shape == k.parameter.shape for k in kept)
                rules[key_of(i, path, tensor)] = _found(path, kept) if of_weights else None
    return rules


@dataclass
class _Kept:
    """A stand-in after a step, and the state that the shadow keeps for it."""

    parameter: Tensor
    before: Tensor
    has_gradient: Tensor
    tensors: dict[Path, Tensor]

    @classmethod
    def of(cls, shadow: Shadow, key: int) -> "_Kept":
        parameter = shadow.stand_ins[key]
        tensors: dict[Path, Tensor] = {}
        for path, tensor in state_tensors(shadow.optimizer, parameter):
            tensors |= by_weight(path, tensor, parameter) or {path: tensor}
        return cls(parameter.detach(), shadow.before[key], shadow.has_gradient(parameter), tensors)


def _found(path: Path, kept: list[_Kept]) -> Fresh | str:
    """What the state at ``path`` is for a fresh weight, or why that was not found out.

    Args:
        path: where the state is.
        kept: two stand-ins without gradients, and two of which one half of the elements had gradients.
    """
    first = kept[0].tensors[path]
    coded = is_coded(first)
    try:
        if coded:
            return _found_coded(path, kept)
        if first.dtype.is_floating_point or first.dtype.is_complex:
            # first all elements of steps without any gradient
            rule = _follows([(k, k.tensors[path], None) for k in kept[:2]])
            return rule if rule is not None else _without_gradient(path, kept)
        return _without_gradient(path, kept)
    except Exception as error:
        return with_class(error)


def _without_gradient(path: Path, kept: list[_Kept]) -> Fresh | str:
    """The rule by elements without a gradient, among others that have one."""
    first = kept[0].tensors[path]
    numbers = first.dtype.is_floating_point or first.dtype.is_complex
    # a code jumps where weight decay of an unknown kind moves what it stands for
    chosen = [~k.has_gradient if numbers else ~k.has_gradient & (k.before == 0) for k in kept]
    rule = _follows([(k, k.tensors[path], where) for k, where in zip(kept[2:], chosen[2:], strict=True)])
    if rule is not None:
        return rule
    if not numbers:
        return f"it holds codes ({first.dtype}), and the code of a weight without gradients is not always the same"
    if not bool(torch.isfinite(first).all()):
        return "it is NaN or infinite after a step without gradients"
    return "after a step without gradients it is neither a number nor the weight's value"


def _found_coded(path: Path, kept: list[_Kept]) -> Fresh | str:
    """The rule for a tensor class of its own, rehearsed on the state of a stand-in."""
    name = type(kept[0].tensors[path]).__name__
    rule = _follows([(k, decoded(k.tensors[path]), None) for k in kept[:2]])
    if rule is None:
        return f"it is a {name}, and neither a number nor the weight's value after a step without gradients"
    for k in kept[2:]:
        tensor, coded = k.tensors[path], Fresh(rule.value, True)
        before = decoded(tensor).clone()
        write_rule(tensor, ~k.has_gradient, coded, k.parameter)
        after = decoded(tensor)
        wanted = k.parameter if rule.value is None else torch.full_like(before, rule.value)
        expected = torch.where(k.has_gradient, before, wanted)
        if not bool((after - expected).abs().max() <= _ROUNDING * expected.abs().max()):
            return f"it is a {name}, and values that are written into it do not come back"
    return Fresh(rule.value, True)


def _follows(samples: list[tuple[_Kept, Tensor, Tensor | None]]) -> Fresh | None:
    """The one number or the weight's value that all elements of ``samples`` hold; None where there is none.

    Args:
        samples: a stand-in, its state, and which elements count (None: all).
    """

    def picked(tensor: Tensor, where: Tensor | None) -> Tensor:
        tensor = tensor if tensor.dtype.is_complex else tensor.double()
        return tensor.flatten() if where is None else tensor[where]

    state = torch.cat([picked(t, where) for _, t, where in samples])
    before = torch.cat([picked(k.before, where) for k, _, where in samples])
    after = torch.cat([picked(k.parameter, where) for k, _, where in samples])
    zero = before == 0
    if not zero.any():
        return None
    number = state[zero][0]
    same = torch.isclose(state[zero], number, rtol=1e-5, atol=0.0, equal_nan=False).all()
    if bool(same) and bool(((state - number).abs() <= _SHARE_OF_WEIGHT * before.abs()).all()):
        return Fresh(number.item(), False)
    for weight in (before, after):
        if torch.allclose(state, weight, rtol=1e-2, atol=1e-6):
            return Fresh(None, False)
    return None


def write_rule(tensor: Tensor, where: Tensor, rule: Fresh, weight: Tensor) -> None:
    if rule.coded:
        values = decoded(tensor)
        fresh = weight.to(values) if rule.value is None else torch.full_like(values, rule.value)
        # coded anew, whole blocks share a scale
        tensor.copy_(torch.where(where, fresh, values))
    elif rule.value is None:
        tensor.masked_scatter_(where, weight[where].to(tensor))
    else:
        tensor.masked_fill_(where, rule.value)
