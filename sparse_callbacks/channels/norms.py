"""Batch norms behind pruned layers: which they are, and their gains under a factor."""

from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from sparse_callbacks.core.inspection import quiet, run


def norms_behind(model: nn.Module, example_input: Any) -> dict[str, str]:
    """The batch norm with a gain that takes the output of a convolution or linear layer as it is, by the layer's name.

    Args:
        model, example_input: see :func:`norm_inputs`.
    """
    gains = {n for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.affine}
    return {layer: n for n, layers in norm_inputs(model, example_input).items() if n in gains for layer in layers if layer}


def norm_inputs(model: nn.Module, example_input: Any) -> dict[str, list[str]]:
    """By name of a batch norm, for each of its calls the convolution or linear layer whose output it takes as it is; "" for none.

    The model runs once, in eval mode; modes and random generators stay as they are.

    Args:
        model: to be looked at.
        example_input: a tensor, a tuple of positional or a mapping of named arguments.
    """
    made: dict[int, tuple[str, Tensor, int]] = {}  # the tensors too, as an id is of what is alive
    found: dict[str, list[str]] = {}

    def note(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
            if isinstance(module, nn.Linear | _ConvNd):
                made[id(output)] = name, output, output._version
            elif inputs:
                layer, _, version = made.get(id(inputs[0]), ("", None, -1))
                found.setdefault(name, []).append(layer if version == inputs[0]._version else "")  # else something was added in place

        return hook

    with ExitStack() as hooks, quiet(model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | _ConvNd | _BatchNorm):
                hooks.enter_context(module.register_forward_hook(note(name)))
        run(model, example_input)
    return found


@torch.no_grad()
def rescale(gain: nn.Parameter, factor: float, optimizers: Iterable[Optimizer]) -> None:
    """Multiply ``gain`` and its momentum in SGD.

    With w = s * v, steps of SGD on v along (d loss / d w) / s are the steps on w along d loss / d w: another s is a factor on w and its
    momentum, once, and between two of them nothing is special.
    """
    gain.mul_(factor)
    for optimizer in optimizers:
        if isinstance(momentum := optimizer.state.get(gain, {}).get("momentum_buffer"), Tensor):
            momentum.mul_(factor)
