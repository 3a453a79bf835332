"""Runs that are compared: which folders hold one, what each was, what it reached and what it cost."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparse_callbacks.core.inspection import extra
from sparse_callbacks.core.record.record_file import FOLDER, RecordedRun, has_record, read_record

COSTS = ("flops/inference", "flops/inference_dense", "flops/training", "flops/training_dense")
SPARSITIES = ("sparsity/total", "sparsity/model")
_NO_METRICS = ("active/", "bytes/", "flops/", "sparsity/", "topology/", "compression", "speedup")
CONFIGURATION = ".hydra/config.yaml"
"""File in the folder of a run of ``train.py``: what it was configured with."""
FAILURE = "failure.txt"
"""File in the folder of a job that has failed: why, in a line."""


SHOWN_PATHS = 6
"""Paths of one reason that are named."""


@dataclass(frozen=True)
class ComparedRun:
    """One run, as far as its files tell.

    Attributes:
        folder: its folder.
        method: class of the method, such as ``"RigL"``; ``"dense"`` where there is none.
        seed: its seed; None where nobody knows.
        configuration: values by dotted key, such as ``"optim.lr"``; where it says nothing of the method, its arguments.
        layers: shape of each parameter by name; empty where there is no record.
        values: metrics (``"test/acc"``), measured sparsity and costs at the end, ``"compression"`` and ``"speedup"``; each is
            missing where the files do not tell.
    """

    folder: Path
    method: str
    seed: int | None
    configuration: Mapping[str, Any]
    layers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    values: Mapping[str, float] = field(default_factory=dict)


def read_runs(paths: Iterable[Path], metric: str) -> tuple[list[ComparedRun], list[tuple[Path, str]]]:
    """The runs in folders, or in folders of them, that have reached a metric.

    Args:
        paths: folders; also those of several runs, at any depth, such as those of a multirun.
        metric: a metric of the end, such as ``"test/acc"``.

    Returns:
        The runs, each folder once, and what is left out: path and reason.
    """
    runs, left_out, seen = [], [], set[Path]()
    for path in paths:
        if not path.is_dir():
            left_out.append(
                (path, "a file; give folders of runs" if path.exists() else "not there; give folders of runs")
            )
            continue
        folders, others = found_folders(path)
        left_out += [(other, _why_no_run(other)) for other in others]
        for folder in folders:
            if folder.resolve() in seen:
                continue
            seen.add(folder.resolve())
            found = read_run(folder, metric)
            if isinstance(found, ComparedRun):
                runs.append(found)
            else:
                left_out.append((folder, found.rstrip(".")))
    return runs, left_out


def left_out_lines(left_out: Iterable[tuple[Path, str]]) -> list[str]:
    """What is left out, one line for each reason, with the first of the paths that it holds of."""
    by_reason: dict[str, list[str]] = {}
    for path, reason in left_out:
        by_reason.setdefault(reason, []).append(shown_path(path))
    lines = []
    for reason, paths in by_reason.items():
        more = f" and {len(paths) - SHOWN_PATHS} more" if len(paths) > SHOWN_PATHS else ""
        lines.append(f"{', '.join(paths[:SHOWN_PATHS])}{more}: {reason}")
    return lines


def run_folders(path: Path) -> list[Path]:
    """Folders of runs at and below a folder, in the order of their names, numbers by size; also of runs that did not end."""
    return found_folders(path)[0]


def found_folders(path: Path) -> tuple[list[Path], list[Path]]:
    """The folders of runs at and below a folder, and the other folders there: those that neither are a run, nor hold one, nor
    lie in such a folder."""
    if has_record(path) or (path / CONFIGURATION).is_file():
        return [path], []
    runs, others = list[Path](), list[Path]()
    for below in sorted((entry for entry in path.iterdir() if entry.is_dir()), key=_by_number):
        # a folder of hidden files is nobody's run; a link is not followed, as it may lead back up
        if below.name.startswith(".") or (below.is_symlink() and _lies_along(below.resolve(), path.resolve())):
            continue
        within, without = ([], [below]) if below.is_symlink() else found_folders(below)
        runs, others = runs + within, others + without
    return (runs, others) if runs else ([], [path])


def _lies_along(one: Path, other: Path) -> bool:
    """One of two paths lies in the other."""
    return one.is_relative_to(other) or other.is_relative_to(one)


def _why_no_run(path: Path) -> str:
    """Why a folder is left out in which no run was found."""
    if path.is_symlink():
        return "a link, which is not followed; give the folder that it leads to"
    parts = {
        "record": f"without {FOLDER}/run.json",
        "metrics.json": f"without {CONFIGURATION}",
        "checkpoints": "but no record",
    }
    half = [f"{name} {lacks}" for name, lacks in parts.items() if (path / name).exists()]
    if half:
        return f"holds a part of a run alone ({half[0]})"
    return f"holds no run ({FOLDER}/run.json, or metrics.json and {CONFIGURATION})"


def _by_number(path: Path) -> tuple[int, str]:
    return (int(path.name), "") if path.name.isdecimal() else (-1, path.name)


def read_run(folder: Path, metric: str) -> ComparedRun | str:
    """A run, or why it cannot be compared."""
    try:
        run = _from_record(folder) if has_record(folder) else _from_metrics(folder)
    except (ValueError, OSError) as error:
        return str(error)
    if metric in run.values:
        return run
    failure = folder / FAILURE
    if failure.is_file():
        return f"failed: {failure.read_text(encoding='utf-8').strip()}"
    metrics = sorted(name for name in run.values if not name.startswith(_NO_METRICS))
    return (
        f"has no {metric}, but {', '.join(metrics)}"
        if metrics
        else "has no results: it did not finish, or has written them to another output_dir"
    )


def _from_record(folder: Path) -> ComparedRun:
    recorded = read_record(folder)
    run, values = recorded.run, dict[str, Any]()
    if run.status == "finished":
        # metrics that were only logged are those of the last time
        for row in recorded.rows:
            values |= {key: value for key, value in row.items() if "/" in key and value is not None}
    else:
        values |= {key: recorded.rows[-1].get(key) for key in (*COSTS, *SPARSITIES) if recorded.rows}
    values |= run.results
    values |= _measures(recorded, values)
    configuration = flat(run.configuration)
    if not any(key.startswith("method.") for key in configuration):
        configuration |= {f"method.{name}": text for name, text in run.arguments.items()}
    seed = configuration.get("seed", run.seed)
    layers = {layer.name: layer.shape for layer in run.layers}
    return ComparedRun(folder, run.method, seed, configuration, layers, _numbers(values))


def _measures(recorded: RecordedRun, values: Mapping[str, Any]) -> dict[str, float]:
    """ShrinkBench's compression ratio and theoretical speed-up, where the record tells them."""
    found = {}
    total = sum(layer.size for layer in recorded.run.layers)
    actives = [row["layers"] for row in recorded.rows if row.get("layers")]
    if total and actives:
        counted = {
            name: figures["active"] for name, figures in actives[-1].items() if figures.get("active") is not None
        }
        removed = sum(layer.size - counted[layer.name] for layer in recorded.run.layers if layer.name in counted)
        if removed < total:
            found["compression"] = total / (total - removed)
    elif total and recorded.run.method == "dense":
        found["compression"] = 1.0
    dense, left = values.get("flops/inference_dense"), values.get("flops/inference")
    if dense and left:
        found["speedup"] = dense / left
    return found


def _from_metrics(folder: Path) -> ComparedRun:
    """A run of an older version, or of one without a record: metrics.json and Hydra's configuration."""
    configuration = extra("yaml", "train").safe_load((folder / CONFIGURATION).read_text(encoding="utf-8"))
    if not isinstance(configuration, Mapping):
        raise ValueError(f"{CONFIGURATION} is not a configuration; run again, or leave this folder out")
    metrics = folder / "metrics.json"
    try:
        values = dict(json.loads(metrics.read_text(encoding="utf-8"))) if metrics.exists() else {}
    except (ValueError, TypeError) as error:
        raise ValueError(f"metrics.json cannot be read ({error}); run again, or leave this folder out") from None
    sparsity = values.get("sparsity/model")
    if sparsity is not None and sparsity < 1:
        values["compression"] = 1 / (1 - sparsity)
    target = (configuration.get("method") or {}).get("_target_")
    method = str(target).rpartition(".")[2] if target else "dense"
    return ComparedRun(folder, method, configuration.get("seed"), flat(configuration), {}, _numbers(values))


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    numbers = {key: value for key, value in values.items() if isinstance(value, int | float)}
    return {key: float(value) for key, value in numbers.items() if math.isfinite(value)}


def flat(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Values of nested mappings by dotted key."""
    found = dict[str, Any]()
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def shown_path(path: Path, start: Path | None = None) -> str:
    """A path from a folder (None: the current one) where it lies inside, else the whole path."""
    relative = os.path.relpath(path, start or Path.cwd())
    return str(path.absolute()) if relative.startswith("..") else relative


def common_folder(paths: Sequence[Path]) -> Path:
    """The deepest folder that all paths lie in."""
    return Path(os.path.commonpath([path.absolute() for path in paths]))
