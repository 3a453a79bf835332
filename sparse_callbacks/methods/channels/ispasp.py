"""i-SpaSP: the units of a layer that keep the output of the next one closest to what it was."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.channels.feature_maps import maps_read
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.core.largest import widened

ITERATIONS = 20  # published
WIDEST = 8192  # entries that an output reads: sums over pairs of them are half a gigabyte
UNFOLDED = 2**25  # entries of unfolded inputs that are made at once


@dataclass(frozen=True)
class Contributions:
    """What the units of a hidden layer contribute to the outputs of the next one, in sums over samples and outputs.

    With hidden activations H [units, samples] and weights W [outputs, units], and a residual V = W_R H_R that the units R
    leave when they are removed, the sum over samples of (W^T V)_i is ``pull[i, R].sum()``, and the squares of V sum up to
    ``products[R, R].sum()``. So an iteration needs neither samples nor outputs.

    Attributes:
        products: for each pair of units the product of their contributions to the outputs, [units, units].
        pull: (W^T W)_ij * sum over samples of H_j, [units, units].
        activity: sum of \\|H\\| over samples, [units].
    """

    products: Tensor
    pull: Tensor
    activity: Tensor

    @classmethod
    def of(cls, hidden: Tensor, weight: Tensor) -> "Contributions":
        """Those of ``hidden`` [units, samples] through ``weight`` [outputs, units]."""
        pairs = weight.T @ weight
        return cls(pairs * (hidden @ hidden.T), pairs * hidden.sum(1), hidden.abs().sum(1))


@dataclass(frozen=True)
class Exchange:
    """One iteration.

    Attributes:
        importance: sum over samples of W^T V, signed, of the residual V before it, [units].
        candidates: twice as many units as are kept, with the largest importance, ascending.
        selected: the most active of them and of those that were kept before: these are kept now, ascending.
        residual: half the squared residual with them.
    """

    importance: Tensor
    candidates: Tensor
    selected: Tensor
    residual: float


def exchanges(units: Contributions, keep: int, iterations: int = ITERATIONS) -> Iterator[Exchange]:
    """The iterations of i-SpaSP from no unit on, until a set of units comes a second time.

    Args:
        units: what they contribute.
        keep: the number of units to keep.
        iterations: the largest number of iterations.
    """
    selected = torch.zeros(len(units.activity), dtype=torch.bool, device=units.activity.device)
    seen = list[Tensor]()
    for _ in range(iterations):
        importance = units.pull[:, ~selected].sum(1)
        candidates = _largest(importance, 2 * keep)
        merged = selected.index_fill(0, candidates, True)
        selected = torch.zeros_like(selected)
        # activity is not negative, so that others come last
        selected[_largest(torch.where(merged, units.activity, -1.0), keep)] = True
        residual = half_residual(units, selected)
        yield Exchange(importance, candidates.sort().values, selected.nonzero()[:, 0], residual)
        if any(torch.equal(selected, other) for other in seen):
            return
        seen.append(selected)


def half_residual(units: Contributions, kept: Tensor) -> float:
    """Half the squared change of the outputs when only ``kept`` (bool [units]) stay."""
    return 0.5 * float(units.products[~kept][:, ~kept].sum())


def ispasp(units: Contributions, keep: int, iterations: int = ITERATIONS) -> Tensor:
    """The units to keep, ascending: the set with the smallest residual among those seen, the earliest of equals.

    Wolfe and Kyrillidis 2022. The residual may grow from one iteration to the next, and the paper returns the last set.

    Args:
        units: what they contribute.
        keep: the number of units to keep, at least 1.
        iterations: the largest number of iterations.
    """
    return min(exchanges(units, keep, iterations), key=lambda e: e.residual).selected


def _largest(values: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest values, of equals the first."""
    return torch.sort(values, descending=True, stable=True).indices[:count]


# ---------------------------------------------------------------------- for groups of channels


def why_not(model: nn.Module, group: Group) -> str:
    """Why i-SpaSP cannot score a group; empty where it can."""
    if len(group.producers) != 1 or len(group.consumers) != 1:
        return f"{len(group.producers)} layers make these channels and {len(group.consumers)} read them"
    consumer = group.consumers[0]
    reader: Any = model.get_submodule(consumer.module)
    if not isinstance(reader, nn.Linear | nn.Conv1d | nn.Conv2d) or consumer.parameter != f"{consumer.module}.weight":
        return f"{consumer.parameter} is not the weight of a linear layer or of a convolution in one or two dimensions"
    if getattr(reader, "groups", 1) != 1:
        return f"{consumer.module} is a grouped convolution"
    entries = reader.weight[0].numel()
    return f"an output of {consumer.module} reads {entries} entries, more than {WIDEST}" if entries > WIDEST else ""


def contributions(model: nn.Module, groups: Sequence[Group], losses: Iterable[Any]) -> list[Contributions]:
    """What the units of each group contribute to the outputs of its consumer, without biases.

    Convolutions are products too, of their weights with unfolded inputs; the importance of an input that several outputs
    read is summed over them, and places of padding are not inputs.

    Args:
        model: the network.
        groups: groups for which :func:`why_not` has no reason.
        losses: computed when they are asked for; what they are does not matter.

    Raises:
        ValueError: the consumer of a group is never called.
    """
    sums = {g.consumers[0].parameter: _Sums(model, g) for g in groups}
    for _, maps in maps_read(model, sums, losses):
        for seen in maps:
            sums[seen.parameter].add(seen.values.detach())
    return [sums[g.consumers[0].parameter].contributions() for g in groups]


class _Sums:
    """Sums over samples and positions of what a layer reads.

    Args:
        model: the network.
        group: the group whose consumer is the layer.
    """

    def __init__(self, model: nn.Module, group: Group) -> None:
        self._group = group
        self._reader: Any = model.get_submodule(group.consumers[0].module)
        self._pairs: Tensor | None = None  # of unfolded entries, [entries, entries]
        self._read: Tensor | None = None  # sum of each entry over the positions at which a tap reads, [taps, entries]
        self._activity: Tensor | None = None  # of channels

    def add(self, x: Tensor) -> None:
        """Add what the layer has read in one call."""
        x = x.to(widened(x.dtype))
        if isinstance(self._reader, nn.Linear):
            # as images of one place
            x = x.reshape(-1, x.shape[-1], 1, 1)
        elif isinstance(self._reader, nn.Conv1d):
            x = x.unsqueeze(-2) if x.ndim == 3 else x[None, :, None]
        elif x.ndim == 3:
            x = x.unsqueeze(0)
        kernel, options, padding = _kernel(self._reader)
        entries = x.shape[1] * kernel[0] * kernel[1]
        inside = functional.unfold(functional.pad(torch.ones_like(x[:1, :1]), padding), kernel, **options)[0]
        at_once = max(1, UNFOLDED // (entries * inside.shape[1]))
        for part in torch.split(x, at_once):
            unfolded = functional.unfold(functional.pad(part, padding), kernel, **options)
            flat = unfolded.transpose(0, 1).flatten(1)
            pairs, read = (flat @ flat.T).double(), (inside @ unfolded.sum(0).T).double()
            activity = part.abs().sum((0, 2, 3)).double()
            if self._pairs is None or self._read is None or self._activity is None:
                self._pairs, self._read, self._activity = pairs, read, activity
            else:
                self._pairs, self._read, self._activity = (
                    self._pairs + pairs,
                    self._read + read,
                    self._activity + activity,
                )

    def contributions(self) -> Contributions:
        """What the units of the group contribute."""
        consumer, size = self._group.consumers[0], self._group.size
        if self._pairs is None or self._read is None or self._activity is None:
            raise ValueError(
                f"no batch of the calibration calls {consumer.module}, which reads the channels of {self._group.name}. Leave "
                "it out with exclude=, or give a criterion of weights, such as 'l1'."
            )
        weight: Tensor = self._reader.weight.detach().flatten(1).double()
        taps = len(self._read)
        of_channel = consumer.units.to(weight.device)
        owned = of_channel >= 0
        # [channels, units] and [entries, units]: which of them is of which unit; those of other groups are of none
        channels = functional.one_hot(of_channel.clamp(min=0), size).double() * owned[:, None]
        entries = channels.repeat_interleave(taps, 0)
        between = weight.T @ weight
        products = entries.T @ (between * self._pairs) @ entries
        # the row of an entry has the sums over the positions at which its tap reads
        pull = entries.T @ (between * self._read.repeat(len(of_channel), 1)) @ entries
        return Contributions(products, pull, channels.T @ self._activity)


def _kernel(reader: nn.Module) -> tuple[tuple[int, int], dict[str, Any], tuple[int, int, int, int]]:
    """Size of a layer's kernel in two dimensions, its stride and dilation, and its padding as ``functional.pad`` takes it."""
    if not isinstance(reader, nn.Conv1d | nn.Conv2d):
        return (1, 1), {}, (0, 0, 0, 0)
    missing = 2 - len(reader.kernel_size)
    size, stride, dilation = ((1,) * missing + tuple(v) for v in (reader.kernel_size, reader.stride, reader.dilation))
    padding = [0, 0, 0, 0]
    # of another mode than zeros, the layer has read its padding
    if reader.padding_mode == "zeros":
        for d, (k, gap) in enumerate(zip(reversed(size), reversed(dilation), strict=True)):
            if reader.padding == "same":
                whole = gap * (k - 1)
                padding[2 * d : 2 * d + 2] = whole // 2, whole - whole // 2
            elif reader.padding != "valid" and d < len(reader.padding):
                padding[2 * d : 2 * d + 2] = [int(reader.padding[-1 - d])] * 2
    return (
        (size[0], size[1]),
        {"stride": stride, "dilation": dilation},
        (padding[0], padding[1], padding[2], padding[3]),
    )
