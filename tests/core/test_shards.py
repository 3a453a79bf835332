"""The layout of a parameter: the identity today, and asked by everything that would have to know of shards."""

import pytest
import torch
from torch import Tensor, nn

from sparse_callbacks.core import method, randomness, weights
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.core.shards import WHOLE, Layout, layout_of
from sparse_callbacks.core.weights import SparseWeights


class Half(Layout):
    """A parameter of which this process holds the first half of the rows, as one of two like processes."""

    def total(self, count: int) -> int:
        return 2 * count

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


def test_counts_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    params, masks = {"p": nn.Parameter(torch.ones(5))}, {"p": torch.tensor([True, True, False, True, False])}
    alone = SparseWeights(params, {}, masks)
    assert (alone.active_counts["p"], alone.size("p"), alone.size_of_all) == (3, 5, 5)
    monkeypatch.setattr(weights, "layout_of", half)
    shared = SparseWeights(params, {}, masks)
    assert (shared.active_counts["p"], shared.size("p"), shared.size_of_all) == (6, 10, 10)


def test_uniform_draws_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    p = torch.empty(4, 3)
    whole = randomness.uniform_like(p, randomness.generator(1, 2, "p"))
    assert whole.shape == (4, 3)
    monkeypatch.setattr(randomness, "layout_of", half)
    assert torch.equal(randomness.uniform_like(p, randomness.generator(1, 2, "p")), whole[:2])


def test_random_masks_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    made = Method(0.5, distribution="uniform", include=None, exclude=None, seed=0)
    made.targets = {"p": 0.5}
    made.weights = SparseWeights({"p": nn.Parameter(torch.ones(8, 2))}, {"p": Entry("p", 16, (8, 2), (8, 2))}, {})
    whole = made.initial_masks()["p"]
    assert int(whole.sum()) == 8
    monkeypatch.setattr(method, "layout_of", half)
    assert torch.equal(made.initial_masks()["p"], whole[:4])
