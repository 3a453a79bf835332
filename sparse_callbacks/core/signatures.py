"""Refusing overrides of hooks that have another signature, or another name, than the hooks of today."""

import functools
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

from sparse_callbacks.core.renamed import NEW_SIGNATURES, READ_BY_USERS_ALONE, RENAMED

_OUR_PACKAGE = __name__.partition(".")[0]
_TABLE = "The table of old and new names is in CHANGELOG.md."


def refuse_old_hooks(cls: type) -> None:
    """Refuse a subclass that overrides a hook in a way that the engine would not call.

    Every name that ``cls`` or a mixin defines is compared with the nearest definition in a class of this package, so
    that hooks of one method count like those of all.

    Args:
        cls: the class that is being made.

    Raises:
        TypeError: an override with another signature than the hook, or one of a hook that has another name now.
    """
    ours = [base for base in cls.__mro__[1:] if _is_ours(base)]
    for owner, name in _names_to_check(cls, ours):
        hook = next((vars(base)[name] for base in ours if name in vars(base)), None)
        old = READ_BY_USERS_ALONE if hook is not None else RENAMED
        # a class of ours that has an old name is where the name went to
        if name in old and not _is_ours(owner):
            raise TypeError(
                f"{owner.__name__}.{name} is a name of version 0.1 that nothing calls or reads any more. {old[name]} "
                f"{_TABLE}"
            )
        made = inspect.getattr_static(cls, name, None)
        # a mixin's definition that another class hides is never called
        if hook is not None and made is vars(owner).get(name):
            _refuse_other_signature(f"{owner.__name__}.{name}", name, made, hook)


def _is_ours(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == _OUR_PACKAGE


def _names_to_check(cls: type, ours: Sequence[type]) -> Iterator[tuple[type, str]]:
    """Names that ``cls`` and its mixins define or annotate, with the class that does; special methods left out."""
    for owner in cls.__mro__:
        # what a class of ours derives from itself, such as the Callback of Lightning, is not a user's
        if owner is not cls and any(issubclass(base, owner) for base in ours):
            continue
        for name in [*vars(owner), *_annotated(owner)]:
            if not name.startswith("__"):
                yield owner, name


def _annotated(cls: type) -> list[str]:
    try:
        return list(inspect.get_annotations(cls))
    except NameError:  # from Python 3.14 on annotations are evaluated here, and may name what only a type checker knows
        return []


def _refuse_other_signature(shown: str, name: str, made: Any, hook: Any) -> None:
    """Refuse an override that cannot be called like the hook.

    Args:
        shown: the class and the name of the override, for the message.
        name: name of the hook.
        made: the override, as it lies in its class.
        hook: the definition that it overrides, as it lies in its class.

    Raises:
        TypeError: the override does not take the positional arguments of the hook.
    """
    taken, given = _called_with(made), _called_with(hook)
    if taken is None or given is None:
        return
    positional = [p for p in given.parameters.values() if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    try:
        taken.bind(*positional)
    except TypeError:
        advice = NEW_SIGNATURES.get(name, "see the hook's docstring")
        raise TypeError(
            f"{shown}{_with_self(made, taken)} does not take what the hook is called with, "
            f"{name}{_with_self(hook, given)}: {advice}. {_TABLE}"
        ) from None


def _called_with(made: Any) -> inspect.Signature | None:
    """The arguments of a method as it is called on an instance, without ``self``; None for what is not called.

    Args:
        made: what lies in a class: a function, a ``staticmethod``, ``classmethod`` or ``partialmethod``, or what a
            decorator such as ``functools.lru_cache`` has made of one.
    """
    if not callable(made) and not isinstance(made, classmethod | functools.partialmethod):
        return None  # a property among others, whose getter must not run here
    # any object serves as the instance: binding only takes the first argument away
    bound = made.__get__(object(), object) if hasattr(type(made), "__get__") else made
    try:
        return inspect.signature(bound)
    except (TypeError, ValueError):  # of a function in C
        return None


def _with_self(made: Any, taken: inspect.Signature) -> str:
    """The arguments for a message: as they stand in the source where that is known."""
    return str(inspect.signature(made) if inspect.isfunction(made) else taken)
