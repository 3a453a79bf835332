"""Sizes that modules split their channels by, and what they are after channels were cut.

A forward that calls ``torch.split(x, self.width, 1)`` fails, or splits elsewhere, once channels are gone. Which attribute of
which class holds such sizes is a table; most of these classes are timm's.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn

from sparse_callbacks.channels.known_classes import Shape, inner_shape, known_as, modules_around

Number = Callable[[str, int], int]
"""Gives the entries that a parameter has along a dimension, by its name inside the module.

Raises a KeyError where there is no such parameter."""
Sizes = dict[str, Any]
"""Sizes by attribute, a number or several of them; the attribute of an inner module has its name in front."""


def _equal_parts(module: Any, number: Number) -> Sizes:
    return {"width": number("conv1.weight", 0) // module.scale}


def _expanded(module: Any, number: Number) -> Sizes:
    return {"expand_chs": number("conv_exp.conv.weight", 0)}


def _of_kernels(module: Any, number: Number) -> Sizes:
    return {"splits": [_read(inner, f"{name}.weight", number) for name, inner in module.items()]}


def _of_paths(module: Any, number: Number) -> Sizes:
    # all paths read all inputs otherwise, and nothing is split
    parts = module.num_paths if module.split_input else 1
    return {"in_channels": parts * _read(module.paths[0].conv, "paths.0.conv.weight", number)}


def _read(convolution: Any, name: str, number: Number) -> int:
    """How many channels a convolution reads; each of its own groups has one weight where it is depthwise."""
    inputs = number(name, 1)
    return number(name, 0) if inputs == 1 < convolution.groups else inputs * int(convolution.groups)


def _key_and_value(_: Any, number: Number) -> Sizes:
    return {"embed_dim": number("out_proj.weight", 1)}


def _query_and_context(module: Any, number: Number) -> Sizes:
    return {"input_split": [number("h.weight", 0), number("h.weight", 1), module.focal_level + 1]}


def _gated(_: Any, number: Number) -> Sizes:
    hidden, mixed = number("fc2.weight", 1), number("conv.weight", 0)
    return {"split_indices": [hidden, hidden - mixed, mixed]}


def _bands(_: Any, number: Number) -> Sizes:
    branches = [number(f"token_mixer.dwconv_{branch}.weight", 0) for branch in ("hw", "w", "h")]
    return {"token_mixer.split_indexes": [number("norm.weight", 0) - sum(branches), *branches]}


def _partial(_: Any, number: Number) -> Sizes:
    # what the convolution makes takes the place of what it reads, and may be of another size
    mixed = number("spatial_mixing.partial_conv3.weight", 1)
    untouched = number("mlp.0.weight", 1) - number("spatial_mixing.partial_conv3.weight", 0)
    return {"spatial_mixing.dim_conv3": mixed, "spatial_mixing.dim_untouched": untouched}


SPLITS: Mapping[str, Callable[[Any, Number], Sizes]] = {
    "timm.layers.mixed_conv2d.MixedConv2d": _of_kernels,
    "timm.layers.selective_kernel.SelectiveKernel": _of_paths,
    "timm.models.cspnet.CrossStage": _expanded,
    "timm.models.cspnet.CrossStage3": _expanded,
    "timm.models.dla.DlaBottle2neck": _equal_parts,
    "timm.models.fasternet.MLPBlock": _partial,
    "timm.models.focalnet.FocalModulation": _query_and_context,
    "timm.models.inception_next.MetaNeXtBlock": _bands,
    "timm.models.mambaout.GatedConvBlock": _gated,
    "timm.models.mobilevit.LinearSelfAttention": _key_and_value,
    "timm.models.res2net.Bottle2neck": _equal_parts,
}
"""Classes by their qualified names, and what their weights say of the sizes."""


def split_sizes(module: nn.Module, shape_of: Callable[[str], Shape | None] | None = None) -> Sizes:
    """What the attributes of ``module`` that it splits channels by must be for its weights; empty for most modules.

    Args:
        module: any module.
        shape_of: the shape of a parameter by its name inside the module, None where there is none; by default that of
            the module's own.
    """
    known = known_as(module, SPLITS)
    if not known:
        return {}

    def number(name: str, dim: int) -> int:
        shape = inner_shape(module, name) if shape_of is None else shape_of(name)
        if shape is None:
            raise KeyError(name)
        return int(shape[dim])

    try:
        found = SPLITS[known](module, number)
    except (AttributeError, KeyError, TypeError):  # what a class is made of differs between its releases
        return {}
    return {name: size for name, size in found.items() if _held(module, name) is not None}


def update_splits(module: nn.Module) -> None:
    """Let ``module`` split its channels by the sizes that its weights have now; nothing happens to most modules.

    It may be called at any time, also when the weights are the first ones again.
    """
    for name, size in split_sizes(module).items():
        owner, _, attribute = name.rpartition(".")
        kind = type(_held(module, name))
        setattr(module.get_submodule(owner), attribute, kind(size))


def update_splits_around(model: nn.Module, names: Iterable[str]) -> None:
    """:func:`update_splits` for the modules of these names and every module that they are inside of."""
    for module in modules_around(model, names):
        update_splits(module)


def _held(module: nn.Module, name: str) -> Any:
    """The value of an attribute of ``module`` or of a module inside it; None where there is none."""
    owner, _, attribute = name.rpartition(".")
    return vars(module.get_submodule(owner)).get(attribute)
