"""Measures on one GPU, in about ten minutes, what groups gain there and what masks cost.

    pip install -e .
    python benchmarks/real_speed_gpu.py
    python benchmarks/real_speed_gpu.py --device cpu --eager --widths 128 --rows 64 --rounds 2 --steps 2    # a trial

1. A layer in grouped storage against `nn.Linear`, both compiled, under bf16 autocast: forward, backward and a step of SGD with
   momentum.
2. Masked storage in a loop of yours (`sparsify`): the step of Static, SET and RigL against the dense one, and their updates.

Times are wall time between synchronizations, medians over rounds in which all runs take turns. The tables are printed and
written to benchmarks/results/real_speed_gpu.md.
"""

import argparse
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_callbacks import SparseLinear, sparsify
from sparse_callbacks.methods import SET, RigL, Static

RESULTS = Path(__file__).parent / "results" / "real_speed_gpu.md"
GROUP, SPARSITY = 64, 0.9
DENSITIES = (0.2, 0.1, 0.05)
WARM_UP = 3  # steps before the first round, in which code is compiled
Step = Callable[[], None]


def sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9)


def synchronize(device: str) -> None:
    """Wait until the device has done what it was asked for."""
    if device != "cpu":
        torch.get_device_module(device).synchronize()


def milliseconds(steps: dict[str, Step], chosen: argparse.Namespace) -> dict[str, list[float]]:
    """The mean step of each run in each round."""
    for step in steps.values():
        for _ in range(WARM_UP):
            step()
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(chosen.rounds):
        for name, step in steps.items():
            synchronize(chosen.device)
            began = time.perf_counter()
            for _ in range(chosen.steps):
                step()
            synchronize(chosen.device)
            times[name].append(1e3 * (time.perf_counter() - began) / chosen.steps)
    return times


def step_of(module: nn.Module, optimizer: torch.optim.Optimizer, x: torch.Tensor, compiled: bool) -> Step:
    """A step of training under bf16 autocast, always on the same batch; inputs need a gradient, as an inner layer's do."""
    forward = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
    target = torch.randn_like(module(x))

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16):
            y = forward(x)
        y.backward(target.to(y.dtype))
        optimizer.step()
        optimizer.zero_grad()

    return step


def against(times: dict[str, list[float]], name: str, base: str) -> str:
    """Milliseconds of a run, and its ratio to another in the same rounds with the smallest and the largest."""
    ratios = [a / b for a, b in zip(times[name], times[base], strict=True)]
    middle = statistics.median(ratios)
    return f"{statistics.median(times[name]):.3g} ms: **{middle:.2f}** ({min(ratios):.2f} to {max(ratios):.2f})"


# ---------------------------------------------------------------------- grouped storage


def grouped_rows(chosen: argparse.Namespace) -> Iterator[str]:
    """A line for each width: the dense layer's time, and each density's over it."""
    for width in chosen.widths:
        x = torch.randn(chosen.rows, width, device=chosen.device, requires_grad=True)
        steps = {}
        for density in (1.0, *DENSITIES):
            layer: nn.Module = nn.Linear(width, width, device=chosen.device)
            if density < 1:
                k = max(1, round(density * width))
                layer = SparseLinear.random(width, width, k, storage="grouped", group=GROUP, device=chosen.device)
            steps[f"{density:g}"] = step_of(layer, sgd(layer), x, not chosen.eager)
        times = milliseconds(steps, chosen)
        cells = [against(times, f"{density:g}", "1") for density in DENSITIES]
        yield f"| {width} | {statistics.median(times['1']):.3g} | {' | '.join(cells)} |"


def grouped_table(chosen: argparse.Namespace) -> str:
    head = ["width", "dense, ms", *(f"grouped, density {density:g}" for density in DENSITIES)]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head), *grouped_rows(chosen)]
    return "\n".join(lines)


# ---------------------------------------------------------------------- masked storage


def masked_rows(chosen: argparse.Namespace) -> Iterator[str]:
    """A line for each width and method: ordinary steps, and updates, over the dense network's step."""
    methods: dict[str, Callable[..., Any]] = {"Static": Static, "SET": SET, "RigL": RigL}
    total = WARM_UP + 2 * chosen.rounds * chosen.steps  # beyond the end, so that ordinary steps have no update
    for width in chosen.widths:
        x = torch.randn(chosen.rows, width, device=chosen.device)
        steps, updates = {}, {}
        for name in ("dense", *methods):
            net = nn.Sequential(*[nn.Linear(width, width) for _ in range(4)]).to(chosen.device)
            optimizer = sgd(net)
            if name != "dense":
                times = {} if name == "Static" else {"every": total, "stop": total}
                sparsify(methods[name](SPARSITY, print_plan=False, **times), net, optimizer, total)
            steps[name] = step_of(net, optimizer, x, compiled=False)
            if name in ("SET", "RigL"):
                other = nn.Sequential(*[nn.Linear(width, width) for _ in range(4)]).to(chosen.device)
                moving = sgd(other)
                # the drop fraction must not fall, as every step here has an update
                often = {"every": 1, "start": 0, "stop": total, "drop_fraction": "constant(0.3)"}
                sparsify(methods[name](SPARSITY, print_plan=False, **often), other, moving, total)
                updates[name] = step_of(other, moving, x, compiled=False)
        times_of = milliseconds(steps | {f"{name}, update": step for name, step in updates.items()}, chosen)
        for name in methods:
            update = against(times_of, f"{name}, update", "dense") if name in updates else ""
            yield f"| {width} | {name} | {against(times_of, name, 'dense')} | {update} |"


def masked_table(chosen: argparse.Namespace) -> str:
    lines = [
        "| four layers of width | method | a step, over dense | a step with an update, over dense |",
        "|" + " --- |" * 4,
    ]
    return "\n".join([*lines, *masked_rows(chosen)])


def why_not(device: str) -> str:
    """Why nothing can be measured on a device; empty where it can be."""
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # a build of torch without the device raises the second
        first = str(error).splitlines()[0]
        return (
            f"--device {device} cannot be used here ({first}). Run this on a machine with a GPU and its driver, or give "
            "--device cpu --eager for a trial"
        )
    return ""


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--widths", nargs="+", type=int, default=[1024, 2048, 4096, 8192])
    parser.add_argument("--rows", type=int, default=4096, help="rows of the batch")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=20, help="of each run in a round")
    parser.add_argument("--eager", action="store_true", help="do not compile the layers of the first table")
    parser.add_argument("--out", type=Path, default=RESULTS)
    chosen = parser.parse_args(arguments)
    if why := why_not(chosen.device):
        parser.error(why)
    torch.manual_seed(0)
    name = platform.processor() if chosen.device == "cpu" else torch.get_device_module(chosen.device).get_device_name()
    text = (
        f"# Grouped storage and masks on one GPU\n\n{name}, torch {torch.__version__}, bf16 autocast, {chosen.rows} rows, groups of "
        f"{GROUP}, SGD with momentum; layers of the first table {'in eager mode' if chosen.eager else 'compiled'}, masks at "
        f"{SPARSITY}. Written by `python benchmarks/real_speed_gpu.py`.\n"
    )
    for title, table in (
        ("One layer, grouped, over dense", grouped_table),
        ("Masked storage, over dense", masked_table),
    ):
        part = f"\n## {title}\n\n{table(chosen)}\n"
        print(part, flush=True)
        text += part
    chosen.out.parent.mkdir(exist_ok=True)
    chosen.out.write_text(text)


if __name__ == "__main__":
    main()
