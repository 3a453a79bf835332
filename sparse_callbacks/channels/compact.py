"""A slim model on disk: a compact checkpoint in two files, written and read without pickle."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.compact_format import completed, described, read, refuse_other_model
from sparse_callbacks.channels.compact_heads import put_slim, state_heads
from sparse_callbacks.channels.compact_layers import compact_states, put_sparse
from sparse_callbacks.channels.module_sizes import renew_flat_weights, stated_sizes
from sparse_callbacks.core.argument_types import checked
from sparse_callbacks.core.files import description_path, file_checksum, replacing
from sparse_callbacks.core.inspection import extra


@checked
def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write the tensors of ``model`` to ``path`` (safetensors), and a description of its layers beside it.

    The description is JSON with the classes, sizes and forms of layers: ``slim.json`` beside ``slim.safetensors``. To a
    name that does not end in ``.safetensors``, ``.json`` is appended. Reload with :func:`load_compact`.

    A `SparseLinear` takes the place of its live weights: their values and, in int32, their columns. Where a network was
    trained with masks, its layers are dense ones, and so are they in the file. Attention modules are written with the
    number of heads that they have now.

    Args:
        model: the model; hooks and modes are not saved.
        path: file of the tensors.

    Raises:
        FileNotFoundError: the folder of ``path`` is missing.
        ImportError: safetensors (extra ``channels``) is missing.
        ValueError: the state dict holds something that is not a tensor, or ``path`` ends in ``.json``.

    Example:
        >>> import torch
        >>> from sparse_callbacks import load_compact, save_compact
        >>> save_compact(torch.nn.Linear(4, 2), "small.safetensors")
        >>> load_compact(torch.nn.Linear(8, 6), "small.safetensors")
        Linear(in_features=4, out_features=2, bias=True)
    """
    path = Path(path)
    # a bad name is refused before anything is written
    words = description_path(path)
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"There is no folder {path.parent} to write {path.name} to. Make it, or give another path."
        )
    safetensors = extra("safetensors.torch", "channels")
    with compact_states(model):
        state = model.state_dict()
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if strange:
        raise ValueError(
            f"{strange[0]} in the state dict is not a tensor, and a compact checkpoint holds tensors only. "
            "Save it by itself."
        )
    # tied parameters are stored once, and the description names the others; empty tensors all lie at address 0
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        first.setdefault(_place(tensor) if tensor.numel() else (name,), name)
    shared = {n: first[_place(t)] for n, t in state.items() if t.numel() and first[_place(t)] != n}
    # safetensors takes contiguous tensors that share no memory
    tensors = {
        name: tensor.detach().clone(memory_format=torch.contiguous_format)
        for name, tensor in state.items()
        if name not in shared
    }
    with replacing(path) as beside, replacing(words) as words_beside:
        safetensors.save_file(tensors, beside)
        words_beside.write_text(json.dumps(described(model, shared) | {"checksum": file_checksum(beside)}, indent=1))


@checked
def load_compact(model: nn.Module, path: str | Path) -> nn.Module:
    """Turn ``model`` into the model that :func:`save_compact` wrote.

    Layers take the sizes of the checkpoint, and parameters and buffers its tensors, on the devices that they are on
    (from the meta device: on the CPU). Nothing is unpickled. Layers that were `SparseLinear` are that again, whether they
    are here or are an ``nn.Linear``; for dense ones call ``to_dense(model)`` afterwards. An ``nn.MultiheadAttention`` that
    lost heads becomes the `SlimAttention` that it was, and attention modules of timm and transformers state their heads.

    Args:
        model: an instance of the original class in the original size.
        path: file of the tensors.

    Returns:
        ``model``.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ImportError: safetensors (extra ``channels``) is missing.
        ValueError: the files are not a compact checkpoint, or one of another version or another model. Compared are the
            model's class, the classes of its modules, kernels, strides, paddings, dilations, names and shapes of
            tensors.

    Example:
        >>> import torch
        >>> from sparse_callbacks import load_compact, save_compact
        >>> save_compact(torch.nn.Linear(4, 2), "small.safetensors")
        >>> load_compact(torch.nn.Linear(8, 6), "small.safetensors").weight.shape
        torch.Size([2, 4])
    """
    path = Path(path)
    tensors, parts, description = read(path)
    description = completed(model, description)
    refuse_other_model(model, tensors, parts, description, path)
    # every refusal came before this, so that a model that is refused stays as it is
    put_slim(model, description["layers"])
    for name, module in model.named_modules():
        for attribute, size in stated_sizes(module, description["layers"][name]).items():
            setattr(module, attribute, size)
    _take(model, {name: tensor for name, tensor in tensors.items() if name not in parts})
    for module in model.modules():
        renew_flat_weights(module)
    put_sparse(model, parts, description["layers"])
    state_heads(model)
    return model


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory."""
    # two views of one storage are one tensor only where offset, shape and strides agree too
    address = tensor.untyped_storage().data_ptr(), tensor.storage_offset()
    return tensor.device, *address, tensor.shape, tensor.stride()


def _take(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors`` in the place of parameters and buffers; tied parameters stay tied."""
    # by the old parameter and not by its id, which a new object may get once the old one is gone
    replaced_by: dict[Tensor, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner, _, local = name.rpartition(".")
        module = model.get_submodule(owner)
        is_buffer = local in module._buffers
        old = module._buffers[local] if is_buffer else module._parameters[local]
        placed = tensor if old is None or old.is_meta else tensor.to(old.device)
        if is_buffer:
            module._buffers[local] = placed
            continue
        # slimming may have added a bias where the original layer has none
        new = nn.Parameter(placed, requires_grad=True if old is None else old.requires_grad)
        if old is not None:
            new = replaced_by.setdefault(old, new)
        replaced_by[new] = new  # a module with two names is met again, with the new parameter already in it
        module.register_parameter(local, new)
