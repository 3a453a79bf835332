"""Measures the latency table of a model: each kind of layer alone, and the whole model."""

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_callbacks.channels.costs import Layer, layers
from sparse_callbacks.channels.latency.fit import fitted, layer_sum, smaller
from sparse_callbacks.channels.latency.probes import kinds_of, probe, random_input
from sparse_callbacks.channels.latency.table import Grid, Table, environment
from sparse_callbacks.core.clock import milliseconds
from sparse_callbacks.core.storages.exchange import to_dense


# random inputs and fresh layers leave the user's generator as it is; they are made on the CPU, so no GPU's is moved
@torch.random.fork_rng(devices=[])
def measure(
    model: nn.Module,
    name: str,
    batch: int,
    size: Sequence[int],
    *,
    points: int = 4,
    repeats: int = 15,
    device: str = "cpu",
    channels_last: bool = False,
    known: Mapping[str, Grid] | None = None,
    report: Callable[[str], None] = lambda _: None,
    save: Callable[[Table], None] = lambda _: None,
) -> Table:
    """The latency table of ``model``, which is left as it is.

    Every kind of layer is measured alone with several numbers of inputs and outputs, and the whole model with all
    channels, with half and with a quarter of those that can be removed
    (:func:`sparse_callbacks.channels.latency.fit.fitted`).

    Args:
        model: the model, on any device and in any mode; a copy is measured in eval mode and float32.
        name: name of the model, which the table states.
        batch: number of samples in a batch.
        size: size of one sample, without the batch. A batch is one tensor of standard normal numbers.
        points: numbers of channels that are measured on each side of a layer, beside the smallest.
        repeats: readings of which the median is taken.
        device: device that is measured.
        channels_last: whether images and weights have that memory format.
        known: grids that need not be measured again, from a table with the same settings.
        report: takes a line for each kind of layer, and one about the whole model.
        save: takes the unfinished table after each kind of layer, so that measuring can be interrupted.
    """
    place, model = torch.device(device), to_dense(copy.deepcopy(model)).float().cpu().eval()
    # a network with batch norms has one after nearly every convolution, so they are measured together
    norm = any(isinstance(m, _BatchNorm) for m in model.modules())
    example = torch.randn(batch, *size)

    @torch.inference_mode()
    def timed(pairs: Sequence[tuple[nn.Module, Tensor]]) -> list[float]:
        return milliseconds([_ready(m, x, place, channels_last) for m, x in pairs], repeats, [place])

    found = layers(model, example)
    about = settings(name, batch, size, points, repeats, device, channels_last) | {"norms": norm, "finished": False}
    kinds = kinds_of(found.values(), points)
    grids = {k: g for k, g in (known or {}).items() if k in kinds and (g.inputs, g.outputs) == kinds[k][2:]}
    for kind, (layer, map_size, ins, outs) in kinds.items():
        if kind in grids:
            continue
        module = model.get_submodule(layer.name)
        grids[kind] = Grid(ins, outs, [])
        for row in _pairs(layer, ins, outs):
            times = [timed([(probe(module, i, o, norm), random_input(layer, map_size, i, batch))]) for i, o in row]
            grids[kind].ms.append([ms for [ms] in times])
        save(Table(about, grids))
        ms = grids[kind].ms
        report(f"{kind}: {len(ins)} x {len(ms[0])} sizes, {ms[-1][-1]:.4g} ms with all channels")
    # layers alone leave out everything else, and may be faster than in the model, which a fitted line corrects
    others, reason = smaller(model, example[:1])
    sums = [layer_sum(Table(about, grids), found, m, example[:1]) for m in (model, *others)]
    # in one call, where the models take turns: a slow moment of the machine meets all of them
    fit = fitted(timed([(m, example) for m in (model, *others)]), sums, reason)
    report(str(fit))
    return Table(about | fit.about | {"finished": True}, grids, fit.constant, fit.factor)


def _pairs(layer: Layer, inputs: Sequence[int], outputs: Sequence[int]) -> list[list[tuple[int, int]]]:
    """The pairs of numbers of inputs and outputs to measure, in the rows of a grid."""
    if layer.depthwise:  # inputs and outputs go together, so there is one column
        return [[pair] for pair in zip(inputs, outputs, strict=True)]
    return [[(i, o) for o in outputs] for i in inputs]


def _ready(module: nn.Module, x: Tensor, place: torch.device, channels_last: bool) -> Callable[[], Any]:
    """A call of ``module`` on ``x``, both on the device and in the memory format that is measured."""
    # moved before the clock starts
    module, x = module.eval().to(place), x.to(place)
    if channels_last and x.ndim == 4:
        module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return lambda: module(x)


def settings(
    name: str, batch: int, size: Sequence[int], points: int, repeats: int, device: str, channels_last: bool
) -> dict[str, Any]:
    """What a table was measured with; two tables with the same settings may share their grids."""
    return environment(device) | {
        "model": name,
        "batch": batch,
        "input": list(size),
        "points": points,
        "repeats": repeats,
        "channels_last": channels_last,
    }
