"""The arguments that say how sparse layers are stored, and the methods that have none."""

from collections.abc import Callable, Mapping
from functools import singledispatch, wraps
from inspect import signature
from numbers import Integral
from typing import Any, Literal

from sparse_callbacks.core.state_layout import shown_short

StorageName = Literal["masked", "sparse", "grouped", "auto"]
StorageByLayer = StorageName | Mapping[str, StorageName]
"""One storage for all layers, or one by glob on the names of parameters; what no glob matches is masked."""
Rows = int | Mapping[str, int]
"""Rows that a layer sees in a step (the batch, times the length of a sequence), of all layers or by glob."""
_ASKED = "_storage_asked_of_masks"
_NAMES = ("masked", "sparse", "grouped", "auto")


@singledispatch
def why_no_exchange(method: object) -> str:
    """Why the layers of ``method`` have masks alone, as a clause that follows its name; empty where they may have other
    storage. A method registers a function of its own."""
    return "may need every weight of a layer, pruned ones too, so sparse storage has nothing to save"


def refuse_storage(method: object, storage: Any) -> None:
    """Refuse a storage that was asked for by name, other than masks, for a method that keeps something for pruned weights.

    Raises:
        ValueError: says what it keeps.
    """
    names = _names_of(storage)
    if (why := why_no_exchange(method)) and not (names and names <= {"masked", "auto"}):
        raise ValueError(f"storage={storage!r}: {type(method).__name__} {why}. Use RigL or SET, or storage='masked'.")


def refusing_storage(init: Callable[..., None]) -> Callable[..., None]:
    """``init``, the constructor of a method, which answers ``storage=`` where the method has no such argument: it takes
    ``"masked"``, and ``"auto"``, which is masked then with the reason in the plan, and refuses others in words."""
    if "storage" in signature(init).parameters:
        return init

    @wraps(init)
    def checked(self: Any, *args: Any, **kwargs: Any) -> None:
        asked = {}
        if "storage" in kwargs and why_no_exchange(self):
            asked[_ASKED] = kwargs.pop("storage")
            refuse_storage(self, asked[_ASKED])
        init(self, *args, **kwargs)
        vars(self).update(asked)

    return checked


def storage_remark(method: object) -> str:
    """Why ``storage="auto"`` leaves all layers of ``method`` masked, as a sentence; empty where it decides, or nobody asked
    for it."""
    asked = storage_asked(method).get("storage")
    if "auto" not in _names_of(asked):
        return ""
    return f"storage={asked!r} is masked: {type(method).__name__} {why_no_exchange(method)}."


def storage_asked(method: object) -> dict[str, Any]:
    """``storage=`` as it was given to a method that has no such argument, by its name; empty where it was not."""
    return {"storage": vars(method)[_ASKED]} if _ASKED in vars(method) else {}


def storages_of(method: object) -> set[Any]:
    """The storages that the layers of a method were asked to have."""
    return _names_of(getattr(method, "storage", "masked"))


def _names_of(storage: Any) -> set[Any]:
    """The storages in an argument, whatever it is."""
    names = list(storage.values()) if isinstance(storage, Mapping) else [storage]
    return {name if isinstance(name, str) else repr(name) for name in names}


def check_storage(method: object, storage: Any, group: Any, rows: Any, pattern: str | None) -> None:
    """Refuse arguments that are not a storage, a group of rows, or numbers of rows, or a pattern that is not of the storage.

    Raises:
        ValueError: says which one, and what to give.
    """
    names = list(storage.values()) if isinstance(storage, Mapping) else [storage]
    if not names or any(not isinstance(name, str) or name not in _NAMES for name in names):
        raise ValueError(
            f"storage={shown_short(storage)} is not known. Give {', '.join(map(repr, _NAMES))}, or a mapping of globs on "
            "parameter names to these."
        )
    refuse_storage(method, storage)
    if not _is_positive(group):
        raise ValueError(
            f"group={group!r} is not a number of output rows that read the same inputs. Give for example 64."
        )
    refuse_rows(rows)
    same = (f"fan_in/{group}", *(["fan_in"] if group == 1 else []))  # as group= says
    fitting = {"masked", "grouped"} if pattern in same else {"masked"}
    if pattern is not None and not fitting.issuperset(names):
        rows_together = pattern.partition("/")[2] or "1"
        advice = f"For the same pattern without the pruned weights give storage='grouped', group={rows_together}."
        if not pattern.startswith("fan_in"):
            advice = "Leave storage= out, or pattern=."
        raise ValueError(
            f"pattern={pattern!r} is one of masked storage, and storage={shown_short(storage)} with group={group!r} has another. "
            f"{advice}"
        )


def refuse_rows(rows: Any) -> None:
    """Refuse what is not a number of rows, or such numbers by glob.

    Raises:
        ValueError: says what to give.
    """
    if not (rows is None or all(map(_is_positive, rows.values() if isinstance(rows, Mapping) else [rows]))):
        raise ValueError(
            f"rows={shown_short(rows)} is not the number of rows that a layer sees in a step. Give the size of the batch "
            "(times the length of its sequences), or a mapping of globs on parameter names to such numbers."
        )


def _is_positive(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) > 0
