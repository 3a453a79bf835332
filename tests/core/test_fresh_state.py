"""Fresh optimizer state is learnt from a shadow, whatever it starts from, and written where weights are born."""

import copy
import random
import threading
from typing import Any

import pytest
import torch
from support.optimizers import (
    Anchored,
    Coded,
    Halved,
    Matrices,
    MovingZero,
    Opaque,
    Prior,
    RandomStart,
    Slow,
    Stacked,
)
from torch import Tensor, nn

from sparse_callbacks.core.fresh_state import FreshState, UnknownStateError

HALF = (torch.arange(24) % 3 == 0).view(6, 4)


def parameter(*shape: int, seed: int = 0) -> nn.Parameter:
    generator = torch.Generator().manual_seed(seed)
    return nn.Parameter(torch.randn(*(shape or (6, 4)), generator=generator))


def train(optimizer: torch.optim.Optimizer, steps: int = 4) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.randn(p.shape, generator=generator).to(p)
        optimizer.step()


def trained(make: Any, *shape: int) -> tuple[nn.Parameter, torch.optim.Optimizer]:
    p = parameter(*shape)
    optimizer = make([p])
    train(optimizer)
    return p, optimizer


def kept(state: dict[str, Any]) -> dict[str, Any]:
    return copy.deepcopy({k: v for k, v in state.items() if k != "step"})


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1), {"momentum_buffer": 0.0}),
        (lambda p: torch.optim.Adam(p, amsgrad=True), {"exp_avg": 0.0, "exp_avg_sq": 0.0, "max_exp_avg_sq": 0.0}),
        (lambda p: torch.optim.AdamW(p, foreach=True), {"exp_avg": 0.0, "exp_avg_sq": 0.0}),
        (lambda p: torch.optim.AdamW(p, fused=True), {"exp_avg": 0.0, "exp_avg_sq": 0.0}),
        (lambda p: torch.optim.AdamW(p, lr=torch.tensor(0.01)), {"exp_avg": 0.0, "exp_avg_sq": 0.0}),
        (lambda p: torch.optim.Adagrad(p, initial_accumulator_value=0.3), {"sum": 0.3}),
        (lambda p: torch.optim.Rprop(p, lr=0.02), {"prev": 0.0, "step_size": 0.02}),
        (lambda p: torch.optim.ASGD(p), {"ax": None}),
        (lambda p: torch.optim.RMSprop(p, centered=True), {"square_avg": 0.0, "grad_avg": 0.0}),
        (lambda p: torch.optim.Adafactor(p), {}),
        (Coded, {"code": 127}),
        (Prior, {"signal": 0.9e-8}),
        (Anchored, {"anchor": None}),
    ],
    ids=lambda v: "" if callable(v) else ",".join(v),
)
def test_born_weights_get_what_a_first_step_finds_and_the_others_keep_theirs(make: Any, expected: Any) -> None:
    p, optimizer = trained(make)
    before = kept(optimizer.state[p])
    FreshState(optimizer).write(p, HALF)
    for key, value in optimizer.state[p].items():
        if key in expected:
            fresh = p.detach() if expected[key] is None else torch.full((6, 4), expected[key])
            wanted = torch.where(HALF, fresh.to(value), before[key])
            assert torch.allclose(value, wanted, rtol=1e-5, atol=0), key
        elif isinstance(value, Tensor) and value.shape == p.shape:
            raise AssertionError(f"{key} was not expected")
        elif key in before and isinstance(value, Tensor):
            assert value.shape == before[key].shape


def test_state_within_lists_and_flat_state_are_written() -> None:
    p, optimizer = trained(Prior)
    FreshState(optimizer).write(p, HALF)
    assert torch.allclose(optimizer.state[p]["noise"][0][HALF], torch.tensor(2.7e-8))
    p, optimizer = trained(Anchored)
    FreshState(optimizer).write(p, HALF)
    flat = optimizer.state[p]["flat"].view(6, 4)
    assert not flat[HALF].any()
    assert flat[~HALF].all()


def test_state_of_several_kinds_in_one_tensor_is_written() -> None:
    p, optimizer = trained(Stacked)
    before = kept(optimizer.state[p])
    FreshState(optimizer).write(p, HALF)
    assert torch.equal(optimizer.state[p]["means"], before["means"].masked_fill(HALF, 0))
    assert torch.equal(optimizer.state[p]["sums"], before["sums"].masked_fill(HALF[..., None], 1))


def test_the_matrices_of_a_square_layer_are_left_alone() -> None:
    p, optimizer = trained(Matrices, 6, 6)
    before = kept(optimizer.state[p])
    FreshState(optimizer).write(p, torch.ones(6, 6, dtype=torch.bool))
    assert all(torch.equal(optimizer.state[p][k], before[k]) for k in ("rows", "columns"))


def test_a_tensor_class_is_decoded_written_and_coded_again() -> None:
    p, optimizer = trained(Halved)
    before = optimizer.state[p]["momentum"].dequantize().clone()
    FreshState(optimizer).write(p, HALF)
    assert torch.equal(optimizer.state[p]["momentum"].dequantize(), before.masked_fill(HALF, 0))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (MovingZero, r"its state 'code' .* codes \(torch\.uint8\), and the code of a weight without gradients is not"),
        (Opaque, r"its state 'momentum' .*OpaqueTensor has no dequantize\(\)"),
        (RandomStart, r"its state 'velocity' .* neither a number nor the weight's value"),
        (
            lambda p: torch.optim.SparseAdam(p),
            r"its step fails for the stand-ins .*\(RuntimeError: SparseAdam does not support dense",
        ),
    ],
    ids=["moving zero", "opaque", "random", "sparse"],
)
def test_what_cannot_be_learnt_is_said(make: Any, message: str) -> None:
    p = parameter()
    with pytest.raises(UnknownStateError, match=message):
        FreshState(make([p])).learn([p])


def test_each_group_has_its_own_arguments() -> None:
    one, two = parameter(), parameter(seed=1)
    optimizer = torch.optim.Rprop([{"params": [one], "lr": 0.01}, {"params": [two], "lr": 0.03}])
    train(optimizer)
    fresh = FreshState(optimizer)
    for p, rate in ((one, 0.01), (two, 0.03)):
        fresh.write(p, HALF)
        assert torch.allclose(optimizer.state[p]["step_size"][HALF], torch.tensor(rate))


def test_state_that_a_schedule_brings_later_is_learnt_then() -> None:
    p = parameter()
    optimizer = torch.optim.SGD([p], lr=0.1)
    fresh = FreshState(optimizer)
    fresh.learn([p])
    optimizer.param_groups[0]["momentum"] = 0.9
    train(optimizer)
    fresh.write(p, HALF)
    assert not optimizer.state[p]["momentum_buffer"][HALF].any()


def test_state_of_the_constructor_is_known_also_where_a_first_step_does_not_use_it() -> None:
    p = parameter()
    optimizer = Slow([p])
    fresh = FreshState(optimizer)
    fresh.learn([p])
    train(optimizer)
    with torch.no_grad():
        p.masked_fill_(HALF, 0)
    before = optimizer.state[p]["slow"].clone()
    fresh.write(p, HALF)
    assert torch.equal(optimizer.state[p]["slow"], before.masked_fill(HALF, 0))


def test_state_that_comes_after_some_steps_is_known_when_it_is_there() -> None:
    class Late(Slow):
        def __init__(self, params: Any) -> None:
            super().__init__(params)
            self.state.clear()

    p = parameter()
    optimizer = Late([p])
    fresh = FreshState(optimizer)
    fresh.learn([p])
    train(optimizer)
    with torch.no_grad():
        p.masked_fill_(HALF, 0)
    before = optimizer.state[p]["slow"].clone()
    fresh.write(p, HALF)
    assert torch.equal(optimizer.state[p]["slow"], before.masked_fill(HALF, 0))


def test_a_square_layer_of_4096_weights_is_learnt_as_one_of_4096(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    update = Coded.update

    def sized(self: Any, p: Tensor, *arguments: Any) -> None:
        sizes.append(p.numel())
        update(self, p, *arguments)

    monkeypatch.setattr(Coded, "update", sized)
    p = parameter(64, 64)
    FreshState(Coded([p])).learn([p])
    assert set(sizes) == {4096}


def test_state_that_was_loaded_in_the_precision_of_the_weights_is_known() -> None:
    class InFloat32(Stacked):
        def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
            momentum = state.setdefault("momentum", torch.zeros(p.shape))
            p.sub_(momentum.mul_(0.9).add_(gradient.to(momentum)).to(p), alpha=group["lr"])

    p = nn.Parameter(parameter().detach().bfloat16())
    optimizer = InFloat32([p])
    train(optimizer)
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.state[p]["momentum"].dtype == torch.bfloat16
    FreshState(optimizer).write(p, HALF)
    assert not optimizer.state[p]["momentum"][HALF].any()


def test_what_cannot_be_copied_is_shared() -> None:
    class Locked(torch.optim.SGD):
        lock: Any

    p = parameter()
    optimizer = Locked([p], lr=0.1, momentum=0.9)
    optimizer.lock = threading.Lock()
    train(optimizer)
    FreshState(optimizer).write(p, HALF)
    assert not optimizer.state[p]["momentum_buffer"][HALF].any()


def test_an_optimizer_without_state_yet_stays_without() -> None:
    p = parameter()
    optimizer = torch.optim.AdamW([p])
    FreshState(optimizer).write(p, HALF)
    assert not optimizer.state[p]


def test_an_optimizer_within_an_optimizer_gets_fresh_state_too() -> None:
    class Around(torch.optim.Optimizer):
        def __init__(self, params: Any) -> None:
            self.inner = [torch.optim.SGD(params, lr=0.1, momentum=0.9)]
            super().__init__(params, {})

        def step(self, closure: Any = None) -> Any:
            return self.inner[0].step(closure)

    p, optimizer = trained(Around)
    FreshState(optimizer).write(p, HALF)
    assert not optimizer.inner[0].state[p]["momentum_buffer"][HALF].any()


def test_a_large_weight_is_learnt_in_little_and_with_the_state_of_a_large_one() -> None:
    sizes = []

    class CodedIfLarge(Coded):
        def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
            sizes.append(p.numel())
            if p.numel() >= 4096:
                super().update(p, gradient, state, group)
            else:
                p.sub_(state.setdefault("momentum", torch.zeros_like(p)).add_(gradient), alpha=group["lr"])

    p = parameter(512, 256)
    optimizer = CodedIfLarge([p])
    fresh = FreshState(optimizer)
    fresh.learn([p])
    assert max(sizes) < 2 * 4096
    train(optimizer, 1)
    fresh.write(p, torch.ones_like(p, dtype=torch.bool))
    assert bool((optimizer.state[p]["code"] == 127).all())


def test_learning_leaves_no_trace() -> None:
    calls: list[str] = []
    p = parameter()
    p.grad = torch.ones(6, 4)
    optimizer = torch.optim.AdamW([p], lr=torch.tensor(0.01))
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    optimizer.register_step_post_hook(lambda *_: calls.append("after"))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)
    optimizer.step()
    state, groups = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(optimizer.param_groups)
    known = {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")}
    values, gradient, generator, python = p.detach().clone(), p.grad.clone(), torch.get_rng_state(), random.getstate()
    calls.clear()
    FreshState(optimizer).learn([p])
    FreshState(RandomStart([p])).write(p, HALF)
    assert calls == []
    assert str(optimizer.state_dict()) == str(state)
    assert str(optimizer.param_groups) == str(groups)
    assert {k: v for k, v in vars(optimizer).items() if k not in ("state", "param_groups")} == known
    assert torch.equal(p, values)
    assert torch.equal(p.grad, gradient)
    assert torch.equal(torch.get_rng_state(), generator)
    assert random.getstate() == python


def test_a_schedule_that_begins_at_rate_zero_gives_a_step_size_that_moves() -> None:
    p = parameter()
    optimizer = torch.optim.Rprop([p], lr=0.01)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step / 10)
    fresh = FreshState(optimizer)
    fresh.learn([p])
    train(optimizer)
    fresh.write(p, HALF)
    assert bool((optimizer.state[p]["step_size"][HALF] > 1e-4).all())
