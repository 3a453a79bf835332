"""What scores the units of channel groups: the interface of a criterion, and the criteria by name."""

from collections.abc import Callable, Iterable, MutableMapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.module_sizes import is_layer
from sparse_callbacks.core.calibration import Loss
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.host import Host
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.step import Step
from sparse_callbacks.methods.channels.score_windows import key_parameter


@dataclass(frozen=True)
class ScoredNetwork:
    """What a criterion may read of the network that it scores.

    Attributes:
        method: name of the method, for errors.
        model: the model of the run.
        groups: the groups whose units are scored.
        live: the units that each group keeps, bool [size].
        norm_behind: the batch norm that takes the output of a layer unchanged, by the layer's name; empty for a criterion
            that does not need it.
        optimizer_of: index of the optimizer that steps the consumers of each group.
        owners: the optimizers of the run.
        host: the training loop.
        aux: tensors that survive a resume; a key ends in the name of a parameter on whose device it lies.
        saved: the run that this one goes on from, until training has begun.
        generator: a function of a name and a number that gives a random generator, the same on every rank and resume.
        penalty, batches, loss: the method's arguments of these names.
    """

    method: str
    model: nn.Module
    groups: Sequence[Group]
    live: Sequence[Tensor]
    norm_behind: dict[str, str]
    optimizer_of: Sequence[int]
    owners: Ownership
    host: Host
    aux: MutableMapping[str, Tensor]
    saved: SavedRun | None
    generator: Callable[[str, int], torch.Generator]
    penalty: float
    batches: int | Iterable[Any]
    loss: Loss | None

    def device_of(self, group: Group) -> torch.device:
        """The device that the scores of a group lie on."""
        return self.model.get_parameter(key_parameter(group)).device


class Criterion:
    """Scores the units of channel groups; the larger a score, the more important the unit.

    What must survive a resume lies in the network's ``aux`` and moves in :meth:`after_step` and :meth:`after_update`
    alone: a GradScaler may skip an announced step.
    """

    needs_steps: ClassVar[bool] = False
    """It scores by the gradients of training steps, so there are no scores before the first one."""
    needs_norms: ClassVar[bool] = False
    """It reads the network's ``norm_behind``, which costs a pass through the model."""
    one_shot: ClassVar[bool] = False
    """It prunes once: ``start`` and ``stop`` are the same."""
    rankings: ClassVar[Sequence[str]] = ("knapsack", "global", "layer")
    """The rankings that its scores are good for."""
    why_rankings: ClassVar[str] = "whose scores say nothing across groups"
    """Why they are not good for others, as the end of a sentence."""
    arguments: ClassVar[Sequence[str]] = ()
    """Those of ``penalty``, ``batches`` and ``loss`` that it reads; others are refused."""
    needs_counts: ClassVar[bool] = False
    """Its scores are of sets of units, so it has to know how many of each group are kept; see :meth:`scores_for`."""

    def begin(self, network: ScoredNetwork) -> None:
        """Refuse before the first batch what this criterion cannot score, and make what it keeps in ``aux``.

        Args:
            network: the network, in which nothing was pruned yet where the run is new.

        Raises:
            ValueError: says which groups, and what to do.
        """

    def before_step(self, network: ScoredNetwork, step: Step, last: bool) -> None:
        """Gradients are reduced over ranks and unscaled, and not yet clipped.

        Args:
            network: the network.
            step: the optimizer step that is about to be taken.
            last: the last pruning is over, so no scores are needed any more.
        """

    def after_step(self, network: ScoredNetwork, step: Step) -> None:
        """The step was really taken."""

    def scores(self, network: ScoredNetwork, number: int) -> list[Tensor]:
        """Score of each unit of each group, [size] each; those of pruned units may be anything.

        Args:
            network: the network.
            number: the gradient steps taken.
        """
        raise NotImplementedError(f"{type(self).__name__} has no scores(): override it, and return one tensor a group.")

    def scores_for(
        self, network: ScoredNetwork, number: int, counts: Sequence[int], chunks: Sequence[int]
    ) -> list[Tensor]:
        """:meth:`scores` for a choice of which the counts are known; asked of a criterion that ``needs_counts``.

        Args:
            network: the network.
            number: the gradient steps taken.
            counts: the number of units that each group is going to keep.
            chunks: for each group the number of neighbouring units that go together.
        """
        return self.scores(network, number)

    def after_update(self, network: ScoredNetwork, groups: Sequence[int]) -> None:
        """The masks of the groups with these indices follow a new choice."""


CRITERIA: dict[str, type[Criterion]] = {}
"""The criteria by name."""

_Class = TypeVar("_Class", bound=type[Criterion])


def criterion(name: str) -> Callable[[_Class], _Class]:
    """Makes a class known under a name, as a decorator."""

    def register(cls: _Class) -> _Class:
        CRITERIA[name] = cls
        return cls

    return register


def unit_scores(entries: Tensor, member: Member, size: int) -> Tensor:
    """Sum of the entries of each unit in one member of its group, [size], signed.

    Args:
        entries: one number for each slice of the member.
        member: the member.
        size: number of units of the group.
    """
    units = member.units.to(entries.device)
    owned = units >= 0  # -1 marks slices that are channels of another group, or of none
    return torch.zeros(size, dtype=entries.dtype, device=entries.device).index_add(0, units[owned], entries[owned])


def unit_weights(model: nn.Module, group: Group) -> list[Member]:
    """The group's members in the weights that make its units: filters of its producers and depthwise convolutions.

    Biases, norms, buffers and single parameters that scale channels are not among them.
    """
    parameters = dict(model.named_parameters())
    filters = [m for m in group.producers if m.parameter in parameters and parameters[m.parameter].ndim > 1]
    return [*filters, *(f for f in group.followers if is_layer(model.get_submodule(f.module)))]
