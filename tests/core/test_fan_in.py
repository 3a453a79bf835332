"""Constant fan-in: the tables of SRigL, updates of any input, rows of every kind of weight, and what is refused."""

from typing import Any

import pytest
import torch
from oracles import srigl
from torch import Tensor, nn

from sparse_callbacks.core.fan_in import (
    as_rows,
    checked_ablation,
    empty_rows,
    fan_in_for,
    from_rows,
    largest_in_rows,
    moved_fan_in,
    needed_weights,
    salient_weights,
    why_not_constant,
)
from sparse_callbacks.core.ops import drop_count, keep_largest
from sparse_callbacks.core.selection import entries

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def tensor(found: Any, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(found, dtype=dtype)


@pytest.mark.parametrize("dtype", DTYPES[:2])
@pytest.mark.parametrize("name", srigl.TABLES)
def test_an_update_of_the_tables(name: str, dtype: torch.dtype) -> None:
    table = srigl.TABLES[name]
    weights, gradient = tensor(table["weights"], dtype), tensor(table["dense_gradient"], dtype)
    mask = tensor(table["mask"]).bool()
    planned, rows = int(mask.sum()), len(mask)
    count = drop_count(planned, table["drop_fraction"])
    assert count == table["moved"]
    kept = keep_largest(weights, planned - count, among=mask)
    assert torch.equal(kept, tensor(table["kept"]).bool())
    salient = salient_weights(kept, gradient, count)
    assert salient.tolist() == table["salient"]
    if table["ablation"] is not None:
        assert needed_weights(planned, rows, table["ablation"]) == -(-table["needed"] // 1)
    done = moved_fan_in(mask, weights, gradient, planned, table["drop_fraction"], table["ablation"])
    assert done.ablated.nonzero().flatten().tolist() == table["ablated_rows"]
    assert done.fan_in == table["fan_in"]
    assert torch.equal(done.mask, tensor(table["mask_after"]).bool())
    assert torch.equal(weights * done.mask, tensor(table["effective_weights_after"], dtype))


@pytest.mark.parametrize("ablation", [None, 0.1, 0.3, 0.7, 1.0])
@pytest.mark.parametrize("seed", range(6))
def test_updates_in_a_row_are_those_of_plain_python(seed: int, ablation: float | None) -> None:
    """Rows go and return, the fan-in rises and falls, and rounded numbers give ties."""
    source = torch.Generator().manual_seed(seed)
    rows, columns = int(torch.randint(2, 9, (), generator=source)), int(torch.randint(3, 12, (), generator=source))
    fan_in = int(torch.randint(1, columns + 1, (), generator=source))
    planned, seen = rows * fan_in, set()
    mask = largest_in_rows(torch.rand(rows, columns, generator=source), fan_in)
    for _ in range(12):
        scale = torch.rand(rows, 1, generator=source) ** 3
        weights = (torch.randn(rows, columns, generator=source) * scale * 8).round() / 8 * mask
        grow = (torch.randn(rows, columns, generator=source) * scale.roll(1, 0) * 8).round() / 8
        fraction = float(torch.rand((), generator=source))
        expected, gone = srigl.update(mask, weights, grow, planned, fraction, ablation)
        done = moved_fan_in(mask, weights, grow, planned, fraction, ablation)
        assert torch.equal(done.mask, expected)
        assert done.ablated.nonzero().flatten().tolist() == gone
        assert set(srigl.fan_ins(done.mask)) <= {0, done.fan_in}
        assert planned - (rows - len(gone)) < int(done.mask.sum()) <= planned or done.fan_in == columns
        mask = done.mask
        seen.add(len(gone))
    assert ablation is not None or seen == {0}


def test_an_ablated_row_returns_and_where_the_fan_in_falls_the_smallest_weights_go() -> None:
    mask = tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool()
    weights = tensor([[0.9, 0.2, 0.8, 0.7], [0.6, 0.9, 0.1, 0.8], [0, 0, 0, 0]])
    grow = tensor([[0.0, 0, 0, 0], [0, 0, 0, 0], [0.1, 0.5, 0.4, 0.3]])
    done = moved_fan_in(mask, weights, grow, 8, 0.25, 0.5)
    # two weights leave, 0.2 and 0.1; the third row has the two largest gradients, as many as half of 8 / 3 rounded up
    assert done.mask.int().tolist() == [[1, 0, 1, 0], [0, 1, 0, 1], [0, 1, 1, 0]]
    assert (done.fan_in, int(done.ablated.sum())) == (2, 0)


def test_some_row_stays_whatever_is_asked() -> None:
    """Each row has as many salient weights as the mean at most, or one has more."""
    for rows, fan_in, ablation in ((7, 1, 1.0), (5, 3, 1.0), (6, 2, 0.9)):
        mask = largest_in_rows(torch.rand(rows, 5), fan_in)
        for _ in range(20):
            grow, weights = torch.rand(rows, 5) ** 9, torch.rand(rows, 5) ** 9 * mask
            mask = moved_fan_in(mask, weights, grow, rows * fan_in, 0.6, ablation).mask
            assert empty_rows(mask) < rows


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_that_are_no_numbers_rank_last_and_infinite_ones_first(dtype: torch.dtype) -> None:
    scores = tensor([[torch.nan, 0.0, -2.0, torch.inf], [torch.nan, torch.nan, 0.0, -0.0]], dtype)
    assert largest_in_rows(scores, 3).int().tolist() == [[0, 1, 1, 1], [1, 0, 1, 1]]
    assert largest_in_rows(scores, 3, scores.isnan()).int().tolist() == [[1, 0, 0, 0], [1, 1, 0, 0]]
    # what is kept comes before an infinite score
    mask = tensor([[1, 0, 0, 0]]).bool()
    done = moved_fan_in(mask, tensor([[0.5, 0, 0, 0]], dtype), tensor([[1, torch.inf, 0, 0]], dtype), 1, 0.0)
    assert torch.equal(done.mask, mask)


@pytest.mark.parametrize(
    ("layer", "rows"),
    [
        (nn.Linear(6, 4), lambda w: [w[o].flatten() for o in range(4)]),
        (nn.Conv2d(6, 4, 3, groups=2), lambda w: [w[o].flatten() for o in range(4)]),
        (nn.Conv1d(3, 4, 2), lambda w: [w[o].flatten() for o in range(4)]),
        (nn.ConvTranspose2d(6, 4, 3), lambda w: [w[:, o].flatten() for o in range(4)]),
        # group g has inputs 3g to 3g + 2 and outputs 2g and 2g + 1
        (nn.ConvTranspose2d(6, 4, 3, groups=2), lambda w: [w[3 * (o // 2) :, o % 2][:3].flatten() for o in range(4)]),
    ],
    ids=["matrix", "grouped", "1d", "transposed", "transposed grouped"],
)
def test_a_row_holds_the_weights_of_one_output(layer: nn.Module, rows: Any) -> None:
    entry, weight = entries(layer)[0], layer.weight.detach()
    found = as_rows(weight, entry)
    assert torch.equal(found, torch.stack(rows(weight)))
    assert torch.equal(from_rows(found, weight.shape, entry), weight)


def test_the_fan_in_is_rounded_down_and_not_by_the_error_of_a_product() -> None:
    assert [fan_in_for(1 - s, n) for s, n in ((0.9, 10), (0.9, 20), (0.7, 10), (0.55, 20), (0.0, 3))] == [1, 2, 3, 9, 3]
    assert [fan_in_for(0.1, n) for n in (1, 5, 19, 20, 25, 99)] == [1, 1, 1, 2, 2, 9]


def test_why_a_mask_is_not_of_constant_fan_in() -> None:
    even, odd = tensor([[1, 0, 1], [0, 1, 1]]).bool(), tensor([[1, 0, 1], [0, 0, 1]]).bool()
    empty = tensor([[1, 0, 1], [0, 0, 0]]).bool()
    assert why_not_constant(even, ablated=False) == why_not_constant(empty, ablated=True) == ""
    assert why_not_constant(odd, ablated=True) == "has output units of 1 to 2 active weights"
    assert why_not_constant(empty, ablated=False) == "has output units of 0 to 2 active weights"
    assert why_not_constant(torch.zeros_like(even), ablated=True) == "has no active weight"


@pytest.mark.parametrize("ablation", [0, 0.0, -0.3, 1.1, "0.3", True, float("nan")])
def test_an_ablation_that_is_no_share_is_refused(ablation: Any) -> None:
    with pytest.raises(ValueError, match=r"ablation=.* is not in \(0, 1\]: it is the share of its fan-in"):
        checked_ablation(ablation, "fan_in")


@pytest.mark.parametrize("pattern", [None, "unstructured", "2:4", "fan_in/4"])
def test_ablation_is_of_constant_fan_in_alone(pattern: Any) -> None:
    with pytest.raises(ValueError, match=r"ablation=0\.3 with pattern=.*: output units go where the others share out"):
        checked_ablation(0.3, pattern)
    assert checked_ablation(None, pattern) is None
    assert checked_ablation(1, "fan_in") == 1.0
