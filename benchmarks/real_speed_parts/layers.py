"""Time and memory of one layer over density and width, for the picture of docs/real_speed.md."""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from real_speed_parts.networks import GROUP, OPTIMIZERS
from sparse_callbacks import SparseLinear, sparsify
from sparse_callbacks.methods import Static

WIDTHS = (256, 512, 1024, 2048, 4096)
DENSITIES = (0.5, 0.2, 0.1, 0.05, 0.02, 0.01)
BATCH = 128
AT_WIDTH, AT_DENSITY = 2048, 0.1  # where the other one is varied
ABOUT = (
    f"A square layer, batch {BATCH}: forward, backward and a step of SGD with momentum, medians over rounds, beside `nn.Linear` in "
    "the same rounds. Bytes a weight of the dense matrix are those held between steps: values, gradient, momentum, and "
    "mask or pattern."
)
Row = dict[str, Any]


def layer_of(storage: str, width: int, density: float) -> nn.Module:
    """A layer of that storage; a dense one for "dense" and "masked"."""
    if storage in ("dense", "masked"):
        return nn.Linear(width, width)
    group = GROUP if storage == "grouped" else 1
    return SparseLinear.random(width, width, max(1, round(density * width)), storage=storage, group=group)


def stepper(layer: nn.Module, optimizer: torch.optim.Optimizer, width: int) -> Callable[[], None]:
    """One step of training on the same batch, whose inputs need a gradient as those of an inner layer do."""
    x, target = torch.randn(BATCH, width, requires_grad=True), torch.randn(BATCH, width)

    def step() -> None:
        layer(x).backward(target)
        optimizer.step()
        optimizer.zero_grad()

    return step


def held(layer: nn.Module, optimizer: torch.optim.Optimizer, masks: int) -> int:
    """Bytes of what is kept between steps."""
    tensors = [*layer.parameters()] * 2  # a gradient is as large as its parameter
    tensors += [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    if isinstance(layer, SparseLinear):
        tensors += [tensor for _, tensor in layer.places.tensors()]
    return masks + sum(t.numel() * t.element_size() for t in tensors)


def cells() -> Iterator[tuple[int, float]]:
    """Every density at one width, and every width at one density."""
    yield from ((AT_WIDTH, density) for density in DENSITIES)
    yield from ((width, AT_DENSITY) for width in WIDTHS if width != AT_WIDTH)


def measure(rounds: int) -> Iterator[Row]:
    """One row for each width, density and storage."""
    for width, density in cells():
        layers = {storage: layer_of(storage, width, density) for storage in ("dense", "masked", "sparse", "grouped")}
        optimizers = {storage: OPTIMIZERS["sgd"](layer.parameters()) for storage, layer in layers.items()}
        repeats = max(1, min(50, 2048**2 // width**2))
        run = sparsify(
            Static(1 - density, print_plan=False), layers["masked"], optimizers["masked"], (rounds + 1) * repeats
        )
        steps = {storage: stepper(layers[storage], optimizers[storage], width) for storage in layers}
        times: dict[str, list[float]] = {storage: [] for storage in layers}
        for turn in range(rounds + 1):
            for storage, step in steps.items():
                began = time.process_time()
                for _ in range(repeats):
                    step()
                if turn:
                    times[storage].append(1e3 * (time.process_time() - began) / repeats)
        masks = sum(mask.numel() for mask in run.masks.values())
        run.close()
        for storage, each in times.items():
            ratios = [a / b for a, b in zip(each, times["dense"], strict=True)]
            kept = held(layers[storage], optimizers[storage], masks if storage == "masked" else 0)
            yield {
                "width": width, "density": density, "storage": storage, "ms": statistics.median(each),
                "ratio": statistics.median(ratios), "bytes": kept / width**2,
            }  # fmt: skip


def table(rows: list[Row]) -> str:
    """A line for each width and density."""
    found: dict[tuple[int, float], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["width"], row["density"]), {})[row["storage"]] = row
    kinds = ("masked", "sparse", "grouped")
    head = [
        "width",
        "density",
        "dense, ms",
        *(f"{k}, over dense" for k in kinds),
        *(f"{k}, bytes" for k in ("dense", *kinds)),
    ]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for (width, density), by in found.items():
        cells = [str(width), f"{density:g}", f"{by['dense']['ms']:.3g}"]
        cells += [f"{by[k]['ratio']:.2f}" for k in kinds] + [f"{by[k]['bytes']:.2f}" for k in ("dense", *kinds)]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
