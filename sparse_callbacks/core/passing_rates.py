"""Learning rates of single steps, which the user's schedules neither see nor lose."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class PassingRates:
    """Learning rates that an optimizer has for one step alone: set within its step, and put back when the step is over.

    A schedule that computes its next rate from the last one goes on as if nothing had been set. Where a GradScaler skips
    the step, nothing is set at all.

    Args:
        optimizers: the optimizers whose rates may be set; none where the method sets none.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self._optimizers = list(optimizers)
        self._wanted: dict[int, Sequence[float]] = {}
        self._within: set[int] = set()  # optimizers that are within their step
        self._before: dict[int, list[Any]] = {}
        self.handles: list[RemovableHandle] = [o.register_step_pre_hook(self._step_begins) for o in self._optimizers]
        """The hooks that are planted."""

    def want(self, index: int, rates: Sequence[float] | None) -> None:
        """The coming step of an optimizer, or the one that it is within, has these rates of its groups; None: its own.

        Args:
            index: position of the optimizer in the run.
            rates: a rate for each group of parameters.
        """
        self._wanted.pop(index, None)
        if rates is not None:
            self._wanted[index] = rates
            # a closure computes gradients within the step, and only then is the step announced
            if index in self._within:
                self._set(index)

    def _step_begins(self, optimizer: Optimizer, *_: object) -> None:
        if optimizer in self._optimizers:  # a wrapper around one of them fires its hooks too
            index = self._optimizers.index(optimizer)
            self._within.add(index)
            self._set(index)

    def _set(self, index: int) -> None:
        rates = self._wanted.pop(index, None)
        if rates is None:
            return
        groups = self._optimizers[index].param_groups
        self._before[index] = [_kept(group["lr"]) for group in groups]
        for group, rate in zip(groups, rates, strict=True):
            _give(group, rate)

    def put_back(self, index: int | None = None) -> None:
        """A step is over, or the batch is: the optimizer, or each of them, has its own rates again.

        Args:
            index: position of the optimizer in the run; None: all.
        """
        for each in [*self._before] if index is None else [index]:
            self._within.discard(each)
            before = self._before.pop(each, None)
            if before is not None:
                for group, rate in zip(self._optimizers[each].param_groups, before, strict=True):
                    _give(group, rate)


def why_no_rate(optimizer: Optimizer) -> str:
    """Why the learning rate of an optimizer cannot be set; empty where it can."""
    for number, group in enumerate(optimizer.param_groups):
        rate = group.get("lr")
        if isinstance(rate, bool) or not isinstance(rate, int | float | Tensor):
            return f"group {number} of its parameters has lr={rate!r}"
    return ""


def _kept(rate: Any) -> Any:
    # schedules, and compiled optimizers, write into a rate that is a tensor
    return rate.detach().clone() if isinstance(rate, Tensor) else rate


def _give(group: dict[str, Any], rate: Any) -> None:
    if isinstance(group["lr"], Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
