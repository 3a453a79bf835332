"""What is said once of a recorded run: its methods, its layers, its libraries and its machine."""

import math
import platform
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparse_callbacks.core import distributed
from sparse_callbacks.core.machine import processor
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.record.first_batch import WeightUse
from sparse_callbacks.core.record.record_file import LayerRecord, RunRecord
from sparse_callbacks.core.selection import Entry, entries

DENSE = "dense"
LIBRARIES = ("sparse-callbacks", "torch")


def described(model: nn.Module, methods: Sequence[Method], uses: Mapping[str, WeightUse], **said: object) -> RunRecord:
    """The record of a run that goes on.

    Args:
        model: the model.
        methods: its methods; none for a dense run.
        uses: the use of each parameter by one sample; empty before the first batch.
        said: further fields of RunRecord.
    """
    leader = methods[0] if methods else None
    calendar = None if leader is None else leader.calendar
    times = {} if calendar is None else {"start": calendar.start, "stop": calendar.stop, "every": calendar.every}
    fields = {
        "method": " + ".join(type(m).__name__.removesuffix("Callback") for m in methods) or DENSE,
        "arguments": _arguments(methods),
        "layers": tuple(_layers(model, methods, uses)),
        "seed": None if leader is None else leader.seed,
        "calendar": times,
        "plan": "\n\n".join(str(m.plan()) for m in methods),
    }
    return RunRecord(**{**fields, **said})  # type: ignore[arg-type]


def _arguments(methods: Sequence[Method]) -> dict[str, str]:
    if len(methods) == 1:
        return dict(methods[0].arguments)
    return {f"{i}.{name}": text for i, m in enumerate(methods) for name, text in m.arguments.items()}


def _layers(model: nn.Module, methods: Sequence[Method], uses: Mapping[str, WeightUse]) -> Iterable[LayerRecord]:
    of = {name: method for method in methods for name in method.params}
    planned = {name: zeros for m in methods for name, zeros in _planned(m).items()}
    # each method keeps dense what another one prunes: the reason of the last stands for the parameters of none
    known: Mapping[str, Entry] = {e.name: e for m in methods for e in m.entries}
    for entry in known.values() if known else entries(model):
        sparse = entry.name in of
        target = planned.get(entry.name) if sparse else None
        yield LayerRecord(
            entry.name,
            tuple(entry.full_shape),
            sparse,
            None if target is None else target / max(1, entry.size),
            "" if sparse or not methods else entry.reason,
            uses[entry.name].inference if entry.name in uses else None,
        )


def _planned(method: Method) -> Mapping[str, int]:
    """Planned zeros by parameter name; none where something else decides during training."""
    rows = {row.name: row.zeros for row in method.plan() if row.zeros is not None}
    return rows if method.plans_counts else {}


def now() -> str:
    """The time in UTC, as ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def libraries(further: Iterable[str] = ()) -> dict[str, str]:
    """Versions by distribution, and of Python; what is not installed is left out."""
    found = {"python": platform.python_version()}
    for name in (*LIBRARIES, *further):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> dict[str, str]:
    """Processor, device, threads and processes of the run."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return {
        "processor": processor(),
        "device": name,
        "threads": str(torch.get_num_threads()),
        "processes": str(distributed.world_size()),
        "system": platform.system(),
    }


def command() -> str:
    """What was typed to start this process; empty where it was no Python file, as in a notebook."""
    script = Path(sys.argv[0]) if sys.argv and sys.argv[0] else Path()
    # a notebook's kernel and a test runner are files of installed packages
    if script.suffix != ".py" or "site-packages" in script.parts:
        return ""
    return shlex.join(["python", *sys.argv])


def as_json(value: Any) -> Any:
    """A value as JSON can hold it: what is neither number, text, list nor mapping becomes its text."""
    if isinstance(value, Mapping):
        return {str(key): as_json(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value if isinstance(value, str | int | float | bool) or value is None else str(value)
