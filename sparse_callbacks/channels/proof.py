"""What slimming changed, as a table: outputs, parameters, FLOPs, latency, and every group."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.comparison import COARSE_TOLERANCE, Difference, compare, outputs_on
from sparse_callbacks.channels.comparison_inputs import Drawn
from sparse_callbacks.channels.forward_flops import forward_flops
from sparse_callbacks.core.clock import milliseconds
from sparse_callbacks.core.inspection import quiet, run, tensors_in

READINGS = 3
"""Forward passes that are timed, the fewest that the clock takes: more would be most of the time of slimming."""


COARSE = (
    f"compared in half precision alone, where differences up to {COARSE_TOLERANCE:.0%} count as rounding: the model does not "
    "run in float64, so a small error would not show"
)


@dataclass(frozen=True)
class ModelCost:
    """Parameters of a model, FLOPs of a forward pass on the whole sample that was given (a multiply-add is two), and its
    median time in milliseconds."""

    parameters: int
    flops: int
    latency: float


@dataclass(frozen=True)
class GroupChange:
    """What became of one channel group, or of a mask that removed nothing and belongs to no group.

    Attributes:
        name: name of the group, or of the parameter.
        size: number of units that it had, or of entries of the mask.
        units: number of units that were removed.
        channels: number of channels that its first producer lost with them.
        reason: why units stay that the masks might have let go; empty where there is nothing to say.
    """

    name: str
    size: int
    units: int = 0
    channels: int = 0
    reason: str = ""

    @property
    def note(self) -> str:
        """:attr:`reason`, under the name that it has in version 0.1.0."""
        return self.reason


@dataclass(frozen=True)
class Proof:
    """The evidence that a slim model computes what the masked model did, and what each of them costs.

    Attributes:
        random, given: differences of outputs on random inputs and on given inputs, in the model's own precision, in
            eval mode.
        checked: difference of outputs on all of these inputs, in ``precision``.
        precision: float64, or the model's own precision where it does not run in float64 or computes something else there.
        before, after: costs of the masked and the slim model, on the example input.
        rows: what became of each group, and of masks that removed nothing without any group saying so.
        cut: number of weights that the masks cut and that were not zero in the model as it was given.
        samples: how many samples the example input holds, where the caller knows it: the text then gives FLOPs for one of
            them. None: for the whole input, which may be no batch at all.
    """

    random: Difference
    given: Difference
    checked: Difference
    precision: torch.dtype
    before: ModelCost
    after: ModelCost
    rows: tuple[GroupChange, ...]
    cut: int = 0
    samples: int | None = None

    @property
    def is_coarse(self) -> bool:
        """Whether outputs were compared in half precision, as the model does not run in a higher one."""
        return self.precision in (torch.float16, torch.bfloat16)

    @property
    def removed(self) -> int:
        """Channels removed, counted at the first producer of each group."""
        # at the first producer alone: the other producers of a group have the same channels, which would count again
        return sum(r.channels for r in self.rows)

    @property
    def left_out(self) -> dict[str, str]:
        """The reason of every group that lost nothing and has one, by the name of the group, and of such masks by that of
        the parameter."""
        # a group that lost some of its units may have a reason too, for the units that stayed
        return {r.name: r.reason for r in self.rows if r.reason and not r.units}

    def __str__(self) -> str:
        before, after, samples = self.before, self.after, self.samples or 1
        costs = [
            ("parameters", f"{before.parameters:,}", f"{after.parameters:,}", after.parameters / before.parameters),
            # a model without matrix products has no FLOPs
            (
                "FLOPs",
                f"{before.flops / samples:,.0f}",
                f"{after.flops / samples:,.0f}",
                after.flops / max(1, before.flops),
            ),
            (
                self._latency_label,
                f"{before.latency:.2f} ms",
                f"{after.latency:.2f} ms",
                after.latency / before.latency,
            ),
        ]
        precision = str(self.precision).removeprefix("torch.")
        # a model without convolutions and linear layers has no rows
        width = max((len(r.name) for r in self.rows), default=5) + 2
        label = max(len(name) for name, *_ in costs) + 2
        lines = [
            f"{'':{label}}{'before':>14}{'after':>14}{'ratio':>8}",
            *[f"{name:{label}}{old:>14}{new:>14}{ratio:8.3f}" for name, old, new, ratio in costs],
            self._input_note,
            f"outputs on given inputs:  {self.given}",
            f"outputs on random inputs: {self.random}",
            f"outputs in {precision + ':':14}{self.checked}",
            *([COARSE] if self.is_coarse else []),
            f"channels removed: {self.removed}",
            *(
                [f"cut by the masks: {self.cut:,} weights that were not zero; compared is the masked model"]
                if self.cut
                else []
            ),
            "",
            f"{'group':{width}}{'units':>7}{'removed':>9}  reason",
            *[f"{r.name:{width}}{r.size:7}{r.units:9}  {r.reason}".rstrip() for r in self.rows],
        ]
        return "\n".join(lines)

    @property
    def _latency_label(self) -> str:
        return "latency" if self.samples is None else f"latency, batch of {self.samples}"

    @property
    def _input_note(self) -> str:
        if self.samples is None:
            return "FLOPs and latency of a forward pass on the whole example input; a multiply-add is two FLOPs"
        return "FLOPs of a forward pass for one sample (a multiply-add is two); latency of one for the whole batch"


class Compared(NamedTuple):
    """Outputs of the masked and of the slim model, in their own precision: on the inputs of the user, and on random ones."""

    given: tuple[list[Tensor], list[Tensor]]
    random: tuple[list[Tensor], list[Tensor]]


def outputs_of_both(masked: nn.Module, small: nn.Module, given: Sequence[Any], drawn: Drawn) -> Compared:
    """Run the slim model on every input, and the masked one where its outputs are not known.

    Args:
        masked, small: the two models, or copies of them, as forward passes may write to their modules.
        given: inputs of the user.
        drawn: random inputs like the first of these, and the outputs of the masked model.
    """
    first, *others = given
    with quiet(masked), quiet(small):
        # the inputs have the order in which the masked model had them, as a model may keep something from pass to pass
        usual = outputs_on(small, [first])
        random = drawn.outputs, outputs_on(small, drawn.samples)
        return Compared(
            ([*drawn.usual, *outputs_on(masked, others)], [*usual, *outputs_on(small, others)]),
            random,
        )


def prove(
    masked: nn.Module,
    small: nn.Module,
    rows: Sequence[GroupChange],
    checked: tuple[Difference, torch.dtype],
    compared: Compared,
    example_input: Any,
) -> Proof:
    """Measure the masked and the slim model, and put together what is known of them.

    Args:
        masked, small: the two models, or copies of them, as forward passes may write to their modules.
        rows: what became of each group.
        checked: the difference of outputs that was allowed to stand, and its precision.
        compared: outputs of both.
        example_input: the input that is timed.
    """
    with quiet(masked), quiet(small):
        # on the user's own input, as the time of a pass depends on its size
        before, after = _costs(masked, small, example_input)
    return Proof(compare(*compared.random), compare(*compared.given), *checked, before, after, tuple(rows))


def _costs(masked: nn.Module, small: nn.Module, sample: Any) -> list[ModelCost]:
    """Parameters, FLOPs and latency of both models on ``sample``."""
    models = (masked, small)
    # the clock waits for every GPU among them, or it would time only the start of the work
    devices = {t.device for t in (*masked.parameters(), *small.parameters(), *tensors_in(sample))}
    counted = [forward_flops(model, sample) for model in models]  # the pass also warms up
    times = milliseconds([partial(run, model, sample) for model in models], READINGS, devices, warm=True)
    return [
        ModelCost(sum(p.numel() for p in model.parameters()), flops, latency)
        for model, flops, latency in zip(models, counted, times, strict=True)
    ]
