"""Curves of GMP and DPF over layers that have targets of their own: each layer arrives at what the plan shows."""

import copy
from typing import Any

import pytest
import torch
from support.exchanged_loops import batches, loss_of, net
from torch import nn

from sparse_callbacks import SparseRun, sparsify
from sparse_callbacks.core.targets import on_the_way
from sparse_callbacks.methods import DPF, GMP

SIZES = {"0.weight": 640, "2.weight": 1024, "4.weight": 128}
STOP = 4
BOTH = pytest.mark.parametrize("kind", [GMP, DPF])


def begun(kind: Any, sparsity: Any, distribution: Any) -> tuple[nn.Module, Any, SparseRun]:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    method = kind(sparsity, distribution=distribution, every=1, stop=STOP, print_plan=False)
    return model, optimizer, sparsify(method, model, optimizer, steps=8)


def stepped(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for _, batch in zip(range(first, last), batches(first), strict=False):
        optimizer.zero_grad()
        loss_of(model, batch).backward()
        optimizer.step()


def zeros(kind: Any, sparsity: Any, distribution: Any) -> list[dict[str, int]]:
    """The zeros of each layer before the first step, and after each of six."""
    model, optimizer, run = begun(kind, sparsity, distribution)
    found = []
    with run:
        for number in range(7):
            found.append({n: int((~m).sum()) for n, m in run.masks.items()})
            assert run.method.at_target == (found[-1] == planned(run))
            if number < 6:
                stepped(model, optimizer, number, number + 1)
        assert found[-1] == planned(run)
    return found


def planned(run: SparseRun) -> dict[str, int]:
    method = run.method
    return method.parameter_zeros(method.entries, method.targets)


def cubic(number: int) -> float:
    return 1 - (1 - min(number, STOP) / STOP) ** 3


@BOTH
@pytest.mark.parametrize(
    "distribution", [{"0.*": 0.8}, lambda shapes, sparsity: {n: 0.8 * (n[0] == "0") for n in shapes}]
)
def test_layers_with_a_share_of_their_own_are_pruned_where_the_others_stay_dense(kind: Any, distribution: Any) -> None:
    for number, found in enumerate(zeros(kind, 0.0, distribution)):
        assert found == {"0.weight": int(0.8 * cubic(number) * 640 + 1e-9), "2.weight": 0, "4.weight": 0}


@BOTH
@pytest.mark.parametrize(
    ("sparsity", "at"), [("constant(0.0)", [1.0] * 7), ("linear(0.0, 0.0)", [0, 0.25, 0.5, 0.75, 1, 1, 1])]
)
def test_a_curve_that_stays_at_zero_says_how_such_layers_come_to_their_share(
    kind: Any, sparsity: str, at: list[float]
) -> None:
    found = zeros(kind, sparsity, {"0.*": 0.75})
    assert [zeros["0.weight"] for zeros in found] == [int(0.75 * way * 640) for way in at]
    assert all(zeros["2.weight"] == zeros["4.weight"] == 0 for zeros in found)


@BOTH
def test_layers_rise_in_proportion_where_all_are_pruned(kind: Any) -> None:
    for number, found in enumerate(zeros(kind, "linear(0.25, 0.5)", {"0.*": 0.75})):
        now = 0.25 + 0.25 * min(number, STOP) / STOP
        assert found == {n: int((0.75 if n[0] == "0" else 0.5) * now / 0.5 * size) for n, size in SIZES.items()}


@pytest.mark.parametrize("final", [0.5, 0.0])
@pytest.mark.parametrize("own", [{}, {"0.*": 0.75}])
def test_active_weights_grow_in_proportion_where_the_curve_falls(final: float, own: dict[str, float]) -> None:
    distribution = own | {"*": "uniform"} if own else "uniform"
    for number, found in enumerate(zeros(DPF, f"linear(0.875, {final})", distribution)):
        active = 0.125 + (0.875 - final) * min(number, STOP) / STOP
        targets = {n: own.get("0.*", final) if n[0] == "0" else final for n in SIZES}
        assert found == {
            n: int((1 - (1 - targets[n]) * active / (1 - final)) * size + 1e-9) for n, size in SIZES.items()
        }


@BOTH
def test_a_run_on_a_curve_that_stays_at_zero_resumes(kind: Any) -> None:
    model, optimizer, run = begun(kind, 0.0, {"0.*": 0.8})
    stepped(model, optimizer, 0, 2)
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict(), run.state_dict()))
    stepped(model, optimizer, 2, 6)
    run.close()
    other = net(seed=1)
    other.load_state_dict(saved[0])
    second = torch.optim.SGD(other.parameters(), 0.1, momentum=0.9)
    second.load_state_dict(saved[1])
    method = kind(0.0, distribution={"0.*": 0.8}, every=1, stop=STOP, print_plan=False)
    with sparsify(method, other, second, steps=8, state=saved[2]):
        stepped(other, second, 2, 6)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def test_the_way_of_each_kind_of_layer() -> None:
    assert on_the_way(0.8, now=0.3, final=0.6, way=0.1) == 0.4
    assert on_the_way(0.8, now=0.0, final=0.0, way=0.5) == 0.4
    assert on_the_way(0.0, now=0.9, final=0.0, way=0.5) == 0.9
    assert 0 < on_the_way(0.99, now=0.9, final=0.1, way=0.5) < 1
