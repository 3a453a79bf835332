"""Values of a dense tensor in a temporary file, out of memory, until somebody asks for them back."""

import ctypes
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

SMALLEST = 2**18  # bytes; less than a file is worth
_ROOMY = "/var/tmp"


def offload(tensor: Tensor) -> Callable[[], None]:
    """Move the values of a dense tensor from memory into a temporary file, and return what moves them back.

    The tensor stays what it is, with the same values: its memory is a private map of the file, so whoever still holds
    the tensor may read it, differentiate by it and even write to it, and the system reads and drops its pages as it needs
    memory. The file has no name any more when this function returns: nothing is left behind, also where the process is
    killed, and what the disk has not received by the time the last holder lets go is never written to it.

    Moved back, it has memory of its own again; the very memory of before where somebody else has held that all the while,
    as another tensor of it or an array of numpy.

    The file lies in ``TMPDIR`` where that is set, otherwise in ``/var/tmp``, which unlike ``/tmp`` is on a disk everywhere.
    A tensor stays in memory where a file would gain nothing (small ones, those that share their memory with other tensors
    or processes, those of other devices), and where there is no room for one.

    Args:
        tensor: a tensor, or a Parameter.
    """
    if not _can_leave(tensor):
        return _stays
    values = tensor.detach()
    try:
        folder = _folder()
        if shutil.disk_usage(folder).free < 2 * values.nbytes:
            return _stays
        on_disk = _written(values, folder)
    except (
        OSError,
        RuntimeError,
    ):  # no right to write, or no room after all; torch raises the second where it cannot map
        return _stays
    memory = StorageWeakRef(values.untyped_storage())  # type: ignore[no-untyped-call]
    view = values.storage_offset(), values.size(), values.stride()
    del values  # the last reference of this module to the memory
    tensor.data = on_disk
    return partial(_move_back, tensor, memory, view)


def _move_back(tensor: Tensor, memory: StorageWeakRef, view: tuple[Any, ...]) -> None:
    """Give the tensor the memory that it had where others have kept it, and a copy in new memory otherwise."""
    kept = torch.UntypedStorage._new_with_weak_ptr(memory.cdata)
    values = torch.empty(0, dtype=tensor.dtype, device="cpu")
    tensor.data = tensor.detach().clone() if kept is None else values.set_(kept, *view)


def _stays() -> None:
    """The tensor has never left its memory."""


def _can_leave(tensor: Tensor) -> bool:
    """Whether the tensor's memory can be given to the system, as far as is known."""
    return (
        os.name == "posix"  # elsewhere a file that is in use cannot be removed
        and type(tensor) in (Tensor, nn.Parameter)
        and tensor.layout == torch.strided
        and tensor.device.type == "cpu"
        and SMALLEST <= tensor.nbytes == tensor.untyped_storage().nbytes()
        and not tensor.untyped_storage().is_shared()
        and not tensor.is_pinned()
    )


def _written(values: Tensor, folder: str) -> Tensor:
    """The same values in a file without a name."""
    with TemporaryDirectory(prefix="sparse_callbacks-", dir=folder) as inner:
        path = Path(inner) / "dense"
        # not by torch.save, which in torch 2.8 holds on to the memory until garbage is collected, nor by writing to a map of
        # the file, which ends the process where the disk is full
        path.write_bytes((ctypes.c_char * values.nbytes).from_address(values.data_ptr()))
        mapped: Any = torch.UntypedStorage.from_file(str(path), shared=False, nbytes=values.nbytes)
    return torch.empty(0, dtype=values.dtype, device="cpu").set_(mapped, 0, values.size(), values.stride())


def _folder() -> str:
    """Where large temporary files belong."""
    return gettempdir() if "TMPDIR" in os.environ or not os.access(_ROOMY, os.W_OK) else _ROOMY
