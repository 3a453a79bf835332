"""A recorded fit in two processes; run as a program of each rank, or with processes that a Trainer starts."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import RigL, SparsityReport
from sparse_callbacks.testing.runs import Stops, trainer_for

SAMPLES = 2 * 19


class Net(pl.LightningModule):
    """Two linear layers, 21 - 33 - 12, on random numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(21, 33), nn.ReLU(), nn.Linear(33, 12))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss: Tensor = self.net(batch[0]).square().mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val/loss", self.net(batch[0]).square().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def samples(number: int = SAMPLES, batch: int = 8) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    return DataLoader(TensorDataset(torch.randn(number, 21, generator=generator)), batch_size=batch)


def rigl(**options: Any) -> RigL:
    return RigL(0.9, distribution="uniform", every=3, stop=1.0, print_plan=False, **options)


def fit_ranks(folder: Path, strategy: str) -> None:
    """Fit in two processes for two epochs of 3 batches a process, the last of 3 samples."""
    report = SparsityReport(folder, every=2, page=False)
    stops = Stops(folder, after=(4,))
    trainer = trainer_for(
        [rigl(), report, stops], folder, max_epochs=2, devices=2, strategy=strategy, num_sanity_val_steps=0
    )
    trainer.fit(Net(), samples(), samples())


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    fit_ranks(Path(sys.argv[2]), sys.argv[1])
    torch.save({}, Path(sys.argv[2]) / f"{os.environ.get('LOCAL_RANK', 0)}.pt")
