"""The rows that layers see are found out by a training step too, of a copy that leaves no trace."""

from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.utilities import CombinedLoader
from support.exchanged import random_numbers
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks.lightning.seen_rows import seen_rows
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.runs import trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Pair(pl.LightningModule):
    """Has no ``forward``; its step logs, draws random numbers and keeps a list."""

    def __init__(self, shows: bool = False) -> None:
        super().__init__()
        self.body, self.head, self.shows = nn.Linear(50, 8), nn.Linear(8, 4), shows
        self.losses: list[float] = []

    def training_step(self, batch: Any) -> Any:
        if self.shows:
            logger: Any = self.logger
            logger.experiment.add_text("loss", "of a step")
        x, y = batch
        loss = nn.functional.cross_entropy(self.head(self.body(x.flatten(1)).relu()), y) + 0 * torch.rand(1).sum()
        self.log("loss", loss)
        self.losses.append(float(loss.detach()))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def shuffled(size: int) -> DataLoader[Any]:
    data = Batches(size=12)
    return DataLoader(TensorDataset(data.x, data.y), batch_size=size, shuffle=True)


def found_rows(module: Pair, *callbacks: Any, loader: Any = None) -> Any:
    """What is known of the rows when the fit exchanges layers."""
    rows: list[Any] = []

    class Looks(pl.Callback):
        def setup(self, trainer: Any, module: Any, stage: str) -> None:
            before = random_numbers()
            rows.append(seen_rows(trainer, module))
            assert before == random_numbers()

    trainer_for([Looks(), *callbacks], max_epochs=1).fit(module, shuffled(12) if loader is None else loader)
    return rows[0]


def test_rows_of_a_module_without_forward_are_those_of_a_training_step_of_a_copy() -> None:
    module = Pair()
    parameters = list(module.parameters())
    kept: list[Any] = []
    start = pl.callbacks.LambdaCallback(on_train_start=lambda *_: kept.append(list(module.losses)))
    assert found_rows(module, start) == {"body": 12, "head": 12}
    assert kept == [[]]
    assert all(a is b for a, b in zip(parameters, module.parameters(), strict=True))
    assert module.trainer is not None


def test_the_step_of_the_copy_reaches_no_logger() -> None:
    written: list[str] = []

    class Shows(Pair):
        @property
        def logger(self) -> Any:
            assert self.trainer
            return SimpleNamespace(experiment=SimpleNamespace(add_text=lambda *_: written.append("text")))

    module = Shows(shows=True)
    assert found_rows(module) == {}  # such a step cannot be run apart
    assert len(written) == len(module.losses) > 0


class OfSeveral(Pair):
    """Its step has a batch of each of two loaders."""

    def training_step(self, batch: Any) -> Any:
        first, second = batch.values() if isinstance(batch, dict) else batch
        return super().training_step([torch.cat(pair) for pair in zip(first, second, strict=True)])


@pytest.mark.parametrize(
    "make",
    [
        lambda: {"small": shuffled(5), "large": shuffled(12)},
        lambda: [shuffled(5), shuffled(12)],
        lambda: CombinedLoader({"small": shuffled(5), "large": shuffled(12)}, "min_size"),
    ],
)
def test_a_step_sees_a_batch_of_each_of_several_loaders(make: Any) -> None:
    assert found_rows(OfSeveral(), loader=make()) == {"body": 17, "head": 17}


def test_one_loader_of_several_that_shows_no_batch_leaves_the_rows_unknown() -> None:
    stream = iter([(torch.zeros(5, 2, 5, 5), torch.zeros(5, dtype=torch.long))])
    assert found_rows(OfSeveral(), loader={"stream": stream, "large": shuffled(12)}) == {}
