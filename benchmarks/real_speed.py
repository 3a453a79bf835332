"""Measures what truly sparse storage gains: time, memory, accuracy, and other packages beside it.

    pip install -e ".[all]" sparselab==0.2.2
    python benchmarks/real_speed.py                                   # every part that needs no files
    python benchmarks/real_speed.py --parts accuracy --data FOLDER     # FOLDER as `data.root` of train.py
    python benchmarks/real_speed.py --parts set_mlp --set-mlp FOLDER   # a checkout of the public SET-MLP code
    python benchmarks/real_speed.py --parts largest --neurons 100000000

Figures are kept in benchmarks/results/real_speed.json, each part with its command and machine; the tables
(benchmarks/results/real_speed.md), the blocks of docs/real_speed.md and its picture are written from them after each
part, and by `--parts page` alone. A part that is measured again replaces its figures; `steps` with a choice of networks,
sparsities or optimizers replaces theirs, and so does `updates` with a choice of widths. One thread, CPU time of the
process, interleaved rounds.
"""

import argparse
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from real_speed_parts import accuracy, layers, memory, page, peers, report, steps, updates
from real_speed_parts.networks import NETWORKS, OPTIMIZERS, STORAGES


def measured(part: str, chosen: argparse.Namespace) -> list[dict[str, Any]]:
    """The rows of a part, printed while they come."""
    rounds, storages = chosen.rounds, tuple(chosen.storages)
    found = {
        "steps": lambda: steps.measure(chosen.networks, chosen.sparsities, chosen.optimizers, storages, rounds),
        "updates": lambda: updates.measure(chosen.widths, rounds),
        "layers": lambda: layers.measure(rounds),
        "memory": lambda: memory.measure(chosen.networks),
        "differences": lambda: memory.differences(),
        "set_mlp": lambda: peers.measure_set_mlp(chosen.set_mlp, rounds),
        "accuracy": lambda: accuracy.measure(chosen.data, chosen.seeds, chosen.epochs),
        "largest": lambda: memory.largest(chosen.neurons),
    }[part]()
    rows = []
    for row in found:
        print(part, row, flush=True)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=[*report.PARTS, "page"], default=list(report.BY_ITSELF))
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--sparsities", nargs="+", type=float, default=list(steps.SPARSITIES))
    parser.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    parser.add_argument("--storages", nargs="+", choices=STORAGES, default=list(STORAGES))
    parser.add_argument("--widths", nargs="+", type=int, default=list(updates.WIDTHS), help="of the part `updates`")
    parser.add_argument("--rounds", type=int, default=7, help="measured rounds, after one that warms up")
    parser.add_argument(
        "--set-mlp", type=Path, help="a checkout of github.com/SelimaC/large-scale-sparse-neural-networks"
    )
    parser.add_argument("--data", type=Path, help="the folder of torchvision's Fashion-MNIST and tabular/Isolet.mat")
    parser.add_argument("--seeds", type=int, default=3, help="of the part `accuracy`")
    parser.add_argument("--epochs", type=int, default=5, help="of the part `accuracy`")
    parser.add_argument("--neurons", type=int, default=10_000_000, help="of the part `largest`")
    parser.add_argument("--out", type=Path, default=report.RESULTS, help="the file of figures; tables lie beside it")
    chosen = parser.parse_args()
    for part, option in (("set_mlp", "set_mlp"), ("accuracy", "data")):
        if part in chosen.parts and getattr(chosen, option) is None:
            parser.error(f"--parts {part} needs --{option.replace('_', '-')} FOLDER")
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):  # which of them speaks depends on what is installed
        logging.getLogger(name).setLevel(logging.ERROR)
    figures = report.read(chosen.out)
    for part in chosen.parts:
        if part != "page":
            report.take(figures, part, measured(part, chosen))
            report.write(figures, chosen.out)
    report.write(figures, chosen.out)
    if chosen.out == report.RESULTS:
        page.write(figures)


if __name__ == "__main__":
    main()
