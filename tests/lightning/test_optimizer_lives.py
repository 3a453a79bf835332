"""How long optimizers live, what schedules they may have, and how new ones take their place."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import nn
from torch.optim import lr_scheduler as lrs

from sparse_callbacks import SET, GaP
from sparse_callbacks.core.calendar import RunLength
from sparse_callbacks.lightning.optimizer_lives import check_horizons, horizon, restart
from sparse_callbacks.methods.gap.phases import check_phases, phase_steps
from sparse_callbacks.testing.comparison import assert_effective
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import OPTIMIZERS, ByHand, Classifier, double_mlp
from sparse_callbacks.testing.runs import fit, trainer_for, watch


def gap(**options: Any) -> GaP:
    return GaP(**({"sparsity": 0.7, "partitions": 2, "every": 3, "print_plan": False} | options))


# ---------------------------------------------------------------------- horizon


class Asks(Classifier):
    """Notes the horizon each time that optimizers are configured."""

    def __init__(self, net: nn.Module | None = None) -> None:
        super().__init__(double_mlp() if net is None else net)
        self.told: list[float] = []

    def configure_optimizers(self) -> Any:
        self.told.append(horizon(self.trainer))
        return OPTIMIZERS["sgd"](self.parameters())


@pytest.mark.parametrize("callbacks", [[], [SET(0.5, every=2, print_plan=False)]])
def test_without_phases_it_is_the_run(callbacks: list[pl.Callback]) -> None:
    module, later = Asks(), []
    fit(module, *callbacks, watch(lambda t, *_: later.append(horizon(t))))
    assert module.told == [16]
    assert set(later) == {16}
    module = Asks()
    fit(module, *callbacks, max_epochs=-1, max_steps=5, accumulate_grad_batches=2)
    assert module.told == [5]


def test_an_endless_run_has_an_infinite_horizon() -> None:
    module = Asks()
    fit(module, watch(lambda t, *_: setattr(t, "should_stop", True)), max_epochs=-1, max_steps=-1)
    assert module.told == [math.inf]


def test_optimizers_that_are_not_restarted_live_for_the_run() -> None:
    module = Asks()
    fit(module, gap(restart=False))
    assert module.told == [16]


def test_micro_batches_are_no_steps() -> None:
    module = Asks()
    fit(module, gap(every=None, epochs=1), max_epochs=3, accumulate_grad_batches=2)
    assert module.told == [4, 4, 4]


def test_epochs_are_known_where_steps_end_the_run() -> None:
    module = Asks()
    fit(module, gap(every=None, epochs=1), max_epochs=-1, max_steps=20)
    assert module.told == [8, 8, 4]


def test_before_fit_there_is_no_horizon() -> None:
    with pytest.raises(
        RuntimeError, match=r"horizon\(\) needs a trainer that fits: .*horizon\(self\.trainer\) in configure_optimizers"
    ):
        horizon(trainer_for([gap()]))


# ---------------------------------------------------------------------- schedules


def optimizer() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)


def sequence(o: Any) -> Any:
    return lrs.SequentialLR(o, [lrs.LinearLR(o, total_iters=10), lrs.CosineAnnealingLR(o, 90)], milestones=[10])


SCHEDULES: dict[str, tuple[Any, float | None, str]] = {  # its horizon in its own steps, and how it is shown
    "cosine": (lambda o: lrs.CosineAnnealingLR(o, 100), 100, r"CosineAnnealingLR\(T_max=100\)"),
    "restarts": (lambda o: lrs.CosineAnnealingWarmRestarts(o, 100), 100, r"CosineAnnealingWarmRestarts\(T_0=100\)"),
    "one cycle": (lambda o: lrs.OneCycleLR(o, 0.1, total_steps=100), 100, r"OneCycleLR\(total_steps=100\)"),
    "linear": (lambda o: lrs.LinearLR(o, total_iters=100), 100, r"LinearLR\(total_iters=100\)"),
    "polynomial": (lambda o: lrs.PolynomialLR(o, total_iters=100), 100, r"PolynomialLR\(total_iters=100\)"),
    "constant": (lambda o: lrs.ConstantLR(o, total_iters=100), 100, r"ConstantLR\(total_iters=100\)"),
    "milestones": (lambda o: lrs.MultiStepLR(o, [100, 50]), 100, r"MultiStepLR\(milestones=\[50, 100\]\)"),
    "sequence": (sequence, 100, r"CosineAnnealingLR\(T_max=90\) after 10 steps of other schedules"),
    "late sequence": (
        lambda o: lrs.SequentialLR(
            o, [lrs.ConstantLR(o, total_iters=500), lrs.ExponentialLR(o, 0.9)], milestones=[100]
        ),
        100,
        r"SequentialLR\(milestones=\[100\]\)",
    ),
    "chain": (
        lambda o: lrs.ChainedScheduler([lrs.StepLR(o, 7), lrs.LinearLR(o, total_iters=100)]),
        100,
        r"LinearLR\(total_iters=100\)",
    ),
    "nested": (
        lambda o: lrs.SequentialLR(
            o, [lrs.ConstantLR(o), lrs.ChainedScheduler([lrs.PolynomialLR(o, 80)], optimizer=o)], milestones=[20]
        ),
        100,
        r"PolynomialLR\(total_iters=80\) after 20 steps of other schedules",
    ),
    "no milestones": (lambda o: lrs.MultiStepLR(o, []), None, ""),
    "lambda": (lambda o: lrs.LambdaLR(o, lambda step: 0.9**step), None, ""),
    "step": (lambda o: lrs.StepLR(o, 1000), None, ""),
    "plateau": (lambda o: lrs.ReduceLROnPlateau(o, patience=1000), None, ""),
}


def host(schedule: Any, interval: str = "step", frequency: int = 1, automatic: bool = True) -> Any:
    config = SimpleNamespace(scheduler=schedule, interval=interval, frequency=frequency)
    return SimpleNamespace(
        lr_scheduler_configs=[config], lightning_module=SimpleNamespace(automatic_optimization=automatic)
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_known_horizon_longer_than_the_phase_is_refused(name: str) -> None:
    make, known, shown = SCHEDULES[name]
    schedule = make(optimizer())
    if known is None:
        check_horizons(host(schedule), 1, 1)
        return
    check_horizons(host(schedule), 100, 1000)
    with pytest.raises(
        ValueError, match=rf"{shown} is longer than the phase of 99 optimizer steps .* sparse_callbacks\.horizon\(self"
    ):
        check_horizons(host(schedule), 99, 1)
    check_horizons(host(schedule, "epoch", 2), 1400, 7)
    with pytest.raises(ValueError, match=rf"{shown}, that is 1400 optimizer steps, is longer than the phase of 1399"):
        check_horizons(host(schedule, "epoch", 2), 1399, 7)
    check_horizons(host(schedule, "epoch", 2, automatic=False), 100, 7)  # the user steps it, perhaps every batch


# ---------------------------------------------------------------------- restart


def test_new_optimizers_are_what_everybody_finds(tmp_path: Any) -> None:
    class Look(pl.Callback):
        def __init__(self) -> None:
            self.found: list[tuple[int, ...]] = []

        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            one = module.optimizers()
            self.found.append(
                (id(optimizer), id(trainer.optimizers[0]), id(one.optimizer), id(trainer.strategy.optimizers[0]))
            )
            self.kept = [*getattr(self, "kept", []), optimizer]  # so that no address is used again

    class Schedule(Classifier):
        def configure_optimizers(self) -> Any:
            chosen = OPTIMIZERS["adamw"](self.parameters())
            schedule = lrs.CosineAnnealingLR(chosen, horizon(self.trainer))
            return {"optimizer": chosen, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    look, logger = Look(), CSVLogger(tmp_path)
    fit(
        Schedule(double_mlp()),
        gap(),
        look,
        LearningRateMonitor("step"),
        logger=logger,
        log_every_n_steps=1,
        max_epochs=1,
    )
    assert all(len(set(seen)) == 1 for seen in look.found)
    assert [i for i in range(1, 8) if look.found[i] != look.found[i - 1]] == [3, 6]
    with open(f"{logger.log_dir}/metrics.csv") as file:
        header, *rows = [line.strip().split(",") for line in file]
    column = header.index("lr-AdamW")
    rates = [float(row[column]) for row in rows if row[column]]
    curve = [0.01 * (1 + math.cos(math.pi * t / 3)) / 2 for t in range(3)]
    assert rates == pytest.approx([*curve, *curve, 0.01, 0.005])


@pytest.mark.parametrize("skip", [False, True])
def test_a_grad_scaler_keeps_its_scale(skip: bool) -> None:
    """Also where a step of the second phase is skipped: the phase ends when its steps were taken."""

    class Burst(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return super().training_step(batch, batch_idx) * (math.inf if skip and batch_idx == 4 else 1.0)

    scales: list[tuple[int, float]] = []
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, growth_interval=2)
    callback = gap()
    look = watch(lambda t, m, _: (scales.append((callback.step, scaler.get_scale())), assert_effective(m, callback)))
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    fit(Burst(optimizer="sgd"), callback, look, plugins=plugin, max_epochs=1)
    steps = [step for step, _ in scales]
    assert steps == ([1, 2, 3, 4, 4, 5, 6, 7] if skip else [1, 2, 3, 4, 5, 6, 7, 8])
    assert scales[3][1] > 256.0  # the growth of before the restart stays
    assert callback.at_target


def test_manual_optimization_restarts_too() -> None:
    module, callback, states = ByHand(double_mlp()), gap(), []

    class Look(pl.Callback):
        def on_before_backward(self, trainer: Any, module: Any, loss: Any) -> None:
            states.append(bool(trainer.optimizers[0].state))

    fit(module, callback, Look(), watch(lambda t, m, _: assert_effective(m, callback)), max_epochs=1)
    assert [i for i, has in enumerate(states) if not has] == [0, 3, 6]
    assert callback.step == 8
    assert callback.at_target


def test_optimizers_in_another_number_are_refused() -> None:
    class More(ByHand):
        calls = 0

        def lr_schedulers(self) -> Any:
            return lrs.ConstantLR(optimizer())

        def configure_optimizers(self) -> Any:
            self.calls += 1
            first = OPTIMIZERS["sgd"](self.net[1].parameters())
            return (
                [first, OPTIMIZERS["sgd"](self.net[3].parameters())]
                if self.calls > 1
                else [OPTIMIZERS["sgd"](self.parameters())]
            )

    with pytest.raises(
        ValueError, match=r"gave 1 optimizers at the start and 2 at the restart of a phase\. .* restart=False"
    ):
        fit(More(double_mlp()), gap())


def test_parameters_that_a_restart_would_leave_out_are_refused() -> None:
    class Thaws(Classifier):
        def configure_optimizers(self) -> Any:
            return OPTIMIZERS["sgd"]([*self.net[1].parameters(), self.net[3].weight])

        def on_train_start(self) -> None:
            self.optimizers().optimizer.add_param_group({"params": [self.net[3].bias]})

    with pytest.raises(
        ValueError,
        match=r"^net\.3\.bias were in an optimizer and are in none after configure_optimizers was called anew",
    ):
        fit(Thaws(double_mlp()), gap())


def test_a_frozen_parameter_may_be_left_out() -> None:
    class Freezes(Classifier):
        def configure_optimizers(self) -> Any:
            return OPTIMIZERS["sgd"]([p for p in self.parameters() if p.requires_grad])

        def on_train_batch_end(self, *_: Any) -> None:
            self.net[3].bias.requires_grad_(False)

    fit(Freezes(double_mlp()), gap(), max_epochs=1)


def test_restart_by_hand_gives_fresh_optimizers() -> None:
    module, found = Asks(), []

    class Again(pl.Callback):
        def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
            found.append(trainer.optimizers[0])
            if len(found) == 3:
                restart(trainer)
                assert not trainer.optimizers[0].state
                assert trainer.strategy._lightning_optimizers[0].optimizer is trainer.optimizers[0]

    fit(module, Again(), max_epochs=1)
    assert module.told == [8, 8]
    assert [o is found[0] for o in found] == [True] * 3 + [False] * 5


# ---------------------------------------------------------------------- lengths


def never() -> float:
    raise AssertionError("not needed here")


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, 10, None), 10),
        ((None, 0.125, None), 12),
        ((2, None, None), 14),
        ((0.5, None, None), 4),
        ((None, None, 50), 12),
        ((None, None, 0.5), 12),
        ((None, None, None), 18),
    ],
)
def test_the_length_of_a_phase(given: tuple[Any, Any, Any], expected: int) -> None:
    assert phase_steps(4, *given, RunLength(lambda: 100, (lambda: 7) if given[0] else never)) == expected
    check_phases(1, *given, partitions=4)


def test_no_phases_in_too_short_a_run() -> None:
    with pytest.raises(
        ValueError, match=r"4 phases .* of 26 optimizer steps each do not fit a run of 100 steps, with every=26"
    ):
        phase_steps(4, None, 26, None, RunLength(lambda: 100, never))
    assert phase_steps(4, None, 26, None, RunLength(lambda: 100, never, lenient=True)) == 26
    assert phase_steps(4, None, 26, None, RunLength(lambda: math.inf, never)) == 26
    assert phase_steps(4, None, None, None, RunLength(lambda: 1, never, lenient=True)) == 1
    with pytest.raises(ValueError, match="of 0 optimizer steps each do not fit a run of 4 steps"):
        phase_steps(4, None, None, None, RunLength(lambda: 4, never))
    with pytest.raises(ValueError, match="epochs=1 cannot be counted in steps"):
        phase_steps(4, 1, None, None, RunLength(lambda: 5, lambda: math.inf))


def test_two_lengths_of_a_phase_are_refused() -> None:
    with pytest.raises(ValueError, match="epochs= and every= and finetune= are given together"):
        check_phases(1, 1, 2, 3, partitions=4)
    with pytest.raises(ValueError, match="epochs=0 is not a length of time above 0"):
        check_phases(1, 0, None, None, partitions=4)
    with pytest.raises(ValueError, match="rounds=0 is not a number of rounds"):
        check_phases(0, None, None, None, partitions=4)
    with pytest.raises(ValueError, match="rounds=2 of one partition"):
        check_phases(2, None, None, None, partitions=1)


def test_the_classifier_of_train_py_follows_the_phase() -> None:
    from sparse_callbacks.tasks.classifier import Classifier as Task
    from sparse_callbacks.tasks.classifier import Optim

    class Flat(Task):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return nn.functional.cross_entropy(self(x.double()), y)

    rates: list[float] = []
    module = Flat(double_mlp(), 4, Optim(name="sgd", lr=0.1, fused=False))
    trainer = trainer_for(
        [gap(), watch(lambda t, *_: rates.append(t.optimizers[0].param_groups[0]["lr"]))], max_epochs=1
    )
    trainer.fit(module, Batches())
    falling = [0.1 * (1 + math.cos(math.pi * t / 3)) / 2 for t in (1, 2, 3)]
    assert rates == pytest.approx([*falling, *falling, 0.05, 0.0], abs=1e-9)
