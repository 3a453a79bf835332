"""Why channels have to stay: operations that they run into, and layers that no cut may touch."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from sparse_callbacks.channels.channel_padding import channel_padding

KEEPS_CHANNELS = frozenset({
    "Abs", "Add", "Addcmul", "AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "Alias", "AvgPool2D", "AvgPool3D", "Celu", "Clamp", "ClampMax",
    "ClampMin",
    "Clone", "ConstantPadNd", "Contiguous", "Copy", "Div", "Elu", "Erf", "Exp", "Flatten", "Gelu", "Hardsigmoid", "Hardswish",
    "Hardtanh", "LeakyRelu", "Log", "MaxPool2DWithIndices", "MaxPool3DWithIndices", "Maximum", "Mean", "Minimum", "Mish",
    "MkldnnAdaptiveAvgPool2D", "Mul", "Neg", "NativeDropout", "Permute", "Pow", "ReflectionPad2D", "Relu", "ReplicationPad2D", "Rsqrt",
    "Selu", "Sigmoid", "Silu", "Softplus", "Sqrt", "Squeeze", "Sub", "Sum", "T", "Tanh", "Threshold", "ToCopy", "Transpose", "Unsqueeze",
    "UpsampleBicubic2D", "UpsampleBilinear2D", "UpsampleNearest2D", "UpsampleNearestExact2D", "UpsampleNearest1D", "UpsampleNearest3D",
})  # fmt: skip
"""Names of backward nodes that leave each channel to itself; whether a mean or a sum does is for the comparison of outputs to find."""
PASSED = ("CONCAT", "SPLIT", "RESHAPE", "SLICE", "UNBIND", "EXPAND")
"""Kinds of nodes with an index mapping."""
LAYERS = ("CONV", "LINEAR")
FOLLOWERS = ("BN", "DEPTHWISE_CONV", "PRELU", "PARAMETER")


def obstacle(node: Any, name: str) -> str:
    """Why channels that arrive at ``node`` cannot be removed; empty where they can."""
    kind = node.type.name
    if kind == "OUTPUT":
        return "these are outputs of the network"
    if kind == "ELEMENTWISE":
        operation = node.grad_fn.name().partition("Backward")[0].lstrip("_")
        if operation == "Clone" and not node.inputs:  # what _marked leaves
            return "shares channels with the network's input"
        if operation in ("Addmm", "Mm") and all(n.type.name == "LINEAR" for n in node.outputs):
            return ""  # the product inside a linear layer over more than one leading dimension
        return "" if operation in KEEPS_CHANNELS else f"runs into {operation}, which is not known to keep channels apart"
    if kind == "DEPTHWISE_CONV" and node.module.in_channels != node.module.groups:
        return f"{name}: a grouped convolution with several inputs and one output in each group"
    if kind in PASSED or kind in LAYERS or kind in FOLLOWERS:
        return ""
    return f"runs into {name or type(node.module).__name__} ({type(node.module).__name__}), of which no single channels can be removed"


def constants(node: Any, pairs: set[tuple[int, int]]) -> str:
    """Why channels that arrive at ``node`` with these local indices cannot be removed where it pads or crops channels."""
    if (padding := channel_padding(node)) is None:
        return ""
    if padding.crops:
        return "runs into a crop of channels"
    return "meets a padding of channels, whose width the model fixes" if any(padding.holds(local) for local, _ in pairs) else ""


def forbidden(model: nn.Module, globs: Sequence[str]) -> dict[str, str]:
    """Names of modules and parameters that no cut may touch, with the reason."""
    found: dict[str, str] = {}
    owners: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        if parametrize.is_parametrized(module) or any(k.endswith(("_orig", "_g")) for k in module._parameters):
            found[name] = f"{name} is parametrized: its weight is computed from others"
        for local, p in module._parameters.items():
            full = f"{name}.{local}" if name else local
            if p is not None and (other := owners.setdefault(p, full)) != full:
                found[name] = found[other.rpartition(".")[0]] = f"{full} and {other} are one parameter"
            if any(fnmatchcase(full, g) or fnmatchcase(name, g) for g in globs):
                found[name] = found[full] = f"{name or full} is excluded"
    return found


def check_globs(globs: Sequence[str], model: nn.Module) -> None:
    names = [n for n, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
    for glob in globs:
        if not any(fnmatchcase(n, glob) for n in names):
            raise ValueError(
                f"exclude={glob!r} matches no module and no parameter. There are for example {', '.join(filter(None, names[:6]))}."
            )
