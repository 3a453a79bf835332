"""Files that are written whole or not at all, and the two files of a compact checkpoint."""

import os
import stat
import uuid
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """A new name beside ``path``; what is written there takes the place of ``path`` in one operation where the block ends.

    The name is unique, so that several processes may write the same file at once: the last one stays. Where the block
    fails, ``path`` is as it was and nothing is left beside it. A link stays one, and a file that is there already keeps
    its permissions.

    Args:
        path: the file that is to be written.
    """
    target = Path(os.path.realpath(path))
    # the name is cut because a file system allows 255 bytes
    beside = target.with_name(f".{target.name[:50]}.{uuid.uuid4().hex}.partial")
    try:
        yield beside
        if target.exists() and _permissions(beside) != _permissions(target):
            beside.chmod(_permissions(target))
        os.replace(beside, target)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise


def _permissions(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def file_checksum(path: Path) -> str:
    """CRC-32 of a file, which shows that a bit in it was flipped: safetensors keeps none itself."""
    found = 0
    with path.open("rb") as file:
        while block := file.read(2**20):
            found = zlib.crc32(block, found)
    return f"{found:08x}"


def description_path(path: Path) -> Path:
    """The file that describes the tensors in ``path``: ``x.json`` for ``x.safetensors``, else ``path`` with ``.json``.

    Raises:
        ValueError: ``path`` itself ends in ``.json``, or has no name.
    """
    if not path.name:
        raise ValueError(f"path={str(path)!r} has no file name. Give a name like slim.safetensors.")
    if path.suffix == ".json":
        raise ValueError(
            f"{path} would hold the tensors, and .json is for the description. Give a name like slim.safetensors."
        )
    # only this ending is replaced: net-0.5 and net-0.3 would otherwise have one description
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path.with_name(path.name + ".json")
