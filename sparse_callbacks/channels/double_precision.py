"""Passes in which every floating-point number has double precision, whatever casts the model makes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

WIDE = {
    torch.float16: torch.float64,
    torch.bfloat16: torch.float64,
    torch.float32: torch.float64,
    torch.complex32: torch.complex128,
    torch.complex64: torch.complex128,
}
"""What takes the place of a type."""
_VIEWS = frozenset({"aten::view", "aten::view_copy"})


class Casts:
    """Whether anything was cast, or made of a shorter type, while it was asked for."""

    def __init__(self) -> None:
        self.seen = False


@contextmanager
def everything_in_double(casts: Casts | None = None) -> Iterator[None]:
    """Casts to shorter types, autocast's among them, and tensors that are made of such a type get float64 in their place.

    So rounding hides no error in a model that casts to half precision in its forward pass. What such a model computes up
    to rounding stays what it was, unless it reads the bits of its numbers; then it fails here.

    Args:
        casts: told of what was changed.
    """
    with made_in_double(), _Double(casts or Casts()):
        yield


@contextmanager
def made_in_double() -> Iterator[None]:
    """Tensors that are made without a word of their type are of float64."""
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(default)


class _Double(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Changes the types that operations are called with."""

    def __init__(self, casts: Casts) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._casts = casts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        changed = dict(kwargs or {})
        given = list(args)
        # what shares memory with its input, or is written to, must go on to do so
        shares = any(r.alias_info is not None for r in schema.returns)
        for number, argument in enumerate(schema.arguments):
            place: Any = number if number < len(given) else argument.name
            holder: Any = given if number < len(given) else changed
            if holder is changed and place not in changed:
                continue
            if argument.name == "dtype" and holder[place] in WIDE:
                if schema.name in _VIEWS:
                    raise TypeError(f"{schema.name} reads the bits of numbers, which are others in float64")
                holder[place], self._casts.seen = WIDE[holder[place]], True
            elif not shares and argument.alias_info is None:
                holder[place] = self._widened(holder[place])
        output = func(*given, **changed)
        # a tensor that was made out of Python's numbers, where no operation says of which type
        return self._widened(output) if schema.name in ("aten::lift_fresh", "aten::lift_fresh_copy") else output

    def _widened(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            if value.dtype not in WIDE:
                return value
            self._casts.seen = True
            return value.to(WIDE[value.dtype])
        return [self._widened(v) for v in value] if isinstance(value, list) else value
