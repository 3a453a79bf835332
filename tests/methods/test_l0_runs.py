"""Constrained L0 in a run: windows, skipped steps, manual optimization, resume, and later runs."""

import copy
import pickle
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from support.inside import dense_values, parameters_of
from support.l0 import (
    Convolutions,
    at_start,
    close_some,
    constraints_of,
    l0,
    median_gates,
    sampled_factor,
    sampled_gates,
    tied_kernels,
)
from torch import Tensor

from sparse_callbacks import saved_masks
from sparse_callbacks.testing.comparison import differences, snapshot
from sparse_callbacks.testing.data import Batches, Thirds
from sparse_callbacks.testing.networks import ByHand, Classifier, Rivals, conv_net, double_mlp
from sparse_callbacks.testing.runs import Stops, fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# ---------------------------------------------------------------------- steps that are not what they seem


@pytest.mark.parametrize("unit", ["channel", "weight"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_micro_batches_equal_one_large_batch(unit: str, clip: float | None) -> None:
    runs = []
    for window, loader in ((1, Batches()), (3, Thirds())):
        callback, module = l0(unit=unit), Classifier(double_mlp())
        fit(module, callback, loader=loader, accumulate_grad_batches=window, gradient_clip_val=clip)
        runs.append((callback, module))
    (large, whole), (small, parts) = runs
    for key, value in large.aux.items():
        assert torch.allclose(value, small.aux[key], rtol=1e-7, atol=1e-9), key  # sums of three parts round otherwise
    assert all(
        torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in zip(whole.parameters(), parts.parameters(), strict=True)
    )


@pytest.mark.parametrize("gate_optimizer", ["sgd", "adam"])
def test_a_skipped_fp16_step_moves_nothing(gate_optimizer: str) -> None:
    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if batch_idx % 2 == 0 else 1.0)

    callback, module = l0(gate_optimizer=gate_optimizer), Overflows(optimizer="adamw")
    states: list[Any] = []

    def keep(*_: Any) -> None:
        weights = {n: p.detach() for n, p in module.named_parameters()}
        states.append(copy.deepcopy((callback.state_dict(), weights)))

    begin = pl.callbacks.LambdaCallback(on_train_start=keep)
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    fit(module, callback, begin, watch(keep), plugins=[precision])
    assert callback.step == 8
    for index, (before, after) in enumerate(pairwise(states)):
        skipped = index % 2 == 0
        assert (differences(before, after) == []) == skipped
        for kind in ("log_alpha", "multiplier"):
            moved = [not torch.equal(v, after[0]["aux"][k]) for k, v in before[0]["aux"].items() if k.startswith(kind)]
            assert all(moved) != skipped
            assert any(moved) != skipped


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_moves_no_gate(bad: float) -> None:
    class Breaks(Classifier):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3:
                self.net[3].weight.grad[0, 0] = bad

    callback, module = l0(), Breaks(double_mlp())
    states: list[Any] = []
    keep = watch(lambda *_: states.append(copy.deepcopy((callback.aux, callback.masks, callback.step))))
    fit(module, callback, keep, limit_train_batches=4, max_epochs=1)
    assert differences(states[1], states[2]) != []
    assert differences(states[2], states[3]) == []


def test_the_same_under_manual_optimization() -> None:
    automatic, manual = l0(), l0()
    usual, by_hand = Classifier(double_mlp()), ByHand(double_mlp(), window=2)
    first = fit(usual, automatic, accumulate_grad_batches=2)
    second = fit(by_hand, manual)
    assert differences(automatic.state_dict(), manual.state_dict(), bitwise=False) == []
    assert differences(dict(usual.state_dict()), dict(by_hand.state_dict()), bitwise=False) == []
    assert first.global_step == second.global_step == 8


@pytest.mark.parametrize("steps", [1, 3])
def test_every_forward_pass_of_a_batch_by_hand_sees_a_sample_of_its_own(steps: int) -> None:
    class Several(Classifier):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__(Convolutions())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(steps):
                see()
                self.step(batch)
            see()

        def step(self, batch: Any) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

        def on_train_batch_end(self, *_: Any) -> None:
            found = {n: median_gates(callback, n) * dense_values(callback, n) for n in parameters_of(callback)}
            medians.append(all(torch.equal(self.get_parameter(n), v) for n, v in found.items()))

        def on_train_epoch_end(self) -> None:
            self.step(Batches().in_order()[0])
            self.on_train_batch_end()

    def see() -> None:
        for name in parameters_of(callback):  # what the network computes with is the sample
            kernel = next(k for k, t in tied_kernels(callback).items() if name in (k, *t.names))
            factor = sampled_factor(callback, kernel, name)
            assert torch.equal(module.get_parameter(name), factor * dense_values(callback, name))
        seen.append(torch.cat([sampled_gates(callback, k).flatten() for k in tied_kernels(callback)]).clone())

    seen: list[Tensor] = []
    medians: list[bool] = []
    callback, module = l0(0.9, gate_lr=1e-6), Several()
    fit(module, callback, max_epochs=1)
    assert medians == [True] * 9  # also after a step between two batches
    drawn = [z for i, z in enumerate(seen) if i % (steps + 1) < steps]
    assert all(not torch.equal(a, b) for a, b in pairwise(drawn))
    assert float(torch.stack(drawn).std(0).mean()) > 0.2
    last = [z for i, z in enumerate(seen) if i % (steps + 1) == steps]
    assert all(
        torch.equal(a, b) for a, b in zip(last, drawn[steps::steps], strict=False)
    )  # the next batch begins with it


def test_several_steps_in_a_batch_by_hand_tell_norms_nothing_of_closed_channels() -> None:
    class Several(Classifier):
        def __init__(self) -> None:
            super().__init__(Convolutions())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                closed = sampled_gates(callback, "net.0.weight").flatten() == 0
                before = norm.running_var.clone()
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                passes.append((closed, before, norm.running_var.clone()))

    passes: list[tuple[Tensor, Tensor, Tensor]] = []
    callback, module = l0(0.9, gate_lr=1e-6), Several()
    norm = module.net[1]
    fit(module, callback, at_start(lambda: close_some(callback, -1.7)), max_epochs=1)
    assert any(bool(closed.any()) for closed, _, _ in passes)
    for closed, before, after in passes:
        assert torch.equal(before[closed], after[closed])
        assert (before[~closed] != after[~closed]).all()


def test_each_optimizer_has_its_own_constraint() -> None:
    callback, module = l0(), Rivals()
    fit(module, callback)
    assert [{n.split(".")[0] for n in c.names} for c in constraints_of(callback)] == [{"maker"}, {"critic"}]
    assert sum(k.startswith("multiplier/") for k in callback.aux) == 2
    assert {"l0/multiplier/total", "l0/multiplier/total_1"} <= set(callback.figures())
    assert callback.outcome()["expected density"].splitlines()[1].startswith("total_1 ")
    steps = [float(callback.aux[f"gate_steps/{c.names[0]}"]) for c in constraints_of(callback)]
    assert steps == [16, 32]


# ---------------------------------------------------------------------- checkpoints and later runs


def resumed(
    make: Any, folder: Path, after: tuple[int, ...], net: Any = conv_net, **options: Any
) -> dict[int, list[str]]:
    module, callback, stops = Classifier(net()), make(), Stops(folder, after)
    expected = snapshot(fit(module, callback, stops, **options), module, callback)
    found = {}
    for batch in after:
        module, callback = Classifier(net(seed=100 + batch)), make()
        torch.manual_seed(batch)
        trainer = fit(module, callback, ckpt_path=stops.path(batch), **options)
        found[batch] = differences(expected, snapshot(trainer, module, callback))
    return found


@pytest.mark.parametrize("gate_optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_resume_is_bitwise(gate_optimizer: str, unit: str, tmp_path: Path) -> None:
    after = (1, 3, 8, 13)
    assert resumed(lambda: l0(gate_optimizer=gate_optimizer, unit=unit), tmp_path, after) == {b: [] for b in after}


@pytest.mark.parametrize("unit", ["channel", "weight"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_resume_is_bitwise_in_low_precision(precision: str, unit: str, tmp_path: Path) -> None:
    after, make = (1, 3, 8), lambda: l0(unit=unit)
    assert resumed(make, tmp_path, after, net=lambda seed=0: double_mlp(seed).float(), precision=precision) == {
        b: [] for b in after
    }


def test_a_second_fit_in_low_precision_goes_on_from_the_same_dense_weights() -> None:
    callback, module = l0(), Classifier(double_mlp().bfloat16())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)  # type: ignore[method-assign]
    fit(module, callback, max_epochs=1)
    before = {n: dense_values(callback, n).clone() for n in parameters_of(callback)}
    again: dict[str, Tensor] = {}
    look = at_start(lambda: again.update({n: dense_values(callback, n).clone() for n in parameters_of(callback)}))
    fit(module, callback, look, max_epochs=1)
    assert differences(before, again) == []


def test_resume_inside_a_window_is_bitwise(tmp_path: Path) -> None:
    after = (1, 2, 4, 5)
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "loader": Batches(batches=12)}
    assert resumed(l0, tmp_path, after, **options) == {b: [] for b in after}


def test_a_checkpoint_holds_the_network_with_median_gates(tmp_path: Path) -> None:
    callback, module = l0(), Classifier(Convolutions())
    begin = at_start(lambda: close_some(callback))
    fit(module, callback, begin).save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    state = saved["callbacks"][callback.state_key]
    for name, weight in saved["state_dict"].items():
        if name in callback.masks:
            assert torch.equal(weight, median_gates(callback, name) * state["dense"][name])
            assert torch.equal(weight != 0, saved_masks(saved)[name])
    assert 0.1 < callback.measured_sparsity()["sparsity/net.0.weight"] < 0.5


def test_a_second_fit_goes_on_from_the_same_dense_weights_and_gates() -> None:
    callback, module = l0(), Classifier(Convolutions())
    fit(module, callback, at_start(lambda: close_some(callback)), max_epochs=1)
    before = copy.deepcopy(callback.state_dict())
    again: dict[str, Any] = {}
    fit(module, callback, at_start(lambda: again.update(copy.deepcopy(callback.state_dict()))), max_epochs=1)
    assert differences(before, again) == []
    fresh, other = Classifier(conv_net(3)), Classifier(conv_net(3))
    new = l0()
    assert differences(snapshot(fit(fresh, callback), fresh, callback), snapshot(fit(other, new), other, new)) == []


@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_low_precision_weights_have_gates_in_float32(unit: str) -> None:
    callback, module = l0(unit=unit, l2=0.01), Classifier(double_mlp().bfloat16())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)  # type: ignore[method-assign]
    fit(module, callback)
    for name in callback.masks:
        assert callback.aux[f"log_alpha/{name}"].dtype == torch.float32
        assert dense_values(callback, name).dtype == module.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(
            module.get_parameter(name), (median_gates(callback, name) * dense_values(callback, name)).bfloat16()
        )


def test_copies_and_pickles() -> None:
    callback, module = l0(), Classifier(double_mlp())
    fit(module, callback, max_steps=3)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert differences(callback.state_dict(), twin.state_dict()) == []
        assert twin.figures() == callback.figures()
