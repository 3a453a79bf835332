"""The command ``python -m sparse_callbacks.latency``: its arguments, and what it refuses.

python -m sparse_callbacks.latency torchvision.models:resnet18 --batch 8 --input 3 224 224 --out resnet18.json
"""

import argparse
import importlib
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_callbacks.channels.costs import layers
from sparse_callbacks.channels.latency.measure import measure, settings
from sparse_callbacks.channels.latency.table import Grid, Table


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure the model that the command line names, and save its table.

    Args:
        arguments: words of the command line; None: those of the process.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    # first of all, since the settings below state the number of threads
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    # before the model is made, which may take minutes
    problem = why_not_written(given.out) or _why_not_measured_on(given.device)
    if problem:
        parser.error(problem)
    # the arguments are part of the name: tables of two widths of one class are two tables
    name = given.model + (f" {json.dumps(given.arguments, sort_keys=True)}" if given.arguments else "")
    options = (given.points, given.repeats, given.device, given.channels_last)
    try:
        known = {} if given.overwrite else reusable(given.out, settings(name, given.batch, given.input, *options))
        model = built(given.model, given.arguments)
        refuse_size(model, given.input)
    except ValueError as error:
        parser.error(str(error))
    # saved after every kind of layer, so that an interrupted command goes on where it stopped
    table = measure(
        model,
        name,
        given.batch,
        given.input,
        points=given.points,
        repeats=given.repeats,
        device=given.device,
        channels_last=given.channels_last,
        known=known,
        report=_print,
        save=lambda unfinished: unfinished.save(given.out),
    )
    table.save(given.out)
    _print(f"{len(table.grids)} kinds of layers in {given.out}")


def _print(line: str) -> None:
    # at once, as a measurement runs for minutes and its output may go to a file
    print(line, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_callbacks.latency",
        description="Measure a model and its layers on this machine. The model must take one tensor of floating-point "
        "numbers, such as images: random ones are given to it. "
        "Models of tokens, or of several inputs, cannot be measured here.",
    )
    add = parser.add_argument
    add("model", help="module:callable that gives the model, e.g. torchvision.models:resnet18")
    add("--arguments", type=json_arguments, default={}, help="of the callable, as JSON, e.g. '{\"num_classes\": 10}'")
    add("--batch", type=count_of, default=1, help="samples of a batch; as many as the model will be given")
    size = "size of one sample, a float tensor, e.g. 3 32 32"
    add("--input", type=count_of, nargs="+", required=True, help=size)
    out = "JSON, saved after each kind of layer; layers in it of the same settings are not measured again"
    add("--out", type=Path, required=True, help=out)
    add("--overwrite", action="store_true", help="measure everything anew, whatever --out holds")
    points = "numbers of channels on each side of a layer, beside the smallest"
    add("--points", type=count_of, default=4, help=points)
    add("--repeats", type=count_of, default=15, help="readings of which the median is taken")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, ...")
    add("--threads", type=count_of, help="of torch; by default as it starts with")
    add("--channels-last", action="store_true", help="memory format of images and weights")
    return parser


def count_of(text: str) -> int:
    """A word of the command line as a whole number from 1 on."""
    # int() has an error of its own for letters, and takes "1_0"
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from 1 on; give one, such as 8")
    return int(text)


def json_arguments(text: str) -> dict[str, Any]:
    """A word of the command line as named arguments, from JSON."""
    try:
        found = json.loads(text)
    except json.JSONDecodeError as error:
        advice = 'write names in double quotes: {"width": 2}'
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); {advice}") from None
    if not isinstance(found, dict):
        raise argparse.ArgumentTypeError(f'{text!r} has no names; write named arguments: {{"width": 2}}')
    return found


def why_not_written(out: Path) -> str:
    """Why nothing can be saved as ``out``, whose folder is made if it is missing; empty where it can."""
    try:
        # now: a folder that cannot be made should not show after minutes of measuring
        out.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        return f"--out {out}: its folder cannot be made ({error}). Give a file in a folder that exists."
    if out.is_dir() or not os.access(out.parent, os.W_OK):
        return f"--out {out} is a folder, or in one that cannot be written to. Give the name of a file."
    return ""


def _why_not_measured_on(device: str) -> str:
    """Why torch cannot measure on ``device``; empty where it can."""
    try:
        torch.zeros(1, device=device)
    # AssertionError: a torch that was built without CUDA
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        return f"--device {device} cannot be used ({reason}). Give cpu, or a device that torch has here."
    return ""


def reusable(path: Path, current: Mapping[str, Any]) -> dict[str, Grid]:
    """Grids of the table in ``path``; none where there is no file.

    Args:
        path: file of a table.
        current: the :func:`~sparse_callbacks.channels.latency.measure.settings` that it must have been measured with.

    Raises:
        ValueError: it was measured with other settings, or is not a table.
    """
    if not path.exists():
        return {}
    advice = "Give another --out, or --overwrite to measure everything anew."
    try:
        old = Table.load(path)
    except ValueError as error:
        raise ValueError(f"--out holds something else: {error} {advice}") from error
    # times under other settings must not end up in one table
    differing = [key for key, value in current.items() if old.about.get(key) != value]
    if differing:
        listed = ", ".join(f"{key} {old.about.get(key)} (now {current[key]})" for key in differing)
        raise ValueError(f"--out {path} holds a table of other settings: {listed}. {advice}")
    return old.grids


def built(name: str, arguments: Mapping[str, Any]) -> nn.Module:
    """The model that ``module:callable`` gives.

    Args:
        name: the module and the callable in it.
        arguments: named arguments of the callable.

    Raises:
        ValueError: there is no such callable, or it gives no model.
    """
    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise ValueError(f"model {name!r} is not of the form module:callable, such as torchvision.models:resnet18.")
    try:
        model = getattr(importlib.import_module(module), attribute)(**arguments)
    except ImportError as error:
        raise ValueError(
            f"model {name!r}: {error}. Install {module}, or run the command in the folder that it is in."
        ) from error
    except AttributeError as error:
        raise ValueError(
            f"model {name!r}: {error}. Give a function or class of {module} that makes the model."
        ) from error
    except TypeError as error:
        raise ValueError(
            f"model {name!r} does not take {dict(arguments)}: {error}. Give its arguments with --arguments."
        ) from error
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model {name!r} gives a {type(model).__name__}, not a torch.nn.Module. Name what makes the model."
        )
    return model


def refuse_size(model: nn.Module, size: Sequence[int]) -> None:
    """Refuse a sample size that ``model`` does not take.

    Raises:
        ValueError: a forward pass on one sample fails.
    """
    try:
        # one sample, in the precision that is measured, is enough to see whether the size fits
        layers(model.float(), torch.zeros(1, *size))
    except Exception as error:  # whatever the model's forward does with inputs that it does not expect
        raise ValueError(
            f"the model fails with a float tensor of size {[1, *size]} ({type(error).__name__}: {error}). "
            "Give --input, the size of one sample without the batch; "
            "models that take anything but one float tensor cannot be measured."
        ) from error
