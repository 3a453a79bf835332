"""One module takes the place of another, with its hooks and what users have set on it."""

from collections.abc import Iterator
from functools import cache
from typing import Any
from weakref import ReferenceType, ref

import torch
from torch import nn

from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

# Modules of torch that read the weights of layers inside them in eval mode, for a kernel that computes the whole block, and
# the attribute by which they can be told not to. What they then run calls the layers.
_FAST_PATHS: tuple[tuple[type[nn.Module], str], ...] = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu"),
    (nn.TransformerEncoder, "use_nested_tensor"),
)
_FAST_PATH_KEPT = "fast_path_before_exchange"


def holders_of(model: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """By the ``id`` of each module inside ``model``, every module that holds it and the name that it has there."""
    found: dict[int, list[tuple[nn.Module, str]]] = {}
    for parent in model.modules():
        for key, child in parent._modules.items():
            if child is not None:
                found.setdefault(id(child), []).append((parent, key))
    return found


def put_in(holders: list[tuple[nn.Module, str]], module: nn.Module) -> None:
    """Let ``holders`` hold ``module`` under the names that they have for the present one, in its place in their order."""
    for parent, key in holders:
        parent._modules[key] = module


def take_over(old: nn.Module, new: nn.Module) -> None:
    """Give ``new`` what ``old`` has beside its own weight: further parameters, buffers, hooks, flags and users' attributes.

    Their hooks are the same dictionaries from here on, so that the handles that users keep remove them from both.

    Args:
        old: an ``nn.Linear``, or a `SparseLinear`.
        new: the module of the other kind that takes its place; it keeps its own weight.
    """
    # the dictionaries themselves and no copies: handles of hooks look for their entry in them
    attributes = vars(old).keys() - names_of_own(nn.Linear) - names_of_own(SparseLinear)
    vars(new).update({key: vars(old)[key] for key in attributes})
    weight = new._parameters["weight"]
    # in the order of the old module, in which optimizers number the Parameters of a checkpoint
    kept = {key: weight if key == "weight" else parameter for key, parameter in old._parameters.items()}
    new._parameters.clear()
    new._parameters.update(kept)
    _point_hooks(old, new)


def _point_hooks(old: nn.Module, new: nn.Module) -> None:
    """Some hooks are called with the module that they were registered on, which torch refers to weakly in them."""
    for value in vars(new).values():
        for hook in value.values() if isinstance(value, dict) else ():
            registered = getattr(hook, "module", None)
            if isinstance(registered, ReferenceType) and registered() is old:
                hook.module = ref(new)


@cache
def names_of_own(kind: type) -> frozenset[str]:
    """Names of the attributes in which modules of a kind hold what they are: not hooks, flags, or users' attributes.

    Args:
        kind: ``nn.Linear`` or `SparseLinear`.
    """
    return frozenset(vars(_example(kind)).keys() - vars(nn.Module()).keys() | {"_parameters"})


def names_added(module: nn.Module) -> Iterator[str]:
    """Names of the attributes that somebody has set on an ``nn.Linear`` beyond those that it is made with."""
    usual = vars(_example(nn.Linear)).keys()
    return (key for key, value in vars(module).items() if key not in usual and value is not None)


@cache
def _example(kind: type) -> nn.Module:
    linear = nn.Linear(1, 1, device="meta")
    return (
        linear
        if kind is nn.Linear
        else SparseLinear.from_dense(linear, torch.ones(1, 1, dtype=torch.bool, device="cpu"))
    )


def names_of_sparse(name: str) -> bool:
    """Whether a `SparseLinear` has an attribute of that name, which one of a user's would hide."""
    return name in vars(_example(SparseLinear)) or hasattr(SparseLinear, name)


def leave_fast_paths(model: nn.Module) -> None:
    """Let blocks that would read the weights of exchanged layers inside them call these layers instead."""
    for module, attribute in _blocks(model):
        value: Any = getattr(module, attribute, None)
        if value and any(isinstance(m, SparseLinear) for m in module.modules()):
            vars(module).setdefault(_FAST_PATH_KEPT, {})[attribute] = value
            setattr(module, attribute, type(value)(0))


def enter_fast_paths(model: nn.Module) -> None:
    """Undo `leave_fast_paths` for blocks in which no layer is exchanged any more."""
    for module, attribute in _blocks(model):
        kept = vars(module).get(_FAST_PATH_KEPT, {})
        if attribute in kept and not any(isinstance(m, SparseLinear) for m in module.modules()):
            setattr(module, attribute, kept[attribute])
            del vars(module)[_FAST_PATH_KEPT]


def _blocks(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in model.modules():
        for kind, attribute in _FAST_PATHS:
            if isinstance(module, kind):
                yield module, attribute
