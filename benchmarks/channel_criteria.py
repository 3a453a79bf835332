"""Measures the criteria of ChannelPruning on ResNet-20: accuracy under budgets of FLOPs, and times of the slim networks.

    python benchmarks/channel_criteria.py --root FOLDER --jobs 2 --runs KEPT

The setting is that of channels.py with images pooled to 14 x 14 and half as many steps: Fashion-MNIST, equal epochs for every
row, and FOLDER holds torchvision's files. Each criterion has the ranking of its paper. With `--runs KEPT` finished runs are
kept and not repeated. `--rows 'l1*'` runs some rows alone, and `--more trainer.max_epochs=1` changes all of them, to see that
everything works.
Then the slim network of every row is timed beside the dense one, which means something on an idle machine only. Writes
benchmarks/results/channel_criteria.md.
"""

import platform
import tempfile
from pathlib import Path

import onnxruntime
import torch
from channels import BUDGETS, READINGS, SHARED, Rows, accuracy_table, chosen, latency_table, words
from torch import nn
from training_runs import ROOT, Metrics, Words, figures_of, folder_of, options_of_runs, results

from sparse_callbacks import load_compact
from sparse_callbacks.core.machine import processor
from sparse_callbacks.tasks.models import resnet20

SHAPE = (1, 14, 14)
SETTING = (
    *(word for word in SHARED if "limit_train_batches" not in word),
    "data._target_=pooled_images.halved",
    "trainer.limit_train_batches=0.25",
)
PRUNING = ("method=channels", "method.round_to=4", "slim=true")
# with the ranking of the paper, or what its scores are made for; bn_gain is bound to a penalty on gains
CRITERIA = {
    "random": "layer",
    "l1": "layer",
    "l2": "layer",
    "taylor_2017": "global",
    "taylor_fo": "global",
    "sosp": "global",
    "bn_gain": "global",
}
# between warm-up and cool-down, where the ramps of the other rows are halfway
ONCE = ("method.start=0.4", "method.stop=0.4")


def row(criterion: str, ranking: str, budget: float, *more: str) -> tuple[str, ...]:
    chosen = (f"method.criterion={criterion}", f"method.ranking={ranking}", f"method.budget={budget:g}")
    return (*PRUNING, *chosen, *more)


ROWS: Rows = {
    "dense": ("method=none",),
    **{f"{name}, {budget:g}": row(name, ranking, budget) for budget in BUDGETS for name, ranking in CRITERIA.items()},
    "ispasp, at once, 0.5": row("ispasp", "layer", 0.5, *ONCE),
    "l1, at once, 0.5": row("l1", "layer", 0.5, *ONCE),
    "l1, knapsack, 0.5": row("l1", "knapsack", 0.5),
    "taylor_fo, knapsack, 0.5": row("taylor_fo", "knapsack", 0.5),
}


def slim_networks(kept: Path, rows: Rows, shared: Words) -> dict[str, nn.Module]:
    """The dense network and those of the first seed's runs."""
    models: dict[str, nn.Module] = {"dense": resnet20(SHAPE, 10).eval()}
    for name in rows:
        path = folder_of(words(name, 0, rows, shared), kept) / "slim.safetensors"
        if path.exists():
            models[name] = load_compact(resnet20(SHAPE, 10), path).eval()
    return models


def text(accuracies: str, times: str, rows: Rows, shared: Words) -> str:
    """The whole file."""
    return f"""# Criteria for channels of ResNet-20 under a budget

Written by `python benchmarks/channel_criteria.py --root FOLDER`. Python {platform.python_version()}, torch {torch.__version__}, onnxruntime
{onnxruntime.__version__}, {processor()}, one thread.

## Accuracy on Fashion-MNIST

`python train.py {" ".join(shared)}`
with the overrides below and seeds from 0; the last network is tested. Images are pooled to 14 x 14 (`benchmarks/pooled_images.py`).
55,000 training images, of which an epoch sees a quarter; 5,000 validate. Spread is the standard deviation over seeds, in points.
Budgets are shares of the dense FLOPs, met by the masked network as solved; the slim network has the dead channels removed. All rows
train for the same number of epochs, from the same start; channels go along a ramp, or at once where the row says so.

{accuracies}

{chr(10).join(f"- {name}: `{' '.join(overrides)}`" for name, overrides in rows.items())}

## Time of the slim networks

Seed 0. A forward pass of 14 x 14 images, median of {READINGS} readings; ratios are taken reading by reading against the dense
network in the same form, with quartiles.

{times}
"""


def main() -> None:
    parser = options_of_runs(__doc__, ROOT / "benchmarks" / "results" / "channel_criteria.md")
    parser.add_argument("--rows", nargs="+", default=["*"], help="globs on the names of rows; 'dense' always runs")
    parser.add_argument("--more", nargs="*", default=[], help="further overrides of every run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    rows = chosen(ROWS, given.rows)
    shared, figures, found = (*SETTING, *given.more), figures_of(given, given.out), dict[Words, Metrics]()
    todo = [words(name, seed, rows, shared) for seed in range(given.seeds) for name in rows]
    with tempfile.TemporaryDirectory() as temporary:
        kept = (given.runs or Path(temporary)).absolute()
        for one, metrics in results(todo, str(Path(given.root).absolute()), kept, given.jobs, figures):
            found[one] = metrics
            print(f"{len(found)} of {len(todo)}: {100 * metrics['test/acc']:.2f} % {' '.join(one)}", flush=True)
        times = latency_table(slim_networks(kept, rows, shared), Path(temporary), SHAPE)
    given.out.write_text(text(accuracy_table(found, given.seeds, rows, shared), times, rows, shared))


if __name__ == "__main__":
    main()
