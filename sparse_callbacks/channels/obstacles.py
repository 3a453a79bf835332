"""Why channels have to stay: operations on their way that mix them, and layers that must not be cut."""

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any

from torch import nn
from torch.nn.utils import parametrize

from sparse_callbacks.channels.channel_padding import channel_padding
from sparse_callbacks.core.selection import why_not_ranked

# a list of what is known to be safe: an operation that a newer torch brings is refused until somebody adds it here
KEEPS_CHANNELS = frozenset(
    {
        *("Abs", "Add", "Addcmul", "Clamp", "ClampMax", "ClampMin", "Div", "Erf", "Exp", "Log", "Maximum", "Minimum"),
        *("Mul", "Neg", "Pow", "Rsqrt", "Sqrt", "Sub"),
        *("Mean", "Sum"),
        *("Celu", "Elu", "Gelu", "Hardsigmoid", "Hardswish", "Hardtanh", "LeakyRelu", "Mish", "Relu", "Selu"),
        *("Sigmoid", "Silu", "Softplus", "Tanh", "Threshold"),
        *("AdaptiveAvgPool2D", "AdaptiveMaxPool2D", "AvgPool2D", "AvgPool3D", "MaxPool2DWithIndices"),
        *("MaxPool3DWithIndices", "MkldnnAdaptiveAvgPool2D"),
        *("ConstantPadNd", "ReflectionPad2D", "ReplicationPad2D"),
        *("UpsampleBicubic2D", "UpsampleBilinear2D", "UpsampleNearest1D", "UpsampleNearest2D", "UpsampleNearest3D"),
        *("UpsampleNearestExact2D",),
        *("Flatten", "Permute", "Squeeze", "T", "Transpose", "Unsqueeze"),
        *("Alias", "Clone", "Contiguous", "Copy", "NativeDropout", "ToCopy"),
    }
)
"""Names of backward nodes that treat each channel by itself.

A mean or a sum does so only over other dimensions than that of the channels, which a trace does not tell; the
comparison of outputs finds the others.
"""
PASSED = ("CONCAT", "SPLIT", "RESHAPE", "SLICE", "UNBIND", "EXPAND")
"""Kinds of nodes of torch-pruning that move channels, and say how with a mapping of indices."""
LAYERS = ("CONV", "LINEAR")
"""Kinds of nodes that make and read channels."""
FOLLOWERS = ("BN", "DEPTHWISE_CONV", "PRELU", "PARAMETER")
"""Kinds of nodes with one entry for each channel."""


def why_not_passed(node: Any, name: str) -> str:
    """Why channels that arrive at ``node`` cannot be removed; empty where they can.

    Args:
        node: a node of torch-pruning's graph.
        name: name of the node's module; empty where it is none of the model's.
    """
    kind = node.type.name
    if kind == "OUTPUT":
        return "these are outputs of the network"
    if kind == "ELEMENTWISE":
        return _why_operation_mixes(node)
    # torch-pruning calls a convolution depthwise where its groups equal its outputs, whatever its inputs are
    if kind == "DEPTHWISE_CONV" and node.module.in_channels != node.module.groups:
        return f"{name}: a grouped convolution with several inputs and one output in each group"
    if kind in PASSED or kind in LAYERS or kind in FOLLOWERS:
        return ""
    module = type(node.module).__name__
    return f"runs into {name or module} ({module}), of which no single channels can be removed"


def _why_operation_mixes(node: Any) -> str:
    """Why an operation that is not a module may mix channels; empty where it is known not to."""
    # the name of a backward node is that of its operation, such as MulBackward0
    operation = node.grad_fn.name().partition("Backward")[0].lstrip("_")
    # the trace starts from clones of the inputs, so that a clone without inputs is an input of the network
    if operation == "Clone" and not node.inputs:
        return "shares channels with the network's input"
    # a linear layer over more than one leading dimension is traced as a product of matrices inside the layer
    if operation in ("Addmm", "Mm") and all(n.type.name == "LINEAR" for n in node.outputs):
        return ""
    return "" if operation in KEEPS_CHANNELS else f"runs into {operation}, which is not known to keep channels apart"


def why_padding_stays(node: Any, pairs: set[tuple[int, int]]) -> str:
    """Why channels cannot be removed where ``node`` pads or crops channels; empty where they can, or it does not.

    Args:
        node: a node of torch-pruning's graph.
        pairs: the channels that arrive, as pairs of their index at the node and at the layer that makes them.
    """
    padding = channel_padding(node)
    if padding is None:
        return ""
    # a crop has a fixed width, so it would drop other channels once some are gone
    if padding.crops:
        return "runs into a crop of channels"
    if any(padding.holds(local) for local, _ in pairs):
        return "meets a padding of channels, whose width the model fixes"
    return ""


def why_layers_stay(model: nn.Module, globs: Sequence[str]) -> dict[str, str]:
    """The modules and parameters that must not be cut: reasons by their names.

    Args:
        model: the model.
        globs: globs of module or parameter names that the user excludes.
    """
    found: dict[str, str] = {}
    first_names: dict[nn.Parameter, str] = {}
    for name, module in model.named_modules():
        # _orig is left by torch.nn.utils.prune, _g by the old weight_norm
        if parametrize.is_parametrized(module) or any(k.endswith(("_orig", "_g")) for k in module._parameters):
            found[name] = f"{name} is parametrized: its weight is computed from others"
        for local, p in module._parameters.items():
            full = f"{name}.{local}" if name else local
            if p is not None and (reason := why_not_ranked(p)):
                found[name] = found[full] = f"{name or full}: {reason}"
            # a parameter of two modules would lose the same slices in both, and other channels arrive at each
            other = full if p is None else first_names.setdefault(p, full)
            if other != full:
                reason = f"{full} and {other} are one parameter"
                found[name] = found[other.rpartition(".")[0]] = reason
            if any(fnmatchcase(full, g) or fnmatchcase(name, g) for g in globs):
                found[name] = found[full] = f"{name or full} is excluded"
    return found


def refuse_unmatched_globs(globs: Sequence[str], model: nn.Module) -> None:
    """Refuse globs that match nothing, as typing errors do.

    Raises:
        ValueError: names some modules and parameters that there are.
    """
    names = [n for n, _ in model.named_modules()] + [n for n, _ in model.named_parameters()]
    for glob in globs:
        if not any(fnmatchcase(n, glob) for n in names):
            examples = ", ".join(filter(None, names[:6]))
            raise ValueError(f"exclude={glob!r} matches no module and no parameter. There are for example {examples}.")
