"""A layer's weights under a mask, fitted to its dense outputs by steps of Adam."""

from itertools import cycle

import torch
from torch import Tensor, nn

from sparse_callbacks.core.conversion.layer_products import output_of, samples_of

ADAM_STEPS = 1000
BATCH = 50
WEIGHT_RATE, BIAS_RATE = 1e-3, 1e-2


class KeptInputs:
    """What a layer has read, kept for steps and errors.

    Args:
        layer: a linear layer, or a convolution of any kind.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer = layer
        self.kept: list[Tensor] = []
        """Inputs of 50 samples each, or what is left of a call, in the type that is computed in."""
        self.rows = 0
        """Rows that were added: positions of samples."""

    def add(self, x: Tensor) -> None:
        """Keep what the layer has read in one call."""
        x = samples_of(self.layer, x)
        # a copy, as an activation in place may follow
        kept = x.to(torch.promote_types(x.dtype, torch.float32), copy=True)
        self.kept += torch.split(kept, BATCH)
        self.rows += x[:, :1].numel()

    def mean_square(self, weight: Tensor, bias: Tensor | None) -> float:
        """The mean square of outputs with given parameters: those of differences give the mean squared error."""
        total, count = 0.0, 0
        for x in self.kept:
            output = output_of(self.layer, x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
            total, count = total + output.numel() * float(output.square().mean()), count + output.numel()
        return total / count


def fit_by_adam(
    inputs: KeptInputs,
    dense: tuple[Tensor, Tensor | None],
    start: tuple[Tensor, Tensor | None],
    mask: Tensor,
    steps: int = ADAM_STEPS,
) -> tuple[Tensor, Tensor | None]:
    """Weights on a mask's support whose outputs are close to those of the dense weights, in the mean square.

    Each step takes 50 samples, in turn. Differs from the paper: the rates fall to zero along a line, so that the last steps
    settle.

    Args:
        inputs: what the layer has read.
        dense: weight and bias of the dense layer.
        start: where the steps begin.
        mask: bool, of the shape of the weight.
        steps: steps of Adam.

    Returns:
        Weight and bias, in the type that was computed in.

    References:
        Hubara et al. 2021, "Accelerated Sparse Neural Training" (AdaPrune), and its code: rates of 1e-3 for weights and 1e-2 for
        biases, 1000 steps of 50 samples.
    """
    kind = inputs.kept[0].dtype
    weight, bias = (None if t is None else t.to(kind) for t in dense)
    assert weight is not None
    fitted = [t.to(kind, copy=True).requires_grad_() for t in start if t is not None]
    rates = [WEIGHT_RATE, BIAS_RATE][: len(fitted)]
    optimizer = torch.optim.Adam([{"params": [t], "lr": rate} for t, rate in zip(fitted, rates, strict=True)])
    power = max(inputs.mean_square(weight, bias), torch.finfo(kind).tiny)
    for step, x in zip(range(steps), cycle(inputs.kept), strict=False):
        for group, rate in zip(optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * (1 - step / steps)
        with torch.enable_grad():
            shift = None if bias is None else fitted[1] - bias
            loss = output_of(inputs.layer, x, fitted[0] * mask - weight, shift).square().mean() / power
            gradients = torch.autograd.grad(loss, fitted)
        for t, gradient in zip(fitted, gradients, strict=True):
            t.grad = gradient
        optimizer.step()
    return fitted[0].detach() * mask, None if bias is None else fitted[1].detach()
