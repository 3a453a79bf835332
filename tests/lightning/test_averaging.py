"""Averages that Lightning's callbacks keep of sparse weights are sparse, for every method and in any order."""

import copy
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import EMAWeightAveraging, StochasticWeightAveraging
from pytorch_lightning.plugins.precision import MixedPrecision
from support.averaging import AVERAGING, Looks, average_of, everything, fit, is_sparse
from support.methods import every_steady_method, method
from torch import Tensor, nn

from sparse_callbacks import SET, Static
from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.topology import Update
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Classifier, Rivals
from sparse_callbacks.testing.runs import trainer_for, watch

every_averaging = pytest.mark.parametrize("kind", AVERAGING)


def made(name: str, kind: str) -> tuple[Any, Any]:
    return method(name, every=3, stop=20, restart=False, gate_lr=0.3, dual_lr=0.1), AVERAGING[kind]()


@pytest.mark.combinations
@every_steady_method
@every_averaging
def test_averages_are_sparse_and_no_order_matters(name: str, kind: str, tmp_path: Path) -> None:
    left = []
    for ours_first in (True, False):
        callback, averager = made(name, kind)
        looks = Looks()

        def saved(
            trainer: pl.Trainer, module: Any, batch: int, callback: Any = callback, averager: Any = averager
        ) -> None:
            assert is_sparse(average_of(averager), callback), batch
            if batch in (4, 12, 20):
                trainer.save_checkpoint(tmp_path / "one.ckpt")
                # under torch 2.8 the schedule that SWA sets holds a function
                found = torch.load(tmp_path / "one.ckpt", weights_only=False)
                assert not any(found["state_dict"][n][~m].any() for n, m in callback.masks.items())

        pair = [callback, averager] if ours_first else [averager, callback]
        trainer, module = fit([*pair, looks, watch(saved)], validate=True)
        assert looks.seen
        assert all(is_sparse({n: t}, _of(callback, n)) for n, t in looks.seen[-1].items())
        assert is_sparse(dict(module.named_parameters()), callback)
        assert differences(average_of(averager), dict(module.named_parameters())) == []
        assert trainer.max_epochs == 3
        left.append(everything(trainer, module, callback, averager))
    assert differences(left[0], left[1]) == []


def _of(callback: Any, name: str) -> Any:
    """The masks of one parameter."""

    class One:
        masks = {n: m for n, m in callback.masks.items() if n == name}

    return One


# ---------------------------------------------------------------------- the rule

VALUES = [[1.0, -0.5, 0.8, 0.0, 0.3, 0.0], [1.2, -0.4, 0.0, 0.5, 0.0, 0.0], [0.9, 0.0, 0.7, 0.6, -0.2, 0.0]]
MASKS = [[1, 1, 1, 0, 1, 0], [1, 1, 0, 1, 0, 1], [1, 0, 1, 1, 1, 1]]
AVERAGES = [[1.0, -0.5, 0.8, 0.0, 0.3, 0.0], [1.02, -0.49, 0.0, 0.5, 0.0, 0.0], [1.008, 0.0, 0.7, 0.51, -0.2, 0.0]]


class Given(Static):
    """After step t the masks of the table at time t, and its values in what is born."""

    def initial_masks(self) -> dict[str, Tensor]:
        return self._masks(0)

    def _masks(self, time: int) -> dict[str, Tensor]:
        return {n: torch.tensor([MASKS[time]]).bool() for n in self.params}

    def after_step(self, step: Step) -> Update | None:
        return Update(self._masks(min(self.step, 3) - 1))

    def new_weights(self, step: Step, name: str) -> Tensor | None:
        return torch.tensor([VALUES[self.step - 1]])


class Table(pl.LightningModule):
    """Steps to the values of the table with a learning rate of 1."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Linear(6, 1, bias=False)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        target = torch.tensor([VALUES[min(batch_idx, 2)]])
        return (self.net.weight * (self.net.weight.detach() - target)).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1.0)


@pytest.mark.parametrize("ours_first", [True, False])
def test_the_average_of_the_callback_follows_the_table(ours_first: bool) -> None:
    ours, averager = Given(0.5, print_plan=False), EMAWeightAveraging(decay=0.9)
    averages: list[Tensor] = []
    keep = watch(lambda *_: averages.append(average_of(averager)["net.weight"].detach().clone()))
    fit([*([ours, averager] if ours_first else [averager, ours]), keep], module=Table(), max_steps=3)
    for average, expected in zip(averages, AVERAGES, strict=True):
        assert torch.allclose(average, torch.tensor([expected]), atol=1e-6)


def test_between_two_averages_births_are_kept_in_the_state_and_nowhere_without_averages(tmp_path: Path) -> None:
    callback, averager = SET(0.8, every=3, stop=20, drop_fraction=0.5, print_plan=False), AVERAGING["epochs"]()
    fit([callback, averager], tmp_path, stops=(6,))
    state = torch.load(tmp_path / "6.ckpt", weights_only=True)["callbacks"]
    ours = with_truths(state[callback.state_key])
    born = ours["averages"][averager.state_key]["born"]
    assert any(b.any() for b in born.values())
    assert all((b & ~ours["masks"][n]).sum() == 0 for n, b in born.items())
    alone = SET(0.8, every=3, print_plan=False)
    fit([alone], tmp_path, stops=(6,))
    assert "averages" not in torch.load(tmp_path / "6.ckpt", weights_only=True)["callbacks"][alone.state_key]


def test_masks_and_gates_are_not_averaged() -> None:
    alone, _ = made("l0", "ema")
    together, averager = made("l0", "ema")
    fit([alone])
    fit([averager, together])
    assert differences(alone.aux, together.aux) == []
    assert differences(alone.masks, together.masks) == []


# ---------------------------------------------------------------------- kinds of runs


@pytest.mark.parametrize("kind", ["ema", "third"])
def test_several_methods_and_optimizers_in_manual_optimization(kind: str) -> None:
    pair = [
        method("l0", include="maker*", density=0.4, gate_lr=0.3, dual_lr=0.1),
        method("dpf", include="critic*", every=3, stop=20),
    ]
    averager = AVERAGING[kind]()
    see = watch(lambda *_: [is_sparse(average_of(averager), c) for c in pair].index(True))
    _, module = fit([pair[0], averager, pair[1], see], module=Rivals())
    for callback in pair:
        assert is_sparse(dict(module.named_parameters()), callback)
        assert callback.step > 0


@pytest.mark.combinations
@pytest.mark.parametrize(
    "options", [{"accumulate_grad_batches": 3}, {"precision": "bf16-mixed"}, {"precision": "64-true"}]
)
@pytest.mark.parametrize("name", ["rigl", "l0", "dpf"])
def test_accumulation_and_precisions(name: str, options: dict[str, Any]) -> None:
    callback, averager = made(name, "ema")
    _, module = fit([averager, callback], **options)
    assert is_sparse(dict(module.named_parameters()), callback)


def test_a_step_that_the_scaler_skips_averages_the_same_weights_again() -> None:
    """In such a batch parameters of DPF hold their dense values until it is over."""

    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if batch_idx % 4 == 2 else 1.0)

    callback, averager = made("dpf", "ema")
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    see = watch(lambda *_: is_sparse(average_of(averager), callback) or pytest.fail("dense"))
    _, module = fit([averager, callback, see], module=Breaks(), plugins=[precision])
    assert callback.engine.skipped == 6
    assert all(p.isfinite().all() for p in module.parameters())


def test_averages_on_another_device_and_of_buffers_as_lightning_takes_them() -> None:
    plain = EMAWeightAveraging(decay=0.8, use_buffers=False)
    callback = Static(0.8, print_plan=False)
    _, module = fit([plain, callback])
    assert differences(dict(plain._average_model.module.named_buffers()), dict(module.named_buffers())) == []
    assert int(module.net[1].num_batches_tracked) == 24


# ---------------------------------------------------------------------- after the fit


@pytest.mark.parametrize("name", ["rigl", "dpf", "l0", "smcp", "channels"])
def test_a_tested_checkpoint_is_that_of_the_averages(name: str, tmp_path: Path) -> None:
    callback, averager = made(name, "ema")
    trainer, module = fit([callback, averager], tmp_path, stops=(14,))
    tested = torch.load(tmp_path / "14.ckpt", weights_only=True)
    # in the Trainer of the fit Lightning takes the weights of training instead, which have the same masks
    trainer.test(module, Batches(1), ckpt_path=tmp_path / "14.ckpt", verbose=False)
    assert differences(dict(tested["current_model_state"]), dict(module.state_dict())) == []
    zeros = callback.measured_sparsity()
    again, averager = made(name, "ema")
    trainer_for([again, averager]).test(module, Batches(1), ckpt_path=tmp_path / "14.ckpt", verbose=False)
    assert differences(dict(tested["state_dict"]), dict(module.state_dict())) == []
    assert again.measured_sparsity() == zeros
    assert 0 < zeros["sparsity/total"] < 1


@pytest.mark.parametrize("name", ["rigl", "dpf", "l0", "smcp", "channels"])
def test_a_second_fit_goes_on_from_the_averages(name: str) -> None:
    callback, averager = made(name, "ema")
    _, module = fit([callback, averager])
    callback.measured_sparsity()
    ended, begun = copy.deepcopy(module.state_dict()), {}
    look = pl.callbacks.LambdaCallback(on_train_start=lambda _, m: begun.update(copy.deepcopy(m.state_dict())))
    trainer_for([callback, look], max_epochs=1).fit(module, Batches())
    # L0 writes the product of its gates and of what the averages are without them
    assert all(torch.allclose(begun[k], t, rtol=1e-6, atol=0) for k, t in ended.items())
    assert name == "l0" or differences(begun, dict(ended)) == []


def test_dense_values_of_dpf_follow_the_averages_at_active_weights() -> None:
    callback, averager = made("dpf", "ema")
    _, module = fit([averager, callback])
    for name, p in module.named_parameters():
        if name in callback.masks:
            dense, mask = callback.weights.dense_values(name), callback.masks[name]
            assert torch.equal(dense[mask], p[mask])
            assert dense[~mask].any()


def test_a_refused_fit_leaves_nothing_behind(tmp_path: Path) -> None:
    class Refuses(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            raise ValueError("not today")

    callback, averager = made("rigl", "ema")
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="not today"):
        fit([callback, averager, Refuses()], module=module)
    assert differences(before, dict(module.state_dict())) == []
    assert "update_parameters" not in vars(averager._average_model)
    swa = StochasticWeightAveraging(0.02, swa_epoch_start=2)
    with pytest.raises(ValueError, match="not today"):
        fit([callback, swa, Refuses()], module=module)
    assert "update_parameters" not in vars(swa)


def test_callbacks_are_copied_in_the_middle_of_a_fit() -> None:
    callback, averager = made("set", "third")
    copies: list[Any] = []
    see = watch(
        lambda trainer, module, batch: copies.append(copy.deepcopy([callback, averager])) if batch == 5 else None
    )
    fit([callback, averager, see])
    copied, other = copies[0]
    count = int(other._average_model.n_averaged)
    other._average_model.update_parameters(Classifier())
    assert int(other._average_model.n_averaged) == count + 1
    assert not copied.weights.watchers
    assert not copied.fit_state.averages.state()


@pytest.mark.parametrize("kind", ["ema", "swa"])
def test_networks_in_turn_have_no_average(kind: str) -> None:
    module = Classifier()
    before = copy.deepcopy(module.state_dict())
    pattern = r"averages the weights of one network, and ParallelGaP trains several in turn\. Remove it.* use GaP"
    with pytest.raises(ValueError, match=pattern):
        fit([method("gap_parallel"), AVERAGING[kind]()], module=module)
    assert differences(before, dict(module.state_dict())) == []


def test_an_average_in_manual_optimization_is_that_of_automatic_optimization() -> None:
    left = []
    for module in (Classifier(), ByHand()):
        callback, averager = made("rigl", "third")
        fit([averager, callback], module=module)
        left.append(average_of(averager))
    assert differences(left[0], left[1]) == []
