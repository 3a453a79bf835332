"""One of two processes that train parallel grow-and-prune: ``python helpers_gap.py FOLDER`` with LOCAL_RANK set."""

import os
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from sparse_callbacks import ParallelGaP
from support.contract_support import Batches, Classifier, Stops, fit, snapshot, watch

ROUNDS, EPOCHS, FINETUNE, WINDOW = 2, 2, 2, 3
STOPS = (3, 10, 16, 17, 30, 34)  # batches: inside a window, in each epoch of a round, at its end, in fine-tuning


def network(seed: int = 0) -> nn.Module:
    """With dropout and batch norms, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Flatten(), nn.Linear(54, 12), nn.BatchNorm1d(12), nn.ReLU(), nn.Dropout(0.2),
        nn.Linear(12, 4),
    ).double()  # fmt: skip


def train(world: int, *more: pl.Callback, seed: int = 0, ckpt_path: Path | None = None) -> dict[str, Any]:
    """All state at the end, and weights and masks after each batch."""
    callback = ParallelGaP(0.8, partitions=2, rounds=ROUNDS, epochs=EPOCHS, print_plan=False)
    module = Classifier(network(seed), optimizer="adamw")
    seen: list[Any] = []
    see = watch(lambda *_: seen.append({n: (p.detach().clone(), callback.masks.get(n)) for n, p in module.named_parameters()}))
    epochs = ROUNDS * EPOCHS * (1 if world > 1 else 2) + FINETUNE
    trainer = fit(
        module, callback, see, *more, loader=Batches(), max_epochs=epochs, accumulate_grad_batches=WINDOW, ckpt_path=ckpt_path,
        devices=world, strategy="ddp" if world > 1 else "auto", use_distributed_sampler=False,
    )  # fmt: skip
    return {"seen": seen, "end": snapshot(trainer, module, callback)}


class RandomStates(pl.Callback):
    """Random states of every rank, which Lightning does not save."""

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [None, None]
        torch.distributed.all_gather_object(states, torch.get_rng_state())
        return {"states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states = state["states"]

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.ckpt_path:
            torch.set_rng_state(self.states[trainer.global_rank])


def main(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    results = {"whole": train(2, Stops(folder, STOPS), RandomStates(), seed=rank)}
    torch.distributed.barrier()
    for stop in STOPS:
        results[f"resumed {stop}"] = train(2, RandomStates(), seed=7 + rank, ckpt_path=folder / f"{stop}.ckpt")
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main(Path(sys.argv[1]))
