"""Measures Spdy beside uniform and ERK: at equal FLOPs on ResNet-20, and at equal step time on 784-1000x3-10.

The data is Fashion-MNIST.

    python benchmarks/allocation.py --root FOLDER --jobs 2 --runs KEPT

FOLDER holds torchvision's files. Each run is `python train.py` with the overrides of its row; with `--runs KEPT` finished
runs are kept and not repeated. The table of times that is measured first is written to benchmarks/results/allocation_times.json,
and kept with `--go-on`. ResNet-20 is trained in the setting of
channels.py with images pooled to 14 x 14. Of uniform and ERK the smallest sparsity is taken whose network is within the budget.
The times mean something on an idle machine only. Writes benchmarks/results/allocation.md.
"""

import math
import os
import platform
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from channels import SHAPE, SHARED, Rows, words
from torch import Tensor, nn
from training_runs import ROOT, Metrics, figures_of, options_of_runs, results

from sparse_callbacks import Spdy, Static, sparsify
from sparse_callbacks.core.clock import milliseconds
from sparse_callbacks.core.distributions import resolve
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.selection import layer_shapes, select
from sparse_callbacks.methods.spdy.levels import flop_costs
from sparse_callbacks.methods.spdy.time_table import TimeTable
from sparse_callbacks.methods.spdy.timing import measured_times
from sparse_callbacks.tasks.models import mlp, resnet20

FLOP_BUDGETS, TIME_BUDGETS = (0.3, 0.1), (0.5, 0.3)
METHODS = ("gmp",)
NAMES = {"uniform": "uniform", "ERK": "erdos_renyi_kernel"}
POOLED = (1, 14, 14)
TIMES = Path("benchmarks/results/allocation_times.json")  # as train.py is given it, in the root of the project
RESNET20 = (*SHARED, "data._target_=pooled_images.halved")
HIDDEN, BATCH, READINGS = (1000, 1000, 1000), 100, 41
MLP = (
    "model=mlp", f"model.hidden=[{','.join(map(str, HIDDEN))}]", "data=fashion_mnist", f"data.batch_size={BATCH}", "optim.lr=0.05",
    "trainer.max_epochs=5", "method.storage=sparse",
)  # fmt: skip

Cost = Callable[[Mapping[str, float]], float]
"""The cost of a network with these sparsities by layer, as a share of the dense one's."""


def wide() -> nn.Module:
    return mlp(SHAPE, 10, HIDDEN)


# ---------------------------------------------------------------------- equal costs


def flops_of(net: nn.Module) -> Cost:
    costs = flop_costs(net, torch.zeros(1, *POOLED), select(net))

    def share(sparsities: Mapping[str, float]) -> float:
        left = sum(flops[0] * (1 - sparsities[layer]) for layer, flops in costs.costs.items())
        return (costs.others + left) / costs.dense

    return share


def time_of(table: TimeTable) -> Cost:
    dense = sum(ms[0.0] for ms in table.ms.values())
    return lambda sparsities: sum(interpolated(ms, sparsities[layer]) for layer, ms in table.ms.items()) / dense


def interpolated(ms: Mapping[float, float], sparsity: float) -> float:
    """Time between the two levels around a sparsity; beyond the last one, that of the last."""
    below = max(s for s in ms if s <= sparsity)
    above = min((s for s in ms if s >= sparsity), default=below)
    share = (sparsity - below) / (above - below) if above > below else 0.0
    return (1 - share) * ms[below] + share * ms[above]


def shares_of(net: nn.Module, distribution: str, sparsity: float) -> dict[str, float]:
    """Sparsity of each layer in whole zeros."""
    shapes = layer_shapes(select(net))
    sizes = {layer: math.prod(shape) for layer, shape in shapes.items()}
    shares = resolve(distribution, shapes, sparsity)
    return {layer: zeros_for(share, sizes[layer]) / sizes[layer] for layer, share in shares.items()}


def sparsity_within(net: nn.Module, distribution: str, budget: float, cost: Cost) -> float:
    """The smallest sparsity, in thousandths, at which a distribution costs at most the budget."""
    tried = (thousandths / 1000 for thousandths in range(1, 1000))
    return next(s for s in tried if cost(shares_of(net, distribution, s)) <= budget)


def allocations(net: nn.Module, budget: float, cost: Cost, spdy: str) -> dict[str, tuple[str, ...]]:
    """Overrides of each allocation by its name."""
    found: dict[str, tuple[str, ...]] = {
        name: (f"method.distribution={known}", f"sparsity={sparsity_within(net, known, budget, cost):g}")
        for name, known in NAMES.items()
    }
    return found | {"Spdy": (f"method.distribution={{_target_:sparse_callbacks.Spdy,budget:{budget:g}{spdy}}}",)}


def rows_of(net: nn.Module, budgets: Sequence[float], cost: Cost, methods: Sequence[str], spdy: str = "") -> Rows:
    return {
        f"{method}, {name}, {budget:g}": (f"method={method}", *overrides)
        for budget in budgets
        for name, overrides in allocations(net, budget, cost, spdy).items()
        for method in methods
    }


# ---------------------------------------------------------------------- tables


def accuracy_rows(
    found: Mapping[tuple[str, ...], Metrics], keys: Mapping[str, Sequence[tuple[str, ...]]], cost: Cost, net: nn.Module
) -> str:
    """A table of test accuracies, with sparsities and costs as the runs ended."""
    names = [e.name for e in select(net) if not e.reason]
    lines = ["| network | test accuracy, mean | spread | each seed | sparsity | cost |", "| --- " * 6 + "|"]
    for name, of_row in keys.items():
        runs = [found[one] for one in of_row if one in found]
        if not runs:
            continue
        tested = [100 * m["test/acc"] for m in runs]
        spread = f"{statistics.stdev(tested):.2f}" if len(tested) > 1 else ""
        total = runs[0].get("sparsity/total", 0.0)
        shares = {layer: ended(runs[0], layer) for layer in names}
        lines.append(
            f"| {name} | {statistics.mean(tested):.2f} % | {spread} | {', '.join(f'{t:.2f}' for t in tested)} "
            f"| {total:.4f} | {cost(shares):.4f} |"
        )
    return "\n".join(lines)


def ended(metrics: Metrics, layer: str) -> float:
    """The sparsity of a layer at the end of a run, whose module has longer names."""
    return next((v for k, v in metrics.items() if k.startswith("sparsity/") and k.endswith(f".{layer}")), 0.0)


def step_of(shares: Mapping[str, float]) -> Callable[[], None]:
    """A training step of 784-1000x3-10 with storage "sparse" and these sparsities."""
    torch.manual_seed(0)
    net, method = wide(), Static(distribution=dict(shares), storage="sparse", print_plan=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-6, momentum=0.9)
    sparsify(method, net, optimizer, 10**6)
    x, y = torch.randn(BATCH, *SHAPE), torch.randint(10, (BATCH,))

    def step() -> None:
        loss: Tensor = nn.functional.cross_entropy(net(x), y)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def step_table(budgets: Sequence[float], cost: Cost, readings: int) -> str:
    """Measured times of whole training steps beside those of the table."""
    lines = ["| budget | allocation | by the table | a step, ms | of dense |", "| --- " * 5 + "|"]
    for budget in budgets:
        torch.manual_seed(0)
        net = wide()
        shares = {
            name: shares_of(net, known, sparsity_within(net, known, budget, cost)) for name, known in NAMES.items()
        }
        shares["Spdy"] = Spdy(budget, str(TIMES)).shares(net, select(net))
        steps = [step_of(dict.fromkeys(shares["Spdy"], 0.0)), *map(step_of, shares.values())]
        dense, *times = milliseconds(steps, readings)
        for (name, found), ms in zip(shares.items(), times, strict=True):
            lines.append(f"| {budget:g} | {name} | {cost(found):.3f} | {ms:.2f} | {ms / dense:.3f} |")
    return "\n".join(lines)


def text(flops: str, steps: str, times: str, rows: Rows, layers: str) -> str:
    """The whole file."""
    return f"""# Sparsities by layer at equal cost

Written by `python benchmarks/allocation.py --root FOLDER`. Python {platform.python_version()}, torch {torch.__version__},
{platform.machine()}, one thread. Seeds from 0; the last network is tested. Spread is the standard deviation over seeds, in points.
Sparsity and cost are those of the first seed's network as it ended; of uniform and ERK the smallest sparsity (in thousandths) within
the budget is taken.

## ResNet-20 at equal FLOPs

`python train.py {" ".join(RESNET20)}` with the overrides below: the setting of
channels.py, with images pooled to 14 x 14 (pooled_images.py). Cost is the share of the dense FLOPs of a forward pass.

{flops}

## 784-1000x3-10 at equal step time

`python train.py {" ".join(MLP)}` with the overrides below. Cost is the share of the dense time of all layers, by a table of times:

{layers}

{times}

Whole training steps of these networks, measured in turn:

{steps}

## Overrides

{chr(10).join(f"- {name}: `{' '.join(row)}`" for name, row in rows.items())}
"""


def main() -> None:
    parser = options_of_runs(__doc__, ROOT / "benchmarks" / "results" / "allocation.md")
    parser.add_argument("--readings", type=int, default=READINGS, help="of each time, of which the median is taken")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides of every run, for a trial")
    given = parser.parse_args()
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    out, root = given.out.absolute(), Path(given.root).absolute()
    with tempfile.TemporaryDirectory() as temporary:
        kept, said = (given.runs or Path(temporary)).absolute(), list[str]()
        os.chdir(ROOT)
        if not (given.go_on and TIMES.exists()):
            table = measured_times(wide(), "784-1000x3-10", BATCH, SHAPE, repeats=given.readings, report=said.append)
            table.save(TIMES)
        flops, times = flops_of(resnet20(POOLED, 10)), time_of(TimeTable.load(TIMES))
        convolutional = {"dense": ("method=none",)} | {**rows_of(resnet20(POOLED, 10), FLOP_BUDGETS, flops, METHODS)}
        timed = rows_of(wide(), TIME_BUDGETS, times, ("rigl",), f",cost:'{TIMES}'")
        keys = {
            name: [(*words(name, seed, convolutional, RESNET20), *given.more) for seed in range(given.seeds)]
            for name in convolutional
        }
        timed_keys = {
            name: [(*row, *MLP, f"seed={s}", *given.more) for s in range(given.seeds)] for name, row in timed.items()
        }
        todo = [one for of_row in (*keys.values(), *timed_keys.values()) for one in of_row]
        figures, found = figures_of(given, out), dict[tuple[str, ...], Metrics]()
        for one, metrics in results(todo, str(root), kept, given.jobs, figures):
            found[one] = metrics
            print(f"{len(found)} of {len(todo)}: {100 * metrics['test/acc']:.2f} % {' '.join(one)}", flush=True)
        written = text(
            accuracy_rows(found, keys, flops, resnet20(POOLED, 10)),
            step_table(TIME_BUDGETS, times, given.readings),
            accuracy_rows(found, timed_keys, times, wide()),
            {**convolutional, **timed},
            "\n".join(f"- {line}" for line in said) or "(measured by an earlier call)",
        )
    out.write_text(written)


if __name__ == "__main__":
    main()
