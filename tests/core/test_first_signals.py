"""Inputs that the doctor meets in the first batch, of every shape and type."""

import math

import pytest
import torch
from torch import nn

from sparse_callbacks import sparsify
from sparse_callbacks.core.doctor.first_signals import spread_of_samples
from sparse_callbacks.methods import SET


@pytest.mark.parametrize("storage", ["masked", "sparse"])
@pytest.mark.parametrize("shape", [(24,), (0, 24), (1, 24), (0, 3, 24), (2, 3, 24)], ids=str)
def test_inputs_of_every_shape_are_looked_at_or_left(shape: tuple[int, ...], storage: str) -> None:
    model = nn.Sequential(nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with sparsify(SET(0.5, storage=storage, print_plan=False), model, optimizer, steps=4) as run:
        model(torch.randn(shape)).square().sum().backward()
        optimizer.step()
    assert run.step == 1


@pytest.mark.parametrize(
    ("x", "expected"),
    [
        (torch.tensor(3.0), math.nan),
        (torch.randn(5), math.nan),
        (torch.zeros(0, 4), math.nan),
        (torch.zeros(4, 0), math.nan),
        (torch.randn(1, 4), math.nan),
        (torch.arange(8).view(4, 2), math.nan),  # token ids are no amounts
        (torch.ones(4, 2, dtype=torch.bool), math.nan),
        (torch.randn(4, 2, dtype=torch.complex64), math.nan),
        (torch.eye(4).to_sparse(), math.nan),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged), math.nan),
        (torch.tensor([[0.0, 1.0], [2.0, 1.0]]), 1.0),
        (torch.tensor([[[0.0], [4.0]], [[2.0], [4.0]]], dtype=torch.bfloat16), 1.0),
    ],
)
def test_the_spread_of_samples_is_that_of_floating_point_batches_alone(x: torch.Tensor, expected: float) -> None:
    found = float(spread_of_samples(x))
    assert found == expected or (math.isnan(found) and math.isnan(expected))
