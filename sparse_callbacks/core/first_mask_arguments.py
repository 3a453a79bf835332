"""Methods that have no argument for their first masks say so in words."""

from collections.abc import Callable
from functools import singledispatch, wraps
from inspect import signature
from typing import Any

from sparse_callbacks.core.constructors import argument_names
from sparse_callbacks.core.state_layout import shown_short

_OF_SPARSE_STARTS = ("initial_mask", "rescale")


@singledispatch
def why_no_first_mask(method: object) -> str:
    """Why nobody can tell ``method`` where its first masks lie, as a clause that follows its name. A method registers a
    function of its own."""
    return "begins with masks of its own"


def refusing_first_masks(init: Callable[..., None], shared: type) -> Callable[..., None]:
    """``init``, the constructor of a method, which refuses arguments about first masks where the method has none.

    Args:
        init: the ``__init__`` of a class.
        shared: a TypedDict with the arguments that the class takes as ``**options`` and hands on.
    """

    # a class with such a parameter may be the base of one that has none, and gives it a value
    asked = [name for name in _OF_SPARSE_STARTS if name not in signature(init).parameters]

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        for name in asked:
            if name in kwargs and name not in argument_names(type(self), shared):
                raise ValueError(
                    f"{name}={shown_short(kwargs[name])}: {type(self).__name__} {why_no_first_mask(self)}. Leave {name}= out; "
                    "Static, SET, RigL, SNFS, CTRE and GaP take it."
                )
        init(self, *args, **kwargs)

    return checked
