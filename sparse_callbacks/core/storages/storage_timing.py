"""What a training step of a linear layer costs under each storage, and which is chosen by it."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import cache, partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.clock import milliseconds
from sparse_callbacks.core.error_text import with_class
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.sparse_layers.live_places import RowPlaces
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.undisturbed import undisturbed
from sparse_callbacks.core.weights import SparseWeights

READINGS = 5
MOST_ROWS = 1024  # of a batch that is timed: the times of larger ones grow with it, for each storage alike
MARGIN = 0.9  # of the masked time, which another storage must not exceed: noise alone exchanges no layer
CLEAR = 2.0  # a ratio of two times that no further reading would turn round
PATIENCE = 2.0  # seconds after which three readings are enough
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Measure = Callable[..., list[float]]
"""A function that is called as :func:`~sparse_callbacks.core.clock.milliseconds`."""


def times_of(
    shape: tuple[int, int],
    rows: int,
    density: float,
    dtype: torch.dtype,
    measure: Measure = milliseconds,
) -> dict[str, float]:
    """Milliseconds that one training step of a linear layer takes on the CPU, by storage.

    A step is a forward pass, the gradients of weights, bias and input, and a step of SGD with momentum; of masked
    storage the masking of gradients and weights too. Inputs and gradients lie in memory as neighbours of the same storage
    give them. Batches above 1024 rows are timed with 1024. Steps take turns five times, and the medians count; three
    times where that took two seconds, and once where one storage is more than twice as fast as the others. Each question
    is measured once in a process, and nothing is drawn from the global random generators.

    Args:
        shape: outputs and inputs of the layer.
        rows: rows of its flattened input.
        density: the fraction of its weights that is live.
        dtype: the type of its weights.
        measure: what times the steps.

    Returns:
        The times of "masked" and "sparse". "grouped" is another pattern, which is never chosen for a user.
    """
    units = max(1, round(density * shape[1]))
    return dict(_measured(shape, min(rows, MOST_ROWS), units, dtype, torch.get_num_threads(), measure))


def faster(times: Mapping[str, float]) -> str:
    """The storage that "auto" takes: "sparse" where it is faster than "masked" by a tenth at least."""
    return "sparse" if times["sparse"] <= MARGIN * times["masked"] else "masked"


def times_text(times: Mapping[str, float], storage: str) -> str:
    """The time of the chosen storage and those of the others, as in "4.1 ms, masked 6.9".

    Args:
        times: milliseconds by storage.
        storage: the one that was chosen.
    """
    others = [f"{name} {times[name]:.3g}" for name in times if name != storage]
    return ", ".join([f"{times[storage]:.3g} ms", *others])


def rows_of_layers(model: nn.Module, call: Callable[[], Any]) -> dict[str, int]:
    """Rows of the flattened input that each linear layer sees in one forward pass.

    The pass runs in train mode, as layers may run only there, with norms in eval mode; where it fails, in eval mode.
    It leaves no trace: random generators, flags, buffers and hooks are as before.

    Args:
        model: the model.
        call: runs the pass.

    Returns:
        The rows by the name of the layer, the sum over its calls; layers that the pass did not call are missing.

    Raises:
        ValueError: the pass fails.
    """
    try:
        return _rows_seen(model, call, train=True)
    except Exception:  # whatever a forward pass does in train mode that this input is too small for
        pass
    try:
        return _rows_seen(model, call, train=False)
    except Exception as error:  # whatever a forward pass raises on inputs that it is not made for
        raise ValueError(
            f"the pass that counts the rows of each layer failed ({with_class(error)}). Give rows=, their number."
        ) from error


def _rows_seen(model: nn.Module, call: Callable[[], Any], train: bool) -> dict[str, int]:
    """Rows by layer of one pass in train or eval mode."""
    rows: dict[str, int] = {}

    def count(name: str, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        (given,) = (*args, *kwargs.values())  # a linear layer has one argument
        rows[name] = rows.get(name, 0) + given[..., 0].numel()

    # eager: hooks must run, and a single pass is not worth a compilation
    with undisturbed(model), torch.no_grad(), torch.compiler.set_stance("force_eager"), ExitStack() as hooks:
        for name, module in model.named_modules():
            module.training = train and not isinstance(module, BATCH_NORMS)  # which refuse a batch of one
            if isinstance(module, nn.Linear | SparseLinear):
                hooks.enter_context(module.register_forward_pre_hook(partial(count, name), with_kwargs=True))
        call()
    return rows


# ---------------------------------------------------------------------- the steps that are timed


@cache
def _measured(
    shape: tuple[int, int],
    rows: int,
    units: int,
    dtype: torch.dtype,
    threads: int,  # part of the question: products share their work between threads in different ways
    measure: Measure,
) -> Mapping[str, float]:
    # whoever asks may be in another mode, or have another default device
    with torch.device("cpu"), torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        source = torch.Generator().manual_seed(0)
        layers: dict[str, nn.Linear | SparseLinear] = {
            "masked": _masked(shape, dtype, source),
            "sparse": _sparse(shape, units, dtype, source),
        }
        steps = [_step_of(layer, rows, source) for layer in layers.values()]
        times = measure(steps, READINGS, patience=PATIENCE, settled=are_clear, cpu_time=threads == 1)
    return dict(zip(layers, times, strict=True))


def are_clear(medians: Sequence[float]) -> bool:
    """Whether all of them are so far apart that more readings would change nothing."""
    return all(larger > CLEAR * smaller for smaller, larger in pairwise(sorted(medians)))


def _masked(shape: tuple[int, int], dtype: torch.dtype, source: torch.Generator) -> nn.Linear:
    """A dense layer, which takes the same time whatever its mask is."""
    layer = nn.Linear(shape[1], shape[0], device="meta")
    layer.weight = nn.Parameter(torch.empty(shape, dtype=dtype).uniform_(-1, 1, generator=source))
    layer.bias = nn.Parameter(torch.zeros(shape[0], dtype=dtype))
    return layer


def _sparse(shape: tuple[int, int], units: int, dtype: torch.dtype, source: torch.Generator) -> SparseLinear:
    """A layer with ``units`` live inputs a row on average, at random distances from each other."""
    # no sort, which for a large layer would take longer than its steps
    distances = torch.randint(1, max(2, round(2 * shape[1] / units)), (shape[0] * units,), generator=source)
    keys = distances.cumsum(0) - 1
    places = RowPlaces(*shape, keys[keys < shape[0] * shape[1]])
    values = torch.empty(places.values_shape, dtype=dtype).uniform_(-1, 1, generator=source)
    return SparseLinear(places, values, torch.zeros(shape[0], dtype=dtype))


def _step_of(layer: nn.Linear | SparseLinear, rows: int, source: torch.Generator) -> Callable[[], None]:
    """A training step of the layer alone; gradients and weights of a dense one are masked in it.

    Args:
        layer: the layer.
        rows: rows of its batch.
        source: the generator of batch, gradients and mask.
    """
    batch, dy = _batch_of(layer, rows, source)
    optimizer = torch.optim.SGD(layer.parameters(), lr=1e-6, momentum=0.9)
    weights = _weights_of(layer, source) if isinstance(layer, nn.Linear) else None

    def step() -> None:
        layer(batch).backward(dy)
        if weights is not None:
            weights.mask_gradient("weight")
        optimizer.step()
        if weights is not None:
            weights.write_masked(["weight"])
        optimizer.zero_grad()
        batch.grad = None

    return step


def _batch_of(layer: nn.Linear | SparseLinear, rows: int, source: torch.Generator) -> tuple[Tensor, Tensor]:
    """A batch for the layer, and the gradient of its outputs."""
    dtype = next(layer.parameters()).dtype
    batch = torch.empty(rows, layer.in_features, dtype=dtype).uniform_(-1, 1, generator=source)
    outputs = layer(batch).detach()
    if outputs.stride(0) == 1:  # feature-major, as are the outputs of its neighbours and the gradients that they give
        batch = batch.t().contiguous().t()
    return batch.requires_grad_(), torch.empty_like(outputs).uniform_(-1, 1, generator=source)


def _weights_of(layer: nn.Linear, source: torch.Generator) -> SparseWeights:
    """What masks the weight of a dense layer in training."""
    weight = layer.get_parameter("weight")
    weights = SparseWeights({"weight": weight}, {"weight": Entry("weight", weight.numel(), tuple(weight.shape))}, {})
    # not given to the constructor, which waits for the other ranks
    weights.set_mask("weight", torch.randint(2, weight.shape, dtype=torch.int8, generator=source) > 0)
    return weights
