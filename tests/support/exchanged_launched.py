"""Fits with sparse storage in processes that the Trainer starts, and what the main process has of them then.

A program of its own, as a test that forks would copy the threads of pytest.
"""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from sparse_callbacks import to_dense
from support.exchanged import fit, layers_of, mlp, sparse

Found = dict[str, Any]


def masks_of(callback: Any) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in callback.masks.items()}


class Tells(pl.Callback):
    """Writes how a fit in another process begins and ends; listed after the sparsity callback."""

    def __init__(self, callback: Any, folder: Path) -> None:
        self.callback, self.folder = callback, folder

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write("begins", module)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        self._write("ends", module)

    def _write(self, name: str, module: pl.LightningModule) -> None:
        found = {
            "layers": sorted(layers_of(module)),
            "masks": masks_of(self.callback),
            "updates": self.callback.updates,
        }
        torch.save(found, self.folder / f"{name}.pt")


def fits(strategy: str, storage: str, folder: Path) -> list[Found]:
    """Two fits in other processes, one here, one that is refused, and one in another process with dense layers again."""
    module, callback = mlp(), sparse("set", storage, stop=40)
    tells, found = Tells(callback, folder), []
    for number in range(5):
        refused, elsewhere = "", number != 2
        if number == 4:
            to_dense(module)
        options = {"strategy": strategy, "devices": 1} if elsewhere else {}
        try:
            fit([callback, tells], module, **options)
        except Exception as error:  # torch's own, which quotes the one of the other process
            refused = str(error)
        seen = {name: torch.load(folder / f"{name}.pt", weights_only=True) for name in ("begins", "ends")}
        here = {"layers": sorted(layers_of(module)), "masks": masks_of(callback), "updates": callback.updates}
        weights = {name: value.clone() for name, value in module.state_dict().items()}
        found.append({**seen, "here": here, "weights": weights, "refused": refused})
    return found


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    place = Path(sys.argv[2])
    cases = [("ddp_fork", "grouped"), ("ddp_spawn", "sparse")]
    torch.save({case: fits(*case, place) for case in cases}, place / "found.pt")
