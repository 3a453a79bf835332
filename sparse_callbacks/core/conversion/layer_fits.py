"""One layer under a mask of N:M: its starts, the fit to its dense outputs, and which of them is taken."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvTransposeNd

from sparse_callbacks.core.conversion.adam_fit import KeptInputs, fit_by_adam
from sparse_callbacks.core.conversion.least_squares import Moments, refit
from sparse_callbacks.core.conversion.starts import absorb_mean
from sparse_callbacks.core.nm_masks import NMPattern

WIDEST = 4096
"""Inputs of an output up to which its normal equations are solved."""
FitName = Literal["adaprune", "absorbed", "masked"]
InputRecorder = Moments | KeptInputs
Parameters = tuple[Tensor, Tensor | None]


@dataclass(frozen=True)
class LayerFit:
    """What became of the parameters of one layer.

    Attributes:
        weight, bias: the parameters, of its own type.
        before: mean squared error of its outputs with the masked weights, over rows and outputs.
        after: the same with these parameters.
        power: mean square of its dense outputs.
        how: what these parameters are, in words.
        rows: rows of the data: positions of samples.
    """

    weight: Tensor
    bias: Tensor | None
    before: float
    after: float
    power: float
    how: str
    rows: int


def inputs_of_output(layer: nn.Module) -> int:
    """Inputs that one output of a layer reads at one position, those at all places of a kernel."""
    weight = layer._parameters["weight"]
    assert weight is not None
    return weight.numel() // weight.shape[1 if isinstance(layer, _ConvTransposeNd) else 0]


def recorder_for(layer: nn.Module) -> InputRecorder:
    """What keeps of a layer's inputs what its fit needs: sums of products, or the inputs themselves of wide layers."""
    # outputs of a transposed convolution read different inputs at different positions
    exact = inputs_of_output(layer) <= WIDEST and not isinstance(layer, _ConvTransposeNd)
    return Moments(layer) if exact else KeptInputs(layer)


def bytes_of(layer: nn.Module) -> int:
    """Bytes that the sums of products of a layer take."""
    size = inputs_of_output(layer) + (layer._parameters.get("bias") is not None)
    return 8 * int(getattr(layer, "groups", 1)) * size**2


def fitted(
    layer: nn.Module, recorder: InputRecorder, mask: Tensor, pattern: NMPattern, fit: FitName, damping: float = 0.0
) -> LayerFit:
    """A layer's parameters under a mask.

    Args:
        layer: the dense layer, which stays as it is.
        recorder: what it has read.
        mask: bool, of the shape of its weight.
        pattern: the pattern that the mask has.
        fit: ``"masked"`` and ``"absorbed"`` take these weights as they are; ``"adaprune"`` whichever has the smallest error:
            one of them, or what is fitted.
        damping: see :func:`~sparse_callbacks.core.conversion.least_squares.refit`.
    """
    dense = _parameters_of(layer)
    weight, bias = dense
    axis = 0 if isinstance(layer, _ConvTransposeNd) else 1
    found = {
        "as masked": (weight.masked_fill(~mask, 0), bias),
        "absorbed means": (absorb_mean(weight, mask, pattern.m, axis), bias),
    }
    errors = {how: mean_squared_error(recorder, dense, parameters) for how, parameters in found.items()}
    best = "absorbed means" if fit == "absorbed" else "as masked"
    if fit == "adaprune":
        best = min(errors, key=errors.__getitem__)
        how, (new, shifted) = _optimum(recorder, dense, found[best], mask, damping)
        # the error of the stored numbers counts: rounding to them is part of it
        found[how] = new.to(weight), None if bias is None or shifted is None else shifted.to(bias)
        errors[how] = mean_squared_error(recorder, dense, found[how])
        best = min(best, how, key=errors.__getitem__)
    nothing = torch.zeros_like(weight), None if bias is None else torch.zeros_like(bias)
    power = mean_squared_error(recorder, dense, nothing)
    return LayerFit(*found[best], errors["as masked"], errors[best], power, best, recorder.rows)


def _parameters_of(layer: nn.Module) -> Parameters:
    weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
    assert weight is not None
    return weight.detach(), None if bias is None else bias.detach()


def mean_squared_error(recorder: InputRecorder, dense: Parameters, other: Parameters) -> float:
    """The mean over rows and outputs of the squared difference of two layers' outputs.

    Args:
        recorder: what the layer has read.
        dense, other: weight and bias of either.
    """
    if isinstance(recorder, Moments):
        return recorder.mean_square(_as_rows(recorder, other) - _as_rows(recorder, dense))
    kind = recorder.kept[0].dtype
    shift = None if other[1] is None or dense[1] is None else other[1].to(kind) - dense[1].to(kind)
    return recorder.mean_square(other[0].to(kind) - dense[0].to(kind), shift)


def _as_rows(moments: Moments, parameters: Parameters) -> Tensor:
    """Weights by output, with the bias as that of the last input, where the sums of products are."""
    weight, bias = parameters
    columns = [weight.flatten(1), *([] if bias is None else [bias[:, None]])]
    return torch.cat(columns, 1).to(moments.matrix.device).double()


def _optimum(
    recorder: InputRecorder, dense: Parameters, start: Parameters, mask: Tensor, damping: float
) -> tuple[str, Parameters]:
    """How a layer was fitted, and the parameters, in the type that was computed in."""
    if isinstance(recorder, KeptInputs):
        return "Adam", fit_by_adam(recorder, dense, start, mask)
    rows = _as_rows(recorder, dense)
    biased = dense[1] is not None
    active = mask.flatten(1).to(rows.device)
    if biased:
        active = torch.cat([active, torch.ones_like(active[:, :1])], 1)
    new = refit(recorder.matrix, rows, active, damping)
    return "least squares", (new[:, : new.shape[1] - biased].reshape(mask.shape), new[:, -1] if biased else None)
