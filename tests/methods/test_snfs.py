"""SNFS: the smoothed gradient against a loop by hand, and growth by it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.inside import start_from
from support.nets import FixedGradient, Regression, mlp, row
from support.rig import copied_masks, fit_steps, record_updates
from torch import Tensor

from sparse_callbacks import SNFS


def snfs_from(mask: Tensor, **options: Any) -> SNFS:
    """SNFS from a given mask."""
    callback = SNFS(1 - float(mask.mean()), distribution="uniform", print_plan=False, **options)
    start_from(callback, {"net.weight": mask.bool()})
    return callback


def smoothed(callback: SNFS) -> Tensor:
    return callback.aux["smoothed/net.weight"]


@pytest.mark.parametrize("smoothing", [0.9, 0.5, 0.0])
def test_the_gradient_is_smoothed_as_by_hand(smoothing: float, tmp_path: Path) -> None:
    gradients = [torch.randn(3, 12, generator=torch.Generator().manual_seed(i)) for i in range(7)]
    mask = (torch.arange(36).reshape(3, 12) % 2).float()
    callback = snfs_from(mask, smoothing=smoothing, every=2, stop=50)
    fit_steps(tmp_path, callback, FixedGradient(torch.randn(3, 12), gradients), 7)
    expected = torch.zeros(3, 12)
    for gradient in gradients:
        expected = smoothing * expected + (1 - smoothing) * gradient
    assert torch.allclose(smoothed(callback), expected, rtol=1e-5, atol=1e-7)  # float32, in another order of additions


def test_growth_goes_by_the_smoothed_gradient_and_not_by_the_last(tmp_path: Path) -> None:
    mask = row([1, 1, 0, 0, 0])
    # at the update after step 3 the last gradient speaks for position 4, the smoothed one for 3 (in magnitude)
    gradients = [row([0.1, 0.1, 0.2, -5.0, 0.0]), row([0.1, 0.1, 0.2, -5.0, 0.0]), row([0.1, 0.1, 0.2, 0.0, 1.0])]
    callback = snfs_from(mask, every=2, start=3, stop=50, drop_fraction="constant(0.5)")
    fit_steps(tmp_path, callback, FixedGradient(row([1, 2, 0, 0, 0]), gradients), 3)
    assert callback.updates == 1
    assert callback.masks["net.weight"].int().tolist() == [[0, 1, 0, 1, 0]]


def test_clipping_and_masking_do_not_touch_what_is_smoothed(tmp_path: Path) -> None:
    gradient = row([3.0, 4.0, 100.0, 0.0])
    callback = snfs_from(row([1, 1, 0, 0]), every=5, start=10, stop=50)
    module = FixedGradient(row([1.0, 1.0, 0.0, 0.0]), [gradient])
    fit_steps(tmp_path, callback, module, 1, gradient_clip_val=1e-3)
    assert smoothed(callback).tolist() == (gradient * (1 - 0.9)).tolist()
    assert module.net.weight[0, 2:].tolist() == [0.0, 0.0]


def test_a_gradient_that_is_not_finite_leaves_no_trace(tmp_path: Path) -> None:
    good, bad = row([0.5, 1.0, 2.0, 0.25]), row([0.5, 1.0, float("inf"), 0.25])
    results = []
    for gradients in ([good, good], [good, bad, good]):
        callback = snfs_from(row([1, 1, 0, 0]), every=5, start=10, stop=50)
        fit_steps(tmp_path, callback, FixedGradient(row([1.0, 1.0, 0.0, 0.0]), gradients), len(gradients))
        results.append((callback.step, smoothed(callback).clone()))
    assert results[0][0] == results[1][0] == 2
    assert torch.equal(results[0][1], results[1][1])


def test_counts_stay_as_planned_and_updates_follow_the_step(tmp_path: Path) -> None:
    callback = SNFS(0.6, distribution="erdos_renyi", every=4, stop=16, drop_fraction="constant(0.5)")
    seen, module = record_updates(callback), Regression(mlp(12, 15, 8, 6))
    fit_steps(tmp_path, callback, module, 20)
    assert [step for step, _ in seen] == [1, 5, 9, 13]
    assert all(int((~m).sum()) == callback.plan()[n].zeros for n, m in callback.masks.items())


def test_the_past_decides(tmp_path: Path) -> None:
    runs = []
    for smoothing in (0.0, 0.99):
        callback = SNFS(0.6, distribution="uniform", every=4, stop=16, smoothing=smoothing)
        fit_steps(tmp_path, callback, Regression(), 17)
        runs.append(copied_masks(callback))
    assert any(not torch.equal(runs[0][n], runs[1][n]) for n in runs[0])


@pytest.mark.parametrize("smoothing", [-0.1, 1.0, True, "0.9", None])
def test_a_smoothing_outside_its_range_is_refused(smoothing: Any) -> None:
    with pytest.raises(
        ValueError, match=r"smoothing=.* is not in \[0, 1\): it is the weight of the past\. The published value is 0\.9"
    ):
        SNFS(0.9, smoothing=smoothing)
