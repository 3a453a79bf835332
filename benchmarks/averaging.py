"""Sparsity and accuracy of averaged weights under moving masks, by Lightning's averaging alone and beside our callbacks.

    python benchmarks/averaging.py

Every method trains a small convolutional network on scikit-learn's digits, once with EMAWeightAveraging and once with
StochasticWeightAveraging. "Lightning" is the same run with our handling of averages switched off, which is what the two
callbacks do to each other by themselves; "ours" is the run as it is. Numbers are zeros in the averages that the
callback holds and, in brackets, the test accuracy of the network after the fit. It takes about a minute.
"""

import argparse
import logging
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import CTRE, DPF, GMP, SET, SMCP, SNFS, ConstrainedL0, GaP, RigL, SparsityCallback, Static

EPOCHS, SPARSITY, SWA_FROM = 8, 0.9, 4
TIMES: Mapping[str, Any] = {"every": 10, "stop": 0.75}

METHODS: Mapping[str, Callable[[], SparsityCallback]] = {
    "Static": lambda: Static(SPARSITY, print_plan=False),
    "SET": lambda: SET(SPARSITY, **TIMES, print_plan=False),
    "RigL": lambda: RigL(SPARSITY, **TIMES, print_plan=False),
    "SNFS": lambda: SNFS(SPARSITY, **TIMES, print_plan=False),
    "CTRE": lambda: CTRE(SPARSITY, **TIMES, print_plan=False),
    "GMP": lambda: GMP(SPARSITY, **TIMES, print_plan=False),
    "DPF": lambda: DPF(SPARSITY, **TIMES, print_plan=False),
    "GaP": lambda: GaP(SPARSITY, partitions=3, restart=False, print_plan=False),
    "SMCP": lambda: SMCP(budget=0.4, round_to=1, **TIMES, print_plan=False),
    "ConstrainedL0": lambda: ConstrainedL0(0.4, gate_lr=0.05, dual_lr=0.05, print_plan=False),
}
AVERAGING: Mapping[str, Callable[[], Any]] = {
    "EMA": lambda: EMAWeightAveraging(decay=0.95),
    "SWA": lambda: StochasticWeightAveraging(0.05, swa_epoch_start=SWA_FROM),
}


class Digits(pl.LightningModule):
    """A small convolutional network."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(
            nn.Conv2d(1, 12, 3, padding=1),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
            nn.Linear(384, 10),
        )

    def forward(self, x: Tensor) -> Any:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)


def data() -> tuple[TensorDataset, tuple[Tensor, Tensor]]:
    """Images [n, 1, 8, 8] and labels, to train and to test with."""
    digits = load_digits()
    x = torch.tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    y = torch.tensor(digits.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, test = order[:1400], order[1400:]
    return TensorDataset(x[train], y[train]), (x[test], y[test])


def run(method: str, averaging: str, ours: bool) -> tuple[float, float, float]:
    """Sparsity by the masks, fraction of zeros in the averages, and the network's test accuracy, all in percent."""
    torch.manual_seed(0)
    train, (x, y) = data()
    callback, averager, module = METHODS[method](), AVERAGING[averaging](), Digits()
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        callbacks=[callback, averager],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    # nobody averages then, as far as our callback can tell
    alone = patch("sparse_callbacks.lightning.averaging._is_a", return_value=False)
    with nullcontext() if ours else alone:
        trainer.fit(module, DataLoader(train, batch_size=70, shuffle=True))
    held = getattr(averager._average_model, "module", averager._average_model)
    averages = [held.get_parameter(name).detach() for name in callback.masks]
    size = sum(average.numel() for average in averages)
    zeros = size - sum(int(average.count_nonzero()) for average in averages)
    by_masks = sum(int((~m).sum()) for m in callback.masks.values())
    with torch.no_grad():
        right = (module.eval()(x).argmax(1) == y).double().mean()
    return 100 * by_masks / size, 100 * zeros / size, 100 * float(right)


def table(methods: list[str]) -> list[str]:
    """The rows of the table in Markdown."""
    heads = [f"{a}, {who}" for a in AVERAGING for who in ("Lightning", "ours")]
    rows = [f"| method | by the masks | {' | '.join(heads)} |", "| --- |" + " ---: |" * (len(heads) + 1)]
    for method in methods:
        cells, found = [], []
        for averaging in AVERAGING:
            for ours in (False, True):
                by_masks, zeros, accuracy = run(method, averaging, ours)
                cells.append(f"{zeros:.1f} ({accuracy:.1f})")
            found.append(f"{by_masks:.1f}")  # of our own; gates end elsewhere under another schedule
        rows.append(f"| {method} | {' and '.join(dict.fromkeys(found))} | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="*", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--out", type=Path, help="also write the table into this file")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    for name in ("pytorch_lightning", "lightning.pytorch"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)
    logging.getLogger("pytorch_lightning.utilities.rank_zero").setLevel(logging.ERROR)
    rows = table(options.methods)
    print("\n" + "\n".join(rows))
    if options.out is not None:
        options.out.write_text("\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
