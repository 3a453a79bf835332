"""RigL with ``candidates=``: growth by gradient among positions that chance has drawn."""

from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import fan_in
from support import loops
from support.inside import around_updates, parameters_of
from support.nets import Regression
from support.rig import copied_masks, fit_steps
from support.simulated import Meeting, on_each, parts
from torch import Tensor

from sparse_callbacks import RigL
from sparse_callbacks.core.growth import candidate_count, moved_mask
from sparse_callbacks.core.patterns import as_mask, drawn_columns
from sparse_callbacks.testing.cases_resume import resumed_differently
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit


def rigl(**more: Any) -> RigL:
    given = {"distribution": "uniform", "every": 2, "stop": 40, "drop_fraction": "constant(0.5)", "print_plan": False}
    return RigL(**({"sparsity": 0.8, "candidates": 1.5} | given | more))


def slow(
    mask: Tensor, weights: Tensor, gradient: Tensor, numbers: Tensor, fraction: float, candidates: float
) -> Tensor:
    """The mask after an update, position by position in plain Python."""
    before = mask.flatten().nonzero().flatten().tolist()
    moved = fan_in.moved(len(before), fraction)
    kept = fan_in.best(weights.abs().flatten().tolist(), len(before) - moved, before)
    free = [i for i in range(mask.numel()) if i not in kept]
    drawn = fan_in.best(numbers.flatten().tolist(), max(moved, int(candidates * len(before))), free)
    after = torch.zeros(mask.numel(), dtype=torch.bool)
    after[kept + fan_in.best(gradient.abs().flatten().tolist(), moved, drawn)] = True
    return after.view(mask.shape)


@pytest.mark.parametrize("candidates", [0, 0.0, -1.0, float("inf"), float("nan"), True, "2"])
def test_what_is_not_a_number_above_zero_is_refused(candidates: Any) -> None:
    with pytest.raises(
        ValueError, match=r"candidates=.* is not a number above 0: it is how many candidates for growth"
    ):
        RigL(0.5, candidates=candidates)


def test_no_candidates_are_the_default_and_numbers_are_kept_as_floats() -> None:
    assert RigL().candidates is None
    assert RigL(candidates=2).arguments["candidates"] == RigL(candidates=2.0).arguments["candidates"] == "2.0"


def test_the_number_of_candidates_is_a_multiple_of_the_active_positions() -> None:
    assert candidate_count(2.0, 100, 30, 900) == 200
    assert candidate_count(0.999, 10, 3, 90) == 9  # truncated
    assert candidate_count(0.01, 100, 30, 900) == 30  # as many as grow
    assert candidate_count(1e300, 100, 30, 900) == 900  # as many as there are


def drawn(seed: int) -> tuple[Tensor, ...]:
    source = torch.Generator().manual_seed(seed)
    mask = torch.rand(7, 9, generator=source) < 0.3
    weights = torch.randint(-3, 4, (7, 9), generator=source).float() * mask
    gradient = torch.randint(-3, 4, (7, 9), generator=source).float()
    return mask, weights, gradient, torch.rand(7, 9, generator=source, dtype=torch.float64)


@pytest.mark.parametrize("candidates", [0.1, 0.7, 1.0, 2.0, 9.0])
@pytest.mark.parametrize("fraction", [0.0, 0.3, 1.0])
def test_an_update_is_that_of_plain_python(fraction: float, candidates: float) -> None:
    for seed in range(20):
        mask, weights, gradient, numbers = drawn(seed)
        found = moved_mask(mask, weights, gradient, fraction, None, candidates, numbers)
        assert torch.equal(found, slow(mask, weights, gradient, numbers, fraction, candidates))
        assert int(found.sum()) == int(mask.sum())


def test_enough_candidates_are_all_positions() -> None:
    for seed in range(10):
        mask, weights, gradient, numbers = drawn(seed)
        assert torch.equal(
            moved_mask(mask, weights, gradient, 0.5, None, 1e6, numbers), moved_mask(mask, weights, gradient, 0.5)
        )


@pytest.mark.parametrize("dim", [0, 1])
def test_shards_grow_what_the_whole_layer_grows(dim: int) -> None:
    lengths = [3, 0, 4] if dim == 0 else [4, 3, 2]
    for seed in range(5):
        tensors = drawn(seed)
        whole = moved_mask(*tensors[:3], 0.5, None, 0.6, tensors[3])
        meeting = Meeting(3)
        pieces = [parts(t, dim, lengths, meeting) for t in tensors]
        found = on_each(lambda m, w, g, n: moved_mask(m, w, g, 0.5, None, 0.6, n), *pieces)
        assert torch.equal(torch.cat(found, dim), whole)


@pytest.mark.parametrize("pattern", [None, "fan_in/2"])
def test_every_update_of_a_run_is_that_of_plain_python(pattern: str | None, tmp_path: Path) -> None:
    """Its draws derive from the seed, the step and the name."""
    callback, module = rigl(pattern=pattern, seed=4), Regression()
    found: list[Any] = []
    gradients: dict[str, Tensor] = {}
    module.on_before_optimizer_step = lambda _: gradients.update(  # type: ignore[method-assign]
        {n: p.grad.clone() for n, p in module.named_parameters() if p.grad is not None}
    )

    def before(moment: Any) -> None:
        weights = {n: p.detach().clone() for n, p in parameters_of(callback).items()}
        found.append((moment.step, copied_masks(callback), weights, dict(gradients)))

    around_updates(callback, before, lambda _: found.append(copied_masks(callback)))
    fit_steps(tmp_path, callback, module, 10)
    assert len(found) >= 6
    unlike_rigl = 0
    for (step, masks, weights, dense), after in zip(found[::2], found[1::2], strict=True):
        for name, mask in masks.items():
            group = 1 if pattern is None else 2
            shape = (len(mask) // group, mask.shape[1])
            numbers = torch.rand(*shape, dtype=torch.float64, generator=callback.generator(name, step))
            if pattern is None:
                expected = slow(mask, weights[name], dense[name], numbers, 0.5, 1.5)
            else:
                expected = fan_in.update(mask, weights[name], 0.5, group, dense[name], numbers, 1.5)
            assert torch.equal(after[name], expected)
            plain = moved_mask(mask, weights[name], dense[name], 0.5, None if pattern is None else group)
            unlike_rigl += not torch.equal(expected, plain)
    assert unlike_rigl


def test_candidates_are_drawn_evenly_from_what_was_not_kept() -> None:
    """With a gradient that is the same everywhere, growth takes the lowest of the candidates."""
    mask = as_mask(drawn_columns(1, 40, 10, torch.Generator().manual_seed(0)), 1)
    weights = mask * (1.0 + torch.arange(40.0))
    often = torch.zeros(40)
    for seed in range(2000):
        numbers = torch.rand(1, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        often += moved_mask(mask, weights, torch.ones(1, 40), 0.3, None, 0.3, numbers)[0] & ~mask[0]
    gone = mask[0] & (weights[0] < weights[0][mask[0]].sort().values[3])
    free = ~mask[0]
    assert int(gone.sum()) == 3
    expected = 2000 * 3 / 33  # three of the 33 positions that were not kept
    assert float((often[free] - expected).abs().max()) < 4.5 * (expected * (1 - 3 / 33)) ** 0.5


def test_a_resumed_fit_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    after = (1, 3, 4, 9)
    assert resumed_differently(lambda: [rigl()], tmp_path, after, "adamw") == {b: [] for b in after}
    with pytest.raises(ValueError, match=r"candidates=1\.5 there and candidates=None here"):
        fit(Classifier(), rigl(candidates=None), ckpt_path=tmp_path / "3.ckpt")


def test_stacked_layers_each_draw_candidates_of_their_own() -> None:
    model = torch.nn.Sequential(torch.nn.MultiheadAttention(8, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = loops.begin(rigl(include="0.in_proj_weight"), model, optimizer)
    before = run.masks["0.in_proj_weight"].clone()
    x = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    model[0](x, x, x)[0].square().sum().backward()
    gradient, weights = model[0].in_proj_weight.grad.clone(), model[0].in_proj_weight.detach().clone()
    optimizer.step()
    numbers = torch.rand(24, 8, dtype=torch.float64, generator=run.method.generator("0.in_proj_weight", 0))
    pieces = zip(*(t.chunk(3) for t in (before, weights, gradient, numbers)), strict=True)
    expected = torch.cat([slow(*piece, 0.5, 1.5) for piece in pieces])
    assert torch.equal(run.masks["0.in_proj_weight"], expected)
    assert not torch.equal(expected, before)
