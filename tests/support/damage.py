"""Damaged copies of files and of saved states: cut off, changed, of another kind, or with values that nobody saved."""

import copy
import io
import json
import pickle
import random
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

MARKER = Path(tempfile.gettempdir()) / "sparse_callbacks_executed"


class Executes:
    """Leaves a file behind where it is unpickled."""

    def __reduce__(self) -> Any:
        return (Path.touch, (MARKER,))


# ---------------------------------------------------------------------- bytes


def _torch_file(content: Any) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def _zip_of_text(_: bytes, __: random.Random) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("notes.txt", "nothing of use")
    return buffer.getvalue()


def _npz(_: bytes, __: random.Random) -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.zeros(3))
    return buffer.getvalue()


def _flipped(content: bytes, rng: random.Random, count: int) -> bytes:
    changed = bytearray(content)
    for _ in range(count):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _blanked(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + bytes(min(64, len(content) - start)) + content[start + 64 :]


BYTES: Mapping[str, Callable[[bytes, random.Random], bytes]] = {
    "cut off": lambda b, r: b[: r.randrange(1, len(b))],
    "cut off at its end": lambda b, r: b[: -r.randrange(1, 30)],
    "cut off at its beginning": lambda b, r: b[r.randrange(1, 30) :],
    "a bit flipped": lambda b, r: _flipped(b, r, 1),
    "another bit flipped": lambda b, r: _flipped(b, r, 1),
    "many bits flipped": lambda b, r: _flipped(b, r, 40),
    "a block of zeros": _blanked,
    "empty": lambda b, r: b"",
    "one byte": lambda b, r: b"P",
    "noise": lambda b, r: r.randbytes(500),
    "text": lambda b, r: b"epoch,loss\n1,0.5\n",
    "a picture": lambda b, r: b"\x89PNG\r\n\x1a\n" + r.randbytes(100),
    "another zip": _zip_of_text,
    "numpy's": _npz,
    "a list in JSON": lambda b, r: b"[1, 2]",
    "a deep nest in JSON": lambda b, r: b"[" * 100_000 + b"]" * 100_000,
    "a torch file of a list": lambda b, r: _torch_file([1, 2]),
    "a torch file of a number": lambda b, r: _torch_file(3),
    "a torch file of a nest": lambda b, r: _torch_file({"state_dict": {"a": {"b": {"c": 1}}}}),
    "a pickle that runs code": lambda b, r: pickle.dumps(Executes()),
    "a torch file that runs code": lambda b, r: _torch_file({"state_dict": Executes()}),
}


LEAVE_VALUES = ("a bit flipped", "another bit flipped", "many bits flipped", "cut off", "cut off at its end")
"""Damages of a text that may leave other values of the right kind."""


def damaged_file(path: Path, damage: str, seed: int, folder: Path) -> Path:
    """A copy of ``path`` with one of :data:`BYTES`, or "a folder" or "missing"; its neighbours are copied whole."""
    folder.mkdir(parents=True)
    for other in path.parent.glob(f"{path.stem}.*"):
        (folder / other.name).write_bytes(other.read_bytes())
    target = folder / path.name
    if damage in ("a folder", "missing"):
        target.unlink()
        if damage == "a folder":
            target.mkdir()
    else:
        target.write_bytes(BYTES[damage](path.read_bytes(), random.Random(seed)))
    return target


# ---------------------------------------------------------------------- values

HUGE = 10**12
DEEP: list[Any] = []
for _ in range(400):
    DEEP = [DEEP]


def _expanded(tensor: Tensor) -> Tensor:
    return tensor.new_zeros(1).expand(HUGE)


NUMBERS: Mapping[str, Any] = {
    "negative": -3,
    "beyond any count": 10**30,
    "a fraction": 1.5,
    "NaN": float("nan"),
    "infinite": float("inf"),
}
ANYTHING: Mapping[str, Any] = {
    "None": None,
    "a huge text": "x" * 10**6,
    "a list": [1],
    "a mapping": {"a": 1},
    "a deep nest": DEEP,
    "a tensor of another kind": torch.full((3, 1), float("nan")),
}
TENSORS: Mapping[str, Callable[[Tensor], Any]] = {
    "transposed and longer": lambda t: torch.cat([t.flatten(), t.flatten()[:1]])[None],
    "without elements": lambda t: t.new_zeros(0),
    "complex": lambda t: t.to(torch.complex64),
    "of NaN": lambda t: torch.full(t.shape, float("nan")),
    "infinite": lambda t: torch.full(t.shape, float("inf"), dtype=t.dtype if t.is_floating_point() else torch.float32),
    "of 10**12 elements": _expanded,
    "without values": lambda t: t.to("meta"),
    "sparse": lambda t: t[None].to_sparse(),
}


def leaves(nest: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every value in a nest of mappings and lists, with the keys that lead to it; mappings and lists among them."""
    if path:
        yield path, nest
    items = nest.items() if isinstance(nest, Mapping) else enumerate(nest) if isinstance(nest, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key))


def replaced(nest: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of ``nest`` with another value in one place."""
    found = copy.deepcopy(nest)
    place = found
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return found


def without(nest: Any, path: tuple[Any, ...]) -> Any:
    """A copy of ``nest`` without one key."""
    found = copy.deepcopy(nest)
    place = found
    for key in path[:-1]:
        place = place[key]
    del place[path[-1]]
    return found


def damaged_values(nest: Mapping[str, Any], left_out: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Copies of ``nest`` with one value that nobody can have saved there, each with a name.

    Args:
        nest: mappings and lists of values.
        left_out: how the names of values begin that may be anything.
    """
    for path, value in leaves(nest):
        where = "/".join(map(str, path))
        if left_out and f"{where} ".startswith(left_out):
            continue
        yield f"{where} missing", without(nest, path)
        others: dict[str, Any] = dict(ANYTHING)
        if isinstance(value, Tensor):
            others |= {name: make(value) for name, make in TENSORS.items()} | {"negative": -1}
        elif isinstance(value, int | float):
            others |= NUMBERS
        elif isinstance(value, str):
            others |= {"another text": value + "?", "negative": -1}
        elif isinstance(value, list):
            others |= {"empty": [], "in another order": list(reversed(value)), "negative": [-1, *value[1:]]}
        for name, other in others.items():
            if not _same(other, value):
                yield f"{where} {name}", replaced(nest, path, other)


def _same(one: Any, other: Any) -> bool:
    return type(one) is type(other) and not isinstance(one, Tensor) and bool(one == other)


def npz_file(arrays: Mapping[str, Any]) -> bytes:
    """A .npz file of arrays; of one that no disk can hold, the header alone."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, value in arrays.items():
            entry = io.BytesIO()
            if isinstance(value, Tensor) and value.numel() >= HUGE:
                header = {"descr": "<f8", "fortran_order": False, "shape": tuple(value.shape)}
                np.lib.format.write_array_header_1_0(entry, header)
            else:
                np.lib.format.write_array(entry, np.asanyarray(value))
            archive.writestr(f"{name}.npy", entry.getvalue())
    return buffer.getvalue()


def json_text(content: Any) -> bytes:
    """JSON, also of what has no text of its own there."""
    return json.dumps(content, default=str).encode()
