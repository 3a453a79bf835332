"""Cuts the dead units of many groups at once, and finds the groups that change the outputs."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sparse_callbacks.channels.comparison import Reference
from sparse_callbacks.channels.constant_propagation.other_sizes import other_sizes
from sparse_callbacks.channels.constant_propagation.propagation import ArrivingConstants, arriving_constants
from sparse_callbacks.channels.cuts import Cuts, Surgery
from sparse_callbacks.channels.dead_units import with_dead_units
from sparse_callbacks.channels.groups import Group
from sparse_callbacks.channels.proof import GroupChange


class Trials:
    """What of the dead units can go, group after group from the outputs to the inputs.

    A group is put back where the outputs differ with it, all that was accepted before it being cut. One pass a group
    would find that. But most groups are right, so they are cut together and compared once; where the outputs differ, each
    half is tried by itself. What is found is the same as long as a wrong group shows whatever is cut with it; where
    two groups are right only together, both go.

    Args:
        groups: all groups, in the model's order.
        surgery: holds the masked model, in the state of :func:`~sparse_callbacks.core.inspection.quiet`.
        masks: see :class:`~sparse_callbacks.channels.masked_model.Masked`.
        samples: inputs that the model runs on; the last but one is random, with standard deviation 1.

    Attributes:
        cuts: what is cut.
    """

    def __init__(
        self, groups: Sequence[Group], surgery: Surgery, masks: Mapping[str, Tensor], samples: Sequence[Any]
    ) -> None:
        # the last group first: once its channels are gone, the weights that made them no longer read earlier channels
        self.groups, self.surgery, self.masks, self.samples = list(groups)[::-1], surgery, masks, samples
        self.cuts = Cuts()
        self.has_refused = False
        """Whether some group was put back."""
        self._rows: list[GroupChange] = []
        self._arriving: dict[str, ArrivingConstants] | None = None

    @property
    def rows(self) -> list[GroupChange]:
        """What became of each group, in the model's order."""
        return self._rows[::-1]

    def cut_all(self, reference: Reference) -> str:
        """Cut all dead units, from the model without cuts on.

        Returns:
            how the outputs change; empty where they do not.
        """
        self._begin()
        rows, cuts = self._planned(len(self.groups), self.cuts)
        changing = [group for group, row in zip(self.groups, rows, strict=True) if row.units]
        self.surgery.cut(cuts, [m for group in changing for m in group.members])
        self._rows, self.cuts = rows, cuts
        return reference.why_changed() if changing else ""

    def cut(self, reference: Reference, problem: str = "") -> None:
        """Cut all that leaves the outputs as they are in ``reference``, from the model without cuts on.

        Args:
            reference: the outputs to keep.
            problem: how they change when all dead units are cut, where that is known.
        """
        self._begin()
        self._settle(len(self.groups), reference, problem)

    def _begin(self) -> None:
        self.surgery.restore()
        self.cuts, self._rows, self.has_refused = Cuts(), [], False

    def _settle(self, end: int, reference: Reference, problem: str = "") -> str:
        """Decide about all groups before place ``end`` that are not decided yet.

        Args:
            end: a place in :attr:`groups`.
            reference: the outputs to keep.
            problem: how the outputs change when all of these groups are cut, where that is known.

        Returns:
            how they changed then; empty where they did not, and all were accepted.
        """
        rows, cuts = self._planned(end, self.cuts)
        changing = [len(self._rows) + i for i, row in enumerate(rows) if row.units]
        if changing and not problem:
            members = [m for place in changing for m in self.groups[place].members]
            self.surgery.cut(cuts, members)
            problem = reference.why_changed()
            if problem:
                self.surgery.cut(self.cuts, members)
        if not problem or not changing:
            self._rows, self.cuts = self._rows + rows, cuts
            return ""
        if reference.is_unsteady or len(changing) == 1:
            # in a random model every other group would be found to change the outputs as well
            self._refuse(end if reference.is_unsteady else changing[0] + 1, problem)
            self._settle(end, reference)
            return problem
        middle = changing[(len(changing) - 1) // 2] + 1
        # with the first half as it is in the whole, the second half is what makes the outputs change
        self._settle(end, reference, "" if self._settle(middle, reference) else problem)
        return problem

    def _refuse(self, end: int, problem: str) -> None:
        """Leave the undecided groups before place ``end`` as they are, those that would change something by ``problem``."""
        while len(self._rows) < end:
            [row], _ = self._planned(len(self._rows) + 1, self.cuts)
            self.has_refused |= row.units > 0
            self._rows.append(replace(row, units=0, channels=0, reason=problem) if row.units else row)

    def _planned(self, end: int, cuts: Cuts) -> tuple[list[GroupChange], Cuts]:
        """What would become of the undecided groups before place ``end``, and the cuts then, all of them being right."""
        rows = []
        for group in self.groups[len(self._rows) : end]:
            row = GroupChange(group.name, group.size, reason=group.reason)
            if not group.reason:
                row, cuts = with_dead_units(group, self.surgery, cuts, self.masks, self._constants)
            rows.append(row)
        return rows, cuts

    def _constants(self) -> dict[str, ArrivingConstants]:
        """What arrives at the consumers of every group that may be cut, in the model without cuts; it is looked at once."""
        if self._arriving is None:
            readers = {m.parameter for g in self.groups if not g.reason for m in g.consumers}
            self.surgery.restore()
            sizes = other_sizes(self.samples[-2])
            self._arriving = arriving_constants(self.surgery.model, readers, self.samples, sizes)
            self.surgery.cut(self.cuts, [m for g in self.groups if not g.reason for m in g.members])
        return self._arriving
