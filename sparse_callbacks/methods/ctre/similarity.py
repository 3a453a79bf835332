"""Cosine similarity of the activations of the two neurons of every possible connection.

Dot products and squared norms are summed first, and cosines are taken last: sums add up over batches and ranks, cosines
do not.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from sparse_callbacks.core.largest import widened

SMALLEST = 1e-12  # smaller squared norms count as this one (l2_normalize in the code of Atashgahi et al. 2022)


@dataclass
class CosineSums:
    """Dot products and squared norms of a layer's input and output activations, summed over samples.

    For a kernel the samples are the positions of its output, and each of its offsets is an input neuron of its own (our
    extension: the paper has matrices only).

    Attributes:
        dots: dot products, [out, in / groups, *kernel], the weight's shape (of a transposed convolution [in, out /
            groups, *kernel]).
        rows: squared norms of the neurons along dimension 0 of the weight, [out], float64.
        columns: squared norms of the neurons along its other dimensions, [groups, in / groups, *kernel], float64.
        batches: number of batches added, 0-dimensional float64.
    """

    dots: Tensor
    rows: Tensor
    columns: Tensor
    batches: Tensor

    def tensors(self) -> tuple[Tensor, ...]:
        """The tensors that add up over ranks."""
        return self.dots, self.rows, self.columns, self.batches


def empty_sums(module: nn.Module, weight: Tensor) -> CosineSums:
    """Sums over no sample, on the device of ``weight``; dot products in float32 or wider."""
    groups = module.groups if isinstance(module, _ConvNd) else 1
    double = {"dtype": torch.float64, "device": weight.device}
    return CosineSums(
        torch.zeros(weight.shape, dtype=widened(weight.dtype), device=weight.device),
        torch.zeros(weight.shape[0], **double),  # type: ignore[call-overload]
        torch.zeros(groups, *weight.shape[1:], **double),  # type: ignore[call-overload]
        torch.zeros((), **double),  # type: ignore[call-overload]
    )


@torch.no_grad()
def add_batch(sums: CosineSums, module: nn.Module, inputs: Tensor, outputs: Tensor) -> None:
    """Add a batch to ``sums``, in place.

    Args:
        sums: the sums of the layer.
        module: the layer, an ``nn.Linear`` or a convolution.
        inputs: activations as they enter the layer, [*, in] or [batch, in, *space].
        outputs: activations after the layer's activation function, in the shape of its output, [*, out] or
            [batch, out, *space].
    """
    x, a = inputs.to(sums.dots.dtype), outputs.to(sums.dots.dtype)
    sums.batches += 1
    if not isinstance(module, _ConvNd):
        x, a = x.reshape(-1, x.shape[-1]), a.reshape(-1, a.shape[-1])
        sums.dots.addmm_(a.t(), x)
        sums.rows += _square_sum(a, 1)
        sums.columns += _square_sum(x, 1)
        return
    space = len(module.kernel_size)
    x, a = (t if t.dim() == space + 2 else t.unsqueeze(0) for t in (x, a))
    geometry: dict[str, Any] = {"stride": module.stride, "dilation": module.dilation, "groups": module.groups}
    if isinstance(module, _ConvTransposeNd):
        x, a = a, x  # it is a convolution from its outputs to its inputs
    if isinstance(module.padding, str) or module.padding_mode != "zeros":
        # the gradient below knows padding with zeros only, and as much on both sides: any other padding is done here
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x = functional.pad(x, module._reversed_padding_repeated_twice, mode=mode)
        geometry["padding"] = (0,) * space
    else:
        geometry["padding"] = module.padding
    # a dot product over positions, for every weight of a kernel, is what autograd computes as the kernel's gradient
    sums.dots += _kernel_gradient(x, a, sums.dots.shape, **geometry)
    sums.rows += _square_sum(a, 1)
    # squared norms of inputs: the same sums with x^2 in place of x and ones in place of a, each channel by itself. They
    # are summed over the batch first, as this needs only one convolution's work whatever the size of the batch
    squares = x.double().square().sum(0, keepdim=True)
    ones = torch.ones_like(a[:1, :1], dtype=torch.float64).expand(1, squares.shape[1], *a.shape[2:])
    geometry["groups"] = squares.shape[1]
    shape = (squares.shape[1], 1, *sums.dots.shape[2:])
    sums.columns += _kernel_gradient(squares, ones, shape, **geometry).view_as(sums.columns)


def _square_sum(t: Tensor, keep: int) -> Tensor:
    """Squared norms in float64, [size of dimension ``keep``]; summed over one batch in the dtype of ``t``."""
    others = [d for d in range(t.dim()) if d != keep]
    return t.square().sum(others).double()


def _kernel_gradient(
    x: Tensor, grad: Tensor, shape: Any, stride: Any, padding: Any, dilation: Any, groups: int
) -> Tensor:
    """sum over n, p of grad[n, o, p] x[n, i, stride p + dilation k - padding], of ``shape`` [o, i / groups, *k]."""
    kernel = x.new_empty(1).expand(tuple(shape))  # only its shape is read
    zeros = [0] * (x.dim() - 2)
    # the dispatcher's own function: it takes the output mask, so that the gradient of the input is not computed too
    found: Tensor = torch.ops.aten.convolution_backward(
        grad.contiguous(), x, kernel, None, stride, padding, dilation, False, zeros, groups, (False, True, False)
    )[1]
    return found


@torch.no_grad()
def cosine_similarity(sums: CosineSums) -> Tensor:
    """|<a_p, b_q>| / (|a_p| |b_q|) in [0, 1], of the weight's shape; 0, never NaN, for a neuron that never fires.

    The result takes the place of ``sums.dots``, so that one layer's similarity needs no second buffer.
    """
    result, rows, columns = sums.dots, sums.rows, sums.columns
    groups, space = columns.shape[0], (1,) * (result.dim() - 2)
    grouped = result.view(groups, -1, *result.shape[1:])
    grouped /= rows.clamp(min=SMALLEST).sqrt_().to(result.dtype).view(groups, -1, 1, *space)
    grouped /= columns.clamp(min=SMALLEST).sqrt_().to(result.dtype).unsqueeze(1)
    # rounding may give slightly more than 1; inf and NaN come from activations that are not finite
    return result.abs_().nan_to_num_(0.0, 0.0, 0.0).clamp_(max=1.0)


def as_probabilities(outputs: Tensor, dimension: int) -> Tensor:
    """Activations of an output layer from the network's ``outputs``: softmax of logits along ``dimension``.

    Probabilities (nonnegative, with sum 1) stay as they are, and so does a single output, whose softmax is constant.
    """
    if outputs.shape[dimension] == 1:
        return outputs
    sums = outputs.float().sum(dimension)
    if bool((outputs >= 0).all()) and torch.allclose(sums, torch.ones_like(sums), atol=1e-2):  # bfloat16 has 3 digits
        return outputs
    return outputs.softmax(dimension, dtype=widened(outputs.dtype))


def feature_dimension(module: nn.Module, outputs: Tensor) -> int:
    """The dimension of a layer's output along which its neurons lie."""
    space = len(module.kernel_size) if isinstance(module, _ConvNd) else 0
    return outputs.dim() - 1 - space


def layers_of(model: nn.Module, params: Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Module]]:
    """(parameter's name, module) for every module that has one of ``params`` as its weight, several where it is shared.

    Raises:
        ValueError: a parameter of a module that is neither linear nor a convolution.
    """
    names = {id(p): name for name, p in params.items()}
    weights = [(p, module) for module in model.modules() for p in module._parameters.values() if p is not None]
    found = [(names[id(p)], module) for p, module in weights if id(p) in names]
    unknown = {name: m for name, m in found if not isinstance(m, nn.Linear | _ConvNd) or _is_never_called(m)}
    if unknown:
        kinds = ", ".join(f"{name} ({_kind(m)})" for name, m in unknown.items())
        raise ValueError(
            f"{kinds}: the activations on both sides are not known, as similarity is defined for linear layers and "
            f"convolutions. Leave them out: exclude={sorted(unknown)}, or a glob that matches them."
        )
    yield from found


def _is_never_called(module: nn.Module) -> bool:
    # torch's attention keeps its output projection in a layer of this class, and uses the weight without the layer
    return isinstance(module, NonDynamicallyQuantizableLinear)


def _kind(module: nn.Module) -> str:
    if _is_never_called(module) or isinstance(module, nn.MultiheadAttention):
        return "an attention"
    return type(module).__name__
