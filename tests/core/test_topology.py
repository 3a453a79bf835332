"""Taking new masks: the share that changed, what born weights start from, and which were ever active."""

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.topology import EverActive, take
from sparse_callbacks.core.weights import SparseWeights


def bools(*bits: int) -> Tensor:
    return torch.tensor(bits, dtype=torch.bool)


@pytest.fixture
def parts() -> tuple[nn.Parameter, SparseWeights, torch.optim.Optimizer, Ownership]:
    p = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0]))
    weights = SparseWeights({"p": p}, {}, {"p": bools(1, 1, 1, 0, 0)})
    weights.write_masked(["p"])
    optimizer = torch.optim.SGD([p], lr=0.0, momentum=0.9)
    p.grad = torch.ones(5)
    optimizer.step()
    return p, weights, optimizer, Ownership([optimizer], {"p": p})


def test_born_weights_start_at_zero_without_state_and_the_share_is_right(parts) -> None:  # type: ignore[no-untyped-def]
    p, weights, optimizer, owners = parts
    # 3 active before and 2 after; 2 dropped and 1 born: 3 of 5 connections
    assert take(weights, owners, {"p": bools(1, 0, 0, 1, 0)}, lambda _: None) == pytest.approx(3 / 5)
    assert p.tolist() == [1, 0, 0, 0, 0]
    assert weights.active_counts["p"] == 2
    assert optimizer.state[p]["momentum_buffer"].tolist() == [1, 1, 1, 0, 1]  # cleared where born, and nowhere else


def test_nothing_changed_is_a_share_of_zero(parts) -> None:  # type: ignore[no-untyped-def]
    _, weights, owners = parts[0], parts[1], parts[3]
    assert take(weights, owners, {"p": bools(1, 1, 1, 0, 0)}, lambda _: None) == 0
    assert take(weights, owners, {}, lambda _: None) == 0


def test_born_weights_take_the_values_that_the_method_gives(parts) -> None:  # type: ignore[no-untyped-def]
    p, weights, _, owners = parts
    take(weights, owners, {"p": bools(1, 0, 1, 1, 0)}, lambda name: torch.full((5,), 7.0) if name == "p" else None)
    assert p.tolist() == [1, 0, 3, 7, 0]


def test_with_a_dense_copy_born_weights_come_back_with_value_and_state(parts) -> None:  # type: ignore[no-untyped-def]
    p, weights, optimizer, owners = parts
    weights.start_copy({"p": torch.full((5,), 9.0)})
    take(weights, owners, {"p": bools(1, 0, 1, 1, 0)}, lambda _: torch.full((5,), 7.0))
    assert p.tolist() == [1, 0, 3, 9, 0]
    assert optimizer.state[p]["momentum_buffer"].tolist() == [1] * 5


def test_ever_active_is_a_union_over_updates(parts) -> None:  # type: ignore[no-untyped-def]
    weights = parts[1]
    aux: dict[str, Tensor] = {}
    ever = EverActive(aux, weights)
    ever.add(["p"])
    assert ever.share() == pytest.approx(3 / 5)
    weights.set_mask("p", bools(1, 0, 0, 1, 0))
    assert ever.share() == pytest.approx(3 / 5)  # until it is added
    ever.add(["p"])
    assert ever.share() == pytest.approx(4 / 5)
    assert aux["ever_active/p"].tolist() == [True, True, True, True, False]
