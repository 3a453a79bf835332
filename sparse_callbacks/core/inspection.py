"""Runs a model once in order to look at it, on any kind of inputs, and leaves it as it was."""

import copy
import dataclasses
import importlib
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.undisturbed import undisturbed

BOUND_BY_LIGHTNING = ("forward", "training_step", "validation_step", "test_step", "predict_step", "_compiler_ctx")
"""Attributes that Lightning stores in a module when it compiles it; a copy's would call the original module."""


# exactly these types: a class of somebody else may hold more than what is put into it
_CONTAINERS = frozenset({dict, OrderedDict, list, set})


def extra(module: str, name: str) -> Any:
    """Import an optional dependency.

    Args:
        module: the module to import.
        name: the extra of this package that installs it.

    Raises:
        ImportError: it is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module.replace('_', '-')} is needed here and cannot be imported ({error}). Install it with pip install "
            f"'sparse-callbacks[{name}]'."
        ) from error


def run(model: nn.Module, example_input: Any) -> Any:
    """``model(x)`` for a tensor, ``model(*x)`` for a tuple or list, ``model(**x)`` for a mapping."""
    if isinstance(example_input, Mapping):
        return model(**example_input)
    return model(*example_input) if isinstance(example_input, tuple | list) else model(example_input)


def tensors_in(nest: Any) -> list[Tensor]:
    """All tensors in nested tuples, lists, mappings and dataclasses, in order."""
    if isinstance(nest, Tensor):
        return [nest]
    parts: Iterable[Any] = ()
    if isinstance(nest, Mapping):
        parts = nest.values()
    elif isinstance(nest, tuple | list):
        parts = nest
    elif _is_record(nest):
        parts = (getattr(nest, f.name) for f in dataclasses.fields(nest))
    return [t for part in parts for t in tensors_in(part)]


def map_tensors(change: Callable[[Tensor], Tensor], nest: Any) -> Any:
    """A copy of ``nest`` with ``change`` applied to every tensor in its mappings, tuples, lists and dataclasses."""
    if isinstance(nest, Tensor):
        return change(nest)
    if isinstance(nest, Mapping):
        return {k: map_tensors(change, v) for k, v in nest.items()}
    if _is_record(nest):
        # the fields that __init__ does not take are made anew by the class
        parts = {f.name: map_tensors(change, getattr(nest, f.name)) for f in dataclasses.fields(nest) if f.init}
        return dataclasses.replace(nest, **parts)
    # exactly these types: a class derived from tuple, such as a named one, may not take a single argument
    return type(nest)(map_tensors(change, v) for v in nest) if type(nest) in (tuple, list) else nest


def _is_record(nest: Any) -> bool:
    """Whether ``nest`` is an instance of a dataclass."""
    return dataclasses.is_dataclass(nest) and not isinstance(nest, type)


def copied(model: nn.Module, known: Mapping[int, Any] = MappingProxyType({})) -> nn.Module:
    """A deep copy, with ordinary tensors also when it is made in inference mode.

    Args:
        model: the model.
        known: what the copy has in the place of objects, by their id, that are not to be copied.

    Raises:
        ValueError: the model cannot be copied; the message says what to do about it.
    """
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            "This is a ScriptModule, whose layers cannot be replaced. Give the module that it was scripted from."
        )
    try:
        with torch.inference_mode(False):
            made = copy.deepcopy(model, {**_empty_containers(model), **known})
    except Exception as error:  # deepcopy runs the code of the model's own classes, which may raise anything
        # these keep a weight computed from others, and a tensor with a graph cannot be copied
        names = [n for n, _ in model.named_parameters() if n.endswith(("_orig", "_g"))]
        advice = "Detach, or delete, the tensors that its forward pass or its hooks store in attributes."
        if names:
            source = f"{names[0]} is of torch.nn.utils.prune or weight_norm"
            advice = f"{source}: call prune.remove or remove_weight_norm on its module first."
        raise ValueError(f"{type(model).__name__} cannot be copied ({with_class(error)}). {advice}") from error
    # a copy of a compiled LightningModule would run the original by these, so it goes back to its class's own methods
    if "_compiler_ctx" in vars(made):
        for name in BOUND_BY_LIGHTNING:
            vars(made).pop(name, None)
    return made


def _empty_containers(model: nn.Module) -> dict[int, Any]:
    """New ones for the empty containers that modules hold, by the id of the old.

    Most of what a module holds are such, as for its hooks, and ``copy.deepcopy`` takes long over each that it does not know.
    """
    values = (v for m in model.modules() for v in vars(m).values())
    return {id(v): type(v)() for v in values if type(v) in _CONTAINERS and not v}


def copied_around_parameters(model: nn.Module) -> nn.Module:
    """A deep copy of all but the parameters, which both have: fast, for models whose forward pass does not write to them.

    Raises:
        ValueError: see :func:`copied`.
    """
    return copied(model, {id(p): p for p in model.parameters()})


def is_compiled(model: nn.Module) -> bool:
    """Whether the model, or a module of it, is known to run compiled: by ``module.compile()``, or under a LightningModule that
    is. torch would compile it once with hooks and once without."""
    # the second one is where Lightning notes that it was compiled
    return any(vars(m).get("_compiled_call_impl") or "_compiler_ctx" in vars(m) for m in model.modules())


@contextmanager
def quiet(model: nn.Module) -> Iterator[None]:
    """Eval mode, no gradients, nothing compiled; afterwards everything is as before that
    :func:`~sparse_callbacks.core.undisturbed.undisturbed` puts back."""
    # eager: hooks must run in each pass, and a single pass is not worth a compilation
    with undisturbed(model), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        model.eval()
        yield


@contextmanager
def attention_in_steps() -> Iterator[None]:
    """Attention and transformer layers run as several operations.

    In eval mode torch runs them as one, of which neither its counter of FLOPs nor a trace can tell anything.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


@contextmanager
def training(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Train mode for these modules alone; modules inside them keep their modes."""
    modes = [(m, m.training) for m in modules]
    try:
        for module, _ in modes:
            module.training = True  # module.train() would also switch the modules inside
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def training_branches(model: nn.Module, example_input: Any, called: Collection[nn.Module] | None = None) -> list[str]:
    """Names of the modules that must be in train mode for layers to run that never run in eval mode.

    Auxiliary heads are such layers. Only modules that hold them are named, so norms and dropouts stay in eval mode.
    Empty where there are no such layers, or where the pass in train mode fails.

    Args:
        model: the model, in eval mode; it runs up to twice.
        example_input: see :func:`run`.
        called: the layers that run in eval mode, from :func:`calls_noted`; None: a pass finds them.
    """
    if called is None:
        with calls_noted(model) as called:
            run(model, example_input)
    idle = set(_layers(model)) - set(called)
    if not idle:
        return []
    holders = {n: m for n, m in model.named_modules() if not idle.isdisjoint(m.modules()) and m not in idle}
    try:
        # all of them at first: which of their forwards looks at the mode is not known
        with training(holders.values()), calls_noted(model) as woken:
            run(model, example_input)
    except Exception:  # whatever a forward pass does in train mode that this input is too small for
        return []
    return [n for n, m in holders.items() if not (idle & woken).isdisjoint(m.modules())]


@contextmanager
def calls_noted(model: nn.Module) -> Iterator[set[nn.Module]]:
    """Collect the convolutions and linear layers of ``model`` that run meanwhile."""
    found: set[nn.Module] = set()
    with ExitStack() as hooks:
        for layer in _layers(model):
            hooks.enter_context(layer.register_forward_pre_hook(lambda m, _: found.add(m)))
        yield found


def _layers(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.Linear | SparseLinear | _ConvNd)]
