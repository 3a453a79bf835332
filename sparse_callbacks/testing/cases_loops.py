"""The contract for steps and runs of every kind: windows, skipped steps, manual loops, evaluation."""

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn

from sparse_callbacks.testing.comparison import assert_counts, assert_effective, differences, lasting, snapshot
from sparse_callbacks.testing.data import Batches, Thirds
from sparse_callbacks.testing.networks import ByHand, Classifier, conv_net, double_mlp
from sparse_callbacks.testing.runs import Stops, fit, trainer_for, watch
from sparse_callbacks.testing.subject import Contract, needs

# ---------------------------------------------------------------------- steps that are not what they seem


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_micro_batches_equal_one_large_batch(self: Contract, optimizer: str, clip: float | None) -> None:
    """Micro-batches of one window give the masks and weights of one large batch."""
    large, small = self.method(), self.method()
    whole, parts = Classifier(double_mlp(hidden=32), optimizer), Classifier(double_mlp(hidden=32), optimizer)
    masks: dict[int, list[dict[str, Tensor]]] = {1: [], 3: []}

    for window, module, callback, loader in ((1, whole, large, Batches()), (3, parts, small, Thirds())):
        recorded = masks[window]
        see = watch(lambda *_, c=callback, r=recorded: r.append({n: m.clone() for n, m in c.masks.items()}))
        fit(module, callback, see, loader=loader, accumulate_grad_batches=window, gradient_clip_val=clip)
    assert differences(masks[1], masks[3][2::3]) == []
    assert (large.step, large.updates) == (small.step, small.updates)
    # sums of three parts round otherwise
    assert all(
        torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in zip(whole.parameters(), parts.parameters(), strict=True)
    )


@needs("one network")
def test_a_skipped_fp16_step_changes_nothing(self: Contract) -> None:
    """A step that the GradScaler skips changes no weight, mask, count or optimizer state."""

    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # every other batch, so that steps with and without an update due are hit
            return self.loss(batch) * (float("inf") if batch_idx % 2 == 0 else 1.0)

    callback, module = self.method(restart=False), Overflows(optimizer="adamw")
    stepped: list[int] = []
    skipped: list[list[str]] = []
    state: dict[str, Any] = {}

    def start(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        trainer.optimizers[0].register_step_post_hook(lambda *_: stepped.append(trainer.global_step))
        state["last"] = relevant(trainer, module)

    def relevant(trainer: pl.Trainer, module: pl.LightningModule) -> dict[str, Any]:
        found = snapshot(trainer, module, callback)
        # batch statistics belong to the forward pass, the scheduler and the global step to the Trainer
        return {
            "weights": {n: p.detach().clone() for n, p in module.named_parameters()},
            "optimizers": [o["state"] for o in found["optimizers"]],
            **{k: found[k] for k in ("masks", "counts")},
            "callbacks": [lasting(c) for c in found["callbacks"]],
        }

    def check(trainer: pl.Trainer, module: pl.LightningModule, index: int) -> None:
        now = relevant(trainer, module)
        if len(stepped) == state.get("steps", 0):
            skipped.append(differences(state["last"], now))
        state.update(last=now, steps=len(stepped))
        assert_effective(module, callback)

    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    begin = pl.callbacks.LambdaCallback(on_train_start=start)
    trainer = fit(module, callback, begin, watch(check), plugins=[precision], max_epochs=4)
    assert len(skipped) == 16
    assert len(stepped) == 16
    assert skipped == [[]] * 16
    assert trainer.global_step == 32
    replaced = 16 - callback.step
    assert replaced == (callback.updates if replaced else 0)
    assert (callback.updates > 2) == self.moves()


@needs("one network", "runs of a step")
@pytest.mark.parametrize("bad", range(6))
def test_a_gradient_that_is_not_finite_moves_no_mask(self: Contract, bad: int) -> None:
    """A step whose gradient holds inf or NaN moves no mask and no state of the method."""

    callback = self.method(sparsity=0.3, partitions=1, rounds=1, every=1, restart=False)

    class Breaks(Classifier):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == bad:
                last = [p for n, p in self.named_parameters() if n in callback.masks and p.ndim > 1][-1]
                cast(Tensor, last.grad).view(-1)[0] = float("nan" if bad % 2 else "inf")

    states: list[Any] = []

    def keep(trainer: pl.Trainer, *_: Any) -> None:
        # dense weights are weights, and take the step as weights do
        states.append(
            copy.deepcopy((callback.masks, lasting({k: v for k, v in callback.state_dict().items() if k != "dense"})))
        )

    begin = pl.callbacks.LambdaCallback(on_train_start=lambda trainer, module: keep(trainer))
    fit(Breaks(), callback, begin, watch(keep), limit_train_batches=bad + 1, max_epochs=1)
    assert len(states) == bad + 2
    assert differences(states[-2], states[-1]) == []
    assert bad == 0 or differences(states[0], states[-1]) != []


# ---------------------------------------------------------------------- models and runs of every kind


class Late(Classifier):
    """A model that exists from configure_model on."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(nn.Identity())
        self.net = None
        self.seed = seed

    def configure_model(self) -> None:
        if self.net is None:
            self.net = conv_net(self.seed)


def test_a_model_made_in_configure_model(self: Contract, tmp_path: Path) -> None:
    """A model that exists from configure_model on trains and resumes like any other."""
    late, usual, stops = Late(), Classifier(), Stops(tmp_path, (5,))
    mine, theirs = self.method(), self.method()
    trainer = fit(late, mine, stops)
    expected = snapshot(trainer, late, mine)
    assert differences(expected, snapshot(fit(usual, theirs), usual, theirs)) == []
    other, callback = Late(seed=9), self.method()
    assert differences(expected, snapshot(fit(other, callback, ckpt_path=stops.path(5)), other, callback)) == []


def test_a_second_fit_goes_on_and_a_fresh_model_starts_anew(self: Contract) -> None:
    """A second fit goes on from the first; with a fresh model a used callback is like a new one."""
    small = {
        "rounds": 1,
        "partitions": 2 if self.promises("one network") else 1,
    }  # for phases that end within eight steps
    module, callback = Classifier(), self.method(**small)
    fit(module, callback, max_epochs=1)
    state = copy.deepcopy((callback.masks, lasting(callback.state_dict())))
    starts: list[Any] = []

    def start(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert_effective(module, callback)
        starts.append(copy.deepcopy((callback.masks, lasting(callback.state_dict()))))

    begin = pl.callbacks.LambdaCallback(on_train_start=start)
    steps, updates = callback.step, callback.updates
    fit(module, callback, begin, max_epochs=1)
    assert differences(state, starts[0]) == []
    assert callback.step > steps
    assert (callback.updates > updates) == self.promises("updates at an interval")
    assert_counts(callback) if callback.at_target and self.promises("planned counts") else None

    fresh, again, first_time = Classifier(conv_net(3)), Classifier(conv_net(3)), self.method(**small)
    reused = fit(fresh, callback)
    assert differences(snapshot(reused, fresh, callback), snapshot(fit(again, first_time), again, first_time)) == []


@needs("one network", "planned counts")
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_manual_optimization_equals_automatic(self: Contract, window: int, clip: float | None) -> None:
    """Manual optimization ends where automatic optimization ends."""
    if clip is not None and not self.promises("gradients ready for a clip by hand"):
        pytest.skip("the user's clip and the Trainer's see other gradients")
    automatic, manual = self.method(every=2, stop=7), self.method(every=2, stop=7)
    usual, by_hand = Classifier(), ByHand(window=window, clip=clip)
    one = fit(usual, automatic, accumulate_grad_batches=window, gradient_clip_val=clip)
    other = fit(by_hand, manual)
    first, second = (lasting(snapshot(*run)) for run in ((one, usual, automatic), (other, by_hand, manual)))
    for found in (first, second):
        found["callbacks"], found["aux"] = [list(map(lasting, found[k])) for k in ("callbacks", "aux")]
        if hasattr(automatic, "when"):  # a Trainer does not know how many steps by hand make an epoch
            found["callbacks"] = [{k: v for k, v in state.items() if k != "times"} for state in found["callbacks"]]
    if clip is None:  # then nobody reads automatic gradients, and pruned weights keep a momentum that is never used
        first.pop("optimizers"), second.pop("optimizers")
    # the sign of a masked zero depends on when it was masked
    assert differences(first, second, bitwise=False) == []
    assert (automatic.updates > 2) == self.moves()


# ---------------------------------------------------------------------- evaluation and trial runs


def test_evaluation_never_trips_a_refusal_and_changes_nothing(self: Contract, tmp_path: Path) -> None:
    """validate, test and predict refuse nothing that only fit refuses, and change nothing but masks, which are those of
    the checkpoint where its state can be taken."""
    refused = [
        self.method(include=["nothing.*"]),
        self.method(every=1000, stop=2000),
        self.method(every=0.5, stop=1.0),
        self.method(seed=8),
    ]
    trained, callback = Classifier(), self.method()
    fit(trained, callback).save_checkpoint(tmp_path / "sparse.ckpt")
    dense = Classifier(conv_net(4), optimizer="adagrad")
    fit(dense).save_checkpoint(tmp_path / "dense.ckpt")
    data = Batches(batches=1)
    for module, guest, path in [
        *((m, c, None) for m in (trained, dense) for c in (*refused, callback)),
        *((trained, c, tmp_path / file) for c in (*refused, callback) for file in ("dense.ckpt", "sparse.ckpt")),
    ]:
        # a host that fit refuses; resuming from a checkpoint needs ModelPruning's own keys
        hosts = [] if path else [pl.callbacks.ModelPruning("l1_unstructured", amount=0.5, apply_pruning=False)]
        trainer = trainer_for([guest, *hosts], max_epochs=-1)
        before = copy.deepcopy((guest.masks, guest.step, guest.updates))
        keep = copy.deepcopy(module.state_dict())
        trainer.validate(module, data, ckpt_path=path, verbose=False)
        trainer.test(module, data, ckpt_path=path, verbose=False)
        trainer.predict(module, data, ckpt_path=path)
        taken = path == tmp_path / "sparse.ckpt" and guest.arguments == callback.arguments
        expected = (callback.masks, callback.step, callback.updates) if taken else before
        assert differences(expected, (guest.masks, guest.step, guest.updates)) == []
        weights = torch.load(path, weights_only=True)["state_dict"] if path else keep
        assert differences(weights, dict(module.state_dict())) == []


def test_sanity_check_and_validation_change_nothing(self: Contract) -> None:
    """The sanity check and validation change nothing."""
    seen: list[str] = []
    kept: list[dict[str, Any]] = []

    def start(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        kept.append(snapshot(trainer, module, callback))

    def end(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        seen.extend([str(trainer.sanity_checking), *differences(kept.pop(), snapshot(trainer, module, callback))])

    callback, without = self.method(), self.method()
    module, plain = Classifier(), Classifier()
    trainer = trainer_for(
        [callback, pl.callbacks.LambdaCallback(on_validation_start=start, on_validation_end=end)], val_check_interval=4
    )
    trainer.fit(module, Batches(), Batches(batches=2, seed=1))
    assert seen == ["True", "False", "False", "False", "False"]
    assert differences(snapshot(trainer, module, callback), snapshot(fit(plain, without), plain, without)) == []


@pytest.mark.parametrize("steps", [True, 3])
def test_fast_dev_run_never_trips_a_refusal(self: Contract, steps: int) -> None:
    """fast_dev_run runs whatever the times of updates."""
    long = {k: v for k, v in self.settings.arguments.items() if k in ("every", "stop")}
    for changes in (
        {},
        long,
        {"every": 1000, "start": 500, "stop": 2000},
        {"every": 1000, "stop": 0.75},
        {"every": 0.2, "stop": 0.75},
    ):
        callback, module = self.method(**changes), Classifier()
        trainer = trainer_for([callback], fast_dev_run=steps)
        trainer.fit(module, Batches(), Batches(batches=2))
        assert trainer.global_step == int(steps)
        assert_effective(module, callback)
