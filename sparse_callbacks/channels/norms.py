"""Which norm takes the output of which layer, and gains that are rescaled."""

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.optim import Optimizer

from sparse_callbacks.core.inspection import quiet, run
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

NORMS = (_BatchNorm, _InstanceNorm, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
"""Classes that divide what they take by a deviation, of a batch or of a sample."""


def norm_behind(model: nn.Module, example_input: Any) -> dict[str, str]:
    """For each convolution or linear layer, the batch norm that takes its output unchanged, by name.

    Args:
        model, example_input: see :func:`norm_inputs`.
    """
    inputs = norm_inputs(model, example_input)
    return {layer: norm for norm, layers in inputs.items() for layer in layers if layer}


def with_gains(model: nn.Module, norm_of: Mapping[str, str]) -> dict[str, str]:
    """Those layers of :func:`norm_behind` whose norm has a gain."""
    return {layer: norm for layer, norm in norm_of.items() if getattr(model.get_submodule(norm), "affine", False)}


def hides_its_channels(module: nn.Module) -> bool:
    """Whether a norm may divide each channel by a number of its own and has no entry for any: nothing tells which ones."""
    if isinstance(module, _BatchNorm | _InstanceNorm):
        return not module.affine and getattr(module, "running_var", None) is None
    # over more than the last dimension it may be one of the positions of an image
    return isinstance(module, nn.LayerNorm | nn.RMSNorm) and len(module.normalized_shape) > 1


def divides_by_own_statistics(norm: nn.Module) -> bool:
    """Whether a norm divides by statistics of what it takes, and not by running ones."""
    return norm.training or getattr(norm, "running_var", None) is None


def norm_inputs(
    model: nn.Module, example_input: Any, kinds: tuple[type[nn.Module], ...] = (_BatchNorm,)
) -> dict[str, list[str]]:
    """For each norm, the layers whose outputs it takes unchanged, one name for each of its calls.

    The name is that of a convolution or linear layer, or "" where the norm takes anything else. The model runs once, in
    eval mode, and is left as it was.

    Args:
        model: the model.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments.
        kinds: classes of the norms; by default batch norms.
    """
    # The tensors are kept too: an id is given to a new object once the old one is gone.
    made: dict[int, tuple[str, Tensor, int]] = {}
    found: dict[str, list[str]] = {}

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Linear | SparseLinear | _ConvNd):
                made[id(output)] = name, output, output._version
            elif inputs:
                layer, _, version = made.get(id(inputs[0]), ("", None, -1))
                # another version means that something was written to the layer's output in place
                found.setdefault(name, []).append(layer if version == inputs[0]._version else "")

        return hook

    watched: tuple[type[nn.Module], ...] = (nn.Linear, SparseLinear, _ConvNd, *kinds)
    with ExitStack() as hooks, quiet(model):
        for name, module in model.named_modules():
            if isinstance(module, watched):
                hooks.enter_context(module.register_forward_hook(watch(name)))
        run(model, example_input)
    return found


@torch.no_grad()
def rescale_gain(gain: nn.Parameter, factor: float, optimizers: Iterable[Optimizer]) -> None:
    """Multiply ``gain``, and its momentum in SGD, by ``factor``.

    A gain w = s * v is trained through v, with a scale s that changes from time to time. Steps of SGD on v along
    (d loss / d w) / s are the steps on w along d loss / d w. So another s is a factor on w and on its momentum, applied
    once, and the steps between two changes are ordinary ones.
    """
    gain.mul_(factor)
    for optimizer in optimizers:
        momentum = optimizer.state.get(gain, {}).get("momentum_buffer")
        if isinstance(momentum, Tensor):
            momentum.mul_(factor)
