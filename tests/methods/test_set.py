"""SET: when it moves, how much, and that what it grows is drawn uniformly and reproducibly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from support.inside import Moment, around_updates, parameters_of
from support.nets import Regression, mlp
from support.rig import copied_masks, fit_steps, record_updates

from sparse_callbacks import SET
from sparse_callbacks.core.ops import keep_largest

# begin, end, every, iterations, updates after these iterations (the reference code)
CALENDARS = [(1, 4, 2, 5, [1, 3]), (0, 300, 100, 450, [1, 101, 201]), (0, 10, 5, 12, [1, 6])]


class Watch(Callback):
    """Masks and weights before each update, and masks after it."""

    def __init__(self, callback: SET) -> None:
        self.callback = callback
        self.updates: list[dict[str, Any]] = []
        around_updates(callback, self.before, self.after)

    def before(self, moment: Moment) -> None:
        weights = {n: parameters_of(self.callback)[n].detach().clone() for n in moment.names}
        self.updates.append({"step": moment.step, "weights": weights, "before": copied_masks(self.callback)})

    def after(self, moment: Moment) -> None:
        self.updates[-1] |= {
            "after": copied_masks(self.callback),
            "drop_fraction": moment.figures["update/drop_fraction"],
        }


def grown(update: dict[str, Any], name: str) -> torch.Tensor:
    return update["after"][name] & ~update["before"][name]


def run(path: Path, seed: int = 0, steps: int = 12, width: int = 20, **options: Any) -> list[dict[str, Any]]:
    given = {"distribution": "uniform", "every": 3, "stop": 30, "drop_fraction": "constant(0.5)"} | options
    callback = SET(0.5, seed=seed, print_plan=False, **given)
    watch = Watch(callback)
    fit_steps(path, [callback, watch], Regression(mlp(12, width, 6)), steps)
    return watch.updates


@pytest.mark.parametrize(("begin", "end", "every", "steps", "expected"), CALENDARS)
def test_updates_come_after_the_iterations_of_the_reference(
    begin: int, end: int, every: int, steps: int, expected: list[int], tmp_path: Path
) -> None:
    callback = SET(0.5, every=every, start=begin, stop=end)
    seen, module = record_updates(callback), Regression(mlp(12, 6))
    made = fit_steps(tmp_path, callback, module, steps)
    assert seen == [(iteration, iteration - 1) for iteration in expected]  # the update follows the step of its batch
    assert callback.step == made.global_step == module.batches == steps


def test_the_counts_stay_and_the_largest_weights_stay(tmp_path: Path) -> None:
    updates = run(tmp_path, drop_fraction=0.4)
    assert [u["step"] for u in updates] == [1, 4, 7, 10]
    for update in updates:
        for name, mask in update["before"].items():
            active = int(mask.sum())
            count = int(update["drop_fraction"] * active)
            assert active == mask.numel() // 2 == int(update["after"][name].sum())
            kept = keep_largest(update["weights"][name], active - count, among=mask)
            assert (update["after"][name] & kept).sum() == kept.sum()
            assert 0 < int(grown(update, name).sum()) <= count


def test_the_fraction_falls_by_a_cosine_over_the_steps(tmp_path: Path) -> None:
    updates = run(tmp_path, drop_fraction=0.4, stop=9, steps=12)
    # 0.4 * (1 + cos(pi * t / 9)) / 2 at t = 1, 4, 7
    assert [u["drop_fraction"] for u in updates] == pytest.approx([0.3879385242, 0.2347296355, 0.0467911114], abs=1e-9)


def test_grown_weights_start_at_zero_with_zero_momentum(tmp_path: Path) -> None:
    callback = SET(0.5, distribution="uniform", every=5, stop=30, drop_fraction="constant(0.5)")
    watch, module = Watch(callback), Regression()
    made = fit_steps(tmp_path, [callback, watch], module, 6)
    assert watch.updates[-1]["step"] == 6
    for name in callback.masks:
        new = grown(watch.updates[-1], name)
        assert new.any()
        assert not module.get_parameter(name)[new].any()
        assert not made.optimizers[0].state[module.get_parameter(name)]["momentum_buffer"][new].any()


def test_one_seed_gives_one_topology_whatever_the_global_generator(tmp_path: Path) -> None:
    runs = []
    for seed, noise in ((0, 1), (0, 2), (1, 1)):
        callback = SET(0.5, distribution="uniform", every=3, stop=30, seed=seed)
        module = Regression()
        torch.manual_seed(noise)
        fit_steps(tmp_path, callback, module, 10)
        runs.append(copied_masks(callback))
    assert all(torch.equal(runs[0][n], runs[1][n]) for n in runs[0])
    assert not any(torch.equal(runs[0][n], runs[2][n]) for n in runs[0])


def test_draws_differ_between_steps_and_between_layers(tmp_path: Path) -> None:
    callback = SET(0.5, distribution="uniform", every=2, stop=30)
    fit_steps(tmp_path, callback, Regression(mlp(12, 12, 12, 6)), 1)
    draws = {}
    for step in (1, 3):
        for name in ("net.0.weight", "net.2.weight"):
            draws[step, name] = torch.rand(12, 12, generator=callback.generator(name, step))
    listed = list(draws.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(listed) for b in listed[:i])
    assert not torch.equal(callback.masks["net.0.weight"], callback.masks["net.2.weight"])


def test_growth_is_uniform_over_all_that_was_not_kept(tmp_path: Path) -> None:
    """Chi-square of how often each position was grown, given how often it was free; and no draw repeats the last
    one."""
    drawn, free, last = torch.zeros(6, 12), torch.zeros(6, 12), None
    for seed in range(3):
        callback = SET(
            0.5, distribution="uniform", every=1, stop=10**6, drop_fraction="constant(0.5)", seed=seed, print_plan=False
        )
        watch = Watch(callback)
        fit_steps(tmp_path, [callback, watch], Regression(mlp(12, 6)), 150)
        for update in watch.updates:
            (name,) = update["before"]
            kept = keep_largest(update["weights"][name], 18, among=update["before"][name])
            new = update["after"][name] & ~kept
            assert int(new.sum()) == 18
            assert last is None or not torch.equal(new, last)
            drawn, free, last = drawn + new, free + ~kept, new
    often = free > 40  # the expected number of draws is above 13 there
    expected = free[often] / 3  # 18 of the 54 free positions
    statistic = float((((drawn[often] - expected) ** 2) / (expected * 2 / 3)).sum())
    degrees = int(often.sum())
    assert degrees > 30
    assert abs(statistic - degrees) < 5 * (2 * degrees) ** 0.5
