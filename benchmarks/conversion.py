"""Measures `convert`: the accuracy of ResNet-20 made 2:4 without training, from a dense and from an unstructured network.

    python benchmarks/conversion.py --root FOLDER --jobs 2 --runs KEPT

FOLDER holds torchvision's files. Two networks a seed are trained by `train.py` in the setting of `accuracy.py --table patterns`;
with `--runs KEPT` they are kept and not trained again. Then each is converted in every way, on the first batches of its training
data. Writes benchmarks/results/conversion.md.
"""

import platform
import shlex
import statistics
import tempfile
from collections.abc import Iterable, Iterator
from itertools import islice, product
from pathlib import Path
from typing import Any

import torch
from accuracy import RESNET20
from omegaconf import OmegaConf
from torch import nn
from training_runs import ROOT, Figures, folder_of, options_of_runs, results

from sparse_callbacks import convert, recalibrate_batchnorm
from sparse_callbacks.core.machine import processor
from sparse_callbacks.tasks import build, run_data

NETWORKS = {"dense": "method=none", "50 % unstructured (GMP)": "method=gmp sparsity=0.5"}
PATTERNS = ("2:4", "transposable 2:4")
FITS = {"the masked weights": "masked", "absorbed means": "absorbed", "AdaPrune": "adaprune"}
BATCHES = 4

Row = tuple[str, str, str, bool]
"""Network, pattern, fit, and whether norms are estimated anew."""


def trained(folder: Path) -> tuple[nn.Module, list[Any], Iterable[Any]]:
    """The network of a run, batches of its training data, and its test data."""
    cfg: Any = OmegaConf.load(folder / ".hydra" / "config.yaml")
    data = run_data.build_data(cfg)
    module = build.build_module(cfg, data)
    saved = torch.load(folder / "checkpoints" / "last.ckpt", map_location="cpu", weights_only=False)
    module.load_state_dict(saved["state_dict"])
    data.prepare_data()
    data.setup("fit")
    batches = list(islice(iter(data.train_dataloader()), BATCHES))
    data.setup("test")
    return module.model.eval(), batches, data.test_dataloader()


@torch.no_grad()
def accuracy(model: nn.Module, data: Iterable[Any]) -> float:
    """Percent of the test images."""
    right = [model(images).argmax(1) == labels for images, labels in data]
    return 100 * float(torch.cat(right).float().mean())


def rows_of(name: str, folder: Path) -> Iterator[tuple[Row, float]]:
    """Every conversion of a trained network, with its test accuracy; first that of the network itself."""
    model, batches, test = trained(folder)
    yield (name, "", "as it is", False), accuracy(model, test)
    for pattern, (way, fit) in product(PATTERNS, FITS.items()):
        made, _ = convert(model, pattern, data=batches, fit=fit, norms=False)
        yield (name, pattern, way, False), accuracy(made, test)
        recalibrate_batchnorm(made, batches)
        yield (name, pattern, way, True), accuracy(made, test)


def table(found: dict[Row, list[float]]) -> str:
    lines = [
        "| network | pattern | weights | norms | test accuracy, mean | spread | each seed |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (name, pattern, way, anew), values in found.items():
        spread = f"{statistics.stdev(values):.2f}" if len(values) > 1 else ""
        each = ", ".join(f"{v:.2f}" for v in values)
        norms = "" if not pattern else "estimated anew" if anew else "as they were"
        lines.append(f"| {name} | {pattern} | {way} | {norms} | {statistics.mean(values):.2f} % | {spread} | {each} |")
    return "\n".join(lines)


def text(found: dict[Row, list[float]]) -> str:
    """The whole file."""
    rows = "` and `".join(NETWORKS.values())
    return f"""# A trained ResNet-20 made 2:4

Written by `python benchmarks/conversion.py --root FOLDER`. Python {platform.python_version()}, torch {torch.__version__},
{processor()}, one thread.

`python train.py {RESNET20}`
with `{rows}`, then `convert` on {BATCHES} batches of training images, without training. The first and the last layer stay dense,
and damping is the default of `convert`. The spread is the standard deviation over seeds, in points.

{table(found)}
"""


def main() -> None:
    parser = options_of_runs(__doc__, ROOT / "benchmarks" / "results" / "conversion.md")
    given = parser.parse_args()
    torch.set_num_threads(1)
    shared = shlex.split(RESNET20)
    names = {
        (*shlex.split(own), *shared, f"seed={seed}"): name
        for seed in range(given.seeds)
        for name, own in NETWORKS.items()
    }
    found: dict[Row, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        kept = (given.runs or Path(temporary)).absolute()
        # the networks are needed, so figures of earlier calls are of no use
        figures = Figures(Path(temporary) / "runs.json")
        ended = dict(results(list(names), str(Path(given.root).absolute()), kept, given.jobs, figures))
        for words, name in names.items():
            assert words in ended
            for row, value in rows_of(name, folder_of(words, kept)):
                found.setdefault(row, []).append(value)
                print(f"{value:.2f} % {' '.join(map(str, row))} {words[-1]}", flush=True)
            given.out.write_text(text(found))


if __name__ == "__main__":
    main()
