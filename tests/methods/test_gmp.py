"""GMP: the cubic, nested masks, and the exact target at the end."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from support.inside import Moment, around_updates, parameters_of
from support.nets import FixedGradient, Regression, mlp
from support.rig import copied_masks, fit_steps, record_updates

from sparse_callbacks import GMP, schedules
from sparse_callbacks.core.ops import keep_largest


class Watch(Callback):
    """Masks and weights as they are after every batch; weights and masks around every update."""

    def __init__(self, callback: GMP) -> None:
        self.callback, self.masks, self.moves, self.targets = callback, [], [], []
        around_updates(callback, self.before, self.after)

    def before(self, moment: Moment) -> None:
        weights = {n: parameters_of(self.callback)[n].detach().clone() for n in moment.names}
        self.last = weights, copied_masks(self.callback)

    def after(self, moment: Moment) -> None:
        self.moves.append((*self.last, copied_masks(self.callback)))

    def on_train_batch_start(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 0:
            self.masks.append(copied_masks(self.callback))

    def on_train_batch_end(self, *_: Any) -> None:
        self.masks.append(copied_masks(self.callback))
        self.targets.append(self.callback.at_target)


def run(path: Path, steps: int, sparsity: Any = 0.8, **options: Any) -> tuple[GMP, Watch]:
    callback = GMP(sparsity, print_plan=False, **options)
    watch = Watch(callback)
    fit_steps(path, [callback, watch], Regression(mlp(12, 20, 10, 6)), steps)
    return callback, watch


def zeros(masks: dict[str, torch.Tensor]) -> list[int]:
    return [int((~m).sum()) for m in masks.values()]


def test_the_sparsity_rises_along_the_cubic(tmp_path: Path) -> None:
    callback, watch = run(tmp_path, 50, every=10, stop=41)
    expected = {0: 0.0, **{t: 0.8 - 0.8 * (1 - t / 41) ** 3 for t in (1, 11, 21, 31, 41)}}
    for step, sparsity in expected.items():
        assert callback.sparsity_at(step) == pytest.approx(sparsity, abs=1e-12)
        assert zeros(watch.masks[step]) == [int(sparsity * size + 1e-9) for size in (240, 200, 60)]
    for step in range(50):
        if step + 1 not in expected:
            assert zeros(watch.masks[step + 1]) == zeros(watch.masks[step])


@pytest.mark.parametrize(("every", "start", "stop"), [(10, 0, 41), (7, 3, 40), (40, 0, 40), (1, 0, 5), (6, 5, 30)])
def test_the_target_is_met_exactly_at_stop_and_not_before(every: int, start: int, stop: int, tmp_path: Path) -> None:
    callback, watch = run(tmp_path, stop + 3, every=every, start=start, stop=stop)
    target = [callback.plan()[n].zeros for n in callback.masks]
    assert target == [192, 160, 48]
    assert [zeros(m) == target for m in watch.masks] == [step >= stop for step in range(stop + 4)]
    assert watch.targets == [step >= stop for step in range(1, stop + 4)]
    assert zeros(watch.masks[max(start - 1, 0)]) == [0, 0, 0]


def test_masks_are_nested_and_keep_the_largest_weights(tmp_path: Path) -> None:
    _, watch = run(tmp_path, 40, every=5, stop=33)
    assert len(watch.moves) == 8
    for weights, before, after in watch.moves:
        for name, mask in after.items():
            assert not (mask & ~before[name]).any()
            assert torch.equal(mask, keep_largest(weights[name], int(mask.sum()), among=before[name]))


def test_a_constant_prunes_at_once_and_holds(tmp_path: Path) -> None:
    callback, watch = run(tmp_path, 20, "constant(0.8)", every=5, stop=15)
    assert [zeros(m) for m in watch.masks] == [[192, 160, 48]] * 21
    weights = mlp(12, 20, 10, 6)[0].weight
    assert torch.equal(watch.masks[0]["net.0.weight"], keep_largest(weights, 48))
    assert callback.target_sparsity == 0.8


@pytest.mark.parametrize(
    ("given", "middle"),
    [
        ("linear(0.8)", 0.4),
        ("linear(0.4, 0.8)", 0.6),
        (schedules.cosine(0.0, 0.8), 0.4),
        ("polynomial(0.0, 0.8, 2)", 0.6),
        ("exponential(0.8)", 0.7),
        (0.8, 0.7),
    ],
    ids=str,
)
def test_the_curve_is_a_text_or_a_schedule(given: Any, middle: float, tmp_path: Path) -> None:
    callback, watch = run(tmp_path, 25, given, every=10, start=1, stop=21)
    assert callback.sparsity_at(11) == pytest.approx(middle, abs=1e-12)
    assert zeros(watch.masks[11]) == [int(middle * size + 1e-9) for size in (240, 200, 60)]
    assert zeros(watch.masks[0]) == [
        int((0.4 if given == "linear(0.4, 0.8)" else 0.0) * size) for size in (240, 200, 60)
    ]
    assert zeros(watch.masks[-1]) == [192, 160, 48]


def test_every_layer_rises_to_its_own_target_in_the_same_proportion(tmp_path: Path) -> None:
    callback, watch = run(
        tmp_path, 25, "linear(0.8)", every=10, start=1, stop=21, distribution={"net.0*": 0.9, "net.2*": 0.0}
    )
    assert zeros(watch.masks[11]) == [108, 0, 24]
    assert zeros(watch.masks[-1]) == [216, 0, 48] == [callback.plan()[n].zeros for n in callback.masks]


def test_updates_after_start_every_and_at_stop(tmp_path: Path) -> None:
    callback = GMP(0.8, every=10, start=5, stop=32)
    seen = record_updates(callback)
    fit_steps(tmp_path, callback, Regression(), 40)
    assert [step for step, _ in seen] == [5, 15, 25, 32]
    assert callback.step == 40


def test_pruned_weights_are_zero_and_do_not_come_back(tmp_path: Path) -> None:
    callback = GMP(0.8, every=5, stop=20)
    module = Regression()
    fit_steps(tmp_path, callback, module, 30)
    for name, mask in callback.masks.items():
        assert torch.equal(module.get_parameter(name) != 0, mask)


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [
        (1.0, r"sparsity=1\.0 is not in \[0, 1\)"),
        (-0.1, r"sparsity=-0\.1 is not in \[0, 1\)"),
        ("linear(0.5, 1.0)", r"sparsity=1\.0 is not in \[0, 1\)"),
        ("linear(-0.5, 0.9)", r"sparsity=-0\.5 is not in \[0, 1\)"),
        (
            "linear(0.9, 0.5)",
            r"sparsity='linear\(0\.9, 0\.5\)' falls, and pruned weights do not come back\. Give a curve that rises",
        ),
    ],
)
def test_an_impossible_curve_is_refused(sparsity: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GMP(sparsity)


def test_a_pruned_weight_does_not_come_back_where_active_ones_are_zero_too(tmp_path: Path) -> None:
    weight, still = torch.tensor([[0.1, 0.1, 5.0, 5.0]]), torch.zeros(1, 4)
    to_zero = torch.tensor([[0.0, 0.0, 5.0, 5.0]])  # a step of length 1 along it makes the active weights exactly 0
    module = FixedGradient(weight, [still, to_zero], lambda p: torch.optim.SGD(p, lr=1.0))
    callback = GMP("linear(0.5, 0.75)", every=1, stop=2)
    fit_steps(tmp_path, callback, module, 2)
    assert not module.net.weight.any()
    assert callback.masks["net.weight"].tolist() == [[False, False, True, False]]


def test_a_constant_curve_is_at_its_target_from_the_start(tmp_path: Path) -> None:
    held, rising = GMP("constant(0.5)", every=2, stop=9), GMP(0.5, every=2, stop=9)
    for callback in (held, rising):
        fit_steps(tmp_path, callback, Regression(), 4)
    assert held.at_target
    assert not rising.at_target
