"""The optimizer state that a fresh weight has, learnt from steps of a shadow of the optimizer."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.optimizer_state import Path, by_weight, decoded, is_coded, name_of, state_tensors
from sparse_callbacks.core.shadow_optimizer import Shadow

_Key = tuple[int, Path, type, torch.dtype]
Beginning = Callable[[Shadow], bool]
"""Gives a shadow the state that it begins with; False where there is none."""

# What decays or noise of an unknown kind may add to fresh state, as a share of the weight.
_SHARE_OF_WEIGHT = 0.1
# Values of 4 bits are up to an eighth of the largest apart, and are rounded each time that they are coded.
_ROUNDING = 0.15
# Steps in which state is looked for that a first step does not make, such as the slow weights of Lookahead.
_LATE = 12


@dataclass(frozen=True)
class Fresh:
    """What a state tensor holds for a fresh weight.

    Attributes:
        value: a number; None for the weight's own value.
        coded: it is a tensor class of its own, which decodes itself (``dequantize``) and codes what is copied into it.
    """

    value: float | None
    coded: bool


class UnknownStateError(ValueError):
    """What fresh state is could not be found out, with the reason as its text."""


class FreshState:
    """Writes the state of a fresh weight into an optimizer, and knows what that is.

    State is not always zero at first: it may be an accumulator or step size that starts at a number, a code whose zero is
    127, or a copy of the weight. It is learnt once, before it is written for the first time: a
    :class:`~sparse_callbacks.core.shadow_optimizer.Shadow` of the optimizer takes a step with zero gradients at two values.
    State that is the same for all of them starts there; state that is the weight's value starts at that of the new weight.
    Where this gives no answer (NaN without any gradient), and for integer codes, the elements without a gradient in a step
    that has gradients elsewhere decide.

    Args:
        optimizer: the optimizer whose state is written.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._optimizer = optimizer
        # by id of the parameter, path, class and dtype of the state tensor; a text says why a rule was not found, and None
        # that the state is not one of single weights, such as a square matrix of a square layer
        self._rules: dict[_Key, Fresh | str | None] = {}
        self._learnt = False

    def learn(self, parameters: Iterable[Tensor]) -> None:
        """Find out now what fresh state of ``parameters`` is.

        Raises:
            UnknownStateError: the optimizer cannot be copied or stepped, or it keeps state that starts in another way.
        """
        self._learn()
        mine = {id(p) for p in parameters}
        for (parameter, path, _, _), rule in self._rules.items():
            if parameter in mine and isinstance(rule, str):
                raise UnknownStateError(
                    f"what its state {name_of(path)!r} is for a new weight could not be found out: {rule}"
                )

    @torch.no_grad()
    def write(self, parameter: Tensor, where: Tensor) -> None:
        """Give ``parameter`` fresh state at some positions. Scalars such as Adam's ``step`` stay, and state of another
        shape does.

        Args:
            parameter: a parameter of the optimizer, which holds the values of fresh weights already.
            where: a bool tensor of its shape, True at these positions.

        Raises:
            UnknownStateError: see :meth:`learn`.
        """
        for path, tensor in state_tensors(self._optimizer, parameter):
            for part, state in by_weight(path, tensor, parameter) if tensor is not parameter else ():
                rule = self._rule(parameter, part, state)
                if rule is not None:
                    _write(state, where, rule, parameter.detach())

    @torch.no_grad()
    def write_stand_in(self, shadow: Shadow, parameter: Tensor, where: Tensor) -> None:
        """:meth:`write` for the stand-in of ``parameter`` in a shadow of the optimizer, ``where`` of whose shape is
        bool.

        Raises:
            UnknownStateError: see :meth:`learn`.
        """
        stand_in = shadow.stand_ins[id(parameter)]
        for path, tensor in state_tensors(shadow.optimizer, stand_in):
            for part, state in by_weight(path, tensor, stand_in) if tensor is not stand_in else ():
                rule = self._rule(parameter, part, state)
                if rule is not None:
                    _write(state, where, rule, stand_in.detach())

    def _rule(self, parameter: Tensor, path: Path, tensor: Tensor) -> Fresh | None:
        key = _key(id(parameter), path, tensor)
        if not self._learnt:
            self._learn()
        if key not in self._rules:
            # the group's arguments have changed, the stand-in was too small for this kind of state, or it comes later
            self._learn(frozenset({id(parameter)}), _LATE)
        rule = self._rules.get(key, self._of_other_precision(key))
        if isinstance(rule, str) and key not in self._rules and len(set(parameter.shape)) == 1 < parameter.ndim:
            return None  # a matrix of a square layer that its stand-in, which is not square, does not have
        if isinstance(rule, str):
            raise UnknownStateError(
                f"what its state {name_of(path)!r} is for a new weight could not be found out: {rule}"
            )
        return rule

    def _of_other_precision(self, wanted: _Key) -> Fresh | str | None:
        """The rule for state that was loaded: torch gives it the dtype of the parameter."""
        if wanted[3].is_floating_point:
            for key, rule in self._rules.items():
                if key[:3] == wanted[:3]:
                    return rule
        return "a step from new does not make it"

    def _learn(self, exact: frozenset[int] = frozenset(), steps: int = 1) -> None:
        self._rules |= self._rules_from(BEGINNINGS, exact, steps)
        self._learnt = True
        if self._has_other_state():
            # made by the constructor, and not used in a first step
            with suppress(UnknownStateError):
                self._rules = self._rules_from([Shadow.start_from_state], exact, steps) | self._rules

    def _has_other_state(self) -> bool:
        kept = {id(p): p for group in self._optimizer.param_groups for p in group["params"]}
        return any(
            _key(i, part, state) not in self._rules
            for i, p in kept.items()
            for path, tensor in state_tensors(self._optimizer, p)
            for part, state in by_weight(path, tensor, p)
        )

    def _rules_from(
        self, beginnings: Sequence[Beginning], exact: frozenset[int], steps: int
    ) -> dict[_Key, Fresh | str | None]:
        """The rules that the first ``steps`` steps show, each at the step that makes its state."""

        def stepped(seed: int, scale: float) -> Shadow:
            return first_steps(
                lambda: Shadow(self._optimizer, seed, decays=False, exact=exact),
                lambda shadow: shadow.give_gradients(scale),
                beginnings,
            )

        scales = (0.0, 0.0, 1.0, 30.0)
        shadows = [stepped(seed, scale) for seed, scale in zip((0, 1, 0, 1), scales, strict=True)]
        rules = _rules_of(shadows)
        for _ in range(steps - 1):
            try:
                for shadow, scale in zip(shadows, scales, strict=True):
                    shadow.give_gradients(scale)
                    shadow.step()
            # whatever somebody's optimizer raises: what the steps before have shown is true all the same
            except Exception:
                break
            rules = _rules_of(shadows) | rules
        return rules


def _rules_of(shadows: Sequence[Shadow]) -> dict[_Key, Fresh | str | None]:
    rules: dict[_Key, Fresh | str | None] = {}
    for i in shadows[0].stand_ins:
        kept = [_Kept.of(shadow, i) for shadow in shadows]
        for path, tensor in kept[0].tensors.items():
            if all(path in k.tensors for k in kept):
                of_weights = all(k.tensors[path].shape == k.parameter.shape for k in kept)
                rules[_key(i, path, tensor)] = _found(path, kept) if of_weights else None
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


def _key(parameter: int, path: Path, tensor: Tensor) -> _Key:
    return parameter, path, type(tensor), tensor.dtype


def _start_empty(shadow: Shadow) -> bool:
    return True


BEGINNINGS: Sequence[Beginning] = (_start_empty, Shadow.start_from_state, Shadow.start_from_constructor)
"""What a shadow's state may begin with, in the order in which it is tried."""


def first_steps(
    make: Callable[[], Shadow],
    gradients: Callable[[Shadow], object],
    beginnings: Sequence[Beginning] = BEGINNINGS,
    closures: Sequence[bool] = (False, True),
    steps: int = 1,
) -> Shadow:
    """A shadow that ``make`` gives, after its first ``steps``.

    Args:
        make: makes a shadow.
        gradients: gives it the gradients of a step.
        beginnings: what the shadow's state may begin with.
        closures: whether its steps may have a closure, in the order in which it is tried.
        steps: how many steps it takes.

    Raises:
        UnknownStateError: it cannot be stepped.
    """
    errors: list[Exception] = []
    for begin in beginnings:
        for closure in closures:
            try:
                shadow = make()
                if begin(shadow):
                    shadow.needs_closure = closure
                    for _ in range(steps):
                        shadow.step(lambda: gradients(shadow))  # noqa: B023  # called at once
                    return shadow
            # whatever somebody's optimizer raises
            except Exception as error:
                errors.append(error)
    reason = f"{type(errors[0]).__name__}: {errors[0]}" if errors else "its state is not that of a new optimizer"
    raise UnknownStateError(f"a copy of it could not be stepped: {reason}")


# ---------------------------------------------------------------------- rules


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
        return f"{type(error).__name__}: {error}"


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
        _write(tensor, ~k.has_gradient, coded, k.parameter)
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


def _write(tensor: Tensor, where: Tensor, rule: Fresh, weight: Tensor) -> None:
    if rule.coded:
        values = decoded(tensor)
        fresh = weight.to(values) if rule.value is None else torch.full_like(values, rule.value)
        # coded anew, whole blocks share a scale
        tensor.copy_(torch.where(where, fresh, values))
    elif rule.value is None:
        tensor.masked_scatter_(where, weight[where].to(tensor))
    else:
        tensor.masked_fill_(where, rule.value)
