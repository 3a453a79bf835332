"""What a step of a sparse method must cost at least, what its rare work costs, and how much memory it takes.

The parts of `overhead.py` beside the times of steps: copies and products of the weights, which run round by round with
the training runs; the limit that follows from the copy; and peaks of memory, each in a process of its own.
"""

import multiprocessing
import resource
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from interleaved_runs import RawLoop, Run, Workload, clock
from torch import Tensor, nn

# Bytes that the rule of a method moves for each float32 weight in a step without an update, masks as bits left out:
# each number that it reads or writes counts once, whatever else the step does with it.
RULE_BYTES = {
    "ours: Static": (8, "the weights, read and written"),
    "ours: RigL": (8, "the weights, read and written"),
    "ours: CTRE": (8, "the weights, read and written"),
    "ours: DPF": (8, "dense weights read, masked ones written"),
    "ours: SMCP": (16, "as DPF; dense weights and gradients read for the scores"),
    "ours: ConstrainedL0, units": (
        28,
        "samples and medians: dense weights read, gated ones written, twice; dense weights and gradients read, and "
        "gradients written",
    ),
    "ours: ConstrainedL0, weights": (
        80,
        "as for units; samples written and read twice, medians written and read, gates, their two moments and the gradient by "
        "them read and written",
    ),
}
PLAIN_PEAKS = 3  # processes of the plain run, whose peaks say how far two alike are apart
COPY, PRODUCT = "copy of the weights", "one product of the weights, in place"


def matrices(net: nn.Module) -> list[nn.Parameter]:
    """The parameters that methods prune by default."""
    return [p for p in net.parameters() if p.ndim > 1]


def copies(workload: Workload, rounds: Sequence[int]) -> Run:
    """Times a copy of all weights after each step of a plain loop: what memory gives there."""
    return _after_steps(workload, rounds, lambda weight, ones: ones.copy_(weight))


def products(workload: Workload, rounds: Sequence[int]) -> Run:
    """Times a product of all weights by ones, in place, after each step of a plain loop."""
    return _after_steps(workload, rounds, lambda weight, ones: weight.mul_(ones))


def _after_steps(workload: Workload, rounds: Sequence[int], operation: Callable[[Tensor, Tensor], object]) -> Run:
    # in training, as a step leaves other data in the caches than the operation alone would
    loop = RawLoop(workload, sum(rounds))
    weights = [p.detach() for p in matrices(loop.net)]
    ones = [torch.ones_like(w) for w in weights]
    for length in rounds:
        times = []
        for _ in range(length):
            loop.backward()
            loop.optimizer.step()
            began = clock()
            for weight, factors in zip(weights, ones, strict=True):
                operation(weight, factors)
            times.append((clock() - began, False))
        yield times


def known(added: Sequence[float]) -> float:
    """The median of what a run adds in each round; 0 where that is no larger than its spread (the quartiles' distance)."""
    low, middle, high = statistics.quantiles(added, n=4, method="inclusive")
    return middle if middle > high - low else 0.0


def limits(workload: Workload, added: Mapping[str, Sequence[float]], copy: Sequence[float]) -> str:
    """The limit of each run beside what it adds to a step, as Markdown.

    Args:
        workload: the network.
        added: seconds that a run adds to a step without an update, in each round, by label.
        copy: seconds of a copy of all weights, in each round.
    """
    count = sum(p.numel() for p in matrices(workload.network()))
    speed = statistics.median(8 * count / seconds for seconds in copy)
    lines = [
        f"{count:,} weights; a copy moves 8 bytes of each, at {speed / 1e9:.1f} GB/s in this run.",
        "",
        "| run | bytes a weight | limit, ms | ms added without updates | of the limit | what moves |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for label, seconds in added.items():
        if label not in RULE_BYTES:
            continue
        moved, what = RULE_BYTES[label]
        limit, found = moved * count / speed, known(seconds)
        cells = f"{1e3 * found:.3g} | {found / limit:.2f}" if found else "below the noise |"
        lines.append(f"| {label} | {moved} | {1e3 * limit:.3g} | {cells} | {what} |")
    return "\n".join(lines) + "\n"


def rare_costs(rows: Sequence[tuple[str, float, int]], step: float) -> str:
    """What comes once in many steps, with its share of the run's time, as Markdown.

    Args:
        rows: what it is, the seconds that it takes, and once in how many steps it comes.
        step: seconds of a step without a callback.
    """
    lines = ["| work | ms | once in steps | share of the run, % |", "| --- | --- | --- | --- |"]
    for what, seconds, every in rows:
        if seconds <= 0:
            lines.append(f"| {what} | below the noise | {every:,} | |")
            continue
        share = 100 * seconds / (every * step + seconds)
        lines.append(f"| {what} | {1e3 * seconds:.3g} | {every:,} | {share:.2f} |")
    return "\n".join(lines) + "\n"


def memory(runs: Mapping[str, Callable[[], Any]], base: str, workload: Workload) -> str:
    """Peak memory of each run above that of the plain one, as Markdown.

    Each run is in a process of its own, forked from this one: so all begin with the same memory. Call it before anything
    else has run.

    Args:
        runs: what runs, by label.
        base: the label of the plain run.
        workload: the network.
    """
    peaks = {label: peak_of(run) for label, run in runs.items()}
    plain = [peaks[base], *(peak_of(runs[base]) for _ in range(PLAIN_PEAKS - 1))]
    peaks[base], noise = round(statistics.median(plain)), max(plain) - min(plain)
    size = sum(p.numel() * p.element_size() for p in workload.network().parameters())
    lines = [
        f"Parameters take {size / 2**20:.1f} MiB; the plain run's peak is {peaks[base] / 2**20:.0f} MiB, all of the "
        f"process included, and differs by {noise / 2**20:.1f} MiB among {PLAIN_PEAKS} such runs.",
        "",
        "| run | MiB above the plain run | in copies of the parameters |",
        "| --- | --- | --- |",
    ]
    for label, peak in peaks.items():
        if label != base:
            above = peak - peaks[base]
            cells = f"{above / 2**20:.1f} | {above / size:.2f}" if above > noise else "below the noise |"
            lines.append(f"| {label} | {cells} |")
    return "\n".join(lines) + "\n"


def peak_of(run: Callable[[], Any]) -> int:
    """Peak resident memory in bytes of a process, forked from this one, that does nothing else than ``run``."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def measured() -> None:
        run()
        # in KiB on Linux
        sender.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    process = context.Process(target=measured)
    process.start()
    sender.close()
    try:
        return int(receiver.recv())
    finally:
        process.join()
