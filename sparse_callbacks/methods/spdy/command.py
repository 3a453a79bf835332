"""The command ``python -m sparse_callbacks.allocate``: how sparse each layer becomes within a budget.

python -m sparse_callbacks.allocate torchvision.models:resnet18 --input 3x224x224 --budget 0.5
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

import torch

from sparse_callbacks.channels.latency.command import (
    built,
    count_of,
    json_arguments,
    refuse_size,
    why_not_written,
)
from sparse_callbacks.core.selection import Entry, patterns, select
from sparse_callbacks.methods.spdy.spdy import LayerShares, Spdy
from sparse_callbacks.methods.spdy.timing import measured_times


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the share of each layer of the model that the command line names; measure its table of times if asked to.

    Args:
        arguments: words of the command line; None: those of the process.
    """
    parser = _parser()
    given = parser.parse_args(arguments)
    size = [n for sizes in given.input for n in sizes]
    if given.threads is not None:
        torch.set_num_threads(given.threads)
    if given.out is not None and not given.measure:
        parser.error("--out takes the times that --measure finds: give both, or leave --out out.")
    out: Path = given.out or Path(Path(f"{given.model.rpartition(':')[2]}_times.json").name)  # in the current folder
    if given.measure and given.cost != "flops":
        parser.error("--cost reads a table of times and --measure writes one: give one of them.")
    if problem := why_not_written(out) if given.measure else "":
        parser.error(problem)
    # the arguments are part of the name: tables of two widths of one class are two tables
    name = given.model + (f" {json.dumps(given.arguments, sort_keys=True)}" if given.arguments else "")
    try:
        spdy = Spdy(given.budget, str(out) if given.measure else given.cost, input=size)  # before minutes of work
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(given.seed)
            model = built(given.model, given.arguments)
        refuse_size(model, size)
        if given.measure:
            table = measured_times(model, name, given.batch, size, repeats=given.repeats, report=_print)
            table.save(out)
            _print(f"times of {len(table.ms)} layers in {out}")
        entries = select(model, None, patterns(given.exclude, "exclude"), given.keep_dense)
        found = spdy.layer_shares(model, entries)
    except ValueError as error:
        parser.error(str(error))
    _print(_overview(entries, found, given.budget))


def _print(line: str) -> None:
    # at once, as measuring may take minutes and its output may go to a file
    print(line, flush=True)


def _overview(entries: Sequence[Entry], found: LayerShares, budget: float) -> str:
    """A table of the layers, and the cost that they come to."""
    costs = found.costs
    wide = max(len(layer) for layer in found.sparsities)
    rows = [f"{'layer':{wide}}  {'weights':>12}  sparsity  {'cost':>12}  {'dense':>12}"]
    sizes = {layer: e.size // e.parts for e in entries for layer in e.layers}
    for layer, sparsity in found.sparsities.items():
        cost, dense = costs.costs[layer][found.levels[layer]], costs.costs[layer][0]
        rows.append(f"{layer:{wide}}  {sizes[layer]:12,}  {sparsity:8.4f}  {cost:12.6g}  {dense:12.6g}")
    if costs.others:
        rows.append(f"{'everything else':{wide}}  {'':12}  {'':8}  {costs.others:12.6g}  {costs.others:12.6g}")
    total = costs.at(found.levels)
    rows.append(f"{costs.what}: {total:.6g} of {costs.dense:.6g}, a share of {found.reached:.4f} (budget {budget:g})")
    return "\n".join(rows)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m sparse_callbacks.allocate",
        description="Show how sparse Spdy makes each layer of a model within a budget of FLOPs or of milliseconds, by the "
        "magnitudes of its weights, and measure the milliseconds. The model must take one tensor of floating-point numbers.",
    )
    add = parser.add_argument
    add("model", help="module:callable that gives the model, e.g. torchvision.models:resnet18")
    add("--arguments", type=json_arguments, default={}, help="of the callable, as JSON, e.g. '{\"num_classes\": 10}'")
    add(
        "--input",
        type=_size,
        nargs="+",
        required=True,
        help="size of one sample, a float tensor, e.g. 3x32x32 or 3 32 32",
    )
    add("--exclude", nargs="+", metavar="GLOB", help="weights that stay dense, as in exclude= of a method")
    add("--keep-dense", choices=("first", "last", "both"), help="layers that stay dense, as in keep_dense= of a method")
    add("--budget", type=float, default=0.5, help="cost of the sparse model as a share of the dense one's")
    add("--cost", default="flops", help="flops, or a table of times (.json) that --measure has written")
    add(
        "--measure",
        action="store_true",
        help="time the layers that SparseLinear can hold at each sparsity, and write the times to --out",
    )
    add(
        "--out",
        type=Path,
        help="JSON for the times of --measure, which Spdy(cost=FILE) reads; by default resnet18_times.json, by the model",
    )
    add("--batch", type=count_of, default=1, help="samples of a batch that is timed; as many as in a training step")
    add("--repeats", type=count_of, default=5, help="readings of which the median is taken")
    add("--threads", type=count_of, help="of torch; by default as it starts with")
    add(
        "--seed",
        type=int,
        default=0,
        help="of torch, set before the model is made: magnitudes are those of its weights",
    )
    return parser


def _size(text: str) -> list[int]:
    return [count_of(part) for part in text.split("x")]
