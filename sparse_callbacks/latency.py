"""Measure how long the layers of a model take on this machine, with other numbers of channels too.

    python -m sparse_callbacks.latency torchvision.models:resnet18 --batch 8 --input 3 224 224 --out resnet18.json
"""

import argparse
import copy
import importlib
import json
import math
import platform
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.costs import Layer, layers
from sparse_callbacks.latency_table import Grid, Table, signature

SHORTEST = 5e-4  # seconds that one reading lasts at least
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def milliseconds(call: Callable[[], Any], repeats: int, device: torch.device) -> float:
    """Median time of one call over ``repeats`` readings, after one reading that warms up; each lasts 0.5 ms or more."""
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def reading(calls: int) -> float:
        wait()
        begun = time.perf_counter()
        for _ in range(calls):
            call()
        wait()
        return time.perf_counter() - begun

    calls = 1
    while (took := reading(calls)) < SHORTEST and calls < 1 << 14:
        calls = max(2 * calls, math.ceil(calls * SHORTEST / max(took, 1e-9)))
    return 1e3 * statistics.median(reading(calls) for _ in range(repeats)) / calls


def axis(size: int, points: int, multiple: int) -> list[int]:
    """Channels to measure: ``multiple`` (the fewest there can be), and ``points`` even shares of ``size``, rounded to it.

    >>> axis(64, 4, 1)
    [1, 16, 32, 48, 64]
    """
    return sorted({multiple, *(max(1, round(size * p / points / multiple)) * multiple for p in range(1, points + 1))})


def _sizes(uses: Sequence[Layer], points: int) -> tuple[list[int], list[int]]:
    """Inputs and outputs to measure for layers of one kind; what belongs to a grouped convolution is divisible by its groups."""
    first = uses[0]
    many = 1 if first.depthwise else first.groups
    ins = sorted({n for layer in uses for n in axis(layer.inputs, points, many)})
    if first.depthwise:
        return ins, [n * (first.outputs // first.inputs) for n in ins]
    return ins, sorted({n for layer in uses for n in axis(layer.outputs, points, many)})


def probe(module: nn.Module, inputs: int, outputs: int, norm: bool) -> nn.Module:
    """A fresh layer like ``module`` with so many channels; a convolution with ``norm`` has its batch norm and ReLU behind it."""
    bias = module.bias is not None
    if not isinstance(module, _ConvNd):
        return nn.Linear(inputs, outputs, bias)
    kind = next(c for c in type(module).__mro__ if c.__module__ == "torch.nn.modules.conv")
    groups = inputs if module.groups == module.in_channels > 1 else module.groups
    named = {"stride": module.stride, "padding": module.padding, "dilation": module.dilation, "padding_mode": module.padding_mode}
    if module.transposed:
        named["output_padding"] = module.output_padding
    made: nn.Module = kind(inputs, outputs, module.kernel_size, groups=groups, bias=bias, **named)
    return nn.Sequential(made, NORMS[len(module.kernel_size)](outputs), nn.ReLU()) if norm else made


def _sample(layer: Layer, inner: Sequence[int], inputs: int, batch: int) -> Tensor:
    rows = batch * inner[0]
    return torch.randn(rows, inputs, *inner[1:]) if layer.kernel else torch.randn(rows, inputs)


@torch.random.fork_rng(devices=[])
@torch.inference_mode()
def measure(
    model: nn.Module, name: str, batch: int, size: Sequence[int], *, points: int = 4, repeats: int = 15, device: str = "cpu",
    channels_last: bool = False, known: Mapping[str, Grid] | None = None, tell: Callable[[str], None] = lambda _: None,
) -> Table:  # fmt: skip
    """The latency table of ``model``; it is left as it is.

    Args:
        model: on any device, any mode; measured in eval mode and float32.
        name: of the model, for the table.
        batch, size: samples of a batch, and the size of one without the batch.
        points: numbers of channels measured on each side of a layer, beside the smallest.
        repeats: readings of which the median is taken.
        device: that measures.
        channels_last: memory format of images and weights.
        known: grids that need not be measured again, under the same settings.
        tell: takes a line for each kind of layer.
    """
    place, model = torch.device(device), copy.deepcopy(model).float().cpu()
    norm = any(isinstance(m, _BatchNorm) for m in model.modules())
    example = torch.randn(batch, *size)

    def timed(module: nn.Module, x: Tensor) -> float:
        module, x = module.eval().to(place), x.to(place)
        if channels_last and x.ndim == 4:
            module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
        return milliseconds(lambda: module(x), repeats, place)

    grids = dict(known or {})
    kinds: dict[str, list[tuple[Layer, tuple[int, ...]]]] = {}
    for layer in layers(model, example).values():
        for inner in layer.maps:
            kinds.setdefault(signature(layer, inner), []).append((layer, inner))
    for kind, uses in kinds.items():
        if kind in grids:
            continue
        layer, inner = uses[0]
        module = model.get_submodule(layer.name)
        ins, outs = _sizes([use for use, _ in uses], points)
        cells = [[(i, o)] for i, o in zip(ins, outs, strict=True)] if layer.depthwise else [[(i, o) for o in outs] for i in ins]
        ms = [[timed(probe(module, i, o, norm), _sample(layer, inner, i, batch)) for i, o in row] for row in cells]
        grids[kind] = Grid(ins, outs, ms)
        tell(f"{kind}: {len(ins)} x {len(cells[0])} sizes, {ms[-1][-1]:.4g} ms with all channels")
    whole = timed(model, example)
    about = settings(name, batch, size, repeats, device, channels_last) | {"model_ms": whole, "norms": norm}
    return Table(about, grids)


def settings(name: str, batch: int, size: Sequence[int], repeats: int, device: str, channels_last: bool) -> dict[str, Any]:
    """What a table was measured with; two with the same settings may share their grids."""
    chip = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.processor() or platform.machine()
    return {
        "machine": f"{platform.system()} {platform.machine()}", "device": f"{device} {chip}", "threads": torch.get_num_threads(),
        "torch": torch.__version__, "model": name, "batch": batch, "input": list(size), "repeats": repeats, "channels_last": channels_last,
    }  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m sparse_callbacks.latency", description="Measure a model's layers on this machine.")
    parser.add_argument("model", help="module:callable that gives the model, e.g. torchvision.models:resnet18")
    parser.add_argument("--arguments", type=json.loads, default={}, help='of the callable, as JSON, e.g. \'{"num_classes": 10}\'')
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--input", type=int, nargs="+", required=True, help="size of one sample, e.g. 3 32 32")
    parser.add_argument("--out", type=Path, required=True, help="JSON; what it holds of the same settings is not measured again")
    parser.add_argument("--points", type=int, default=4, help="numbers of channels on each side of a layer, beside the smallest")
    parser.add_argument("--repeats", type=int, default=15, help="readings of which the median is taken")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, help="of torch; by default as it starts with")
    parser.add_argument("--channels-last", action="store_true")
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    module, _, name = given.model.partition(":")
    model = getattr(importlib.import_module(module), name)(**given.arguments)
    now = settings(given.model, given.batch, given.input, given.repeats, given.device, given.channels_last)
    known = {}
    if given.out.exists():
        old = Table.load(given.out)
        known = old.grids if now.items() <= old.about.items() else {}
    table = measure(
        model, given.model, given.batch, given.input, points=given.points, repeats=given.repeats, device=given.device,
        channels_last=given.channels_last, known=known, tell=print,
    )  # fmt: skip
    table.save(given.out)
    total = math.fsum(table(layer, layer.inputs, layer.outputs) for layer in layers(model, torch.zeros(given.batch, *given.input)).values())
    print(f"{len(table.grids)} kinds of layers in {given.out}: {total:.4g} ms together, the whole model {table.about['model_ms']:.4g} ms")


if __name__ == "__main__":
    main()
