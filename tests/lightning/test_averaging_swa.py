"""StochasticWeightAveraging: the epoch that it adds for batch norms trains nothing and counts nowhere."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import GradientAccumulationScheduler, LambdaCallback, StochasticWeightAveraging
from pytorch_lightning.plugins.precision import MixedPrecision
from support.averaging import average_of, fit
from support.methods import method
from torch import nn

from sparse_callbacks import GMP, RigL, horizon
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Classifier
from sparse_callbacks.testing.runs import trainer_for

EPOCHS, BATCHES = 3, 8


def swa(start: int = 2) -> StochasticWeightAveraging:
    return StochasticWeightAveraging(0.02, swa_epoch_start=start)


def without_norms() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 24), nn.Tanh(), nn.Linear(24, 4))


@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_added_epoch_is_not_in_the_calendar(ours_first: bool, accumulate: int) -> None:
    found = []
    for averager in ([], [swa()]):
        callback = GMP(0.8, every=0.1, stop=0.9, print_plan=False)
        pair = [callback, *averager] if ours_first else [*averager, callback]
        trainer, _ = fit(pair, accumulate_grad_batches=accumulate)
        found.append((callback.times.times(), callback.step, callback.updates))
        assert callback.at_target
        assert callback.step == EPOCHS * BATCHES // accumulate
        assert trainer.max_epochs == EPOCHS
    assert found[0] == found[1]


def test_nor_under_a_schedule_of_accumulation() -> None:
    found = []
    for averager in ([], [swa()]):
        callback = RigL(0.8, every=0.1, stop=0.9, print_plan=False)
        fit([callback, *averager, GradientAccumulationScheduler({0: 1, 1: 2})])
        found.append((callback.times.times(), callback.step + callback.updates, callback.updates))
    assert found[0] == found[1]
    assert found[0][1] == 8 + 4 + 4


class Asks(Classifier):
    """Keeps what the horizon is where optimizers are configured, and in each epoch."""

    def configure_optimizers(self) -> Any:
        self.horizons = [horizon(self.trainer)]
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

    def on_train_epoch_start(self) -> None:
        self.horizons.append(horizon(self.trainer))


def test_nor_in_the_horizon_of_a_schedule() -> None:
    _, module = fit([swa(), method("set", every=3)], module=Asks())
    assert module.horizons[:4] == [24] * 4  # where optimizers are configured, and in the epochs of training


@pytest.mark.combinations
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("kind", ["plain", "fp16", "by hand"])
@pytest.mark.parametrize("name", ["set", "dpf", "l0"])
def test_no_weight_moves_in_the_added_epoch(name: str, kind: str, ours_first: bool) -> None:
    callback, averager = method(name, every=3, stop=20, gate_lr=0.3, dual_lr=0.1), swa()
    updates: list[int] = []
    states: list[Any] = []

    def look(trainer: Any, *_: Any) -> None:
        updates.append(callback.updates)
        states.append(copy.deepcopy((trainer.optimizers[0].state_dict()["state"], callback.aux, callback.step)))

    class Steady(ByHand if kind == "by hand" else Classifier):  # type: ignore[misc]
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)

        def lr_schedulers(self) -> Any:
            return type("None", (), {"step": staticmethod(lambda: None)})

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    precision = {"plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]} if kind == "fp16" else {}
    pair = [callback, averager] if ours_first else [averager, callback]
    trainer, module = fit([*pair, LambdaCallback(on_train_epoch_end=look)], module=Steady(), validate=True, **precision)
    assert trainer.current_epoch == EPOCHS + 1
    assert differences(average_of(averager), dict(module.named_parameters())) == []
    assert updates[-1] == updates[-2]
    assert differences(states[-1], states[-2]) == []
    assert not any(module.get_parameter(n)[~m].any() for n, m in callback.masks.items())
    assert "optimizer_step" not in vars(trainer.strategy)
    # and the statistics of the norm are those of the averages
    assert int(module.net[1].num_batches_tracked) == BATCHES


def test_a_network_without_batch_norms_has_no_such_epoch() -> None:
    callback, averager = method("set", every=3, stop=20), swa()
    trainer, module = fit([averager, callback], module=Classifier(without_norms()))
    assert trainer.current_epoch == EPOCHS
    assert differences(average_of(averager), dict(module.named_parameters())) == []


def test_hooks_of_a_method_are_not_called_in_it() -> None:
    class Listens(RigL):
        def epoch_start(self, epoch: int) -> None:
            heard.append(("epoch", epoch))

        def window_start(self, batch: int) -> None:
            heard.append(("window", batch))

        def validation_end(self, metrics: Any, epoch: int | None) -> None:
            heard.append(("validated", epoch))

        def epoch_end(self, metrics: Any, epoch: int) -> None:
            heard.append(("over", epoch))

    heard: list[Any] = []
    fit([swa(), Listens(0.8, every=3, print_plan=False)], validate=True, num_sanity_val_steps=0)
    assert [h for h in heard if h[0] == "epoch"] == [("epoch", e) for e in range(EPOCHS)]
    assert sum(h[0] == "window" for h in heard) == EPOCHS * BATCHES
    assert [h for h in heard if h[0] in ("validated", "over")] == [
        (kind, e) for e in range(EPOCHS) for kind in ("validated", "over")
    ]


def test_the_next_fit_of_the_trainer_trains_again() -> None:
    callback = method("set", every=3, stop=20)
    trainer, module = fit([callback, swa()])
    trainer.callbacks = [callback]
    trainer.fit_loop.max_epochs = EPOCHS + 2
    before = copy.deepcopy(dict(module.named_parameters()))
    trainer.fit(module, Batches())
    assert differences(before, dict(module.named_parameters()))


def test_restarts_among_averages_are_refused() -> None:
    gap: dict[str, Any] = {"partitions": 2, "rounds": 2, "print_plan": False}
    module = Classifier()
    with pytest.raises(ValueError, match=r"sets a schedule of its own at step 8, and GaP .* anew until step 12"):
        fit([method("gap", every=3, **gap), swa()], module=Asks())
    assert module.net[0].weight.ne(0).all()
    _, module = fit([method("gap", every=2, **gap), swa(3)], module=Asks())
    fit([method("gap", every=3, restart=False, **gap), swa()], module=Asks())


class Stop(pl.Callback):
    """Ends training early."""

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        trainer.should_stop = trainer.global_step >= 20


def test_an_early_end_leaves_a_sparse_network() -> None:
    callback = method("dpf", every=3, stop=20)
    trainer = trainer_for([swa(), callback, Stop()], max_epochs=EPOCHS)
    module = Classifier()
    trainer.fit(module, Batches())
    assert not any(module.get_parameter(n)[~m].any() for n, m in callback.masks.items())
