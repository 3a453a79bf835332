"""What training costs: multiply-adds of two networks worked by hand, and the same counted in runs of the methods."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.counted import (
    FORWARD,
    GAP_STEPS,
    GMP_FORWARD,
    KEPT,
    NETS,
    POSITIONS,
    SIZES,
    STEPS,
    TOTALS,
    method_for,
    network,
)
from torch import Tensor, nn

from sparse_callbacks import CTRE, DPF, ParallelGaP, RigL, SparsityCallback, sparsify
from sparse_callbacks.channels import costs
from sparse_callbacks.core.record.multiply_adds import (
    WeightsInStep,
    multiply_adds,
    positions_in_use,
    step_multiply_adds,
)
from sparse_callbacks.core.selection import select
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.weights import SparseWeights

pytestmark = pytest.mark.filterwarnings("ignore")  # of runs that are shorter than their calendars


def spent(
    method: SparsityCallback, model: nn.Module, shape: tuple[int, ...], kind: str, steps: int, data: Any = None
) -> list[int]:
    """Multiply-adds per sample of each step of a run."""
    found, before = [], method.before_step

    def before_step(step: Step) -> None:
        before(step)
        found.append(step_multiply_adds(method.weights_in_step(step), POSITIONS[kind]))

    method.before_step = before_step  # type: ignore[method-assign]
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    with sparsify(method, model, optimizer, steps=steps, data=data) as run:
        for _ in range(steps):
            optimizer.zero_grad()
            with run.batch():
                model(torch.randn(2, *shape)).square().mean().backward()
            optimizer.step()
    return found


# ---------------------------------------------------------------------- the tables


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize(
    "name", ["static", "set", "rigl", "snfs", "gmp", "dpf", "dpf_cubic", "gap", "gap_finetuned", "l0"]
)
def test_a_run_costs_what_was_worked_by_hand(kind: str, name: str) -> None:
    model, shape = network(kind)
    phases = 4 * len(GAP_STEPS[kind])
    steps = phases if name == "gap" else phases + 4 if name == "gap_finetuned" else STEPS
    found = spent(method_for(kind, name), model, shape, kind, steps)
    assert sum(found) == TOTALS[kind][name]
    if name == "gmp":
        assert [cost / 3 for cost in found] == GMP_FORWARD[kind]
    if name.startswith("gap"):
        assert found[:phases:4] == GAP_STEPS[kind]
    if name == "rigl":
        dense, sparse = FORWARD[kind]
        assert [i for i, cost in enumerate(found) if cost == 2 * sparse + dense] == [3, 7, 11]


@pytest.mark.parametrize("kind", NETS)
def test_a_forward_pass_costs_the_active_weights_at_their_positions(kind: str) -> None:
    dense, sparse = FORWARD[kind]
    assert multiply_adds(SIZES[kind], POSITIONS[kind]) == dense
    model, _ = network(kind)
    method = method_for(kind, "static")
    with sparsify(method, model, torch.optim.SGD(model.parameters(), 0.01), steps=3):
        assert method.weights.active_counts == KEPT[kind]
        assert multiply_adds(method.weights.active_counts, POSITIONS[kind]) == sparse
    assert 3 * STEPS * dense == TOTALS[kind]["dense"]


@pytest.mark.parametrize("kind", NETS)
def test_positions_are_those_of_the_outputs(kind: str) -> None:
    model, shape = network(kind)
    found = costs.layers(model, torch.randn(5, *shape))
    assert {f"{name}.weight": sum(layer.positions) for name, layer in found.items()} == POSITIONS[kind]


# ---------------------------------------------------------------------- what no table has


def test_ctre_passes_over_the_data_cost_a_forward_pass_and_similarities_are_apart() -> None:
    # 3 epochs of 4 batches of 8: two passes, at the start of the second and the third epoch
    samples = 32
    model, shape = network("mlp")
    method = CTRE(0.9, distribution="uniform", print_plan=False)
    loader = torch.utils.data.DataLoader(torch.randn(samples, *shape), batch_size=8)
    found = spent(method, model, shape, "mlp", 12, loader)
    active = multiply_adds(method.weights.active_counts, POSITIONS["mlp"])
    assert 8 * sum(found) == 31680
    assert method.updates == 2  # after a pass each
    assert 2 * samples * active == 7040
    assert 2 * samples * multiply_adds(SIZES["mlp"], POSITIONS["mlp"]) == 69696


def test_an_update_among_candidates_costs_the_gradients_of_candidates() -> None:
    model, shape = network("mlp")
    options: dict[str, Any] = {"every": 3, "start": 3, "stop": 1000, "drop_fraction": "constant(0.3)"}
    method = RigL(0.9, distribution="uniform", candidates=2.0, print_plan=False, **options)
    found = spent(method, model, shape, "mlp", STEPS)
    ordinary, update = 3 * 110, 2 * 110 + 2 * 110
    assert found == [ordinary] * 3 + [update] + [ordinary] * 3 + [update] + [ordinary] * 3 + [update]


def test_an_update_among_few_candidates_looks_at_those_that_come_at_least() -> None:
    model, shape = network("mlp")
    options: dict[str, Any] = {"every": 3, "start": 3, "stop": 1000, "drop_fraction": "constant(0.3)"}
    method = RigL(0.9, distribution="uniform", candidates=0.01, print_plan=False, **options)
    moved = int(0.3 * 70) + int(0.3 * 40)
    assert spent(method, model, shape, "mlp", 4)[3] == 2 * 110 + moved


def test_exchanged_layers_cost_what_masked_ones_do() -> None:
    costs_of = []
    for storage in ("masked", "sparse"):
        model, shape = network("mlp")
        options: dict[str, Any] = {"every": 3, "start": 3, "stop": 1000, "drop_fraction": "constant(0.3)"}
        method = RigL(0.9, distribution="uniform", storage=storage, print_plan=False, **options)
        costs_of.append(spent(method, model, shape, "mlp", STEPS))
    assert costs_of[0] == costs_of[1]
    assert sum(costs_of[1]) == TOTALS["mlp"]["rigl"]


def test_a_dense_copy_costs_dense_gradients_until_it_ends() -> None:
    model, shape = network("mlp")
    method = DPF("constant(0.9)", distribution="uniform", every=2, start=0, stop=4, finetune=6, print_plan=False)
    found = spent(method, model, shape, "mlp", STEPS)
    assert found == [2 * 110 + 1089] * 6 + [3 * 110] * 6


def test_workers_that_train_at_once_cost_what_they_do_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = network("mlp")
    method = ParallelGaP(0.9, partitions=[["fc1*"], ["fc2*"]], distribution="uniform", print_plan=False)
    method.entries = list(_entries(model))
    method.targets = {"fc1.weight": 0.9, "fc2.weight": 0.9}
    method.weights = _weights(model, method)
    monkeypatch.setattr(ParallelGaP, "trains_apart", True)
    counts = method.weights_in_step(_step([])).forward
    # in turn: fc1 dense and fc2 at 40, then fc1 at 70 and fc2 dense
    assert counts == {"fc1.weight": round((693 + 70) / 2), "fc2.weight": (396 + 40) // 2}


# ---------------------------------------------------------------------- against a slow count


def slow_forward(mask: Tensor, module: nn.Module, shape: Sequence[int]) -> int:
    """Multiply-adds of active weights, position by position: the products of a pass with ones."""
    ones = type(module)(*_arguments(module), bias=False, **_settings(module)).double()
    ones.weight.data.copy_(mask)
    # a unit at every place, padding too, makes each output the number of its products
    x = torch.ones(1, *shape, dtype=torch.float64)
    if isinstance(module, nn.Conv2d):
        x = nn.functional.pad(x, [module.padding[1]] * 2 + [module.padding[0]] * 2, value=1)
    return int(ones(x).sum())


def _arguments(module: nn.Module) -> tuple[Any, ...]:
    if isinstance(module, nn.Conv2d):
        return module.in_channels, module.out_channels, module.kernel_size
    assert isinstance(module, nn.Linear)
    return module.in_features, module.out_features


def _settings(module: nn.Module) -> dict[str, Any]:
    return {"stride": module.stride, "groups": module.groups} if isinstance(module, nn.Conv2d) else {}


@pytest.mark.parametrize("seed", range(12))
def test_multiply_adds_are_the_products_that_a_pass_makes(seed: int) -> None:
    source = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (1,), generator=source))

    groups = draw(1, 2)
    conv = nn.Conv2d(
        groups * draw(1, 3), groups * draw(1, 3), (draw(1, 3), draw(1, 3)), draw(1, 2), draw(0, 2), groups=groups
    )
    for module, shape in (
        (conv, (conv.in_channels, draw(5, 9), draw(5, 9))),
        (nn.Linear(draw(1, 9), draw(1, 9)), None),
    ):
        shape = (draw(1, 4), module.in_features) if shape is None else shape
        mask = torch.rand(module.weight.shape, generator=source) < 0.4
        samples = draw(1, 3)
        x = torch.randn(samples, *shape)
        positions = positions_in_use(module, x.shape, module(x).shape, samples)
        assert multiply_adds({"w": int(mask.sum())}, {"w": positions}) == slow_forward(mask, module, shape)


def test_a_transposed_convolution_uses_its_kernel_at_every_place_of_its_input() -> None:
    module, x = nn.ConvTranspose2d(3, 4, 2, stride=2), torch.randn(2, 3, 5, 6)
    assert positions_in_use(module, x.shape, module(x).shape, 2) == 30


def test_a_step_adds_the_gradient_of_what_is_asked_for() -> None:
    counts = WeightsInStep({"a": 10, "b": 3}, {"b": 7})
    assert step_multiply_adds(counts, {"a": 2, "b": 5}) == 2 * (20 + 15) + 20 + 35
    assert math.isclose(step_multiply_adds(counts, {}), 0)


def _entries(model: nn.Module) -> Any:
    return select(model, ["*weight"], None, None)


def _weights(model: nn.Module, method: SparsityCallback) -> Any:
    entries = {e.name: e for e in method.entries if not e.reason}
    params = {n: model.get_parameter(n) for n in entries}
    return SparseWeights(params, entries, {n: torch.ones_like(p, dtype=torch.bool) for n, p in params.items()})


def _step(names: list[str]) -> Any:
    return type("Announced", (), {"replaced": False, "names": names})()
