"""Budget of a channel method: the cost that it counts, whether it can be met, and what may be removed."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.channels import costs
from sparse_callbacks.channels.attention_costs import projections
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.latency.table import Table
from sparse_callbacks.channels.network_cost import Network
from sparse_callbacks.core.inspection import tensors_in
from sparse_callbacks.methods.channels import allocation

TABLE_TOLERANCE = 0.01  # relative; larger differences between two sums of times are taken for two models
COSTS: dict[str, costs.LayerCost] = {"parameters": costs.parameters, "flops": costs.flops}
NAMES = {"parameters": "parameters", "flops": "FLOPs"}


def cost_name(cost: str) -> str:
    """The cost that a budget is a share of, in words."""
    return NAMES.get(cost, f"latency in {cost}")


def priced_network(
    model: nn.Module,
    example: Any,
    layers: Mapping[str, costs.Layer],
    groups: Sequence[Group],
    cost: str,
    warn: Callable[[str], None],
) -> Network:
    """The cost of the network by the units of its groups, with everything in it that no group makes cheaper.

    Args:
        model: the model.
        example: inputs of one sample, as the model's forward takes them.
        layers: layers of the model by name.
        groups: the groups whose units can go.
        cost: ``"parameters"``, ``"flops"`` or the path of a latency table.
        warn: called with each warning about the table.

    Raises:
        ValueError: there is no table, or the table is that of another model or input.
    """
    if cost in COSTS:
        # tables of latencies time modules that are called alone, and nothing calls the projections of torch's attention
        layers = {**layers, **projections(model, example)}
        # what no group makes cheaper is counted too, as the budget is a share of the whole network's cost
        other = costs.cost_outside_layers(model, example, layers)
        constant = other.parameters if cost == "parameters" else 2 * other.multiply_adds
        return Network(layers, groups, COSTS[cost], constant)
    table = Table.load(cost)
    # without the batch: a table is measured for a batch size of its own, and the example has one sample
    for warning in table.doubts(tuple(tensors_in(example)[0].shape[1:])):
        warn(warning)
    network = Network(layers, groups, table, table.constant)
    # the table says what the model that it was made for comes to by its entries; this model must come to the same
    measured = float(table.about.get("model_ms_by_table", network.dense))
    if abs(network.dense / measured - 1) > TABLE_TOLERANCE:
        raise ValueError(
            f"cost={cost} is the table of another model: {table.about.get('model')} comes to {measured:.4g} ms by it, "
            f"and this one to {network.dense:.4g} ms. Measure this model: python -m sparse_callbacks.latency MODEL "
            "--batch N --input C H W --out FILE."
        )
    return network


def refuse_budget(
    budget: float,
    cost: str,
    network: Network,
    groups: Sequence[Group],
    options: Sequence[Tensor],
    chunks: Sequence[int],
    stem: str | None,
    finer: Sequence[str],
) -> None:
    """Refuse a budget that no choice of options meets, and a chunk that does not divide every group.

    Args:
        budget: share of the dense cost.
        cost: name of the cost, as the user gave it.
        network: the network with its cost.
        groups: the groups whose units can go.
        options: numbers of units that each group may keep.
        chunks: for each group the number of neighbouring units that go together.
        stem: name of the first convolution if its outputs stay, and need not; None otherwise.
        finer: the arguments, such as ``"round_to="``, with which a smaller number would leave more options.

    Raises:
        ValueError: says the smallest cost that can be met.
    """
    # first, as the options of such a group are its full size alone, which would be blamed on the budget below
    undivided = [f"{g.name} ({g.size})" for g, chunk in zip(groups, chunks, strict=True) if g.size % chunk]
    chunk = max(chunks)  # what was given, but for groups whose units are several channels
    if undivided:
        raise ValueError(
            f"chunk={chunk} does not divide the units of {', '.join(undivided)}. Give a chunk that divides all of "
            "them, such as 1, or leave these layers out with exclude=."
        )
    dense, least = network.dense, allocation.smallest_cost(network, options)
    if least > budget * dense:
        advice = []
        share = math.ceil(1e4 * least / dense) / 1e4  # rounded up, so that the budget that is advised can be met
        if share < 1:
            advice.append(f"budget={share:g} or more")
        if finer:
            advice.append(f"a smaller {' or '.join(finer)}")
        if stem is not None:
            advice.append(f"prune_stem=True (the outputs of {stem} stay now)")
        raise ValueError(
            f"budget={budget:g} of the {cost_name(cost)} cannot be met: with the fewest channels that may stay the "
            f"network costs {least:.6g} of {dense:.6g}. "
            + (f"Give {', or '.join(advice)}." if advice else "Leave fewer layers out with exclude= or keep_dense=.")
        )


def overview(
    groups: Sequence[Group], options: Sequence[Tensor], reasons: Mapping[str, str], network: Network, cost: str
) -> str:
    """A table of what can be removed, and of the reasons why the rest stays, to read before training.

    Args:
        groups: the groups whose units can go.
        options: numbers of units that each group may keep.
        reasons: why the channels of other groups stay, by the group's name.
        network: the network with its cost.
        cost: name of the cost, as the user gave it.
    """
    least = allocation.smallest_cost(network, options) / network.dense
    head = f"{'channels of':30}{'units':>7}  may keep"
    rows = [f"{g.name:30}{g.size:7}  {_range(o)}" for g, o in zip(groups, options, strict=True)]
    rows += [f"{name:30}{'stay':>7}  {reason}" for name, reason in reasons.items()]
    rows.append(f"With the fewest channels {least:.4f} of the {cost_name(cost)} are left.")
    if isinstance(network.cost, Table):
        # computed for its effect: the table counts how each time that a solve will ask for was found
        network.tables(options, network.sizes)
        rows.append(f"{network.cost.lookup_report()}.")
    return "\n".join([head, *rows])


def _range(options: Tensor) -> str:
    sizes = options.tolist()
    return f"{sizes[0]}, {sizes[1]}, ... {sizes[-1]}" if len(sizes) > 3 else ", ".join(map(str, sizes))
