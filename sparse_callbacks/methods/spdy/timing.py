"""Measures the times of a model: a training step of each layer alone, at each level of sparsity."""

import copy
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from sparse_callbacks.channels.latency.table import environment
from sparse_callbacks.core.clock import milliseconds
from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.core.selection import Entry, select
from sparse_callbacks.core.storages.exchange import to_dense
from sparse_callbacks.core.storages.storage_choice import linear_layers, why_not_exchanged
from sparse_callbacks.core.storages.storage_timing import MOST_ROWS, Measure, times_of
from sparse_callbacks.methods.spdy.levels import LEVELS, LayerUse, watch_uses
from sparse_callbacks.methods.spdy.time_table import TimeTable


# random inputs and fresh layers leave the user's generator as it is
@torch.random.fork_rng(devices=[])
def measured_times(
    model: nn.Module,
    name: str,
    batch: int,
    size: Sequence[int],
    *,
    repeats: int = 5,
    measure: Measure = milliseconds,
    report: Callable[[str], object] = lambda _: None,
) -> TimeTable:
    """The table of times of ``model``, which is left as it is.

    A layer that :class:`~sparse_callbacks.SparseLinear` can hold has the time of a training step with so many live weights
    (forward, gradients of weights, bias and input, SGD with momentum); dense, that of an ``nn.Linear`` under a mask. Every
    other layer has one time at all levels, that of its dense step. Layers that a forward pass does not call have none, and what
    is between the layers is not measured.

    Args:
        model: the model; a copy is measured on the CPU in float32.
        name: name of the model, which the table states.
        batch: number of samples in a batch.
        size: size of one sample, without the batch. A batch is one tensor of standard normal numbers.
        repeats: readings of which the median is taken.
        measure: what times the steps.
        report: takes a line for each layer.

    Raises:
        ValueError: a forward pass calls none of the layers.
    """
    model = to_dense(copy.deepcopy(model)).float().cpu()
    calls: dict[nn.Module, list[LayerUse]] = {}
    watch_uses(model, torch.randn(batch, *size), lambda call: calls.setdefault(call.module, []).append(call))
    used: dict[str, list[LayerUse]] = {}
    for of_module in calls.values():
        for weight in of_module[0].rows:
            used.setdefault(weight, of_module)
    entries = [e for e in select(model) if not e.reason]
    held, timed = _names_held(model), partial(_steady, measure, repeats)
    ms: dict[str, dict[float, float]] = {}
    for entry in entries:
        if entry.name not in used:
            report(f"{entry.name}: not timed, as a forward pass in eval mode does not call its layer")
            continue
        if entry.name in held:
            ms |= _times_of_held(entry, sum(call.rows[entry.name] for call in used[entry.name]), timed)
        else:
            ms |= _times_of_dense(entry, used[entry.name], timed)
        report(_line(entry, [ms[layer] for layer in entry.layers], entry.name in held))
    if not ms:
        raise ValueError(
            f"a forward pass of {type(model).__name__} in eval mode calls none of the layers that could become sparse, so there is "
            "nothing to time. Give a model that computes with its layers."
        )
    about = environment("cpu") | {"model": name, "batch": batch, "input": list(size), "repeats": repeats}
    return TimeTable(about, ms)


def _names_held(model: nn.Module) -> set[str]:
    """Names of the weights whose layers SparseLinear can hold."""
    layers = linear_layers(model)
    return {name for name, layer in layers.items() if not layer.in_attention and not why_not_exchanged(layer)}


def _steady(
    measure: Measure, repeats: int, calls: Sequence[Callable[[], Any]], *_: Any, cpu_time: bool = False, **__: Any
) -> list[float]:
    """All ``repeats`` readings, also where fewer would tell which call is faster."""
    return measure(calls, repeats, cpu_time=cpu_time)


def _times_of_held(entry: Entry, rows: int, measure: Measure) -> dict[str, dict[float, float]]:
    rows_timed = min(rows, MOST_ROWS)
    shape = (entry.full_shape[0], entry.full_shape[1])
    found = {s: times_of(shape, rows_timed, 1 - s, torch.float32, measure) for s in LEVELS[1:]}
    # the dense step is timed beside each sparse one
    times = {0.0: statistics.median(t["masked"] for t in found.values())} | {s: t["sparse"] for s, t in found.items()}
    return {entry.name: {s: _rounded(ms * rows / rows_timed) for s, ms in times.items()}}


def _times_of_dense(entry: Entry, calls: Sequence[LayerUse], measure: Measure) -> dict[str, dict[float, float]]:
    module = copy.deepcopy(calls[0].module).train()
    threads = torch.get_num_threads()
    [ms] = measure([_step_of_module(module, calls)], cpu_time=threads == 1)
    # of a module with several weights, in proportion to their numbers
    share = entry.size / sum(p.numel() for p in module.parameters() if p.ndim > 1) / entry.parts
    return {layer: dict.fromkeys(LEVELS, _rounded(ms * share)) for layer in entry.layers}


def _rounded(ms: float) -> float:
    """To six digits, which no clock exceeds."""
    return float(f"{ms:.6g}")


def _step_of_module(module: nn.Module, calls: Sequence[LayerUse]) -> Callable[[], None]:
    """A training step of a module alone, with all calls that a pass makes of it."""
    optimizer = torch.optim.SGD(module.parameters(), lr=1e-6, momentum=0.9)
    inputs = [(_leaves(call.args), _leaves(call.kwargs)) for call in calls]

    def step() -> None:
        for args, kwargs in inputs:
            made = [t for t in tensors_in(module(*args, **kwargs)) if t.requires_grad]
            torch.autograd.backward(made, [torch.ones_like(t) for t in made])
        optimizer.step()
        optimizer.zero_grad()
        for tensor in tensors_in(inputs):
            tensor.grad = None

    return step


def _leaves(arguments: Any) -> Any:
    """Arguments whose tensors of floats are leaves with gradients."""

    def leaf(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.is_floating_point())

    return tree_map_only(Tensor, leaf, arguments)


def _line(entry: Entry, times: Iterable[Mapping[float, float]], held: bool) -> str:
    """What was measured of a parameter, for a reader."""
    shape = "x".join(map(str, entry.full_shape))
    sums = [sum(ms) for ms in zip(*(t.values() for t in times), strict=True)]
    if not held:
        return f"{entry.name} {shape}: {sums[0]:.4g} ms, dense at every level"
    return f"{entry.name} {shape}: {sums[0]:.4g} ms dense, {sums[1]:.4g} ms at {LEVELS[1]:g}, {sums[-1]:.4g} ms at {LEVELS[-1]:g}"
