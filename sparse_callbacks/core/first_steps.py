"""The first steps of a shadow, begun with whichever state it can be stepped from."""

from collections.abc import Callable, Sequence

from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.shadow_optimizer import Shadow

Beginning = Callable[[Shadow], bool]
"""Gives a shadow the state that it begins with; False where there is none."""


class UnknownStateError(ValueError):
    """What an optimizer does to fresh weights could not be found out, with the reason as its text, a clause
    whose subject is the optimizer."""


def _start_empty(shadow: Shadow) -> bool:
    return True


BEGINNINGS: Sequence[Beginning] = (_start_empty, Shadow.start_from_state, Shadow.start_from_constructor)
"""What a shadow's state may begin with, in the order in which it is tried."""


def first_steps(
    make: Callable[[bool], Shadow],
    gradients: Callable[[Shadow], object],
    beginnings: Sequence[Beginning] = BEGINNINGS,
    closures: Sequence[bool] = (False, True),
    steps: int = 1,
) -> Shadow:
    """A shadow that ``make`` gives, after its first ``steps``.

    Args:
        make: makes a shadow; its argument says whether stand-ins must have the shapes of their parameters, because tensors that
            the optimizer keeps elsewhere have them.
        gradients: gives it the gradients of a step.
        beginnings: what the shadow's state may begin with.
        closures: whether its steps may have a closure, in the order in which it is tried.
        steps: how many steps it takes.

    Raises:
        UnknownStateError: it cannot be stepped.
    """
    errors: list[Exception] = []
    for whole in (False, True):
        for begin in beginnings:
            for closure in closures:
                try:
                    shadow = make(whole)
                    if begin(shadow):
                        shadow.needs_closure = closure
                        for _ in range(steps):
                            shadow.step(lambda: gradients(shadow))  # noqa: B023  # called at once
                        return shadow
                # whatever somebody's optimizer raises
                except Exception as error:
                    errors.append(error)
    if not errors:
        raise UnknownStateError("it needs state that its constructor makes, and steps have changed this since")
    raise UnknownStateError(
        f"its step fails for the stand-ins with which it is tried before the first batch ({with_class(errors[0])})"
    )
