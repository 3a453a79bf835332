"""A target for the expected density of gated parameters: its gates descend, and its multiplier ascends."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparse_callbacks.methods.l0 import gates

State = dict[str, Tensor]
"""Gates, multipliers and moments by ``<kind>/<kernel>``."""


class Rates(NamedTuple):
    """Learning rates of gates and multipliers, and whether gates step along Adam's direction."""

    gates: float
    multipliers: float
    adam: bool


@dataclass(frozen=True)
class Constraint:
    """``expected density of some kernels <= target``.

    Args:
        shares: of each kernel in the parameters of all of them, by name; they sum to 1.
        target: of their density.
    """

    shares: Mapping[str, float]
    target: float

    @property
    def names(self) -> list[str]:
        return list(self.shares)

    @property
    def key(self) -> str:
        """The multiplier's, in the state."""
        return f"multiplier/{self.names[0]}"

    def density(self, state: State) -> Tensor:
        """Expected share of parameters behind open gates, 0-d."""
        return gates.expected_density([state[f"log_alpha/{n}"] for n in self.names], self.shares.values())

    def begin(self, state: State) -> None:
        """A multiplier of 0, where there is none yet."""
        state.setdefault(self.key, torch.zeros_like(state[f"log_alpha/{self.names[0]}"].flatten()[0]))

    def step(self, state: State, pulls: Mapping[str, Tensor], rates: Rates) -> None:
        """Gates and multiplier step at once, each from the other's old value.

        Args:
            state: gets the new values.
            pulls: gradient of the loss by the gates of each kernel.
            rates: of the step.
        """
        multiplier, defect = state[self.key], self.density(state) - self.target
        for name, share in self.shares.items():
            log_alpha = state[f"log_alpha/{name}"]
            gradient = gates.p_slope(log_alpha).mul_(multiplier * (share / log_alpha.numel())).add_(pulls[name])
            along = _adam(state, name, gradient) if rates.adam else gradient
            state[f"log_alpha/{name}"] = along.mul_(-rates.gates).add_(log_alpha).clamp_(-gates.LIMIT, gates.LIMIT)
        state[self.key] = gates.ascend(multiplier, defect, rates.multipliers)


def _adam(state: State, name: str, gradient: Tensor) -> Tensor:
    keys = [f"{kind}/{name}" for kind in ("exp_avg", "exp_avg_sq", "gate_steps")]
    mean, square = (state.setdefault(k, torch.zeros_like(gradient)) for k in keys[:2])
    step = state.setdefault(keys[2], torch.zeros_like(gradient.flatten()[0])).add_(1)
    mean.lerp_(gradient, 1 - gates.BETAS[0])
    square.mul_(gates.BETAS[1]).addcmul_(gradient, gradient, value=1 - gates.BETAS[1])
    return gates.adam(mean, square, step)


def shares_of(sizes: Mapping[str, int]) -> dict[str, float]:
    """Each size as a share of all.

    >>> shares_of({"a": 30, "b": 10})
    {'a': 0.75, 'b': 0.25}
    """
    return {name: size / sum(sizes.values()) for name, size in sizes.items()}
