"""What constrained L0 leaves of a network: units whose median gates are open."""

from typing import Any

from sparse_callbacks.channels.slim import slimmable_groups
from sparse_callbacks.channels.units_left import flops_network, live_units, shapes_of, without_units
from sparse_callbacks.core.units_left import UnitsLeft, bar_figures, units_left
from sparse_callbacks.methods.l0.l0 import ConstrainedL0


@units_left.register
def _(method: ConstrainedL0, example_input: Any = None) -> UnitsLeft | None:
    # a run finds no groups of its own, and gates of single weights leave no units out
    if method.unit != "channel" or example_input is None or not method.masks:
        return None
    groups = [group for group in slimmable_groups(method.model, example_input) if not group.reason]
    masks = method.masks
    live = [live_units(group, masks) for group in groups]
    left = without_units(shapes_of(method.model), groups, live, flops_network(method.model, example_input, groups))
    # inputs of the network have gates too, and stay when units are removed
    read = {member.parameter for group in groups for member in group.consumers}
    for name in method.gated.members:
        if masks[name].ndim == 2 and name not in read:
            left.units[f"inputs of {name.rpartition('.')[0]}"] = (int(masks[name].any(0).sum()), masks[name].shape[1])
    return left


@bar_figures.register
def _(method: ConstrainedL0) -> dict[str, float]:
    # gates of single weights are the zeros that the sparsity counts, and before the first fit there are none
    shown = method.unit == "channel" and method.aux
    return {"l0/expected/total": method.expected_left()} if shown else {}
