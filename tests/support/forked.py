"""Programs of the tests in processes of their own, forked from one that has imported torch and Lightning.

Each process of a run in several would import them for seconds, which is most of the time of such a test. Python's fork server
imports them once for a whole session of tests, and has no threads that a fork could break.
"""

import multiprocessing
import os
import runpy
import sys
from collections.abc import Mapping, Sequence
from multiprocessing import forkserver
from pathlib import Path

import lightning_fabric.utilities.rank_zero as of_fabric

IMPORTED = ["support.processes"]


def run_together(
    script: str, arguments: Sequence[str], environments: Sequence[Mapping[str, str]], folder: Path, timeout: float = 240
) -> None:
    """Run a script several times at once, as `python SCRIPT ARGUMENTS` in each of the environments.

    Args:
        script, arguments: the program and its arguments, the same for all.
        environments: the variables that a process has beside those of this one.
        folder: where the outputs are written.
        timeout: seconds until processes that are still there are killed.

    Raises:
        AssertionError: a process failed, with the end of what all of them have printed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED)
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    _start_server(path)
    outputs = [folder / f"{number}.out" for number in range(len(environments))]
    processes = [
        context.Process(
            target=_run,
            args=(script, list(arguments), dict(os.environ) | {"PYTHONPATH": path} | dict(more), str(output)),
        )
        for more, output in zip(environments, outputs, strict=True)
    ]
    try:
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout)
    finally:
        for process in processes:
            process.kill()
            process.join()
    said = "\n".join(output.read_text() for output in outputs if output.exists())
    assert [p.exitcode for p in processes] == [0] * len(processes), said[-4000:]


def _start_server(path: str) -> None:
    """Start the server, unless it runs, with a path on which it finds what it shall import."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = path
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def _run(script: str, arguments: list[str], environment: dict[str, str], output: str) -> None:
    """In the forked process: be the program."""
    with open(output, "wb") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environment)
    # Lightning reads it when it is imported, which was before this process had its rank
    of_fabric.rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))
    sys.argv[:] = [script, *arguments]
    runpy.run_path(script, run_name="__main__")
