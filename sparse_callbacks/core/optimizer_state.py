"""The tensors that an optimizer keeps, wherever it keeps them."""

from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks.core.local_parts import local, whole_of

Path = tuple[Any, ...]
"""Where a tensor is in the state of a parameter: which optimizer, and the keys down to the tensor."""

_STACKED = 4  # state tensors that one tensor may hold
_DEEPEST = 4  # containers within containers that are looked into


def members(optimizer: Optimizer) -> list[tuple[str, Optimizer]]:
    """``optimizer`` and the optimizers that it holds, however deep, each with the attributes that lead to it."""
    found: list[tuple[str, Optimizer]] = [("", optimizer)]
    for where, member in found:  # the list grows meanwhile
        for name, value in vars(member).items():
            held = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else [value]
            for index, inner in enumerate(held):
                if isinstance(inner, Optimizer) and all(inner is not known for _, known in found):
                    found.append((f"{where}{name}.{index}.", inner))
    return found


def state_tensors(optimizer: Optimizer, parameter: Tensor) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor that ``optimizer`` keeps for ``parameter``, also within containers and in optimizers that it
    holds; of sharded ones this process's part."""
    for where, member in members(optimizer):
        for path, tensor in tensors_within(member.state.get(whole_of(parameter), {}), (where,)):
            yield path, local(tensor)


def tensors_within(value: Any, path: Path) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor in ``value`` and within containers and plain objects that it holds, each with ``path`` and the keys
    that lead to it."""
    if isinstance(value, Tensor):
        yield path, value
    elif len(path) <= _DEEPEST and not isinstance(value, type | nn.Module | Optimizer):
        if isinstance(value, Mapping):
            items: Any = list(value.items())
        elif isinstance(value, list | tuple | deque):
            items = enumerate(value)
        else:
            items = getattr(value, "__dict__", {}).items()  # an object of the optimizer's own
        for key, inner in items:
            yield from tensors_within(inner, (*path, key))


def name_of(path: Path) -> str:
    """The name of a state tensor, as an error shows it."""
    return ".".join(str(key) for key in path[1:])


def by_weight(path: Path, tensor: Tensor, parameter: Tensor) -> list[tuple[Path, Tensor]]:
    """The parts of a state tensor that have an element for each weight, in the parameter's shape; none where it is of
    another kind."""
    shape, whole = parameter.shape, tensor.shape
    if whole == shape:
        return [(path, tensor)]
    if is_coded(tensor) or len(shape) < 2:
        return []
    if whole == (parameter.numel(),) and tensor.is_contiguous():
        return [(path, tensor.view(shape))]
    # several of one kind in one tensor, such as a fast and a slow mean
    if whole[1:] == shape and whole[0] <= _STACKED:
        return [((*path, i), part) for i, part in enumerate(tensor.unbind(0))]
    if whole[:-1] == shape and whole[-1] <= _STACKED:
        return [((*path, i), part) for i, part in enumerate(tensor.unbind(-1))]
    return []


def is_coded(tensor: Tensor) -> bool:
    """It is of a tensor class of its own."""
    return type(tensor) not in (Tensor, nn.Parameter)


def decoded(tensor: Tensor) -> Tensor:
    """The values of a tensor, also of one that :func:`is_coded` and can be decoded."""
    if not is_coded(tensor):
        return tensor.detach()
    decode: Any = getattr(tensor, "dequantize", None)
    if decode is None:
        raise TypeError(f"{type(tensor).__name__} has no dequantize(), by which its values could be read")
    values: Tensor = decode()
    return values.float()
