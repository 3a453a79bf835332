"""Spectral radii of K-FAC blocks: power iteration on the two factors of a layer."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd

Product = Callable[[Tensor], Tensor]
"""A matrix, or one for each group, as its product with vectors ``[groups, size]``."""

CONVOLUTIONS: dict[tuple[bool, int], Callable[..., Tensor]] = {
    (False, 1): functional.conv1d,
    (False, 2): functional.conv2d,
    (False, 3): functional.conv3d,
    (True, 1): functional.conv_transpose1d,
    (True, 2): functional.conv_transpose2d,
    (True, 3): functional.conv_transpose3d,
}


@dataclass
class WatchedCall:
    """One call of a layer in a batch.

    Attributes:
        layer: a linear layer ``[..., inputs]`` to ``[..., outputs]``, or a convolution of any kind.
        inputs: its input, detached.
        gradients: the gradient of the loss by its output, of the output's shape; None where none has come.
    """

    layer: nn.Module
    inputs: Tensor
    gradients: Tensor | None = None


def largest_eigenvalue(product: Product, start: Tensor, iterations: int = 20, tolerance: float = 1e-3) -> Tensor:
    """The largest eigenvalue of a symmetric positive semidefinite matrix, or of several, by power iteration.

    It approaches the eigenvalue from below.

    Args:
        product: gives the matrix times a vector, ``[groups, size]`` to ``[groups, size]``, each group with its own matrix.
        start: the first vectors ``[groups, size]``; one that is orthogonal to the eigenvector finds a smaller eigenvalue.
        iterations: products at most.
        tolerance: relative change in one iteration at which the search ends; 0 takes all iterations.

    Returns:
        ``[groups]``; NaN where the matrix holds inf or NaN.

    Example:
        >>> a = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        >>> found = largest_eigenvalue(lambda v: v @ a, torch.ones(1, 2, dtype=torch.float64), 100, tolerance=0.0)
        >>> round(found.item(), 10)
        2.2071067812
    """
    tiny = torch.finfo(start.dtype).tiny
    vector = start / start.norm(dim=1, keepdim=True)
    found = torch.zeros_like(start[:, 0])
    for _ in range(iterations):
        before, image = found, product(vector)
        # of a unit vector: never above the eigenvalue, and never below the Rayleigh quotient
        found = image.norm(dim=1)
        vector = image / found.clamp_min(tiny)[:, None]
        if tolerance and bool((found - before <= tolerance * found).all()):
            break
    return found


def kfac_spectral_radius(
    calls: Sequence[WatchedCall], samples: int, scale: float = 1.0, iterations: int = 20, tolerance: float = 1e-3
) -> float:
    """The spectral radius of a layer's K-FAC block ``A (x) G``: the largest eigenvalue of ``A`` times that of ``G``.

    With inputs ``a`` of the weights and gradients ``g`` of a sample's loss by the outputs, at each position of each sample::

        A = mean over samples and positions of a a^T        G = mean over samples of the sum over positions of g g^T

    Positions are the places of a convolution's output, whose inputs ``a`` are the patches that its kernel sees there, and the
    rows of a sample in a linear layer. Grosse and Martens sum ``A`` over positions and average ``G``, which is the same
    block. Where the bias is trained too, ``a`` has a last element 1. A layer that is called several times has the positions of
    all its calls. A grouped convolution has a pair of factors for each group, and its radius is that of the largest.

    A factor is formed where that takes fewer multiplications than products with the inputs or gradients themselves; patches
    are formed of kernels with fewer weights than ``iterations`` alone, and otherwise a convolution with one filter for each
    group, and its gradient by that filter, are the product.

    Args:
        calls: the calls of one layer, with their gradients.
        samples: samples of the batch.
        scale: what gradients are multiplied by to be those of each sample's own loss: the number of samples where the loss
            is a mean over them.
        iterations, tolerance: of :func:`largest_eigenvalue`, for each factor.

    Returns:
        The radius, a lower bound of it where power iteration ends early. NaN where inputs or gradients hold inf or NaN, or
        where there are no calls.

    References:
        Martens and Grosse 2015, "Optimizing Neural Networks with Kronecker-factored Approximate Curvature"; Grosse and Martens
        2016, "A Kronecker-factored approximate Fisher matrix for convolution layers".
    """
    if not calls:
        return float("nan")
    device, biased = calls[0].inputs.device, _has_trained_bias(calls)
    with torch.autocast(device.type, enabled=False), torch.no_grad():
        by_inputs = _largest([_of_inputs(call, biased, iterations) for call in calls], iterations, tolerance)
        rows = [_gradient_rows(call) for call in calls]
        # in units of the largest, as squares of small gradients would be zero in float32
        unit = torch.stack([r.abs().max() for r in rows]).max()
        unit = unit.clamp_min(torch.finfo(unit.dtype).tiny)
        by_gradients = _largest([_of_rows(r / unit, iterations) for r in rows], iterations, tolerance)
        positions = sum(r.shape[1] for r in rows)
        # on the CPU, as not every device has float64
        radius = float((by_inputs.cpu().double() * by_gradients.cpu().double()).max()) * float(unit) ** 2
    return radius / positions * scale**2 / samples


def _largest(factors: Sequence[tuple[Product, Tensor]], iterations: int, tolerance: float) -> Tensor:
    """The largest eigenvalue ``[groups]`` of a sum of matrices of the same size."""

    def product(vector: Tensor) -> Tensor:
        return torch.stack([of_one(vector) for of_one, _ in factors]).sum(0)

    return largest_eigenvalue(product, factors[0][1], iterations, tolerance)


def _start(groups: int, size: int, like: Tensor) -> Tensor:
    """First vectors ``[groups, size]``, the same in each measurement, drawn without moving torch's own generators."""
    drawn = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return drawn.to(like.dtype).to(like.device).expand(groups, size)


def _working(tensor: Tensor) -> Tensor:
    """In float32, which sums of squares need where tensors are in half precision; float64 stays."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def _of_rows(rows: Tensor, iterations: int) -> tuple[Product, Tensor]:
    """``rows^T rows`` of ``[groups, rows, size]``, formed where that is cheaper for so many products."""
    groups, number, size = rows.shape
    start = _start(groups, size, rows)
    if number * size + iterations * size < 2 * iterations * number:
        matrix = rows.mT @ rows
        return lambda v: (matrix @ v[..., None])[..., 0], start
    return lambda v: (rows.mT @ (rows @ v[..., None]))[..., 0], start


def _has_trained_bias(calls: Sequence[WatchedCall]) -> bool:
    """Whether all calls add the same trained bias: layers that share a weight may have several."""
    first, *others = (call.layer._parameters.get("bias") for call in calls)
    return first is not None and first.requires_grad and all(other is first for other in others)


def _of_inputs(call: WatchedCall, biased: bool, iterations: int) -> tuple[Product, Tensor]:
    """The sum of ``a a^T`` over the positions of one call."""
    layer, inputs = call.layer, _working(call.inputs)
    if not isinstance(layer, _ConvNd):
        rows = inputs.reshape(1, -1, inputs.shape[-1])
        return _of_rows(_with_ones(rows) if biased else rows, iterations)
    groups, size = layer.groups, layer.in_channels // layer.groups * math.prod(layer.kernel_size)
    if size < iterations:
        one_hot = torch.eye(size, device=inputs.device, dtype=inputs.dtype).expand(groups, size, size)
        rows = _rows(_responses(call, inputs, one_hot))
        return _of_rows(_with_ones(rows) if biased else rows, iterations)

    def product(vector: Tensor) -> Tensor:
        filters = vector[:, None, :size].detach().requires_grad_()
        with torch.enable_grad():
            responses = _responses(call, inputs, filters)
        outputs = responses.detach() + vector[:, size:, None] if biased else responses.detach()
        # the gradient of half the sum of squares of these outputs
        (by_filter,) = torch.autograd.grad(responses, filters, outputs)
        by_bias = [outputs.sum((0, 3))] if biased else []
        return torch.cat([by_filter[:, 0], *by_bias], 1)

    return product, _start(groups, size + biased, inputs)


def _responses(call: WatchedCall, inputs: Tensor, filters: Tensor) -> Tensor:
    """The outputs of a convolution with other filters ``[groups, filters, size]``: ``[samples, groups, filters, positions]``."""
    layer: Any = call.layer
    spatial = len(layer.kernel_size)
    inputs = inputs if inputs.ndim == spatial + 2 else inputs[None]
    groups, number, _ = filters.shape
    kernels = filters.reshape(groups, number, layer.in_channels // groups, *layer.kernel_size)
    common: dict[str, Any] = {"stride": layer.stride, "groups": groups, "dilation": layer.dilation}
    if layer.transposed:
        assert call.gradients is not None
        kernels = kernels.transpose(1, 2).flatten(0, 1)  # stored by inputs
        # a call may ask for another size of the output than the layer has by itself
        shape = zip(call.gradients.shape[-spatial:], inputs.shape[2:], strict=True)
        per_axis = zip(shape, layer.stride, layer.padding, layer.dilation, layer.kernel_size, strict=True)
        more = [out - ((size - 1) * s - 2 * p + d * (k - 1) + 1) for (out, size), s, p, d, k in per_axis]
        made = CONVOLUTIONS[True, spatial](inputs, kernels, padding=layer.padding, output_padding=more, **common)
    else:
        padding = layer.padding
        if layer.padding_mode != "zeros":
            inputs, padding = functional.pad(inputs, layer._reversed_padding_repeated_twice, layer.padding_mode), 0
        made = CONVOLUTIONS[False, spatial](inputs, kernels.flatten(0, 1), padding=padding, **common)
    return made.reshape(made.shape[0], groups, number, -1)


def _gradient_rows(call: WatchedCall) -> Tensor:
    """Gradients ``[groups, rows, outputs of a group]`` of one call, a row for each position of each sample."""
    assert call.gradients is not None
    gradients = _working(call.gradients)
    if not isinstance(call.layer, _ConvNd):
        return gradients.reshape(1, -1, gradients.shape[-1])
    channels = call.layer.out_channels
    batched = gradients if gradients.ndim == len(call.layer.kernel_size) + 2 else gradients[None]
    return _rows(batched.reshape(len(batched), call.layer.groups, channels // call.layer.groups, -1))


def _with_ones(rows: Tensor) -> Tensor:
    return torch.cat([rows, torch.ones_like(rows[..., :1])], 2)


def _rows(grouped: Tensor) -> Tensor:
    """``[samples, groups, size, positions]`` as ``[groups, samples * positions, size]``."""
    return grouped.permute(1, 0, 3, 2).flatten(1, 2)
