"""A slim model on disk: a compact checkpoint without pickle, and ONNX."""

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.compact_format import beside, check, described, read, sizes
from sparse_callbacks.channels.comparison import Difference
from sparse_callbacks.channels.onnx import larger, written
from sparse_callbacks.core.inspection import extra, quiet


def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write the tensors of ``model`` to ``path`` (safetensors), and the classes, sizes and forms of its layers as JSON beside it:
    ``slim.safetensors`` and ``slim.json``; to a name that does not end in ``.safetensors``, ``.json`` is appended.

    Raises:
        FileNotFoundError: there is no such folder.
        ImportError: safetensors (extra ``channels``) is missing.
        ValueError: the state dict holds something that is no tensor, or ``path`` ends in ``.json``.

    Reload with :func:`load_compact`.
    """
    path = Path(path)
    words = beside(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(f"There is no folder {path.parent} to write {path.name} to. Make it, or give another path.")
    safetensors = extra("safetensors.torch", "channels")
    state = model.state_dict()
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{strange[0]} in the state dict is no tensor, and a compact checkpoint holds tensors only. Save it by itself.")
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        first.setdefault(_place(tensor) if tensor.numel() else (name,), name)
    shared = {n: first[_place(t)] for n, t in state.items() if t.numel() and first[_place(t)] != n}
    safetensors.save_file({n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items() if n not in shared}, path)
    words.write_text(json.dumps(described(model, shared), indent=1))


def load_compact(model: nn.Module, path: str | Path) -> nn.Module:
    """Make ``model``, an instance of the original class in the original size, the one that :func:`save_compact` wrote.

    Layers take the sizes of the checkpoint, parameters and buffers its tensors, on the devices that they are on (from the meta
    device: on the CPU). Nothing is unpickled.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ImportError: safetensors (extra ``channels``) is missing.
        ValueError: the files are no compact checkpoint, or one of another version, or of another model: its class, the classes of its
            modules, kernels, strides, paddings, dilations, names and shapes of tensors are compared.
    """
    path = Path(path)
    tensors, description = read(path)
    check(model, tensors, description, path)
    for name, module in model.named_modules():
        for attribute in sizes(module):
            setattr(module, attribute, description["layers"][name][attribute])
    _take(model, tensors)
    return model


def export_onnx(
    model: nn.Module, path: str | Path, example_input: Any, tolerance: float | None = None, dynamic_batch: bool = True
) -> Difference:
    """Write ``model`` in eval mode to ``path`` as ONNX, run it in onnxruntime and compare the outputs on ``example_input``.

    Args:
        model: such as :func:`~sparse_callbacks.channels.slim.slim` returns; its modes stay as they are.
        path: of the file.
        example_input: a tensor, a tuple of positional or a mapping of named arguments.
        tolerance: largest relative difference that counts as equal; None: by the type of each output, 1e-8 for float64, 1e-4 for
            float32, 5e-2 below. Integers and bools must be the same.
        dynamic_batch: the file takes batches of any size, where dimension 0 of every input is the batch; where the model cannot be
            exported or gives something else so, with a warning, batches of the size of ``example_input``.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime (extra ``onnx``) is missing.
        ValueError: onnxruntime computes something else, or cannot run the file, as with types for which it has no convolutions.
    """
    extra("onnx", "onnx"), extra("onnxscript", "onnx"), extra("onnxruntime", "onnx")
    path = Path(path)
    with quiet(model):
        if dynamic_batch:
            try:
                return written(model, path, [example_input, larger(example_input)], tolerance)
            except Exception as error:  # whatever the exporter makes of a model that is not made for other sizes
                reason = f"{type(error).__name__}: {str(error)[:200]}"
        found = written(model, path, [example_input], tolerance)
    if dynamic_batch:
        warnings.warn(f"{path} takes batches of the size of example_input only. With another size: {reason}", stacklevel=2)
    return found


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory."""
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _take(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors`` in the place of parameters and buffers; those that were one parameter stay one."""
    made: dict[Tensor, nn.Parameter] = {}  # the old ones as keys: an id is given anew once its owner is gone
    for name, tensor in tensors.items():
        owner, _, local = name.rpartition(".")
        module = model.get_submodule(owner)
        old = module._buffers.get(local) if local in module._buffers else module._parameters[local]
        here = tensor if old is None or old.is_meta else tensor.to(old.device)
        if local in module._buffers:
            module._buffers[local] = here
            continue
        new = nn.Parameter(here, requires_grad=True if old is None else old.requires_grad)
        new = new if old is None else made.setdefault(old, new)
        made[new] = new  # a module that has two names is met again
        module.register_parameter(local, new)
