"""The tensors among the outputs of a model, in whatever containers and objects they lie."""

import dataclasses
import io
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, Sequence, Set
from functools import partial
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

_ATOMS = (
    *(str, bytes, bytearray, int, float, complex, type, ModuleType, BuiltinFunctionType, torch.Size),
    *(io.IOBase, logging.Logger),  # files are iterators, and a logger holds all others
)
_STREAMS = (Iterator, AsyncIterator, Coroutine)
_STRUCTURE = frozenset(vars(nn.Module()))
_CACHE = "transformers.cache_utils.Cache"
"""Keys and values that the model alone reads again, in its next call: state, and no output."""


class OpaqueOutputError(ValueError):
    """Outputs that may hold tensors which nobody can look at."""


def output_tensors(output: Any) -> list[Tensor]:
    """All tensors in what a model returns, in an order that two passes share.

    They are looked for in mappings, sequences, dataclasses, and in the attributes and slots of any other object, such as a
    ``torch.distributions.Distribution``, a ``SimpleNamespace``, and a function with what it has enclosed. Arrays of numpy
    count as tensors. Numbers do not, nor do the parameters of modules, nor a ``Cache`` of transformers, which the model
    itself reads in its next call.

    Raises:
        OpaqueOutputError: an iterator or coroutine, which looking would use up, or a set of several tensors, which has no
            order.
    """
    found: list[Tensor] = []
    _collect(output, "output", found, {})
    return found


def _collect(value: Any, path: str, found: list[Tensor], seen: dict[int, Any]) -> None:
    if value is None or isinstance(value, _ATOMS) or (id(value) in seen and not isinstance(value, Tensor)):
        return
    seen[id(value)] = value  # held, so that no other object gets its id
    if isinstance(value, Tensor):
        found.append(value)
    elif hasattr(value, "__array_interface__"):
        try:
            found.append(torch.as_tensor(value).clone())
        except TypeError:  # an array of objects
            _collect(value.tolist(), path, found, seen)
    elif isinstance(value, _STREAMS):
        raise OpaqueOutputError(
            f"The model returns a {type(value).__name__} ({path}), whose tensors cannot be looked at without using it up, so "
            "outputs could change unseen. Return a list or a tuple of them, such as by a wrapper around the model."
        )
    elif isinstance(value, Set):
        before = len(found)
        for part in value:
            _collect(part, f"{path}{{}}", found, seen)
        if len(found) > before + 1:
            raise OpaqueOutputError(
                f"The model returns a set of {len(found) - before} tensors ({path}), which has no order, so they cannot be "
                "compared with those of another pass. Return a list, a tuple or a dictionary of them."
            )
    elif not any(f"{kind.__module__}.{kind.__qualname__}" == _CACHE for kind in type(value).__mro__):
        for name, part in _parts(value):
            _collect(part, f"{path}{name}", found, seen)


def _parts(value: Any) -> Iterable[tuple[str, Any]]:
    """What an object holds, with words for where."""
    if isinstance(value, Mapping | Sequence):
        pairs = [*value.items()] if isinstance(value, Mapping) else [*enumerate(value)]
        inside = {id(part) for _, part in pairs}
        # a class derived from a list may hold more than its entries, or hold them once more under names
        more = [(name, part) for name, part in _attributes(value) if id(part) not in inside]
        return [*((f"[{key!r}]", part) for key, part in pairs), *more]
    if isinstance(value, FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if _is_filled(c)]
        held = [*cells, *(value.__defaults__ or ()), value.__kwdefaults__]
        return ((".__closure__", part) for part in held)
    if isinstance(value, MethodType):
        return [(".__self__", value.__self__)]
    if isinstance(value, partial):
        return [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    if isinstance(value, nn.Module):
        return [(f".{name}", part) for name, part in vars(value).items() if name not in _STRUCTURE]
    return _attributes(value)


def _attributes(value: Any) -> list[tuple[str, Any]]:
    names = [f.name for f in dataclasses.fields(value)] if dataclasses.is_dataclass(value) else []
    for kind in type(value).__mro__:
        slots = vars(kind).get("__slots__", ())
        for slot in [slots] if isinstance(slots, str) else slots:
            # slots of two underscores have the name of their class before them
            is_private = slot.startswith("__") and not slot.endswith("__")
            names.append(f"_{kind.__name__.lstrip('_')}{slot}" if is_private else slot)
    names += [*getattr(value, "__dict__", {})]
    held = [
        (name, getattr(value, name, None)) for name in dict.fromkeys(names) if name not in ("__dict__", "__weakref__")
    ]
    return [(f".{name}", part) for name, part in held]


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not cell
    except ValueError:  # a variable that the function encloses and that was never set
        return False
