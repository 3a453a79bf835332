"""Refusing arguments of other types than their annotations say, as a person reads these."""

import collections.abc
import functools
import inspect
import math
import os
import types
import typing
from collections.abc import Callable, Mapping
from numbers import Integral, Real
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import torch

from sparse_callbacks.core.state_layout import shown_short

_P = ParamSpec("_P")
_R = TypeVar("_R")
SENTENCE = 40
"""Characters that the errors of Python and torch for wrong values may have, and those of this package have more."""


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type.

    A bool is not a number here, and neither is NaN. Numbers of numpy and fractions are numbers; tensors are not, as
    they may wait for a device. Of a type that cannot be asked about, everything is.
    """
    if hint is Any or hint is object or (type(value) is hint and hint is not float):
        return True
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, option) for option in inner)
    if origin is typing.Literal:
        return any(type(value) is type(option) and value == option for option in inner)
    if hint is None or hint is type(None):
        return value is None
    if hint is float or hint is int:
        number = isinstance(value, Real if hint is float else Integral) and not isinstance(value, bool)
        return number and not math.isnan(value)
    if origin in (collections.abc.Sequence, list, tuple):
        item = inner[0] if inner else Any
        listed = isinstance(value, collections.abc.Sequence) and not isinstance(value, str | bytes)
        return listed and all(fits(v, item) for v in value)
    if origin in (collections.abc.Mapping, dict):
        return isinstance(value, Mapping) and all(fits(k, inner[0]) and fits(v, inner[1]) for k, v in value.items())
    if hint is Path:
        return isinstance(value, os.PathLike)
    try:
        return isinstance(value, origin if inspect.isclass(origin) else hint)
    except TypeError:  # a protocol, a TypedDict or a type variable
        return True


def refuse_other_types(function: Callable[..., Any], args: Any, kwargs: Any, more: type | None = None) -> None:
    """Refuse arguments of a call that are not of the annotated types.

    Args:
        function: the function, whose arguments are annotated.
        args, kwargs: the arguments of the call.
        more: a TypedDict with the arguments that ``function`` takes as ``**options``.

    Raises:
        TypeError: names the first such argument, its value, and the types that it may have.
    """
    signature, hints, options = _annotated(function)
    try:
        given = signature.bind(*args, **kwargs).arguments
    except TypeError:
        return  # Python says what is missing
    if more is not None:
        hints = {**hints, **_hints(more)}
        given = {**given, **given.get(options, {})}
    for name, value in given.items():
        if name in hints and name != options and not fits(value, hints[name]):
            # a constructor may be inherited, and its caller has written the name of the class
            called = type(args[0]).__name__ if function.__name__ == "__init__" else function.__qualname__
            raise TypeError(
                f"{name}={shown_short(value)} is not of a type that {called} takes. Give {_in_words(hints[name])}."
            )


# some of the functions are called for every parameter at an update, and Python makes a signature anew each time
@functools.cache
def _annotated(function: Callable[..., Any]) -> tuple[inspect.Signature, dict[str, Any], str]:
    """Signature and annotations of a function, and the name of its ``**options``; empty without one."""
    signature = inspect.signature(function)
    options = next((n for n, p in signature.parameters.items() if p.kind is p.VAR_KEYWORD), "")
    return signature, _hints(function), options


@functools.cache
def _hints(thing: Any) -> dict[str, Any]:
    try:
        return typing.get_type_hints(thing)
    except NameError:  # a type that only a type checker imports
        return {}


def _in_words(hint: Any) -> str:
    """An annotation as the reader of an error wants it."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(dict.fromkeys(map(_in_words, inner)))
    if origin is typing.Literal:
        return " or ".join(map(repr, inner))
    words = {float: "a number", int: "a whole number", str: "a text", bool: "True or False", type(None): "None"}
    if hint in words:
        return words[hint]
    if origin in (collections.abc.Sequence, list, tuple):
        return f"a list ({_in_words(inner[0])} each)" if inner else "a list"
    if origin in (collections.abc.Mapping, dict):
        return f"a mapping from {_in_words(inner[0])} to {_in_words(inner[1])}"
    if origin is collections.abc.Callable:
        return "a function"
    if hint is Any or hint is object:
        return "anything"
    name = "tensor" if hint is torch.Tensor else str(getattr(hint, "__name__", hint))
    return f"{'an' if name[0] in 'AEIOUaeiou' else 'a'} {name}"


def in_words(error: Exception, names: collections.abc.Iterable[str]) -> bool:
    """Whether an error is a sentence about a value, which says more than one about its type."""
    text = str(error)
    if type(error) is ValueError:  # "name=value", or "name: ..." about a part of the value
        return len(text) > SENTENCE and ("=" in text or any(f"{name}: " in text for name in names))
    return type(error) is TypeError and any(f"{name}=" in text for name in names)


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function``, which refuses arguments of other types than it is annotated with, before it does anything."""

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        refuse_other_types(function, args, kwargs)
        return function(*args, **kwargs)

    return called


def checked_after(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """``function``, which refuses arguments of other types than it is annotated with where it finds nothing to say of
    their values; for functions that change nothing."""

    @functools.wraps(function)
    def called(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        try:
            found = function(*args, **kwargs)
        except Exception as error:
            if not in_words(error, inspect.signature(function).parameters):
                refuse_other_types(function, args, kwargs)
            raise
        refuse_other_types(function, args, kwargs)
        return found

    return called
