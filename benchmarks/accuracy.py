"""Test accuracy of every method over several seeds, on digits: one table a setting, with mean and range.

    python benchmarks/accuracy.py

Each run is `python train.py` with the overrides that stand above the table.
"""

import argparse
import contextlib
import io
import logging
import statistics
import tempfile
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir

from train import train

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("none", "static", "set", "snfs", "rigl", "gmp")
SETTINGS = {
    "The default network (64-256-256-10), 90 % zeros": ["sparsity=0.9"],
    "LeNet-300-100, 98 % zeros in every layer": ["experiment=lenet_300_100_digits"],
}


def accuracy(method: str, overrides: Sequence[str], seed: int, folder: Path) -> dict[str, float]:
    """Metrics of one run; nothing of it is printed."""
    dense = ["sparsity=null", "~method.distribution"] if method == "none" else []
    kept = [o for o in overrides if method != "none" or not o.startswith("sparsity=")]
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        cfg = compose(
            "train",
            [f"method={method}", *kept, f"seed={seed}", "logger=[]", "trainer.enable_progress_bar=false", f"output_dir={folder}"]
            + (dense if any(o.startswith("experiment=") for o in kept) else []),
        )
    with contextlib.redirect_stdout(io.StringIO()):
        return train(cfg)


def table(title: str, overrides: Sequence[str], seeds: int) -> str:
    lines = [
        f"## {title}",
        "",
        f"`python train.py {' '.join(overrides)} method=...`, {seeds} seeds; the last network is tested.",
        "",
        "| method | test accuracy, mean | range | zeros |",
        "| --- | --- | --- | --- |",
    ]
    for method in METHODS:
        with tempfile.TemporaryDirectory() as folder:
            runs = [accuracy(method, overrides, seed, Path(folder) / str(seed)) for seed in range(seeds)]
        found = [100 * r["test/acc"] for r in runs]
        zeros = f"{100 * runs[0]['sparsity/total']:.2f} %"
        lines.append(f"| {method} | {statistics.mean(found):.2f} % | {min(found):.2f} to {max(found):.2f} % | {zeros} |")
        print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results" / "accuracy.md")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)  # the same sums, in the same order, on every machine of one kind
    head = (
        "# Accuracy on scikit-learn's digits\n\n1,797 images, one fixed split (450 test images, so 0.22 points an image). "
        "Written by `python benchmarks/accuracy.py`."
    )
    tables = [table(title, overrides, arguments.seeds) for title, overrides in SETTINGS.items()]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text("\n\n".join([head, *tables]) + "\n")


if __name__ == "__main__":
    main()
