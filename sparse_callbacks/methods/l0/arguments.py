"""Arguments of constrained L0: the values that they may have, and the lower bound of a density."""

import math
from collections.abc import Mapping

import torch

from sparse_callbacks.core.arguments import refuse_outside, refuse_unknown
from sparse_callbacks.methods.l0 import gates

Densities = float | Mapping[str, float]
"""One number, or one for each layer by glob."""

CHOICES = {"constraint": ("model", "layer"), "unit": ("channel", "weight"), "gate_optimizer": ("sgd", "adam")}
# no gate can be open less often than at the clamp of log_alpha, so no density below this can be met
LEAST = float(gates.p_open(torch.tensor(-gates.LIMIT)))
WHY_LEAST = (
    "log_alpha is kept within +-log 100, where a gate is still open in 4.7 % of its samples. The trained network can "
    "be smaller than its expected density, as its median gates are closed wherever samples are open at most half of "
    "the time"
)


def plain(value: Densities) -> Densities:
    """``value`` with a plain dict in place of any other mapping, such as that of a configuration."""
    return dict(value) if isinstance(value, Mapping) else value


def refuse_sparsity(options: Mapping[str, object], method: str) -> None:
    """Refuse the arguments that other methods have for a target, which gates cannot keep exactly.

    Args:
        options: the arguments that the method's constructor does not name.
        method: the name of the method's class.

    Raises:
        ValueError: ``sparsity`` or ``distribution`` is among them.
    """
    if "sparsity" in options:
        raise ValueError(
            f"sparsity= is not an argument of {method}, whose gates meet a target in expectation. Give density=, the "
            "share of parameters that stay: 0.1 for 90 % zeros."
        )
    if "distribution" in options:
        raise ValueError(
            f"distribution= is not an argument of {method}, whose gates decide how many weights of each layer stay. Leave it "
            "out, or give density= a mapping by glob and constraint='layer'."
        )


def refuse_gate_arguments(
    density: Densities, droprate: Densities, choices: Mapping[str, str], rates: Mapping[str, float]
) -> None:
    """Refuse arguments that no model can make right.

    Args:
        density, droprate: the arguments of :class:`~sparse_callbacks.ConstrainedL0`.
        choices: the given word by argument, for each of :data:`CHOICES`.
        rates: the given number by argument, for learning rates and coefficients, which are not negative.

    Raises:
        ValueError: an argument is out of range, or two do not go together.
    """
    refuse_unknown(choices, CHOICES)
    refuse_outside(density, "density", LEAST, 1.0, WHY_LEAST)
    # new weights grow by 1 / (1 - droprate), and log_alpha is log((1 - droprate) / droprate): neither end is possible
    refuse_outside(droprate, "droprate", 0.01, 0.99)
    for name, rate in rates.items():
        refuse_outside(rate, name, 0.0, math.inf)
    if isinstance(density, Mapping) and choices["constraint"] == "model":
        raise ValueError(
            f"density={density!r} has a target for each layer. Use constraint='layer', or one number for the model."
        )
