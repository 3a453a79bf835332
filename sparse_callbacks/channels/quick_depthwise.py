"""Depthwise convolutions in float64 in little time: on CPUs torch computes them channel by channel."""

from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn
from torch.nn import functional


class _QuickConv2d(nn.Conv2d):
    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        # padding in words and other padding modes are left to torch
        if isinstance(self.padding, tuple) and self.padding_mode == "zeros":
            depthwise_here = self.groups == len(weight) == input.shape[1:2].numel() and weight.shape[1] == 1
            if depthwise_here and _is_slow(input, weight) and _fits(input, weight, self.padding, self.dilation):
                return depthwise(input, weight, bias, self.stride, self.padding, self.dilation)
        found: Tensor = super()._conv_forward(input, weight, bias)
        return found


def quicken_depthwise(model: nn.Module) -> None:
    """Let the depthwise convolutions of ``model`` take less time in float64 on the CPU; outputs differ by rounding alone.

    Each ``nn.Conv2d`` in groups gets another class for good, and looks in every pass whether its weights are such; it uses
    :func:`depthwise` then. Subclasses stay as they are.

    Args:
        model: a copy that nobody else sees.
    """
    for module in model.modules():
        if type(module) is nn.Conv2d and module.groups > 1:
            module.__class__ = _QuickConv2d


def depthwise(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> Tensor:
    """A depthwise convolution of images, as a sum over the places of the kernel.

    Args:
        x: images, [N, C, H, W].
        weight: a kernel for each channel, [C, 1, height, width].
        bias: [C], or None.
        stride, padding, dilation: of the convolution, in both directions.
    """
    padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    reach = [d * (k - 1) for d, k in zip(dilation, weight.shape[2:], strict=True)]
    height, width = ((size - r - 1) // s + 1 for size, r, s in zip(padded.shape[2:], reach, stride, strict=True))
    total = x.new_zeros(len(x), len(weight), height, width)
    if bias is not None:
        total += bias.view(-1, 1, 1)
    for i, j in product(*map(range, weight.shape[2:])):
        top, left = i * dilation[0], j * dilation[1]
        bottom, right = top + (height - 1) * stride[0] + 1, left + (width - 1) * stride[1] + 1
        total.addcmul_(padded[:, :, top : bottom : stride[0], left : right : stride[1]], weight[:, :1, i, j, None])
    return total


def _is_slow(x: Tensor, weight: Tensor) -> bool:
    """Whether torch computes a depthwise convolution of these channel by channel."""
    return x.dtype == weight.dtype == torch.float64 and x.device.type == "cpu"


def _fits(x: Tensor, weight: Tensor, padding: Sequence[int], dilation: Sequence[int]) -> bool:
    """Whether ``x`` is a batch of images, none of them smaller than the kernel; torch says why it refuses others."""
    sizes = zip(x.shape[2:], padding, dilation, weight.shape[2:], strict=False)
    return x.ndim == 4 and x.numel() > 0 and all(s + 2 * p > d * (k - 1) for s, p, d, k in sizes)
