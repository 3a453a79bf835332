"""Layers that have almost no weights left, and chains of layers that no path leads through."""

from collections.abc import Sequence

from torch import nn

from sparse_callbacks.core.record.chains import links_of
from sparse_callbacks.core.shards import WHOLE, layout_of
from sparse_callbacks.core.weights import SparseWeights

FED = 0.1
"""Share of a layer's outputs that its active weights must be able to reach."""


def why_collapsing(weights: SparseWeights) -> str:
    """Which layers have so few active weights that most of their outputs are constant, as the beginning of a sentence; empty
    where none has.

    A layer is named with fewer active weights than a tenth of its outputs: then nine in ten read nothing, wherever the
    weights lie.

    Args:
        weights: the masks of a method.
    """
    counts = weights.active_counts
    found = []
    for name, entry in weights.entries.items():
        # biases under gates have no inputs, and a part of a shard says nothing of the whole
        if name not in counts or len(entry.shape) < 2 or layout_of(weights.params[name]) is not WHOLE:
            continue
        outputs = entry.shape[0] * entry.parts
        if counts[name] < FED * outputs:
            found.append(f"{name} ({counts[name]} for {outputs} outputs)")
    return f"few or no active weights are left in {', '.join(found)}" if found else ""


def why_no_path(names: Sequence[str], weights: Sequence[SparseWeights], model: nn.Module) -> str:
    """Where no path leads on through a chain of layers, as the beginning of a sentence; empty where one leads through.

    Args:
        names: names of the layers' weights, from input to output.
        weights: the masks of all methods of the run.
        model: the model, which knows the groups of convolutions.
    """
    reached = None
    for name, links in zip(names, links_of(names, weights, model), strict=True):
        reached = links.forward(
            links.read.new_ones(links.inputs).double() if reached is None else (reached > 0).double()
        )
        if not bool((reached > 0).any()):
            return f"no path leads from the inputs of the network through {name}"
    return ""
