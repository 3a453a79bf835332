"""Running statistics of batch norms, estimated anew in a pass over data."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from sparse_callbacks.core import data_pass, distributed
from sparse_callbacks.core.argument_types import checked_after
from sparse_callbacks.core.host import Forward
from sparse_callbacks.core.state_layout import shown_short


def norms_with_statistics(model: nn.Module) -> list[_NormBase]:
    """Norms that keep running statistics."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_mean is not None]


def estimate_statistics(
    norms: Sequence[_NormBase], forward_passes: Callable[[Sequence[nn.Module]], Iterable[Any]]
) -> int:
    """Estimate the running statistics of norms as a cumulative mean over batches; what they had before is forgotten.

    Args:
        norms: the norms.
        forward_passes: given the norms that have to be in training mode, runs the network batch by batch as the result
            is iterated.

    Returns:
        The number of batches.
    """
    momenta, batches = [m.momentum for m in norms], 0
    for norm in norms:
        # the old statistics would stay in a running mean: they are those of other weights
        norm.reset_running_stats()
        norm.momentum = None  # a cumulative mean, batch by batch
    try:
        for _ in forward_passes(norms) if norms else ():
            batches += 1  # the forward passes are all that is wanted
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
    return batches


def renew_statistics(
    norms: Sequence[_NormBase],
    forward_passes: Callable[[Sequence[nn.Module]], Iterable[Any]],
    warn: Callable[[str], object],
    together: bool = True,
) -> None:
    """Estimate the running statistics of norms at the end of a run, where an error would lose it: without a batch of two
    samples they stay as they are, with a warning.

    Args:
        norms, forward_passes: as in :func:`estimate_statistics`.
        warn: told that they stay.
        together: whether each rank has passed over a share of the data, and all get the mean over the batches of all.
    """
    before = data_pass.buffers_of(norms)
    seen = estimate_statistics(norms, forward_passes)
    if together:
        (seen,) = distributed.sums_of([seen])
        share_statistics(norms)
    if norms and not seen:
        data_pass.put_back(before)
        warn(
            "the statistics of batch norms stay those of the weights that were trained, as no batch had two samples or more. Give "
            "such batches to recalibrate_batchnorm(module, batches)."
        )


@torch.no_grad()
def share_statistics(norms: Sequence[_NormBase]) -> None:
    """Let every rank have the mean over the batches of all ranks, each of which has passed over a share of the data."""
    if distributed.world_size() == 1:
        return
    for norm in norms:
        statistics = [t for t in (norm.running_mean, norm.running_var) if t is not None]
        seen = norm.num_batches_tracked
        assert seen is not None  # a norm with statistics counts
        weighted = [t * seen for t in statistics]
        distributed.total([*weighted, seen])
        for tensor, summed in zip(statistics, weighted, strict=True):
            tensor.copy_(summed / seen.clamp(min=1))


@checked_after  # where it fails the norms are as they were
def recalibrate_batchnorm(module: nn.Module, batches: Iterable[Any], *, forward: Forward | None = None) -> None:
    """Estimate the running statistics of all batch norms anew, as the mean over batches.

    For weights that no step has made: averages, networks that were merged, pruned or loaded from elsewhere. Each norm takes
    the plain mean of its batches' means and (unbiased) variances, each batch counting as much as any other; what it had
    before is forgotten. The norms alone are in training mode, so that dropout is off; no gradient is computed. Weights,
    other buffers, modes, momenta and the states of random generators are as before.

    Args:
        module: the network; its batch norms (of one to three dimensions, and instance norms that keep statistics) are
            changed in place.
        batches: the batches, such as a loader: of each the network gets the tensor, the first part of a tuple or list,
            or the entries of a mapping by name. A batch of one sample in which a norm finds no variance is left out, with a
            warning.
        forward: a function of the module and a batch that runs the network on it; None: the module is called as above.

    Raises:
        ValueError: the module has no such norm, there is no batch, or the network does not accept one. The norms are
            then as they were.

    Example:
        >>> import torch
        >>> from sparse_callbacks import recalibrate_batchnorm
        >>> net = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> recalibrate_batchnorm(net, [torch.tensor([[0.0], [2.0]]), torch.tensor([[4.0], [6.0]])])
        >>> net[0].running_mean.item()
        3.0
    """
    norms = norms_with_statistics(module)
    if not norms:
        raise ValueError(
            f"{type(module).__name__} has no batch norm with running statistics, so there is nothing to estimate. Leave the "
            "call out, or give the module that holds the norms."
        )
    if isinstance(batches, Tensor) or not isinstance(batches, Iterable):
        raise ValueError(
            f"batches={shown_short(batches)} is not a collection of batches. Give a loader, or a list: [batch]."
        )
    before = data_pass.buffers_of(norms)

    def passes(training: Sequence[nn.Module]) -> Iterable[Any]:
        return data_pass.outputs(module, lambda: (batches, None), forward=forward, train=training)

    try:
        seen = estimate_statistics(norms, passes)
        if not seen:
            raise ValueError(
                f"batches={shown_short(batches)} holds no batch of two samples or more, so nothing is known of the statistics. Give "
                "at least one batch of training data; an iterator can be used only once."
            )
    except BaseException:
        data_pass.put_back(before)
        raise
