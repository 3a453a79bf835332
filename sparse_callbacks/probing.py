"""Running a model once, to look at it: any kind of inputs and outputs, no traces left, and optional libraries."""

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.passes import undisturbed


def extra(module: str, name: str) -> Any:
    """Import an optional dependency.

    Raises:
        ImportError: it is not installed; says which extra brings it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.replace('_', '-')} is needed here and cannot be imported ({error}). Install it with "
            f"pip install 'sparse-callbacks[{name}]'."
        ) from error


def run(model: nn.Module, example_input: Any) -> Any:
    """``model(x)`` for a tensor, ``model(*x)`` for a tuple or list, ``model(**x)`` for a mapping."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(*example_input) if isinstance(example_input, tuple | list) else model(example_input)


def tensors_in(nest: Any) -> list[Tensor]:
    """Tensors in nested sequences and mappings, in order."""
    if isinstance(nest, Tensor):
        return [nest]
    parts = nest.values() if isinstance(nest, Mapping) else nest if isinstance(nest, tuple | list) else ()
    return [t for part in parts for t in tensors_in(part)]


def map_tensors(change: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """``nest`` with every tensor in its mappings, tuples and lists changed."""
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, Mapping):
        return {k: map_tensors(change, v) for k, v in nest.items()}
    return type(nest)(map_tensors(change, v) for v in nest) if type(nest) in (tuple, list) else nest


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, nothing compiled; afterwards modes and random generators are as before."""
    with undisturbed(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()
        yield


@contextmanager
def traceable(model: nn.Module) -> Iterator[None]:
    """As in :func:`quiet`, but with every floating-point parameter in autograd's graph; flags too are put back."""
    flags = {p: p.requires_grad for p in model.parameters()}
    with quiet(model):
        try:
            for p in flags:
                if p.is_floating_point():
                    p.requires_grad = True
            with torch.inference_mode(False), torch.enable_grad():
                yield
        finally:
            for p, flag in flags.items():
                p.requires_grad = flag
