"""Patience: how many epochs in a row a metric has not improved."""

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from numbers import Integral
from typing import Literal

import torch
from torch import Tensor

from sparse_callbacks.core import distributed

Mode = Literal["max", "min"]


def judged(best: float, count: int, value: float, mode: Mode) -> tuple[float, int]:
    """(best value, number of values since) after one more ``value``; only a strict improvement counts, NaN never does.

    >>> judged(0.6, 1, 0.6, "max"), judged(0.6, 1, 0.5, "min")
    ((0.6, 2), (0.5, 0))
    """
    # a comparison with NaN is False, so NaN does not count as an improvement and never becomes the best value
    improved = value > best if mode == "max" else value < best
    return (value, 0) if improved else (best, count + 1)


@dataclass(frozen=True)
class Patience:
    """Runs out, for good, after ``limit`` judged epochs in a row without strict improvement of a metric.

    All state is in ``aux`` under ``patience/...``, and an epoch is judged once, by its last validation: a checkpoint
    written at the end of a validation resumes to the same count, whether or not the epoch's end was reached before.

    Args:
        aux: tensors that survive a resume; the state is kept here.
        monitor: name of the metric.
        mode: ``"max"`` or ``"min"``, the direction in which the metric improves.
        limit: number of epochs without improvement.
        device: device on which ranks compute the mean of the metric.
    """

    aux: MutableMapping[str, Tensor]
    monitor: str
    mode: Mode
    limit: int
    device: torch.device

    @property
    def over(self) -> bool:
        """Whether the patience has run out."""
        return self._count >= self.limit

    @property
    def _count(self) -> int:
        return int(self.aux.get("patience/count", 0))

    def sanity(self, metrics: Mapping[str, float]) -> None:
        """The sanity check of validation is over: refuse a metric that was not logged."""
        self._read(metrics, "logged in validation")
        # a mark in aux and not an attribute: an epoch that is resumed after its validation must still know of it
        self.aux["patience/validated"] = torch.ones((), dtype=torch.bool)

    def validated(self, metrics: Mapping[str, float], epoch: int) -> None:
        """A validation in ``epoch`` is over: note the metric, which a later validation of the same epoch replaces."""
        self.sanity(metrics)
        # the mean over ranks: each may have logged a value of its own, and all must run out of patience together
        value = torch.tensor(metrics[self.monitor], dtype=torch.float64, device=self.device)
        self.aux["patience/pending"] = torch.tensor([float(distributed.mean([value])[0]), epoch], dtype=torch.float64)

    def epoch_started(self, epoch: int) -> None:
        """Judge an earlier epoch whose end was not reached, because its run stopped after the last validation."""
        pending = self.aux.get("patience/pending")
        if pending is not None and int(pending[1]) < epoch:
            self._judge()

    def epoch_ended(self, metrics: Mapping[str, float], epoch: int) -> None:
        """Judge the epoch, if it has had a validation, or if the metric is logged in training."""
        if "patience/validated" not in self.aux:  # no validation ever: the metric must be one of training
            self._read(metrics, "logged in the first epoch")
            self.validated(metrics, epoch)
            del self.aux["patience/validated"]
        if "patience/pending" in self.aux:
            self._judge()

    def _judge(self) -> None:
        value = float(self.aux.pop("patience/pending")[0])
        # once it has run out it stays so: a late improvement must not bring similarity back
        if not self.over:
            worst = torch.tensor(float("-inf" if self.mode == "max" else "inf"))  # any number improves on it
            best, count = judged(float(self.aux.get("patience/best", worst)), self._count, value, self.mode)
            # float64, so that a resumed run compares with the very number that this one has seen
            self.aux["patience/best"] = torch.tensor(best, dtype=torch.float64)
            self.aux["patience/count"] = torch.tensor(count)

    def _read(self, metrics: Mapping[str, float], where: str) -> None:
        if self.monitor not in metrics:
            raise ValueError(
                f"monitor={self.monitor!r} is not {where}. Metrics that are: {', '.join(metrics) or 'none'}. Give one "
                "of them, or log it in validation_step (where it is logged in training only, use "
                "Trainer(num_sanity_val_steps=0))."
            )


def check_patience(patient: str, variant: str, monitor: object, mode: object, patience: object) -> None:
    """Refuse arguments with which the ``patient`` variant cannot tell when to grow at random.

    Args:
        patient: the one variant that reads the other arguments.
        variant: the variant that was given.
        monitor, mode, patience: the arguments of :class:`Patience`, as given.

    Raises:
        ValueError: ``monitor`` is missing for the ``patient`` variant, or one of the others is out of range.
    """
    if variant == patient and not (isinstance(monitor, str) and monitor):
        raise ValueError(
            f"variant={variant!r} grows at random once a metric has stopped improving, and monitor= names none. Give "
            "monitor= with the name of a metric logged in validation, or another variant=."
        )
    if mode not in ("max", "min"):
        raise ValueError(
            f"mode={mode!r} is not known. Give 'max' where a larger value of monitor= is better, otherwise 'min'."
        )
    if isinstance(patience, bool) or not isinstance(patience, Integral) or patience < 1:
        raise ValueError(f"patience={patience!r} is not a number of epochs. Give 1 or more; the published value is 40.")
