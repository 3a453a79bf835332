"""RigL in a real Trainer against the numbers of the reference code."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.rigl import ACTIVE_ZEROS, COSINE, DROP_COUNTS, EXPONENTIAL, SINGLE_UPDATE
from pytorch_lightning import Callback
from support.data import loader
from support.inside import around_updates, start_from
from support.nets import FixedGradient, Regression, mlp, row, sgd
from support.rig import copied_masks, fit_steps, record_updates
from torch import Tensor

from sparse_callbacks import RigL, schedules
from sparse_callbacks.testing.runs import trainer_for

# begin, end, every, gradient steps; the method's own step and the batch of every update; batches in all
CALENDARS = [
    (0, 300, 100, 450, [0, 100, 200, 300], [0, 101, 202, 303], 454),
    (0, 10, 5, 12, [0, 5, 10], [0, 6, 12], 15),
    (1, 4, 2, 6, [1, 3], [1, 4], 8),
    (100, 300, 100, 450, [100, 200, 300], [100, 201, 302], 453),
    (0, 1.0, 3, 10, [0, 3, 6, 9], [0, 4, 8, 12], 14),
]


def rigl_from(mask: Tensor, **options: Any) -> RigL:
    """RigL from a given mask."""
    given = {"sparsity": 1 - float(mask.float().mean()), "distribution": "uniform", "print_plan": False}
    callback = RigL(**(given | options))
    start_from(callback, {"net.weight": mask.bool()})
    return callback


@pytest.mark.parametrize(("begin", "end", "every", "steps", "own", "batches", "total"), CALENDARS)
def test_updates_fall_where_the_reference_has_them(
    begin: int, end: Any, every: int, steps: int, own: list[int], batches: list[int], total: int, tmp_path: Path
) -> None:
    callback = RigL(0.5, distribution="uniform", every=every, start=begin, stop=end, drop_fraction="constant(0.3)")
    seen, module = record_updates(callback), Regression(mlp(12, 6))
    made = fit_steps(tmp_path, callback, module, total)
    assert seen == list(zip(own, batches, strict=True))
    assert (callback.step, callback.updates) == (steps, len(own))
    assert made.global_step == module.batches == total == steps + len(own)


def test_under_the_cosine_the_update_at_stop_is_an_ordinary_step(tmp_path: Path) -> None:
    callback = RigL(0.5, distribution="uniform", every=100, stop=300)
    seen = record_updates(callback)
    fit_steps(tmp_path, callback, Regression(mlp(12, 6)), 453)
    assert [step for step, _ in seen] == [0, 100, 200]
    assert (callback.step, callback.updates) == (450, 3)


def test_accumulation_counts_optimizer_steps_and_not_micro_batches(tmp_path: Path) -> None:
    callback = RigL(0.5, distribution="uniform", every=5, stop=10, drop_fraction="constant(0.3)")
    seen = record_updates(callback)
    fit_steps(tmp_path, callback, Regression(), 15, accumulate_grad_batches=3)
    assert seen == [(0, 2), (5, 20), (10, 38)]
    assert callback.step == 12


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_score_is_the_gradient_of_the_whole_window(accumulate: int, tmp_path: Path) -> None:
    mask, gradient = row([1, 0, 0, 0]), row([0.0, 0.5, 0.9, 0.8])
    # by the sum of both micro-batches position 1 wins; by the last one, or by the sum of magnitudes, it does not
    parts = [gradient] if accumulate == 1 else [row([0.0, 0.5, 2.0, 0.0]), row([0.0, 0.6, -1.9, 0.9])]
    callback = rigl_from(mask, every=1, stop=5, drop_fraction="constant(1.0)")
    fit_steps(tmp_path, callback, FixedGradient(row([0.1, 0, 0, 0]), parts), 1, accumulate_grad_batches=accumulate)
    assert callback.masks["net.weight"].tolist() == [[False, accumulate == 2, accumulate == 1, False]]


@pytest.mark.parametrize("clip", [None, 1e-12])
@pytest.mark.parametrize("case", [SINGLE_UPDATE, ACTIVE_ZEROS], ids=["single update", "active zeros"])
def test_one_update_of_the_reference(case: Any, clip: float | None, tmp_path: Path) -> None:
    given, expected = case["inputs"], case["expected"]
    callback = rigl_from(row(given["mask"]), every=1, stop=5, drop_fraction=f"constant({given['drop_fraction']})")
    module = FixedGradient(row(given["weights"]), [row(given["dense_grad"])])

    def configure(parameters: Any) -> Any:
        optimizer = sgd(parameters)
        if "momentum" in given:
            optimizer.state[module.net.weight]["momentum_buffer"] = row(given["momentum"])
        return optimizer

    module.configure = configure
    made = fit_steps(tmp_path, callback, module, 1, gradient_clip_val=clip)
    assert callback.updates == 1
    assert callback.masks["net.weight"].int().tolist() == [expected["mask_after"]]
    if "momentum" in given:
        assert module.net.weight.tolist() == row(expected["effective_weights_after"]).tolist()
        buffer = made.optimizers[0].state[module.net.weight]["momentum_buffer"]
        assert buffer.tolist() == [expected["momentum_after"]]


def test_growth_takes_the_largest_gradient_outside_the_mask(tmp_path: Path) -> None:
    weights, mask = row([3, 2, 1, 5, 5, 5]), row([1, 1, 1, 0, 0, 0])
    gradient = row([9, 9, 0.1, 0.2, -0.7, 0.3])  # the largest ones are of weights that stay
    callback = rigl_from(mask, every=1, stop=5, drop_fraction="constant(0.34)")
    fit_steps(tmp_path, callback, FixedGradient(weights, [gradient]), 1)
    assert callback.masks["net.weight"].int().tolist() == [[1, 1, 0, 0, 1, 0]]


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.AdamW, torch.optim.RMSprop], ids=lambda m: m.__name__)
def test_an_update_moves_no_survivor_no_bias_and_no_state(make: Any, tmp_path: Path) -> None:
    options = (
        {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}
        if make is not torch.optim.AdamW
        else {"lr": 0.05, "weight_decay": 0.1}
    )
    callback = RigL(0.6, distribution="uniform", every=5, stop=20, drop_fraction="constant(0.5)")
    kept: dict[str, Any] = {}

    class Watch(Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
            kept.update(
                values=[p.detach().clone() for p in module.parameters()],
                masks=copied_masks(callback),
                updates=callback.updates,
            )
            states = trainer.optimizers[0].state
            kept["state"] = [{k: torch.as_tensor(v).clone() for k, v in states[p].items()} for p in module.parameters()]

        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            if callback.updates == kept["updates"]:
                assert not torch.equal(module.net[0].bias, kept["values"][1])
                return
            for (name, p), old, state in zip(module.named_parameters(), kept["values"], kept["state"], strict=True):
                stays = (
                    callback.masks[name] & kept["masks"][name]
                    if name in callback.masks
                    else torch.ones_like(p, dtype=torch.bool)
                )
                grown = callback.masks[name] & ~kept["masks"][name] if name in callback.masks else ~stays
                assert torch.equal(p[stays], old[stays])
                assert not p[~stays].any()
                for key, before in state.items():
                    now = torch.as_tensor(trainer.optimizers[0].state[p][key])
                    assert (
                        torch.equal(now[~grown], before[~grown]) if now.shape == p.shape else torch.equal(now, before)
                    )
                    assert now.shape != p.shape or not now[grown].any()
                assert grown.any() == (name in callback.masks)

    module = Regression(configure=lambda parameters: make(parameters, **options))
    fit_steps(tmp_path, [callback, Watch()], module, 18)
    assert callback.updates == 3


@pytest.mark.parametrize("case", DROP_COUNTS, ids=lambda c: f"{c['n_ones']}-{c['alpha']}-{c['step']}")
def test_the_count_of_an_update_is_the_references(case: Any, tmp_path: Path) -> None:
    fraction = schedules.cosine(case["alpha"])(case["step"], 0, case["T_end"])
    assert fraction == pytest.approx(case["drop_fraction"], abs=5e-13)
    mask = torch.arange(2 * case["n_ones"])[None] < case["n_ones"]
    gradient = 1.0 - mask.float()
    callback = rigl_from(mask, every=1, stop=5, drop_fraction=schedules.constant(fraction))
    fit_steps(tmp_path, callback, FixedGradient(mask.float(), [gradient]), 1)
    new = callback.masks["net.weight"]
    assert int((new & ~mask).sum()) == int((mask & ~new).sum()) == case["n_prune"]
    assert callback.updates == (case["n_prune"] > 0)


FALLING = [
    pytest.param(0.3, 25000, COSINE["alpha0.3_T25000"], id="cosine to 25000"),
    pytest.param(0.3, 75000, COSINE["alpha0.3_T75000"], id="cosine to 75000"),
    pytest.param(0.5, 1000, COSINE["alpha0.5_T1000"], id="cosine to 1000"),
    pytest.param("exponential(0.3)", 1000, EXPONENTIAL["alpha0.3_T1000_exp3"], id="exponential"),
]


@pytest.mark.parametrize(("given", "stop", "table"), FALLING)
def test_the_drop_fraction_follows_the_reference(
    given: Any, stop: int, table: dict[str, float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = RigL(0.5, drop_fraction=given, stop=stop, every=100)
    fit_steps(tmp_path, callback, Regression(), 1)
    for step, expected in table.items():
        monkeypatch.setattr(RigL, "step", int(step))
        assert callback.fraction == pytest.approx(expected, abs=5e-13)


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (0.4, [0.4, 0.3414213562, 0.2, 0.0585786438]),
        ("linear(0.4)", [0.4, 0.3, 0.2, 0.1]),
        (schedules.cubic(0.4), [0.4, 0.16875, 0.05]),
        ("constant(0.4)", [0.4] * 5),
        ("cosine(0.4, 0.2)", [0.4, 0.3707106781, 0.3, 0.2292893219, 0.2]),
    ],
    ids=str,
)
def test_the_drop_fraction_runs_from_start_to_stop(given: Any, expected: list[float], tmp_path: Path) -> None:
    callback, seen = RigL(0.5, drop_fraction=given, start=10, stop=50, every=10, distribution="uniform"), []
    around_updates(callback, after=lambda update: seen.append(update.figures["update/drop_fraction"]))
    fit_steps(tmp_path, callback, Regression(), 60)
    assert seen == pytest.approx(expected, abs=1e-9)


def test_a_dense_layer_stays_dense_and_the_others_move(tmp_path: Path) -> None:
    callback = RigL(0.5, distribution={"net.0*": 0.0, "*": 0.5}, every=2, stop=10, drop_fraction="constant(0.5)")
    module, masks = Regression(), []
    watch = Callback()
    watch.on_train_batch_end = lambda *_: masks.append(copied_masks(callback))
    fit_steps(tmp_path, [callback, watch], module, 12)
    assert callback.updates == 4
    assert all(m["net.0.weight"].all() for m in masks)
    assert any(not torch.equal(a["net.2.weight"], b["net.2.weight"]) for a, b in pairwise(masks))


def test_no_step_is_lost_where_every_count_is_zero(tmp_path: Path) -> None:
    callback = RigL(
        0.8, distribution="uniform", every=2, stop=10, drop_fraction=0.01
    )  # int(0.01 * active) is 0 everywhere
    fit_steps(tmp_path, callback, Regression(), 12)
    assert (callback.updates, callback.step) == (0, 12)


@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_a_gradient_that_is_not_finite_puts_the_update_off(bad: float, tmp_path: Path) -> None:
    mask, good = row([1, 1, 0, 0]), row([0.1, 0.1, 0.2, 0.9])
    broken = row([0.1, bad, 0.2, 0.9])
    callback = rigl_from(mask, every=3, stop=9, drop_fraction="constant(0.5)")
    seen = record_updates(callback)

    module = FixedGradient(row([1, 2, 0, 0]), [good, good, good, good, broken, broken, good])
    fit_steps(tmp_path, callback, module, 8)
    assert seen == [(0, 0), (3, 6)]  # due from the batch 4 on, whose gradient is broken like the next one's
    assert callback.step == 4


def test_a_frozen_calendar_leaves_the_mask_alone_after_stop(tmp_path: Path) -> None:
    callback = RigL(0.5, distribution="uniform", every=2, stop=4, drop_fraction="constant(0.5)")
    masks: list[Any] = []
    watch = Callback()
    watch.on_train_batch_end = lambda *_: masks.append(copied_masks(callback)["net.0.weight"])
    fit_steps(tmp_path, [callback, watch], Regression(), 20)
    assert callback.updates == 3
    assert all(torch.equal(masks[6], m) for m in masks[6:])


def test_every_optimizer_has_a_calendar_of_its_own(tmp_path: Path) -> None:
    class Two(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.automatic_optimization = False

        def configure_optimizers(self) -> Any:
            return [torch.optim.SGD(layer.parameters(), lr=0.1) for layer in (self.net[0], self.net[2])]

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for index, optimizer in enumerate(self.optimizers()):
                if index == 0 or batch_idx % 2 == 0:
                    optimizer.zero_grad()
                    self.manual_backward(super().training_step(batch, batch_idx))
                    optimizer.step()

    callback, seen = RigL(0.5, distribution="uniform", every=4, stop=8, drop_fraction="constant(0.5)"), []
    around_updates(callback, before=lambda update: seen.append((update.step, *update.names)))
    trainer_for(callback, tmp_path, max_epochs=1).fit(Two(), loader(12))
    first, second = ([step for step, name in seen if name == f"net.{i}.weight"] for i in (0, 2))
    assert first == [0, 4, 8]
    assert second == [0, 4]
    assert callback.step == 12 - len(first)


def test_an_optimizer_that_calls_its_parents_step_is_counted_once(tmp_path: Path) -> None:
    class Own(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            return super().step(closure)

    torch.optim.SGD([torch.zeros(1)])  # from now on torch calls the hooks in the parent's step as well
    callback = RigL(0.5, distribution="uniform", every=4, stop=20, drop_fraction="constant(0.5)")
    seen = record_updates(callback)
    fit_steps(tmp_path, callback, Regression(configure=lambda p: Own(p, lr=0.01)), 12)
    assert [step for step, _ in seen] == [0, 4, 8]
    assert callback.step == 9
