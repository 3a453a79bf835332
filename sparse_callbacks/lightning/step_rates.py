"""Learning rates that optimizer steps were taken with, in place of those that were logged earlier."""

from collections.abc import Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.lightning.namespaces import Trainer


class StepRates:
    """Notes the learning rates of each step.

    Monitors log them every few steps, and when a batch ends the schedule has moved on already.
    """

    def __init__(self) -> None:
        self._of: WeakKeyDictionary[Optimizer, list[Any]] = WeakKeyDictionary()

    def __reduce__(self) -> Any:
        return StepRates, ()  # a copy, and one in another process, belongs to other optimizers

    def note(self, optimizer: Optimizer) -> None:
        """The optimizer is about to step. Rates that lie in tensors, which a schedule writes into, are copied there."""
        rates = [group.get("lr") for group in optimizer.param_groups]
        self._of[optimizer] = [rate.detach().clone() if isinstance(rate, Tensor) else rate for rate in rates]

    def state(self, optimizers: Sequence[Optimizer]) -> list[list[float]]:
        """The rates of the latest step of each optimizer, for a checkpoint."""
        return [self._rates(optimizer) for optimizer in optimizers]

    def load(self, state: Sequence[Sequence[float]], optimizers: Sequence[Optimizer]) -> None:
        """Go on from what :meth:`state` gave: a row may come before the next step."""
        for optimizer, rates in zip(optimizers, state, strict=False):
            self._of[optimizer] = list(rates)

    def in_place_of(self, logged: Mapping[str, float], trainer: Trainer) -> dict[str, float]:
        """Metrics in which each learning rate is that of the latest step; one of an unknown optimizer stays as it was logged.

        Args:
            logged: everything that was logged; without any rate the one of the first optimizer is added as ``lr``.
            trainer: the Trainer, which knows the optimizers and the names of their schedules.
        """
        optimizers = list(trainer.optimizers)
        metrics = dict(logged)
        if not any(map(is_rate, metrics)) and optimizers and (first := self._rates(optimizers[0])):
            return {"lr": first[0], **metrics}
        for name in filter(is_rate, logged):
            optimizer, group = self._meant(name, trainer)
            rates = [] if optimizer is None else self._rates(optimizer)
            if len(rates) > group and (group or "/pg" in name or len(set(rates)) == 1):
                metrics[name] = rates[group]
        return metrics

    def _rates(self, optimizer: Optimizer) -> list[float]:
        """Those of its latest step, or as they are now where nobody has told of one."""
        found = self._of.get(optimizer, [group.get("lr") for group in optimizer.param_groups])
        return [float(rate) for rate in found if rate is not None]

    def _meant(self, name: str, trainer: Trainer) -> tuple[Optimizer | None, int]:
        """The optimizer and the group of parameters that a rate is of, by the names of Lightning's LearningRateMonitor."""
        base, of_group, number = name.partition("/pg")
        if of_group and not number.isdecimal():
            return None, 0  # another figure of the group, such as its momentum
        group = int(number) - 1 if of_group else 0
        named = [config.scheduler.optimizer for config in trainer.lr_scheduler_configs if config.name == base]
        alike = [optimizer for optimizer in trainer.optimizers if base == f"lr-{type(optimizer).__name__}"]
        every = trainer.optimizers if base == "lr" or base.endswith("/lr") else []
        # of several that have one name nobody knows which is meant
        found = next((kind for kind in (named, alike, every) if len(kind) == 1), [None])
        return found[0], group


def is_rate(metric: str) -> bool:
    """Whether a metric is a learning rate, by the names that Lightning and ``train.py`` give it."""
    return metric == "lr" or metric.endswith("/lr") or metric.startswith("lr-") or "/lr/pg" in metric
