"""Rows of the callbacks carry the step numbers of Lightning's own rows, whatever steps the optimizers."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import Logger
from pytorch_lightning.utilities import rank_zero_only
from support.data import loader
from support.nets import Regression
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from sparse_callbacks import SET, ConstrainedL0, RigL, Static
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Rivals
from sparse_callbacks.testing.runs import Stops, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
QUIET = {"print_plan": False}


class Rows(Logger):
    """Keeps every row as (step, row)."""

    name, version = "rows", 0

    def __init__(self) -> None:
        super().__init__()
        self.rows: list[tuple[int, dict[str, float]]] = []

    @rank_zero_only
    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        assert step is not None
        self.rows.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass

    def steps(self, key: str) -> list[int]:
        return [step for step, row in self.rows if key in row]

    def epochs(self, key: str) -> dict[int, float]:
        return {step: row["epoch"] for step, row in self.rows if key in row}


class Logged(Regression):
    """Logs its loss in training, by epoch, and in validation."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        self.log("loss", loss)
        self.log("epoch_loss", loss, on_step=False, on_epoch=True)
        return loss

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", nn.functional.mse_loss(self.net(batch[0]), batch[1]))

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = LambdaLR(optimizer, lambda step: 0.9**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step", "name": "lr"}}


def fitted(module: pl.LightningModule, callbacks: Any, data: Any, ckpt_path: Any = None, **options: Any) -> Rows:
    rows = Rows()
    given = {"log_every_n_steps": 3, "max_epochs": 2, "logger": rows} | options
    trainer_for(callbacks, **given).fit(module, data, ckpt_path=ckpt_path)
    return rows


@pytest.mark.parametrize("accumulate", [1, 3])
def test_losses_learning_rates_and_sparsities_share_their_steps(accumulate: int) -> None:
    method = Static(0.5, **QUIET)
    # 11 batches: under accumulation the last window of an epoch is a short one
    rows = fitted(
        Logged(), [method, LearningRateMonitor("step")], loader(11), accumulate_grad_batches=accumulate, max_epochs=3
    )
    assert rows.steps("sparsity/total") == rows.steps("loss")
    assert sorted({*rows.steps("lr")}) == rows.steps("loss")
    assert rows.steps("loss") == list(range(2, 33 if accumulate == 1 else 12, 3))
    assert rows.epochs("sparsity/total") == rows.epochs("loss")
    # at the end of a window and not at its first batch, so the next row is Lightning's of the same batch
    for (_, row), (_, following) in pairwise(rows.rows):
        assert "sparsity/total" not in row or "loss" in following


def test_an_update_has_the_step_of_its_batch_and_the_last_row_that_of_the_last_batch() -> None:
    update = RigL(0.5, every=4, stop=100, **QUIET)
    rows = fitted(Logged(), update, loader(8), log_every_n_steps=1)
    # an update of RigL comes in place of a step, which Lightning counts
    assert rows.steps("update/changed") == [0, 5, 10, 15]
    assert rows.steps("sparsity/total") == rows.steps("loss") == [*range(16)]
    gates = fitted(Logged(), ConstrainedL0(0.5, unit="weight", **QUIET), loader(8), log_every_n_steps=5)
    assert gates.steps("l0/expected/total") == [4, 9, 14, 15]  # gates move in every step, so the last one has a row too
    assert gates.epochs("l0/expected/total")[15] == 1
    assert gates.steps("epoch_loss") == [7, 15]


def test_rows_of_validation_and_of_an_epoch_meet_those_of_the_last_batch() -> None:
    rows = Rows()
    trainer_for(SET(0.5, every=8, start=8, stop=100, **QUIET), max_epochs=2, logger=rows, log_every_n_steps=8).fit(
        Logged(), loader(8), loader(2)
    )
    ends = [7, 15]
    assert rows.steps("val_loss") == rows.steps("epoch_loss") == rows.steps("sparsity/total") == ends
    assert rows.steps("update/changed") == ends  # after the 8th step and the 16th


def test_several_callbacks_share_the_steps() -> None:
    pair = [Static(0.5, include="net.0*", **QUIET), SET(0.5, include="net.2*", every=3, stop=50, **QUIET)]
    rows = fitted(Logged(), pair, loader(9))
    assert rows.steps("sparsity/net.0.weight") == rows.steps("loss") == [2, 5, 8, 11, 14, 17]
    assert set(rows.steps("loss")) <= set(rows.steps("sparsity/net.2.weight"))


def test_several_optimizers_that_a_module_steps_by_hand_count_as_one_batch() -> None:
    class Logs(Rivals):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.log("loss", 0.0)

    rows = fitted(Logs(), Static(0.5, **QUIET), Batches(), log_every_n_steps=2)
    assert rows.steps("sparsity/total") == rows.steps("loss") == [1, 3, 5, 7, 9, 11, 13, 15]


def test_windows_that_a_module_accumulates_by_hand_are_numbered_by_batches() -> None:
    class Logs(ByHand):
        def training_step(self, batch: Any, batch_idx: int) -> None:
            super().training_step(batch, batch_idx)
            self.log("loss", 0.0)

    rows = fitted(Logs(window=2), Static(0.5, **QUIET), Batches(), log_every_n_steps=3)
    assert rows.steps("sparsity/total") == rows.steps("loss") == [2, 5, 8, 11, 14]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_resumed_run_goes_on_with_the_steps_of_the_whole_one(accumulate: int, tmp_path: Path) -> None:
    def rows_of(*more: Any, ckpt_path: Any = None) -> Rows:
        method = SET(0.5, every=2, stop=100, **QUIET)
        options = {"log_every_n_steps": 2, "accumulate_grad_batches": accumulate, "max_epochs": 3}
        return fitted(Logged(), [method, *more], loader(6), ckpt_path=ckpt_path, **options)

    stops = Stops(tmp_path, (4, 6, 8))
    whole = rows_of(stops)
    for after in stops.after:
        resumed = rows_of(ckpt_path=stops.path(after))
        first = after // accumulate
        for key in ("sparsity/total", "update/changed", "loss"):
            assert resumed.steps(key) == [step for step in whole.steps(key) if step >= first], (after, key)


def test_a_second_fit_has_rows_from_its_beginning() -> None:
    method = Static(0.5, **QUIET)
    module = Logged()
    first, second = (fitted(module, method, loader(3), max_epochs=1) for _ in range(2))
    assert first.steps("sparsity/total") == second.steps("sparsity/total") == [2]
