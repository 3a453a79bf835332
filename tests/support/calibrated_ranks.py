"""Two processes whose data differ, and the channels that they score on calibration batches."""

import os
import sys
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import ChannelPruning
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit, watch
from support.smcp import conv_net


def data(seed: int = 0, count: int = 64) -> TensorDataset:
    draw = torch.Generator().manual_seed(seed)
    return TensorDataset(torch.randn(count, 2, 5, 5, generator=draw), torch.arange(count) % 4)


def noisy_loss(module: Any, batch: Any) -> torch.Tensor:
    """A loss that draws: the first process has drawn its data before, the other has not."""
    loss: torch.Tensor = module.loss((batch[0] + torch.randn_like(batch[0]), batch[1]))
    return loss


class Scores(pl.Callback):
    """Calibrates in the middle of an accumulation window, and notes scores, gradients and random states."""

    def __init__(self, callback: ChannelPruning) -> None:
        self.callback, self.found = callback, list[Any]()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, index: int) -> None:
        if index != 1:
            return
        before = [p.grad.clone() for p in module.parameters()]
        calibration = self.callback.host.calibration(2, loss=noisy_loss, seed=4)
        with calibration.losses() as losses:
            values = [float(b.loss) for b in losses]
        same = all(torch.equal(p.grad, b) for p, b in zip(module.parameters(), before, strict=True))
        self.found.append((values, same, float(before[0].abs().sum())))


def train(criterion: str, rank: int, world: int, ranking: str = "knapsack", **options: Any) -> dict[str, Any]:
    """Masks after every batch, and what calibrations in open windows gave."""
    torch.manual_seed(0)
    callback = ChannelPruning(
        0.6, criterion=criterion, ranking=ranking, batches=3, round_to=1, print_plan=False, **options
    )
    masks: list[dict[str, torch.Tensor]] = []
    scores = Scores(callback)
    fit(
        Classifier(conv_net()),
        callback,
        scores,
        watch(lambda *_: masks.append({n: m.clone() for n, m in callback.masks.items()})),
        # every process has data of its own, and only the first one's is scored on
        loader=DataLoader(data(rank), batch_size=8, shuffle=True),
        max_epochs=2,
        accumulate_grad_batches=2,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
    )
    return {"masks": masks, "scores": scores.found}


RUNS: dict[str, dict[str, Any]] = {
    "taylor_2017": {"start": 1, "stop": 7, "every": 2},
    "sosp": {"start": 1, "stop": 7, "every": 2},
    "ispasp": {"start": 2, "stop": 2, "ranking": "layer"},
}


def main(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.save({name: train(name, rank, 2, **options) for name, options in RUNS.items()}, folder / f"{rank}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[2]))
