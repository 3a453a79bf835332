"""The run's length where a schedule changes how many batches make an optimizer step."""

import importlib
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EarlyStopping, GradientAccumulationScheduler, LambdaCallback
from support.data import loader
from support.nets import Regression
from torch import nn

from sparse_callbacks import CTRE, DPF, GMP, SET, DoctorWarning, GaP, ParallelGaP, RigL, SparsityCallback, horizon
from sparse_callbacks.lightning import accumulation
from sparse_callbacks.testing.comparison import differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, double_mlp
from sparse_callbacks.testing.runs import Stops, trainer_for


class Computed(GradientAccumulationScheduler):
    """Its factor grows with every epoch."""

    def get_accumulate_grad_batches(self, epoch: int) -> int:
        return epoch + 1


def schedule(factors: dict[int, int]) -> GradientAccumulationScheduler:
    return GradientAccumulationScheduler(dict(factors))


def rigl(**more: Any) -> RigL:
    return RigL(0.5, every=2, print_plan=False, **more)


RUNS: dict[str, tuple[int, list[Any], dict[str, Any]]] = {
    "epochs": (16, [schedule({0: 1, 1: 4})], {"max_epochs": 4}),
    "several changes": (16, [schedule({0: 1, 1: 4, 3: 2})], {"max_epochs": 5}),
    "a first epoch that is not named": (16, [schedule({2: 8})], {"max_epochs": 4}),
    "a short last window": (7, [schedule({0: 2, 2: 4})], {"max_epochs": 4}),
    "fewer batches than a window": (3, [schedule({0: 1, 1: 8})], {"max_epochs": 6}),
    "steps": (16, [schedule({0: 1, 1: 4})], {"max_steps": 30}),
    "steps before epochs": (16, [schedule({0: 1, 1: 4})], {"max_steps": 21, "max_epochs": 9}),
    "epochs before steps": (16, [schedule({0: 1, 1: 4})], {"max_steps": 500, "max_epochs": 3}),
    "no end but steps": (16, [schedule({0: 4, 1: 2})], {"max_steps": 30, "max_epochs": -1}),
    "limited": (16, [schedule({0: 1, 1: 4})], {"max_epochs": 4, "limit_train_batches": 0.5}),
    "at least": (16, [schedule({0: 1, 1: 4})], {"max_epochs": 4, "min_epochs": 2, "min_steps": 3}),
    "a subclass": (12, [Computed({0: 1})], {"max_epochs": 4}),
    "the last of two": (16, [schedule({0: 8}), schedule({0: 1, 1: 4})], {"max_epochs": 3}),
    "the same everywhere": (16, [schedule({0: 4})], {"max_epochs": 3}),
    "a trial": (16, [schedule({0: 1, 1: 4})], {"fast_dev_run": 4}),
}


@pytest.mark.combinations
@pytest.mark.parametrize("first", [True, False], ids=["before the schedule", "behind the schedule"])
@pytest.mark.parametrize("case", RUNS)
@pytest.mark.filterwarnings("ignore")
def test_the_length_of_the_run_is_that_of_its_epochs_together(case: str, first: bool, tmp_path: Path) -> None:
    batches, schedules, options = RUNS[case]
    found: list[float] = []

    class Asked(Regression):
        def on_train_epoch_start(self) -> None:
            found.append(horizon(self.trainer))

        def on_train_batch_end(self, *_: Any) -> None:
            found.append(horizon(self.trainer))

    callback = rigl(stop=1.0)
    listed = [callback, *schedules] if first else [*schedules, callback]
    trainer = trainer_for(listed, tmp_path, **options)
    trainer.fit(Asked(), loader(batches))
    assert set(found) == {trainer.global_step}
    assert callback.times.stop == trainer.global_step


@pytest.mark.parametrize("package", ["pytorch_lightning", "lightning.pytorch"])
@pytest.mark.parametrize("make", [GMP, DPF, GaP], ids=lambda m: m.__name__)
def test_the_target_is_reached_within_the_run_under_both_lightnings(make: Any, package: str, tmp_path: Path) -> None:
    lightning = importlib.import_module(package)

    class Module(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 6))

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    callback = make(0.8, print_plan=False, **({"partitions": 2} if make is GaP else {}))
    factors = lightning.callbacks.GradientAccumulationScheduler({0: 1, 1: 4})
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=8,
        accelerator="cpu",
        callbacks=[callback, factors],
        enable_checkpointing=False,
        default_root_dir=tmp_path,
        **quiet,
    )
    trainer.fit(Module(), loader(16))
    assert trainer.global_step == 44
    assert callback.times.stop <= 33
    assert callback.at_target


@pytest.mark.parametrize("batch", [8, 13, 16, 22], ids=["first epoch", "inside", "its end", "inside a window"])
def test_a_resumed_run_accumulates_as_the_schedule_says(batch: int, tmp_path: Path) -> None:
    def fitted(*more: pl.Callback, path: Path | None = None) -> Any:
        callback, module = RigL(0.5, every=2, print_plan=False), Classifier(double_mlp())
        callbacks = [callback, schedule({0: 1, 1: 4, 2: 2}), *more]
        trainer = trainer_for(callbacks, tmp_path, max_epochs=4)
        trainer.fit(module, Batches(), ckpt_path=path)
        return snapshot(trainer, module, callback)

    stops = Stops(tmp_path, (batch,))
    whole = fitted(stops)
    assert differences(whole, fitted(path=stops.path(batch))) == []


@pytest.mark.parametrize(
    "make",
    [
        lambda: GaP(0.5, partitions=2, epochs=1, print_plan=False),
        lambda: CTRE(0.5, print_plan=False),
        lambda: ParallelGaP(0.5, partitions=2, epochs=1, print_plan=False),
    ],
    ids=["GaP", "CTRE", "ParallelGaP"],
)
def test_times_in_epochs_of_different_lengths_are_refused(make: Any, tmp_path: Path) -> None:
    module = Classifier(double_mlp())
    trainer = trainer_for([make(), schedule({0: 1, 1: 4})], tmp_path, max_epochs=4)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"epochs of this run have 8, 2 optimizer steps, as GradientAccumulation"):
        trainer.fit(module, Batches())
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


@pytest.mark.filterwarnings("ignore")
def test_times_in_epochs_hold_where_the_factor_changes_behind_the_end(tmp_path: Path) -> None:
    callback = GaP(0.5, partitions=2, epochs=1, print_plan=False)
    trainer = trainer_for([callback, schedule({0: 2, 5: 4})], tmp_path, max_epochs=4)
    trainer.fit(Classifier(double_mlp()), Batches())
    assert callback.times.times() == [4, 0, 8]


def test_a_loader_without_a_length_is_endless(tmp_path: Path) -> None:
    trainer = trainer_for([schedule({0: 1, 1: 4})], tmp_path, max_epochs=4)
    trainer.fit_loop.setup_data = lambda: None  # type: ignore[method-assign]
    assert trainer.num_training_batches == math.inf
    assert accumulation.run_length(trainer) == accumulation.epoch_length(trainer) == math.inf


# ---------------------------------------------------------------------- words where nobody could know


class Changes(Regression):
    """Accumulates more from epoch 1 on, by a hook of its own."""

    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            self.trainer.accumulate_grad_batches = 4


def words(callback: SparsityCallback, module: pl.LightningModule, *others: pl.Callback, **options: Any) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_for([callback, *others], None, **options).fit(module, loader(16))
    told = [w for w in caught if w.category is not DoctorWarning]  # it speaks of the batches, which are tiny
    return [str(w.message) for w in told if type(callback).__name__ in str(w.message)]


@pytest.mark.parametrize("make", [RigL, SET], ids=lambda m: m.__name__)
def test_a_factor_that_a_hook_changes_is_told_when_it_changes_and_at_the_end(make: Any) -> None:
    during, after = words(make(0.5, every=2, print_plan=False), Changes(), max_epochs=8)
    assert "accumulate_grad_batches is 4 from epoch 1 on and was 1" in during
    assert "about 28 optimizer steps are left of the run, and the last update is due in 8" in during
    assert f"{make.__name__} ended in the middle of its updates" in after


def test_a_factor_that_changes_in_each_epoch_is_told_once_a_fit() -> None:
    def more(trainer: Any, *_: Any) -> None:
        trainer.accumulate_grad_batches = 2 + trainer.current_epoch

    callback = rigl(stop=120)
    for _ in range(2):
        told = words(callback, Regression(), LambdaCallback(on_train_epoch_start=more), max_epochs=8)
        assert ["accumulate_grad_batches is" in text for text in told].count(True) == 1


def test_a_factor_that_changes_behind_the_last_update_needs_no_word() -> None:
    assert words(rigl(stop=14), Changes(), max_epochs=8) == []


def test_a_run_that_the_user_ends_early_needs_no_word() -> None:
    class Diverging(Regression):
        def on_train_epoch_end(self) -> None:
            self.log("loss", float(self.current_epoch))

    stopping = EarlyStopping("loss", patience=1)
    assert words(rigl(), Diverging(), stopping, max_epochs=8) == []

    def stop(trainer: Any, *_: Any) -> None:
        trainer.should_stop = trainer.global_step == 20

    assert words(rigl(), Regression(), LambdaCallback(on_train_batch_end=stop), max_epochs=8) == []
    assert words(rigl(stop=1.0), Regression(), max_epochs=2) == []


def test_a_stop_behind_the_end_is_told_at_the_end() -> None:
    (text,) = words(rigl(stop=500), Regression(), max_epochs=2)
    assert "and the last update is due at step 500. Where the run was to end here, give an earlier stop=" in text
