"""Constraint on the expected density of gated parameters: gates descend, the multiplier ascends."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_callbacks.core.kept_tensors import KeptTensors
from sparse_callbacks.methods.l0 import gates

State = dict[str, Tensor]
"""Gates, multipliers and Adam's moments by ``<kind>/<kernel>``."""


class Rates(NamedTuple):
    """Learning rates of gates and multipliers, and whether gates step along Adam's direction."""

    gates: float
    multipliers: float
    adam: bool


@dataclass(frozen=True)
class Constraint:
    """``expected density of some kernels <= target``.

    Args:
        shares: the share of each kernel in the parameters of all kernels of the constraint, by name; the shares sum to
            1.
        target: the largest expected density that is allowed.
    """

    shares: Mapping[str, float]
    target: float

    @property
    def names(self) -> list[str]:
        """Names of the kernels."""
        return list(self.shares)

    @property
    def key(self) -> str:
        """Key of the multiplier in the state."""
        return f"multiplier/{self.names[0]}"

    def density(self, state: State) -> Tensor:
        """Expected share of parameters behind open gates, 0-d."""
        return gates.expected_density([state[f"log_alpha/{n}"] for n in self.names], self.shares.values())

    def begin(self, state: State) -> None:
        """Add a multiplier of 0 to the state, unless there is a multiplier already."""
        # made from a gate, so that it has the dtype and the device of the numbers that it is added to
        state.setdefault(self.key, torch.zeros_like(state[f"log_alpha/{self.names[0]}"].flatten()[0]))

    def step(
        self, state: State, gradients: Mapping[str, Tensor], rates: Rates, kept: KeptTensors | None = None
    ) -> None:
        """Take one step of gates and multiplier at the same time, each computed from the other's old value.

        Args:
            state: gates, multiplier and moments; gets the new values, the gates in place.
            gradients: gradient of the loss by the log_alpha of each kernel.
            rates: learning rates of the step.
            kept: memory to compute in; None for fresh memory.
        """
        kept = KeptTensors() if kept is None else kept
        # gates and multiplier step at the same time, so the multiplier is read before it is written, and the density is
        # that of the gates that the loss was computed with: of each kernel before they move
        multiplier, means = state[self.key], []
        for name, share in self.shares.items():
            log_alpha = state[f"log_alpha/{name}"]
            opened = gates.p_open(log_alpha, kept.like("p_open", log_alpha))
            means.append(opened.mean())
            # gradient of the Lagrangian: that of multiplier * density, where a gate counts with its part of the
            # kernel's share, plus that of the loss
            gradient = gates.slope_at(opened, kept.like("gradient", log_alpha))
            gradient.mul_(multiplier * (share / log_alpha.numel()))
            gradient.add_(gradients[name])
            direction = _adam_step(state, name, gradient, opened) if rates.adam else gradient
            log_alpha.add_(direction.mul_(-rates.gates)).clamp_(-gates.LIMIT, gates.LIMIT)
        defect = gates.joint_density(means, self.shares.values()) - self.target
        state[self.key] = gates.ascend(multiplier, defect, rates.multipliers)


def make_constraints(
    owned: Sequence[Sequence[str]], sizes: Mapping[str, int], targets: Mapping[str, float], by_layer: bool
) -> list[Constraint]:
    """One constraint for each layer, or one for the kernels of each optimizer.

    Args:
        owned: names of the kernels that each optimizer steps.
        sizes: number of parameters that each kernel's gates close, by kernel.
        targets: the largest expected density that is allowed, by kernel.
        by_layer: whether each layer has a constraint of its own.
    """
    # never one constraint for several optimizers: a multiplier moves with its gates, when their optimizer has stepped
    groups = [names for names in owned if names]
    if by_layer:
        groups = [[name] for names in owned for name in names]
    return [Constraint(shares_of({n: sizes[n] for n in names}), targets[names[0]]) for names in groups]


def _adam_step(state: State, name: str, gradient: Tensor, root: Tensor) -> Tensor:
    """Adam's direction for the gates of a kernel, in the memory of their gradient; its moments in ``state`` are moved, or made
    at its first step. ``root`` is memory of the same shape."""
    if f"exp_avg/{name}" not in state:
        state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"] = torch.zeros_like(gradient), torch.zeros_like(gradient)
    mean, square = state[f"exp_avg/{name}"], state[f"exp_avg_sq/{name}"]
    # a tensor in place of an int, so that it is saved and moved between devices with the moments
    step = state.setdefault(f"gate_steps/{name}", torch.zeros_like(gradient.view(-1)[0])).add_(1)
    mean.lerp_(gradient, 1 - gates.BETAS[0])
    square.mul_(gates.BETAS[1]).addcmul_(gradient, gradient, value=1 - gates.BETAS[1])
    return gates.adam_direction(mean, square, step, out=gradient, root=root)


def shares_of(sizes: Mapping[str, int]) -> dict[str, float]:
    """The share of each size in the sum of all.

    >>> shares_of({"a": 30, "b": 10})
    {'a': 0.75, 'b': 0.25}
    """
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}
