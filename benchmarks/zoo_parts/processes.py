"""Runs each model in a process of its own, with limits of time and memory."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from zoo_parts.stages import SIDES

Row = dict[str, Any]


def all_rows(
    names: Sequence[str], jobs: int, seconds: float, memory: float, script: Path, sides: Sequence[str] = SIDES
) -> Iterator[Row]:
    """A row for each model, in the order in which they end.

    Args:
        names: names of models.
        jobs: processes at a time, of one thread each.
        seconds: limit of each side of a model.
        memory: limit of each process's own memory, in GiB.
        script: the file that measures one model with ``--one NAME --sides ... --memory ...``, and prints a line of JSON
            for each side.
        sides: what is measured of each model.
    """
    with ThreadPoolExecutor(jobs) as pool:
        running = {pool.submit(one_row, name, seconds, memory, script, sides): name for name in names}
        for done in as_completed(running):
            yield {"name": running[done], **done.result()}


def one_row(name: str, seconds: float, memory: float, script: Path, sides: Sequence[str] = SIDES) -> Row:
    """All sides of one model. If one hangs or is killed the row says so, and those after it run in a new process."""
    row: Row = {}
    left = list(sides)
    while left:
        found, problem = one_process(name, left, seconds, memory, script)
        row |= found
        missing = [side for side in left if side not in found]
        if missing:
            row[missing[0]] = {"failed": problem}
        left = missing[1:]
    return row


def one_process(name: str, sides: Sequence[str], seconds: float, memory: float, script: Path) -> tuple[Row, str]:
    """The rows of the sides that a process has ended, and why it has not ended the others."""
    command = [sys.executable, "-W", "ignore", str(script), "--one", name, "--sides", *sides, "--memory", str(memory)]
    # files and not pipes: they keep the row of the side before one that hangs
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(command, stdout=out, stderr=errors, env=environment(), start_new_session=True)
        problem = "" if ends(process, out.fileno(), seconds) else f"no end within {seconds:.0f} s"
        out.seek(0)
        errors.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
        found = {side: row for line in lines for side, row in json.loads(line).items()}
        last = (errors.read().strip().splitlines() or ["it says nothing"])[-1]
    return found, problem or f"the process ended with {process.returncode}: {last[:200]}"


def ends(process: subprocess.Popen[bytes], out: int, seconds: float) -> bool:
    """Wait for a process, and kill it once it has written nothing to the file ``out`` for ``seconds``; whether it ended."""
    size, deadline = 0, time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            process.wait(min(0.5, seconds))
            return True
        except subprocess.TimeoutExpired:
            written = os.fstat(out).st_size
            if written > size:  # a side has ended, and the time of the next begins
                size, deadline = written, time.monotonic() + seconds
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return False


def environment() -> dict[str, str]:
    """The environment of a measuring process: one thread, and no weights from the network."""
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join(part for part in (os.environ.get("PYTHONPATH", ""), root) if part)
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
