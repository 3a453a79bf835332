"""The time of a whole model as a line over the time of its layers, fitted to the model in three sizes."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.attention_exchange import put_back_attention, put_slim_attention
from sparse_callbacks.channels.costs import Layer, LayerCost, layers
from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.latency.table import ROUND_UP
from sparse_callbacks.channels.slim import slimmable_groups

SHARES = {"half": 0.5, "a quarter": 0.25}
"""Shares of the channels with which the whole model is measured again, by their names."""


@dataclass(frozen=True)
class Fit:
    """A line: a model takes ``constant + factor * sum`` milliseconds, where the sum is that of its layers.

    Attributes:
        constant: milliseconds that do not depend on the layers.
        factor: time of a layer in the model, relative to its time alone.
        times: measured milliseconds of the model with all channels, then, if channels can be removed, with half and
            with a quarter of those that can.
        sums: milliseconds of the layers of these models, each measured alone, added up.
        reason: why there is no line through the measured models; empty where there is.
    """

    constant: float
    factor: float
    times: tuple[float, ...]
    sums: tuple[float, ...]
    reason: str = ""

    def at(self, total: float) -> float:
        """Milliseconds of a model whose layers take ``total`` milliseconds."""
        return self.constant + self.factor * total

    @property
    def largest_error(self) -> float:
        """The largest error of the line at the models that were measured, relative to their times."""
        return max(abs(self.at(total) / time - 1) for total, time in zip(self.sums, self.times, strict=True))

    @property
    def about(self) -> dict[str, float]:
        """What a table states of the fit."""
        # not strict: without smaller models there is one time alone
        found = dict(zip(("model_ms", "half_ms", "quarter_ms"), self.times, strict=False))
        return found | {"model_ms_by_table": self.at(self.sums[0]), "off": self.largest_error}

    def __str__(self) -> str:
        measured = zip(("all channels", *SHARES), self.times, self.sums, strict=False)
        parts = [f"{name} {ms:.4g} ms (by the table {self.at(total):.4g})" for name, ms, total in measured]
        line = f"the model as {self.constant:.4g} ms + {self.factor:.4g} x its layers: {', '.join(parts)}"
        return f"{line}; not fitted: {self.reason}" if self.reason else line


def fitted(times: Sequence[float], sums: Sequence[float], reason: str = "") -> Fit:
    """The line through ``times`` over ``sums`` with the smallest squared relative errors.

    Neither its constant nor its factor is below 0. Where the layers take longer in a faster model there is no such
    line, and the time with all channels alone decides: what the layers do not take is constant, and if they take more
    than the model, it takes a fixed share of their time.

    Args:
        times, sums: see :class:`Fit`.
        reason: why there is only one time and one sum; empty where there are several.
    """
    if not reason:
        # positive where the model and the sum of its layers change in the same direction
        if (times[0] - times[-1]) * (sums[0] - sums[-1]) > 0:
            constant, factor = _line(times, sums)
            return Fit(constant, factor, tuple(times), tuple(sums))
        model = f"a quarter of the channels takes {times[-1]:.4g} of {times[0]:.4g} ms"
        reason = f"{model}, its layers {sums[-1]:.4g} of {sums[0]:.4g} ms"
    constant, factor = times[0] - sums[0], 1.0
    if constant < 0:
        constant, factor = 0.0, times[0] / sums[0]
    return Fit(constant, factor, tuple(times), tuple(sums), reason)


def _line(times: Sequence[float], sums: Sequence[float]) -> tuple[float, float]:
    """Constant and factor, both at least 0, that minimize the sum of ``((constant + factor * sum) / time - 1) ** 2``.

    This is least squares with the rows (1 / time, sum / time), solved in exact fractions. A LAPACK routine rounds as
    the processor and the alignment of memory have it, and rounds a constant of 0 to below 0.
    """
    # divided by the times, so that the small models weigh as much as the large one
    ones = [1 / Fraction(t) for t in times]
    shares = [s * Fraction(total) for s, total in zip(ones, sums, strict=True)]
    a, b, c = _dot(ones, ones), _dot(ones, shares), _dot(shares, shares)
    determinant = a * c - b * b
    constant = (c * sum(ones) - b * sum(shares)) / determinant
    factor = (a * sum(shares) - b * sum(ones)) / determinant
    if constant < 0:  # the best line through 0
        constant, factor = Fraction(0), sum(shares) / c
    if factor <= 0:  # the best line that is level
        return float(sum(ones) / a), 0.0
    return float(constant), float(factor)


def _dot(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


# ---------------------------------------------------------------------- smaller models


def smaller(model: nn.Module, example: Tensor) -> tuple[list[nn.Module], str]:
    """Copies of ``model`` with the :data:`SHARES` of the units of every group that can be cut.

    Args:
        model: the model, in float32, on the CPU; it is left as it is.
        example: one sample.

    Returns:
        the copies and an empty reason, or no copies and the reason.
    """
    try:
        groups = [g for g in slimmable_groups(model, example) if not g.reason]
        if not groups:
            return [], "no channels of this model can be removed"
        copies = [shrunk(model, groups, share) for share in SHARES.values()]
        for small in copies:  # a forward pass of the user's may not take fewer channels
            layers(small, example)
        return copies, ""
    except Exception as error:  # an extra is missing, or a forward pass cannot be traced, or takes no fewer channels
        return [], f"its channels cannot be removed ({type(error).__name__}: {error})"


def shrunk(model: nn.Module, groups: Sequence[Group], share: float) -> nn.Module:
    """A copy of ``model`` with the first units of each group, as many as :func:`units_of_share` says."""
    small, cuts = copy.deepcopy(model), Cuts()
    put_slim_attention(small)  # for heads among the groups
    for group in groups:
        # which units stay does not matter to the time, only how many
        cuts = cuts.with_group(group, torch.arange(group.size) < units_of_share(group.size, share))
    Surgery(small).cut(cuts, [m for g in groups for m in g.members])
    put_back_attention(small)
    return small


def units_of_share(size: int, share: float) -> int:
    """Number of units that is about ``share`` of ``size``: where the size is a multiple of 8, so is the number.

    There is at least one unit; where the multiple of 8 would be 0, any other number is taken.

    >>> units_of_share(64, 0.5), units_of_share(24, 0.25), units_of_share(16, 0.25), units_of_share(3, 0.25)
    (32, 8, 4, 1)
    """
    blocks = round(share * size / ROUND_UP) if size % ROUND_UP == 0 else 0
    return blocks * ROUND_UP if blocks else max(1, round(share * size))


def layer_sum(cost: LayerCost, found: Mapping[str, Layer], model: nn.Module, example: Any) -> float:
    """Cost of the layers of a smaller model, added up.

    Args:
        cost: the cost of one layer.
        found: layers of the whole model, which say how each layer is used.
        model: the smaller model, which says how many inputs and outputs each layer has.
        example: an input of the smaller model.
    """
    small = layers(model, example)
    return math.fsum(cost(layer, small[name].inputs, small[name].outputs) for name, layer in found.items())
