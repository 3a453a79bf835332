"""A slim model on disk: a compact checkpoint without pickle, and ONNX."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.probing import extra, quiet, tensors_in
from sparse_callbacks.proof import Difference, compare, outputs
from sparse_callbacks.surgery import NORMS

VERSION = 1
SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")
"""Attributes in which a module states its size."""


def save_compact(model: nn.Module, path: str | Path) -> None:
    """Write the tensors of ``model`` to ``path`` (safetensors), and the sizes of its layers to the same name with ``.json``.

    Raises:
        ImportError: safetensors (extra ``channels``) is missing.
        ValueError: the state dict holds something that is no tensor.

    Reload with :func:`load_compact`.
    """
    safetensors = extra("safetensors.torch", "channels")
    state = model.state_dict()
    if strange := [name for name, value in state.items() if not isinstance(value, Tensor)]:
        raise ValueError(f"{strange[0]} in the state dict is no tensor, and a compact checkpoint holds tensors only. Save it by itself.")
    first: dict[tuple[Any, ...], str] = {}
    for name, tensor in state.items():
        first.setdefault(_place(tensor) if tensor.numel() else (name,), name)
    shared = {n: first[_place(t)] for n, t in state.items() if t.numel() and first[_place(t)] != n}
    path = Path(path)
    safetensors.save_file({n: t.detach().clone(memory_format=torch.contiguous_format) for n, t in state.items() if n not in shared}, path)
    described = {n: {"class": type(m).__name__, **_sizes(m)} for n, m in model.named_modules() if _sizes(m)}
    description = {"version": VERSION, "class": type(model).__qualname__, "layers": described, "shared": shared}
    path.with_suffix(".json").write_text(json.dumps(description, indent=1))


def load_compact(model: nn.Module, path: str | Path) -> nn.Module:
    """Make ``model``, an instance of the original class in the original size, the one that :func:`save_compact` wrote.

    Layers take the sizes of the checkpoint, parameters and buffers its tensors, on the devices that they are on (from the meta
    device: on the CPU). Nothing is unpickled.

    Returns:
        ``model``.

    Raises:
        ImportError: safetensors (extra ``channels``) is missing.
        ValueError: the checkpoint is of another version, or of another model.
    """
    path = Path(path)
    tensors: dict[str, Tensor] = extra("safetensors.torch", "channels").load_file(path)
    description = json.loads(path.with_suffix(".json").read_text())
    if description["version"] != VERSION:
        raise ValueError(f"{path} is of version {description['version']}, and this release reads version {VERSION}. Save it anew.")
    modules = dict(model.named_modules())
    found = {n: type(m).__name__ for n, m in modules.items() if _sizes(m)}
    expected = {n: layer["class"] for n, layer in description["layers"].items()}
    if differing := sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)):
        name = differing[0]
        raise ValueError(
            f"{path} is of another model: {name!r} is {found.get(name, 'missing')} here and {expected.get(name, 'missing')} there. Give an "
            f"instance of {description['class']}, made with the arguments of the model that was slimmed."
        )
    _check_names(model, {**tensors, **description["shared"]}, path)
    for name, layer in description["layers"].items():
        for attribute in SIZES:
            if attribute in layer:
                setattr(modules[name], attribute, layer[attribute])
    _take(model, tensors | {n: tensors[other] for n, other in description["shared"].items()})
    return model


def export_onnx(model: nn.Module, path: str | Path, example_input: Any, tolerance: float = 1e-4) -> Difference:
    """Write ``model`` in eval mode to ``path`` as ONNX, run it in onnxruntime and compare the outputs on ``example_input``.

    Args:
        model: such as :func:`~sparse_callbacks.slimming.slim` returns; its modes stay as they are.
        path: of the file.
        example_input: a tensor, a tuple of positional or a mapping of named arguments.
        tolerance: largest relative difference that counts as equal.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime (extra ``onnx``) is missing.
        ValueError: onnxruntime computes something else.
    """
    extra("onnx", "onnx"), extra("onnxscript", "onnx")
    runtime = extra("onnxruntime", "onnx")
    named = dict(example_input) if isinstance(example_input, Mapping) else None
    positional = () if named is not None else tuple(example_input) if isinstance(example_input, tuple | list) else (example_input,)
    with quiet(model):
        torch.onnx.export(model, positional, str(path), kwargs=named, dynamo=True, external_data=False, verbose=False)
        expected = outputs(model, [example_input])
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    fed = zip(session.get_inputs(), tensors_in(example_input), strict=True)
    found = session.run(None, {slot.name: tensor.detach().cpu().numpy() for slot, tensor in fed})
    difference = compare([t.cpu() for t in expected], [torch.from_numpy(array) for array in found])
    if difference.relative > tolerance:
        raise ValueError(
            f"onnxruntime computes something else from {path}: {difference}, and tolerance={tolerance:g} is allowed. Compare on inputs of "
            "real data, or give a larger tolerance=."
        )
    return difference


def _sizes(module: nn.Module) -> dict[str, int]:
    sized = isinstance(module, (nn.Linear, nn.PReLU, _ConvNd, *NORMS))
    return {a: int(getattr(module, a)) for a in SIZES if hasattr(module, a)} if sized else {}


def _place(tensor: Tensor) -> tuple[Any, ...]:
    """Where a tensor lies in memory."""
    return tensor.device, tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride()


def _check_names(model: nn.Module, tensors: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint with other tensors than ``model`` has, but for biases that slimming has added."""
    own = set(model.state_dict())
    added = {n for n in tensors.keys() - own if n.rpartition(".")[2] == "bias" and f"{n.rpartition('.')[0]}.weight" in own}
    if differing := sorted((own ^ tensors.keys()) - added):
        raise ValueError(
            f"{path} is of another model: {differing[0]} is {'missing' if differing[0] in own else 'too many'} there. Give an instance "
            "made with the arguments of the model that was slimmed."
        )


def _take(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put ``tensors`` in the place of parameters and buffers; those that were one parameter stay one."""
    made: dict[int, nn.Parameter] = {}
    for name, tensor in tensors.items():
        owner, _, local = name.rpartition(".")
        module = model.get_submodule(owner)
        old = module._buffers.get(local) if local in module._buffers else module._parameters[local]
        here = tensor if old is None or old.is_meta else tensor.to(old.device)
        if local in module._buffers:
            module._buffers[local] = here
            continue
        flag = True if old is None else old.requires_grad
        new = nn.Parameter(here, requires_grad=flag) if old is None else made.setdefault(id(old), nn.Parameter(here, requires_grad=flag))
        module.register_parameter(local, new)
