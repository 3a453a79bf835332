"""Measure how long a model and its layers take on this machine, with other numbers of channels too.

    python -m sparse_callbacks.latency torchvision.models:resnet18 --batch 8 --input 3 224 224 --out resnet18.json
"""

import argparse
import copy
import importlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sparse_callbacks.channels.costs import layers
from sparse_callbacks.channels.latency.fit import fitted, layer_sum, smaller
from sparse_callbacks.channels.latency.probes import kinds_of, milliseconds, probe, sample
from sparse_callbacks.channels.latency.table import Grid, Table, here


@torch.random.fork_rng(devices=[])
def measure(
    model: nn.Module, name: str, batch: int, size: Sequence[int], *, points: int = 4, repeats: int = 15, device: str = "cpu",
    channels_last: bool = False, known: Mapping[str, Grid] | None = None, tell: Callable[[str], None] = lambda _: None,
    keep: Callable[[Table], None] = lambda _: None,
) -> Table:  # fmt: skip
    """The latency table of ``model``; it is left as it is.

    Every layer is measured alone with several numbers of inputs and outputs, and the whole model with all channels, with half and with
    a quarter of those that can be removed: :func:`sparse_callbacks.channels.latency.fit.fitted`.

    Args:
        model: on any device, any mode; measured in eval mode and float32.
        name: of the model, for the table.
        batch, size: samples of a batch, and the size of one without the batch; it is one tensor of standard normal numbers.
        points: numbers of channels measured on each side of a layer, beside the smallest.
        repeats: readings of which the median is taken.
        device: that measures.
        channels_last: memory format of images and weights.
        known: grids that need not be measured again, under the same settings.
        tell: takes a line for each kind of layer, and one about the whole model.
        keep: takes the table as far as it is after each kind of layer.
    """
    place, model = torch.device(device), copy.deepcopy(model).float().cpu().eval()
    norm = any(isinstance(m, _BatchNorm) for m in model.modules())
    example = torch.randn(batch, *size)

    def timed(pairs: Sequence[tuple[nn.Module, Tensor]]) -> list[float]:
        return milliseconds([_ready(m, x, place, channels_last) for m, x in pairs], repeats, place)

    found = layers(model, example)
    about = settings(name, batch, size, points, repeats, device, channels_last) | {"norms": norm, "finished": False}
    kinds = kinds_of(found.values(), points)
    grids = {k: g for k, g in (known or {}).items() if k in kinds and (g.inputs, g.outputs) == kinds[k][2:]}
    for kind, (layer, inner, ins, outs) in kinds.items():
        if kind in grids:
            continue
        module = model.get_submodule(layer.name)
        cells = [[(i, o)] for i, o in zip(ins, outs, strict=True)] if layer.depthwise else [[(i, o) for o in outs] for i in ins]
        ms = [[timed([(probe(module, i, o, norm), sample(layer, inner, i, batch))])[0] for i, o in row] for row in cells]
        grids[kind] = Grid(ins, outs, ms)
        keep(Table(about, grids))
        tell(f"{kind}: {len(ins)} x {len(cells[0])} sizes, {ms[-1][-1]:.4g} ms with all channels")
    others, why = smaller(model, example[:1])
    sums = [layer_sum(Table(about, grids), found, m, example[:1]) for m in (model, *others)]
    fit = fitted(timed([(m, example) for m in (model, *others)]), sums, why)
    tell(str(fit))
    return Table(about | fit.about | {"finished": True}, grids, fit.constant, fit.factor)


def _ready(module: nn.Module, x: Tensor, place: torch.device, channels_last: bool) -> Callable[[], Any]:
    module, x = module.eval().to(place), x.to(place)
    if channels_last and x.ndim == 4:
        module, x = module.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return lambda: module(x)


def settings(name: str, batch: int, size: Sequence[int], points: int, repeats: int, device: str, channels_last: bool) -> dict[str, Any]:
    """What a table was measured with; two with the same settings may share their grids."""
    return here(device) | {
        "model": name, "batch": batch, "input": list(size), "points": points, "repeats": repeats, "channels_last": channels_last,
    }  # fmt: skip


# ---------------------------------------------------------------------- the command line


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = _parser()
    given = parser.parse_args(arguments)
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    problem = _misplaced(given.out) or _unavailable(given.device)
    if problem:
        parser.error(problem)
    name = given.model + (f" {json.dumps(given.arguments, sort_keys=True)}" if given.arguments else "")
    now = settings(name, given.batch, given.input, given.points, given.repeats, given.device, given.channels_last)
    try:
        known = {} if given.overwrite else reusable(given.out, now)
        model = built(given.model, given.arguments)
        fits(model, given.input)
    except ValueError as error:
        parser.error(str(error))
    table = measure(
        model, name, given.batch, given.input, points=given.points, repeats=given.repeats, device=given.device,
        channels_last=given.channels_last, known=known, tell=_say, keep=lambda part: part.save(given.out),
    )  # fmt: skip
    table.save(given.out)
    _say(f"{len(table.grids)} kinds of layers in {given.out}")


def _say(line: str) -> None:
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_callbacks.latency",
        description="Measure a model and its layers on this machine. The model must take one tensor of floating-point numbers, such as "
        "images: random ones are given to it. Models of tokens, or of several inputs, cannot be measured here.",
    )
    parser.add_argument("model", help="module:callable that gives the model, e.g. torchvision.models:resnet18")
    parser.add_argument("--arguments", type=_named, default={}, help='of the callable, as JSON, e.g. \'{"num_classes": 10}\'')
    parser.add_argument("--batch", type=_count, default=1, help="samples of a batch; as many as the model will be given")
    parser.add_argument("--input", type=_count, nargs="+", required=True, help="size of one sample, a float tensor, e.g. 3 32 32")
    out = "JSON, saved after each kind of layer; layers in it of the same settings are not measured again"
    parser.add_argument("--out", type=Path, required=True, help=out)
    parser.add_argument("--overwrite", action="store_true", help="measure everything anew, whatever --out holds")
    parser.add_argument("--points", type=_count, default=4, help="numbers of channels on each side of a layer, beside the smallest")
    parser.add_argument("--repeats", type=_count, default=15, help="readings of which the median is taken")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    parser.add_argument("--threads", type=_count, help="of torch; by default as it starts with")
    parser.add_argument("--channels-last", action="store_true", help="memory format of images and weights")
    return parser


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number from 1 on; give one, such as 8")
    return int(text)


def _named(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error}); write names in double quotes: {{\"width\": 2}}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f"{text!r} has no names; write named arguments: {{\"width\": 2}}")
    return found


def _misplaced(out: Path) -> str:
    """Why nothing can be saved as ``out``, whose folder is made; empty where it can."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out {out}: its folder cannot be made ({error}). Give a file in a folder that there is."
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        return f"--out {out} is a folder, or in one that cannot be written to. Give a file, such as latency.json."
    return ""


def _unavailable(device: str) -> str:
    """Why torch cannot measure on ``device``; empty where it can."""
    try:
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError) as error:
        return f"--device {device} cannot be used ({str(error).splitlines()[0]}). Give cpu, or a device that torch has here."
    return ""


def reusable(path: Path, now: Mapping[str, Any]) -> dict[str, Grid]:
    """Grids of the table in ``path``, if there is one.

    Args:
        path: of the table.
        now: the :func:`settings` that it must have.

    Raises:
        ValueError: it has others, or is no table.
    """
    if not path.exists():
        return {}
    advice = "Give another --out, or --overwrite to measure everything anew."
    try:
        old = Table.load(path)
    except ValueError as error:
        raise ValueError(f"--out holds something else: {error} {advice}") from error
    if differs := [f"{key} {old.about.get(key)} (now {value})" for key, value in now.items() if old.about.get(key) != value]:
        raise ValueError(f"--out {path} holds a table of other settings: {', '.join(differs)}. {advice}")
    return old.grids


def built(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model that ``module:callable`` gives.

    Raises:
        ValueError: it gives none.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"model {name!r} is not of the form module:callable, such as torchvision.models:resnet18.")
    try:
        model = getattr(importlib.import_module(module), attribute)(**arguments)
    except ImportError as error:
        raise ValueError(f"model {name!r}: {error}. Install {module}, or run the command in the folder that it is in.") from error
    except AttributeError as error:
        raise ValueError(f"model {name!r}: {error}. Give a function or class of {module} that makes the model.") from error
    except TypeError as error:
        raise ValueError(f"model {name!r} does not take {dict(arguments)}: {error}. Give its arguments with --arguments.") from error
    if not isinstance(model, nn.Module):
        raise ValueError(f"model {name!r} gives a {type(model).__name__}, no torch.nn.Module. Name what makes the model.")
    return model


def fits(model: nn.Module, size: Sequence[int]) -> None:
    """See that ``model`` takes samples of ``size``.

    Raises:
        ValueError: it does not.
    """
    try:
        layers(model.float(), torch.zeros(1, *size))
    except Exception as error:  # whatever the model's forward does with inputs that it does not expect
        raise ValueError(
            f"the model fails with a float tensor of size {[1, *size]} ({type(error).__name__}: {error}). Give --input, the size of one "
            "sample without the batch; models that take anything but one float tensor cannot be measured."
        ) from error
