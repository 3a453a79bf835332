"""Reader of W&B's offline file: LevelDB's log framing around protobuf records."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER, FILE_HEADER = 32768, 7, 7
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def frames(data: bytes) -> Iterator[bytes]:
    """Payloads of the log: each is cut into pieces (crc 4, length 2, type 1, then bytes) that never cross a block."""
    if len(data) < FILE_HEADER:
        return  # not even begun
    assert data[:4] == b":W&B"
    position, pieces = FILE_HEADER, []
    while position + HEADER <= len(data):
        left = BLOCK - position % BLOCK
        if left < HEADER:
            position += left
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        if kind not in (FULL, FIRST, MIDDLE, LAST) or position + HEADER + length > len(data):
            return  # the rest is still being written
        pieces.append(data[position + HEADER : position + HEADER + length])
        position += HEADER + length
        if kind in (FULL, LAST):
            yield b"".join(pieces)
            pieces = []


def records(path: Path) -> list[Record]:
    """All records of a run that has ended; the service writes the last ones a moment after `finish` has returned."""
    found: list[Record] = []
    for _ in range(200):
        found = [Record.FromString(frame) for frame in frames(path.read_bytes())]
        if any(record.WhichOneof("record_type") == "exit" for record in found):
            return found
        time.sleep(0.05)
    raise AssertionError(f"{path} has no end after 10 s: {len(found)} records")


def key_of(item: Any) -> str:
    return item.key or "/".join(item.nested_key)


def curves(path: Path) -> dict[str, list[tuple[float, Any]]]:
    """Points (trainer/global_step, value) of every logged key."""
    out: dict[str, list[tuple[float, Any]]] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "history":
            row = {key_of(item): json.loads(item.value_json) for item in record.history.item}
            for key, value in row.items():
                out.setdefault(key, []).append((row.get("trainer/global_step"), value))
    return out


def config(path: Path) -> dict[str, Any]:
    """The run's configuration, later values over earlier ones."""
    out: dict[str, Any] = {}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        updates = record.config.update if kind == "config" else record.run.config.update if kind == "run" else ()
        out |= {key_of(item): json.loads(item.value_json) for item in updates}
    return out


def exit_codes(path: Path) -> list[int]:
    return [record.exit.exit_code for record in records(path) if record.WhichOneof("record_type") == "exit"]


def step_metrics(path: Path) -> set[str]:
    """x axes that metrics were defined with."""
    found = [record.metric for record in records(path) if record.WhichOneof("record_type") == "metric"]
    names = {metric.name for metric in found}
    return {metric.step_metric for metric in found if metric.step_metric} & names


def summary(path: Path) -> dict[str, Any]:
    """The columns of the run in a table of runs: the latest value of every key."""
    out: dict[str, Any] = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            out |= {key_of(item): json.loads(item.value_json) for item in record.summary.update}
    return out


def named(path: Path) -> tuple[str, str, list[str]]:
    """Name, group and tags of the run."""
    (run,) = [record.run for record in records(path) if record.WhichOneof("record_type") == "run"]
    return run.display_name, run.run_group, list(run.tags)
