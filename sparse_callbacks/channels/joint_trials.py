"""Trials of channel groups, several at a time where that shows what each of them alone would.

A group is tried by masking some of its units and then removing them, which must change nothing. With many groups masked,
less of a signal gets through the network, so an error might no longer show; and two errors might cancel. So in a joint
trial

- each group loses between a quarter and a half of its units, every one another share, so that factors that depend on the
  number of channels do not cancel;
- outputs, and those of the layers that read the groups, must still tell two inputs apart, at least :data:`ALIVE` times as
  well as in the whole model;
- differences count from :data:`JOINT_TOLERANCE` of the usual tolerance on.

A third of the signal and a third of the effect of losing half of the units leave a ninth of the error, so what is found by
one group at a time is found here. Where a joint trial does not pass, each half of the groups is tried by itself.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.channels.comparison import TOLERANCES, Reference, compare, outputs_on
from sparse_callbacks.channels.comparison_inputs import another_sample
from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.groups import Group

TRIED_TOGETHER = 8
"""The most groups of a joint trial."""
ALIVE = 1 / 3
"""The share of the difference between two inputs that has to be left."""
JOINT_TOLERANCE = 0.1
"""Tolerance of a joint trial, in tolerances of a single one."""
_JOINT_TOLERANCES = {t: JOINT_TOLERANCE * limit for t, limit in TOLERANCES.items()}


def reasons_to_stay(
    model: nn.Module, groups: Sequence[Group], example_input: Any, branches: Sequence[str]
) -> list[str]:
    """For each group how the outputs change when units of it are removed; empty where they do not.

    Args:
        model: in the state of :func:`~sparse_callbacks.core.inspection.quiet`; at the end it is as before.
        groups: groups without a reason.
        example_input: the input to compare on.
        branches: see :class:`~sparse_callbacks.channels.comparison.Reference`. Where there are any, every group is
            tried by itself, as nothing is known of the signal in them.
    """
    if not groups:
        return []
    trials = _GroupTrials(model, groups, example_input, branches)
    return [r for batch in _batches(groups, trials.together) for r in trials.reasons(batch)]


class _GroupTrials:
    def __init__(self, model: nn.Module, groups: Sequence[Group], example_input: Any, branches: Sequence[str]) -> None:
        self._surgery, self._example, self._branches = Surgery(model), example_input, branches
        self._readers = list(dict.fromkeys(m.module for g in groups for m in g.consumers))
        self._is_unsteady = False  # in the latest trial the outputs differed whatever is cut
        self._other: Any = None
        self._whole: list[float] = []
        if branches or len(groups) == 1:
            return
        usual = outputs_on(model, [example_input])
        if not any(t.dtype in TOLERANCES for t in usual) or any(t.is_complex() for t in usual):
            return
        self._other = another_sample(model, example_input, usual)
        if self._other is not None:
            self._whole = self._signal(self._seen(self._example)[0])

    @property
    def together(self) -> int:
        """How many groups can be tried at a time."""
        return TRIED_TOGETHER if any(s > 0 for s in self._whole) else 1

    def reasons(self, groups: Sequence[Group]) -> list[str]:
        """How the outputs change with each of ``groups``."""
        if len(groups) == 1:
            return [self._why_changed(groups, [_every_other(groups[0])])]
        problem = self._why_changed(groups, _shares(groups))
        if not problem or self._is_unsteady:
            return [problem] * len(groups)
        middle = len(groups) // 2
        return [r for half in (groups[:middle], groups[middle:]) for r in self.reasons(half)]

    def _why_changed(self, groups: Sequence[Group], keeps: Sequence[Tensor]) -> str:
        """How the outputs change when all units that are not in ``keeps`` are removed, or why nothing would show."""
        cuts, consumers, self._is_unsteady = Cuts(), [m for g in groups for m in g.consumers], False
        try:
            # first masked only, since removing channels must change nothing in a model that does not read them
            for group, keep in zip(groups, keeps, strict=True):
                for member in group.consumers:
                    self._surgery.mask(member, keep)
                cuts = cuts.with_group(group, keep)
            self._surgery.cut(Cuts(), consumers)
            known: list[list[Tensor]] = []
            if len(groups) > 1:
                seen, outputs = self._seen(self._example)
                if not self._is_alive(seen):
                    return "too little of the signal is left with all of them masked"
                known = [outputs]
            tolerance = _JOINT_TOLERANCES if known else None
            reference = Reference(self._surgery.model, [self._example], self._branches, known, tolerance)
            self._surgery.cut(cuts, [m for g in groups for m in g.members])
            problem = reference.why_changed()
            self._is_unsteady = reference.is_unsteady
            return problem
        finally:
            self._surgery.restore()

    def _is_alive(self, seen: list[Tensor]) -> bool:
        left = self._signal(seen)
        return len(left) == len(self._whole) and all(
            b >= ALIVE * a for a, b in zip(self._whole, left, strict=True) if a > 0
        )

    def _signal(self, seen: list[Tensor]) -> list[float]:
        """How far what is seen on the example differs from that on another input, relative to its size."""
        other, _ = self._seen(self._other)
        if [t.shape for t in seen] != [t.shape for t in other]:
            return []
        return [compare([a], [b]).relative for a, b in zip(seen, other, strict=True)]

    def _seen(self, sample: Any) -> tuple[list[Tensor], list[Tensor]]:
        """The floating-point outputs of the layers that read the groups and of the model; and all outputs of the model."""
        model = self._surgery.model
        found: list[Tensor] = []

        def note(_: nn.Module, __: Any, output: Any) -> None:
            if isinstance(output, Tensor):
                found.append(output.clone())  # what follows may write into it

        hooks = [model.get_submodule(name).register_forward_hook(note) for name in self._readers if name]
        try:
            outputs = outputs_on(model, [sample])
        finally:
            for hook in hooks:
                hook.remove()
        return [t for t in (*found, *outputs) if t.is_floating_point()], outputs


def _every_other(group: Group) -> Tensor:
    return torch.arange(group.size) % 2 == 0


def _counts(size: int) -> range:
    """How many units a joint trial may take away from a group."""
    return range(max(1, size // 2), (size + 3) // 4 - 1, -1)


def _free(group: Group, taken: set[float]) -> int | None:
    """The largest number of units to take away from a group that is none of the shares ``taken``; None if there is none."""
    return next((c for c in _counts(group.size) if c / group.size not in taken), None)


def _batches(groups: Sequence[Group], together: int) -> list[list[Group]]:
    """Groups in their order, cut where a batch is full or a group would lose the same share of its units as another one."""
    batches: list[list[Group]] = []
    taken: set[float] = set()
    for group in groups:
        count = _free(group, taken)
        if not batches or count is None or len(batches[-1]) == together:
            batches.append([])
            taken, count = set(), _counts(group.size)[0]
        batches[-1].append(group)
        taken.add(count / group.size)
    return batches


def _shares(groups: Sequence[Group]) -> list[Tensor]:
    """The units that stay, bool [size] for each group; each loses another share of its units, spread at random."""
    generator = torch.Generator().manual_seed(0)
    taken: set[float] = set()
    keeps = []
    for group in groups:
        count = _free(group, taken) or 1
        taken.add(count / group.size)
        keeps.append(torch.randperm(group.size, generator=generator) >= count)
    return keeps
