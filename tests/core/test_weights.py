"""The writer of parameter values alone: masks over values that are not finite, and gates that are counted when
asked."""

import torch
from torch import nn

from sparse_callbacks.core.weights import SparseWeights


def test_masks_fill_where_a_product_would_not_be_zero() -> None:
    p = nn.Parameter(torch.tensor([1.0, torch.inf, torch.nan]))
    store = SparseWeights({"p": p}, {}, {"p": torch.tensor([True, False, False])})
    store.write_masked(["p"], finite=False)
    assert p.tolist() == [1.0, 0.0, 0.0]


def test_what_is_active_behind_gates_is_counted_when_somebody_asks() -> None:
    layer = nn.Linear(3, 2)
    params = dict(layer.named_parameters())
    store = SparseWeights(params, {}, {n: torch.ones_like(p) for n, p in params.items()})
    store.set_factor("weight", torch.tensor([[0.0, 0.5, 1.0]]))
    store.set_factor("bias", torch.tensor([0.0, 0.1]))
    store.set_passing_factor("bias", torch.zeros(2))  # a sample changes nothing
    assert store.active_counts == {"weight": 4, "bias": 1}
    store.set_factor("weight", torch.tensor([[0.0, 0.0, 1.0]]))
    assert store.active_counts == {"weight": 2, "bias": 1}
    store.set_factor("bias", torch.zeros(2))
    assert store.active_counts == {"weight": 2, "bias": 0}
