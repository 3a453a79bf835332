"""Whether batch norms that are tied to convolutions by the order of registration are those that take their outputs."""

import warnings
from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from sparse_callbacks.channels.norms import norm_inputs
from sparse_callbacks.channels.prunable import example_inputs
from sparse_callbacks.core import distributed
from sparse_callbacks.core.inspection import map_tensors, quiet, run
from sparse_callbacks.methods.l0.channel_members import Tied


def rehearse(model: nn.Module, tied: Mapping[str, Tied], batches: Generator[Any, None, None]) -> None:
    """:func:`check` with the model's ``example_input_array`` or the first of ``batches``, and warn; also where there is neither.

    Args:
        model: of the run.
        tied: what goes with the output channels of the gated kernels.
        batches: passes over data, calling the model; closed at the end.

    Raises:
        ValueError: see :func:`check`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the data is augmented does not matter here
            example = example_inputs(model, batches)
    except ValueError:  # nothing to look with, and training needs none
        if distributed.rank() == 0 and (unseen := [n for t in tied.values() for n in t.norms]):
            warnings.warn(
                f"Batch norms ({', '.join(unseen)}) are closed with the convolutions that they are registered right behind, and nothing "
                "shows whether they take their outputs. Set example_input_array of the LightningModule to have that checked.",
                stacklevel=3,
            )
        return
    for text in check(model, tied, example):
        if distributed.rank() == 0:
            warnings.warn(text, stacklevel=3)


def check(model: nn.Module, tied: Mapping[str, Tied], example_input: Any) -> list[str]:
    """Refuse a norm that is tied to a convolution by the order in which they were registered, and takes something else.

    Args:
        model: runs in eval mode, once, and once more for each convolution with a norm that takes no layer's output as it is.
        tied: what goes with the output channels of the gated kernels.
        example_input: a tensor, a tuple of positional or a mapping of named arguments.

    Returns:
        A warning for each convolution with a norm behind it that is not tied.

    Raises:
        ValueError: there is such a norm.
    """
    names = {id(p): n for n, p in model.named_parameters()}
    convolutions = {n: names.get(id(m.weight), "") for n, m in model.named_modules() if isinstance(m, _ConvNd)}
    inputs, found = norm_inputs(model, example_input), []
    for kernel, norms in ((k, t.norms) for k, t in tied.items()):
        own = {n for n, k in convolutions.items() if k == kernel}
        known = {norm for norm, layers in inputs.items() if own & {*layers}}
        unclear = {norm for norm, layers in inputs.items() if "" in layers}
        if own and unclear and (unclear & {*norms} or not known):
            known |= (alone := norms_of(model, example_input, own))
            inputs |= {norm: sorted(own) for norm in alone}
        for norm in norms:
            if foreign := sorted({*inputs.get(norm, [])} - own):
                raise ValueError(_foreign(norm, kernel, [layer for layer in foreign if layer]))
        if others := sorted(known - {*norms}):
            found.append(_untied(kernel, others))
    return found


def _foreign(norm: str, kernel: str, layers: list[str]) -> str:
    what = f"the output of {' and '.join(layers)}" if layers else "more than that convolution's output, or something else"
    return (
        f"{norm} is registered right behind the convolution of {kernel}, so its channels would be closed with that convolution's, but it "
        f"takes {what}. Register every batch norm right behind the convolution that it alone normalizes, or leave {kernel} out with "
        "exclude=."
    )


def _untied(kernel: str, norms: list[str]) -> str:
    return (
        f"{kernel} has gates, and its output goes into {' and '.join(norms)}, which {'is' if len(norms) == 1 else 'are'} not registered "
        "right behind its convolution: a closed channel is shifted there, so it is not zero behind the norm, slim() may keep it, and "
        "running statistics are taken of it. If the norm is that convolution's own, register it right behind, and it is closed there too."
    )


def norms_of(model: nn.Module, example_input: Any, layers: Iterable[str]) -> set[str]:
    """Batch norms that take the output channels of ``layers`` and nothing else, each by itself; activations between do not matter.

    Everything else in the model is NaN, and so is every second one of those channels: only what takes the others alone has none there.

    Args:
        model: runs once, in eval mode.
        example_input: a tensor, a tuple of positional or a mapping of named arguments.
        layers: names of convolutions.
    """
    found: dict[str, bool] = {}
    chosen = {*layers}

    def note(name: str) -> Callable[..., Any]:
        def hook(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
            if isinstance(module, _BatchNorm) and inputs:
                found[name] = found.get(name, True) and _every_second(inputs[0])
            return _zeros_and_nans(output) if name in chosen else map_tensors(_nans, output)

        return hook

    with ExitStack() as hooks, quiet(model):
        for name, module in model.named_modules():
            if name in chosen or isinstance(module, _BatchNorm) or any(True for _ in module.parameters(False)):
                hooks.enter_context(module.register_forward_hook(note(name)))
        run(model, map_tensors(_nans, example_input))
    return {n for n, only in found.items() if only}


def _nans(tensor: Tensor) -> Tensor:
    return torch.full_like(tensor, torch.nan) if tensor.is_floating_point() else tensor


def _zeros_and_nans(outputs: Tensor) -> Tensor:
    changed = torch.zeros_like(outputs)
    changed[:, 1::2] = torch.nan
    return changed


def _every_second(inputs: Tensor) -> bool:
    missing = inputs.isnan()
    return not missing[:, ::2].any() and bool(missing[:, 1::2].all())
