"""Measures the test accuracy of every method over several seeds; one table for each setting.

    python benchmarks/accuracy.py                                  # scikit-learn's digits, seconds a run
    python benchmarks/accuracy.py --table lenet5 --root FOLDER     # LeNet-5 on Fashion-MNIST, about a minute a run

FOLDER holds torchvision's files (see data.root in conf/data/fashion_mnist.yaml). Each run is `python train.py` with the
overrides of its row, the overrides above its table and a seed. The file is written again after each run. With `--runs
KEPT` the folders of the runs stay in KEPT and finished runs are not repeated, so a stopped script can go on. Delete
KEPT after a change to the code.
"""

import argparse
import hashlib
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import pytorch_lightning as pl
import torch

ROOT = Path(__file__).resolve().parent.parent
ERK = "method.distribution=erdos_renyi_kernel"
LENET5 = "model=lenet5 data=fashion_mnist trainer.max_epochs=12"

Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Group:
    """Runs under one heading.

    Args:
        title: the heading.
        shared: the overrides of `train.py` that all rows have, separated by blanks.
        rows: the overrides of each row by its name. An override `sparsity=...` in `shared` is left out for
            `method=none`.
        search: whether the group shows how the settings of a row were chosen: a line of validation accuracies of the
            first seed instead of a table.
    """

    title: str
    shared: str
    rows: Mapping[str, str]
    search: bool = False


@dataclass(frozen=True)
class Report:
    """A file of results.

    Args:
        title: the heading of the file.
        about: what the runs have in common.
        command: the command that writes the file.
        out: the name of the file in benchmarks/results.
        groups: the groups of runs, in their order.
        needs_root: whether the data set is read from a folder.
    """

    title: str
    about: str
    command: str
    out: str
    groups: tuple[Group, ...]
    needs_root: bool = False


DIGITS_ROWS = {name: f"method={name}" for name in ("none", "static", "set", "snfs", "rigl", "gmp", "dpf")} | {
    "gap": "method=gap method.partitions=3",  # these networks have three layers
    "ctre": "method=ctre",
}
# methods that start sparse, whose fresh weights can be made larger
RESCALED_ROWS = {
    f"{name}, {kind}": f"{DIGITS_ROWS[name]} method.rescale={kind}"
    for name, kind in product(("static", "set", "snfs", "rigl", "gap", "ctre"), ("layer", "fan_in"))
}
LENET5_ROWS = {
    "dense": "method=none",
    "GMP": f"method=gmp {ERK}",
    "RigL": f"method=rigl {ERK}",
    "DPF, global": "method=dpf",
    "DPF, by layer": f"method=dpf {ERK}",
    "GaP": f"method=gap {ERK} method.partitions=2 method.rounds=2 method.init=random",
}
GAP_TRIED = {
    f"{init}, {rounds} x {partitions}": f"method=gap {ERK} method.partitions={partitions} method.rounds={rounds} method.init={init}"
    for init, rounds, partitions in product(("random", "magnitude"), (1, 2), (2, 3, 4))
}
REPORTS = {
    "digits": Report(
        "Accuracy on scikit-learn's digits",
        "1,797 images, one fixed split (450 test images, so 0.22 points an image).",
        "python benchmarks/accuracy.py",
        "accuracy.md",
        (
            Group("The default network (64-256-256-10), 90 % zeros", "sparsity=0.9", DIGITS_ROWS),
            Group("LeNet-300-100, 98 % zeros in every layer", "experiment=lenet_300_100_digits", DIGITS_ROWS),
            Group("The same, with rescaled weights", "experiment=lenet_300_100_digits", RESCALED_ROWS),
        ),
    ),
    "lenet5": Report(
        "LeNet-5 on Fashion-MNIST",
        "55,000 training, 5,000 validation and 10,000 test images. Every method has the same 12 epochs (6,600 steps of "
        "100 images), SGD "
        "from 0.05 with a cosine to 0; the optimizer and the cosine start anew with each phase of GaP. GaP alone was "
        "tuned (partitions, "
        "rounds, first masks; of two that tie, the one with the default masks); the others have the defaults of "
        "conf/method and the "
        "distribution in their row. A tried setting near 10 % ended with a dead network: its loss is ln 10.",
        "python benchmarks/accuracy.py --table lenet5 --root FOLDER",
        "lenet5_fashion_mnist.md",
        (
            Group(
                "GaP's settings (first masks, rounds x partitions), one seed, 95 %",
                f"{LENET5} sparsity=0.95",
                GAP_TRIED,
                search=True,
            ),
            Group("95 % zeros", f"{LENET5} sparsity=0.95", LENET5_ROWS),
            Group("98 % zeros", f"{LENET5} sparsity=0.98", LENET5_ROWS),
        ),
        needs_root=True,
    ),
}


def overrides(shared: str, row: str, seed: int) -> tuple[str, ...]:
    """The overrides of `train.py` for one run, without the folder of its data.

    Dense runs of two sparsities have the same overrides, so that they are made only once.
    """
    words = [*row.split(), *shared.split()]
    if "method=none" in words:
        words = [word for word in words if not word.startswith("sparsity=")]
        if any(word.startswith("experiment=") for word in words):
            # the experiment has a sparsity too, which a dense run refuses
            words.append("sparsity=null")
    return (*words, f"seed={seed}")


def quoted(path: str) -> str:
    """A path as the value of an override, whatever characters it has."""
    return "'" + path.replace("'", "\\'") + "'"


def run(words: Sequence[str], root: str | None, folder: Path) -> Metrics:
    """The metrics of one run, which is made in a process of its own.

    Args:
        words: the overrides of `train.py`.
        root: the folder of the data set; None where the data set needs no files.
        folder: the folder of the run.

    Raises:
        RuntimeError: the run failed.
    """
    places = [f"hydra.run.dir={quoted(str(folder))}"] + ([] if root is None else [f"data.root={quoted(root)}"])
    command = [
        sys.executable,
        str(ROOT / "train.py"),
        *words,
        "logger=[]",
        "trainer.enable_progress_bar=false",
        *places,
    ]
    # with one thread sums have the same order on all machines of one kind
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(
            f"{shlex.join(command)} failed, so the table has a gap; run it by hand. "
            f"Its error: {ended.stderr[-2000:].strip()}"
        )
    return json.loads((folder / "metrics.json").read_text())


def runs(report: Report, seeds: int) -> list[tuple[str, ...]]:
    """The overrides of all runs, each once: the searches, then all rows with the first seed, then with the next one."""
    found = []
    for group in report.groups:
        if group.search:
            found += [overrides(group.shared, row, 0) for row in group.rows.values()]
    for seed in range(seeds):
        for group in report.groups:
            if not group.search:
                found += [overrides(group.shared, row, seed) for row in group.rows.values()]
    return list(dict.fromkeys(found))


def folder_of(words: Sequence[str], kept: Path) -> Path:
    """The folder of a run in ``kept``, by its overrides; of many of them a part and a hash, as file systems limit names."""
    name = ",".join(words)
    return kept / (name if len(name) <= 240 else f"{name[:200]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}")


def results(
    todo: Sequence[tuple[str, ...]], root: str | None, kept: Path, jobs: int
) -> Iterator[tuple[tuple[str, ...], Metrics]]:
    """Overrides and metrics of each run as it ends; finished runs of an earlier call come first.

    Args:
        todo: the overrides of the runs.
        root: the folder of the data set; None where the data set needs no files.
        kept: the folder of the folders of the runs.
        jobs: the number of runs at a time.
    """
    folders = {words: folder_of(words, kept) for words in todo}
    done = {words: folder / "metrics.json" for words, folder in folders.items() if (folder / "metrics.json").exists()}
    yield from ((words, json.loads(path.read_text())) for words, path in done.items())
    # threads are enough, since each of them only waits for the process of its run
    with ThreadPoolExecutor(jobs) as pool:
        futures = {pool.submit(run, words, root, folders[words]): words for words in todo if words not in done}
        try:
            yield from ((futures[future], future.result()) for future in as_completed(futures))
        finally:
            # after a failure or Ctrl-C no further run starts
            pool.shutdown(cancel_futures=True)


def line(name: str, row: str, found: Sequence[Metrics]) -> str:
    """One row of a table, with accuracies in percent; the spread is the standard deviation of a sample."""
    if not found:
        return f"| {name} | not run yet | | | | | | | `{row}` |"
    tested = [100 * metrics["test/acc"] for metrics in found]
    validated = [100 * metrics["val/acc"] for metrics in found]
    spread = f"{statistics.stdev(tested):.2f}" if len(tested) > 1 else ""
    sparsities = [100 * metrics["sparsity/total"] for metrics in found]
    zeros, most_zeros = f"{min(sparsities):.2f}", f"{max(sparsities):.2f}"
    if most_zeros != zeros:
        zeros = f"{zeros} to {most_zeros}"
    seconds = statistics.mean(metrics["seconds"] for metrics in found)
    return (
        f"| {name} | {statistics.mean(tested):.2f} % | {spread} | {min(tested):.2f} to {max(tested):.2f} % "
        f"| {statistics.mean(validated):.2f} % | {zeros} % | {seconds:.1f} | {len(found)} | `{row}` |"
    )


def section(group: Group, found: Mapping[tuple[str, ...], Metrics], seeds: int) -> str:
    """A group as Markdown, from the runs that have ended so far."""
    if group.search:
        tried = []
        for name, row in group.rows.items():
            metrics = found.get(overrides(group.shared, row, 0))
            if metrics is not None:
                tried.append((metrics["val/acc"], name))
        best_first = "; ".join(f"{name} {100 * value:.2f} %" for value, name in sorted(tried, reverse=True))
        return f"{group.title}, by validation accuracy: {best_first}."
    lines = [
        f"## {group.title}",
        "",
        f"`python train.py {group.shared}` with the overrides of a row and `seed=0` to `seed={seeds - 1}`; the last "
        "network is tested.",
        "",
        "| method | test accuracy, mean | spread | range | validation, mean | zeros | seconds a run | seeds | "
        "overrides |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, row in group.rows.items():
        of_row = [overrides(group.shared, row, seed) for seed in range(seeds)]
        lines.append(line(name, row, [found[words] for words in of_row if words in found]))
    return "\n".join(lines)


def text(report: Report, found: Mapping[tuple[str, ...], Metrics], seeds: int) -> str:
    """The whole file as Markdown."""
    head = (
        f"# {report.title}\n\n{report.about}\n\nWritten by `{report.command}`. "
        "The spread is the standard deviation over seeds, in points; a seed moves weights, masks and the order of the "
        f"data. Seconds are wall time of training and validation, one thread of {os.cpu_count()} cores, beside other "
        f"jobs: read them roughly. Python {platform.python_version()}, torch {torch.__version__}, "
        f"pytorch-lightning {pl.__version__}, {platform.machine()}."
    )
    return "\n\n".join([head, *(section(group, found, seeds) for group in report.groups)]) + "\n"


def options_of_runs(
    description: str | None, out: Path | None = None, root: str = "folder of torchvision's files"
) -> argparse.ArgumentParser:
    """A parser of the options that every script of such runs has; the data's folder is required beside ``out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=out is not None, help=root)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time, with one thread each")
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs; finished runs in it are not repeated")
    parser.add_argument("--out", type=Path, default=out, help="file of the table, by default in benchmarks/results")
    return parser


def main() -> None:
    readers = " or ".join(name for name, report in REPORTS.items() if report.needs_root)
    parser = options_of_runs(__doc__, root=f"folder of torchvision's files, for --table {readers}")
    parser.add_argument("--table", choices=list(REPORTS), default="digits")
    arguments = parser.parse_args()
    report = REPORTS[arguments.table]
    if report.needs_root and arguments.root is None:
        parser.error(f"--table {arguments.table} needs --root FOLDER")
    if not report.needs_root and arguments.root is not None:
        parser.error(f"--table {arguments.table} reads no files, so it takes no --root FOLDER")
    out = arguments.out or ROOT / "benchmarks" / "results" / report.out
    out.parent.mkdir(parents=True, exist_ok=True)
    root = None if arguments.root is None else str(Path(arguments.root).absolute())
    todo, found = runs(report, arguments.seeds), {}
    with tempfile.TemporaryDirectory() as temporary:
        kept = (arguments.runs or Path(temporary)).absolute()
        for words, metrics in results(todo, root, kept, arguments.jobs):
            found[words] = metrics
            out.write_text(text(report, found, arguments.seeds))
            print(f"{len(found)} of {len(todo)}: {100 * metrics['test/acc']:.2f} % {' '.join(words)}", flush=True)


if __name__ == "__main__":
    main()
