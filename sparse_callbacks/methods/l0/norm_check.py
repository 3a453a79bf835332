"""Checks that a batch norm registered right behind a convolution really takes its output."""

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.channels.norms import norm_inputs
from sparse_callbacks.core import distributed
from sparse_callbacks.core.example_inputs import example_inputs
from sparse_callbacks.core.inspection import map_tensors, quiet, run
from sparse_callbacks.methods.l0.channel_members import ChannelMembers


def check_on_example(
    model: nn.Module, members: Mapping[str, ChannelMembers], batches: Generator[Any, None, None]
) -> None:
    """Do :func:`check_norms` on the model's ``example_input_array`` or the first of ``batches``, and warn.

    Args:
        model: the model of the run.
        members: what belongs to the output channels of each gated kernel.
        batches: passes over data, calling the model; closed at the end.

    Raises:
        ValueError: see :func:`check_norms`.
    """
    try:
        example = example_inputs(model, batches)
    except ValueError:
        # there is neither an example nor a batch, and training needs none: the order of registration is mostly right
        unchecked = [norm for belonging in members.values() for norm in belonging.norms]
        if unchecked and distributed.rank() == 0:
            warnings.warn(
                f"Batch norms ({', '.join(unchecked)}) are closed with the convolutions that they are registered right "
                "behind, and nothing shows whether they take their outputs. Set example_input_array of the "
                "LightningModule, or give sparsify(..., data=) one batch, to have that checked.",
                stacklevel=3,
            )
        return
    for text in check_norms(model, members, example):
        if distributed.rank() == 0:
            warnings.warn(text, stacklevel=3)


def check_norms(model: nn.Module, members: Mapping[str, ChannelMembers], example_input: Any) -> list[str]:
    """Refuse a norm that is registered behind a convolution and takes something else than its output.

    Args:
        model: runs in eval mode, once, and once more for each convolution with a norm whose input is not the output of
            a layer.
        members: what belongs to the output channels of each gated kernel.
        example_input: a tensor, a tuple of positional or a mapping of named arguments.

    Returns:
        A warning for each convolution whose output goes into a norm that is not registered behind it.

    Raises:
        ValueError: a norm takes something else.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    convolutions = {name: names.get(id(m.weight), "") for name, m in model.named_modules() if isinstance(m, _ConvNd)}
    inputs = norm_inputs(model, example_input)
    found = []
    for kernel, belonging in members.items():
        norms = {*belonging.norms}
        own = {name for name, weight in convolutions.items() if weight == kernel}  # several, where weights are tied
        known = {norm for norm, layers in inputs.items() if own & {*layers}}
        # "" stands for an input that is not the output of a layer as it is, such as one after an activation function
        unclear = {norm for norm, layers in inputs.items() if "" in layers}
        if own and unclear and (unclear & norms or not known):
            # a run of the model for this convolution alone, so only where the first run has left it open
            alone = norms_behind_alone(model, example_input, own)
            known |= alone
            inputs |= {norm: sorted(own) for norm in alone}
        for norm in belonging.norms:
            foreign = sorted({*inputs.get(norm, [])} - own)
            if foreign:
                raise ValueError(_takes_something_else(norm, kernel, [layer for layer in foreign if layer]))
        # not refused: the network trains, and only what slim() and the statistics make of the channel suffers
        others = sorted(known - norms)
        if others:
            found.append(_registered_elsewhere(kernel, others))
    return found


def _takes_something_else(norm: str, kernel: str, layers: list[str]) -> str:
    what = "more than that convolution's output, or something else"
    if layers:
        what = f"the output of {' and '.join(layers)}"
    return (
        f"{norm} is registered right behind the convolution of {kernel}, so its channels would be closed with that "
        f"convolution's, but it takes {what}. Register every batch norm right behind the convolution that it alone "
        f"normalizes, or leave {kernel} out with exclude=."
    )


def _registered_elsewhere(kernel: str, norms: list[str]) -> str:
    verb = "is" if len(norms) == 1 else "are"
    return (
        f"{kernel} has gates, and its output goes into {' and '.join(norms)}, which {verb} not registered right behind "
        "its convolution: a closed channel is shifted there, so it is not zero behind the norm, slim() may keep it, "
        "and running statistics are taken of it. If the norm is that convolution's own, register it right behind, and "
        "it is closed there too."
    )


def norms_behind_alone(model: nn.Module, example_input: Any, layers: Iterable[str]) -> set[str]:
    """Names of batch norms that take the output channels of ``layers`` alone, also through activation functions.

    The model runs with NaN for its input and for the output of every layer with parameters. Only the outputs of
    ``layers`` have zeros in their even channels. So a norm takes these outputs alone if its even channels are free of
    NaN and its odd channels are NaN throughout: any other summand would bring NaN, and a shuffle would move them.

    Args:
        model: runs once, in eval mode.
        example_input: a tensor, a tuple of positional or a mapping of named arguments.
        layers: names of convolutions.
    """
    found: dict[str, bool] = {}
    chosen = {*layers}

    def watched(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if isinstance(module, _BatchNorm) and inputs:
                # a norm that is called several times has to take these outputs at each call
                found[name] = found.get(name, True) and _is_nan_at_odd_channels(inputs[0])
            return _nan_at_odd_channels(output) if name in chosen else map_tensors(_nan_everywhere, output)

        return hook

    # quiet: eval mode, so that no running statistics take the NaN in
    with ExitStack() as hooks, quiet(model):
        for name, module in model.named_modules():
            has_parameters = any(True for _ in module.parameters(False))
            if name in chosen or isinstance(module, _BatchNorm) or has_parameters:
                hooks.enter_context(module.register_forward_hook(watched(name)))
        run(model, map_tensors(_nan_everywhere, example_input))
    return {name for name, alone in found.items() if alone}


def _nan_everywhere(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() or tensor.is_complex() else tensor


def _nan_at_odd_channels(outputs: Tensor) -> Tensor:
    changed = torch.zeros_like(outputs)
    changed[:, 1::2] = torch.nan
    return changed


def _is_nan_at_odd_channels(inputs: Tensor) -> bool:
    missing = inputs.isnan()
    return not missing[:, ::2].any() and bool(missing[:, 1::2].all())
