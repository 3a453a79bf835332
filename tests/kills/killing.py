"""Kills `train.py` at random moments and prints a log: ``PYTHONPATH=tests python -m kills.killing --kills 50``."""

import argparse
import csv
import itertools
import json
import math
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from support.methods import METHODS
from support.wandb_file import curves

from kills.child import ROOT
from sparse_callbacks.testing.comparison import differences

EPOCHS, EPOCH_STEPS = 12, 9  # the digits in batches of 128
OPTIONS = (
    "data.batch_size=128",
    "model.hidden=[16,16]",
    "trainer.enable_progress_bar=false",
    "trainer.log_every_n_steps=1",
    "checkpoint_every=5",
)
# what some methods need in a network of 32 units
OWN = dict.fromkeys(("smcp", "channels"), ("method.round_to=1",))
LOGGERS = ("csv", "wandb")
# of callbacks in a checkpoint: the score of the last file written, and of the record the folder, the clock and the machine
MOMENTS = ("best_k_models", "current_score", "folder", "said", "seconds")
# for temporary files: what is written there first is then copied to its place, which takes time
OTHER_DISK = Path("/dev/shm")


@dataclass(frozen=True)
class Kill:
    """One or more kills of a run. ``steps``: after which optimizer step each comes; ``writing``: it comes while the
    checkpoint of that step is written."""

    method: str
    logger: str
    steps: tuple[int, ...]
    writing: bool = False
    delay: float = 0.0


@dataclass(frozen=True)
class Row:
    """A row of the log: what was killed when, where the run was resumed, and what came of it."""

    kill: Kill
    seconds: tuple[float, ...]
    killed_at: tuple[str, ...]
    resumed_from: tuple[int, ...]
    differs: tuple[str, ...]

    def __str__(self) -> str:
        seconds = "+".join(f"{s:.1f}" for s in self.seconds)
        resumed = "+".join(map(str, self.resumed_from))
        same = "same" if not self.differs else f"DIFFERS: {self.differs[:3]}"
        return (
            f"{self.kill.method:13}{self.kill.logger:7}{seconds:>12}{'+'.join(self.killed_at):>14}{resumed:>14}  {same}"
        )


HEADER = f"{'method':13}{'logger':7}{'seconds':>12}{'at step':>14}{'resumed from':>14}  end"


def random_kills(number: int, seed: int) -> Iterator[Kill]:
    """Kills spread over all methods, both loggers and the whole run; each fifth in a write, each seventh of two."""
    source, last = random.Random(seed), EPOCHS * EPOCH_STEPS
    order: list[str] = []
    for index in range(number):
        # evenly over the run, each somewhere in its part
        first = max(1, math.ceil((index + source.random()) / number * last))
        steps = (first, min(last - 1, first + source.randint(3, 20))) if index % 7 == 6 else (first,)
        # every method has a turn before any has its next; by chance, or each fifth kill would be one of the same few
        order = order or source.sample(METHODS, len(METHODS))
        method = order.pop()
        logger = LOGGERS[index // len(METHODS) % 2]  # the other one when all methods have had a turn
        yield Kill(method, logger, steps, index % 5 == 4, source.random() * 0.01)


class Nursery:
    """A process that has imported everything and forks the runs, one at a time."""

    def __init__(self) -> None:
        paths = os.pathsep.join([str(ROOT), str(ROOT / "tests"), *filter(None, sys.path)])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "kills.child"],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )

    def start(self, **given: Any) -> int:
        """The number of a new process; for what is given see :func:`kills.child.run`."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(given) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def has_ended(self) -> bool:
        """Whether the process has."""
        return bool(select.select([self.process.stdout], [], [], 0)[0])

    def wait(self) -> int:
        """The exit status of the process, minus the number of the signal that has killed it."""
        return self._answer()

    def _answer(self) -> int:
        assert self.process.stdout is not None
        return int(self.process.stdout.readline())

    def close(self) -> None:
        """No more runs."""
        self.process.communicate()


class Folder:
    """A folder of runs of one method and logger, each of so many ``epochs``."""

    def __init__(self, path: Path, method: str, logger: str, epochs: int) -> None:
        self.path, self.method, self.logger, self.epochs = path, method, logger, epochs

    @property
    def checkpoint(self) -> Path:
        return self.path / "checkpoints/last.ckpt"

    def start(self, nursery: Nursery, *more: str, **environment: str) -> int:
        """The number of a process that writes into this folder."""
        self.path.mkdir(parents=True, exist_ok=True)
        given = {"NOTES": str(self.path / "notes"), "WANDB_MODE": "offline", **environment}
        if OTHER_DISK.is_dir():
            given["TMPDIR"] = str(OTHER_DISK)
        argv = [*OPTIONS, *OWN.get(self.method, ()), *more, f"method={self.method}", f"logger=[{self.logger}]"]
        argv += [f"trainer.max_epochs={self.epochs}", f"hydra.run.dir={self.path}"]
        return nursery.start(argv=argv, environment=given, folder=str(self.path), errors=str(self.path / "errors"))

    def finish(self, nursery: Nursery, *more: str) -> None:
        """A run to its end."""
        self.start(nursery, *more)
        assert nursery.wait() == 0, self.errors()

    def errors(self) -> str:
        """The end of what the latest run has complained about."""
        return (self.path / "errors").read_text()[-4000:]

    def saved_step(self) -> int:
        """The step of the last periodic checkpoint; 0 where there is none."""
        if not self.checkpoint.exists():
            return 0
        return int(torch.load(self.checkpoint, weights_only=True)["global_step"])

    def note(self) -> list[str]:
        try:
            return (self.path / "notes").read_text().split()
        except FileNotFoundError:
            return []

    def metrics(self) -> dict[str, float]:
        """What the run came to, but for its time."""
        found = json.loads((self.path / "metrics.json").read_text())
        return {key: value for key, value in found.items() if key != "seconds"}

    def points(self) -> set[tuple[int, str, str]]:
        """(step, key, value) of everything that the latest run has logged besides times."""
        if self.logger == "csv":
            path = max(self.path.glob("csv/version_*/metrics.csv"), key=lambda p: int(p.parent.name.split("_")[1]))
            rows = csv.DictReader(path.read_text().splitlines())
            return {(int(r["step"]), k, v) for r in rows for k, v in r.items() if v and k not in ("step", "epoch")}
        path = max(self.path.glob("wandb/offline-run-*/*.wandb"), key=lambda p: p.stat().st_mtime)
        found = curves(path).items()
        # numbers alone: tables and pictures have names of files that differ from run to run
        figures = [(k, points) for k, points in found if k[0] != "_" and isinstance(points[0][1], int | float)]
        return {(int(s), k, repr(v)) for k, points in figures for s, v in points if s is not None}


def content(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but paths, `MOMENTS`, and Lightning's progress counters."""
    saved = torch.load(path, weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "run_state", "callbacks")
    kept = {name: saved[name] for name in names}
    for state in kept["callbacks"].values():
        for key in [key for key in state if "path" in key or key in MOMENTS]:
            del state[key]
    return kept


class Killer:
    """Kills runs in folders below one, and keeps a run of each method and logger that was never stopped."""

    def __init__(self, folder: Path, epochs: int = EPOCHS) -> None:
        self.folder, self.epochs, self.numbers = folder, epochs, itertools.count()
        self.one_at_a_time, self.of_thread = threading.Lock(), threading.local()
        self.nurseries: list[Nursery] = []
        self.wholes: dict[tuple[str, str], Folder] = {}

    def nursery(self) -> Nursery:
        """That of this thread."""
        if not hasattr(self.of_thread, "nursery"):
            self.of_thread.nursery = Nursery()
            self.nurseries.append(self.of_thread.nursery)
        return self.of_thread.nursery  # type: ignore[no-any-return]

    def close(self) -> None:
        """No more runs."""
        for nursery in self.nurseries:
            nursery.close()

    def whole(self, method: str, logger: str) -> Folder:
        """The run that was never stopped; made when it is first asked for."""
        with self.one_at_a_time:
            if (method, logger) not in self.wholes:
                made = Folder(self.folder / f"{method}-{logger}-whole", method, logger, self.epochs)
                made.finish(self.nursery())
                self.wholes[method, logger] = made
            return self.wholes[method, logger]

    def run(self, kill: Kill) -> Row:
        """Kill a run, resume it, perhaps kill it again, and compare its end."""
        folder = Folder(self.folder / f"{next(self.numbers)}-{kill.method}", kill.method, kill.logger, self.epochs)
        seconds, killed_at, resumed_from = [], [], []
        for step in kill.steps:
            taken, at = self._kill(folder, step, kill, _resuming(folder))
            seconds.append(taken)
            killed_at.append(at)
            resumed_from.append(folder.saved_step())
        folder.finish(self.nursery(), *_resuming(folder))
        found = _compare(folder, self.whole(kill.method, kill.logger), resumed_from[-1])
        return Row(kill, tuple(seconds), tuple(killed_at), tuple(resumed_from), tuple(found))

    def _kill(self, folder: Folder, step: int, kill: Kill, resuming: list[str]) -> tuple[float, str]:
        """Start a run and kill it after ``step``: how long it ran, and where it was."""
        every = int(OPTIONS[-1].rpartition("=")[2])
        number = max(1, (step - folder.saved_step()) // every)
        in_write = {"KILL_IN_WRITE": f"{number} {kill.delay}"} if kill.writing else {}
        (folder.path / "notes").unlink(missing_ok=True)
        began = time.monotonic()
        nursery = self.nursery()
        process = folder.start(nursery, *resuming, **in_write)
        while not nursery.has_ended() and (kill.writing or int((folder.note() or ["0"])[0]) < step):
            time.sleep(0.001)
        time.sleep(0 if kill.writing else kill.delay)
        if not nursery.has_ended():
            os.kill(process, signal.SIGKILL)
        status = nursery.wait()
        assert status == -signal.SIGKILL, f"it ended before the kill: {status}\n{folder.errors()}"
        for path in folder.path.rglob("*.ckpt"):
            torch.load(path, weights_only=True)  # whatever bears this name is whole
        return time.monotonic() - began, "w".join(folder.note()).replace("wwriting", "w")


def _resuming(folder: Folder) -> list[str]:
    return [f"ckpt_path={folder.checkpoint}"] if folder.checkpoint.exists() else []


def _compare(folder: Folder, whole: Folder, resumed_from: int) -> list[str]:
    """Where the end, and what was logged after the resume, differs from the run that was never stopped."""
    found = differences(content(whole.checkpoint), content(folder.checkpoint))
    found += differences(whole.metrics(), folder.metrics())
    theirs, mine = whole.points(), folder.points()
    found += [f"logged only by the resumed run: {point}" for point in sorted(mine - theirs)[:3]]
    # Lightning numbers the rows of a step by the steps before it; an epoch's own rows carry its last step
    expected = {point for point in theirs if point[0] > resumed_from}
    return found + [f"not logged by the resumed run: {point}" for point in sorted(expected - mine)[:3]]


def main() -> None:
    """Print the log."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs that are killed at the same time")
    options = parser.parse_args()
    print(HEADER, flush=True)
    with (
        tempfile.TemporaryDirectory() as folder,
        closing(Killer(Path(folder))) as killer,
        ThreadPoolExecutor(options.jobs) as jobs,
    ):
        differing = 0
        for row in jobs.map(killer.run, random_kills(options.kills, options.seed)):
            differing += bool(row.differs)
            print(row, flush=True)
    print(f"{options.kills} runs killed, {differing} differ")


if __name__ == "__main__":
    main()
