"""Files that are written whole or not at all."""

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def replacing(path: Path, mode: int | None = None) -> Iterator[Path]:
    """A new, empty file beside ``path``, which takes the place of ``path`` in one operation where the block ends.

    Its name is unique, so that several processes may write the same file at once: the last one stays. Where the block
    fails, ``path`` is as it was and nothing is left beside it.

    Args:
        path: the file that is to be written.
        mode: permissions of the file; None for those of the file that is there, or else those of any new file.
    """
    if mode is None:
        mode = stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o666 & ~_umask()
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent)
    os.close(handle)
    beside = Path(name)
    try:
        yield beside
        beside.chmod(mode)
        beside.replace(path)
    except BaseException:
        with suppress(FileNotFoundError):
            beside.unlink()
        raise


def _umask() -> int:
    current = os.umask(0)  # it can be read by setting it alone
    os.umask(current)
    return current
