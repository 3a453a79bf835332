"""Constructor arguments of methods, which each object keeps under their own names."""

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Unpack, get_origin

from sparse_callbacks.core.argument_types import in_words, refuse_other_types
from sparse_callbacks.core.similar_names import meant

_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_DEPTH = "_constructors_running"
# a method without one of these takes the value that changes nothing, and answers every other one in words
_ANSWERED = ("storage", "pattern", "ablation")


def argument_names(cls: type, shared: type) -> list[str]:
    """Names of the constructor arguments of a class, in their order.

    Args:
        cls: the class.
        shared: a TypedDict with the arguments that ``cls`` takes as ``**options`` and hands on.
    """
    names: list[str] = []
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        parameters = list(inspect.signature(init).parameters.values())[1:]  # without self
        names += [p.name for p in parameters if p.kind not in _VARIADIC and p.name not in names]
        handed_on = [p for p in parameters if p.kind in _VARIADIC]
        # **options: Unpack[Options] hands on what `shared` lists; a bare *args or **kwargs whatever the next class takes
        if not handed_on or all(_is_unpacked(p.annotation) for p in handed_on):
            break
    return [*names, *(name for name in shared.__annotations__ if name not in names)]


def default_of(cls: type, name: str) -> Any:
    """The default of a constructor argument, by the class that is nearest to ``cls`` and has the argument; None without one."""
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        if (found := inspect.signature(init).parameters.get(name)) is not None:
            return None if found.default is inspect.Parameter.empty else found.default
    return None


@functools.singledispatch
def argument_values(made: object, shared: type) -> dict[str, Any]:
    """Values of the constructor arguments of an object by name, in their order: its attributes of these names.

    A class that has something else under the name of an argument registers a function of its own.

    Args:
        made: the object.
        shared: as in :func:`argument_names`.
    """
    return {name: getattr(made, name) for name in argument_names(type(made), shared)}


def _is_unpacked(annotation: Any) -> bool:
    """``Unpack[Options]``, also as text, under ``from __future__ import annotations``."""
    return get_origin(annotation) is Unpack or (isinstance(annotation, str) and "Unpack[" in annotation)


def checks_arguments(init: Callable[..., None], shared: type) -> Callable[..., None]:
    """``init`` with a check, when the outermost constructor of an object returns, that it has kept every argument.

    A wrapper and not a metaclass, which would clash with that of ``class Mine(RigL, ABC)``.

    Args:
        init: the ``__init__`` of a class.
        shared: a TypedDict with the arguments that the class takes as ``**options`` and hands on.

    Raises:
        TypeError: an argument that the class does not have, or that only a base class names, one that is no attribute of the
            object, or in a class of this package one of another type than it is annotated with; raised by the function that
            is returned.
    """

    # None in code that was executed as text
    ours = (init.__module__ or "").partition(".")[0] == __name__.partition(".")[0]

    @functools.wraps(init)  # signature and source stay those of `init`: inspect and LightningCLI follow __wrapped__
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = _DEPTH not in vars(self)
        vars(self)[_DEPTH] = True
        try:
            init(self, *args, **kwargs)
        except Exception as error:
            if outermost and isinstance(error, TypeError) and "unexpected keyword argument" in str(error):
                refuse_unknown_arguments(self, args, kwargs, _taken_by_name(init, type(self), shared))
            # a sentence about the value says more than one about its type
            if ours and not in_words(error, inspect.signature(init).parameters):
                refuse_other_types(init, (self, *args), kwargs, shared)
            raise
        finally:
            if outermost:
                del vars(self)[_DEPTH]
        if ours:  # an annotation of somebody else's may be there for the reader alone
            refuse_other_types(init, (self, *args), kwargs, shared)
        if outermost:
            names = argument_names(type(self), shared)
            refuse_lost_arguments(self, names)
            refuse_unnamed_arguments(self, [name for name in kwargs if name not in names], names)

    return checked


def refuse_lost_arguments(made: object, names: list[str]) -> None:
    """Refuse an object that has not kept an argument of its constructor under the argument's name.

    Raises:
        TypeError: an argument of ``names`` is not an attribute.
    """
    lost = [name for name in names if not hasattr(made, name)]
    if lost:
        writes = "; ".join(f"self.{name} = {name}" for name in lost)
        raise TypeError(
            f"{type(made).__name__}.__init__ takes {', '.join(f'{n}=' for n in lost)} and does not keep it under its own "
            f"name. repr(), checkpoints and resume read every argument there: write {writes} in __init__."
        )


@functools.singledispatch
def where_argument_belongs(made: object, argument: str, given: Sequence[object]) -> str:
    """' A sentence' that says which object takes an argument that another one does not have; empty where nobody knows.

    Args:
        made: the object whose constructor was called.
        argument: the name of the argument.
        given: the values of all arguments.
    """
    return ""


def refuse_unknown_arguments(
    made: object, args: Sequence[object], kwargs: Mapping[str, object], names: Sequence[str]
) -> None:
    """Refuse arguments that a class does not have.

    Args:
        made: the object, whose constructor was called.
        args, kwargs: its arguments.
        names: the constructor arguments of the class.

    Raises:
        TypeError: names the first of such arguments, and what was meant by it if a name is like it.
    """
    for argument in kwargs:
        if argument not in names and argument not in _ANSWERED:
            whose = where_argument_belongs(made, argument, [*args, *kwargs.values()]) or meant(argument, names)
            raise TypeError(
                f"{type(made).__name__} has no argument {argument}=.{whose} {type(made).__name__} has "
                f"{', '.join(f'{n}=' for n in names)}."
            )


def _taken_by_name(init: Callable[..., None], cls: type, shared: type) -> list[str]:
    """The arguments that an ``__init__`` of ``cls`` takes by name, those that it hands on included."""
    parameters = list(inspect.signature(init).parameters.values())[1:]  # without self
    handed_on = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)
    return argument_names(cls, shared) if handed_on else [p.name for p in parameters]


def refuse_unnamed_arguments(made: object, unnamed: list[str], names: list[str]) -> None:
    """Refuse arguments that went through ``**options`` to a base class, where the class itself has none of these names.

    They would do nothing, or what nobody can read in the object: repr() and checkpoints know the named ones alone.

    Args:
        made: the object.
        unnamed: arguments that were given by name, and that its class does not name.
        names: the constructor arguments of the class.

    Raises:
        TypeError: there are such arguments.
    """
    if unknown := [name for name in unnamed if name not in _ANSWERED]:
        raise TypeError(
            f"{type(made).__name__} has no argument {', '.join(f'{n}=' for n in unknown)}: a class that it is made of has. "
            f"Leave it out; {type(made).__name__} has {', '.join(f'{n}=' for n in names)}."
        )
