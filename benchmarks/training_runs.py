"""Runs of `train.py` behind the tables: each in a process of its own, with figures that are kept.

The metrics of every run are written to a JSON file beside the table as the run ends. With `--go-on` the runs in that file
are not repeated, so that a table can be measured bit by bit; delete lines that a change to the code has made untrue.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import runpy
import shlex
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent

# with one thread sums have the same order on all machines of one kind
os.environ["OMP_NUM_THREADS"] = "1"
# a new process for each run takes a third of a short one to import torch and Lightning
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["train"])
sys.path.append(str(ROOT))

Words = tuple[str, ...]
"""The overrides of a run."""
Metrics = Mapping[str, float]
"""What a run ended with, as in its metrics.json."""


class Figures:
    """Metrics of finished runs in a JSON file, by the overrides of the run as one writes them in a shell.

    Args:
        path: the file, which is written again after each run.
        go_on: whether the runs in it count as finished; otherwise it begins empty.

    Raises:
        ValueError: the file is no such file.
    """

    def __init__(self, path: Path, go_on: bool = False) -> None:
        self.path, self.found = path, dict[Words, Metrics]()
        if go_on and path.exists():
            try:
                kept = json.loads(path.read_text())["runs"]
                self.found = {tuple(shlex.split(line)): metrics for line, metrics in kept.items()}
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{path} does not hold the figures of runs, so --go-on cannot read them. Delete it, or leave out "
                    "--go-on to measure all runs again."
                ) from error

    def add(self, words: Words, metrics: Metrics) -> None:
        self.found[words] = {key: float(f"{value:.7g}") for key, value in metrics.items()}
        # a line for each run, so that two versions of the file can be compared
        lines = ",\n".join(f"{json.dumps(shlex.join(w))}: {json.dumps(m)}" for w, m in self.found.items())
        whole = self.path.with_suffix(".part")
        whole.write_text(f'{{"runs": {{\n{lines}\n}}}}\n')
        whole.replace(self.path)


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
    arguments = [str(ROOT / "train.py"), *words, "logger=[]", "trainer.enable_progress_bar=false", *places]
    with tempfile.NamedTemporaryFile("r") as printed:
        process = _SERVER.Process(target=_train, args=(arguments, printed.name))
        process.start()
        process.join()
        if process.exitcode != 0:
            raise RuntimeError(
                f"{shlex.join([sys.executable, *arguments])} failed, so the table has a gap; run it by hand. "
                f"Its error: {printed.read()[-2000:].strip()}"
            )
    return json.loads((folder / "metrics.json").read_text())


def _train(arguments: Sequence[str], printed: str) -> None:
    """`train.py`, in a process of its own that has imported already what it imports."""
    with open(printed, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.argv = list(arguments)
    runpy.run_path(arguments[0], run_name="__main__")


def folder_of(words: Sequence[str], kept: Path) -> Path:
    """The folder of a run in ``kept``, by its overrides; of many of them a part and a hash, as file systems limit names."""
    name = ",".join(words)
    return kept / (name if len(name) <= 240 else f"{name[:200]}-{hashlib.sha256(name.encode()).hexdigest()[:16]}")


def results(
    todo: Sequence[Words], root: str | None, kept: Path, jobs: int, figures: Figures
) -> Iterator[tuple[Words, Metrics]]:
    """Overrides and metrics of each run as it ends; finished runs of an earlier call come first.

    Args:
        todo: the overrides of the runs.
        root: the folder of the data set; None where the data set needs no files.
        kept: the folder of the folders of the runs.
        jobs: the number of runs at a time.
        figures: the figures of finished runs, to which those of each run are added.

    Raises:
        RuntimeError: runs have failed; the others were made before.
    """
    folders = {words: folder_of(words, kept) for words in todo}
    for words, folder in folders.items():
        if words not in figures.found and (folder / "metrics.json").exists():
            figures.add(words, json.loads((folder / "metrics.json").read_text()))
    yield from ((words, figures.found[words]) for words in folders if words in figures.found)
    # threads are enough, since each of them only waits for the process of its run
    with ThreadPoolExecutor(jobs) as pool:
        left = [words for words in folders if words not in figures.found]
        futures = {pool.submit(run, words, root, folders[words]): words for words in left}
        failed = list[str]()
        try:
            for future in as_completed(futures):
                if (error := future.exception()) is not None:
                    failed.append(str(error))
                    continue
                figures.add(futures[future], future.result())
                yield futures[future], figures.found[futures[future]]
        finally:
            # after Ctrl-C no further run starts
            pool.shutdown(cancel_futures=True)
    if failed:
        raise RuntimeError("\n\n".join([f"{len(failed)} of {len(left)} runs failed.", *failed]))


def options_of_runs(
    description: str | None, out: Path | None = None, root: str = "folder of torchvision's files"
) -> argparse.ArgumentParser:
    """A parser of the options that every script of such runs has; the data's folder is required beside ``out``."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", required=out is not None, help=root)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="number of runs at a time, with one thread each")
    parser.add_argument("--runs", type=Path, help="folder that keeps the runs; finished runs in it are not repeated")
    parser.add_argument(
        "--go-on", action="store_true", help="do not repeat the runs in the JSON file beside the table either"
    )
    parser.add_argument("--out", type=Path, default=out, help="file of the table, by default in benchmarks/results")
    return parser


def figures_of(given: argparse.Namespace, out: Path) -> Figures:
    """The figures beside a table, as the options say; an argument error where the file has none."""
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        return Figures(out.with_suffix(".json"), given.go_on)
    except ValueError as error:
        raise SystemExit(str(error)) from error
