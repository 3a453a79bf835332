"""Records of a layer: what the dense gradient of its weight is made of, once for each gradient that reaches the values."""

from typing import Any

import pytest
import torch
from support.sparse_layers import STORAGES, twins
from torch import Tensor, nn

from sparse_callbacks import SparseLinear
from sparse_callbacks.core.sparse_layers import sparse_products

ROWS = pytest.mark.parametrize("rows", [3, 6])
STORED = pytest.mark.parametrize("storage", STORAGES)


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of four rows, so that small batches are wide."""
    monkeypatch.setattr(sparse_products, "NARROW", 4)
    monkeypatch.setattr(sparse_products, "PIECE", 4)


def recording(storage: str) -> tuple[nn.Linear, SparseLinear]:
    linear, layer = twins(storage)
    layer.records = []
    return linear, layer


def recorded(layer: SparseLinear) -> Tensor:
    """The dense gradient by the records."""
    assert layer.records is not None
    assert not any(t.requires_grad for pair in layer.records for t in pair)
    return sum((dy @ x.t() for x, dy in layer.records), torch.zeros(12, 10, dtype=torch.float64))


@ROWS
@STORED
def test_the_records_of_a_window_are_the_dense_gradient(storage: str, rows: int) -> None:
    linear, layer = recording(storage)
    for _ in range(2):
        x = torch.randn(rows, 10, dtype=torch.float64)
        for net in (linear, layer):
            net(net(x)[:, :10]).tanh().sum().backward()  # called twice
    torch.testing.assert_close(recorded(layer), linear.weight.grad)
    torch.testing.assert_close(layer.values.grad, layer.places.read(recorded(layer)))


@ROWS
@STORED
def test_what_is_recorded_stays_as_it_was(storage: str, rows: int) -> None:
    _, layer = recording(storage)
    layer(torch.randn(rows, 10, dtype=torch.float64)).tanh().sum().backward()
    before = recorded(layer)
    layer.records, kept = [], layer.records
    layer(torch.randn(rows, 10, dtype=torch.float64)).tanh().sum().backward()
    layer.records = kept
    assert torch.equal(recorded(layer), before)


@ROWS
@STORED
def test_a_pass_to_the_inputs_alone_is_not_recorded(storage: str, rows: int) -> None:
    """As for adversarial examples; the next pass through the same graph is."""
    linear, layer = recording(storage)
    x = torch.randn(rows, 10, dtype=torch.float64, requires_grad=True)
    loss = layer(x).tanh().sum()
    torch.autograd.grad(loss, x, retain_graph=True)
    assert layer.records == []
    loss.backward()
    linear(x).tanh().sum().backward()
    torch.testing.assert_close(recorded(layer), linear.weight.grad)


@ROWS
@STORED
def test_a_penalty_on_gradients_is_recorded_whole(storage: str, rows: int) -> None:
    """It uses the weight twice: in the output, and in the gradient of the input."""
    linear, layer = recording(storage)
    x = torch.randn(rows, 10, dtype=torch.float64)
    for net in (linear, layer):
        given = x.clone().requires_grad_()
        loss = net(given).tanh().square().sum()
        (slope,) = torch.autograd.grad(loss, given, create_graph=True)
        (loss + slope.square().sum()).backward()
    torch.testing.assert_close(recorded(layer), linear.weight.grad)


@ROWS
@STORED
def test_each_pass_through_one_graph_records_what_it_uses(storage: str, rows: int) -> None:
    """A penalty alone, whose backward pass does not reach the output; then the loss alone."""
    linear, layer = recording(storage)
    x = torch.randn(rows, 10, dtype=torch.float64)
    for net in (linear, layer):
        given = x.clone().requires_grad_()
        loss = net(given).sum()
        (slope,) = torch.autograd.grad(loss, given, create_graph=True)
        slope.square().sum().backward(retain_graph=True)
        if net is linear:
            assert linear.weight.grad is not None
            penalty = linear.weight.grad.clone()
        else:
            torch.testing.assert_close(recorded(layer), penalty)
        loss.backward()
    torch.testing.assert_close(recorded(layer), linear.weight.grad)


@STORED
def test_frozen_values_and_evaluation_record_nothing(storage: str) -> None:
    _, layer = recording(storage)
    x = torch.randn(3, 10, dtype=torch.float64, requires_grad=True)
    with torch.no_grad():
        layer(x)
    layer.values.requires_grad_(False)
    layer(x).sum().backward()
    assert layer.records == []


@STORED
def test_under_autocast_the_types_are_those_of_the_product(storage: str) -> None:
    _, layer = twins(storage, torch.float32)
    layer.records = []
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(torch.randn(3, 10))
    y.float().sum().backward()
    (pair,) = layer.records
    assert {t.dtype for t in pair} == {torch.float32 if storage == "sparse" else torch.bfloat16}


@STORED
def test_a_list_of_the_users_own_is_kept(storage: str) -> None:
    class Watched(list[Any]):
        pass

    _, layer = twins(storage)
    layer.records = Watched()
    layer(torch.randn(3, 10, dtype=torch.float64)).sum().backward()
    assert isinstance(layer.records, Watched)
    assert len(layer.records) == 1
