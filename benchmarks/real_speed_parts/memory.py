"""Peak memory, sizes of files, and places that differ between masked and sparse storage.

python -m real_speed_parts.memory NETWORK STORAGE SPARSITY    # in the folder benchmarks; one line of JSON
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from interleaved_runs import Cycled

from real_speed_parts.networks import NETWORKS, TrainedNet
from sparse_callbacks import SET, RigL, save_compact

STORAGES = ("dense", "masked", "sparse", "grouped")
SPARSITY, STEPS, EVERY = 0.9, 6, 3
FOLDER = Path(__file__).parents[1]
EXAMPLE = FOLDER.parent / "examples" / "hundred_million_neurons.py"
# buffers of 200 kB and more go back to the system when they are freed
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "200000"}
ABOUT = (
    f"A process for each run: AdamW at {SPARSITY}, {STEPS} steps of RigL with two updates, `MALLOC_MMAP_THRESHOLD_=200000`. Peaks are "
    "over what the process held before the module was made, of steps without and with an update; the checkpoint is "
    "`trainer.save_checkpoint`'s, the compact file `save_compact`'s."
)
ABOUT_DIFFERENCES = (
    "784-1000x3-10 on random data, 0.9, 200 steps of SGD with an update in every tenth, from the same seed in float32: live places of "
    "the masked run that the sparse run has not. (In float64 there are none; a test holds that.)"
)
ABOUT_LARGEST = (
    "`examples/hundred_million_neurons.py`: hidden layers of a million neurons with five inputs each, batch 4, SGD with momentum; one "
    "step and one update of SET under a Trainer. Goal: 100 million neurons within 20 GiB."
)
Row = dict[str, Any]


def peak() -> int:
    """The largest memory of the process since `forget_peak`, in bytes (Linux)."""
    (line,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return 1024 * int(line.split()[1])


def forget_peak() -> None:
    """Let the peak be what the process holds now."""
    Path("/proc/self/clear_refs").write_text("5")


class Peaks(pl.Callback):
    """The peak of each step after the first, which makes optimizer state, and whether it had an update.

    Args:
        topology: the callback that counts updates; None without one.
    """

    def __init__(self, topology: RigL | None) -> None:
        self.topology, self.seen = topology, 0
        self.found: dict[bool, int] = {False: 0, True: 0}

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        forget_peak()

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        updates = 0 if self.topology is None else self.topology.updates
        if trainer.global_step > 1:
            self.found[updates > self.seen] = max(self.found[updates > self.seen], peak())
        self.seen = updates


def one_run(name: str, storage: str, sparsity: float) -> Row:
    """The peaks and file sizes of one run in this process."""
    torch.set_num_threads(1)
    network = NETWORKS[name]
    workload = network.workload("adamw")
    data = workload.data()
    start = peak()
    module = TrainedNet(workload)
    topology = None
    if storage != "dense":
        topology = RigL(
            sparsity, distribution="uniform", keep_dense="last", every=EVERY, start=EVERY - 1, stop=STEPS,
            drop_fraction="constant(0.3)", print_plan=False, storage=storage, group=network.group, rows=network.rows,
        )  # fmt: skip
    peaks = Peaks(topology)
    trainer = pl.Trainer(
        max_steps=STEPS, callbacks=[peaks] if topology is None else [topology, peaks], accelerator="cpu", logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, Cycled(data, STEPS))
    with tempfile.TemporaryDirectory() as folder:
        trainer.save_checkpoint(Path(folder) / "a.ckpt")
        checkpoint = (Path(folder) / "a.ckpt").stat().st_size
        compact = None
        if topology is not None:
            save_compact(module, Path(folder) / "a.compact")
            compact = (Path(folder) / "a.compact").stat().st_size
    return {
        "network": name, "storage": storage, "sparsity": sparsity, "steps": peaks.found[False] - start,
        "updates": peaks.found[True] - start if topology is not None else None, "checkpoint": checkpoint, "compact": compact,
    }  # fmt: skip


def measure(networks: Sequence[str]) -> Iterator[Row]:
    """One row for each network and storage, each from a process of its own."""
    for name in networks:
        for storage in STORAGES:
            command = [sys.executable, "-W", "ignore", "-m", "real_speed_parts.memory", name, storage, str(SPARSITY)]
            done = subprocess.run(
                command, cwd=FOLDER, env=os.environ | MALLOC, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise RuntimeError(f"{name}, {storage}: {done.stderr[-2000:]}")
            yield json.loads(done.stdout.splitlines()[-1])


def table(rows: list[Row]) -> str:
    """Mebibytes of each run."""
    lines = [
        "| network | storage | peak of steps, MiB | peak of updates, MiB | checkpoint, MiB | compact file, MiB |",
        "|" + " --- |" * 6,
    ]
    for row in rows:
        sizes = [row[key] for key in ("steps", "updates", "checkpoint", "compact")]
        cells = ["" if size is None else f"{size / 2**20:.1f}" for size in sizes]
        lines.append(f"| {NETWORKS[row['network']].title} | {row['storage']} | {' | '.join(cells)} |")
    return "\n".join(lines)


# ---------------------------------------------------------------------- differences


def differences(steps: int = 200, every: int = 10) -> Iterator[Row]:
    """One row for each method: how many live places of masked storage sparse storage has not, after a run."""
    network = NETWORKS["mlp-1000"]
    for method in (SET, RigL):
        masks = {}
        for storage in ("masked", "sparse"):
            pl.seed_everything(0, verbose=False)
            workload = network.workload("sgd")
            topology = method(
                SPARSITY, distribution="uniform", keep_dense="last", every=every, stop=steps, storage=storage,
                drop_fraction="constant(0.3)", rows=network.rows, print_plan=False,
            )  # fmt: skip
            trainer = pl.Trainer(
                max_steps=steps, callbacks=[topology], accelerator="cpu", logger=False, enable_checkpointing=False,
                enable_progress_bar=False, enable_model_summary=False,
            )  # fmt: skip
            trainer.fit(TrainedNet(workload), Cycled(workload.data(), steps))
            masks[storage] = {name: mask.clone() for name, mask in topology.masks.items()}
        differ = sum(int((masks["masked"][name] & ~mask).sum()) for name, mask in masks["sparse"].items())
        live = sum(int(mask.sum()) for mask in masks["masked"].values())
        yield {"method": method.__name__, "updates": topology.updates, "live": live, "differ": differ}


def differences_table(rows: list[Row]) -> str:
    lines = ["| method | updates | live places | places that differ |", "| --- | --- | --- | --- |"]
    for row in rows:
        share = row["differ"] / row["live"]
        lines.append(f"| {row['method']} | {row['updates']} | {row['live']:,} | {row['differ']:,} ({share:.2%}) |")
    return "\n".join(lines)


# ---------------------------------------------------------------------- the largest network


def largest(neurons: int) -> Iterator[Row]:
    """The row of one size: what the example prints, from a process of its own."""
    command = [sys.executable, "-W", "ignore", str(EXAMPLE), "--neurons", str(neurons)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2000:]}")
    yield {"neurons": neurons, "printed": [line for line in done.stdout.splitlines() if "GiB" in line]}


def largest_table(rows: list[Row]) -> str:
    return "\n".join(f"- {line}" for row in rows for line in row["printed"])


if __name__ == "__main__":
    print(json.dumps(one_run(sys.argv[1], sys.argv[2], float(sys.argv[3]))))
