"""Whole Lightning steps over the dense network's, for each network, sparsity, optimizer and storage."""

import gc
from collections.abc import Iterator
from typing import Any

from interleaved_runs import Run, lightning_run

from real_speed_parts.networks import NETWORKS, OPTIMIZERS, Network, TrainedNet, quartiles, rounds_of
from real_speed_parts.peers import PEER, peer_net
from sparse_callbacks import RigL

WARM_UP = 2
SPARSITIES = (0.8, 0.9, 0.95, 0.98)
ABOUT = (
    "RigL under a Trainer beside the same Trainer without a callback (`dense`); every layer but the head of ten classes has the "
    "same sparsity. Ordinary steps: an update is in another table. SGD has momentum 0.9, both optimizers torch's defaults. Grouped: "
    "64 rows read the same inputs, in layers of 1000 rows 50, as 64 does not divide them."
)
Row = dict[str, Any]


def callback_of(network: Network, sparsity: float, storage: str, total: int) -> RigL:
    """RigL with the same sparsity in every layer but the head. Its only updates are in the first step and the last."""
    return RigL(
        sparsity, distribution="uniform", keep_dense="last", every=total, stop=total, print_plan=False,
        storage=storage, group=network.group, rows=network.rows,
    )  # fmt: skip


def runs_of(
    network: Network, optimizer: str, sparsity: float, storages: tuple[str, ...], rounds: int
) -> dict[str, Run]:
    """The dense run, one for each storage, and the peer's where it is installed."""
    workload, lengths = network.workload(optimizer), [WARM_UP, *[network.steps] * rounds]
    runs = {"dense": lightning_run(workload, lengths, TrainedNet(workload))}
    for storage in storages:
        callback = callback_of(network, sparsity, storage, sum(lengths))
        runs[storage] = lightning_run(workload, lengths, TrainedNet(workload), callback)
    peer = peer_net(TrainedNet(workload), sparsity)
    return runs if peer is None else runs | {PEER: lightning_run(workload, lengths, peer)}


def measure(
    networks: tuple[str, ...],
    sparsities: tuple[float, ...],
    optimizers: tuple[str, ...],
    storages: tuple[str, ...],
    rounds: int,
) -> Iterator[Row]:
    """One row for each network, optimizer, sparsity and storage."""
    for name in networks:
        for optimizer in optimizers:
            for sparsity in sparsities:
                times = rounds_of(runs_of(NETWORKS[name], optimizer, sparsity, storages, rounds), rounds)
                for storage, each in times.items():
                    ratios = [a / b for a, b in zip(each, times["dense"], strict=True)]
                    yield {
                        "network": name, "optimizer": optimizer, "sparsity": sparsity, "storage": storage,
                        "ms": quartiles(each), "ratio": quartiles(ratios),
                    }  # fmt: skip
                gc.collect()  # a module and its Trainer hold each other, and 4 x 4096 with AdamW takes a gigabyte a run


# ---------------------------------------------------------------------- tables


def keyed(rows: list[Row]) -> dict[tuple[str, str, float], dict[str, Row]]:
    """The rows of each network, optimizer and sparsity by storage."""
    found: dict[tuple[str, str, float], dict[str, Row]] = {}
    for row in rows:
        found.setdefault((row["network"], row["optimizer"], row["sparsity"]), {})[row["storage"]] = row
    return found


def table(rows: list[Row]) -> str:
    """Milliseconds of a dense step, and of every other run the ratio to it with its quartiles."""
    cells = keyed(rows)
    labels = list(dict.fromkeys(row["storage"] for row in rows if row["storage"] != "dense"))
    head = ["network", "optimizer", "sparsity", "dense, ms", *labels]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for (network, optimizer, sparsity), by in cells.items():
        found = [NETWORKS[network].title, optimizer, f"{sparsity:g}", f"{by['dense']['ms'][1]:.3g}"]
        for label in labels:
            if label in by:
                low, middle, high = by[label]["ratio"]
                found.append(f"{by[label]['ms'][1]:.3g} ms: **{middle:.2f}** ({low:.2f} to {high:.2f})")
            else:
                found.append("")
        lines.append(f"| {' | '.join(found)} |")
    return "\n".join(lines)


def not_measured(rows: list[Row]) -> str:
    """The networks and sparsities that the figures lack, as a sentence; empty where they are whole."""
    cells, missing = keyed(rows), []
    for name, network in NETWORKS.items():
        for sparsity in SPARSITIES:
            lacking = [optimizer for optimizer in OPTIMIZERS if (name, optimizer, sparsity) not in cells]
            if lacking:
                under = "" if len(lacking) == len(OPTIMIZERS) else f" under {' and '.join(lacking)}"
                missing.append(f"{network.title} at {sparsity:g}{under}")
    return f"Not measured: {'; '.join(missing)}." if missing else ""


def goals(rows: list[Row]) -> str:
    """The goals beside what was reached; what is missed is named."""
    cells = keyed(rows)
    lines = ["| at 0.9, mean over SGD and AdamW, of dense | goal | reached | |", "| --- | --- | --- | --- |"]
    for name, network in NETWORKS.items():
        for storage, goal in zip(("sparse", "grouped"), network.goals, strict=True):
            found = [
                by[storage]["ratio"][1] for (n, _, s), by in cells.items() if (n, s) == (name, 0.9) and storage in by
            ]
            if len(found) == 2:
                mean = sum(found) / 2
                lines.append(f"| {network.title}: {storage} | {goal:.2f} | {mean:.2f} | {verdict(mean <= goal)} |")
    return "\n".join([*lines, "", auto_text(cells)])


def auto_text(cells: dict[tuple[str, str, float], dict[str, Row]]) -> str:
    """How far auto is from the better of masked and sparse in each cell, and the cells beyond 1.1."""
    over = {}
    for (network, optimizer, sparsity), by in cells.items():
        if {"auto", "masked", "sparse"} <= by.keys():
            better = min(by["masked"]["ms"][1], by["sparse"]["ms"][1])
            over[f"{NETWORKS[network].title}, {optimizer}, {sparsity:g}"] = by["auto"]["ms"][1] / better
    if not over:
        return ""
    missed = [f"{cell}: {ratio:.2f}" for cell, ratio in over.items() if ratio > 1.1]
    text = (
        f"`auto`, goal at most 1.1 of the better of masked and sparse: {len(over) - len(missed)} of {len(over)} cells."
    )
    return text + (f" Missed: {'; '.join(missed)}." if missed else "")


def verdict(met: bool) -> str:
    return "met" if met else "**missed**"
