"""The contract: every promise of the shell, for every method that has a yaml in conf/method/."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from support import processes
from support.data import Batches, Thirds
from support.inside import dense_values, forget_compiled_code
from support.methods import CONFIGS, MASKED, METHODS, PROMISES, SETTINGS, STEADY, STEPS, masks_gradients, method, moves, promises
from support.nets import OPTIMIZERS, ByHand, Classifier, Rivals, conv_net, double_mlp
from support.processes import run_two_processes
from support.rig import (
    Stops,
    assert_counts,
    assert_effective,
    differences,
    fit,
    lasting,
    per_element_state,
    snapshot,
    sparse_weights,
    structure,
    trainer_for,
    watch,
)
from torch import Tensor, nn

import sparse_callbacks

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
every_method = pytest.mark.parametrize("name", METHODS)
every_steady_method = pytest.mark.parametrize("name", STEADY)
every_masked_method = pytest.mark.parametrize("name", MASKED)


def test_methods_are_found() -> None:
    assert len(METHODS) >= 5
    assert all(set(SETTINGS[name].promises_not_made) <= set(PROMISES) for name in METHODS)
    assert all(isinstance(method(name), sparse_callbacks.SparsityCallback) for name in METHODS)


# ---------------------------------------------------------------------- effective weights


@every_method
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_weights_are_effective_after_every_batch(name: str, optimizer: str) -> None:
    callback, module = method(name), Classifier(optimizer=optimizer)
    before = copy.deepcopy(module.state_dict())
    seen: list[int] = []

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        assert_effective(module, callback)
        seen.append(index)

    at_start = pl.callbacks.LambdaCallback(on_train_batch_start=lambda *_: assert_effective(module, callback))
    fit(module, callback, at_start, watch(check))
    assert seen == list(range(STEPS))
    for key, (weight, mask) in sparse_weights(module, callback).items():
        assert not torch.equal(weight[mask], before[key][mask]), f"{key} never moved"
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert (callback.updates > 2) == moves(name)


@every_masked_method
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_training_equals_a_hand_written_loop(name: str, optimizer: str, clip: float | None) -> None:
    """Given the masks after each batch, a plain loop (mask gradients, clip, step, mask weights) has the same weights, bit by bit.

    With a dense copy: gradients are not masked, and the dense weights take the step.
    """
    callback, module = method(name, restart=False), Classifier(optimizer=optimizer)
    by_hand = copy.deepcopy(module)
    masks: list[dict[str, Tensor]] = []
    steps = [0]
    weights_after: list[dict[str, Tensor]] = []

    def record(trainer: pl.Trainer, *_: Any) -> None:
        masks.append({n: m.clone() for n, m in callback.masks.items()})
        weights_after.append({n: module.get_parameter(n).detach().clone() for n in callback.masks})
        steps.append(callback.step)

    started = pl.callbacks.LambdaCallback(on_train_start=lambda trainer, module: masks.append(callback.masks))
    trainer = fit(module, callback, started, watch(record), gradient_clip_val=clip)
    configured = by_hand.configure_optimizers()
    plain, rates = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    weights = dict(by_hand.named_parameters())
    dense = {key: weights[key].detach().clone() for key in masks[0]} if not promises(name, "pruned weights rest") else {}
    with torch.no_grad():
        for key, mask in masks[0].items():
            weights[key].mul_(mask)
    for index, batch in enumerate(Batches().all(2)):
        plain.zero_grad()
        by_hand.loss(batch).backward()
        if steps[index + 1] > steps[index]:  # otherwise an update took this step's place
            for key, mask in masks[index].items():
                weights[key].grad.copy_(SETTINGS[name].gradient_rule(mask, weights[key].grad))
                weights[key].data.copy_(dense.get(key, weights[key]))
            if clip is not None:
                nn.utils.clip_grad_norm_(by_hand.parameters(), clip)
            plain.step()
        for key, value in dense.items():
            value.copy_(weights[key].detach())
            weights[key].data.mul_(masks[index + 1][key])
        with torch.no_grad():
            for key, mask in {} if dense else masks[index].items():
                for value in per_element_state(plain, weights[key]).values():
                    value.masked_fill_(masks[index + 1][key] & ~mask, 0)
                weights[key].mul_(mask & masks[index + 1][key])
                if not promises(name, "grown weights start from zero"):
                    born = masks[index + 1][key] & ~mask
                    weights[key][born] = weights_after[index][key][born]
        rates.step()
    assert all(torch.equal(a, b) for a, b in zip(module.state_dict().values(), by_hand.state_dict().values(), strict=True))
    theirs = dict(module.named_parameters())
    for key, mask in masks[-1].items():
        mine = per_element_state(plain, weights[key])
        for kind, value in per_element_state(trainer.optimizers[0], theirs[key]).items():
            assert torch.equal(value[mask], mine[kind][mask]), (key, kind)


@every_masked_method
def test_gradients_are_masked_before_they_are_clipped(name: str) -> None:
    class Clips(Classifier):
        def configure_gradient_clipping(self, optimizer: Any, **_: Any) -> None:
            for key, (_, mask) in sparse_weights(self, callback).items():
                gradient = self.get_parameter(key).grad
                if gradient is not None and not mask.all():
                    assert bool(gradient[~mask].any()) != masks_gradients(name), f"{key}: gradients of pruned weights at the clip"
                seen.append(gradient)
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")

    seen: list[Tensor | None] = []
    callback = method(name)
    fit(Clips(), callback)
    assert not all(bool(m.all()) for m in callback.masks.values())
    assert sum(g is not None for g in seen) >= 2 * len(seen) // 3


# ---------------------------------------------------------------------- checkpoints


@every_method
def test_state_dict_keys_stay_and_a_plain_model_loads_strictly(name: str, tmp_path: Path) -> None:
    module, callback = Classifier(optimizer="adamw"), method(name)
    keys = list(module.state_dict())
    seen: list[list[str]] = []
    trainer = fit(module, callback, watch(lambda trainer, module, _: seen.append(list(module.state_dict()))))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert all(k == keys for k in seen)
    assert len(seen) == STEPS
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    plain = Classifier(conv_net(seed=5))
    plain.load_state_dict(saved["state_dict"], strict=True)
    x = Batches().x
    assert torch.equal(plain.eval().net(x), module.eval().net(x))
    assert_effective(plain, callback)


def resumed_differently(
    make: Callable[[], list[Any]], folder: Path, after: tuple[int, ...], optimizer: str, **options: Any
) -> dict[int, list[str]]:
    """What differs at the end of a run between never stopping and resuming after each of these batches, with other initial
    weights and another RNG state."""
    torch.manual_seed(1)
    module, callbacks, stops = Classifier(optimizer=optimizer), make(), Stops(folder, after)
    expected = snapshot(fit(module, *callbacks, stops, **options), module, *callbacks)
    found = {}
    for batch in after:
        assert torch.load(stops.path(batch), weights_only=True)["callbacks"]
        module, callbacks = Classifier(conv_net(seed=100 + batch), optimizer), make()
        torch.manual_seed(1000 + batch)
        trainer = fit(module, *callbacks, ckpt_path=stops.path(batch), **options)
        found[batch] = differences(expected, snapshot(trainer, module, *callbacks))
    return found


@every_method
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_is_bitwise(name: str, optimizer: str, tmp_path: Path) -> None:
    # updates come with batches 1, 5, 9, ... where they replace a step, and after 1, 4, 7, ... where they follow one
    after = (1, 2, 3, 4, 5, 8, 9, 13, 14)
    options = {"gradient_clip_val": 0.5} if optimizer == "sgd" else {}
    assert resumed_differently(lambda: [method(name)], tmp_path, after, optimizer, **options) == {b: [] for b in after}


@every_method
def test_resume_is_bitwise_with_times_in_fractions_of_the_run(name: str, tmp_path: Path) -> None:
    after = (5, 11)

    def make() -> list[Any]:
        return [method(name, every=0.2, start=0.1, stop=0.8)]

    assert resumed_differently(make, tmp_path, after, "adamw") == {b: [] for b in after}


@every_method
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_inside_an_accumulation_window_is_bitwise(name: str, optimizer: str, tmp_path: Path) -> None:
    after = (1, 2, 4, 5, 12, 14, 15, 18)  # windows end after 3, 6, 9, 12, 15, ...
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "loader": Batches(batches=12)}

    def make() -> list[Any]:
        return [method(name, every=2, stop=6)]

    assert resumed_differently(make, tmp_path, after, optimizer, **options) == {b: [] for b in after}
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"]
    assert "grads" in next(iter(saved.values()))


@every_method
def test_callback_state_loads_as_weights_only(name: str, tmp_path: Path) -> None:
    callback = method(name)
    trainer = fit(Classifier(), callback)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert differences(callback.state_dict(), saved) == []
    assert differences(callback.masks, saved["masks"]) == []


# ---------------------------------------------------------------------- steps that are not what they seem


@every_method
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_micro_batches_equal_one_large_batch(name: str, optimizer: str, clip: float | None) -> None:
    large, small = method(name), method(name)
    whole, parts = Classifier(double_mlp(), optimizer), Classifier(double_mlp(), optimizer)
    masks: dict[int, list[dict[str, Tensor]]] = {1: [], 3: []}

    for window, module, callback, loader in ((1, whole, large, Batches()), (3, parts, small, Thirds())):
        recorded = masks[window]
        see = watch(lambda *_, c=callback, r=recorded: r.append({n: m.clone() for n, m in c.masks.items()}))
        fit(module, callback, see, loader=loader, accumulate_grad_batches=window, gradient_clip_val=clip)
    assert differences(masks[1], masks[3][2::3]) == []
    assert (large.step, large.updates) == (small.step, small.updates)
    # sums of three parts round otherwise
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


@every_steady_method
def test_a_skipped_fp16_step_changes_nothing(name: str) -> None:
    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            # every other batch, so that steps with and without an update due are hit
            return self.loss(batch) * (float("inf") if batch_idx % 2 == 0 else 1.0)

    callback, module = method(name, restart=False), Overflows(optimizer="adamw")
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
    assert (callback.updates > 2) == moves(name)


@every_steady_method
@pytest.mark.parametrize("bad", range(6))
def test_a_gradient_that_is_not_finite_moves_no_mask(name: str, bad: int) -> None:
    class Breaks(Classifier):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == bad:
                self.net[-1].weight.grad[0, 0] = float("nan" if bad % 2 else "inf")

    callback = method(name, sparsity=0.3, partitions=1, rounds=1, every=1, restart=False)
    states: list[Any] = []

    def keep(trainer: pl.Trainer, *_: Any) -> None:
        # dense weights are weights, and take the step as weights do
        states.append(copy.deepcopy((callback.masks, lasting({k: v for k, v in callback.state_dict().items() if k != "dense"}))))

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
        self.net = None  # type: ignore[assignment]
        self.seed = seed

    def configure_model(self) -> None:
        if self.net is None:
            self.net = conv_net(self.seed)


@every_method
def test_a_model_made_in_configure_model(name: str, tmp_path: Path) -> None:
    late, usual, stops = Late(), Classifier(), Stops(tmp_path, (5,))
    mine, theirs = method(name), method(name)
    trainer = fit(late, mine, stops)
    expected = snapshot(trainer, late, mine)
    assert differences(expected, snapshot(fit(usual, theirs), usual, theirs)) == []
    other, callback = Late(seed=9), method(name)
    assert differences(expected, snapshot(fit(other, callback, ckpt_path=stops.path(5)), other, callback)) == []


@every_method
def test_a_second_fit_goes_on_and_a_fresh_model_starts_anew(name: str) -> None:
    small = {"rounds": 1, "partitions": 2 if promises(name, "one network") else 1}  # for phases that end within eight steps
    module, callback = Classifier(), method(name, **small)
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
    assert (callback.updates > updates) == promises(name, "updates at an interval")
    assert_counts(callback) if callback.at_target and promises(name, "planned counts") else None

    fresh, again, first_time = Classifier(conv_net(3)), Classifier(conv_net(3)), method(name, **small)
    reused = fit(fresh, callback)
    assert differences(snapshot(reused, fresh, callback), snapshot(fit(again, first_time), again, first_time)) == []


@every_masked_method
@pytest.mark.parametrize("window", [1, 2])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_manual_optimization_equals_automatic(name: str, window: int, clip: float | None) -> None:
    automatic, manual = method(name, every=2, stop=7), method(name, every=2, stop=7)
    usual, by_hand = Classifier(), ByHand(window=window, clip=clip)
    one = fit(usual, automatic, accumulate_grad_batches=window, gradient_clip_val=clip)
    other = fit(by_hand, manual)
    first, second = (lasting(snapshot(*run)) for run in ((one, usual, automatic), (other, by_hand, manual)))
    for found in (first, second):
        found["callbacks"], found["aux"] = [list(map(lasting, found[k])) for k in ("callbacks", "aux")]
    if clip is None:  # then nobody reads automatic gradients, and pruned weights keep a momentum that is never used
        first.pop("optimizers"), second.pop("optimizers")
    # the sign of a masked zero depends on when it was masked
    assert differences(first, second, bitwise=False) == []
    assert (automatic.updates > 2) == moves(name)


@every_masked_method
def test_several_optimizers(name: str) -> None:
    callback, module = method(name), Rivals()
    nets, calls, replaced, checked = [module.maker, module.critic], [0, 0], [0, 0], [0]
    last: dict[str, Any] = {}

    def see() -> dict[str, Any]:
        steps = callback.state_dict()["steps"]
        return copy.deepcopy(
            {
                "weights": [{n: p.detach() for n, p in net.named_parameters()} for net in nets],
                "states": [o.state_dict()["state"] for o in module.trainer.optimizers],
                "masks": [{n: m for n, m in callback.masks.items() if n.startswith(part)} for part in ("maker", "critic")],
                "steps": [steps["0"], steps["1"]],
            }
        )

    def before_clip(index: int) -> None:
        for key, (_, mask) in sparse_weights(module, callback).items():
            if key.startswith(("maker", "critic")[index]):
                gradient = module.get_parameter(key).grad
                assert gradient is not None
                if not mask.all():
                    assert bool(gradient[~mask].any()) != masks_gradients(name), f"{key}: gradients of pruned weights at the user's clip"
                checked[0] += 1
        last.update(see())

    def after_step(index: int) -> None:
        calls[index] += 1
        now, other = see(), 1 - index
        for kind in ("weights", "states", "masks", "steps"):
            assert differences(last[kind][other], now[kind][other]) == [], f"a step of optimizer {index} touched the other's {kind}"
        biases = [{k: v for k, v in w["weights"][index].items() if "bias" in k} for w in (last, now)]
        if now["steps"][index] == last["steps"][index]:
            replaced[index] += 1
            assert differences(*biases) == []
        else:
            assert now["steps"][index] == last["steps"][index] + 1
            assert len(differences(*biases)) == 2
        assert_effective(module, callback)

    module.before_clip, module.after_step = before_clip, after_step
    trainer = fit(module, callback)
    assert calls == [16, 32]
    assert trainer.global_step == 48
    assert checked == [2 * 48]
    assert [now + r for now, r in zip(see()["steps"], replaced, strict=True)] == calls
    assert replaced in ([0, 0], [4, 5])  # at the steps 0, 3, 6, 9 and 12 of each optimizer, as far as they come, or never
    assert (callback.updates > 2) == moves(name)
    assert_counts(callback)


@every_masked_method
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_frozen_unused_and_tied_parameters(name: str, optimizer: str) -> None:
    class Odd(Classifier):
        def __init__(self) -> None:
            super().__init__(conv_net(), optimizer)
            self.frozen, self.unused = nn.Linear(4, 12).requires_grad_(False), nn.Linear(12, 12)
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)
            self.second.weight = self.first.weight

        def loss(self, batch: Any) -> Tensor:
            x, y = batch
            return nn.functional.cross_entropy(self(x), y)

        def forward(self, x: Tensor) -> Tensor:
            return self.second(torch.tanh(self.first(self.frozen(self.net(x)))))

    callback, module = method(name), Odd()
    frozen, unused = module.frozen.weight.clone(), module.unused.weight.detach().clone()
    seen: list[Tensor] = []
    always = torch.ones(12, 12, dtype=torch.bool)

    def check(trainer: pl.Trainer, module: Odd, index: int) -> None:
        assert_effective(module, callback)
        seen.append(callback.masks["first.weight"].clone())
        always.logical_and_(callback.masks["unused.weight"])

    fit(module, callback, watch(check))
    assert torch.equal(module.frozen.weight, frozen)
    assert "frozen" in callback.plan()["frozen.weight"].reason
    assert "frozen.weight" not in callback.masks
    assert "second.weight" not in callback.masks
    assert module.second.weight is module.first.weight
    assert any(not torch.equal(seen[0], m) for m in seen) == (moves(name) or not promises(name, "one network"))
    assert always.any()
    assert torch.equal(module.unused.weight[always], unused[always])
    assert_counts(callback)


# ---------------------------------------------------------------------- counts


DISTRIBUTIONS = ["uniform", "erdos_renyi", "erdos_renyi_kernel", {"rnn.*": 0.37, "*.fc?.weight": "erdos_renyi", "*": "uniform"}]


@every_masked_method
@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=str)
@pytest.mark.parametrize("keep_dense", [None, "first"])
def test_counts_are_exactly_the_planned_ones(name: str, distribution: Any, keep_dense: str | None) -> None:
    class Mixed(Classifier):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.parts = nn.ModuleDict({"fc1": nn.Linear(25, 12), "fc2": nn.Linear(12, 4), "up": nn.ConvTranspose2d(2, 3, 3)})
            self.attention, self.rnn = nn.MultiheadAttention(12, 2, batch_first=True), nn.GRU(12, 12, batch_first=True)

        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def forward(self, images: Tensor) -> Tensor:
            x = torch.relu(self.parts["up"](images))[:, :, 1:6, 1:6].flatten(2)
            x, _ = self.rnn(torch.relu(self.parts["fc1"](x)))
            x, _ = self.attention(x, x, x, need_weights=False)
            return self.parts["fc2"](x.mean(1)) + self.net(images)

    others = {}
    if not promises(name, "any layer"):  # those of attention and recurrent layers are not known
        others = {"exclude": ["attention.*", "rnn.*", "parts.*"]}
        distribution = {"*": distribution["*"]} if isinstance(distribution, dict) else distribution
    callback, module = method(name, distribution=distribution, keep_dense=keep_dense, sparsity=0.77, **others), Mixed()
    announced = callback.plan(module)
    reached: list[int] = []

    def check(trainer: pl.Trainer, module: Mixed, index: int) -> None:
        if callback.at_target:
            assert_counts(callback)
            reached.append(index)

    fit(module, callback, watch(check))
    assert callback.at_target
    assert reached
    assert callback.plan() == announced
    measured = callback.measured_sparsity()
    zeros = sum(int((~m).sum()) for m in callback.masks.values())
    assert measured["sparsity/total"] == pytest.approx(zeros / sum(m.numel() for m in callback.masks.values()), abs=1e-12)
    assert measured["sparsity/total"] == pytest.approx(announced.total, abs=1e-12)
    assert measured["sparsity/model"] == pytest.approx(zeros / sum(p.numel() for p in module.parameters()), abs=1e-12)
    assert measured["sparsity/model"] == pytest.approx(announced.model, abs=1e-12)
    selected = [row for row in announced if row.name in announced.selected]
    assert {r.name for r in selected} == set(callback.masks)
    assert {k for k in measured if k not in ("sparsity/total", "sparsity/model")} == {f"sparsity/{r.name}" for r in selected}
    for row in selected:
        if announced.joint is None:
            assert measured[f"sparsity/{row.name}"] == pytest.approx(row.zeros / row.size, abs=1e-12)
        assert row.shape == tuple(module.get_parameter(row.name).shape)
    if distribution == "uniform":
        parts = {"attention.in_proj_weight": 3, "rnn.weight_ih_l0": 3, "rnn.weight_hh_l0": 3}
        assert all(r.zeros == parts.get(r.name, 1) * int(0.77 * (r.size // parts.get(r.name, 1))) for r in selected)
    assert ("net.0.weight" in callback.masks) == (keep_dense is None)


# ---------------------------------------------------------------------- updates


@every_masked_method
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_updates_move_masks_and_nothing_else(name: str, optimizer: str) -> None:
    """Grown weights start from nothing; a step that an update replaces moves no weight, no momentum and no counter."""
    callback, module = method(name, restart=False), Classifier(optimizer=optimizer)
    last: dict[str, Any] = {}
    grown, regrown, replaced = [0], [0], [0]
    copied = not promises(name, "pruned weights rest")

    def keep(trainer: pl.Trainer, module: Classifier, *_: Any) -> None:
        optimizer = trainer.optimizers[0]
        last.update(
            copy.deepcopy(
                {
                    "weights": {n: p.detach() for n, p in module.named_parameters()},
                    "state": {n: dict(optimizer.state[p]) for n, p in module.named_parameters()},
                    "masks": callback.masks,
                    "counts": (callback.step, callback.updates, trainer.global_step, optimizer.param_groups[0]["lr"]),
                }
            )
        )

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        optimizer, before = trainer.optimizers[0], dict(last)
        for key, (weight, mask) in sparse_weights(module, callback).items():
            born = mask & ~before["masks"][key]
            grown[0] += int(born.sum())
            if copied:
                assert torch.equal(weight[born], dense_values(callback, key)[born])
                assert weight[born].all()
            elif not promises(name, "grown weights start from zero"):
                assert weight[born].all()
            else:
                assert not weight[born].any()
            parameter = module.get_parameter(key)
            for kind, value in per_element_state(optimizer, parameter).items():
                assert bool(value[born].any()) == (copied and bool(born.any())), f"{key}: {kind} of grown weights is not zero"
                if index:
                    stayed = mask & before["masks"][key]
                    assert value[stayed].any(), f"{key}: {kind} of old weights is lost"
        keep(trainer, module)
        step, updates, global_step, rate = before["counts"]
        assert global_step + 1 == trainer.global_step
        assert optimizer.param_groups[0]["lr"] < rate
        if callback.step > step:
            assert callback.step == step + 1
            return
        replaced[0] += 1
        assert callback.updates == updates + 1
        for key in last["weights"]:
            mask = callback.masks.get(key, torch.ones_like(last["weights"][key], dtype=torch.bool))
            stays = mask & before["masks"].get(key, mask)
            assert torch.equal(last["weights"][key][stays], before["weights"][key][stays]), f"{key} moved in an update"
            assert set(last["state"][key]) == set(before["state"][key])
            for kind, value in before["state"][key].items():
                now = last["state"][key][kind]
                alike = torch.equal(now, value) if now.shape != mask.shape else torch.equal(now[stays], value[stays])
                assert alike, f"{kind} of {key} moved in an update"
            if key in callback.masks:
                old = before["masks"][key]
                size = before["weights"][key].abs()
                if (left := size[old & ~mask]).numel():  # a smaller one that is there was dropped as well, and grown again
                    regrown[0] += int((size[old & mask] < left.max()).sum())

    begin = pl.callbacks.LambdaCallback(on_train_start=keep)
    fit(module, callback, begin, watch(check))
    assert bool(grown[0]) == (promises(name, "growth") or copied)
    if replaced[0]:
        assert min(grown[0], regrown[0]) > 0
    assert replaced[0] in (0, callback.updates)


# ---------------------------------------------------------------------- other people's code


@every_method
def test_nothing_is_added_to_the_model(name: str) -> None:
    module, callback, dense = Classifier(), method(name), Classifier()
    before = structure(module)
    during: list[Any] = []
    plain: list[Any] = []
    fit(dense, watch(lambda trainer, module, _: plain.append(sorted(vars(module)))))
    trainer = fit(module, callback, watch(lambda *_: during.append((structure(module), sorted(vars(module))))))
    assert all(found == (before, attributes) for found, attributes in zip(during, plain, strict=True))
    assert len(during) == STEPS
    assert structure(module) == before
    assert sorted(vars(module)) == sorted(vars(dense))
    assert not trainer.optimizers[0]._optimizer_step_post_hooks
    assert not trainer.optimizers[0]._optimizer_step_pre_hooks


@every_method
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_one_compiled_graph_equal_to_eager(name: str, optimizer: str) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def counting(graph: torch.fx.GraphModule, inputs: Any) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    usual, compiled, one, other = Classifier(optimizer=optimizer), Classifier(optimizer=optimizer), method(name), method(name)
    forget_compiled_code()
    compiled.net.compile(backend=counting)
    expected = snapshot(fit(usual, one), usual, one)
    assert differences(expected, snapshot(fit(compiled, other), compiled, other)) == []
    assert len(graphs) == 1
    assert (other.updates > 2) == moves(name)


@every_masked_method
def test_two_callbacks_equal_one_over_both_layers(name: str, tmp_path: Path) -> None:
    """Also where updates of both are due at the same step, and one of them takes its gradients away."""
    common = {"distribution": "uniform", "partitions": 1, "rounds": 1}
    together = method(name, **common)
    apart = [method(name, **common, **{k: ["net.0.*"]}) for k in ("include", "exclude")]
    assert apart[0].state_key != apart[1].state_key
    whole, halves, stops = Classifier(), Classifier(), Stops(tmp_path, (6,))
    initial: list[dict[str, Tensor]] = []
    begin = pl.callbacks.LambdaCallback(on_train_start=lambda *_: initial.append(together.masks))
    first = fit(whole, together, begin, gradient_clip_val=0.5)
    assert (len(differences(initial[0], together.masks)) == 3) == moves(name)
    second = fit(halves, *apart, stops, gradient_clip_val=0.5)
    assert differences(together.masks, apart[0].masks | apart[1].masks) == []
    assert differences(snapshot(first, whole)["weights"], snapshot(second, halves)["weights"]) == []
    assert {(c.step, c.updates) for c in apart} == {(together.step, together.updates)}
    expected = snapshot(second, halves, *apart)
    module, again = Classifier(conv_net(9)), [method(name, **common, **{k: ["net.0.*"]}) for k in ("include", "exclude")]
    resumed = fit(module, *again, ckpt_path=stops.path(6), gradient_clip_val=0.5)
    assert differences(expected, snapshot(resumed, module, *again)) == []


@every_masked_method
@pytest.mark.parametrize("other", MASKED)
@pytest.mark.parametrize("clip", [None, 0.5])
def test_two_callbacks_on_disjoint_layers(name: str, other: str, clip: float | None, tmp_path: Path) -> None:
    def make() -> list[Any]:
        one = {"stop": 12, "partitions": 1, "rounds": 1}  # each has one layer
        return [method(name, include=["net.0.*"], every=2, **one), method(other, exclude=["net.0.*", "net.7.*"], every=3, **one)]

    module, pair, stops = Classifier(), make(), Stops(tmp_path, (7,))
    biases: list[Tensor] = [module.net[7].bias.detach().clone()]
    counts: list[tuple[int, ...]] = [(0, 0)]

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        assert_effective(module, *pair)
        biases.append(module.net[7].bias.detach().clone())
        counts.append(tuple(c.step for c in pair))
        moved = not torch.equal(biases[-1], biases[-2])
        assert {now - before for now, before in zip(counts[-1], counts[-2], strict=True)} == {int(moved)}

    expected = snapshot(fit(module, *pair, watch(check), stops, gradient_clip_val=clip), module, *pair)
    assert set(pair[0].masks) == {"net.0.weight"}
    assert set(pair[1].masks) == {"net.4.weight"}
    for callback, chosen in zip(pair, (name, other), strict=True):
        least = 3 if promises(chosen, "updates at an interval") else 1
        assert (callback.updates >= least) == moves(chosen)
        assert_counts(callback) if callback.at_target else None
    fresh, again = Classifier(conv_net(9)), make()
    assert differences(expected, snapshot(fit(fresh, *again, ckpt_path=stops.path(7), gradient_clip_val=clip), fresh, *again)) == []


@every_method
def test_evaluation_never_trips_a_refusal_and_changes_nothing(name: str, tmp_path: Path) -> None:
    refused = [
        method(name, include=["nothing.*"]), method(name, every=1000, stop=2000), method(name, every=0.5, stop=1.0), method(name, seed=8)
    ]  # fmt: skip
    trained, callback = Classifier(), method(name)
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
        assert differences(before, (guest.masks, guest.step, guest.updates)) == []
        weights = torch.load(path, weights_only=True)["state_dict"] if path else keep
        assert differences(weights, dict(module.state_dict())) == []


@every_method
def test_sanity_check_and_validation_change_nothing(name: str) -> None:
    seen: list[str] = []
    kept: list[dict[str, Any]] = []

    def start(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        kept.append(snapshot(trainer, module, callback))

    def end(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        seen.extend([str(trainer.sanity_checking), *differences(kept.pop(), snapshot(trainer, module, callback))])

    callback, without = method(name), method(name)
    module, plain = Classifier(), Classifier()
    trainer = trainer_for([callback, pl.callbacks.LambdaCallback(on_validation_start=start, on_validation_end=end)], val_check_interval=4)
    trainer.fit(module, Batches(), Batches(batches=2, seed=1))
    assert seen == ["True", "False", "False", "False", "False"]
    assert differences(snapshot(trainer, module, callback), snapshot(fit(plain, without), plain, without)) == []


@every_method
@pytest.mark.parametrize("steps", [True, 3])
def test_fast_dev_run_never_trips_a_refusal(name: str, steps: int) -> None:
    long = {k: v for k, v in CONFIGS[name].items() if k in ("every", "stop")}
    for changes in ({}, long, {"every": 1000, "start": 500, "stop": 2000}, {"every": 1000, "stop": 0.75}, {"every": 0.2, "stop": 0.75}):
        callback, module = method(name, **changes), Classifier()
        trainer = trainer_for([callback], fast_dev_run=steps)
        trainer.fit(module, Batches(), Batches(batches=2))
        assert trainer.global_step == int(steps)
        assert_effective(module, callback)


# ---------------------------------------------------------------------- two processes


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two DDP processes found, over every method; one launch for all."""
    folder = tmp_path_factory.mktemp("ddp")
    run_two_processes("replicas", folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in (0, 1)]


@every_steady_method
def test_ranks_hold_the_same_masks(name: str, two_processes: list[dict[str, Any]]) -> None:
    one, other = (results[name] for results in two_processes)
    for run in ("whole", "resumed"):
        assert differences(one[run], other[run]) == []
    assert differences(one["noisy"]["masks"], other["noisy"]["masks"]) == []
    assert differences(one["noisy"]["end"]["masks"], other["noisy"]["end"]["masks"]) == []
    assert differences(one["noisy"]["end"]["weights"], other["noisy"]["end"]["weights"]) != []


@every_steady_method
def test_two_processes_equal_one_on_the_joined_batch(name: str, two_processes: list[dict[str, Any]]) -> None:
    alone = processes.train_replica(name, 0, 1)
    found = two_processes[0][name]
    assert differences(alone["masks"], found["whole"]["masks"]) == []
    assert differences(alone["masks"][processes.REPLICA_STOP :], found["resumed"]["masks"]) == []
    assert (alone["end"]["counts"][0][1] > 2) == moves(name)
    for run in ("whole", "resumed"):
        end = found[run]["end"]
        assert differences(alone["end"]["counts"], end["counts"]) == []
        # the mean of two halves rounds otherwise
        for key, value in alone["end"]["weights"].items():
            assert torch.allclose(value, end["weights"][key], rtol=1e-7, atol=1e-10), (run, key)


@every_method
def test_repr_shows_the_arguments(name: str) -> None:
    callback = method(name, include=["*.weight"], seed=3, distribution={"*conv*": 0.5, "*": "uniform"})
    text = repr(callback)
    assert text.startswith(f"{type(callback).__name__}(")
    assert all(f"{key}=" in text for key in CONFIGS[name] if key != "_target_")
    assert "include=('*.weight',)" in text
    assert "seed=3" in text
    assert "distribution" not in CONFIGS[name] or "distribution={'*conv*': 0.5, '*': 'uniform'}" in text
    names = vars(sparse_callbacks) | vars(sparse_callbacks.core.schedules)
    for one in (callback, method(name), method(name, drop_fraction="linear(0.4)", every=0.1, stop=0.5, keep_dense="both")):
        assert repr(eval(repr(one), names)) == repr(one)
