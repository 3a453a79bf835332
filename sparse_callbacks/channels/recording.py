"""Forward passes of which every aten operation is recorded, and in which module it runs."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Calls ``record(operation, args, kwargs, output)`` after each operation."""

    def __init__(self, record: Callable[..., None]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._record = record

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        self._record(func, args, kwargs, output)
        return output


GIVES_VALUES = frozenset(["tolist", "numpy", "__array__", "__dlpack__", "__cuda_array_interface__", "__deepcopy__"])
"""Methods and properties of tensors by which numbers leave them without any aten operation."""
TAKES_NUMBERS = GIVES_VALUES | {
    *("storage", "_typed_storage", "untyped_storage", "data_ptr", "const_data_ptr", "mutable_data_ptr")
}
"""These, and those that give the memory or its address, through which code may read and write."""


class NumbersTaken(TorchFunctionMode):
    """Calls ``taken(tensors, name)`` before a tensor gives its numbers away without any aten operation.

    Those are :data:`TAKES_NUMBERS`. ``torch.utils.dlpack.to_dlpack`` is not seen: torch tells no mode of it.
    """

    def __init__(self, taken: Callable[[list[Tensor], str], None]) -> None:
        super().__init__()
        self._taken = taken

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # of a property, which alone knows its name
            name = getattr(getattr(getattr(func, "__self__", None), "fget", None), "__name__", "")
        if name in TAKES_NUMBERS and args and isinstance(args[0], Tensor):
            self._taken([args[0]], name)
        return func(*args, **(kwargs or {}))


def operation_name(operation: Any) -> str:
    """Name of an operation without overload and trailing underscore, such as ``"aten.add"``."""
    return str(operation._schema.name).replace("::", ".").rstrip("_")


def named_arguments(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Every argument of a call by its name, with defaults filled in."""
    named = {a.name: a.default_value for a in operation._schema.arguments if a.has_default_value()}
    named |= {a.name: value for a, value in zip(operation._schema.arguments, args, strict=False)}
    return named | dict(kwargs)


@contextmanager
def told_of_modules(enter: Callable[[nn.Module], None], leave: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Call ``enter(module)`` before each module runs, and ``leave(module, output)`` after it."""
    before = register_module_forward_pre_hook(lambda module, _: enter(module))
    after = register_module_forward_hook(lambda module, _, output: leave(module, output), always_call=True)
    try:
        yield
    finally:
        before.remove()
        after.remove()
