"""Averages of a sparse network's weights that somebody else keeps, held to the current masks."""

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.saved_bits import with_bits

_TAKES = "update_parameters"
"""Name of the function that takes an average, of torch's AveragedModel and of Lightning's callbacks."""


def from_birth(average: Tensor, present: Tensor, mask: Tensor, born: Tensor | None) -> Tensor:
    """An average that was just taken, as it is under a moving mask: zero where the mask is, and where a weight was born
    since the average before, its present value.

    Args:
        average: the average with the present values in it.
        present: the present values.
        mask: the current mask (bool).
        born: where weights have been born since the last average (bool); None: nowhere.
    """
    begun = average if born is None else torch.where(born, present, average)
    return begun.masked_fill(~mask, 0)


@singledispatch
def between_batches(method: Method) -> AbstractContextManager[None]:
    """Inside, parameters and buffers are as between two batches, at whatever point of a batch this is. A method under which
    they are others within a batch registers a function of its own.

    Args:
        method: the method of a run that goes on.
    """
    return method.weights.effective()


class SparseAverage:
    """Holds an average of one method's weights to its masks: pruned weights are zero in it at any time, and the average of
    a weight that was dropped and grown again since the last one begins anew.

    Args:
        method: the method, in a run.
        averaged: the module that holds the averages in parameters of the same names.
        born: where weights have been born since the last average (bool), by parameter name; missing: nowhere.

    Raises:
        ValueError: the method has exchanged layers.
    """

    def __init__(self, method: Method, averaged: nn.Module, born: Mapping[str, Tensor]) -> None:
        if layers := method.weights.layers_stored:
            raise ValueError(
                f"an average of weights goes by their places, and the live weights of {', '.join(layers)} move: sparse storage "
                "has no averages. Use storage='masked', or leave the average out."
            )
        self.method, self._averaged = method, averaged
        masks = method.masks
        self.born = {n: b.to(masks[n].device, copy=True) for n, b in born.items() if n in masks}
        """Where weights have been born since the last average, by parameter name."""
        method.weights.watchers.append(self._mask_changes)
        self._mask(masks)

    def end(self) -> None:
        """Masks move no more."""
        watchers = self.method.weights.watchers
        if self._mask_changes in watchers:
            watchers.remove(self._mask_changes)

    def _mask_changes(self, name: str, before: Tensor, now: Tensor) -> None:
        born = now & ~before
        # of those that were born before only what is still there
        self.born[name] = born | (self.born[name] & now) if name in self.born else born
        self._mask([name])

    @torch.no_grad()
    def _mask(self, names: Iterable[str]) -> None:
        averages = self._averages()
        for name in averages.keys() & set(names):
            averages[name].masked_fill_(~self.method.weights.masks[name].to(averages[name].device), 0)

    @torch.no_grad()
    def taken(self) -> None:
        """An average was taken of what the parameters hold now."""
        weights = self.method.weights
        for name, average in self._averages().items():
            present, mask = weights.params[name].detach().to(average), weights.masks[name].to(average.device)
            born = self.born.get(name)
            average.copy_(from_birth(average, present, mask, None if born is None else born.to(average.device)))
        self.born.clear()

    def _averages(self) -> dict[str, Tensor]:
        # asked for each time: an average may be moved to another device
        return {n: p for n, p in self._averaged.named_parameters() if n in self.method.weights.params}


class TakesAverages:
    """Stands for the function that takes an average, so that it is one of effective weights and stays sparse.

    Args:
        owner: the object whose ``update_parameters`` this stands for.
    """

    def __init__(self, owner: object) -> None:
        self._take = getattr(owner, _TAKES)
        self.averages: list[SparseAverage] = []
        """What is done about it, for each method of the network."""

    def __call__(self, *args: Any, **options: Any) -> Any:
        with ExitStack() as stack:
            for average in self.averages:
                stack.enter_context(between_batches(average.method))
            found = self._take(*args, **options)
            for average in self.averages:
                average.taken()
        return found

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy: copies of the owner take averages as ever."""
        return {"_take": self._take, "averages": []}


class HeldAverages:
    """All averages that others keep of one method's weights, held to its masks for the length of a run.

    Args:
        saved: what :meth:`state` gave for the run that goes on; empty for a new one.
    """

    def __init__(self, saved: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        self._saved = saved or {}
        self._kept: dict[str, SparseAverage] = {}
        self._owners: list[tuple[object, SparseAverage]] = []

    def hold(self, key: str, owner: object, averaged: nn.Module, method: Method) -> None:
        """Hold one more average.

        Args:
            key: a name for it in the state.
            owner: the object whose ``update_parameters`` takes it.
            averaged: the module that holds it in parameters of the same names.
            method: the method, in a run whose masks are written.
        """
        average = self._kept[key] = SparseAverage(method, averaged, self._saved.get(key, {}).get("born", {}))
        # an attribute of the instance hides the method of its class
        if not isinstance(vars(owner).get(_TAKES), TakesAverages):
            vars(owner)[_TAKES] = TakesAverages(owner)
        vars(owner)[_TAKES].averages.append(average)
        self._owners.append((owner, average))

    def end(self) -> None:
        """The run is over, or somebody has refused it: averages are taken as ever."""
        for owner, average in self._owners:
            average.end()
            stands = vars(owner)[_TAKES]
            stands.averages.remove(average)
            if not stands.averages:
                del vars(owner)[_TAKES]
        self._owners = []

    def state(self) -> dict[str, Any]:
        """What a checkpoint holds of them, also when the run is over; empty where nobody averages."""
        # of a run that was over already nothing is held, and what it was given goes on
        born = {key: a.born for key, a in self._kept.items()} or {k: one["born"] for k, one in self._saved.items()}
        found = {key: {"born": with_bits(truths)} for key, truths in born.items()}
        return {"averages": found} if found else {}

    def __reduce__(self) -> Any:
        return HeldAverages, ()  # a copy of a host is in no run
