"""The figures of a row: the network as it is now, what it costs, and what its topology has become."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn
from torch.optim import Optimizer

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.record.account import SampleCost
from sparse_callbacks.core.record.byte_counts import byte_counts
from sparse_callbacks.core.record.chains import chain_figures
from sparse_callbacks.core.record.topology_statistics import TopologyHistory
from sparse_callbacks.core.sparsity import joint_sparsity


@dataclass(frozen=True)
class Snapshot:
    """The network at one time.

    Attributes:
        active: active weights by parameter name, of the sparse ones.
        figures: sparsity, the methods' own figures, and bytes.
        topology: figures of the whole topology; empty where nobody has looked.
        layers: those of each sparse layer.
    """

    active: Mapping[str, int]
    figures: Mapping[str, float]
    topology: Mapping[str, float | None] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def has_paths(self) -> bool:
        """The paths through a chain were followed."""
        return "topology/paths" in self.topology


def snapshot(
    model: nn.Module,
    methods: Sequence[Method],
    optimizers: Sequence[Optimizer],
    history: TopologyHistory | None,
    step: int,
) -> Snapshot:
    """The network as it is.

    Args:
        model: the model.
        methods: the methods of the run; none for a dense one.
        optimizers: its optimizers.
        history: the looks at the masks before, which one is added to; None where nobody looks.
        step: optimizer steps taken.
    """
    active = {name: count for method in methods for name, count in method.weights.active_counts.items()}
    figures: dict[str, float] = {"sparsity/total": 0.0, "sparsity/model": 0.0}
    for method in methods:
        figures |= method.figures()
    if methods:
        figures |= joint_sparsity([m.weights for m in methods], sum(e.size for e in methods[0].entries))
    figures |= byte_counts(model, optimizers, methods)
    if history is None or not methods:
        return Snapshot(active, figures)
    topology, layers = history.look(step, [method.weights for method in methods])
    return Snapshot(active, figures, topology, layers)


def without_dead_units(found: Snapshot) -> Snapshot:
    """The snapshot without the number of dead units of the whole network.

    Of a chain dead units are those between its layers. Where its paths were not followed, the number in the snapshot has the
    other meaning, of networks that are no chain.
    """
    return replace(found, topology={k: v for k, v in found.topology.items() if k != "topology/dead_units"})


def with_paths(found: Snapshot, model: nn.Module, methods: Sequence[Method], chain: Sequence[str]) -> Snapshot:
    """A snapshot of the present masks, with the figures of the paths through a chain.

    Args:
        found: the snapshot.
        model: the model.
        methods: the methods of the run.
        chain: names of the layers of the chain from input to output; empty where the network is none.
    """
    if not chain or not found.topology:
        return found
    paths, off = chain_figures(chain, [method.weights for method in methods], model)
    layers = {name: {**figures, **off.get(name, {})} for name, figures in found.layers.items()}
    return replace(found, topology={**found.topology, **paths}, layers=layers)


def inference_figures(forward: SampleCost) -> dict[str, int]:
    """FLOPs of one forward pass for one sample; a multiply-add is two."""
    return {
        "flops/inference": 2 * forward.whole,
        "flops/inference_dense": 2 * forward.whole_dense,
        "flops/inference_sparse_layers": 2 * forward.sparse,
        "flops/inference_sparse_layers_dense": 2 * forward.sparse_dense,
    }


def numbers_of(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Metrics that were logged, as numbers; what is not one is left out."""
    found = {}
    for name, value in metrics.items():
        try:
            found[str(name)] = float(value)
        except (TypeError, ValueError, RuntimeError):  # text, or a tensor of several numbers
            continue
    return found
