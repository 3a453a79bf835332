"""Measures masks of N:M: their time and memory over ResNet-50's weights, and their share of training steps.

    pip install -e ".[all]"
    python benchmarks/pattern_masks.py --rounds 7 --steps 10

All rows take turns in one process with one thread, and the clock is its CPU time. Peaks of memory are of processes of their
own, on Linux. The tables are printed and written to benchmarks/results/pattern_masks.md.
"""

import argparse
import logging
import platform
import statistics
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from interleaved_runs import Net, Run, Workload, in_turns, lightning_run
from overhead import WORKLOADS
from step_limits import peak_of
from torch import Tensor
from torchvision.models import resnet50

from sparse_callbacks import NM, SparsityCallback, Static
from sparse_callbacks.core.machine import processor
from sparse_callbacks.core.nm_masks import in_groups, nm_mask, nm_pattern, out_of_groups, why_not_nm
from sparse_callbacks.core.transposable import transposable_mask

RESULTS = Path(__file__).parent / "results" / "pattern_masks.md"
TWO_OF_FOUR = nm_pattern("transposable 2:4")
NEVER = 10**6  # steps: later than these runs end
QUIET = {"print_plan": False}

Masks = Callable[[Tensor], Tensor]


def by_sort(n: int, m: int) -> Masks:
    """The same masks as `nm_mask` gives, as one writes them at first."""

    def mask(scores: Tensor) -> Tensor:
        groups = in_groups(scores, m)
        taken = groups.sort(dim=-1, descending=True, stable=True).indices[..., :n]
        return out_of_groups(torch.zeros_like(groups, dtype=torch.bool).scatter_(-1, taken, True))

    return mask


MASKS: dict[str, Masks] = {
    "1:4": lambda w: nm_mask(w, 1, 4),
    "2:4": lambda w: nm_mask(w, 2, 4),
    "2:4 by a stable sort of each group": by_sort(2, 4),
    "4:8": lambda w: nm_mask(w, 4, 8),
    "4:8 by a stable sort of each group": by_sort(4, 8),
    "8:16": lambda w: nm_mask(w, 8, 16),
    "transposable 2:4, exact": lambda w: transposable_mask(w, 2, 4),
    "transposable 2:4, greedy": lambda w: transposable_mask(w, 2, 4, method="greedy"),
    "transposable 4:8, greedy": lambda w: transposable_mask(w, 4, 8, method="greedy"),
}
METHODS: dict[str, Callable[[], SparsityCallback]] = {
    "Static 2:4": lambda: Static(pattern="2:4", **QUIET),
    "NM 2:4, no refresh": lambda: NM("2:4", every=NEVER, **QUIET),
    "NM 2:4": lambda: NM("2:4", **QUIET),
    "NM 2:4, soft projection": lambda: NM("2:4", projection="soft", **QUIET),
    "NM transposable 2:4, a refresh in each step": lambda: NM("transposable 2:4", every=1, **QUIET),
}
PLAIN = "no callback"


def magnitudes() -> list[Tensor]:
    """Of ResNet-50's weights that can have every pattern of the table."""
    weights = [p.detach() for p in resnet50().parameters() if p.dim() > 1]
    return [w.abs() for w in weights if w.shape[0] % 16 == 0 and w.shape[1] % 16 == 0]


def mask_times(weights: Sequence[Tensor], rounds: int) -> dict[str, list[float]]:
    """Seconds of all masks in each round."""
    seconds: dict[str, list[float]] = {name: [] for name in MASKS}
    for turn in range(rounds):
        names = list(MASKS)[turn % len(MASKS) :] + list(MASKS)[: turn % len(MASKS)]
        for name in names:
            began = time.process_time()
            for weight in weights:
                MASKS[name](weight)
            seconds[name].append(time.process_time() - began)
    return seconds


def mask_table(weights: Sequence[Tensor], rounds: int) -> str:
    size = sum(w.numel() for w in weights)
    # before anything else has run: each of these processes is forked from this one
    peaks = {name: peak_of(lambda masks=masks: [masks(w) for w in weights]) for name, masks in MASKS.items()}
    idle = peak_of(lambda: None)
    lines = ["| mask | ms (range) | ns a weight | MiB of peak memory |", "| --- | --- | --- | --- |"]
    for name, times in mask_times(weights, rounds).items():
        middle, low, high = (1e3 * f(times) for f in (statistics.median, min, max))
        above = (peaks[name] - idle) / 2**20
        lines.append(f"| {name} | {middle:.0f} ({low:.0f} - {high:.0f}) | {1e6 * middle / size:.1f} | {above:.0f} |")
    largest = max(w.numel() for w in weights) * 4 / 2**20
    return "\n".join([*lines, "", f"{size / 1e6:.1f} M weights; the largest layer takes {largest:.1f} MiB."])


def step_times(workload: Workload, rounds: int, steps: int) -> dict[str, list[float]]:
    """Mean seconds of a step in each round, by run."""
    lengths = [4, *[steps] * rounds]
    runs: dict[str, Run] = {PLAIN: lightning_run(workload, lengths, Net(workload))}
    runs |= {name: lightning_run(workload, lengths, Net(workload), make()) for name, make in METHODS.items()}
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for name, steps_of_round in in_turns(runs, rounds):
        seconds[name].append(statistics.mean(t for t, _ in steps_of_round))
    return seconds


def ratio(a: Sequence[float], b: Sequence[float]) -> str:
    """Median and quartiles of the ratio in each round."""
    low, middle, high = statistics.quantiles((x / y for x, y in zip(a, b, strict=True)), n=4, method="inclusive")
    return f"{middle:.3f} ({low:.3f} to {high:.3f})"


def step_table(seconds: Mapping[str, Sequence[float]]) -> str:
    lines = [
        "| run | ms a step | over the plain step (quartiles) | refreshes, share of the step |",
        "| --- | --- | --- | --- |",
    ]
    unrefreshed = seconds["NM 2:4, no refresh"]
    for name, times in seconds.items():
        middle = statistics.median(times)
        refreshed = name.startswith("NM") and not name.endswith("no refresh")
        share = statistics.median((t - u) / t for t, u in zip(times, unrefreshed, strict=True))
        cells = [name, f"{1e3 * middle:.3g}", ratio(times, seconds[PLAIN]), f"{100 * share:.1f} %" if refreshed else ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def fits(workload: Workload) -> str:
    """Which weights of the network have the pattern, in words."""
    weights = [p for p in workload.network().parameters() if p.dim() > 1]
    assert TWO_OF_FOUR is not None
    without = sum(bool(why_not_nm(tuple(p.shape), TWO_OF_FOUR)) for p in weights)
    return f"{len(weights) - without} of {len(weights)} weights divide into tiles of four."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument(
        "--steps", type=int, default=10, help="steps of the large MLP in a round; ResNet-20 makes a fifth"
    )
    parser.add_argument("--out", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    parts = [
        f"# Masks of N:M\n\nWritten by `python benchmarks/pattern_masks.py`: one thread, CPU time of the process, {given.rounds} rounds, "
        f"interleaved. Python {platform.python_version()}, torch {torch.__version__}; {processor()}, {platform.machine()}.",
        "## Of ResNet-50's weights",
        mask_table(magnitudes(), given.rounds),
    ]
    for key in ("mlp-sgd", "resnet20-sgd"):
        workload = WORKLOADS[key]
        steps = max(2, round(given.steps * workload.share))
        parts += [
            f"## In a training step: {workload.title}",
            step_table(step_times(workload, given.rounds, steps)),
            fits(workload),
        ]
    parts.append(
        "The share is what a step takes beyond one of NM without a refresh, the soft projection included. Masks of transposable 2:4 are "
        "renewed every 40 steps by default, so their share is then a fortieth of the one above."
    )
    text = "\n\n".join(parts) + "\n"
    print(text)
    given.out.parent.mkdir(exist_ok=True)
    given.out.write_text(text)


if __name__ == "__main__":
    main()
