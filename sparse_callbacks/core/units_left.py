"""What is left of a network that loses whole units.

Its masks have fewer zeros than removing the units takes weights away, so that its sparsity says little.
"""

from dataclasses import dataclass
from functools import singledispatch
from typing import Any

from sparse_callbacks.core.method import Method


@dataclass(frozen=True)
class UnitsLeft:
    """A network whose pruned units are removed, beside the dense one.

    Attributes:
        parameters, dense_parameters: number of all parameters.
        flops, dense_flops: FLOPs of a forward pass for one sample; a multiply-add is two.
        units: for each group of units its name and how many of how many are kept. A unit is a channel, a neuron or a head.
    """

    parameters: int
    dense_parameters: int
    flops: float
    dense_flops: float
    units: dict[str, tuple[int, int]]

    @property
    def shares(self) -> dict[str, float]:
        """Parameters and FLOPs as shares of the dense network's."""
        # a model without matrix products has no FLOPs
        flops = self.flops / self.dense_flops if self.dense_flops else 1.0
        return {"parameters": self.parameters / self.dense_parameters, "flops": flops}


@singledispatch
def units_left(method: Method, example_input: Any = None) -> UnitsLeft | None:
    """What is left of the network of a method's latest run without its pruned units; None for a method of single weights, and
    where it is not known.

    Args:
        method: the method, in a run or after it.
        example_input: inputs of one sample, as the model's forward takes them, for methods that find groups of units only
            where somebody asks; None: those know nothing.
    """
    return None


@singledispatch
def bar_figures(method: Method) -> dict[str, float]:
    """Figures for a progress bar in the place of the sparsity, by their full names; empty where the sparsity says it."""
    return {}
