"""Products of truly sparse layers: results and gradients are those of a masked dense layer, and nothing dense is made."""

from typing import Any

import pytest
import torch
from support.sparse_layers import GROUP, STORAGES, called, mask_of, twins
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_callbacks import SparseLinear
from sparse_callbacks.core.sparse_layers import sparse_kernels, sparse_products

SHAPES = [(10,), (1, 10), (5, 10), (3, 7, 10), (2, 2, 3, 10), (0, 10), (2, 0, 10), (9, 10)]


@pytest.fixture
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of four rows, so that small batches are wide."""
    monkeypatch.setattr(sparse_products, "NARROW", 4)
    monkeypatch.setattr(sparse_products, "PIECE", 4)


@pytest.fixture
def without_mkl(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sparse_kernels, "has_sampled_product", lambda: False)
    monkeypatch.setattr(sparse_kernels, "MULTIPLIED", 21)
    monkeypatch.setattr(torch.sparse, "sampled_addmm", None)


def assert_twins_agree(storage: str, shape: tuple[int, ...], dtype: torch.dtype, bias: bool = True) -> None:
    tolerance: dict[str, Any] = {} if dtype.itemsize > 2 else {"atol": 0.1, "rtol": 0.05}
    linear, layer = twins(storage, dtype, bias=bias)
    x = torch.randn(shape, dtype=dtype)
    x_dense, x_sparse = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_dense, y_sparse = linear(x_dense), layer(x_sparse)
    assert y_sparse.dtype == dtype
    torch.testing.assert_close(y_sparse, y_dense, **tolerance)
    grad = torch.randn_like(y_dense)
    y_dense.backward(grad)
    y_sparse.backward(grad)
    torch.testing.assert_close(x_sparse.grad, x_dense.grad, **tolerance)
    assert linear.weight.grad is not None
    assert layer.values.grad is not None
    torch.testing.assert_close(layer.values.grad, layer.places.read(linear.weight.grad), **tolerance)
    if bias:
        torch.testing.assert_close(layer.bias.grad, linear.bias.grad, **tolerance)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_output_and_gradients_are_those_of_the_masked_layer(storage: str, shape: tuple[int, ...]) -> None:
    assert_twins_agree(storage, shape, torch.float64)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.usefixtures("narrow")
def test_so_are_those_of_wide_batches(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    assert_twins_agree("sparse", shape, dtype)


@pytest.mark.parametrize("shape", [(5, 10), (9, 10)], ids=str)
@pytest.mark.usefixtures("narrow", "without_mkl")
def test_the_sampled_product_does_without_mkl(shape: tuple[int, ...]) -> None:
    assert_twins_agree("sparse", shape, torch.float32)


def test_mkl_is_found_by_a_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise RuntimeError("MKL is not there")

    monkeypatch.setattr(torch.sparse, "sampled_addmm", fails)
    assert sparse_kernels.has_sampled_product.__wrapped__() is False


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_layers_of_half_precision(storage: str, dtype: torch.dtype) -> None:
    assert_twins_agree(storage, (5, 10), dtype)
    assert_twins_agree(storage, (5, 10), dtype, bias=False)


@pytest.mark.parametrize("storage", STORAGES)
def test_no_live_weight_at_all(storage: str) -> None:
    linear = nn.Linear(10, 12)
    layer = SparseLinear.from_dense(linear, torch.zeros(12, 10, dtype=torch.bool), storage=storage, group=GROUP)  # type: ignore[arg-type]
    x = torch.randn(5, 10, requires_grad=True)
    y = layer(x)
    torch.testing.assert_close(y, linear.bias.expand(5, 12))
    y.sum().backward()
    assert x.grad is not None
    assert not x.grad.any()


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("narrow")
def test_gradients_and_their_gradients_are_exact(storage: str, rows: int) -> None:
    _, layer = twins(storage)
    x = torch.randn(rows, 10, dtype=torch.float64, requires_grad=True)
    given = (layer.values, layer.bias, x)
    assert torch.autograd.gradcheck(lambda *args: called(layer, *args), given)
    assert torch.autograd.gradgradcheck(lambda *args: called(layer, *args), given)


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("narrow")
def test_a_penalty_on_the_gradient_of_the_input_is_trained(storage: str, rows: int) -> None:
    """As in WGAN-GP: the gradient of the input is differentiated by the weights."""
    linear, layer = twins(storage)
    x = torch.randn(rows, 10, dtype=torch.float64)
    for net in (linear, layer):
        given = x.clone().requires_grad_()
        (slope,) = torch.autograd.grad(net(given).tanh().sum(), given, create_graph=True)
        slope.square().sum().backward()
    assert linear.weight.grad is not None
    torch.testing.assert_close(layer.values.grad, layer.places.read(linear.weight.grad))


# ---------------------------------------------------------------------- work that is not done


class Copies(TorchDispatchMode):
    """Notes the operations that copy a matrix."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket in (torch.ops.aten.clone, torch.ops.aten.copy_) and args[0].dim() > 1:
            self.made.append(str(func))
        return func(*args, **kwargs or {})


@pytest.fixture
def products_made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the products as they are made."""
    made: list[str] = []

    def watched(owner: Any, name: str) -> None:
        original = getattr(owner, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            made.append(name)
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, call)

    for owner, name in (
        (sparse_products, "rows_product"),
        (sparse_products, "add_sampled"),
        (sparse_kernels, "add_sampled"),
    ):
        watched(owner, name)
    watched(torch, "bmm")
    return made


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize(
    ("storage", "frozen", "input_too", "made"),
    [
        ("sparse", [], True, {"rows_product": 1, "add_sampled": 1}),
        ("sparse", [], False, {"add_sampled": 1}),
        ("sparse", ["weight"], True, {"rows_product": 1}),
        ("sparse", ["weight"], False, {}),
        ("grouped", [], True, {"bmm": 2}),
        ("grouped", [], False, {"bmm": 1}),
        ("grouped", ["weight"], True, {"bmm": 1}),
        ("grouped", ["weight"], False, {}),
    ],
)
@pytest.mark.usefixtures("narrow")
def test_backward_makes_the_gradients_that_are_asked_for(
    storage: str, frozen: list[str], input_too: bool, made: dict[str, int], rows: int, products_made: list[str]
) -> None:
    _, layer = twins(storage)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(name not in frozen)
    y = layer(torch.randn(rows, 10, dtype=torch.float64, requires_grad=input_too))
    products_made.clear()
    y.sum().backward()
    pieces = 2 if storage == "sparse" and rows > 4 else 1
    assert {name: products_made.count(name) for name in set(products_made)} == {k: n * pieces for k, n in made.items()}
    assert (layer.values.grad is None) == ("weight" in frozen)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_frozen_layer_keeps_no_input(storage: str) -> None:
    _, layer = twins(storage)
    layer.requires_grad_(False)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        layer(torch.randn(3, 10, dtype=torch.float64, requires_grad=True))
    assert [tuple(t.shape) for t in kept if t.shape == layer.values.shape] == [tuple(t.shape) for t in kept]


@pytest.mark.parametrize("storage", STORAGES)
def test_a_chain_of_layers_copies_no_activation(storage: str) -> None:
    """Outputs are views of feature-major memory, and so are the gradients that come back."""
    torch.manual_seed(0)
    first, second = (SparseLinear.random(8, 8, 3, storage=storage, group=4) for _ in range(2))  # type: ignore[arg-type]
    hidden = first(torch.randn(5, 8)).relu()
    assert hidden.t().is_contiguous()
    grads: list[Tensor] = []
    hidden.register_hook(grads.append)
    with Copies() as copies:
        second(hidden).relu().backward(torch.ones(8, 5).t())
    assert grads[0].t().is_contiguous()
    assert not copies.made
    sequence = first(torch.randn(2, 3, 8))
    assert sequence.reshape(-1, 8).data_ptr() == sequence.data_ptr()


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("narrow")
def test_whoever_views_outputs_has_them_contiguous(storage: str, rows: int) -> None:
    _, layer = twins(storage, feature_major=False)
    x = torch.randn(rows, 10, dtype=torch.float64)
    assert layer(x).is_contiguous()
    assert layer(x).view(-1).shape == (rows * 12,)
    assert layer(x[None]).is_contiguous()


@pytest.mark.parametrize("feature_major", [True, False])
@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.usefixtures("narrow")
def test_functions_in_place_may_follow(storage: str, rows: int, feature_major: bool) -> None:
    linear, layer = twins(storage, feature_major=feature_major)
    x = torch.randn(rows, 10, dtype=torch.float64, requires_grad=True)
    y = nn.ReLU(inplace=True)(layer(x))
    torch.testing.assert_close(y, linear(x).relu())
    y.sum().backward()


@pytest.mark.parametrize("storage", STORAGES)
def test_without_gradients_the_same_is_computed(storage: str) -> None:
    linear, layer = twins(storage)
    x = torch.randn(3, 10, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), linear(x))
    with torch.inference_mode():
        torch.testing.assert_close(layer(x), linear(x))


# ---------------------------------------------------------------------- autocast


def test_autocast_casts_the_values_of_grouped_storage() -> None:
    linear, layer = twins("grouped", torch.float32)
    x = torch.randn(5, 10, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        y, expected = layer(x), linear(x)
    assert y.dtype == expected.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected, atol=0.02, rtol=0.02)
    y.sum().backward()
    assert layer.values.grad is not None
    assert layer.values.grad.dtype == torch.float32


@pytest.mark.parametrize("rows", [3, 6])
@pytest.mark.usefixtures("narrow")
def test_under_autocast_sparse_storage_takes_half_inputs(rows: int) -> None:
    _, layer = twins("sparse", torch.float32)
    x = torch.randn(rows, 10).bfloat16().requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.float32
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16


def test_inputs_of_another_width_are_refused() -> None:
    layer = SparseLinear.random(10, 12, 3)
    layer.name = "net.0"
    with pytest.raises(ValueError, match=r"net.0 has 10 inputs and was given \(2, 9\)"):
        layer(torch.randn(2, 9))


@pytest.mark.parametrize(
    ("rows", "features", "whole"),
    [(128, 2048, True), (128, 2049, False), (129, 10, False), (64, 10**6, True), (65, 10**6, False)],
)
def test_batches_are_cut_where_they_would_leave_the_caches(rows: int, features: int, whole: bool) -> None:
    assert sparse_products.is_narrow(rows, features) == whole


def test_masks_of_the_support_have_empty_rows_and_columns() -> None:
    mask = mask_of("sparse")
    assert not mask.any(0).all()
    assert not mask.any(1).all()
