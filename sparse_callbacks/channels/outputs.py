"""The tensors among the outputs of a model, in whatever containers and objects they lie."""

import dataclasses
import io
import logging
from collections.abc import AsyncIterator, Coroutine, Iterable, Iterator, Mapping, MappingView, Sequence, Set
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
_HELD = ("_parameters", "_buffers", "_modules")
_CACHE = "transformers.cache_utils.Cache"
"""Keys and values that the model alone reads again, in its next call: state, and no output."""


class OpaqueOutputError(ValueError):
    """Outputs that may hold tensors which nobody can look at."""


def output_tensors(output: Any, model: nn.Module | None = None) -> list[Tensor]:
    """All tensors in what a model returns, in an order that two passes share.

    They are looked for in mappings and their keys, sequences, dataclasses, futures that are done, modules, and in the attributes
    and slots of any other object, such as a ``torch.distributions.Distribution``, a ``SimpleNamespace``, and a function with
    what it has enclosed. Arrays of numpy count as tensors. Numbers do not, nor do the parameters and buffers of ``model`` in
    its own modules, nor a ``Cache`` of transformers, which the model itself reads in its next call.

    Args:
        output: what the model returns.
        model: the model; None: no module is its own.

    Raises:
        OpaqueOutputError: an iterator or coroutine, which looking would use up, a future that is not done, a set of several
            tensors, which has no order, or a sparse or nested tensor.
    """
    search = _Search(model)
    search.collect(output, "output")
    return search.found


class _Search:
    def __init__(self, model: nn.Module | None) -> None:
        self.found: list[Tensor] = []
        self._own = {id(module) for module in model.modules()} if model is not None else set[int]()
        self._seen: dict[int, Any] = {}

    def collect(self, value: Any, path: str) -> None:
        if value is None or isinstance(value, _ATOMS) or (id(value) in self._seen and not isinstance(value, Tensor)):
            return
        self._seen[id(value)] = value  # held, so that no other object gets its id
        if isinstance(value, Tensor):
            _refuse_layout(value, path)
            self.found.append(value)
        elif hasattr(value, "__array_interface__"):
            try:
                self.found.append(torch.as_tensor(value).clone())
            except TypeError:  # an array of objects
                self.collect(value.tolist(), path)
        elif isinstance(value, _STREAMS):
            raise OpaqueOutputError(
                f"The model returns a {type(value).__name__} ({path}), whose tensors cannot be looked at without using it up, "
                "so outputs could change unseen. Return a list or a tuple of them, such as by a wrapper around the model."
            )
        elif isinstance(value, torch._C.Future):
            self._collect_done(value, path)
        elif isinstance(value, Set) and not isinstance(value, MappingView):
            self._collect_set(value, path)
        elif not any(f"{kind.__module__}.{kind.__qualname__}" == _CACHE for kind in type(value).__mro__):
            for name, part in _parts(value, id(value) in self._own):
                self.collect(part, f"{path}{name}")

    def _collect_done(self, future: Any, path: str) -> None:
        if not future.done():
            raise OpaqueOutputError(
                f"The model returns a future ({path}) that is not done, so its tensors cannot be compared. Wait for it in the "
                "forward pass, or in a wrapper around the model, and return its value."
            )
        self.collect(future.value(), f"{path}.value()")

    def _collect_set(self, values: Set[Any], path: str) -> None:
        before = len(self.found)
        for part in values:
            self.collect(part, f"{path}{{}}")
        if (count := len(self.found) - before) > 1:
            raise OpaqueOutputError(
                f"The model returns a set of {count} tensors ({path}), which has no order, so they cannot be compared with "
                "those of another pass. Return a list, a tuple or a dictionary of them."
            )


def _refuse_layout(tensor: Tensor, path: str) -> None:
    if tensor.is_nested or tensor.layout != torch.strided:
        kind = "nested" if tensor.is_nested else f"sparse ({str(tensor.layout).removeprefix('torch.')})"
        dense = "a list of its parts" if tensor.is_nested else "its to_dense()"
        raise OpaqueOutputError(
            f"The model returns a {kind} tensor ({path}), whose entries cannot be compared one by one with those of another "
            f"pass. Return {dense} instead, such as by a wrapper around the model."
        )


def _parts(value: Any, is_own: bool) -> Iterable[tuple[str, Any]]:
    """What an object holds, with words for where; of a module of the model itself only its plain attributes."""
    if isinstance(value, MappingView):
        return [(f"[{place}]", part) for place, part in enumerate(value)]  # type: ignore[arg-type, var-annotated]
    if isinstance(value, Mapping | Sequence):
        pairs = [*value.items()] if isinstance(value, Mapping) else [*enumerate(value)]
        keys = [key for key, _ in pairs if not isinstance(key, _ATOMS)]
        pairs = [(place if isinstance(key, Tensor) else key, part) for place, (key, part) in enumerate(pairs)]
        inside = {id(part) for _, part in pairs}
        # a class derived from a list may hold more than its entries, or hold them once more under names
        more = [(name, part) for name, part in _attributes(value) if id(part) not in inside]
        return [*((" key", key) for key in keys), *((f"[{key!r}]", part) for key, part in pairs), *more]
    if isinstance(value, FunctionType):
        cells = [c.cell_contents for c in value.__closure__ or () if _is_filled(c)]
        held = [*cells, *(value.__defaults__ or ()), value.__kwdefaults__]
        return ((".__closure__", part) for part in held)
    if isinstance(value, MethodType):
        return [(".__self__", value.__self__)]
    if isinstance(value, partial):
        return [(".func", value.func), (".args", value.args), (".keywords", value.keywords)]
    if isinstance(value, nn.Module):
        plain = [(f".{name}", part) for name, part in vars(value).items() if name not in _STRUCTURE]
        return plain if is_own else [*plain, *((f".{name}", vars(value)[name]) for name in _HELD)]
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
