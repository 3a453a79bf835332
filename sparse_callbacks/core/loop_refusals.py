"""What cannot be a run of a hand-written loop."""

import math
from collections.abc import Mapping
from numbers import Integral
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.core.host import TrainsInTurns
from sparse_callbacks.core.local_parts import is_sharded
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.optimizer_life import RestartsOptimizers
from sparse_callbacks.core.wrappers import plain_model


def refuse_arguments(method: Any, model: Any, steps: Any, epoch: Any, forward: Any, clip: Any, on_restart: Any) -> None:
    """Refuse what cannot be a run, before anything is touched."""
    if not isinstance(method, Method):
        raise TypeError(f"method={method!r} is not a method. Give an instance, such as RigL(0.9).")
    if method.attachment.host is not None:
        raise ValueError(
            f"this {type(method).__name__} is in another run. Make a new one for every call to sparsify(), or close() the "
            "run that is over."
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"model={model!r} is not a torch module.")
    if any(map(is_sharded, model.parameters())):
        raise ValueError(
            "the model's parameters are sharded (DTensor). No hook tells a loop of your own when torch has reduced their "
            "gradients, so no step would be seen. Use a Trainer with ModelParallelStrategy, or DistributedDataParallel."
        )
    whole = isinstance(steps, Integral) and not isinstance(steps, bool)
    endless = isinstance(steps, float) and steps == math.inf
    if not (whole or endless) or steps < 1:
        raise ValueError(
            f"steps={steps!r} is not a number of optimizer steps. Give that of the whole run, or math.inf where nobody "
            "knows it."
        )
    if epoch is not None and (not isinstance(epoch, Integral) or isinstance(epoch, bool) or epoch < 1):
        raise ValueError(f"epoch={epoch!r} is not the number of optimizer steps in an epoch. Give 1 or more, or None.")
    for name, function in (("forward", forward), ("clip", clip), ("on_restart", on_restart)):
        if function is not None and not callable(function):
            raise TypeError(f"{name}={function!r} is not a function.")


def refuse_hostless(method: Method, on_restart: Any) -> None:
    """Refuse methods that need more of their host than this loop has."""
    name = type(method).__name__
    if isinstance(method, TrainsInTurns):
        raise ValueError(method.why_not_in_a_loop())
    if isinstance(method, RestartsOptimizers) and method.restarts and on_restart is None:
        raise ValueError(
            f"{name}({method.with_restarts}) starts the optimizers anew within the run, and the loop's learning rate schedule has "
            "to start with them. Give sparsify(..., on_restart=), a function that makes the schedule again (lambda: "
            f"None where there is none), or {method.without_restarts}."
        )


def averaged_model(averaged: Any, params: Mapping[str, Tensor]) -> nn.Module:
    """The module in an average of a model, which has the names of its parameters.

    Args:
        averaged: what the loop calls ``update_parameters`` of.
        params: the sparse parameters by name.

    Raises:
        TypeError: it is not such a module.
        ValueError: a sparse parameter is missing in it, or has another shape.
    """
    inner = getattr(averaged, "module", None)
    if not isinstance(inner, nn.Module) or not callable(getattr(averaged, "update_parameters", None)):
        raise TypeError(
            f"{type(averaged).__name__} takes no average by update_parameters() of a module in it. Give a "
            "torch.optim.swa_utils.AveragedModel of the model."
        )
    plain = plain_model(inner)
    found = dict(plain.named_parameters())
    if wrong := [n for n, p in params.items() if n not in found or found[n].shape != p.shape]:
        raise ValueError(
            f"{', '.join(wrong)} have no average of their shape in {type(averaged).__name__}. Give it the model that "
            "sparsify() was given."
        )
    return plain


def restarts_optimizers(method: Method) -> bool:
    """The method starts its optimizers anew within the run."""
    return isinstance(method, RestartsOptimizers) and method.restarts
