"""Measures SMCP on ResNet-20: accuracy under budgets of FLOPs, and times of the slim networks.

The data is Fashion-MNIST, and masks are soft or hard (see hard_masks.py).

    python benchmarks/channels.py --root FOLDER --jobs 2 --runs KEPT

FOLDER holds torchvision's files. Each run is `python train.py` with the overrides of its row; with `--runs KEPT`
finished runs are kept and not repeated. Then the slim network of every budget is timed beside the dense one, as it is,
in channels_last, and in onnxruntime, and a budget of measured latency is put to the test: a table is measured, a
network trained under it and slimmed, and its time compared. The times mean something on an idle machine only. Writes
benchmarks/results/channels.md.
"""

import copy
import platform
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path

import onnxruntime
import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from training_runs import ROOT, Metrics, Words, figures_of, folder_of, options_of_runs, results

from sparse_callbacks import SMCP, export_onnx, load_compact, slim
from sparse_callbacks.channels.latency.measure import measure
from sparse_callbacks.tasks.models import resnet20

SHAPE, BUDGETS = (1, 28, 28), (0.5, 0.3)
SHARED = (
    "model=resnet20", "data=fashion_mnist", "data.batch_size=128", "optim.lr=0.1", "trainer.max_epochs=4", "trainer.limit_train_batches=0.5"
)  # fmt: skip
ROWS = {"dense": ("method=none",)} | {
    f"{kind}, {budget:g}": ("method=smcp", "method.round_to=4", f"method.budget={budget:g}", "slim=true", *target)
    for budget in BUDGETS
    for kind, target in (
        ("soft masks", ()),
        ("soft (magnitude) masks", ("method.importance=magnitude",)),
        ("hard masks", ("method._target_=hard_masks.HardSMCP",)),
        ("hard, weights kept and gradients masked", ("method._target_=hard_masks.FrozenSMCP",)),
    )
}  # fmt: skip
LATENCY_BUDGETS = (0.8, 0.65, 0.5)
READINGS = 41


Rows = Mapping[str, tuple[str, ...]]
"""Overrides of each row by its name."""


def words(name: str, seed: int, rows: Rows = ROWS, shared: Words = SHARED) -> Words:
    return (*rows[name], *shared, f"seed={seed}")


def chosen(rows: Rows, globs: Sequence[str]) -> Rows:
    """The dense network, and the rows whose name one of the globs fits."""
    return {n: own for n, own in rows.items() if n == "dense" or any(fnmatchcase(n, glob) for glob in globs)}


def accuracy_table(found: Mapping[Words, Metrics], seeds: int, rows: Rows = ROWS, shared: Words = SHARED) -> str:
    lines = [
        "| network | test accuracy, mean | spread | each seed | slim, mean | FLOPs left | parameters left | largest "
        "difference |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name in rows:
        of_row = [words(name, seed, rows, shared) for seed in range(seeds)]
        runs = [found[one] for one in of_row if one in found]
        if not runs:
            continue
        tested = [100 * m["test/acc"] for m in runs]
        spread = f"{statistics.stdev(tested):.2f}" if len(tested) > 1 else ""
        row = f"| {name} | {statistics.mean(tested):.2f} % | {spread} | {', '.join(f'{t:.2f}' for t in tested)} |"
        if "slim/flops_share" in runs[0]:
            row += f" {100 * statistics.mean(m['slim/test/acc'] for m in runs):.2f} %"
            for key in ("slim/flops_share", "slim/parameters_share"):
                row += " | " + ", ".join(f"{m[key]:.4f}" for m in runs)
            row += f" | {max(m['slim/difference'] for m in runs):.1e} |"
        else:
            row += " | 1 | 1 | |"
        lines.append(row)
    return "\n".join(lines)


# ---------------------------------------------------------------------- times


def interleaved(calls: Mapping[str, Callable[[], object]]) -> dict[str, list[float]]:
    """Milliseconds of each call, taken in turn so that a slow moment of the machine hits all of them."""
    for call in calls.values():
        call()
    found: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(READINGS):
        order = [*calls][turn % len(calls) :] + [*calls][: turn % len(calls)]
        for name in order:
            begun = time.perf_counter()
            calls[name]()
            found[name].append(1e3 * (time.perf_counter() - begun))
    return found


def forms(model: nn.Module, x: Tensor, folder: Path, name: str) -> dict[str, Callable[[], object]]:
    """The network as it is, in channels_last, and in onnxruntime."""
    model = model.eval()
    last, x_last = copy.deepcopy(model).to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    export_onnx(model, folder / f"{name}.onnx", x)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(folder / f"{name}.onnx", options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.numpy()}
    return {
        "eager": lambda: model(x),
        "channels_last": lambda: last(x_last),
        "onnxruntime": lambda: session.run(None, feed),
    }


@torch.inference_mode()
def latency_table(models: Mapping[str, nn.Module], folder: Path, shape: tuple[int, ...] = SHAPE) -> str:
    """Times of dense and slim networks in three forms, for images of `shape`."""
    head = "| batch | network | eager, ms | of dense | channels_last, ms | of dense | onnxruntime, ms | of dense |"
    lines = [head, "| --- |" + " --- |" * 7]
    for batch in (1, 32):
        x = torch.randn(batch, *shape)
        each = {name: forms(model, x, folder, f"m{i}-{batch}") for i, (name, model) in enumerate(models.items())}
        cells: dict[str, list[str]] = {name: [] for name in models}
        for form in ("eager", "channels_last", "onnxruntime"):
            times = interleaved({name: calls[form] for name, calls in each.items()})
            for name in models:
                ratios = [a / b for a, b in zip(times[name], times["dense"], strict=True)]
                low, middle, high = statistics.quantiles(ratios)
                share = "1" if name == "dense" else f"{middle:.2f} ({low:.2f} to {high:.2f})"
                cells[name] += [f"{statistics.median(times[name]):.2f}", share]
        lines += [f"| {batch} | {name} | {' | '.join(row)} |" for name, row in cells.items()]
    return "\n".join(lines)


# ---------------------------------------------------------------------- a budget of measured time


class Noise(pl.LightningModule):
    """ResNet-20 on random images: which channels stay does not matter for the time, how many does."""

    def __init__(self) -> None:
        super().__init__()
        self.net = resnet20(SHAPE, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def budget_table(folder: Path, batch: int = 32) -> str:
    """Budgets of latency: the time of each network solved for, by the table and measured."""
    said: list[str] = []
    table = measure(resnet20(SHAPE, 10), "resnet20", batch, SHAPE, report=said.append)
    table.save(folder / "table.json")
    lines = ["| budget | by the table | measured (quartiles) | off by |", "| --- | --- | --- | --- |"]
    data = torch.utils.data.TensorDataset(torch.randn(320, *SHAPE), torch.randint(10, (320,)))
    for budget in LATENCY_BUDGETS:
        torch.manual_seed(0)
        options = {"round_to": 4, "every": 1, "start": 1, "stop": 8, "prune_stem": True, "print_plan": False}
        module, method = Noise(), SMCP(budget, cost=str(folder / "table.json"), **options)
        trainer = pl.Trainer(
            max_steps=10, callbacks=[method], accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
            enable_checkpointing=False,
        )  # fmt: skip
        trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=32))
        x = torch.randn(batch, *SHAPE)
        small, _ = slim(module.net, {n.removeprefix("net."): m for n, m in method.masks.items()}, x[:2])
        dense, small = resnet20(SHAPE, 10).eval(), small.eval()
        with torch.inference_mode():
            times = interleaved({"dense": partial(dense, x), "slim": partial(small, x)})
        ratios = [a / b for a, b in zip(times["slim"], times["dense"], strict=True)]
        low, middle, high = statistics.quantiles(ratios)
        by_table = method.network.realised(method.kept) / method.network.dense
        lines.append(
            f"| {budget:g} | {by_table:.3f} | {middle:.3f} ({low:.3f} to {high:.3f}) | "
            f"{100 * (middle / by_table - 1):+.1f} % |"
        )
    fit = next(line for line in reversed(said) if line.startswith("the model as"))
    return "\n".join([f"Batch {batch}; {fit}.", "", *lines])


# ---------------------------------------------------------------------- the file


def slim_models(kept: Path) -> dict[str, nn.Module]:
    """The dense network and those of the first seed's runs with soft masks."""
    models: dict[str, nn.Module] = {"dense": resnet20(SHAPE, 10).eval()}
    for budget in BUDGETS:
        path = folder_of(words(f"soft masks, {budget:g}", 0), kept) / "slim.safetensors"
        if path.exists():
            models[f"budget {budget:g}"] = load_compact(resnet20(SHAPE, 10), path).eval()
    return models


def text(accuracies: str, times: str, budgets: str, rows: Rows) -> str:
    """The whole file."""
    return f"""# Channels of ResNet-20 under a budget

Written by `python benchmarks/channels.py --root FOLDER`. Python {platform.python_version()}, torch {torch.__version__}, onnxruntime
{onnxruntime.__version__}, {platform.machine()}, one thread.

## Accuracy on Fashion-MNIST

`python train.py {" ".join(SHARED)}`
with the overrides below and seeds from 0; the last network is tested. 55,000 training images, of which an epoch sees half; 5,000
validate. Spread is the standard deviation over seeds, in points. Budgets are shares of the dense FLOPs, met by the masked network as
solved; the slim network has the dead channels removed. Hard masks: what is pruned learns nothing and never comes back. With
weights kept and gradients masked it learns nothing, and may come back by the importance of the weights that it had
(`benchmarks/hard_masks.py`). Importance is Taylor's, except where magnitudes are said.

{accuracies}

{chr(10).join(f"- {name}: `{' '.join(row)}`" for name, row in rows.items())}

## Time of the slim networks

Seed 0, soft masks. A forward pass, median of {READINGS} readings; ratios are taken reading by reading against the dense network in the
same form, with quartiles.

{times}

## A budget of measured latency

The network is trained for ten steps on random images under a table that was measured just before, slimmed and timed (eager).

{budgets}
"""


def main() -> None:
    parser = options_of_runs(__doc__, ROOT / "benchmarks" / "results" / "channels.md")
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs on the names of rows; 'dense' always runs")
    given = parser.parse_args()
    rows = chosen(ROWS, given.rows)
    torch.set_num_threads(1)
    figures, found = figures_of(given, given.out), dict[Words, Metrics]()
    with tempfile.TemporaryDirectory() as temporary:
        kept = (given.runs or Path(temporary)).absolute()
        todo = [words(name, seed) for seed in range(given.seeds) for name in rows]
        for one, metrics in results(todo, str(Path(given.root).absolute()), kept, given.jobs, figures):
            found[one] = metrics
            print(f"{len(found)} of {len(todo)}: {100 * metrics['test/acc']:.2f} % {' '.join(one)}", flush=True)
        folder = Path(temporary)
        times, budgets = latency_table(slim_models(kept), folder), budget_table(folder)
    given.out.write_text(text(accuracy_table(found, given.seeds, rows), times, budgets, rows))


if __name__ == "__main__":
    main()
