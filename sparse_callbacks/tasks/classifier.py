"""The LightningModule of `train.py`: a classifier, its optimizer and the metrics that it logs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics import MeanMetric
from torchmetrics.classification import MulticlassAccuracy

from sparse_callbacks.lightning.optimizer_lives import horizon
from sparse_callbacks.reporting.measures import top_k_hits

OPTIMIZERS = ("sgd", "adam", "adamw")
LR_SCHEDULES = ("constant", "cosine", "steps")
TOP = 5  # classes that may be named for top-5 accuracy


@dataclass(frozen=True)
class Optim:
    """The optimizer and the course of its learning rate, in scalars, so that each of them fits a sweep.

    Under a method that restarts the optimizer (GaP), "the run" is one phase, or fine-tuning, and each of them begins
    the course anew.

    Args:
        name: sgd, adam or adamw.
        lr: the peak learning rate.
        weight_decay: the decay of every parameter (L2 for sgd and adam, decoupled for adamw).
        momentum, nesterov: the momentum of sgd, and whether it is Nesterov's.
        fused: whether to use torch's fused kernel (adamw with masked gradients is far faster with it on a CPU).
        lr_schedule: constant, cosine (to 0 at the end of the run) or steps.
        milestones, gamma: `steps` multiplies the rate by gamma at each milestone, which is a number of optimizer steps
            (int) or a share of the run (float).
        warmup: the number of optimizer steps in which the rate first rises, linearly from 0.

    Raises:
        ValueError: an unknown name or schedule, a learning rate that is not positive, or another number out of range.
    """

    name: str = "sgd"
    lr: float = 0.1
    weight_decay: float = 1e-4
    momentum: float = 0.9
    nesterov: bool = True
    fused: bool = True
    lr_schedule: str = "cosine"
    milestones: Sequence[float] = (0.5, 0.75)
    gamma: float = 0.1
    warmup: int = 0

    def __post_init__(self) -> None:
        if self.name not in OPTIMIZERS:
            raise ValueError(f"optim.name={self.name!r} is not known. Choose one of {', '.join(OPTIMIZERS)}.")
        if self.lr_schedule not in LR_SCHEDULES:
            raise ValueError(
                f"optim.lr_schedule={self.lr_schedule!r} is not known. Choose one of {', '.join(LR_SCHEDULES)}."
            )
        if not self.lr > 0:
            raise ValueError(f"optim.lr={self.lr} is not positive, so nothing would train. Give e.g. optim.lr=0.1.")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"optim.weight_decay={self.weight_decay} is below 0. Give 0 for none, or e.g. 1e-4.")
        if not 0 <= self.momentum < 1:
            raise ValueError(f"optim.momentum={self.momentum} is not in [0, 1). Give 0 for none, or e.g. 0.9.")
        if self.warmup < 0:
            raise ValueError(f"optim.warmup={self.warmup} is not a number of optimizer steps. Give 0 for none.")
        if not 0 < self.gamma <= 1:
            raise ValueError(
                f"optim.gamma={self.gamma} is not in (0, 1]: the rate is multiplied by it at each milestone. Give e.g. 0.1."
            )
        if any(when < 0 for when in self.milestones):
            raise ValueError(
                f"optim.milestones={list(self.milestones)} has a time before the run. Give optimizer steps (int) or shares "
                "of the run (float), e.g. [0.5, 0.75]."
            )

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        """A new optimizer of the parameters, all in one group."""
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": self.fused}
        if self.name == "adam":
            return torch.optim.Adam(parameters, **options)
        if self.name == "adamw":
            return torch.optim.AdamW(parameters, **options)
        # torch refuses Nesterov's momentum without any, so `optim.momentum=0` alone would not start
        nesterov = self.nesterov and self.momentum > 0
        return torch.optim.SGD(parameters, momentum=self.momentum, nesterov=nesterov, **options)

    def refuse_endless(self) -> None:
        """Refuse a run without an end where the learning rate depends on the length of the run.

        Raises:
            ValueError: the schedule is a cosine, or has a milestone that is a share of the run.
        """
        shares = self.lr_schedule == "steps" and any(isinstance(when, float) for when in self.milestones)
        if self.lr_schedule == "cosine" or shares:
            raise ValueError(
                f"optim.lr_schedule={self.lr_schedule} needs the length of the run, and this run has no end. "
                "Give trainer.max_epochs or trainer.max_steps, or optim.lr_schedule=constant."
            )

    def factor(self, step: int, total: Callable[[], float]) -> float:
        """The learning rate at an optimizer step, as a share of `lr`.

        Args:
            step: the number of optimizer steps before this one.
            total: a function that returns the length of the run in optimizer steps; it is not called for step 0.
        """
        if step < self.warmup:
            # from one share and not from zero, with which the first step would move nothing
            return (step + 1) / (self.warmup + 1)
        if step == 0 or self.lr_schedule == "constant":
            return 1.0
        if self.lr_schedule == "cosine":
            done = (step - self.warmup) / max(1.0, total() - self.warmup)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        passed = 0
        for milestone in self.milestones:
            # a float is a share of the run, an int is a step already
            milestone_step = milestone * total() if isinstance(milestone, float) else milestone
            if step >= milestone_step:
                passed += 1
        return float(self.gamma**passed)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Euclidean norm over all gradients, a scalar; None where no parameter has a gradient.

    A method whose update replaces the optimizer step takes the gradients away.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    return torch.nn.utils.get_total_norm(gradients)


def cross_entropy(logits: Tensor, labels: Tensor, first: bool) -> Tensor:
    """The mean cross-entropy of a batch, a scalar.

    Args:
        logits: outputs of the network [batch, classes].
        labels: numbers of the classes [batch].
        first: whether the labels are looked at before they are used, as in the first batch of an epoch; in every one the host
            would wait for a GPU. On a CPU the labels of later batches are looked at where torch fails on them.

    Raises:
        ValueError: labels that are not such numbers.
    """
    if first:
        refuse_other_labels(labels, logits.shape[-1])
    try:
        return functional.cross_entropy(logits, labels)
    except (IndexError, RuntimeError):
        refuse_other_labels(labels, logits.shape[-1])
        raise


def refuse_other_labels(labels: Tensor, classes: int) -> None:
    """Refuse labels that are not numbers of classes [batch].

    Raises:
        ValueError: another shape or type, or a number that is no class.
    """
    if labels.dim() != 1 or labels.dtype not in (torch.int64, torch.uint8):
        raise ValueError(
            f"The labels of a batch have shape {tuple(labels.shape)} and type {str(labels.dtype).removeprefix('torch.')}, and the "
            f"classifier takes numbers of classes [batch] of type int64, from 0 to {classes - 1}. Convert them in the data module."
        )
    least, largest = labels.min().item(), labels.max().item()
    if least < 0 or largest >= classes:
        raise ValueError(
            f"The labels of a batch go from {least:g} to {largest:g}, and {classes} classes have the numbers 0 to {classes - 1}. Number "
            "them from 0, or give data.num_classes= how many there are."
        )


class Classifier(pl.LightningModule):
    """Trains a classifier by cross-entropy.

    Logs train/loss, train/acc, val/loss, val/acc, test/loss, test/acc and train/grad_norm; with more than five classes also
    val/acc5 and test/acc5, the share of samples whose class is among the five largest logits. The learning rate is named
    train/lr for `LearningRateMonitor`.

    Args:
        model: the network, from images [batch, channels, height, width] to logits [batch, num_classes].
        num_classes: the number of classes; labels are 0..num_classes - 1.
        optim: the optimizer and its learning rate.
    """

    def __init__(self, model: nn.Module, num_classes: int, optim: Optim) -> None:
        super().__init__()
        self.model, self.num_classes, self.optim = model, num_classes, optim
        # keys of a ModuleDict must not be names of module attributes, as "train" is; to check the labels of every
        # batch would make the host wait for a GPU
        self.accuracy = nn.ModuleDict(
            {
                f"{stage}_accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False)
                for stage in ("train", "val", "test")
            }
        )
        # own metrics and not torchmetrics' top_k, which puts equal logits, such as all of a collapsed network, in any order
        tops = {f"{stage}_top": MeanMetric() for stage in ("val", "test")} if num_classes > TOP else {}
        self.top_accuracy = nn.ModuleDict(tops)

    def _metric(self, stage: str) -> MulticlassAccuracy:
        metric = self.accuracy[f"{stage}_accuracy"]
        assert isinstance(metric, MulticlassAccuracy)
        return metric

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images)
        return logits

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(logits, labels, first=batch_idx == 0)
        metric = self._metric("train")
        metric.update(logits, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        self.log("train/acc", metric, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch, batch_idx)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch, batch_idx)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        images, labels = batch
        logits = self(images)
        loss = cross_entropy(logits, labels, first=batch_idx == 0)
        metric = self._metric(stage)
        metric.update(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}/acc", metric, prog_bar=True, batch_size=len(labels))
        if self.top_accuracy:
            top = self.top_accuracy[f"{stage}_top"]
            assert isinstance(top, MeanMetric)
            top.update(top_k_hits(logits, labels, TOP).float())
            self.log(f"{stage}/acc{TOP}", top, batch_size=len(labels))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # Lightning calls this after the hooks of the callbacks, so the gradients are masked, and before it clips them
        trainer: Any = self.trainer
        # asked of Lightning, so that the norm is computed for those steps alone that have a row
        if trainer._logger_connector.should_update_logs:
            norm = gradient_norm(self.parameters())
            if norm is not None:
                self.log("train/grad_norm", norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trainer = self.trainer
        if trainer.max_steps == -1 and trainer.max_epochs == -1:
            self.optim.refuse_endless()
        optimizer = self.optim.optimizer(self.parameters())

        # the length of the run is asked for in the first step: here Lightning would make its loader too early, and
        # a resumed run would begin its epoch anew
        def factor(step: int) -> float:
            return self.optim.factor(step, lambda: horizon(trainer))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "train/lr"},
        }
