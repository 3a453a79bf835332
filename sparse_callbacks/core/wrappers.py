"""The model and the optimizer under the wrappers of Fabric, DistributedDataParallel and torch.compile."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparse_callbacks.core.optimizer_modes import refuse_modes

# By the name of the class, because Fabric exists twice (in lightning_fabric and in lightning.fabric) and need not be
# installed; a user's own module may well have a child that is called "module", and is not a wrapper.
_HOLDS_MODEL = {
    "_FabricModule": "module",
    "DistributedDataParallel": "module",
    "DataParallel": "module",
    "OptimizedModule": "_orig_mod",
}
_HOLDS_OPTIMIZER = ("_FabricOptimizer", "AcceleratedOptimizer", "LightningOptimizer")
_SHARDED = ("FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine")


def plain_model(model: nn.Module) -> nn.Module:
    """The user's own module, whose parameter names a checkpoint has.

    Raises:
        ValueError: a wrapper shards the parameters.
    """
    while True:
        names = [c.__name__ for c in type(model).__mro__]
        if sharding := next((n for n in names if n in _SHARDED), None):
            raise ValueError(
                f"{sharding} shards parameters, and masks are made for whole ones. Use DistributedDataParallel or one "
                "device."
            )
        held = next((_HOLDS_MODEL[n] for n in names if n in _HOLDS_MODEL), None)
        if held is None:
            return model
        model = getattr(model, held)


def set_up_by(model: nn.Module, optimizers: Iterable[Any]) -> str:
    """The class of what has been put around a model, or one of its optimizers; empty where nothing has. Under
    ``torch.compile`` alone layers can still be exchanged."""
    inner: Any = model
    while (kind := _around(inner, tuple(_HOLDS_MODEL))) == "OptimizedModule":
        inner = inner._orig_mod
    found = (_around(one, _HOLDS_OPTIMIZER) for one in optimizers)
    return kind or next(filter(None, found), "")


def _around(one: object, kinds: tuple[str, ...]) -> str:
    return next((c.__name__ for c in type(one).__mro__ if c.__name__ in kinds), "")


def plain_optimizer(optimizer: Any) -> Optimizer:
    """The torch optimizer whose hooks fire at every step.

    Raises:
        TypeError: neither a torch optimizer nor a wrapper that has one as ``optimizer``.
        ValueError: it switches between training and evaluation, and is not a torch optimizer.
    """
    found = optimizer
    while isinstance(inner := getattr(found, "optimizer", None), Optimizer):
        # an optimizer that holds another one, as Lookahead does, goes on to write after the step within
        if isinstance(found, Optimizer) and not any(c.__name__ in _HOLDS_OPTIMIZER for c in type(found).__mro__):
            break
        found = inner
    if not isinstance(found, Optimizer):
        refuse_modes([found])
        raise TypeError(
            f"{type(optimizer).__name__} is not a torch optimizer. Give the optimizer, or a list of optimizers, that "
            "the loop steps."
        )
    return found
