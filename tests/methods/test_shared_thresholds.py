"""Thresholds over several layers: renewed at each selection where weights are scored, found once elsewhere."""

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.loops import batches, begin, conv_net, data, loss_of, net, sgd, train
from torch import Tensor, nn

from sparse_callbacks import DPF, GMP, SET, RigL, SparseRun, Static, sparsify
from sparse_callbacks.core.allocations.by_weight import lamp_scores
from sparse_callbacks.core.distributions import global_magnitude, lamp
from sparse_callbacks.core.ops import zeros_for

SIZE = 288 + 576 + 96  # of the matrices of loops.net
RULES = {"global": global_magnitude, "lamp": lamp}


def matrices(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.dim() > 1}


def zeros_of(run: SparseRun) -> dict[str, int]:
    return {n: int((~m).sum()) for n, m in run.masks.items()}


# ---------------------------------------------------------------------- found once


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [Static, SET, RigL])
def test_shares_are_those_of_the_initial_magnitudes(make: Any, rule: str) -> None:
    model = net()
    model[2].weight.data.mul_(2)
    expected = RULES[rule](matrices(model), 0.8)
    times = {} if make is Static else {"every": 4}
    method = make(0.8, distribution=rule, print_plan=False, **times)
    announced = method.plan(model)
    assert announced.zeros == zeros_for(0.8, SIZE)
    assert {n: announced[n].zeros for n in expected} == {
        n: zeros_for(s, model.get_parameter(n).numel()) for n, s in expected.items()
    }
    optimizer = sgd(model)
    run = begin(method, model, optimizer)
    train(run, model, optimizer)
    assert zeros_of(run) == {n: announced[n].zeros for n in expected}
    assert method.plan() == method.plan(model) == announced


@pytest.mark.parametrize("rule", RULES)
def test_a_mask_by_magnitude_is_that_of_one_threshold(rule: str) -> None:
    model = net()
    weights = matrices(model)
    run = sparsify(Static(0.8, distribution=rule, initial_mask="magnitude"), model, sgd(model), 8)
    scores = {n: w.abs() if rule == "global" else lamp_scores(w) for n, w in weights.items()}
    kept = torch.cat([scores[n][m] for n, m in run.masks.items()])
    gone = torch.cat([scores[n][~m] for n, m in run.masks.items()])
    assert kept.min() > gone.max()
    assert gone.numel() == zeros_for(0.8, SIZE)


def went_on(make: Callable[[], Any]) -> tuple[Any, Any]:
    """The method of a run, and the targets with which one goes on from its ninth step; both end with the same weights."""
    first, model = make(), net()
    optimizer = sgd(model)
    run = begin(first, model, optimizer)
    train(run, model, optimizer, last=9)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), run.state_dict()], file)
    train(run, model, optimizer, first=9)
    file.seek(0)
    states = torch.load(file, weights_only=True)
    other = net(seed=1)
    second, stepper = make(), sgd(other)
    other.load_state_dict(states[0])
    stepper.load_state_dict(states[1])
    resumed = begin(second, other, stepper, state=states[2])
    targets = dict(second.targets)
    train(resumed, other, stepper, first=9)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))
    return first, targets


def test_a_resumed_run_keeps_the_shares_of_its_first_weights() -> None:
    first, targets = went_on(lambda: RigL(0.8, distribution="lamp", every=4, print_plan=False))
    assert targets == first.targets


def test_stacked_layers_have_shares_of_their_own() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "head": nn.Linear(8, 3)})
    model["attention"].in_proj_weight.data[8:16].mul_(10)  # the keys
    method = Static(0.7, distribution={"head.weight": 0.0, "*": "global"}, print_plan=False)
    assert method.plan(model).zeros == zeros_for(0.7, 256)
    sparsify(method, model, sgd(model), 8)
    shares = [method.targets[f"attention.in_proj_weight[{i}]"] for i in range(3)]
    assert shares[1] < 0.2 < min(shares[0], shares[2])
    assert method.targets["head.weight"] == 0.0


@pytest.mark.parametrize(("rule", "left"), [("global", 1), ("global(3)", 3), ("global(least=0)", 0)], ids=str)
def test_a_threshold_without_a_minimum_may_empty_a_layer(rule: str, left: int) -> None:
    for make in (Static, RigL, GMP):
        model = conv_net()
        model[3].weight.data.mul_(1e-3)
        times = {} if make is Static else {"every": 2}
        target: Any = "constant(0.7)" if make is GMP else 0.7
        method = make(target, distribution=rule, print_plan=False, **times)
        plan = method.plan(model)
        assert plan.zeros == zeros_for(0.7, 848)
        if make is not GMP:  # where each update takes a threshold, no layer has a count of its own
            assert plan["3.weight"].remark == f"no more than its minimum of {left} under one threshold"
            assert plan["0.weight"].remark == ""
        optimizer = sgd(model)
        run = begin(method, model, optimizer)
        train(run, model, optimizer, last=6, loader=data(2, 6, 6))
        assert int(run.masks["3.weight"].sum()) == left
        assert sum(zeros_of(run).values()) == zeros_for(0.7, 848)


# ---------------------------------------------------------------------- renewed


@pytest.mark.parametrize("make", [GMP, DPF])
def test_a_minimum_that_the_target_leaves_no_room_for_is_refused_before_training(make: Any) -> None:
    model = nn.Sequential(*(nn.Linear(5, 5, bias=False) for _ in range(8)))
    for rule in ("global(5)", {"*": "global(5)"}):
        with pytest.raises(ValueError, match=r"cannot be reached: each of the 8 layers keeps at least 5 of their 200"):
            make(0.9, distribution=rule).plan(model)
    for rule in ("global", "lamp"):
        with pytest.raises(
            ValueError, match=r"cannot be reached: each of the 8 layers keeps at least one of their 200"
        ):
            make(0.98, distribution=rule).plan(model)
    assert make(0.98, distribution="global(0)").plan(model).zeros == 196
    assert make(0.98, distribution={"*": "global(0)"}).plan(model).zeros == 196


@pytest.mark.parametrize("rule", RULES)
def test_gmp_takes_one_threshold_over_what_is_active_at_each_update(rule: str) -> None:
    model = net()
    optimizer = sgd(model)
    method = GMP(0.8, distribution=rule, every=4, print_plan=False)
    announced = method.plan(model)
    assert announced.joint == announced.zeros == zeros_for(0.8, SIZE)
    assert announced["0.weight"].zeros is None
    run = begin(method, model, optimizer)
    seen = 0
    for batch in batches(data(), 0, 24):
        before = {n: m.clone() for n, m in run.masks.items()}
        with run.batch():
            loss_of(model, batch).backward()
        updates = method.updates
        optimizer.step()
        optimizer.zero_grad()
        if method.updates == updates:
            continue
        seen += 1
        masks = {n: m.clone() for n, m in run.masks.items()}
        assert sum(zeros_of(run).values()) == zeros_for(method.sparsity_at(method.step), SIZE)
        assert not any((masks[n] & ~before[n]).any() for n in masks)  # pruned weights do not come back
        assert len({*map(float, (int(m.sum()) / m.numel() for m in masks.values()))}) > 1
    assert seen > 2
    assert method.at_target
    assert sum(zeros_of(run).values()) == announced.zeros
    assert method.plan() == announced


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("make", [GMP, DPF])
def test_a_selection_is_the_threshold_over_all_weights(make: Any, rule: str) -> None:
    model = net()
    model[4].weight.data.mul_(3)
    weights = matrices(model)
    method = make("constant(0.8)", distribution=rule, print_plan=False)
    run = sparsify(method, model, sgd(model), 8)
    expected = RULES[rule](weights, 0.8)
    assert zeros_of(run) == {n: zeros_for(s, weights[n].numel()) for n, s in expected.items()}
    for name, mask in run.masks.items():  # the largest magnitudes of each layer
        assert weights[name][mask].abs().min() > weights[name][~mask].abs().max()


@pytest.mark.parametrize("make", [GMP, DPF])
def test_one_threshold_beside_layers_with_targets_of_their_own(make: Any) -> None:
    model = net()
    optimizer = sgd(model)
    method = make(0.8, distribution={"4.weight": 0.25, "*": "global"}, every=4, print_plan=False)
    announced = method.plan(model)
    assert announced["4.weight"].zeros == 24
    assert announced["0.weight"].zeros is announced["2.weight"].zeros is None
    assert announced.zeros == 24 + zeros_for(0.8, 864)
    run = begin(method, model, optimizer)
    train(run, model, optimizer)
    assert zeros_of(run)["4.weight"] == 24
    assert sum(zeros_of(run).values()) == announced.zeros
    assert method.at_target


@pytest.mark.parametrize("rule", ["global", "lamp"])
@pytest.mark.parametrize("make", [GMP, DPF])
def test_every_optimizer_has_a_threshold_of_its_own(make: Any, rule: str) -> None:
    model = net()
    optimizers = [sgd([model[0].weight, model[2].weight]), sgd([model[4].weight])]
    method = make(0.77, distribution=rule, every=4, print_plan=False)
    run = begin(method, model, optimizers)
    for batch in batches(data(), 0, 24):
        with run.batch():
            loss_of(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    assert method.at_target
    assert zeros_of(run)["4.weight"] == zeros_for(0.77, 96)
    assert sum(zeros_of(run).values()) == method.plan().zeros == zeros_for(0.77, 864) + zeros_for(0.77, 96)


@pytest.mark.parametrize("rule", ["global", "lamp", "global(0)"])
def test_gmp_resumes_bit_for_bit(rule: str) -> None:
    went_on(lambda: GMP(0.8, distribution=rule, every=4, print_plan=False))


def test_an_active_zero_stays_before_a_weight_that_is_pruned() -> None:
    model = net()
    optimizer = sgd(model)
    method = GMP("linear(0.5, 0.9)", distribution="global", every=4, start=4, stop=20, print_plan=False)
    run = begin(method, model, optimizer)
    before = {n: m.clone() for n, m in run.masks.items()}
    with torch.no_grad():
        for p in (model[0].weight, model[2].weight, model[4].weight):
            p.zero_()
    for _ in range(24):
        with run.batch():
            (model(torch.zeros(2, 12)).sum() * 0).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(zeros_of(run).values()) == zeros_for(0.9, SIZE)
    assert not any((m & ~before[n]).any() for n, m in run.masks.items())


def test_scores_of_single_weights_do_not_rank_channels() -> None:
    DPF(unit="filter")
    for rule in ("lamp", "global(2)", {"0.*": "lamp"}):
        with pytest.raises(ValueError, match=r"ranks single weights, and unit='filter' whole channels"):
            DPF(unit="filter", distribution=rule)
