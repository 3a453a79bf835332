"""One of two processes that train under DDP: ``python helpers_ddp.py FOLDER`` with LOCAL_RANK set. Writes FOLDER/<rank>.pt."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from support.contract_support import STEADY, Batches, Classifier, fit, method, snapshot, watch

WINDOW = 2
STOP = 7  # inside a window


def matrices(seed: int) -> nn.Module:
    """Three matrices in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 4)).double()


class Noise(pl.Callback):
    """Makes the reduced gradients of one rank differ a little, as other hardware may."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        for p in module.parameters():
            if p.grad is not None:
                p.grad.mul_(1 + self.scale * torch.rand_like(p.grad))


class Halts(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path, self.batches = path, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches == STOP:
            trainer.save_checkpoint(self.path)


def train(name: str, rank: int, world: int, *more: pl.Callback, ckpt_path: Path | None = None, noise: float = 0.0) -> dict[str, Any]:
    """Masks after every batch and all state at the end; ``rank`` and ``world`` say which part of the data is this process's."""
    torch.manual_seed(rank)
    module, callback = Classifier(matrices(rank)), method(name, every=2, stop=8)
    masks: list[dict[str, torch.Tensor]] = []
    see = watch(lambda *_: masks.append({n: m.clone() for n, m in callback.masks.items()}))
    trainer = fit(
        module, Noise(noise), callback, see, *more, loader=Batches(rank=rank, world=world), ckpt_path=ckpt_path,
        accumulate_grad_batches=WINDOW, gradient_clip_val=0.5, devices=world, strategy="ddp" if world > 1 else "auto",
    )  # fmt: skip
    return {"masks": masks, "end": snapshot(trainer, module, callback)}


def main(folder: Path) -> None:
    rank, world = int(os.environ["LOCAL_RANK"]), 2
    results = {}
    for name in STEADY:
        path = folder / f"{name}.ckpt"
        whole = train(name, rank, world, Halts(path))
        torch.distributed.barrier()
        results[name] = {
            "whole": whole,
            "resumed": train(name, rank, world, ckpt_path=path),
            "noisy": train(name, rank, world, noise=0.2 * rank),
        }
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
