"""Formulas of hard-concrete gates that the tests need and the package does not; written down independently of it."""

import math

import torch
from torch import Tensor

SHIFT = 2 / 3 * math.log(11)  # beta * log(-zeta / gamma) with beta = 2/3, gamma = -0.1, zeta = 1.1


def p_one(log_alpha: Tensor) -> Tensor:
    """P(z = 1)."""
    return torch.sigmoid(log_alpha - SHIFT)


def log_alpha_for(density: float) -> float:
    """The log_alpha of a gate that is open with probability ``density``."""
    return math.log(density / (1 - density)) - SHIFT


def expected_l2(weight: Tensor, log_alpha: Tensor) -> Tensor:
    """Half the expected squared norm of a gated weight, 0-d: ``0.5 * sum over gates of P(z != 0) * ||w||^2``.

    Gates broadcast against ``weight``. No gradient reaches ``log_alpha``.
    """
    return 0.5 * (weight.square() * torch.sigmoid(log_alpha + SHIFT).detach()).sum()
