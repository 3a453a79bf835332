"""Criteria that read weights alone, or nothing: norms of filters, gains of batch norms, and chance."""

from collections.abc import Callable, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.module_sizes import BATCH_NORMS
from sparse_callbacks.core.largest import widened
from sparse_callbacks.core.optimizers import parameter_ids
from sparse_callbacks.core.step import Step
from sparse_callbacks.methods.channels.criteria import Criterion, ScoredNetwork, criterion, unit_scores, unit_weights


def filter_norms(weight: Tensor, dim: int, order: int) -> Tensor:
    """The norm of each filter of a layer, float32 at least, [filters].

    Args:
        weight: the weight of the layer.
        dim: the dimension along which its outputs lie.
        order: 1 for the sum of absolute weights, 2 for the root of their squares.

    Example:
        >>> filter_norms(torch.tensor([[1.0, -1.0, 0.0, 2.0], [0.5, 0.5, 0.5, -0.5]]), 0, 1).tolist()
        [4.0, 2.0]
    """
    rows = weight.detach().to(widened(weight.dtype)).movedim(dim, 0).flatten(1)
    norms: Tensor = torch.linalg.vector_norm(rows, order, dim=1)
    return norms


class FilterNorm(Criterion):
    """Norms of the filters that make a unit, summed over its producers and depthwise convolutions."""

    order = 1

    def scores(self, network: ScoredNetwork, number: int) -> list[Tensor]:
        return [_summed(network, g, unit_weights(network.model, g), self._norms) for g in network.groups]

    def _norms(self, weight: Tensor, member: Member) -> Tensor:
        return filter_norms(weight, member.dim, self.order)


@criterion("l1")
class L1Norm(FilterNorm):
    """The sum of a filter's absolute weights (Li, Kadav, Durdanovic, Samet, Graf: Pruning Filters for Efficient
    ConvNets. ICLR 2017)."""


@criterion("l2")
class L2Norm(FilterNorm):
    """The root of the sum of a filter's squared weights."""

    order = 2


@criterion("random")
class RandomScores(Criterion):
    """Numbers drawn from (seed, step, group): what a criterion has to be better than."""

    def scores(self, network: ScoredNetwork, number: int) -> list[Tensor]:
        return [
            torch.rand(g.size, generator=network.generator(g.name, number)).to(network.device_of(g))
            for g in network.groups
        ]


@criterion("bn_gain")
class NormGain(Criterion):
    """|gain| of the batch norms that take a unit, summed (Liu, Li, Shen, Huang, Yan, Zhang: Learning Efficient
    Convolutional Networks through Network Slimming. ICCV 2017).

    Until the last pruning ``penalty * sign(gain)`` joins the gradient of each gain, before gradients are clipped.
    """

    arguments: ClassVar[Sequence[str]] = ("penalty",)

    def begin(self, network: ScoredNetwork) -> None:
        if without := [g for g in network.groups if not _gains(network, g)]:
            left_out = list(dict.fromkeys(_name_for_exclude(network, g) for g in without))
            raise ValueError(
                f"criterion='bn_gain' scores channels by the gains of their batch norms, and the outputs of "
                f"{', '.join(g.name for g in without)} pass through none that has any. Leave these layers out with "
                f"exclude={left_out}, or give another criterion, such as 'l1'."
            )
        idle = [n for n, names in enumerate(network.owners.owns) if not names]
        ids = parameter_ids(*(network.owners.optimizers[n] for n in idle))
        gains = [m.parameter for g in network.groups for m in _gains(network, g)]
        if network.penalty and (
            alone := [n for n in dict.fromkeys(gains) if id(network.model.get_parameter(n)) in ids]
        ):
            raise ValueError(
                f"criterion='bn_gain' adds its penalty to the gradients of {', '.join(alone)}, which are in an optimizer "
                "without any weight that may be pruned, so its steps are not followed. Put them into the optimizer of "
                "their layers, or give penalty=0."
            )

    def before_step(self, network: ScoredNetwork, step: Step, last: bool) -> None:
        if last or not network.penalty:
            return
        ids = parameter_ids(step.optimizer)
        # each once: a norm behind a concatenation is in several groups
        for name in dict.fromkeys(m.parameter for g in network.groups for m in _gains(network, g)):
            gain = network.model.get_parameter(name)
            if gain.grad is not None and id(gain) in ids:
                gain.grad.add_(gain.detach().sign(), alpha=network.penalty)

    def scores(self, network: ScoredNetwork, number: int) -> list[Tensor]:
        return [_summed(network, g, _gains(network, g), _sizes) for g in network.groups]


def _name_for_exclude(network: ScoredNetwork, group: Group) -> str:
    """A parameter that ``exclude`` takes, with which the group's channels stay: of a producer, where one can be sparse."""
    sparse = {name for names in network.owners.owns for name in names}
    return next(m.parameter for m in (*group.producers, *group.consumers) if m.parameter in sparse)


def _gains(network: ScoredNetwork, group: Group) -> list[Member]:
    """The group's members in the gains of batch norms."""
    modules = ((f, network.model.get_submodule(f.module)) for f in group.followers)
    return [f for f, module in modules if isinstance(module, BATCH_NORMS) and module.affine]


def _sizes(gain: Tensor, member: Member) -> Tensor:
    return gain.detach().to(widened(gain.dtype)).abs()


def _summed(
    network: ScoredNetwork, group: Group, members: Sequence[Member], numbers: Callable[[Tensor, Member], Tensor]
) -> Tensor:
    """Sum over ``members`` of what ``numbers`` gives for each of their slices, by unit."""
    parts = [
        unit_scores(numbers(network.model.get_parameter(m.parameter), m), m, group.size).to(network.device_of(group))
        for m in members
    ]
    return torch.stack(parts).sum(0)
