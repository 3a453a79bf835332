"""What each layer of a network costs by its inputs and outputs, and what everything else costs."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from sparse_callbacks.channels.forward_flops import forward_flops
from sparse_callbacks.core.inspection import quiet, run, tensors_in
from sparse_callbacks.core.record.multiply_adds import positions_in_use
from sparse_callbacks.core.sparse_layers.sparse_linear import SparseLinear
from sparse_callbacks.core.storages.exchange import dense_twin


@dataclass(frozen=True)
class Layer:
    """A convolution or linear layer, described by everything that its cost depends on.

    Attributes:
        name: name of the module; of the parameter where a module reads several weights.
        inputs, outputs: number of input and output channels (or features) of the whole layer.
        kernel: size of the kernel; empty for a linear layer.
        groups: groups of the convolution. A depthwise convolution has one for each input, and loses one with each
            input.
        settings: stride, padding, dilation and output padding as text, since layers with different settings take
            different times.
        maps: for each use of the layer in one forward pass, the number of rows that one sample of the network has
            become, followed by the size of its input without channels; for a linear layer the number of rows alone.
        positions: for each use, the number of places in one sample at which every weight is multiplied.
    """

    name: str
    inputs: int
    outputs: int
    kernel: tuple[int, ...] = ()
    groups: int = 1
    settings: str = ""
    maps: tuple[tuple[int, ...], ...] = ((1,),)
    positions: tuple[int, ...] = (1,)

    @property
    def depthwise(self) -> bool:
        """Whether every group of the convolution has a single input."""
        return self.groups == self.inputs > 1

    def weights(self, inputs: int, outputs: int) -> float:
        """Number of weights of the layer with ``inputs`` inputs and ``outputs`` outputs."""
        inputs_of_a_group = 1 if self.depthwise else inputs / self.groups
        return inputs_of_a_group * outputs * math.prod(self.kernel)


LayerCost = Callable[[Layer, int, int], float]
"""A function ``(layer, inputs, outputs)`` that gives the cost of the layer with these numbers of inputs and outputs."""


def parameters(layer: Layer, inputs: int, outputs: int) -> float:
    """Number of weights, without biases.

    >>> parameters(Layer("conv", 64, 128, (3, 3)), 32, 128)
    36864.0
    """
    return float(layer.weights(inputs, outputs))


def multiply_adds(layer: Layer, inputs: int, outputs: int) -> float:
    """Multiply-adds for one sample, without biases. One multiply-add is two FLOPs."""
    return float(layer.weights(inputs, outputs) * sum(layer.positions))


def flops(layer: Layer, inputs: int, outputs: int) -> float:
    """FLOPs for one sample, without biases: two for each multiply-add.

    >>> flops(Layer("fc", 64, 128), 64, 10)
    1280.0
    """
    return 2.0 * multiply_adds(layer, inputs, outputs)


# ---------------------------------------------------------------------- the layers of a model


def samples_in(example_input: Any) -> int:
    """How many samples an input holds: the first size of all its tensors. Where they have no common one it counts as one.

    >>> import torch
    >>> samples_in((torch.zeros(4, 3), torch.tensor(0.5))), samples_in((torch.zeros(9, 6), torch.zeros(2, 20)))
    (4, 1)
    """
    sizes = {t.shape[0] for t in tensors_in(example_input) if t.ndim}
    # an empty batch holds nothing that a cost could be divided by
    return max(1, sizes.pop()) if len(sizes) == 1 else 1


def layers(model: nn.Module, example_input: Any) -> dict[str, Layer]:
    """Every convolution and linear layer that a forward pass uses, by module name.

    The model runs once, in eval mode, and is left as it was.

    Args:
        model: the network.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments; costs are those of one of
            its :func:`samples_in`.
    """
    found: dict[str, Layer] = {}
    samples = samples_in(example_input)
    with ExitStack() as hooks, quiet(model):
        for name, module in model.named_modules():
            if isinstance(module, nn.Linear | SparseLinear | _ConvNd):
                hooks.enter_context(module.register_forward_hook(_recorder(name, found, samples), with_kwargs=True))
        run(model, example_input)
    # in the order of registration, so that tables and error messages do not depend on the order of calls
    return {name: found[name] for name, _ in model.named_modules() if name in found}


def stem(layers: Mapping[str, Layer]) -> str | None:
    """Name of the first of :func:`layers`, if it is a convolution."""
    name = next(iter(layers), None)
    return name if name is not None and layers[name].kernel else None


def _recorder(name: str, found: dict[str, Layer], samples: int) -> Callable[..., None]:
    """A forward hook that puts a layer into ``found``, or adds one more use to a layer that is there already."""

    def record(module: nn.Module, arguments: Any, named: Any, output: Tensor) -> None:
        use = layer_in_use(name, module, tensors_in((arguments, named))[0].shape, output.shape, samples)
        seen = found.get(name)
        if seen is not None:
            # a layer that is used twice costs both uses, often on maps of different sizes
            use = replace(seen, maps=seen.maps + use.maps, positions=seen.positions + use.positions)
        found[name] = use

    return record


def layer_in_use(
    name: str, module: nn.Module, input_shape: Sequence[int], output_shape: Sequence[int], samples: int
) -> Layer:
    """The layer ``module``, used once.

    Args:
        name: name of the module.
        module: a convolution or linear layer.
        input_shape, output_shape: shapes of the tensors that it takes and gives.
        samples: number of samples that the network ran on.
    """
    if not isinstance(module, _ConvNd):
        # a layer may run once for all samples, as on what a graph was pooled to
        rows = max(1, positions_in_use(module, input_shape, output_shape, samples))
        return Layer(name, input_shape[-1], output_shape[-1], maps=((rows,),), positions=(rows,))
    dimensions = len(module.kernel_size)
    # more rows than samples: a model may put parts of an image, or the time steps of a video, into the batch
    rows = max(1, math.prod(input_shape[: -dimensions - 1]) // samples)
    input_size, transposed = tuple(input_shape[-dimensions:]), isinstance(module, _ConvTransposeNd)
    stride, padding, dilation = (size_text(s) for s in (module.stride, module.padding, module.dilation))
    settings = f"stride {stride} padding {padding} dilation {dilation}"
    settings += f" transposed {size_text(module.output_padding)}" if transposed else ""
    return Layer(
        name,
        module.in_channels,
        module.out_channels,
        tuple(module.kernel_size),
        module.groups,
        settings,
        maps=((rows, *input_size),),
        positions=(max(1, positions_in_use(module, input_shape, output_shape, samples)),),
    )


def size_text(numbers: str | Sequence[int]) -> str:
    """Sizes as text, such as ``3x3``. A padding that is stated in words stays as it is.

    >>> size_text((3, 3)), size_text("same")
    ('3x3', 'same')
    """
    return numbers if isinstance(numbers, str) else "x".join(map(str, numbers))


# ---------------------------------------------------------------------- everything but layers


@dataclass(frozen=True)
class OtherCosts:
    """What a forward pass needs outside its convolutions and linear layers.

    Attributes:
        parameters: weights (with two or more dimensions) of attention, recurrent layers, embeddings and other modules.
        multiply_adds: multiply-adds for one sample; one of them is two FLOPs.
    """

    parameters: float
    multiply_adds: float


def cost_outside_layers(model: nn.Module, example_input: Any, found: Mapping[str, Layer]) -> OtherCosts:
    """What a forward pass costs outside ``found``.

    Multiply-adds are half of what :func:`~sparse_callbacks.channels.forward_flops.forward_flops` counts.

    Args:
        model, example_input: as for :func:`layers`.
        found: the :func:`layers` of the model, with or without the
            :func:`~sparse_callbacks.channels.attention_costs.projections` of its attention.
    """
    model = dense_twin(model)
    called: set[nn.Module] = set()
    samples = samples_in(example_input)
    with ExitStack() as hooks, quiet(model):
        # only modules that are called count: a head that the pass leaves out costs nothing
        for module in model.modules():
            hooks.enter_context(module.register_forward_hook(lambda called_module, *_: called.add(called_module)))
        # two FLOPs are one multiply-add
        total = forward_flops(model, example_input) / 2 / samples
    # torch's attention reads the weight of its output projection without ever calling that layer
    inside_attention = {m for a in called if isinstance(a, nn.MultiheadAttention) for m in a.modules()}
    # a layer has the name of its module or, without one, that of its parameter
    every = model.named_parameters(remove_duplicate=False)
    counted = {id(p) for name, p in every if name in found or name.rpartition(".")[0] in found}
    others = {
        id(p): p.numel()
        for module in called | inside_attention
        for p in module.parameters(recurse=False)
        # biases and gains count nowhere; a weight that a layer shares counts with the layer
        if p.ndim > 1 and id(p) not in counted
    }
    in_layers = sum(multiply_adds(layer, layer.inputs, layer.outputs) for layer in found.values())
    # not below 0 where torch does not count an operation that a layer is made of
    return OtherCosts(float(sum(others.values())), max(0.0, total - in_layers))
