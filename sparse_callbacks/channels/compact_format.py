"""What a compact checkpoint says of its model beside the tensors: classes, sizes and shapes of layers; read, and compared."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.cuts import NORMS
from sparse_callbacks.core.inspection import extra

VERSION = 1
SIZES = ("in_channels", "out_channels", "groups", "in_features", "out_features", "num_features", "num_parameters")
"""Attributes in which a module states its size, which slimming changes."""
_FIXED = tuple(f"torch.nn.modules.{name}" for name in ("normalization", "sparse", "activation", "rnn", "instancenorm", "transformer"))
FORMS = ("kernel_size", "stride", "padding", "dilation", "output_padding", "padding_mode")
"""Those in which a convolution states what slimming leaves."""


def described(model: nn.Module, shared: Mapping[str, str]) -> dict[str, Any]:
    """The description of ``model``: plain values for JSON. ``shared`` names tensors that are stored under another name."""
    layers = {n: {"class": type(m).__name__, **sizes(m), **_form(m)} for n, m in model.named_modules()}
    return {"version": VERSION, "class": type(model).__qualname__, "layers": layers, "shared": dict(shared)}


def sizes(module: nn.Module) -> dict[str, int]:
    """Attributes that state the size of a layer or norm, and their values; empty for other modules."""
    sized = isinstance(module, (nn.Linear, nn.PReLU, _ConvNd, *NORMS))
    return {a: int(getattr(module, a)) for a in SIZES if hasattr(module, a)} if sized else {}


def _form(module: nn.Module) -> dict[str, Any]:
    found = {a: getattr(module, a) for a in FORMS} if isinstance(module, _ConvNd) else {}
    return {a: list(v) if isinstance(v, tuple) else v for a, v in found.items()}


# ---------------------------------------------------------------------- files


def beside(path: Path) -> Path:
    """Where the description of the tensors in ``path`` lies: ``x.json`` for ``x.safetensors``, otherwise the name and ``.json``.

    Raises:
        ValueError: ``path`` itself ends in ``.json``.
    """
    if path.suffix == ".json":
        raise ValueError(f"{path} would hold the tensors, and .json is for the description. Give a name like slim.safetensors.")
    return path.with_suffix(".json") if path.suffix == ".safetensors" else path.with_name(path.name + ".json")


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and description of the compact checkpoint in ``path``; nothing is unpickled.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: they are no such checkpoint, or one of another version.
    """
    load = extra("safetensors.torch", "channels").load_file
    for file in (path, beside(path)):
        if not file.is_file():
            raise FileNotFoundError(f"There is no file {file}. A compact checkpoint is two files, {path.name} and {beside(path).name}.")
    try:
        tensors: dict[str, Tensor] = load(path)
        description = dict(json.loads(beside(path).read_text()))
        if (version := description["version"]) == VERSION:
            tensors |= {n: tensors[other] for n, other in description["shared"].items()}
            description["class"], [layer["class"] for layer in description["layers"].values()]  # they are there
    except Exception as error:  # whatever safetensors and json find in a file that was cut off, or is another
        raise ValueError(
            f"{path} and {beside(path).name} are no compact checkpoint of this library ({type(error).__name__}: {error}). Write them anew "
            "with save_compact, and copy both files."
        ) from error
    if version != VERSION:
        raise ValueError(f"{path} is of version {version}, and this release reads version {VERSION}. Save it anew.")
    return tensors, description


# ---------------------------------------------------------------------- whether a model is the one described


def check(model: nn.Module, tensors: Mapping[str, Tensor], description: Mapping[str, Any], path: Path) -> None:
    """Refuse a checkpoint that is not of ``model``'s class and arguments, or whose tensors are not what it says of them.

    Raises:
        ValueError: says where they differ.
    """
    if difference := (
        _classes(model, description)
        or _names(model, tensors)
        or _ties(model, tensors)
        or _forms(model, description["layers"])
        or _limits(model, tensors)
        or _shapes(model, tensors, description["layers"])
    ):
        raise ValueError(
            f"{path} is of another model: {difference}. Give an instance of {description['class']}, made with the arguments of the model "
            "that was slimmed."
        )


def _classes(model: nn.Module, description: Mapping[str, Any]) -> str:
    if (own := type(model).__qualname__) != description["class"]:
        return f"it is {own} here and {description['class']} there"
    found = {n: type(m).__name__ for n, m in model.named_modules()}
    expected = {n: layer["class"] for n, layer in description["layers"].items()}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            return f"{name!r} is {found.get(name, 'missing')} here and {expected.get(name, 'missing')} there"
    return ""


def _names(model: nn.Module, tensors: Iterable[str]) -> str:
    """Of other tensors than ``model`` has, but for biases that slimming has added."""
    own, there = set(model.state_dict()), set(tensors)
    added = {n for n in there - own if n.rpartition(".")[2] == "bias" and f"{n.rpartition('.')[0]}.weight" in own}
    differing = sorted((own ^ there) - added)
    return f"{differing[0]} is {'missing' if differing[0] in own else 'too many'} there" if differing else ""


def _ties(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Of parameters that are one in only one of the two."""
    here: dict[Tensor, str] = {}
    there: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        one, other = here.setdefault(parameter, name), there.setdefault(id(tensors[name]), name)
        if one != other and parameter.numel():
            few, many = ("here", "there") if one != name else ("there", "here")
            return f"{name} and {one if one != name else other} are one parameter {few} and two {many}"
    return ""


def _forms(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> str:
    for name, module in model.named_modules():
        for attribute, value in _form(module).items():
            if value != (there := layers[name].get(attribute)):
                return f"{attribute} of {name!r} is {value} here and {there} there"
        for attribute in sizes(module):
            if not isinstance(there := layers[name].get(attribute), int) or there < 1:
                return f"{attribute} of {name!r} is {there} there"
    return ""


def _limits(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Of tensors that are larger than the model's, or smaller where slimming never cuts."""
    buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in tensors}
    for name, own in [*model.named_parameters(remove_duplicate=False), *buffers.items()]:
        module, there = model.get_submodule(name.rpartition(".")[0]), tensors[name].shape
        fixed = type(module).__module__ in _FIXED and not sizes(module)
        if len(there) != own.ndim or any(a > b or (fixed and a != b) for a, b in zip(there, own.shape, strict=True)):
            return f"{name} has shape {list(own.shape)} here and {list(there)} there"
    return ""


def _shapes(model: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Any]]) -> str:
    """Of tensors that have not the sizes that are stated for their layers."""
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for local in ("weight", "bias", "running_mean", "running_var") if sizes(module) else ():
            there = tensors.get(prefix + local)
            if there is not None and (expected := _expected(module, local, layers[name])) != list(there.shape):
                return f"{prefix}{local} has shape {list(there.shape)} there, where the sizes beside it mean {expected}"
    return ""


def _expected(module: nn.Module, local: str, stated: Mapping[str, Any]) -> list[Any]:
    """Shape of a tensor of a layer with the ``stated`` sizes."""
    if isinstance(module, _ConvNd):
        out, into, groups = (stated[a] for a in ("out_channels", "in_channels", "groups"))
        first, second = (into, out) if isinstance(module, _ConvTransposeNd) else (out, into)
        return [out] if local == "bias" else [first, second // groups, *module.kernel_size]
    if isinstance(module, nn.Linear):
        return [stated["out_features"]] if local == "bias" else [stated["out_features"], stated["in_features"]]
    return [stated["num_features" if "num_features" in stated else "num_parameters"]]
