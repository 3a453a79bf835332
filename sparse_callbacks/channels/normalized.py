"""Which layers' outputs reach the loss through norms alone, so that their scale has no effect on it."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from math import prod
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm
from torch.utils.weak import WeakIdKeyDictionary

from sparse_callbacks.channels.norms import NORMS
from sparse_callbacks.channels.outputs import output_tensors
from sparse_callbacks.channels.recording import Recorder, named_arguments, operation_name
from sparse_callbacks.core.inspection import quiet, run, tensors_in
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear

_LAYERS = (nn.Linear, SparseLinear, _ConvNd)
_ENTRYWISE = {
    f"aten.{n}" for n in ("relu", "leaky_relu", "_prelu_kernel", "mul", "neg", "abs", "clone", "_to_copy", "dropout")
}
_POOLS = {f"aten.{n}{d}d" for n in ("avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool") for d in (1, 2, 3)} | {
    f"aten.{n}{d}d{end}" for n in ("max_pool", "adaptive_max_pool") for d in (1, 2, 3) for end in ("", "_with_indices")
}
_VIEWS = {f"aten.{n}" for n in ("view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "flatten")}

_Carried = dict[str, int]
"""For each layer whose scale a tensor has, the axis along which its outputs lie."""


def normalized_outputs(model: nn.Module, example_input: Any) -> dict[str, tuple[tuple[str, ...], int]]:
    """For each layer whose output reaches the model's through norms alone, these norms and how many outputs they take as one.

    The second number is how many neighbouring outputs of the layer are divided by one number: batch norms and instance
    norms divide each channel by a number of its own, group norms and layer norms several channels by one.

    Between the layer and a norm lie only functions that give c times as much for c times the output, c > 0, and keep its
    channels apart: ReLU, leaky and parametric ReLU, absolute values, average and max pooling, means over other axes,
    dropout, products with what does not depend on the output's scale, depthwise convolutions without a bias, other orders
    of the axes, and shapes in which the channels remain an axis. A layer of which anything else takes an output (a sum, a
    concatenation, flattened channels, another layer, the model's outputs) is left out, as are norms that are not modules.

    Args:
        model: the model. It runs once, in eval mode, and is left as it was.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments.
    """
    carried: Any = WeakIdKeyDictionary()
    found: dict[str, tuple[dict[str, None], int]] = {}
    escaped: set[str] = set()
    inside: list[nn.Module] = []

    def record(operation: Any, args: Sequence[Any], kwargs: Mapping[str, Any], output: Any) -> None:
        if inside or operation_name(operation) == "aten.detach":
            return
        named = named_arguments(operation, args, kwargs)
        read = [t for t in tensors_in([args, kwargs]) if carried.get(t)]
        made = tensors_in(output)
        for tensor in read:
            axes = {
                n: _axis_after(operation_name(operation), named, tensor, a, made) for n, a in carried[tensor].items()
            }
            if len(read) > 1 or None in axes.values():
                escaped.update(axes)
                continue
            for one in made:
                carried[one] = axes

    def enter(module: nn.Module, _: Any) -> None:
        inside.append(module)

    def leave(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], output: Any) -> None:
            inside.pop()
            inputs = tensors_in([args, kwargs])
            takes: _Carried = carried.get(inputs[0], {}) if len(inputs) == 1 else {}
            if inside or len(inputs) != 1 or not isinstance(output, Tensor):
                escaped.update(*(carried.get(t, {}) for t in inputs))
                return
            if isinstance(module, NORMS):
                for layer, axis in takes.items():
                    names, together = found.get(layer, ({}, 1))
                    outputs = inputs[0].shape[axis]
                    now = max(together, _divided_together(module, inputs[0], axis, outputs))
                    found[layer] = {**names, name: None}, now
                return
            axis = output.ndim - 1 - (len(module.kernel_size) if isinstance(module, _ConvNd) else 0)
            if not _keeps_channels(module):
                escaped.update(takes)
                takes = {}
            carried[output] = {**takes, name: axis}

        return hook

    with ExitStack() as hooks, quiet(model):
        for name, module in model.named_modules():
            if name and isinstance(module, (*_LAYERS, *NORMS)):
                hooks.enter_context(module.register_forward_pre_hook(enter))
                hooks.enter_context(module.register_forward_hook(leave(name), with_kwargs=True))
        with Recorder(record):
            output = run(model, example_input)
    for tensor in output_tensors(output):
        escaped.update(carried.get(tensor, {}))
    return {layer: (tuple(names), together) for layer, (names, together) in found.items() if layer not in escaped}


def _keeps_channels(layer: nn.Module) -> bool:
    """Whether a layer is a depthwise convolution without a bias."""
    return isinstance(layer, _ConvNd) and layer.bias is None and layer.groups == layer.in_channels == layer.out_channels


def _axis_after(name: str, named: Mapping[str, Any], tensor: Tensor, axis: int, made: Sequence[Tensor]) -> int | None:
    """The axis of the channels in what an operation makes of a tensor; None where it mixes them or is not homogeneous."""
    if not made:
        return None
    shape = made[0].shape
    if name in _ENTRYWISE or (name == "aten.div" and named["self"] is tensor and not named.get("rounding_mode")):
        return axis if shape == tensor.shape else None
    if name in _POOLS:
        dims = int(name.partition("pool")[2][0])
        return axis if axis < tensor.ndim - dims else None
    if name in _VIEWS:
        before = prod(tensor.shape[:axis])
        places = (a for a, n in enumerate(shape) if n == tensor.shape[axis] and prod(shape[:a]) == before)
        return next(places, None)
    if name == "aten.permute":
        return [d % tensor.ndim for d in named["dims"]].index(axis)
    if name in ("aten.transpose", "aten.t"):
        swapped = [d % tensor.ndim for d in (named.get("dim0", 0), named.get("dim1", 1))]
        return swapped[1 - swapped.index(axis)] if axis in swapped else axis
    if name == "aten.mean" and named.get("dim"):
        over = [d % tensor.ndim for d in named["dim"]]
        return None if axis in over else axis if named["keepdim"] else axis - sum(d < axis for d in over)
    return None


def _divided_together(norm: nn.Module, x: Tensor, axis: int, outputs: int) -> int:
    if isinstance(norm, nn.LayerNorm | nn.RMSNorm):
        own = tuple(norm.normalized_shape)
        # classes derived from these take channels that are not last
        as_they_are = tuple(x.shape[-len(own) :]) == own
        return 1 if as_they_are and axis < x.ndim - len(own) else outputs
    if axis != (0 if isinstance(norm, _InstanceNorm) and axis == 0 else 1):
        return outputs
    return outputs // norm.num_groups if isinstance(norm, nn.GroupNorm) else 1
