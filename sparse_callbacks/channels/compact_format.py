"""What a compact checkpoint says of its model, and whether another model is the one it describes."""

import json
from collections.abc import Iterable, Mapping
from operator import gt
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.compact_heads import becomes_slim, described_heads, why_other_heads
from sparse_callbacks.channels.compact_layers import (
    class_name,
    described_layer,
    is_sparse,
    split,
    state_names,
    why_other_patterns,
)
from sparse_callbacks.channels.module_sizes import INSTANCE_NORMS, RECURRENT, sizes, stated_sizes
from sparse_callbacks.core.files import description_path, file_checksum
from sparse_callbacks.core.inspection import extra
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.state_layout import is_count, shown_short

COMPACT_VERSIONS = (1, 2, 3)
"""Versions of the format: the second has truly sparse layers, the third attention heads, sizes of splits and ``Conv1D``
of transformers.

A model is written in the first that has what it needs."""
FORMS = ("kernel_size", "stride", "padding", "dilation", "output_padding", "padding_mode")
"""Attributes of a convolution that slimming leaves as they are."""
_NEVER_CUT = tuple(
    f"torch.nn.modules.{name}"
    for name in ("normalization", "sparse", "activation", "rnn", "instancenorm", "transformer")
)
"""Modules of torch whose tensors slimming leaves as they are, unless their sizes are stated."""


def described(model: nn.Module, shared: Mapping[str, str]) -> dict[str, Any]:
    """The description of ``model``, in plain values for JSON.

    Args:
        model: the model.
        shared: for each tensor that is stored under another name, that name.
    """
    # classes without their modules, so that a class may move to another file
    layers = {
        n: {"class": class_name(m), **sizes(m), **_form(m), **described_layer(m), **described_heads(m)}
        for n, m in model.named_modules()
    }
    has_third = any(layer.keys() & {"heads", "splits", "nf"} for layer in layers.values())
    version = 3 if has_third else 2 if any(map(is_sparse, layers.values())) else 1
    return {"version": version, "class": _own_class(model), "layers": layers, "shared": dict(shared)}


def _own_class(model: nn.Module) -> str:
    """The class of the whole model."""
    return class_name(model) if isinstance(model, SparseLinear) else type(model).__qualname__


def _form(module: nn.Module) -> dict[str, Any]:
    """:data:`FORMS` of a convolution, as JSON gives them back: lists in the place of tuples."""
    found = {a: getattr(module, a) for a in FORMS} if isinstance(module, _ConvNd) else {}
    return {a: list(v) if isinstance(v, tuple) else v for a, v in found.items()}


# ---------------------------------------------------------------------- files


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, Tensor]], dict[str, Any]]:
    """Tensors, parts of sparse weights and description of the compact checkpoint in ``path``; nothing is unpickled.

    For the parts see :func:`~sparse_callbacks.channels.compact_layers.split`.

    Raises:
        FileNotFoundError: one of the two files is missing.
        ValueError: they are not such a checkpoint, or one of another version.
    """
    load = extra("safetensors.torch", "channels").load_file
    words = description_path(path)
    for file in (path, words):
        if not file.is_file():
            raise FileNotFoundError(
                f"There is no file {file}. A compact checkpoint is two files, {path.name!r} and {words.name!r}."
            )
    try:
        tensors: dict[str, Tensor] = load(path)
        description = dict(json.loads(words.read_text()))
        version = description["version"]
        parts: dict[str, dict[str, Tensor]] = {}
        if version in COMPACT_VERSIONS:  # another version may have other keys, and gets the error about versions
            tensors |= {n: tensors[other] for n, other in description["shared"].items()}
            _ = description["class"]  # a KeyError here is better than one in the middle of loading
            _ = [layer["class"] for layer in description["layers"].values()]
            # those of version 0.1 have no checksum
            if description.get("checksum", file_checksum(path)) != file_checksum(path):
                raise ValueError("the tensors are not those that were written: their checksum is another")
            tensors, parts = split(tensors, description["layers"])
    except Exception as error:  # whatever safetensors and json find in a file that was cut off, or is another
        raise ValueError(
            f"{path} and {words.name} are not a compact checkpoint of this library ({type(error).__name__}: {error}). "
            "Write them anew with save_compact, and copy both files."
        ) from error
    if version not in COMPACT_VERSIONS:
        raise ValueError(
            f"{path} is of version {version}, and this release reads versions {', '.join(map(str, COMPACT_VERSIONS))}. Save it anew."
        )
    return tensors, parts, description


def completed(model: nn.Module, description: Mapping[str, Any]) -> dict[str, Any]:
    """A description with the sizes of instance norms, which files of versions 1 and 2 do not hold: they lost no channels."""
    layers = {n: dict(layer) for n, layer in description["layers"].items()}
    for name, module in model.named_modules():
        if isinstance(module, INSTANCE_NORMS) and name in layers:
            layers[name] = sizes(module) | layers[name]
    return {**description, "layers": layers}


# ---------------------------------------------------------------------- whether a model is the one described


def refuse_other_model(
    model: nn.Module,
    tensors: Mapping[str, Tensor],
    parts: Mapping[str, Mapping[str, Tensor]],
    description: Mapping[str, Any],
    path: Path,
) -> None:
    """Refuse a checkpoint of another class or other arguments than ``model``'s, or one that contradicts itself.

    Args:
        model: the model that would take the tensors.
        tensors, parts, description: content of the checkpoint, as :func:`read` gives it.
        path: file of the tensors, for the error.

    Raises:
        ValueError: says where they differ.
    """
    # classes come first: the other comparisons look layers up by the names of the model's modules
    difference = (
        _why_other_classes(model, description)
        or _why_other_names(model, tensors)
        or _why_other_ties(model, tensors)
        or _why_other_forms(model, description["layers"])
        or _why_other_limits(model, tensors, description["layers"])
        or _why_contradictory(model, tensors, description["layers"])
        or why_other_heads(model, tensors, description["layers"])
        or why_other_patterns(model, parts, description["layers"])
    )
    if difference:
        raise ValueError(
            f"{path} is of another model: {difference}. Give an instance of "
            f"{description['class']}, made with the arguments of the model that was slimmed."
        )


def _why_other_classes(model: nn.Module, description: Mapping[str, Any]) -> str:
    """Where the classes of the model and its modules differ from those described; empty where they do not."""
    own = _own_class(model)
    if own != description["class"] and not becomes_slim(model, description["class"]):
        return f"it is {own} here and {description['class']} there"
    found = {n: class_name(m) for n, m in model.named_modules()}
    expected = {n: layer["class"] for n, layer in description["layers"].items()}
    linear = {n for n, m in model.named_modules() if type(m) is nn.Linear}  # which become sparse layers
    found |= {n: expected[n] for n in linear if is_sparse(description["layers"].get(n, {"class": ""}))}
    found |= {n: expected[n] for n, m in model.named_modules() if becomes_slim(m, expected.get(n, ""))}
    for name in sorted(found.keys() | expected.keys()):
        if found.get(name) != expected.get(name):
            return f"{name!r} is {found.get(name, 'missing')} here and {expected.get(name, 'missing')} there"
    return ""


def _why_other_names(model: nn.Module, tensors: Iterable[str]) -> str:
    """A tensor that only one of model and checkpoint has; empty if none. Slimming may add biases."""
    own, there = state_names(model), set(tensors)
    # constants of removed channels go into a bias, also of a layer that had none
    added = {n for n in there - own if n.rpartition(".")[2] == "bias" and f"{n.rpartition('.')[0]}.weight" in own}
    differing = sorted((own ^ there) - added)
    if not differing:
        return ""
    return f"{differing[0]} is {'missing' if differing[0] in own else 'too many'} there"


def _why_other_ties(model: nn.Module, tensors: Mapping[str, Tensor]) -> str:
    """Two parameters that are tied in only one of model and checkpoint; empty if none."""
    first_here: dict[Tensor, str] = {}
    first_there: dict[int, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        here = first_here.setdefault(parameter, name)
        # read() gives a shared tensor to all of its names, so equal ids are ties
        there = first_there.setdefault(id(tensors[name]), name)
        # empty tensors are stored under each of their names, tied or not
        if here == there or not parameter.numel():
            continue
        if here != name:
            return f"{name} and {here} are one parameter here and two there"
        return f"{name} and {there} are one parameter there and two here"
    return ""


def _why_other_forms(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> str:
    """A convolution of another form, or a layer without a size in the description; empty if none."""
    for name, module in model.named_modules():
        for attribute, value in _form(module).items():
            there = layers[name].get(attribute)
            if value != there:
                return f"{attribute} of {name!r} is {value} here and {there} there"
        for attribute in stated_sizes(module, layers[name]):
            there = layers[name].get(attribute)
            # the description is a text file, and layers are about to take this number as their size
            if not is_count(there) or there < 1:
                return f"{attribute} of {name!r} is {shown_short(there)} there"
        stated = layers[name]
        if isinstance(module, _ConvNd) and any(stated[a] % stated["groups"] for a in ("in_channels", "out_channels")):
            return f"{name!r} has channels there that {stated['groups']} groups do not divide"
    return ""


def _why_other_limits(model: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Any]]) -> str:
    """A tensor that is larger than the model's, or smaller where slimming never cuts; empty if none."""
    buffers = {n: b for n, b in model.named_buffers(remove_duplicate=False) if n in tensors}
    layer_of = {module: layers[name] for name, module in model.named_modules()}  # a module may have further names
    for name, own in [*model.named_parameters(remove_duplicate=False), *buffers.items()]:
        module, there = model.get_submodule(name.rpartition(".")[0]), tensors[name].shape
        if isinstance(module, SparseLinear) and name.endswith("weight"):
            continue  # of live values; its size is compared with its pattern
        layer = layer_of[module]
        fixed = type(module).__module__ in _NEVER_CUT and "heads" not in layer and not stated_sizes(module, layer)
        as_many = own.ndim if fixed else _never_cut(module, name)
        # slimming only removes, so no size may be larger than the original one
        if there[:as_many] != own.shape[:as_many] or len(there) != own.ndim or any(map(gt, there, own.shape)):
            return f"{name} has shape {list(own.shape)} here and {list(there)} there"
        # a weight may be of another precision there, and not of another kind of numbers
        if (own.is_floating_point(), own.is_complex()) != (
            tensors[name].is_floating_point(),
            tensors[name].is_complex(),
        ):
            return f"{name} is {own.dtype} here and {tensors[name].dtype} there"
    return ""


def _never_cut(module: nn.Module, name: str) -> int:
    """How many leading dimensions of a tensor are never cut."""
    if isinstance(module, RECURRENT):
        return 1 if name.rpartition(".")[2].startswith("weight_ih") else 2
    return int(isinstance(module, nn.Embedding | nn.EmbeddingBag))


def _why_contradictory(model: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Any]]) -> str:
    """A tensor whose shape is not the one that the described sizes of its layer give; empty if none."""
    for name, module in model.named_modules():
        if not stated_sizes(module, layers[name]):
            continue
        prefix = f"{name}." if name else ""
        for local in (
            "weight",
            "bias",
            "running_mean",
            "running_var",
            "weight_ih",
            "weight_ih_l0",
            "weight_ih_l0_reverse",
        ):
            there = tensors.get(prefix + local)
            if there is None:
                continue
            # sizes come from one file and tensors from the other, which may not belong together
            expected = _shape(module, local, layers[name])
            if expected != list(there.shape):
                shape = list(there.shape)
                return f"{prefix}{local} has shape {shape} there, where the sizes beside it mean {expected}"
    return ""


def _shape(module: nn.Module, local: str, stated: Mapping[str, Any]) -> list[Any]:
    """Shape of a layer's tensor.

    Args:
        module: the layer.
        local: name of the tensor in the layer, such as ``weight``.
        stated: the sizes that the layer is described with.
    """
    if isinstance(module, _ConvNd):
        out, into, groups = (stated[a] for a in ("out_channels", "in_channels", "groups"))
        # transposed convolutions store their inputs first
        first, second = (into, out) if isinstance(module, _ConvTransposeNd) else (out, into)
        return [out] if local == "bias" else [first, second // groups, *module.kernel_size]
    if isinstance(module, nn.Linear | SparseLinear):
        return [stated["out_features"]] if local == "bias" else [stated["out_features"], stated["in_features"]]
    if isinstance(module, RECURRENT):
        gates: int = getattr(module, local).shape[0]
        return [gates, stated["input_size"]]
    if isinstance(module, nn.Bilinear):
        out = stated["out_features"]
        return [out] if local == "bias" else [out, stated["in1_features"], stated["in2_features"]]
    if isinstance(module, nn.Embedding | nn.EmbeddingBag):
        return [module.num_embeddings, stated["embedding_dim"]]
    if "nf" in stated:
        return [stated["nf"]] if local == "bias" else [stated["nx"], stated["nf"]]
    return [stated["num_features" if "num_features" in stated else "num_parameters"]]
