"""The writer of parameter values alone: masks over values that are not finite, and gates that are counted when
asked."""

import pytest
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


@pytest.mark.parametrize("copied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_pruned_weights_are_zero_whatever_a_step_has_left_there(dtype: torch.dtype, copied: bool) -> None:
    """Also where finite gradients have overflown, and whatever the strides are."""
    values = torch.tensor([1.0, torch.inf, torch.nan, -torch.inf, -2.0, -0.0]).to(dtype)
    for p in (nn.Parameter(values), nn.Parameter(values.repeat(2, 1).t())):
        mask = torch.tensor([True, False, False, False, True, True])
        mask = mask if p.ndim == 1 else mask[:, None].expand(p.shape)
        store = SparseWeights({"p": p}, {}, {"p": mask})
        if copied:
            store.start_copy({"p": p.detach()})
        p.grad = torch.full_like(p, torch.nan)
        store.write_masked(["p"])
        store.mask_gradient("p")
        expected = torch.tensor([1.0, 0, 0, 0, -2.0, -0.0], dtype=dtype)
        assert torch.equal(p.detach(), expected if p.ndim == 1 else expected[:, None].expand(p.shape))
        assert not p.grad[~mask].any()
        assert p.grad[mask].isnan().all()
        pruned = store.at_pruned("p", torch.full_like(p, torch.nan))
        assert pruned[~mask].isnan().all()
        assert not pruned[mask].any()


@pytest.mark.parametrize("when", ["between steps", "in a step", "after a write"])
def test_dense_values_of_pruned_weights(when: str) -> None:
    p = nn.Parameter(torch.tensor([[1.5, -2.0, 3.0, -0.0], [0.1, 1e-30, -7.0, 4.0]]))
    mask = torch.tensor([[1, 0, 0, 1], [0, 0, 1, 1]]).bool()
    store = SparseWeights({"p": p}, {}, {"p": mask})
    store.start_copy({"p": p.detach()})
    store.write_masked(["p"])
    if when == "in a step":
        store.swap_in(["p"])
    elif when == "after a write":
        with torch.no_grad():
            p.clamp_(-1, 1)
    expected = [[0, -2.0, 3.0, 0], [0.1, 1e-30, 0, 0]]
    assert torch.equal(store.dense_at_pruned("p"), torch.tensor(expected))
    memory = torch.full_like(p, torch.nan, requires_grad=False)
    assert store.dense_at_pruned("p", memory).data_ptr() == memory.data_ptr()
    assert torch.equal(memory, torch.tensor(expected))


def test_weights_behind_closed_gates_are_zero_whatever_the_dense_ones_are() -> None:
    p = nn.Parameter(torch.tensor([[1.0, torch.inf, torch.nan]]))
    store = SparseWeights({"p": p}, {}, {"p": torch.ones(1, 3, dtype=torch.bool)})
    store.start_copy({"p": p.detach()})
    store.set_factor("p", torch.tensor([[0.5, 0.0, 0.0]]))
    store.write_masked(["p"])
    assert p.tolist() == [[0.5, 0, 0]]
