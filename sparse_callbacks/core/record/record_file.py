"""The files of a run's record: ``run.json``, ``rows.jsonl`` and ``masks.pt`` in ``record``."""

import json
import math
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_callbacks.core.files import replacing

RECORD_VERSION = 1
FOLDER = "record"
STATUSES = ("running", "finished", "stopped", "failed")
RecordedRow = Mapping[str, Any]
"""Figures of one time by their full names, ``layers`` among them: figures of each sparse layer by parameter name."""


@dataclass(frozen=True)
class LayerRecord:
    """One parameter of the model.

    Attributes:
        name: its name in ``named_parameters()``.
        shape: its shape.
        sparse: whether a mask holds it.
        target: planned sparsity; None where it stays dense or is decided during training.
        reason: why it stays dense; empty where it does not.
        positions: outputs of one sample that each of its weights is multiplied for: 1 in a linear layer, the area of the
            output in a convolution; 0 where nothing is multiplied (biases, norms); None where no batch has told.
    """

    name: str
    shape: tuple[int, ...]
    sparse: bool
    target: float | None = None
    reason: str = ""
    positions: int | None = None

    @property
    def size(self) -> int:
        """Number of weights."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class RunRecord:
    """What is said once of a run.

    Attributes:
        method: class of the method, such as ``"RigL"``; ``"dense"`` where there is none; several are joined by ``" + "``.
        arguments: the method's constructor arguments, as text.
        layers: every parameter, in the model's order.
        started: when the run began, ISO 8601 in UTC.
        libraries: versions by distribution, and of Python.
        machine: processor, device, threads, processes.
        seed: the seed of the method; None where there is none.
        batch: samples of one optimizer step, over all processes and accumulated batches; None where no batch has told.
        length: optimizer steps that were planned; None where nobody knows.
        calendar: when updates fall, in optimizer steps (``start``, ``stop``, ``every``); empty without a calendar.
        chain: names of the sparse layers' weights from input to output, where each reads the outputs of the one before;
            empty where the network is not such a chain.
        chain_reason: why there is no chain.
        configuration: the resolved configuration of the run; empty where there is none.
        command: what was typed to start it; empty where nobody knows.
        plan: the table of the plan.
        status: ``"running"``, ``"finished"``, ``"stopped"`` or ``"failed"``.
        results: the metrics of the end by name, such as ``test/acc``.
        channels: what slimming has changed: ``before`` and ``after`` (each ``parameters``, ``flops``, ``latency``),
            ``groups`` (rows of ``name``, ``units``, ``removed``, ``reason``) and ``proof``, its text; empty without slimming.
        warnings: what the run has warned of, each with its remedy, in the order in which it did.
        title: the headline of the report; empty where nobody gave one.
    """

    method: str
    arguments: Mapping[str, str]
    layers: Sequence[LayerRecord]
    started: str
    libraries: Mapping[str, str] = field(default_factory=dict)
    machine: Mapping[str, str] = field(default_factory=dict)
    seed: int | None = None
    batch: int | None = None
    length: int | None = None
    calendar: Mapping[str, int] = field(default_factory=dict)
    chain: Sequence[str] = ()
    chain_reason: str = ""
    configuration: Mapping[str, Any] = field(default_factory=dict)
    command: str = ""
    plan: str = ""
    status: str = "running"
    results: Mapping[str, float] = field(default_factory=dict)
    channels: Mapping[str, Any] = field(default_factory=dict)
    warnings: Sequence[str] = ()
    title: str = ""


@dataclass(frozen=True)
class RecordedRun:
    """The record of a run, as its folder holds it.

    Attributes:
        folder: the folder of the run (the one that holds ``record``).
        run: what is said once.
        rows: the figures of each time, in order.
        masks: of small layers and those that read the input, by parameter name: bool ``"first"`` and ``"last"`` masks.
    """

    folder: Path
    run: RunRecord
    rows: Sequence[RecordedRow]
    masks: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)


def begin_files(folder: Path) -> None:
    """Make the folder of a new record; what an earlier run has recorded there is removed."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    for name in ("run.json", "rows.jsonl", "masks.pt"):
        (place / name).unlink(missing_ok=True)


def copy_files(source: Path, folder: Path) -> None:
    """Begin the record in ``folder`` with the files of the run in ``source``, which goes on there."""
    begin_files(folder)
    for path in (source / FOLDER).iterdir():
        shutil.copyfile(path, folder / FOLDER / path.name)


def write_run(folder: Path, run: RunRecord) -> None:
    """Write ``run.json`` anew, whole or not at all."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    with replacing(place / "run.json") as beside:
        beside.write_text(json.dumps({"version": RECORD_VERSION, **asdict(run)}, indent=1, allow_nan=False) + "\n")


def append_rows(folder: Path, rows: Iterable[RecordedRow]) -> None:
    """Add rows at the end of ``rows.jsonl``; numbers that are not finite become null, which JSON has in their place."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    with (place / "rows.jsonl").open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(_finite(row), separators=(",", ":"), allow_nan=False) + "\n" for row in rows)


def cut_rows(folder: Path, step: int, most: int | None = None) -> None:
    """Remove the rows after an optimizer step, from which a resumed run goes on.

    Args:
        folder: the folder of the run.
        step: the latest step whose rows stay.
        most: how many rows stay at most; None: any number.
    """
    path = folder / FOLDER / "rows.jsonl"
    if not path.exists():
        return
    kept = [row for row in _read_rows(path) if row["step"] <= step][:most]
    with replacing(path) as beside:
        beside.write_text("".join(json.dumps(row, separators=(",", ":")) + "\n" for row in kept), encoding="utf-8")


def write_masks(folder: Path, masks: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write ``masks.pt`` anew, whole or not at all."""
    place = folder / FOLDER
    place.mkdir(parents=True, exist_ok=True)
    with replacing(place / "masks.pt") as beside:
        torch.save({name: dict(pair) for name, pair in masks.items()}, beside)


def has_record(folder: Path) -> bool:
    """Whether a folder is that of a recorded run."""
    return (folder / FOLDER / "run.json").is_file()


def refuse_unrecorded(folder: Path, argument: str) -> None:
    """Refuse the folder of a run to compare with that holds no record.

    Args:
        folder: the folder.
        argument: the name of the argument that has given it.

    Raises:
        FileNotFoundError: it holds none.
    """
    if not has_record(folder):
        raise FileNotFoundError(
            f"{argument}={str(folder)!r} holds no record of a run ({FOLDER}/run.json). Give the folder of a dense run that "
            "was recorded, as that of train.py method=none."
        )


def read_record(folder: Path) -> RecordedRun:
    """The record in the folder of a run.

    Raises:
        FileNotFoundError: the folder holds no record.
        ValueError: its files are damaged, or of a later version of this package.
    """
    place = folder / FOLDER
    if not has_record(folder):
        raise FileNotFoundError(
            f"{folder} holds no record of a run ({FOLDER}/run.json). Give the folder of a run of train.py, or that of the "
            "callback SparsityReport."
        )
    try:
        found = json.loads((place / "run.json").read_text(encoding="utf-8"))
        version = found.pop("version")
        if version > RECORD_VERSION:
            raise ValueError(f"it has version {version}, and this package knows {RECORD_VERSION}: install a later one")
        layers = [LayerRecord(**{**layer, "shape": tuple(layer["shape"])}) for layer in found.pop("layers")]
        run = replace(RunRecord(**found, layers=()), layers=tuple(layers))
        rows = _read_rows(place / "rows.jsonl") if (place / "rows.jsonl").exists() else []
        masks = torch.load(place / "masks.pt", weights_only=True) if (place / "masks.pt").exists() else {}
    except (ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError) as error:
        raise ValueError(
            f"the record in {place} cannot be read: {error}. Run again, or leave this folder out."
        ) from error
    return RecordedRun(folder, run, rows, masks)


def _read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file; a last line that a killed process has left unfinished is not one."""
    lines = path.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines[:-1]]


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
