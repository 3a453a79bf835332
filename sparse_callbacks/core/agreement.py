"""A cheap comparison of the networks of all ranks, which names the layer where they differ."""

import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from sparse_callbacks.core import distributed
from sparse_callbacks.core.host import TrainsInTurns
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.shards import WHOLE, layout_of
from sparse_callbacks.core.weights import SparseWeights

# Ranks with other hardware round otherwise, which drifts apart by a few of these in a long run; a step that one rank
# has taken alone moves weights by much more.
ROUNDING = 256
LARGEST_FACTOR = 65521  # a prime


def refuse_unequal_runs(method: Method, length: Callable[[], float]) -> None:
    """A run begins: refuse ranks that have other arguments, times of updates or numbers of steps.

    One collective operation of a few bytes.

    Args:
        method: the method of the run.
        length: gives the number of optimizer steps of the run; infinite where nobody knows it.

    Raises:
        ValueError: the ranks differ.
    """
    if not _holds_one_network(method):
        return
    name, calendar = type(method).__name__, method.calendar
    times = (0.0, 0.0, 0.0) if calendar is None else (calendar.every, calendar.start, calendar.stop)
    # without data, of which each rank may have its share, and objects that show their address in memory
    shown = sorted(
        item for item in method.arguments.items() if item[0] != "statistics_dataloader" and " at 0x" not in item[1]
    )
    arguments = float(zlib.crc32(repr(shown).encode()))
    mine = torch.tensor([arguments, length(), *times], dtype=torch.float64).nan_to_num(posinf=-1.0)
    least, most = (found.tolist() for found in distributed.extremes(mine.to(_device(method))))
    if least[0] != most[0]:
        raise ValueError(
            f"{name} has other arguments on other ranks, and one network has one mask. Give all ranks the same, the seed "
            "included: random masks are derived from it, and not from the rank."
        )
    if least[1:] != most[1:]:
        raise ValueError(
            f"the run has {least[1]:g} optimizer steps on one rank and {most[1]:g} on another: DistributedDataParallel waits "
            "for ever for the rank that is done, and updates of the masks would fall at other steps. Give all ranks equally "
            "many batches: a DistributedSampler, drop_last=True, or limit_train_batches=."
        )


def refuse_unequal_weights(method: Method, names: Iterable[str]) -> None:
    """Refuse to go on where a layer's weights or masks are not the same on every rank.

    Every rank must call it at the same optimizer step. One collective operation of 48 bytes a layer.

    Args:
        method: the method of the run.
        names: names of sparse parameters; those that lie in parts over the processes are left out.

    Raises:
        RuntimeError: the ranks differ.
    """
    if not _holds_one_network(method):
        return
    whole = [name for name in names if layout_of(method.params[name]) is WHOLE]
    if not whole:
        return
    # all layers in one tensor: one message, and one wait for the device
    device = _device(method)
    mine = torch.stack([_fingerprint(method.weights, name).to(device) for name in whole])
    extremes = [found.tolist() for found in distributed.extremes(mine)]
    for name, least, most in zip(whole, *extremes, strict=True):
        dtype = method.params[name].dtype
        allowed = min(ROUNDING * torch.finfo(dtype).eps, 0.05) * LARGEST_FACTOR * max(0.0, most[2])
        if what := "masks" if least[0] != most[0] else "weights" if most[1] - least[1] > allowed else "":
            raise RuntimeError(
                f"the {what} of {name} are not the same on every rank, and {type(method).__name__} has one network. "
                "DistributedDataParallel keeps ranks equal as long as every step takes gradients that it has reduced: look "
                "for steps after no_sync(), for weights that one rank alone loads or changes, for parameters that DDP "
                "ignores, and for optimizers whose settings differ. Replicas that are meant to differ, as in local SGD, "
                "cannot share masks."
            )


def _holds_one_network(method: Method) -> bool:
    """Several processes train the same network."""
    return distributed.world_size() > 1 and bool(method.params) and not isinstance(method, TrainsInTurns)


def _device(method: Method) -> torch.device:
    """The device that the backend of the process group can send from."""
    return next(iter(method.params.values())).device


@torch.no_grad()
def _fingerprint(weights: SparseWeights, name: str) -> Tensor:
    """Three float64 numbers of a layer: a checksum of its mask or places, a weighted sum of its values, and their norm."""
    values = weights.dense_values(name).detach()
    layer = weights.layers_stored.get(name)
    places = weights.held_masks[name] if layer is None else layer.keys()
    mask = _weighted_sum(places, torch.int64) % 2**52  # which a float64 holds exactly
    norm = torch.linalg.vector_norm(values, dtype=torch.float64)
    found = torch.stack([mask.to(norm), _weighted_sum(values, torch.float64), norm])
    # a comparison with NaN or of two infinities would find no difference
    return found.nan_to_num(nan=-1e300, posinf=1e300, neginf=-1e300)


def _weighted_sum(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Sum over elements, each times a factor for its row and another for its column: so it shows where values are.

    Of sums over rows and columns, which need no memory as large as the tensor.
    """
    rows = tensor.flatten(1) if tensor.ndim > 1 else tensor[:, None]
    parts = []
    for dim in (0, 1):
        sums = rows.sum(1 - dim, dtype=dtype)
        numbers = torch.arange(1, len(sums) + 1, device=sums.device)
        parts.append((sums * (numbers * 40503 % LARGEST_FACTOR)).sum())
    return parts[0] + parts[1]
