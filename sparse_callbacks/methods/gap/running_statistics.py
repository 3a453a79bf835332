"""Running statistics of norms, estimated anew in a pass over data."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


def norms_with_statistics(model: nn.Module) -> list[_NormBase]:
    """Norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


def estimate_statistics(model: nn.Module, forward_passes: Callable[[Sequence[nn.Module]], Iterable[Any]]) -> None:
    """Estimate the running statistics of all norms in training mode, as those of a combined network belong to none.

    Args:
        model: the network.
        forward_passes: given the norms that have to be in training mode, runs the network batch by batch as the result
            is iterated.
    """
    norms = [m for m in norms_with_statistics(model) if m.training]  # those in eval mode are frozen
    momenta = [m.momentum for m in norms]
    for norm in norms:
        # the old statistics would stay in a running mean: they are those of the workers' networks
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean, batch by batch
    try:
        for _ in forward_passes(norms) if norms else ():
            pass  # the forward passes are all that is wanted
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
