"""Files that are written whole or not at all."""

import os
import stat
import uuid
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
