"""Slims 86 models of timm, transformers, segmentation-models-pytorch and torchvision, with torch-pruning beside it.

    pip install -e ".[all]" && pip install timm transformers segmentation-models-pytorch "torch-pruning>=1.6.1,<1.7"
    python benchmarks/zoo.py                                          # all of them, into benchmarks/results/zoo.md and zoo.json
    python benchmarks/zoo.py --models 'timm/*' smp/unet-resnet18 --out some/file.md

Half of the units of each open group are masked and removed, and the outputs compared in float64; the tables say what is left,
what it costs, and what stays for which reason. Every model runs in a process of its own with one thread and with limits of
time and memory. Without `--out` a choice of models is printed and not written.
"""

import argparse
import json
import logging
import sys
import time
import warnings
from pathlib import Path

from zoo_parts import page, processes
from zoo_parts.models import MAKERS, built, chosen

RESULTS = Path(__file__).parent / "results" / "zoo.md"


def measure_one(name: str, stages: list[str], memory: float) -> None:
    """Measure one model in this process; each stage prints its row as a line of JSON."""
    import torch

    from zoo_parts.measure import stages as measured

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    processes.limit_memory(memory)
    for stage, row in measured(lambda: built(name), stages):
        print(json.dumps({stage: row}), flush=True)


def measure(names: list[str], jobs: int, seconds: float, memory: float, out: Path | None) -> None:
    """Measure models and write the tables after each of them."""
    source = f"Written by `{command()}` on {page.machine()}; {page.versions()}."
    rows, order = [], {name: place for place, name in enumerate(names)}
    begun = time.perf_counter()
    for row in processes.all_rows(names, jobs, seconds, memory, Path(__file__)):
        rows = sorted([*rows, row], key=lambda r: order[r["name"]])
        print(f"{len(rows)} of {len(names)}, {time.perf_counter() - begun:.0f} s: {json.dumps(page.rounded(row))}", flush=True)
        if out is not None:
            page.write(rows, source, out)
    print(page.text(rows, source))


def command() -> str:
    """The command as it was given, without the file that is written."""
    words = sys.argv[1:]
    if "--out" in words:
        place = words.index("--out")
        words = [*words[:place], *words[place + 2 :]]
    return " ".join(["python benchmarks/zoo.py", *words])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", metavar="GLOB", help="names such as 'timm/*'; all by default")
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--out", type=Path, help="the page that is written, with a .json beside it")
    parser.add_argument("--seconds", type=float, default=300, help="limit of each side of a model")
    parser.add_argument("--memory", type=float, default=12, help="limit of each process, in GiB")
    parser.add_argument("--one", choices=list(MAKERS), help=argparse.SUPPRESS)
    parser.add_argument("--stages", nargs="+", choices=processes.STAGES, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return measure_one(given.one, given.stages or list(processes.STAGES), given.memory)
    try:
        names = chosen(given.models or ["*"])
    except ValueError as error:
        parser.error(str(error))
    out = given.out or (None if given.models else RESULTS)
    return measure(names, given.jobs, given.seconds, given.memory, out)


if __name__ == "__main__":
    main()
