"""Modules and their sizes: which can be cut, along which dimension, and the sizes that they state."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)
"""Norms that can lose channels, as they treat each by itself."""
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
"""The same, of single images."""
RECURRENT = (nn.RNNBase, nn.modules.rnn.RNNCellBase)
"""Recurrent layers, which can lose inputs."""


SIZES = (
    "in_channels",
    "out_channels",
    "groups",
    "in_features",
    "out_features",
    "num_features",
    "num_parameters",
    "embedding_dim",
    "nx",
    "nf",
    "input_size",
    "in1_features",
    "in2_features",
)
"""Attributes in which a module states its size, which slimming changes."""
_LATER = ("embedding_dim", "nx", "nf", "input_size", "in1_features", "in2_features")
"""Those of them that the descriptions of earlier releases do not have; they did not cut such modules."""


def is_layer(module: nn.Module) -> bool:
    """Whether a module is a convolution or a linear layer."""
    return isinstance(module, nn.Linear | _ConvNd)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is a ``Conv1D`` of transformers: a linear layer whose weight is [inputs, outputs]."""
    # by name, so that transformers need not be there
    return any(
        f"{kind.__module__}.{kind.__qualname__}" == "transformers.pytorch_utils.Conv1D" for kind in type(module).__mro__
    )


def output_dim(module: nn.Module) -> int:
    """Dimension of the outputs in a layer's weight: 1 for transposed convolutions, which store their inputs first."""
    return int(isinstance(module, _ConvTransposeNd))


def depthwise_groups(model: nn.Module) -> dict[str, int]:
    """Names of the convolutions with one input in every group, each with the number of its groups.

    Every input may have several outputs, except in transposed convolutions.
    """
    convolutions = [(n, m) for n, m in model.named_modules() if isinstance(m, _ConvNd)]
    return {
        n: m.groups
        for n, m in convolutions
        if m.groups == m.in_channels > 1 and (m.groups == m.out_channels or not isinstance(m, _ConvTransposeNd))
    }


def goes_by_input(entries: Tensor, groups: int) -> bool:
    """Whether a depthwise convolution has one unit for all outputs of an input, and not the same one for every input.

    Args:
        entries: the unit of each output, int [outputs]; -1 for none.
        groups: number of its groups.
    """
    outputs = entries.view(groups, -1)
    return outputs.shape[1] == 1 or bool((entries >= 0).any() and (outputs == outputs[:, :1]).all())


def update_sizes(module: nn.Module, groups: int | None) -> None:
    """Set the sizes that ``module`` states of itself to those of its tensors.

    Args:
        module: any module.
        groups: of a convolution that was depthwise at first, the groups that it has now; None for every other module.
    """
    if isinstance(module, RECURRENT):
        _update_inputs(module)
        return
    # a norm without a gain has no weight, and its statistics have the size
    candidates = (getattr(module, "weight", None), getattr(module, "running_mean", None))
    weight = next((t for t in candidates if isinstance(t, Tensor)), None)
    if weight is None:
        return
    if isinstance(module, _ConvNd):
        first, second = weight.shape[:2]
        if groups is not None:
            # it stays depthwise: with fewer channels it has fewer groups
            module.in_channels = module.groups = groups
            module.out_channels = first
        elif isinstance(module, _ConvTransposeNd):
            module.in_channels, module.out_channels = first, second * module.groups
        else:
            module.out_channels, module.in_channels = first, second * module.groups
    elif isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, (*BATCH_NORMS, *INSTANCE_NORMS)):
        module.num_features = len(weight)
    elif isinstance(module, nn.PReLU):
        module.num_parameters = len(weight)
    elif isinstance(module, nn.Bilinear):
        module.out_features, module.in1_features, module.in2_features = weight.shape
    elif isinstance(module, nn.Embedding | nn.EmbeddingBag):
        module.embedding_dim = weight.shape[1]
    elif is_conv1d(module):
        for attribute, size in zip(("nx", "nf"), weight.shape, strict=True):
            setattr(module, attribute, size)


def _update_inputs(module: nn.Module) -> None:
    """Set the number of inputs that a recurrent layer states of itself."""
    weights = {n: w for n, w in module.named_parameters(recurse=False) if n in ("weight_ih", "weight_ih_l0")}
    for weight in weights.values():
        setattr(module, "input_size", weight.shape[1])  # noqa: B010 - a type checker knows it as a module or a tensor
    renew_flat_weights(module)


def renew_flat_weights(module: nn.Module) -> None:
    """Let a recurrent layer read its present parameters, of which it keeps a list beside them."""
    if isinstance(module, nn.RNNBase):
        for name, weight in [*module.named_parameters(recurse=False)]:
            setattr(module, name, weight)  # writes it into the list too
        module.flatten_parameters()


def sizes(module: nn.Module) -> dict[str, int]:
    """Attributes in which a layer or norm states its size, and their values; empty for other modules."""
    kinds = (
        *(nn.Linear, nn.Bilinear, SparseLinear, nn.PReLU, nn.Embedding, nn.EmbeddingBag, _ConvNd),
        *(*BATCH_NORMS, *INSTANCE_NORMS, *RECURRENT),
    )
    if not isinstance(module, kinds) and not is_conv1d(module):
        return {}
    return {a: int(getattr(module, a)) for a in SIZES if hasattr(module, a)}


def stated_sizes(module: nn.Module, layer: Mapping[str, Any]) -> dict[str, Any]:
    """The sizes of ``module`` that its description ``layer`` states."""
    return {a: layer.get(a) for a in sizes(module) if a in layer or a not in _LATER}
