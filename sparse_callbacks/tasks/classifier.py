"""The LightningModule of `train.py`: a classifier, its optimizer and the curves it logs."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional
from torchmetrics.classification import MulticlassAccuracy

from sparse_callbacks.lightning.optimizer_lives import horizon

OPTIMIZERS = ("sgd", "adam", "adamw")
LR_SCHEDULES = ("constant", "cosine", "steps")


@dataclass(frozen=True)
class Optim:
    """Optimizer and learning rate over the run, all scalars, so that each fits a sweep.

    Under a method that restarts the optimizer (GaP), "the run" is one of its phases, or fine-tuning: the curve begins anew with each.

    Args:
        name: sgd, adam or adamw.
        lr: peak learning rate.
        weight_decay: of every parameter (L2 for sgd and adam, decoupled for adamw).
        momentum, nesterov: of sgd.
        fused: torch's fused kernel (adamw with masked gradients is far faster with it on CPU).
        lr_schedule: constant, cosine (to 0 at the end of the run) or steps.
        milestones, gamma: `steps` multiplies by gamma at each of these optimizer steps (int) or shares of the run (float).
        warmup: optimizer steps of a linear rise from 0.
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
        for key, value, known in (("name", self.name, OPTIMIZERS), ("lr_schedule", self.lr_schedule, LR_SCHEDULES)):
            if value not in known:
                raise ValueError(f"optim.{key}={value!r} is not known. Choose one of {', '.join(known)}.")
        if not self.lr > 0:
            raise ValueError(f"optim.lr={self.lr} is not positive, so nothing would train. Give e.g. optim.lr=0.1.")

    def optimizer(self, parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        options: dict[str, Any] = {"lr": self.lr, "weight_decay": self.weight_decay, "fused": self.fused}
        if self.name == "sgd":
            return torch.optim.SGD(parameters, momentum=self.momentum, nesterov=self.nesterov and self.momentum > 0, **options)
        return (torch.optim.Adam if self.name == "adam" else torch.optim.AdamW)(parameters, **options)

    def refuse_endless(self) -> None:
        """For a run without an end.

        Raises:
            ValueError: the curve of the learning rate needs the length of the run.
        """
        shares = self.lr_schedule == "steps" and any(isinstance(when, float) for when in self.milestones)
        if self.lr_schedule == "cosine" or shares:
            raise ValueError(
                f"optim.lr_schedule={self.lr_schedule} needs the length of the run, and this run has no end. "
                "Give trainer.max_epochs or trainer.max_steps, or optim.lr_schedule=constant."
            )

    def factor(self, step: int, total: Callable[[], float]) -> float:
        """Share of `lr` at an optimizer step of a run of `total()` optimizer steps (not asked at step 0)."""
        if step < self.warmup:
            return (step + 1) / (self.warmup + 1)
        if step == 0 or self.lr_schedule == "constant":
            return 1.0
        if self.lr_schedule == "cosine":
            done = (step - self.warmup) / max(1.0, total() - self.warmup)
            return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
        passed = sum(step >= (when * total() if isinstance(when, float) else when) for when in self.milestones)
        return float(self.gamma**passed)


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor | None:
    """Euclidean norm over all gradients, a scalar; None where no parameter has one (an update that replaces the step)."""
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if not gradients:
        return None
    return torch.nn.utils.get_total_norm(gradients)


class Classifier(pl.LightningModule):
    """Cross-entropy training of `model`; logs train/loss, train/acc, val/loss, val/acc, test/loss, test/acc, grad_norm.

    Args:
        model: images [batch, channels, height, width] to logits [batch, num_classes].
        num_classes: labels are 0..num_classes - 1.
        optim: optimizer and learning rate.
    """

    def __init__(self, model: nn.Module, num_classes: int, optim: Optim) -> None:
        super().__init__()
        self.model, self.optim = model, optim
        self.accuracy = nn.ModuleDict(
            {
                f"{stage}_accuracy": MulticlassAccuracy(num_classes, average="micro", validate_args=False)
                for stage in ("train", "val", "test")
            }
        )

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
        loss = functional.cross_entropy(logits, labels)
        metric = self._metric("train")
        metric.update(logits, labels)
        self.log("train/loss", loss, prog_bar=True, batch_size=len(labels))
        self.log("train/acc", metric, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(labels))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self._evaluate("test", batch)

    def _evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        logits = self(images)
        metric = self._metric(stage)
        metric.update(logits, labels)
        loss = functional.cross_entropy(logits, labels)
        self.log(f"{stage}/loss", loss, batch_size=len(labels), sync_dist=True)
        self.log(f"{stage}/acc", metric, prog_bar=True, batch_size=len(labels))

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        # called after the callbacks, so the gradients are masked, and before clipping
        trainer: Any = self.trainer
        if trainer.log_every_n_steps and (trainer.global_step + 1) % trainer.log_every_n_steps == 0:
            norm = gradient_norm(self.parameters())
            if norm is not None:
                self.log("grad_norm", norm)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        trainer = self.trainer
        if trainer.max_steps == -1 and trainer.max_epochs == -1:
            self.optim.refuse_endless()
        optimizer = self.optim.optimizer(self.parameters())

        # asked for the run's length here, Lightning would make its loader now and forget to resume it
        def factor(step: int) -> float:
            return self.optim.factor(step, lambda: horizon(trainer))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step", "name": "lr"}}
