"""Arguments of NM: what each may be, and what does not go together."""

import math
from collections.abc import Mapping

from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.nm_masks import NMPattern, nm_pattern
from sparse_callbacks.core.schedules import to_steps
from sparse_callbacks.core.state_layout import shown_short


def asked_of_nm(pattern: str) -> NMPattern:
    """The N:M that a text names.

    Args:
        pattern: such as ``"2:4"``.

    Raises:
        ValueError: it names none.
    """
    if (found := nm_pattern(pattern)) is None:
        raise ValueError(
            f"pattern={shown_short(pattern)} is not N:M. Give '2:4', in which 2 of every 4 inputs are active (or other whole numbers, "
            "the first below the second), or 'transposable 2:4'."
        )
    return found


def refuse_other_targets(options: Mapping[str, object], asked: NMPattern, method: str) -> None:
    """Refuse the arguments that other methods have for a target, which N:M fixes.

    Args:
        options: the arguments that the method's constructor does not name.
        asked: the pattern.
        method: the name of the method's class.

    Raises:
        ValueError: ``sparsity`` or ``distribution`` is among them.
    """
    for name in ("sparsity", "distribution"):
        if name in options:
            raise ValueError(
                f"{name}= is not an argument of {method}, whose pattern {asked} is a sparsity of {asked.sparsity:.4g} in every layer that "
                "fits. Leave it out, or give another pattern=: '1:4' for 75 % zeros."
            )


def refuse_ramp(ramp: Time | None) -> None:
    """Refuse a time at which no ramp can end.

    Args:
        ramp: when the ramp ends; None: there is none.

    Raises:
        ValueError: it is not a time after the beginning.
    """
    if ramp is not None and not to_steps(ramp, 1, "ramp") and not ramp:
        raise ValueError(
            f"ramp={ramp!r} ends where the run begins. Give a later time, or None for N from the first step on."
        )


def refuse_pruned_decay(decay: float | None) -> None:
    """Refuse a decay that is not a number from 0 on.

    Args:
        decay: the decay of pruned weights; None: the published one.

    Raises:
        ValueError: it is negative or infinite.
    """
    if decay is not None and not 0 <= decay < math.inf:
        raise ValueError(f"decay={decay!r} is not a decay of weights. Give a number from 0 on, such as 2e-4, or None.")


def refuse_beside_soft(pattern: NMPattern, every: Time | None, decay: float | None, ramp: Time | None) -> None:
    """Refuse what the soft projection does not have.

    Args:
        pattern: the pattern of the method.
        every, decay, ramp: the arguments, as they were given.

    Raises:
        ValueError: names the first such argument.
    """
    if pattern.transposable:
        raise ValueError(
            f"pattern='{pattern}' with projection='soft': its threshold is that of a group of inputs, and tiles have none. Give "
            f"'{pattern.n}:{pattern.m}', or projection='hard'."
        )
    given = {"every": every not in (None, 1) and every, "decay": decay, "ramp": ramp}
    for name, value in given.items():
        if value:
            raise ValueError(
                f"{name}={value!r} with projection='soft': it moves in every step, pruned weights do not decay, and its scale belongs "
                f"to one N. Leave {name}= out, or give projection='hard'."
            )
