"""Clipping, closures and GradScalers in a hand-written loop."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.loops import METHODS, STEPS, adamw, assert_same, batches, begin, data, half_precision, loss_of, net, sgd
from torch import nn
from torch.nn.utils import clip_grad_norm_

from sparse_callbacks import DPF, RigL, SparseRun, Static, sparsify

INF_AT = (5, 9)
NO_BATCH = ("static", "set", "rigl", "snfs", "gmp", "dpf", "smcp", "channels", "ctre")


def small(parameters: list[nn.Parameter]) -> None:
    clip_grad_norm_(parameters, 0.05)


def by_hand(run: SparseRun, optimizer: Any) -> None:
    run.before_clipping(optimizer)
    small([p for group in optimizer.param_groups for p in group["params"]])


@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("method", [*NO_BATCH, "gap"])
def test_clipping_by_hand_equals_clip(method: str, make: Any) -> None:
    found = []
    for clip in (small, None):
        model = net()
        optimizer = make(model)
        run = begin(method, model, optimizer, clip=clip)
        for batch in batches(data(), 0, STEPS):
            loss_of(model, batch).backward()
            if clip is None:
                by_hand(run, optimizer)
            optimizer.step()
            optimizer.zero_grad()
        found.append(model)
    assert_same(*found)


@pytest.mark.parametrize("method", NO_BATCH)
def test_clipping_by_hand_equals_clip_under_a_scaler_that_skips_steps(method: str) -> None:
    found, steps = [], []
    for clip in (small, None):
        model = net()
        optimizer = adamw(model)
        run = begin(method, model, optimizer, clip=clip)
        half_precision(run, model, optimizer, INF_AT, by_hand if clip is None else None)
        found.append(model)
        steps.append((run.step, run.updates))
    assert_same(*found)
    assert steps[0] == steps[1]
    assert steps[0][0] <= STEPS - len(INF_AT)


def test_clip_sees_gradients_that_are_masked_and_unscaled() -> None:
    seen: list[float] = []
    model, plain = net(), net()
    optimizer = sgd(model)

    def look(parameters: list[nn.Parameter]) -> None:
        assert [id(p) for p in parameters] == [id(p) for p in model.parameters()]
        for name, mask in run.masks.items():
            assert not model.get_parameter(name).grad[~mask].any(), name
        seen.append(float(torch.cat([p.grad.flatten() for p in parameters]).norm()))

    run = sparsify(Static(0.8, print_plan=False), model, optimizer, STEPS, clip=look)
    plain.load_state_dict(model.state_dict())
    half_precision(run, model, optimizer, (1,), last=3)
    assert len(seen) == 2  # a skipped step is not clipped
    batch = next(batches(data(), 0, 1))
    with torch.autocast("cpu", dtype=torch.float16):
        loss_of(plain, batch).backward()
    for name, mask in run.masks.items():
        plain.get_parameter(name).grad.mul_(mask)
    expected = float(torch.cat([p.grad.flatten() for p in plain.parameters()]).norm())
    assert seen[0] == pytest.approx(expected, rel=1e-2)  # float16 rounds scaled gradients otherwise


def test_clip_is_left_out_where_an_update_replaces_the_step() -> None:
    model, calls = net(), []
    optimizer = sgd(model)
    run = sparsify(RigL(0.8, every=4, print_plan=False), model, optimizer, STEPS, clip=calls.append)
    for batch in batches(data(), 0, STEPS):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert run.updates > 0
    assert len(calls) == run.step == STEPS - run.updates


def test_weights_are_masked_after_a_step_that_was_clipped_by_hand_and_skipped() -> None:
    model = net()
    optimizer = sgd(model)
    run = sparsify(DPF(0.8, every=2, print_plan=False), model, optimizer, STEPS)
    half_precision(run, model, optimizer, INF_AT, by_hand)
    assert run.step == STEPS - len(INF_AT)
    assert any((run.method.weights.dense_values(n) != 0).sum() > m.sum() for n, m in run.masks.items())


def test_before_clipping_is_called_once_for_a_step_and_for_an_optimizer_of_the_run() -> None:
    model = net()
    optimizer = sgd(model)
    run = begin("static", model, optimizer)
    loss_of(model, next(batches(data(), 0, 1))).backward()
    run.before_clipping(optimizer)
    with pytest.raises(RuntimeError, match=r"called twice for one step\. Call it once, right before clipping"):
        run.before_clipping(optimizer)
    with pytest.raises(ValueError, match=r"SGD is not an optimizer of this run: sparsify\(\) was not given it"):
        run.before_clipping(sgd(model))


def test_a_fused_optimizer_under_a_scaler_is_refused_at_its_first_step() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    run = begin("rigl", model, optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    scaler.scale(loss_of(model, next(batches(data(), 0, 1)))).backward()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"AdamW\(fused=True\) under a GradScaler unscales .* or fused=False"):
        scaler.step(optimizer)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    run.close()


def test_a_fused_optimizer_without_a_scaler_trains() -> None:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, fused=True)
    run = begin("rigl", model, optimizer)
    for batch in batches(data(), 0, STEPS):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert run.updates > 0


# ---------------------------------------------------------------------- closures


def closure_of(run: SparseRun, model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> Callable[[], Any]:
    def closure() -> Any:
        optimizer.zero_grad()
        with run.batch():
            loss = loss_of(model, batch)
            loss.backward()
        return loss

    return closure


@pytest.mark.combinations
@pytest.mark.parametrize("by_name", [True, False])
@pytest.mark.parametrize("clip", [None, small])
@pytest.mark.parametrize("method", METHODS)
def test_a_closure_that_is_called_once_trains_as_a_step_without_one(method: str, clip: Any, by_name: bool) -> None:
    found = []
    for closures in (True, False):
        model = net()
        optimizer = sgd(model)
        run = begin(method, model, optimizer, clip=clip)

        for batch in batches(data(), 0, STEPS):
            closure = closure_of(run, model, optimizer, batch)
            if not closures:
                closure()
                optimizer.step()
            elif by_name:
                assert optimizer.step(closure=closure).item() > 0
            else:
                assert optimizer.step(closure).item() > 0
        found.append(model)
    assert_same(*found)


def test_lbfgs_is_refused_at_the_call() -> None:
    model = net()
    with pytest.raises(ValueError, match="LBFGS calls its closure several times in one step"):
        begin("static", model, torch.optim.LBFGS(model.parameters()))
    assert all(p.count_nonzero() == p.numel() for p in model.parameters())


class Twice(torch.optim.SGD):
    """Calls its closure twice for large parameters, which a trial on small ones does not find."""

    def step(self, closure: Any = None) -> Any:
        if len(self.param_groups[0]["params"][0]) > 2:
            with torch.enable_grad():
                closure()
        return super().step(closure)


def test_a_closure_that_is_called_twice_is_refused_at_the_first_step_where_no_trial_has_found_it() -> None:
    model = net()
    optimizer = Twice(model.parameters(), lr=0.1)
    begin("static", model, optimizer)

    def closure() -> Any:
        optimizer.zero_grad()
        loss = loss_of(model, next(batches(data(), 0, 1)))
        loss.backward()
        return loss

    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match="Twice asked for gradients a second time within one step"):
        optimizer.step(closure)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


class Plain(torch.optim.SGD):
    """Calls its closure itself and then its parent's step: the hooks of a step fire twice."""

    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        super().step()
        return loss


class Handing(torch.optim.SGD):
    """Hands its closure on to its parent."""

    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


@pytest.mark.combinations
@pytest.mark.parametrize("closures", [True, False])
@pytest.mark.parametrize("kind", [Plain, Handing])
@pytest.mark.parametrize("method", METHODS)
def test_a_subclass_that_calls_its_parents_step_trains_as_its_parent(method: str, kind: Any, closures: bool) -> None:
    found, counts = [], []
    for cls in (torch.optim.SGD, kind):
        model = net()
        optimizer = cls(model.parameters(), lr=0.1, momentum=0.9)
        run = begin(method, model, optimizer)

        for batch in batches(data(), 0, STEPS):
            closure = closure_of(run, model, optimizer, batch)
            if closures:
                optimizer.step(closure)
            else:
                closure()
                optimizer.step()
        found.append(model)
        counts.append((run.step, run.updates))
    assert_same(*found)
    assert counts[0] == counts[1]
