"""The layout of a parameter: the identity today, and asked by everything that would have to know of shards."""

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.core import method, randomness, weights
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.shards import WHOLE, Layout, layout_of
from sparse_callbacks.core.sparsity import layer_sparsity
from sparse_callbacks.core.weights import SparseWeights


class Half(Layout):
    """A parameter of which this process holds the first half of the rows, as one of two like processes."""

    def total(self, count: int) -> int:
        return 2 * count

    def whole_shape(self, part: Tensor) -> torch.Size:
        return torch.Size([2 * len(part), *part.shape[1:]])

    def part(self, whole: Tensor) -> Tensor:
        return whole[: len(whole) // 2]


def half(_: Tensor) -> Layout:
    return Half()


def test_the_layout_is_the_identity_today() -> None:
    whole = torch.rand(3, 2)
    for tensor in (whole, nn.Parameter(whole), nn.Linear(2, 2).weight):
        assert layout_of(tensor) is WHOLE
    assert WHOLE.total(7) == 7
    assert WHOLE.part(whole) is whole
    assert WHOLE.whole_shape(whole) == (3, 2)


def test_counts_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    params, masks = {"p": nn.Parameter(torch.ones(5))}, {"p": torch.tensor([True, True, False, True, False])}
    alone = SparseWeights(params, {}, masks)
    assert (alone.active_counts["p"], alone.size("p"), alone.size_of_all) == (3, 5, 5)
    assert layer_sparsity(alone) == {"sparsity/p": 0.4}
    monkeypatch.setattr(weights, "layout_of", half)
    shared = SparseWeights(params, {}, masks)
    assert (shared.active_counts["p"], shared.size("p"), shared.size_of_all) == (6, 10, 10)
    assert layer_sparsity(shared) == {"sparsity/p": 0.4}


def test_uniform_draws_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = randomness.uniform_like(torch.empty(4, 3), randomness.generator(1, 2, "p"))
    assert whole.shape == (4, 3)
    monkeypatch.setattr(randomness, "layout_of", half)
    mine = torch.empty(2, 3)
    assert torch.equal(randomness.uniform_like(mine, randomness.generator(1, 2, "p")), whole[:2])


def test_random_masks_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    def masks_of(rows: int) -> Tensor:
        made = Method(0.5, distribution="uniform", include=None, exclude=None, seed=0)
        made.targets = {"p": 0.5}
        entry = Entry("p", 2 * rows, (rows, 2), (rows, 2))
        made.weights = SparseWeights({"p": nn.Parameter(torch.ones(rows, 2))}, {"p": entry}, {})
        return made.initial_masks()["p"]

    whole = masks_of(8)
    assert int(whole.sum()) == 8
    monkeypatch.setattr(method, "layout_of", half)
    assert torch.equal(masks_of(4), whole[:4])
