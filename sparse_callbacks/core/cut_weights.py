"""Weights that do not belong to the masks of the run that goes on: its masks would cut them."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.hooks import Hooks
from sparse_callbacks.core.live.saved_patterns import Pattern, units_of
from sparse_callbacks.core.method import Method


def count_cut(method: Method, saved: SavedRun, name: str, weight: Tensor) -> int:
    """How many values of a parameter the masks of a saved run would cut; 0 where the run itself may have left them.

    Args:
        method: the method that goes on.
        saved: the saved run.
        name: the name of the parameter.
        weight: its values.
    """
    weight = weight.detach()
    if name in saved.patterns:
        return _cut_by_pattern(saved.patterns[name], weight)
    mask, dense = saved.masks[name], saved.dense.get(name)
    if type(weight) is not Tensor or weight.shape != mask.shape:  # a subclass keeps its values as it likes
        return 0
    pruned = weight[~mask.to(weight.device)]
    cut = int(pruned.count_nonzero())
    if not cut or dense is None:
        return cut
    dense = dense.to(weight)
    # saved within an optimizer step, for which the parameter holds its dense values; a run that has diverged has NaN
    if torch.equal(weight.nan_to_num(), dense.nan_to_num()):
        return 0
    if type(method).batch_start is not Hooks.batch_start:
        # saved within a batch: the parameter holds a sample of its gates, each between 0 and 1, times the dense values
        behind = dense[~mask.to(weight.device)]
        return int(((pruned.abs() > behind.abs()) | (pruned * behind < 0) | pruned.isnan()).sum())
    return cut


def _cut_by_pattern(pattern: Pattern, weight: Tensor) -> int:
    """How many values of a dense weight are outside of a pattern."""
    if type(weight) is not Tensor:
        return 0
    keys, _, group = units_of(pattern, tuple(weight.shape))
    rows = weight.reshape(-1, group, weight.shape[1]).transpose(1, 2).reshape(-1, group)  # of units
    return int(weight.count_nonzero()) - int(rows[keys.to(weight.device)].count_nonzero())


class ResumedWeights:
    """Whether the first step of a hand-written loop that goes on from a state is taken with the weights of that run.

    They may be loaded before the state is given or after it: until the first step nobody can say whether weights that
    the masks have cut are those of another run, or are about to be overwritten.

    Args:
        method: the method that goes on, with its masks written.
        saved: the state that the run was given.
        values: the values of the sparse parameters before the masks were written.
        foreign: names of exchanged layers in which other weights lived before, or whose dense weights were cut.
    """

    def __init__(
        self, method: Method, saved: SavedRun, values: Mapping[str, Tensor], foreign: Iterable[str] = ()
    ) -> None:
        self._method, self._saved = method, saved
        # where a mask leaves nothing, the weights of the run are the same as those that were cut
        cut = [
            n
            for n, mask in saved.masks.items()
            if n in values and bool(mask.any()) and count_cut(method, saved, n, values[n])
        ]
        self._left = {name: method.params[name].detach().clone() for name in (*cut, *foreign)}

    def refuse_foreign(self) -> None:
        """The first step is about to be taken.

        Raises:
            ValueError: weights are not those of the run, or were not when the masks cut them and are still what was left.
        """
        for name, parameter in self._method.params.items():
            value = parameter.detach()
            untouched = name in self._left and torch.equal(value, self._left[name].to(value))
            # what is not live in an exchanged layer is not there
            masked = name in self._saved.masks
            if untouched or (masked and count_cut(self._method, self._saved, name, value)):
                raise ValueError(
                    f"the weights of {name} are not those of the run whose state was {self._saved.path}: the masks in it "
                    "cut some of them. Load the weights that were saved together with the state, before the first step. "
                    "For these masks on other weights use Static(from_checkpoint=), and for new masks fresh_start=True."
                )
