"""Reading files that may be damaged: one kind of error, and nothing in them is executed."""

import json
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from sparse_callbacks.core.error_text import first_line
from sparse_callbacks.core.files import description_path, file_checksum
from sparse_callbacks.core.inspection import extra

_ZIP = b"PK\x03\x04"
# the pickled magic number that torch files began with before they were zip archives
_LEGACY = b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."


def refuse_broken(path: Path | str, advice: str, opened: Callable[[], IO[bytes]] | None = None) -> None:
    """Refuse a path that is not a whole torch file.

    Torch does not compare the checksums of its own files when it reads them: a flipped bit in a weight or a mask goes
    through. Comparing them is one pass over the file, without holding it in memory.

    Args:
        path: a path that exists.
        advice: what to do instead, as a sentence for the error.
        opened: opens the file for reading bytes, where ``path`` is not one of this machine; None: it is.

    Raises:
        ValueError: a folder, a file that cannot be read, or one that is cut off, changed or of another kind.
    """
    if opened is None and Path(path).is_dir():
        raise ValueError(
            f"{path} is a folder and not a checkpoint file. {advice} (A distributed checkpoint resumes "
            "under the strategy that wrote it; ModelParallelStrategy(save_distributed_checkpoint=False) writes one file.)"
        )
    try:
        with Path(path).open("rb") if opened is None else opened() as file:
            head = file.read(len(_LEGACY))
            damaged = _damaged_entry(file) if head.startswith(_ZIP) else None
        if damaged is not None:
            raise ValueError(f"the checksum of {damaged} in it is wrong")
        if not head.startswith(_ZIP) and head != _LEGACY:
            raise ValueError("it is empty" if not head else f"it begins with {head[:8]!r}, as no torch file does")
    # zipfile raises errors of many kinds in a file whose directory of entries was changed
    except Exception as error:
        raise ValueError(
            f"{path} is not a whole torch file ({type(error).__name__}: {error}): it was cut off or changed, or is of "
            f"another kind. {advice}"
        ) from error


def _damaged_entry(file: IO[bytes]) -> str | None:
    """The name of an entry of a zip archive whose checksum is wrong; None where all are right."""
    with zipfile.ZipFile(file) as archive:
        # all are 0 where torch was told to compute none (torch.serialization.set_crc32_options)
        return archive.testzip() if any(entry.CRC for entry in archive.infolist()) else None


def read_mapping(path: Path, advice: str, mapped: bool = False) -> Mapping[str, Any]:
    """What a torch file holds, on the CPU, read with ``weights_only=True``: a checkpoint that somebody else wrote must
    not run code.

    Args:
        path: a path that exists.
        advice: what to do instead, as a sentence for the error.
        mapped: its tensors stay in the file, from which the system reads what is looked at. Only for who lets go of them
            before anybody else may write to the file.

    Raises:
        ValueError: it is not a torch file, or holds something besides a mapping of tensors and plain values.
    """
    refuse_broken(path, advice)
    try:
        # the files that torch wrote before they were archives cannot be mapped
        mapped = mapped and zipfile.is_zipfile(path)
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds objects besides tensors, numbers and texts, or is damaged, and is not read for safety "
            f"({first_line(error)}). {advice}"
        ) from error
    except Exception as error:  # whatever torch's reader finds in a file that is another or was changed
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {first_line(error)}). {advice}") from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{path} holds a {type(found).__name__} and not a checkpoint or a state dict. {advice}")
    return found


def is_safetensors(path: Path) -> bool:
    """Whether a file begins as one of safetensors does: the length of its header, and the header, which is JSON."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        head = file.read(9)
    return head[8:] == b"{" and int.from_bytes(head[:8], "little") < path.stat().st_size


def read_tensors(path: Path, advice: str) -> dict[str, Tensor]:
    """The tensors of a file of safetensors, such as ``save_compact`` has written, by all of their names.

    Args:
        path: the file; what ``save_compact`` says of it is read too where it lies beside it.
        advice: what to do instead, as a sentence for the error.

    Raises:
        ImportError: safetensors (extra ``channels``) is missing.
        ValueError: the file was cut off or changed.
    """
    load = extra("safetensors.torch", "channels").load_file
    try:
        words = description_path(path)
        description = dict(json.loads(words.read_text())) if words.is_file() else {}
        if description.get("checksum", file_checksum(path)) != file_checksum(path):
            raise ValueError("the tensors are not those that were written: their checksum is another")
        tensors: dict[str, Tensor] = load(path)
        return tensors | {name: tensors[other] for name, other in description.get("shared", {}).items()}
    except Exception as error:  # whatever safetensors and json find in a file that was cut off, or is another
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {first_line(error)}). {advice}") from error
