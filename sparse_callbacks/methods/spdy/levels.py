"""Sparsities that a layer may have under SPDY, and what each layer costs at each of them."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from sparse_callbacks.channels.costs import samples_in
from sparse_callbacks.channels.forward_flops import forward_flops
from sparse_callbacks.core.inspection import attention_in_steps, quiet, run, tensors_in
from sparse_callbacks.core.ops import zeros_for
from sparse_callbacks.core.record.first_batch import rows_by_weight
from sparse_callbacks.core.selection import Entry

LOWEST, HIGHEST, STEPS = 0.4, 0.99, 40  # published


def sparsity_grid(lowest: float = LOWEST, highest: float = HIGHEST, steps: int = STEPS) -> tuple[float, ...]:
    """Sparsities from ``lowest`` to ``highest``, ``steps + 1`` of them, whose densities fall by one factor (SPDY).

    >>> [round(s, 4) for s in sparsity_grid()[:4]]
    [0.4, 0.4584, 0.5111, 0.5586]
    """
    factor = ((1 - highest) / (1 - lowest)) ** (1 / steps)
    return (*(1 - (1 - lowest) * factor**i for i in range(steps)), highest)


LEVELS = (0.0, *sparsity_grid())
"""Sparsities that a layer may have: dense, then the published grid."""


@dataclass(frozen=True)
class LayerCosts:
    """What each layer costs at each of its levels.

    Attributes:
        levels: sparsities of each layer, ascending, the first one 0.
        costs: the cost at each of these, of the same lengths.
        others: the cost of what no level changes.
        what: the cost in words, as in "FLOPs".
    """

    levels: Mapping[str, Sequence[float]]
    costs: Mapping[str, Sequence[float]]
    others: float
    what: str

    @property
    def dense(self) -> float:
        """The cost with every layer dense."""
        return self.others + math.fsum(costs[0] for costs in self.costs.values())

    @property
    def least(self) -> float:
        """The smallest cost that any choice of levels has."""
        return self.others + math.fsum(min(costs) for costs in self.costs.values())

    def at(self, chosen: Mapping[str, int]) -> float:
        """The cost with these levels, the index of one by layer."""
        return self.others + math.fsum(costs[chosen[layer]] for layer, costs in self.costs.items())


def flop_costs(model: nn.Module, example_input: Any, entries: Sequence[Entry]) -> LayerCosts:
    """FLOPs of each layer for one sample at each of :data:`LEVELS`: two for each active weight and position it is used at.

    ``others`` holds what :func:`~sparse_callbacks.channels.forward_flops.forward_flops` counts besides the selected
    layers: layers that stay dense, and the products of attention.

    Args:
        model: the model; it runs in eval mode and is left as it was.
        example_input: a tensor, a tuple of positional or a mapping of named arguments; costs are those of one sample.
        entries: all parameters of the model; those without a reason are selected.

    Raises:
        ValueError: the forward pass does not use a selected layer.
    """
    samples = samples_in(example_input)
    rows = rows_in_use(model, example_input)
    selected = [e for e in entries if not e.reason]
    if idle := [e.name for e in selected if not rows.get(e.name)]:
        raise ValueError(
            f'cost="flops": a forward pass of {type(model).__name__} in eval mode does not call the layers of '
            f"{', '.join(idle)}, so their sparsity saves nothing. Leave them out with exclude=."
        )
    costs: dict[str, list[float]] = {}
    for entry in selected:
        size = entry.size // entry.parts
        flops = [2 * rows[entry.name] * (size - zeros_for(s, size)) / samples for s in LEVELS]
        costs |= dict.fromkeys(entry.layers, flops)
    with quiet(model):
        total = forward_flops(model, example_input) / samples
    in_layers = math.fsum(flops[0] for flops in costs.values())
    # not below 0 where torch does not count an operation that a layer is made of
    return LayerCosts(dict.fromkeys(costs, LEVELS), costs, max(0.0, total - in_layers), "FLOPs")


def rows_in_use(model: nn.Module, example_input: Any) -> dict[str, int]:
    """At how many positions of the whole input a forward pass in eval mode uses each weight, by parameter name."""
    found: dict[str, int] = {}

    def add(call: LayerUse) -> None:
        for name, rows in call.rows.items():
            found[name] = found.get(name, 0) + rows

    watch_uses(model, example_input, add)
    return found


class LayerUse(NamedTuple):
    """One call of a layer in a forward pass.

    Attributes:
        module: the layer.
        args, kwargs: what it was called with.
        rows: at how many positions the call uses each weight, by parameter name.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    rows: dict[str, int]


def watch_uses(model: nn.Module, example_input: Any, tell: Callable[[LayerUse], object]) -> None:
    """Run a forward pass in eval mode, and ``tell`` of each call of a layer whose weights are multiplied."""
    names = {id(p): name for name, p in model.named_parameters()}

    def called(find: Any, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        rows = {}
        for local, count in find(module, args, kwargs, tensors_in(output)).items():
            holder, _, own = local.rpartition(".")
            parameter = module.get_submodule(holder)._parameters.get(own)
            if parameter is not None and (name := names.get(id(parameter))) is not None:
                rows[name] = count
        tell(LayerUse(module, args, kwargs, rows))

    with ExitStack() as stack, quiet(model), attention_in_steps():
        for module in model.modules():
            if (find := rows_by_weight(module)) is not None:
                stack.enter_context(module.register_forward_hook(partial(called, find), with_kwargs=True))
        run(model, example_input)
