"""Folders of runs that are named after the time: no two runs write into one."""

import os
from pathlib import Path
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig, read_write

from sparse_callbacks.tasks.summary import quoted

TIME = "${now:"
"""What stands in the name of a folder that is named after the time."""


class OwnFolder(Callback):
    """Hydra's callback that gives a run, or a multirun, a folder of its own where the time names it.

    Two runs that begin in the same second would share `outputs/DAY/TIME`, and one would replace the checkpoints of the other. The
    second has `outputs/DAY/TIME-2`. A folder that was typed is taken as it is, so that a resumed run goes on in its own.
    """

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        _take_own(config, "run")

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        folder = _take_own(config, "sweep")
        if folder is not None:
            # each job composes its configuration anew, from Hydra's overrides
            with read_write(config.hydra.overrides):
                config.hydra.overrides.hydra.append(f"hydra.sweep.dir={quoted(str(folder))}")


def _take_own(config: DictConfig, kind: str) -> Path | None:
    """Create a folder of its own for a run or a multirun, and write its path to `hydra.run.dir` or `hydra.sweep.dir`.

    Args:
        config: the configuration, with Hydra's own part.
        kind: "run" or "sweep".

    Returns:
        The folder; None where the one of the configuration stays.
    """
    part = config.hydra[kind]
    if TIME not in str(part._get_node("dir")._value()) or several_processes():
        return None
    try:
        folder = new_folder(Path(part.dir))
    except OSError:
        return None  # Hydra creates it next, and its error is answered in words
    with read_write(part):
        part.dir = str(folder)
    return folder


def new_folder(wanted: Path) -> Path:
    """Create a folder that did not exist: `wanted`, or else the first free one of `wanted-2`, `wanted-3`, ...

    Args:
        wanted: its path; folders above it are created where they are absent.

    Raises:
        OSError: it cannot be created.
    """
    wanted.parent.mkdir(parents=True, exist_ok=True)
    folder, number = wanted, 1
    while True:
        try:
            folder.mkdir()  # one process alone succeeds, where a look whether it exists would let two pass
        except FileExistsError:
            number += 1
            folder = wanted.with_name(f"{wanted.name}-{number}")
        else:
            return folder


def several_processes() -> bool:
    """Whether a launcher such as torchrun or srun has started several processes of one run, which share its folder."""
    return any(int(os.environ.get(name) or 1) > 1 for name in ("WORLD_SIZE", "SLURM_NTASKS"))
