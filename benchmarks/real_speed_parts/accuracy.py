"""Test accuracy at equal epochs: masked and sparse storage alike, and what groups cost."""

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from real_speed_parts.networks import GROUP
from sparse_callbacks import RigL
from sparse_callbacks.tasks.classifier import Classifier, Optim
from sparse_callbacks.tasks.data.module import MemoryData, torchvision_set
from sparse_callbacks.tasks.data.tabular import tabular
from sparse_callbacks.tasks.models import mlp

SPARSITIES = (0.9, 0.95)
STORAGES = ("masked", "sparse", "grouped")
WIDTH = 512
# title, data, shape, epochs for one of the other set, steps between updates; batches of 100, of which Isolet has eleven
SETS: dict[str, tuple[str, Callable[[Path, int], MemoryData], tuple[int, ...], int, int]] = {
    "fashion_mnist": (
        "Fashion-MNIST",
        lambda root, seed: torchvision_set("fashion_mnist", str(root), seed=seed),
        (1, 28, 28),
        1,
        100,
    ),
    "isolet": ("Isolet", lambda root, seed: tabular("tabular/Isolet.mat", str(root), seed=seed), (617,), 5, 20),
}
ABOUT = (
    "An MLP with three hidden layers of 512, RigL with `rescale='layer'` and an update in every 100 steps (Isolet: 20), the "
    "same sparsity in all layers but the last, SGD from 0.05 with momentum and a cosine to 0; Isolet has five times as many "
    "epochs as Fashion-MNIST. Test accuracy in percent, mean over seeds, with the lowest and the highest."
)
Row = dict[str, Any]


def test_accuracy(name: str, root: Path, storage: str, sparsity: float, seed: int, epochs: int) -> float:
    """The test accuracy of one run."""
    _, data_of, shape, factor, every = SETS[name]
    pl.seed_everything(seed, verbose=False)
    data = data_of(root, seed)
    model = mlp(shape, data.num_classes, hidden=[WIDTH] * 3)
    module = Classifier(model, data.num_classes, Optim(lr=0.05))
    callbacks = []
    if storage != "dense":
        callbacks = [
            RigL(
                sparsity, distribution="uniform", keep_dense="last", every=every, rescale="layer", seed=seed, storage=storage,
                group=GROUP, rows=data.batch_size, print_plan=False,
            )
        ]  # fmt: skip
    trainer = pl.Trainer(
        max_epochs=epochs * factor, callbacks=callbacks, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0,
    )  # fmt: skip
    trainer.fit(module, datamodule=data)
    (found,) = trainer.test(module, datamodule=data, verbose=False)
    return 100 * found["test/acc"]


def measure(root: Path, seeds: int, epochs: int) -> Iterator[Row]:
    """One row for each set, sparsity and storage."""
    for name in SETS:
        for storage, sparsity in [("dense", 0.0), *((storage, s) for s in SPARSITIES for storage in STORAGES)]:
            found = [test_accuracy(name, root, storage, sparsity, seed, epochs) for seed in range(seeds)]
            yield {
                "set": name,
                "storage": storage,
                "sparsity": sparsity,
                "epochs": epochs * SETS[name][3],
                "accuracy": found,
            }


def table(rows: list[Row]) -> str:
    """A line for each set and sparsity."""
    lines = ["| data, epochs | sparsity | dense | masked | sparse | grouped |", "| --- | --- | --- | --- | --- | --- |"]
    found = {(row["set"], row["sparsity"], row["storage"]): row for row in rows}
    for name, sparsity in dict.fromkeys((row["set"], row["sparsity"]) for row in rows if row["storage"] != "dense"):
        cells = [spread(found[name, 0.0, "dense"]["accuracy"])]
        cells += [spread(found[name, sparsity, storage]["accuracy"]) for storage in STORAGES]
        epochs = found[name, 0.0, "dense"]["epochs"]
        lines.append(f"| {SETS[name][0]}, {epochs} | {sparsity:g} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    return f"{statistics.mean(values):.2f} ({min(values):.2f} to {max(values):.2f})"
