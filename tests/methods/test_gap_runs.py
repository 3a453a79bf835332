"""GaP in a run: new optimizers for each phase, a resume from any step, times, skipped steps."""

import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.gap import Restarting, gap
from support.inside import skipped_steps
from support.nets import mlp
from torch import Tensor, nn

from sparse_callbacks.lightning.optimizer_lives import horizon
from sparse_callbacks.testing.comparison import assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import OPTIMIZERS, Classifier, double_mlp
from sparse_callbacks.testing.runs import fit, watch

# ---------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("restart", [True, False])
def test_optimizers_and_rates_start_anew_or_go_on(restart: bool, tmp_path: Path) -> None:
    module, callback = Restarting(double_mlp()), gap(2, every=3, restart=restart)
    found: list[tuple[int, float, bool]] = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            found.append((id(optimizer), optimizer.param_groups[0]["lr"], bool(optimizer.state)))
            assert optimizer is trainer.optimizers[0]
            assert optimizer is trainer.lr_scheduler_configs[0].scheduler.optimizer
            if not restart and callback.step == 3:
                second = module.net[3].weight
                momentum = optimizer.state[second]["momentum_buffer"]
                assert not momentum[~(second.detach() != 0)].any()  # what was just grown
                assert momentum.any()

    fit(module, callback, Look(), watch(lambda t, m, _: assert_effective(m, callback)), max_epochs=1)
    fresh = [i for i, (_, _, has_state) in enumerate(found) if not has_state]
    assert fresh == ([0, 3, 6] if restart else [0])
    assert [i for i, (_, rate, _) in enumerate(found) if rate == 0.05] == fresh
    assert module.horizons == ([3, 3, 2] if restart else [8])
    assert callback.engine.restart_wanted is False


def test_the_horizon_is_the_phase_s_at_any_time(tmp_path: Path) -> None:
    module, callback, told = Restarting(double_mlp(), lazy=True), gap(2, every=3), []
    fit(module, callback, watch(lambda t, *_: told.append(horizon(t))), max_epochs=1)
    assert told == [3, 3, 3, 3, 3, 3, 2, 2]  # those at a boundary speak of the optimizers at hand
    assert all(isinstance(x, int) for x in told)


def test_two_callbacks_on_their_own_layers_share_the_restarts(tmp_path: Path) -> None:
    module = Restarting(nn.Sequential(nn.Flatten(), *mlp(50, 12, 10, 8, 4)).double())
    both = [gap(2, every=3, include=["net.1.*", "net.3.*"]), gap(2, every=2, include=["net.5.*", "net.7.*"])]
    fit(module, *both, watch(lambda t, m, _: assert_effective(m, *both)), max_epochs=1)
    assert module.horizons == [2, 1, 1, 2, 2]  # until the next boundary of either: steps 2, 3, 4, 6 and the end
    assert all(c.at_target for c in both)


class Pair(Restarting):
    """Manual optimization: one optimizer for each matrix, both stepped every batch."""

    def __init__(self) -> None:
        super().__init__(double_mlp())
        self.automatic_optimization = False
        self.between: Any = lambda: None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            self.between()

    def configure_optimizers(self) -> Any:
        self.horizons.append(horizon(self.trainer))
        return [OPTIMIZERS["sgd"](self.net[1].parameters()), OPTIMIZERS["adamw"](self.net[3].parameters())]


def test_several_optimizers_restart_together(tmp_path: Path) -> None:
    module, callback, stateless = Pair(), gap(2, every=3), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert_effective(module, callback)
            stateless.append([len(o.state) == 0 for o in trainer.optimizers])

        def on_before_backward(self, trainer: Any, *_: Any) -> None:
            stateless[-1:] = [*stateless[-1:], [len(o.state) == 0 for o in trainer.optimizers]]

    fit(module, Look(), callback, max_epochs=1)
    assert [all(x) for x in stateless[0::2]] == [step in (0, 3, 6) for step in range(8)]
    assert module.horizons == [3, 3, 2]
    assert callback.at_target


def test_each_optimizer_moves_the_masks_of_its_own_parameters() -> None:
    module, callback, dense = Pair(), gap(2, every=3), []
    module.between = lambda: dense.append([bool(m.all()) for m in callback.masks.values()])
    fit(module, callback, max_epochs=1)
    assert dense[0:4] == [[True, False]] * 4
    assert dense[4:6] == [
        [False, False],
        [False, True],
    ]  # the first optimizer has taken its third step, then the second one
    assert dense[10:12] == [[False, True], [False, False]]


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize(("optimizer", "lazy", "window"), [("sgd", False, 1), ("adamw", True, 1), ("sgd", True, 2)])
def test_a_run_resumes_bitwise_from_every_batch(optimizer: str, lazy: bool, window: int, tmp_path: Path) -> None:
    """Phases of three steps: some of these batches lie between a boundary and the restart at the next batch."""

    def run(path: Path | None = None, save: bool = False) -> Any:
        torch.manual_seed(5 if path else 0)
        module, callback = (
            Restarting(double_mlp(seed=3 if path else 0), optimizer, lazy),
            gap(2, every=3, rounds=2 // window),
        )
        keep = watch(lambda t, m, done: t.save_checkpoint(tmp_path / f"{done}.ckpt") if save else None)
        options = {"max_epochs": 2, "accumulate_grad_batches": window, "ckpt_path": path}
        trainer = fit(module, callback, keep, **options)
        return snapshot(trainer, module, callback) | {"horizon": horizon(trainer)}

    whole = run(save=True)
    for done in range(15):
        if done == 7:  # the epoch's last batch: Lightning would leave out what follows it
            continue
        assert not differences(whole, run(tmp_path / f"{done}.ckpt")), done


def test_a_resumed_run_does_not_make_its_loader_early(tmp_path: Path) -> None:
    class Order(Batches):
        made: list[int] = []

        def __iter__(self) -> Any:
            Order.made.append(0)
            return super().__iter__()

    path = tmp_path / "mid.ckpt"
    module, callback = Restarting(double_mlp()), gap(2, every=3)
    fit(module, callback, watch(lambda t, m, done: t.save_checkpoint(path) if done == 4 else None), max_epochs=1)
    loader, again, resumed = Batches(), Restarting(double_mlp()), gap(2, every=3)
    begun = []
    again.on_fit_start = lambda: begun.append(getattr(again.trainer.fit_loop, "_combined_loader", None))
    fit(again, resumed, loader=loader, max_epochs=1, ckpt_path=path)
    assert begun == [None]
    assert again.horizons == [3, 2]  # the phase that it was saved in, and fine-tuning
    assert resumed.step == 8


def test_a_fresh_start_does_not_ask_the_checkpoint(tmp_path: Path) -> None:
    class Asks(Classifier):
        def configure_optimizers(self) -> Any:
            told.append(horizon(self.trainer))
            return OPTIMIZERS["sgd"](self.parameters())

    told: list[float] = []
    path = tmp_path / "end.ckpt"
    fit(Asks(double_mlp()), gap(2, every=3), watch(lambda t, m, d: t.save_checkpoint(path) if d == 6 else None))
    assert told == [3, 3, 10]
    told.clear()
    fit(Asks(double_mlp()), gap(2, every=3, fresh_start=True), ckpt_path=path)
    assert told[:2] == [3, 3]


def test_a_longer_run_gives_the_resumed_fine_tuning_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    fit(
        Restarting(double_mlp()),
        gap(2, every=3),
        watch(lambda t, m, d: t.save_checkpoint(path) if d == 2 else None),
        max_epochs=1,
    )
    again = Restarting(double_mlp())
    fit(again, gap(2, every=3), max_epochs=3, ckpt_path=path)
    assert again.horizons == [3, 3, 18]


def test_a_second_fit_goes_on_where_the_first_one_ended(tmp_path: Path) -> None:
    module, callback = Restarting(double_mlp()), gap(2, every=4)
    trainer = fit(module, callback, max_steps=10, max_epochs=-1)
    assert module.horizons == [4, 4, 2]
    del trainer
    fit(module, callback, max_epochs=1)
    assert module.horizons == [4, 4, 2, 8]  # fine-tuning, a whole run long
    assert callback.step == 18


# ---------------------------------------------------------------------- times


def times(steps: int, **options: Any) -> list[int]:
    callback, window = gap(**({"partitions": 2} | options.pop("method", {}))), options.pop("window", 1)
    fit(Classifier(double_mlp()), callback, max_epochs=-1, max_steps=steps, accumulate_grad_batches=window, **options)
    return callback.times.times()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, [12, 0, 24]),  # three quarters of 32 steps in two phases
        ({"rounds": 3}, [4, 0, 24]),
        ({"rounds": 5}, [2, 0, 20]),  # rounded down to whole steps
        ({"finetune": 21}, [10, 0, 20]),
        ({"finetune": 1.0}, [16, 0, 32]),
        ({"every": 0.25}, [8, 0, 16]),
        ({"every": 16}, [16, 0, 32]),
        ({"epochs": 1}, [8, 0, 16]),
        ({"epochs": 0.5, "rounds": 2}, [4, 0, 16]),
    ],
)
def test_phases_are_given_in_epochs_steps_or_shares(method: dict[str, Any], expected: list[int]) -> None:
    assert times(32, method=method) == expected


def test_epochs_count_optimizer_steps() -> None:
    assert times(12, method={"epochs": 1}, window=2) == [4, 0, 8]


def test_an_endless_run_takes_phases_in_steps_and_fine_tunes_forever() -> None:
    module, callback, told = Restarting(double_mlp(), lazy=True), gap(2, every=3), []

    def stop(trainer: Any, module: Any, done: int) -> None:
        told.append(horizon(trainer))
        trainer.should_stop = done >= 8

    fit(module, callback, watch(stop), max_epochs=-1, max_steps=-1, min_steps=1)
    assert callback.at_target
    assert told[-1] == math.inf
    with pytest.raises(ValueError, match="fraction of a run whose length is not known"):
        fit(Classifier(double_mlp()), gap(2), max_epochs=-1, max_steps=-1)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        (
            {"every": 17},
            r"2 phases \(rounds= times partitions=\) of 17 optimizer steps each do not fit a run of 32 steps, with every=17",
        ),
        ({"epochs": 3}, "2 phases .* of 24 optimizer steps each do not fit a run of 32 steps, with epochs=3"),
        ({"rounds": 20}, "40 phases .* of 0 optimizer steps each do not fit a run of 32 steps, with finetune=0.75"),
        ({"finetune": 40}, "do not fit a run of 32 steps, with finetune=40"),
        ({"finetune": 33}, "2 phases .* of 16 optimizer steps each do not fit a run of 32 steps, with finetune=33"),
    ],
)
def test_a_calendar_longer_than_the_run_is_refused(method: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        times(32, method=method)


def test_epochs_of_unknown_length_are_refused() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([(x, y) for x, y in Batches().all(1)])

    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(
        ValueError, match=r"epochs=1 cannot be counted in steps: the train loader has no length\. .* every=1000"
    ):
        fit(Classifier(double_mlp()), gap(2, epochs=1), loader=stream, max_epochs=-1, max_steps=20)
    callback = gap(2, every=2)
    fit(Restarting(double_mlp()), callback, loader=stream, max_epochs=-1, max_steps=6)
    assert callback.at_target


def test_a_trial_run_cuts_instead_of_refusing() -> None:
    for method in ({"every": 100}, {"epochs": 30}, {"rounds": 9}, {}):
        callback = gap(2, **method)
        fit(Restarting(double_mlp()), callback, fast_dev_run=True)
        assert callback.step == 1


def test_a_run_that_ends_in_a_phase_says_so() -> None:
    callback = gap(2, every=8)
    with pytest.warns(UserWarning, match=r"GaP ended after 5 steps, in phase 0 of 2 .* with partition 0 still dense"):
        fit(Classifier(double_mlp()), callback, watch(lambda t, m, d: setattr(t, "should_stop", d >= 4)))
    assert not callback.at_target


# ---------------------------------------------------------------------- runs of another length, and steps that are
# skipped


class Saves(pl.Callback):
    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("epochs", [5, 8, 16])
def test_phases_that_have_begun_keep_their_length_in_a_run_of_another(epochs: int, tmp_path: Path) -> None:
    """Saved in phase 1 of three (every 12 steps, by fractions of 6 epochs), resumed with fewer or more epochs."""
    one, other = gap(3), gap(3)
    fit(Classifier(), one, Saves(tmp_path / "run.ckpt", 15), max_epochs=6)
    assert one.times.every == 12
    fit(Classifier(), other, max_epochs=epochs, ckpt_path=tmp_path / "run.ckpt")
    assert other.times.every == 12
    assert other.at_target
    assert other.updates == 3


def test_a_run_that_ends_before_its_phases_do_is_refused(tmp_path: Path) -> None:
    fit(Classifier(), gap(3), Saves(tmp_path / "run.ckpt", 15), max_epochs=6)
    with pytest.raises(ValueError, match=r"laid out up to step 36, and it ends at step 32"):
        fit(Classifier(), gap(3), max_epochs=4, ckpt_path=tmp_path / "run.ckpt")


def test_what_is_finished_stays_in_fine_tuning_in_a_longer_fit() -> None:
    callback, module = gap(2), Classifier(double_mlp())
    fit(module, callback, max_epochs=2)
    masks = {n: m.clone() for n, m in callback.masks.items()}
    fit(module, callback, max_epochs=6)
    assert callback.dense_partition is None
    assert callback.at_target
    assert differences(masks, callback.masks) == []


def test_skipped_steps_do_not_leave_a_partition_dense() -> None:
    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if self.trainer.global_step in (0, 3, 9) else 1.0)

    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    callback, module = gap(2, epochs=1), Overflows()
    fit(module, callback, plugins=[precision])
    assert callback.step == 13
    assert skipped_steps(callback) == 3
    assert callback.at_target
    assert_effective(module, callback)


def test_a_run_that_is_stopped_early_is_not_pruned_for_it() -> None:
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 10

    callback = gap(2, epochs=1)
    with pytest.warns(UserWarning, match="with partition 1 still dense"):
        fit(Classifier(), callback, Stops(), min_epochs=0)
    assert not callback.at_target


class Fixed(Classifier):
    """A cosine of a fixed length."""

    def __init__(self, length: int) -> None:
        super().__init__(double_mlp())
        self.length = length

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_fixed_schedule_that_fine_tuning_is_too_short_for_is_refused_before_the_first_batch() -> None:
    """Two phases of 7 steps and 2 of fine-tuning."""
    module = Fixed(7)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"CosineAnnealingLR\(T_max=7\) is longer than the phase of 2"):
        fit(module, gap(2, every=7))
    assert differences(before, dict(module.state_dict())) == []
    fit(Fixed(2), gap(2, every=7))


def test_a_schedule_that_a_restart_makes_too_long_is_told_and_the_run_goes_on() -> None:
    class Grows(Fixed):
        def configure_optimizers(self) -> Any:
            horizon(self.trainer)
            self.length = self.length + 2
            return super().configure_optimizers()

    callback = gap(2, every=7)
    with pytest.warns(UserWarning, match=r"T_max=9\) is longer than the phase of 7"):
        fit(Grows(5), callback)
    assert callback.at_target
