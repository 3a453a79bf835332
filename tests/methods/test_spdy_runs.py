"""Spdy in runs: budgets that are met, examples and losses from the data of a run, storage, resume, and the search."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support import loops
from support.loops import conv_net, loss_of, sgd
from support.nets import Regression
from support.rig import fit_steps
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import GMP, RigL, Spdy, Static, sparsify
from sparse_callbacks.core.calibration import Calibration
from sparse_callbacks.core.selection import select
from sparse_callbacks.methods.spdy.levels import LEVELS, LayerCosts
from sparse_callbacks.methods.spdy.search import best_levels, searched
from sparse_callbacks.methods.spdy.stitched import Stitched
from sparse_callbacks.methods.spdy.time_table import TimeTable
from sparse_callbacks.testing.runs import Stops, trainer_for

IMAGE = (2, 6, 6)
POSITIONS = {"0.weight": 16, "3.weight": 4, "6.weight": 1}
METHODS = {"static": Static, "rigl": RigL, "gmp": GMP}


class Images(pl.LightningModule):
    """`conv_net` on random images, without an example input."""

    def __init__(self) -> None:
        super().__init__()
        self.net = conv_net()

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.net(x)
        return found

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.net, batch)

    def configure_optimizers(self) -> Any:
        return sgd(self)


def method_of(name: str, distribution: Any) -> Any:
    times = {} if name == "static" else {"every": 2, "stop": 8}
    return METHODS[name](distribution=distribution, print_plan=False, **times)


def flops_left(masks: Any, prefix: str = "") -> float:
    """Share of the multiply-adds of `conv_net` that masks leave, by hand."""
    left = sum(n * int(masks[prefix + k].sum()) for k, n in POSITIONS.items())
    return left / sum(n * masks[prefix + k].numel() for k, n in POSITIONS.items())


# ---------------------------------------------------------------------- budgets of runs


@pytest.mark.parametrize("name", METHODS)
def test_a_fit_ends_within_its_budget(name: str, tmp_path: Path) -> None:
    method, module = method_of(name, Spdy(0.5)), Images()
    planned = Spdy(0.5, input=IMAGE).layer_shares(module, select(module))
    trainer = trainer_for(method, tmp_path, max_steps=10)
    trainer.fit(module, loops.data(*IMAGE))
    share = flops_left(method.masks, "net.")
    # the run has counted FLOPs with its first batch, and the plan with zeros of the same size
    assert 0.35 < share <= 0.5
    assert share == planned.reached
    assert method.plan().total == sum(int((~m).sum()) for m in method.masks.values()) / method.plan().weights


@pytest.mark.parametrize("name", METHODS)
def test_a_loop_ends_within_its_budget(name: str) -> None:
    method, model = method_of(name, Spdy(0.3)), conv_net()
    optimizer = sgd(model)
    run = sparsify(method, model, optimizer, 10, data=loops.data(*IMAGE))
    loops.train(run, model, optimizer, last=10, loader=loops.data(*IMAGE))
    assert flops_left(run.masks) <= 0.3


def test_a_plan_asks_for_no_data_but_a_sample() -> None:
    model = conv_net()
    with pytest.raises(ValueError, match=r"has no example_input_array, and there is no training data outside of a run"):
        Static(distribution=Spdy(), print_plan=False).plan(model)
    plan = Static(distribution=Spdy(input=IMAGE), print_plan=False).plan(model)
    assert str(plan).startswith("Static: Spdy(budget=0.5, cost='flops', error='magnitude', input=(2, 6, 6))")
    assert 0.4 < plan.total < 0.9
    with pytest.raises(ValueError, match="takes losses on training data"):
        Static(distribution=Spdy(error="calibration", input=IMAGE), print_plan=False).plan(model)


def test_a_budget_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    module = Images()
    before = copy.deepcopy(module.state_dict())
    trainer = trainer_for(method_of("static", Spdy(0.001)), tmp_path, max_steps=2)
    with pytest.raises(
        ValueError, match=r"budget=0\.001 of the FLOPs cannot be met: .*The smallest that can is budget=0\."
    ):
        trainer.fit(module, loops.data(*IMAGE))
    assert all(torch.equal(v, module.state_dict()[k]) for k, v in before.items())


def test_another_sparsity_beside_it_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"sparsity=0.8 and distribution=Spdy\(budget=0.5, .* both say how many weights"
    ):
        Static(0.8, distribution=Spdy())


def test_a_resumed_fit_keeps_its_shares_and_compares_the_argument(tmp_path: Path) -> None:
    stops, first = Stops(tmp_path, (4,)), method_of("rigl", Spdy(0.5))
    trainer_for([first, stops], tmp_path, max_steps=8).fit(Images(), loops.data(*IMAGE))
    second = method_of("rigl", Spdy(0.5))
    trainer_for(second, tmp_path, max_steps=8).fit(Images(), loops.data(*IMAGE), ckpt_path=stops.path(4))
    assert second.targets == first.targets
    assert {n: int(m.sum()) for n, m in second.masks.items()} == {n: int(m.sum()) for n, m in first.masks.items()}
    other = trainer_for(method_of("rigl", Spdy(0.4)), tmp_path, max_steps=8)
    with pytest.raises(ValueError, match=r"distribution=Spdy\(budget=0.5.*Spdy\(budget=0.4"):
        other.fit(Images(), loops.data(*IMAGE), ckpt_path=stops.path(4))


# ---------------------------------------------------------------------- a table of times, and sparse storage


def table_of_densities(path: Path, layers: dict[str, float]) -> str:
    """A table in which the time of a layer is in proportion to its density."""
    TimeTable({}, {n: {s: ms * (1 - s) for s in LEVELS} for n, ms in layers.items()}).save(path)
    return str(path)


@pytest.mark.parametrize("storage", ["masked", "sparse"])
def test_a_budget_of_time_with_either_storage(storage: str, tmp_path: Path) -> None:
    cost = table_of_densities(tmp_path / "t.json", {"0.weight": 10.0, "2.weight": 2.0})
    module = Regression()
    method = Static(distribution=Spdy(0.4, cost), storage=storage, print_plan=False)
    plan = method.plan(module)
    fit_steps(tmp_path, method, module, 3)
    density = {n: float(m.float().mean()) for n, m in method.masks.items()}
    # zeros are rounded down in each layer
    assert 10 * density["net.0.weight"] + 2 * density["net.2.weight"] <= 0.4 * 12 + 10 / 240 + 2 / 120
    assert density["net.0.weight"] < density["net.2.weight"]
    assert [row.zeros for row in method.plan()] == [row.zeros for row in plan]


def test_layers_are_exchanged_with_flops_of_the_first_batch(tmp_path: Path) -> None:
    module = Regression()
    module.forward = lambda x: module.net(x)  # type: ignore[method-assign]
    method = Static(distribution=Spdy(0.4), storage="sparse", print_plan=False)
    fit_steps(tmp_path, method, module, 3)
    left = sum(int(m.sum()) for m in method.masks.values())
    assert 0.3 * 360 < left <= 0.4 * 360


# ---------------------------------------------------------------------- losses


def test_a_fit_takes_losses_of_its_training_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few_tries(monkeypatch)
    seen: list[int] = []

    class Counted(Images):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            seen.append(len(batch[0]))
            self.log("loss", 0.0)
            return super().training_step(batch, batch_idx)

    module = Counted()
    method = Static(distribution=Spdy(0.5, error="calibration", batches=2), initial_mask="magnitude", print_plan=False)
    trainer_for(method, tmp_path, max_steps=1).fit(module, loops.data(*IMAGE))
    assert set(seen) == {8}
    assert len(seen) > 2
    assert len(seen) % 2 == 1  # two batches for each network, and a step
    assert flops_left(method.masks, "net.") <= 0.5


def test_a_loop_gives_its_loss(monkeypatch: pytest.MonkeyPatch) -> None:
    few_tries(monkeypatch)
    found = []
    for seed in (0, 0):
        model = conv_net()
        before = copy.deepcopy(model.state_dict())
        method = method_of("static", Spdy(0.5, error="calibration", batches=2, loss=loss_of, seed=seed))
        run = sparsify(method, model, sgd(model), 10, data=loops.data(*IMAGE))
        # under its mask each weight is what it was
        assert all(torch.equal(model.state_dict()[n], before[n] * m) for n, m in run.masks.items())
        found.append(method.targets)
    assert found[0] == found[1]
    method, model = method_of("static", Spdy(0.5, error="calibration")), conv_net()
    with pytest.raises(ValueError, match=r"^distribution=Spdy\(.*Give loss=.* loss= is an argument of Spdy"):
        sparsify(method, model, sgd(model), 10, data=loops.data(*IMAGE))
    method = method_of("static", Spdy(0.5, error="calibration", loss=lambda module, batch: module(batch[2])))
    with pytest.raises(ValueError, match=r"cannot be computed on batch 0 .* loss= is an argument of Spdy"):
        sparsify(method, model, sgd(model), 10, data=loops.data(*IMAGE))


def few_tries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sparse_callbacks.methods.spdy.search.DRAWS", 4)
    monkeypatch.setattr("sparse_callbacks.methods.spdy.search.MISSES", 3)


def test_the_loss_of_a_stitched_network_is_that_of_a_pruned_copy() -> None:
    model = conv_net().train()
    batches = list(loops.data(*IMAGE, batches=3))
    entries = select(model)
    levels = dict.fromkeys(POSITIONS, (0.0, 0.5, 0.9))
    asked: list[int] = []

    def loss(module: nn.Module, batch: Any) -> Tensor:
        asked.append(1)
        return loss_of(module, batch)

    network = Stitched(model, entries, levels, Calibration(model, lambda: batches, loss))
    before = copy.deepcopy(model.state_dict())
    with network.in_place():
        for chosen in (
            {"0.weight": 1, "3.weight": 2, "6.weight": 0},
            dict.fromkeys(levels, 2),
            dict.fromkeys(levels, 0),
        ):
            pruned = conv_net().eval()
            for name, level in chosen.items():
                weight = pruned.get_parameter(name)
                smallest = weight.detach().abs().flatten().argsort()[: math.floor(levels[name][level] * weight.numel())]
                with torch.no_grad():
                    weight.view(-1)[smallest] = 0.0
            with torch.no_grad():
                expected = sum(float(loss_of(pruned, b)) for b in batches) / 3
            assert network.loss(chosen) == pytest.approx(expected, rel=1e-6)
        count = len(asked)
        network.loss(dict.fromkeys(levels, 2))
        assert len(asked) == count == 9  # a choice that is known is not measured again
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert model.training


def test_batches_that_are_held_are_drawn_once() -> None:
    model, drawn = conv_net(), []

    def draw() -> Any:
        drawn.append(1)
        return DataLoader(TensorDataset(torch.randn(16, *IMAGE), torch.arange(16) % 4), batch_size=8)

    calibration = Calibration(model, draw, loss_of, size=1).held()
    losses = []
    for _ in range(3):
        with calibration.losses(order=0) as found:
            losses.append([float(one.loss) for one in found])
    assert len(drawn) == 1
    assert losses[0] == losses[1] == losses[2]
    assert len(losses[0]) == 1


# ---------------------------------------------------------------------- the search


def test_the_search_finds_coefficients_that_matter() -> None:
    """The loss is that of a hidden vector of importances: it is least where the cheap layers are spared."""
    layers = [f"l{i}" for i in range(6)]
    levels = (0.0, 0.5, 0.9)
    costs = LayerCosts(dict.fromkeys(layers, levels), dict.fromkeys(layers, (10.0, 5.0, 1.0)), 0.0, "ms")
    hidden = [float(i % 3 == 0) for i in range(6)]
    calls: list[int] = []

    def judge(coefficients: Any) -> float:
        calls.append(1)
        errors = {n: [c * e for e in (0.0, 0.25, 1.0)] for n, c in zip(layers, coefficients, strict=True)}
        chosen = best_levels(costs, errors, 0.5)
        return sum(h * (0.0, 0.25, 1.0)[chosen[n]] for n, h in zip(layers, hidden, strict=True))

    found = searched(6, judge, torch.Generator().manual_seed(0))
    assert judge(found) == 0.0
    assert judge([0.5] * 6) > 0.0
    assert all(0.0 <= c <= 1.0 for c in found)
    assert len(calls) >= 202  # 100 draws, and 100 tries with one coordinate; two here


@pytest.mark.parametrize(("count", "tries"), [(4, 100), (25, 200), (30, 300)], ids=str)
def test_how_many_networks_are_judged(count: int, tries: int) -> None:
    """A tenth of the coordinates, then one fewer down to one, and 100 tries of each where none is better."""
    seen: list[list[float]] = []

    def judge(coefficients: Any) -> float:
        seen.append(list(coefficients))
        return float(len(seen))  # the first is the best

    best = searched(count, judge, torch.Generator().manual_seed(1))
    assert best == seen[0]
    assert len(seen) == 100 + tries
    changed = [sum(a != b for a, b in zip(one, best, strict=True)) for one in seen[100:]]
    assert changed == [n for n in range(tries // 100, 0, -1) for _ in range(100)]


def test_losses_that_are_never_finite_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"is not finite for any of 100 draws. Give batches that training could begin with"
    ):
        searched(3, lambda _: math.inf, torch.Generator())
