"""A short training on scikit-learn's handwritten digits that keeps the masks of every epoch."""

import inspect
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparse_callbacks

STEPS = 21
"""Optimizer steps of an epoch: batches of 64 out of 1,344 images."""
EPOCHS = 40
SPARSITY = 0.9
# Every update of a schedule falls once into an epoch. Learning rates of gates and the lengths of phases are those of a run of 840 steps.
_COMMON: Mapping[str, Any] = {"sparsity": SPARSITY, "every": STEPS, "print_plan": False}
_ONE_UPDATE_REPLACES_A_STEP = {"every": STEPS - 1}


class Digits(pl.LightningModule):
    """64 pixels, 256 and 128 hidden units, ten classes."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)


@dataclass(frozen=True)
class Recorded:
    """The masks of a run.

    Attributes:
        method: the class of the method.
        masks: for the start and the end of every epoch, bool masks by parameter name.
    """

    method: str
    masks: list[dict[str, Tensor]]

    @property
    def epochs(self) -> int:
        return len(self.masks) - 1

    def layer(self, epoch: int) -> Tensor:
        """The mask of the layer that reads the pixels: bool [256, 64]."""
        return self.masks[epoch]["net.0.weight"]

    def units(self, epoch: int) -> Tensor:
        """Whether each unit of the first hidden layer reads and is read: bool [256]."""
        return self.layer(epoch).any(1) & self.masks[epoch]["net.2.weight"].any(0)

    def sparsity(self) -> list[float]:
        """The share of zeros in all masks, for each time."""
        return [1 - sum(int(m.sum()) for m in each.values()) / self._size for each in self.masks]

    def changes(self) -> tuple[list[float], list[float]]:
        """(grown, dropped) in every epoch: weights that became active and that ceased to be, as shares of all weights."""
        grown, dropped = [], []
        for before, after in zip(self.masks, self.masks[1:], strict=False):
            grown.append(sum(int((after[n] & ~before[n]).sum()) for n in after) / self._size)
            dropped.append(sum(int((before[n] & ~after[n]).sum()) for n in after) / self._size)
        return grown, dropped

    @property
    def _size(self) -> int:
        return sum(mask.numel() for mask in self.masks[0].values())


class _MaskRecorder(pl.Callback):
    def __init__(self, method: Any) -> None:
        self.method, self.masks = method, list[dict[str, Tensor]]()

    def _keep(self) -> None:
        self.masks.append({name: mask.clone() for name, mask in self.method.masks.items()})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._keep()

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        self._keep()


def method_named(name: str) -> Any:
    """A callback of the class with arguments that suit this run; a method that is not named here has its defaults."""
    own: dict[str, Any] = {
        "RigL": _ONE_UPDATE_REPLACES_A_STEP,
        "NM": {"every": None},
        "GaP": {"every": None, "epochs": 5, "rounds": 2},
        "ParallelGaP": {"epochs": 4, "rounds": 2},
        "ConstrainedL0": {"density": 0.3, "gate_lr": 0.02, "dual_lr": 0.03},
        "SupTickets": {"share": 0.3, "cycles": 3},
    }.get(name, {})
    if name == "SupTickets":
        own["base"] = method_named("RigL")
    found = getattr(sparse_callbacks, name)
    taken = inspect.signature(found).parameters
    given = {key: value for key, value in {**_COMMON, **own}.items() if key in taken or key == "print_plan"}
    if name == "SupTickets":  # the base has it
        given.pop("print_plan")
    return found(**given)


def recorded_run(name: str, epochs: int = EPOCHS) -> Recorded:
    """Train the network with a method, on one thread.

    Args:
        name: a class of ``sparse_callbacks.methods``.
        epochs: how long.
    """
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    images, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels))
    loader = DataLoader(torch.utils.data.Subset(data, range(64 * STEPS)), batch_size=64, shuffle=True)
    method = method_named(name)
    recorder = _MaskRecorder(method)
    module = Digits()
    module.example_input_array = torch.zeros(1, 64)
    with _quiet():
        trainer = pl.Trainer(
            max_epochs=epochs, callbacks=[method, recorder], accelerator="cpu", logger=False, enable_checkpointing=False,
            enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        trainer.fit(module, loader)
    return Recorded(name, recorder.masks)


@contextmanager
def _quiet() -> Iterator[None]:
    """Lightning tells nothing, and nobody warns."""
    logs = [logging.getLogger(name) for name in ("pytorch_lightning", "lightning.pytorch")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)
