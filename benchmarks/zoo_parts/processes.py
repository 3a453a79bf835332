"""Runs each model in a process of its own, with limits of time and memory."""

import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

Row = dict[str, Any]
STAGES = ("ours", "peer")
GIB = 1 << 30


def all_rows(names: Sequence[str], jobs: int, seconds: float, memory: float, script: Path) -> Iterator[Row]:
    """A row for each model, in the order in which they end.

    Args:
        names: names of models.
        jobs: processes at a time, of one thread each.
        seconds: limit of each stage.
        memory: limit of each process's own memory, in GiB.
        script: the file that measures one model with ``--one NAME --stages ... --memory ...``.
    """
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(one_row, name, seconds, memory, script): name for name in names}
        for done in as_completed(running):
            yield {"name": running[done], **done.result()}


def one_row(name: str, seconds: float, memory: float, script: Path) -> Row:
    """The stages of one model. A stage that hangs or is killed is named so, and the others run in a new process."""
    row: Row = {}
    left = list(STAGES)
    while left:
        found, problem = one_process(name, left, seconds * len(left), memory, script)
        row |= found
        missing = [stage for stage in left if stage not in found]
        if missing:
            row[missing[0]] = {"failed": problem}
        left = missing[1:]
    return row


def one_process(name: str, stages: Sequence[str], seconds: float, memory: float, script: Path) -> tuple[Row, str]:
    """The rows of the stages that a process ended, and why it did not end the others."""
    command = [sys.executable, "-W", "ignore", str(script), "--one", name, "--stages", *stages, "--memory", str(memory)]
    # in a file, which keeps the rows of the stages before one that hangs
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment(), start_new_session=True)
        problem = ""
        try:
            process.wait(seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            problem = f"no end within {seconds:.0f} s"
        out.seek(0)
        errors.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
        found = {key: row for line in lines for key, row in json.loads(line).items()}
        if not problem:
            last = (errors.read().strip().splitlines() or [""])[-1]
            problem = f"the process ended with {process.returncode}: {last[:200]}"
    return found, problem


def environment() -> dict[str, str]:
    """The environment of a measuring process: one thread, and no look at the network for weights."""
    folder = str(Path(__file__).parents[2])
    path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH", ""), folder) if part)
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONPATH": path}


def limit_memory(gib: float) -> None:
    """Let allocations of this process fail beyond ``gib``, so that a model that eats memory stops nothing else."""
    resource.setrlimit(resource.RLIMIT_DATA, (int(gib * GIB), int(gib * GIB)))
