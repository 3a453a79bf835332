"""Budgets of channel methods: which cost they count, whether they can be met, and what is up for removal."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.channels import costs
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.latency.table import Table
from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.methods.smcp import allocation

SAME = 0.01  # relative, below which two sums of times are of one model
COSTS: dict[str, costs.LayerCost] = {"parameters": costs.parameters, "flops": costs.multiply_adds}


def unit(cost: str) -> str:
    """What a budget is a share of, in words."""
    return cost if cost in COSTS else f"latency in {cost}"


def priced(
    model: nn.Module, example: Any, layers: Mapping[str, costs.Layer], groups: Sequence[Group], cost: str, tell: Callable[[str], None]
) -> Network:
    """The cost of the network by the units of its groups, with everything in it that no group makes cheaper.

    Args:
        model, example: one sample, and the model that takes it.
        layers: of the model.
        groups: whose units can go.
        cost: ``"parameters"``, ``"flops"`` or the path of a latency table.
        tell: takes what a user should know of the table.

    Raises:
        ValueError: no table, or one of another model or input.
    """
    if cost in COSTS:
        other = costs.cost_outside_layers(model, example, layers)
        constant = other.parameters if cost == "parameters" else other.multiply_adds
        return Network(layers, groups, COSTS[cost], constant)
    table = Table.load(cost)
    for warning in table.doubts(tuple(tensors_in(example)[0].shape[1:])):
        tell(warning)
    network = Network(layers, groups, table, table.constant)
    measured = float(table.about.get("model_ms_by_table", network.dense))
    if abs(network.dense / measured - 1) > SAME:
        raise ValueError(
            f"cost={cost} is the table of another model: {table.about.get('model')} comes to {measured:.4g} ms by it, and this one to "
            f"{network.dense:.4g} ms. Measure this model: python -m sparse_callbacks.latency MODEL --batch N --input C H W --out FILE."
        )
    return network


def refuse(
    budget: float, cost: str, network: Network, groups: Sequence[Group], options: Sequence[Tensor], chunk: int, stem: str | None
) -> None:
    """Refuse a budget that no choice of options meets, and chunks that divide no group.

    Args:
        budget: share of the dense cost.
        cost: its name.
        network, groups, options: what can be chosen.
        chunk: neighbours that go together.
        stem: name of a layer whose outputs stay, and need not.

    Raises:
        ValueError: with the smallest cost that can be met.
    """
    if bad := [f"{g.name} ({g.size})" for g in groups if g.size % chunk]:
        raise ValueError(
            f"chunk={chunk} does not divide the units of {', '.join(bad)}. Give a chunk that divides all of them, such as 1, or leave "
            "these layers out with exclude=."
        )
    dense, least = network.dense, allocation.smallest(network, options)
    if least > budget * dense:
        share = math.ceil(1e4 * least / dense) / 1e4
        advice = [f"budget={share:g} or more"] if share < 1 else []
        advice.append("a smaller round_to= or chunk=" if chunk > 1 else "a smaller round_to=")
        advice += [f"prune_stem=True (the outputs of {stem} stay now)"] if stem is not None else []
        raise ValueError(
            f"budget={budget:g} of the {unit(cost)} cannot be met: with the fewest channels that may stay the network costs {least:.6g} of "
            f"{dense:.6g}. Give {', or '.join(advice)}."
        )


def overview(groups: Sequence[Group], options: Sequence[Tensor], left_out: Mapping[str, str], network: Network, cost: str) -> str:
    """A table of what can be removed, and why the rest stays, to read before training."""
    least = allocation.smallest(network, options) / network.dense
    head = f"{'channels of':30}{'units':>7}  may keep"
    rows = [f"{g.name:30}{g.size:7}  {_range(o)}" for g, o in zip(groups, options, strict=True)]
    rows += [f"{name:30}{'stay':>7}  {why}" for name, why in left_out.items()]
    rows.append(f"With the fewest channels {least:.4f} of the {unit(cost)} are left.")
    if isinstance(network.cost, Table):
        network.tables(options, network.sizes)
        rows.append(f"{network.cost.lookup_report()}.")
    return "\n".join([head, *rows])


def _range(options: Tensor) -> str:
    sizes = options.tolist()
    return f"{sizes[0]}, {sizes[1]}, ... {sizes[-1]}" if len(sizes) > 3 else ", ".join(map(str, sizes))
