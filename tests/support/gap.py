"""Networks and short runs of grow-and-prune."""

from typing import Any

import torch
from torch import nn

from sparse_callbacks import GaP
from sparse_callbacks.lightning.optimizer_lives import horizon
from sparse_callbacks.testing.networks import OPTIMIZERS, Classifier
from support.nets import mlp

WIDTHS = (12, 10, 8, 6, 4, 5)


def deep(layers: int) -> nn.Sequential:
    return mlp(*WIDTHS[:layers], 6)


def gap(partitions: Any = 3, **options: Any) -> GaP:
    return GaP(**({"sparsity": 0.7, "partitions": partitions, "print_plan": False} | options))


class Restarting(Classifier):
    """A cosine over each phase, given its length in ``configure_optimizers`` or later in the function of a LambdaLR."""

    def __init__(self, net: nn.Module | None = None, optimizer: str = "sgd", lazy: bool = False) -> None:
        super().__init__(net, optimizer)
        self.lazy, self.horizons = lazy, []

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if self.lazy:
            schedule: Any = torch.optim.lr_scheduler.LambdaLR(
                optimizer, lambda step: 1 - step / (2 * horizon(self.trainer)) if step else 1
            )
        else:
            self.horizons.append(horizon(self.trainer))
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.horizons[-1], eta_min=0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}
