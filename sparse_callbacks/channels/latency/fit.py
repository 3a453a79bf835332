"""The time of a whole model as a line over that of its layers, fitted to the model with all channels, with half and with a quarter."""

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.costs import Cost, Layer, layers
from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.latency.table import ROUND_UP
from sparse_callbacks.channels.slim import slimmable_groups

SHARES = {"half": 0.5, "a quarter": 0.25}


@dataclass(frozen=True)
class Fit:
    """Milliseconds of a model are ``constant + factor * those of its layers``.

    Attributes:
        times: of the model with all channels, then with half and with a quarter of what can go, if anything can; milliseconds.
        sums: of the layers of these models, each measured alone.
        why: there is no line through the first two; empty where there is.
    """

    constant: float
    factor: float
    times: tuple[float, ...]
    sums: tuple[float, ...]
    why: str = ""

    def at(self, total: float) -> float:
        """Milliseconds of a model whose layers take ``total``."""
        return self.constant + self.factor * total

    @property
    def off(self) -> float:
        """The largest error of the line at the models that were measured, relative to their times."""
        return max(abs(self.at(total) / time - 1) for total, time in zip(self.sums, self.times, strict=True))

    @property
    def about(self) -> dict[str, float]:
        """What was measured, to be kept in a table."""
        found = dict(zip(("model_ms", "half_ms", "quarter_ms"), self.times, strict=False))
        return found | {"model_ms_by_table": self.at(self.sums[0]), "off": self.off}

    def __str__(self) -> str:
        names, pairs = ("all channels", *SHARES), zip(self.times, self.sums, strict=True)
        parts = [f"{name} {ms:.4g} ms (by the table {self.at(total):.4g})" for name, (ms, total) in zip(names, pairs, strict=False)]
        line = f"the model as {self.constant:.4g} ms + {self.factor:.4g} x its layers: {', '.join(parts)}"
        return f"{line}; not fitted: {self.why}" if self.why else line


def fitted(times: Sequence[float], sums: Sequence[float], why: str = "") -> Fit:
    """The line through ``times`` over ``sums`` with the smallest relative errors (squared) among those that start at 0 or above.

    Where the layers take longer in a faster model there is none, and the first time alone decides: what the layers do not take is
    constant; if they take more than the model, it is a share of theirs.

    Args:
        times, sums: see :class:`Fit`.
        why: there is only one of each.
    """
    if not why:
        if (times[0] - times[-1]) * (sums[0] - sums[-1]) > 0:
            constant, factor = _line(times, sums)
            return Fit(constant, factor, tuple(times), tuple(sums))
        why = f"a quarter of the channels takes {times[-1]:.4g} of {times[0]:.4g} ms, its layers {sums[-1]:.4g} of {sums[0]:.4g} ms"
    constant, factor = times[0] - sums[0], 1.0
    if constant < 0:
        constant, factor = 0.0, times[0] / sums[0]
    return Fit(constant, factor, tuple(times), tuple(sums), why)


def _line(times: Sequence[float], sums: Sequence[float]) -> tuple[float, float]:
    """Constant and factor that make the sum of ``((constant + factor * total) / time - 1) ** 2`` smallest, neither of them below 0."""
    # in exact arithmetic: a LAPACK routine rounds as the processor and the alignment of memory have it, and a constant of 0 to below 0
    ones = [1 / Fraction(t) for t in times]
    shares = [s * Fraction(total) for s, total in zip(ones, sums, strict=True)]
    a, b, c = _dot(ones, ones), _dot(ones, shares), _dot(shares, shares)
    constant, factor = (c * sum(ones) - b * sum(shares)) / (a * c - b * b), (a * sum(shares) - b * sum(ones)) / (a * c - b * b)
    if constant < 0:
        constant, factor = Fraction(0), sum(shares) / c
    return (float(constant), float(factor)) if factor > 0 else (float(sum(ones) / a), 0.0)


def _dot(a: Sequence[Fraction], b: Sequence[Fraction]) -> Fraction:
    return sum((x * y for x, y in zip(a, b, strict=True)), Fraction(0))


def smaller(model: nn.Module, example: Tensor) -> tuple[list[nn.Module], str]:
    """Copies of ``model`` with the :data:`SHARES` of the units of every group that can go, or none and the reason.

    Args:
        model: in float32, on the CPU; it is left as it is.
        example: one sample.
    """
    try:
        groups = [g for g in slimmable_groups(model, example) if not g.reason]
        if not groups:
            return [], "no channels of this model can be removed"
        made = [shrunk(model, groups, share) for share in SHARES.values()]
        for one in made:
            layers(one, example)
        return made, ""
    except Exception as error:  # a missing extra, a model that cannot be traced, a forward that fails with fewer channels
        return [], f"its channels cannot be removed ({type(error).__name__}: {error})"


def shrunk(model: nn.Module, groups: Sequence[Group], share: float) -> nn.Module:
    """A copy of ``model`` with the first of the units of each group, so many as :func:`kept` says."""
    small, cuts = copy.deepcopy(model), Cuts()
    for group in groups:
        cuts = cuts.with_group(group, torch.arange(group.size) < kept(group.size, share))
    Surgery(small).cut(cuts, [m for g in groups for m in g.members])
    return small


def kept(size: int, share: float) -> int:
    """Units that are ``share`` of ``size``, a multiple of 8 where the size is one, unless that is none at all.

    >>> kept(64, 0.5), kept(24, 0.25), kept(16, 0.25), kept(3, 0.25)
    (32, 8, 4, 1)
    """
    blocks = round(share * size / ROUND_UP) if size % ROUND_UP == 0 else 0
    return blocks * ROUND_UP or max(1, round(share * size))


def layer_sum(cost: Cost, found: Mapping[str, Layer], model: nn.Module, example: Any) -> float:
    """Cost of the layers ``found`` in a model with the inputs and outputs that they have in ``model``, a smaller one."""
    small = layers(model, example)
    return math.fsum(cost(layer, small[name].inputs, small[name].outputs) for name, layer in found.items())
