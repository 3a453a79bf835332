"""The optimizer state that a fresh weight has, learnt from steps of a shadow of the optimizer."""

from collections.abc import Iterable, Sequence
from contextlib import suppress

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.first_steps import BEGINNINGS, Beginning, UnknownStateError, first_steps
from sparse_callbacks.core.fresh_rules import Fresh, Key, key_of, rules_of, write_rule
from sparse_callbacks.core.local_parts import local_parameter, whole_of
from sparse_callbacks.core.optimizer_state import Path, by_weight, name_of, state_tensors
from sparse_callbacks.core.shadow_optimizer import Shadow

# Steps in which state is looked for that a first step does not make, such as the slow weights of Lookahead.
_LATE = 12


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
        self._rules: dict[Key, Fresh | str | None] = {}
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
                raise _unknown(path, rule)

    @torch.no_grad()
    def write(self, parameter: Tensor, where: Tensor, is_zero: bool = False) -> None:
        """Give ``parameter`` fresh state at some positions. Scalars such as Adam's ``step`` stay, and state of another
        shape does.

        Args:
            parameter: a parameter of the optimizer, which holds the values of fresh weights already.
            where: a bool tensor of its shape, True at these positions.
            is_zero: whether state of its shape is 0 there already, and need not be written where it starts from 0.

        Raises:
            UnknownStateError: see :meth:`learn`.
        """
        try:
            self._write(self._optimizer, parameter, whole_of(parameter), where, is_zero)
        except UnknownStateError as error:
            raise UnknownStateError(
                f"weights have grown, and with {type(self._optimizer).__name__} they cannot start afresh: {error}. Use another "
                "optimizer, such as torch.optim.AdamW, or a method that does not grow weights, such as Static, GMP or DPF."
            ) from error

    @torch.no_grad()
    def write_stand_in(self, shadow: Shadow, parameter: Tensor, where: Tensor) -> None:
        """:meth:`write` for the stand-in of ``parameter`` in a shadow of the optimizer, ``where`` of whose shape is
        bool.

        Raises:
            UnknownStateError: see :meth:`learn`.
        """
        self._write(shadow.optimizer, shadow.stand_ins[id(parameter)], parameter, where)

    def _write(
        self, optimizer: Optimizer, stepped: Tensor, parameter: Tensor, where: Tensor, is_zero: bool = False
    ) -> None:
        for path, tensor in state_tensors(optimizer, stepped):
            for part, state in by_weight(path, tensor, stepped) if tensor is not stepped else ():
                rule = self._rule(parameter, part, state)
                written = is_zero and state is tensor and state.shape == where.shape and rule == Fresh(0.0, False)
                if rule is not None and not written:
                    write_rule(state, where, rule, stepped.detach())

    def _rule(self, parameter: Tensor, path: Path, tensor: Tensor) -> Fresh | None:
        key = key_of(id(parameter), path, tensor)
        if not self._learnt:
            self._learn()
        if key not in self._rules:
            # the group's arguments have changed, the stand-in was too small for this kind of state, or it comes later
            self._learn(frozenset({id(parameter)}), _LATE)
        rule = self._rules.get(key, self._of_other_precision(key))
        if isinstance(rule, str) and key not in self._rules and len(set(parameter.shape)) == 1 < parameter.ndim:
            return None  # a matrix of a square layer that its stand-in, which is not square, does not have
        if isinstance(rule, str):
            raise _unknown(path, rule)
        return rule

    def _of_other_precision(self, wanted: Key) -> Fresh | str | None:
        """The rule for state that was loaded: torch gives it the dtype of the parameter."""
        if wanted[3].is_floating_point:
            for key, rule in self._rules.items():
                if key[:3] == wanted[:3]:
                    return rule
        return "the first steps of a new optimizer do not make it"

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
            key_of(i, part, state) not in self._rules
            for i, p in kept.items()
            for path, tensor in state_tensors(self._optimizer, p)
            for part, state in by_weight(path, tensor, local_parameter(p))
        )

    def _rules_from(
        self, beginnings: Sequence[Beginning], exact: frozenset[int], steps: int
    ) -> dict[Key, Fresh | str | None]:
        """The rules that the first ``steps`` steps show, each at the step that makes its state."""

        def stepped(seed: int, scale: float) -> Shadow:
            return first_steps(
                lambda whole: Shadow(self._optimizer, seed, decays=False, exact=exact, whole=whole),
                lambda shadow: shadow.give_gradients(scale),
                beginnings,
            )

        scales = (0.0, 0.0, 1.0, 30.0)
        shadows = [stepped(seed, scale) for seed, scale in zip((0, 1, 0, 1), scales, strict=True)]
        rules = rules_of(shadows)
        for _ in range(steps - 1):
            try:
                for shadow, scale in zip(shadows, scales, strict=True):
                    shadow.give_gradients(scale)
                    shadow.step()
            # whatever somebody's optimizer raises: what the steps before have shown is true all the same
            except Exception:
                break
            rules = rules_of(shadows) | rules
        return rules


def _unknown(path: Path, reason: str) -> UnknownStateError:
    return UnknownStateError(f"it is not known what its state {name_of(path)!r} is for a fresh weight: {reason}")
