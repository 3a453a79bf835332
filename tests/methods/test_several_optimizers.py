"""Several optimizers under one method: budgets of the whole network, and steps that are announced together."""

import copy
import math
from typing import Any

import pytest
import torch
from support.loops import METHODS, assert_masked, batches, data, loss_of, net, sgd
from torch import Tensor, nn

from sparse_callbacks import SMCP, SparseRun, SparsityCallback, sparsify
from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

STEPS = 36


def deep() -> nn.Sequential:
    """Four hidden layers of 24; the third and the fourth are read by the second optimizer."""
    torch.manual_seed(0)
    layers = [nn.Linear(12, 24), *(nn.Linear(24, 24) for _ in range(3)), nn.Linear(24, 4)]
    return nn.Sequential(*(part for layer in layers for part in (layer, nn.Tanh())))[:-1]


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
@pytest.mark.parametrize("interval", [1, 2, 3])
def test_the_budget_holds_once_each_optimizer_has_had_its_solve(
    interval: int, importance: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second optimizer steps once in ``interval`` batches; times are counted in the steps of each."""
    scored, scores = [], SMCP.scores

    def record(method: SMCP) -> list[Tensor]:
        found = scores(method)
        scored.append(all(score.any() for score in found) or not method.progress.done.get(1))
        return found

    monkeypatch.setattr(SMCP, "scores", record)
    model = deep()
    optimizers = [sgd([*model[:6].parameters()]), sgd([*model[6:].parameters()])]
    method = SMCP(
        0.5, every=3, start=3, stop=STEPS // interval - 3, importance=importance, round_to=1, print_plan=False
    )
    solved = []
    with sparsify(method, model, optimizers, STEPS, data=data()) as run:
        for number, batch in enumerate(batches(data(), 0, STEPS), start=1):
            loss_of(model, batch).backward()
            for optimizer, rate in zip(optimizers, (1, interval), strict=True):
                if number % rate == 0:
                    optimizer.step()
                    optimizer.zero_grad()
            last = min(method.progress.done.get(index, 0) for index in range(2))
            if last not in (0, *solved):
                solved.append(last)
                assert run.figures()["smcp/cost"] <= method.share_at(last) + 1e-9, number
    assert len(solved) >= 3
    assert method.at_target
    assert all(scored)  # no solve takes a group for worthless whose optimizer has not stepped since its own solve


def test_a_run_resumes_between_the_solves_of_two_optimizers() -> None:
    """The second has just solved, in batch 9; the first solves in batch 12, before the second has stepped again."""

    def begun(seed: int, **options: Any) -> tuple[nn.Module, list[Any], SparseRun]:
        model = deep()
        nn.init.normal_(model[0].weight, std=0.1 + seed)
        optimizers = [sgd([*model[:6].parameters()]), sgd([*model[6:].parameters()])]
        method = SMCP(0.5, every=3, start=3, stop=12, round_to=1, print_plan=False)
        return model, optimizers, sparsify(method, model, optimizers, STEPS, data=data(), **options)

    def train(model: nn.Module, optimizers: list[Any], run: SparseRun, first: int, last: int) -> None:
        for number, batch in enumerate(batches(data(), first, last), start=first + 1):
            loss_of(model, batch).backward()
            for optimizer in optimizers if number % 3 == 0 else optimizers[:1]:
                optimizer.step()
                optimizer.zero_grad()

    whole, stopped = begun(0), begun(0)
    train(*whole, 0, STEPS)
    train(*stopped, 0, 9)
    saved = copy.deepcopy((stopped[0].state_dict(), [o.state_dict() for o in stopped[1]], stopped[2].state_dict()))
    resumed = begun(1)
    resumed[2].load_state_dict(saved[2])
    resumed[0].load_state_dict(saved[0])
    for optimizer, state in zip(resumed[1], saved[1], strict=True):
        optimizer.load_state_dict(state)
    train(*resumed, 9, STEPS)
    assert any(key.startswith("latest.") for key in saved[2]["aux"])
    ends = [(model.state_dict(), run.state_dict()) for model, _, run in (whole, resumed)]
    assert differences(*ends) == []


def announced(method: SparsityCallback, together: bool, inf_at: int = -1) -> tuple[Any, ...]:
    """A loop that clips by hand, with two optimizers of two layers each, and what has come of it."""
    model = nn.Sequential(*net()[:3], nn.Tanh(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizers = [sgd([*model[:3].parameters()]), sgd([*model[3:].parameters()])]
    run = sparsify(method, model, optimizers, STEPS, data=data(), epoch=12, on_restart=lambda: None)
    for number, batch in enumerate(batches(data(), 0, STEPS)):
        with run.batch():
            loss_of(model, batch).backward()
        if number == inf_at:
            gradient = model[0].weight.grad
            assert gradient is not None
            gradient[~run.masks["0.weight"]] = math.inf
        for turn in [optimizers] if together else [[o] for o in optimizers]:
            for optimizer in turn:
                run.before_clipping(optimizer)
            for optimizer in turn:
                optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        assert_masked(model, run)
    run.close()
    return model.state_dict(), run.masks, method.aux, run.step, run.updates


@pytest.mark.parametrize("inf_at", [-1, 9])
@pytest.mark.parametrize("method", METHODS)
def test_steps_that_are_announced_together_are_those_announced_in_turn(method: str, inf_at: int) -> None:
    """As where a loop clips the gradients of all its optimizers before the first of them steps."""
    assert differences(*(announced(METHODS[method](), together, inf_at) for together in (True, False))) == []
