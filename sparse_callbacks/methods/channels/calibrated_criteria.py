"""Criteria that take passes of their own over calibration batches: taylor_2017, sosp and ispasp."""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.core.calibration import Calibration
from sparse_callbacks.methods.channels.calibrated import sosp_scores, taylor_2017_scores
from sparse_callbacks.methods.channels.criteria import Criterion, ScoredNetwork, criterion
from sparse_callbacks.methods.channels.ispasp import Contributions, contributions, ispasp, why_not
from sparse_callbacks.methods.channels.weight_criteria import L1Norm


def calibration_of(network: ScoredNetwork) -> Calibration:
    """The loss on the calibration batches of a run, the same ones at every pruning."""
    seed = int(torch.randint(2**62, (), generator=network.generator("calibration", 0)))
    return network.host.calibration(network.batches, loss=network.loss, seed=seed)


@criterion("taylor_2017")
class FeatureMapTaylor(Criterion):
    """|mean over positions of activation * gradient| of each sample's feature map, as the layers behind read it, its mean
    over samples, divided by the layer's L2 norm (Molchanov, Tyree, Karras, Aila, Kautz: Pruning Convolutional Neural
    Networks for Resource Efficient Inference. ICLR 2017).

    Differs from the paper: a layer is a group, and products are summed over all layers that read a map. No term for FLOPs
    is subtracted, as ``cost`` counts them.
    """

    arguments: ClassVar[Sequence[str]] = ("batches", "loss")

    def begin(self, network: ScoredNetwork) -> None:
        self._of_batches(network, 1)  # fails now where it would fail at the first pruning

    def scores(self, network: ScoredNetwork, number: int) -> list[Tensor]:
        return self._of_batches(network, None)

    def _of_batches(self, network: ScoredNetwork, limit: int | None) -> list[Tensor]:
        with calibration_of(network).losses(1, limit) as losses:
            return taylor_2017_scores(network.model, network.groups, losses)


@criterion("sosp")
class HessianSaliency(Criterion):
    """|theta_s . g| + |theta_s . (H theta)_s| / 2 of each unit's weights theta_s, where theta holds the weights of all units
    (SOSP-H: Nonnenmacher, Pfeil, Steinwart, Reeb: SOSP: Efficiently Capturing Global Correlations by Second-Order Structured
    Pruning. ICLR 2022). One Hessian-vector product for each batch."""

    arguments: ClassVar[Sequence[str]] = ("batches", "loss")

    def begin(self, network: ScoredNetwork) -> None:
        self._of_batches(network, 1)

    def scores(self, network: ScoredNetwork, number: int) -> list[Tensor]:
        return self._of_batches(network, None)

    def _of_batches(self, network: ScoredNetwork, limit: int | None) -> list[Tensor]:
        with calibration_of(network).losses(2, limit) as losses:
            return sosp_scores(network.model, network.groups, network.live, losses)


@criterion("ispasp")
class GreedyReconstruction(Criterion):
    """The units that keep the output of the next layer closest to what it was, found by exchanges (Wolfe, Kyrillidis:
    i-SpaSP: Structured Neural Pruning via Sparse Signal Recovery. L4DC 2022).

    Groups that several layers make or read go by l1. Differs from the paper: the best set seen is taken and not the last
    one; weights are not trained between layers; outputs are those before a norm.
    """

    arguments: ClassVar[Sequence[str]] = ("batches", "loss")
    one_shot: ClassVar[bool] = True
    needs_counts: ClassVar[bool] = True
    rankings: ClassVar[Sequence[str]] = ("layer",)

    def begin(self, network: ScoredNetwork) -> None:
        others = {g.name: reason for g in network.groups if (reason := why_not(network.model, g))}
        if others:
            listed = "; ".join(f"{name} ({reason})" for name, reason in others.items())
            network.host.inform(
                f"criterion='ispasp' chooses among channels that one layer makes and one layer reads. By l1 go those of {listed}."
            )
        self._contributions(network, 1)

    def scores_for(
        self, network: ScoredNetwork, number: int, counts: Sequence[int], chunks: Sequence[int]
    ) -> list[Tensor]:
        found = self._contributions(network, None)
        by_norm = L1Norm().scores(network, number)
        return [
            set_scores(found[g.name], alive, count, chunk) if g.name in found else norm
            for g, alive, count, chunk, norm in zip(network.groups, network.live, counts, chunks, by_norm, strict=True)
        ]

    def _contributions(self, network: ScoredNetwork, limit: int | None) -> dict[str, Contributions]:
        fit: list[Group] = [g for g in network.groups if not why_not(network.model, g)]
        if not fit:
            return {}
        with calibration_of(network).losses(0, limit) as losses:
            found = contributions(network.model, fit, losses)
        return dict(zip((g.name for g in fit), found, strict=True))


def set_scores(units: Contributions, live: Tensor, count: int, chunk: int) -> Tensor:
    """Scores of which the ``count`` largest are the set that i-SpaSP finds, [size]; by activity among the others.

    Args:
        units: what the units contribute.
        live: bool [size], the units that there are still.
        count: the number of units to keep, a multiple of ``chunk``.
        chunk: the number of neighbouring units that go together.
    """
    alive = live.to(units.activity.device).view(-1, chunk).any(1).nonzero()[:, 0]
    blocks = (-1, chunk)
    size = len(live) // chunk
    together = Contributions(
        units.products.view(size, chunk, size, chunk).sum((1, 3))[alive][:, alive],
        units.pull.view(size, chunk, size, chunk).sum((1, 3))[alive][:, alive],
        units.activity.view(blocks).sum(1)[alive],
    )
    best = alive[ispasp(together, count // chunk)]
    # all of the set come before all others, whatever the activity
    scores = 0.5 * units.activity / units.activity.max().clamp(min=torch.finfo(units.activity.dtype).tiny)
    scores.view(blocks)[best] += 1.0
    return scores
