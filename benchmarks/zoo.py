"""Slims 86 models of timm, transformers, segmentation-models-pytorch and torchvision, with torch-pruning beside it.

    pip install -e ".[all]" && pip install timm transformers segmentation-models-pytorch "torch-pruning>=1.6.1,<1.7"
    python benchmarks/zoo.py                                          # all of them, into benchmarks/results/zoo.md and zoo.json
    python benchmarks/zoo.py --models 'timm/*' smp/unet-resnet18 --out some/file.md

Half of the units of each open group of channels are masked and removed, and the outputs compared in float64; the tables say
what is left, what it costs, and what stays for which reason. Every model runs in a process of its own with one thread and with
limits of time and memory. A choice of models is printed, and written only with `--out`.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from pathlib import Path

import torch
from zoo_parts import page, processes
from zoo_parts.memory import limit_memory
from zoo_parts.models import MAKERS, built, chosen
from zoo_parts.stages import SIDES, measured

RESULTS = Path(__file__).parent / "results" / "zoo.md"


def measure_one(name: str, sides: list[str], memory: float) -> None:
    """Measure one model in this process; each side prints its row as a line of JSON."""
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    limit_memory(memory)
    for side, row in measured(lambda: built(name), sides):
        print(json.dumps({side: row}), flush=True)


def measure(names: list[str], given: argparse.Namespace, out: Path | None) -> None:
    """Measure models, and write the tables after each of them.

    Args:
        names: names of the models.
        given: the options.
        out: the file of the tables; None for the screen alone.

    Raises:
        SystemExit: a slim network does not compute what the masked one does.
    """
    source = page.source(sys.argv[1:])
    rows, begun = [], time.perf_counter()
    for row in processes.all_rows(names, given.jobs, given.seconds, given.memory, Path(__file__)):
        rows = sorted([*rows, row], key=lambda r: names.index(r["name"]))
        head = f"{len(rows)} of {len(names)}, {time.perf_counter() - begun:.0f} s:"
        print(head, json.dumps(page.rounded(row)), flush=True)
        if out is not None:
            page.write(rows, source, out)
    print(page.text(rows, source))
    wrong = [row["name"] for row in rows if not row["ours"].get("equal", True)]
    if wrong:
        sys.exit(f"not equal: {', '.join(wrong)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="GLOB", help="names such as 'timm/*'; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, help="the page that is written, with a .json beside it")
    parser.add_argument("--seconds", type=float, default=300, help="limit of each side of a model")
    parser.add_argument("--memory", type=float, default=12, help="limit of each process, in GiB")
    parser.add_argument("--one", choices=MAKERS, metavar="NAME", help="measure one model in this process, for its JSON")
    parser.add_argument("--sides", nargs="+", choices=SIDES, default=list(SIDES), help="of --one")
    given = parser.parse_args()
    if given.one:
        measure_one(given.one, given.sides, given.memory)
        return
    try:
        names = chosen(given.models or ["*"])
    except ValueError as error:
        parser.error(str(error))
    measure(names, given, given.out or (None if given.models else RESULTS))


if __name__ == "__main__":
    main()
