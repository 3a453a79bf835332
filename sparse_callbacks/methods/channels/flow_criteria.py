"""CroP and GraSP of channels: how a gate of one on a unit, which need not exist, changes ||g||^2."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.core.scores import Losses, gradient_flow
from sparse_callbacks.methods.channels.calibrated_criteria import calibration_of
from sparse_callbacks.methods.channels.criteria import Criterion, ScoredNetwork, criterion, unit_scores


def flow_of_slices(weight: Tensor, gradient: Tensor, product: Tensor, dim: int) -> Tensor:
    """Half the derivative of \\|\\|g\\|\\|^2 by a gate of one on each input of a layer, [slices].

    Behind a gate c the weight is c * weight, and the gradient by the weight itself c times that by this product. So it is
    the sum of weight * product + gradient^2 over the slice.

    Args:
        weight, gradient: the layer's weight and the gradient g of the loss by it.
        product: of the same shape, the part of H g that belongs to the weight.
        dim: the dimension along which the inputs lie.
    """
    entries = weight.detach().to(product) * product + gradient.to(product).square()
    return entries.movedim(dim, 0).flatten(1).sum(1)


def gate_flow(model: nn.Module, groups: Sequence[Group], live: Sequence[Tensor], losses: Losses) -> list[Tensor]:
    """Half the derivative of \\|\\|g\\|\\|^2 by a gate of one on each unit of each group, [size] each, float32 at least.

    g is the gradient of the mean loss over all samples by every trained weight of two dimensions or more, and not by the
    gates. A gate stands before the layers that read the unit, behind any norm and activation: what it multiplies is what the
    mask of the unit takes away. For activations with a(c x) = c a(x), c > 0, one at the producer without a norm is the same.

    Args:
        model: the network.
        groups: the groups.
        live: for each group the units that there are still, bool [size]; the others have gates of zero.
        losses: see :data:`~sparse_callbacks.core.scores.Losses`.

    Raises:
        ValueError: the loss does not depend on what a group's consumers read.
    """
    weights = {n: p for n, p in model.named_parameters() if p.ndim > 1 and p.requires_grad and p.is_floating_point()}
    gradients, products = gradient_flow(losses, weights, _masks(model, groups, live))
    found = []
    for group in groups:
        parts = [(c, c.parameter) for c in group.consumers if c.parameter in products]
        if not parts:
            raise ValueError(
                f"the loss of the calibration batches does not depend on the layers that read {group.name}, so its channels have "
                "no score. Leave the layer out with exclude=, or give a criterion of weights, such as 'l1'."
            )
        flows = [
            unit_scores(
                flow_of_slices(model.get_parameter(name), gradients[name], products[name], c.dim), c, group.size
            )
            for c, name in parts
        ]
        found.append(torch.stack([f.to(flows[0]) for f in flows]).sum(0))
    return found


def _masks(model: nn.Module, groups: Sequence[Group], live: Sequence[Tensor]) -> dict[str, Tensor]:
    """Masks of the weights that read pruned units: their gradients are zero behind a gate of zero."""
    found: dict[str, Tensor] = {}
    for group, alive in zip(groups, live, strict=True):
        for name, mask in group.masks(model, alive).items():
            mask = mask.to(model.get_parameter(name).device)
            found[name] = found[name] & mask if name in found else mask
    return found


class FlowThroughGates(Criterion):
    """Gates on the units, and what they do to the flow of gradients; a subclass says which units are good for it."""

    arguments: ClassVar[Sequence[str]] = ("batches", "loss")

    def begin(self, network: ScoredNetwork) -> None:
        self._of_batches(network, 1)  # fails now where it would fail at the first pruning

    def scores(self, network: ScoredNetwork, number: int) -> list[Tensor]:
        return self._of_batches(network, None)

    def _of_batches(self, network: ScoredNetwork, limit: int | None) -> list[Tensor]:
        calibration = calibration_of(network)
        return gate_flow(network.model, network.groups, network.live, lambda order: calibration.losses(order, limit))


@criterion("crop")
class CroP(FlowThroughGates):
    """|dz/dgate| of each unit with z = <g, g(gates)>, half the derivative of ||g||^2 (Rachwan, Zuegner, Charpentier, Geisler,
    Ayle, Guennemann: Winning the Lottery Ahead of Time: Efficient Early Network Pruning. ICML 2022)."""

    def _of_batches(self, network: ScoredNetwork, limit: int | None) -> list[Tensor]:
        return [flow.abs() for flow in super()._of_batches(network, limit)]


@criterion("grasp")
class GraSP(FlowThroughGates):
    """dz/dgate of each unit, signed: removed are the units with the largest -dz/dgate (Wang, Zhang, Grosse: Picking Winning
    Tickets Before Training by Preserving Gradient Flow. ICLR 2020)."""

    rankings: ClassVar[Sequence[str]] = ("global", "layer")
    why_rankings: ClassVar[str] = "whose scores may be negative, so that a knapsack would leave part of the budget"
