"""Spectral radii of K-FAC blocks, beside blocks that are formed whole."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.curvature import TABLE, radii
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_callbacks import SparseLinear
from sparse_callbacks.core.curvature import WatchedCall, kfac_spectral_radius, largest_eigenvalue
from sparse_callbacks.core.watched_layers import WatchedLayers, watchable_layers

EXACT: dict[str, Any] = {"iterations": 1000, "tolerance": 0.0}
ROUNDING = 1e-6  # of power iteration to its end in float64


def test_the_table() -> None:
    a, g = (torch.tensor(TABLE[name], dtype=torch.float64) for name in ("A", "G"))
    found = [largest_eigenvalue(lambda v, m=m: v @ m, torch.ones(1, 2).double(), 100, 0.0).item() for m in (a, g)]
    assert found == pytest.approx([TABLE["lambda_max_A"], TABLE["lambda_max_G"]], abs=1e-10)
    # rows whose factors are these matrices: three samples of two rows times a root of the matrix
    calls = [WatchedCall(nn.Linear(2, 2, bias=False).double(), _root(a) * math.sqrt(2), _root(g) * math.sqrt(2))]
    radius = kfac_spectral_radius(calls, samples=2, **EXACT)
    assert radius == pytest.approx(TABLE["spectral_radius_A_kron_G"], abs=1e-10)
    assert max(torch.linalg.eigvalsh(torch.kron(a, g))).item() == pytest.approx(radius, abs=1e-10)


def _root(matrix: Tensor) -> Tensor:
    """Rows ``r`` with ``r^T r = matrix``."""
    return torch.linalg.cholesky(matrix).T


class Twice(nn.Module):
    """Calls one layer two times."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Any:
        return self.layer(torch.tanh(self.layer(x)))


def network() -> nn.Module:
    """Every kind of layer, on inputs [n, 4, 6, 6]."""
    torch.manual_seed(0)
    frozen, half = nn.Conv2d(6, 6, 1), nn.Conv2d(6, 4, 1)
    frozen.weight.requires_grad_(False)
    assert half.bias is not None
    half.bias.requires_grad_(False)
    return nn.Sequential(
        nn.Conv2d(4, 8, 3, stride=2, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 6, 3, padding="same", padding_mode="circular", groups=2, bias=False),
        nn.Tanh(),
        frozen,
        nn.Conv2d(6, 6, (3, 1), padding=(1, 0), groups=6),
        half,
        nn.Tanh(),
        nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1, groups=2),
        nn.Tanh(),
        Twice(nn.Conv2d(6, 6, 3, dilation=2, padding=2)),
        nn.Flatten(2),
        nn.Linear(36, 5),  # its rows are the channels of a sample
        Twice(nn.Linear(5, 5)),
        nn.Flatten(),
        nn.Linear(30, 3, bias=False),
    ).double()


def measured(model: nn.Module, loss: Callable[[], Tensor], samples: int, **options: Any) -> dict[str, float]:
    watched = WatchedLayers(watchable_layers(model))
    loss().backward()
    scale = options.pop("scale", samples)
    return {name: kfac_spectral_radius(c, samples, scale, **(EXACT | options)) for name, c in watched.end().items()}


def trained(model: nn.Module) -> dict[str, list[nn.Module]]:
    return {n: some for n, some in watchable_layers(model).items() if model.get_parameter(n).requires_grad}


def batch(samples: int = 5) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(samples, 4, 6, 6).double(), torch.randint(0, 3, (samples,))


@pytest.mark.parametrize("iterations", [1000, 12])
def test_radii_are_those_of_kronecker_products_that_are_formed(iterations: int) -> None:
    """With few iterations no patch is formed; these are a lower bound."""
    model, (x, y) = network(), batch()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    expected = radii(trained(model), loss, len(x))
    assert len(expected) == 9
    found = measured(model, loss, len(x), iterations=iterations)
    assert math.isnan(found.pop("4.weight"))  # frozen
    assert found.keys() == expected.keys()
    for name, radius in expected.items():
        assert found[name] == pytest.approx(radius, rel=ROUNDING if iterations > 12 else 0.2), name
        assert found[name] <= radius * (1 + ROUNDING)


def test_convolutions_without_formed_patches() -> None:
    """As many iterations as are exact, and kernels with more weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(20, 4, 5, groups=2, stride=2, padding=3), nn.ConvTranspose1d(4, 3, 15, bias=False))
    x = torch.randn(2, 20, 9).double() + 1
    model.double()

    def loss() -> Tensor:
        return model(x).square().mean(dim=(1, 2)).mean()

    found = measured(model, loss, 2, iterations=50)
    assert found == pytest.approx(radii(trained(model), loss, 2), rel=0.02)


@pytest.mark.parametrize(
    "layer", [nn.Linear(4, 3), nn.Linear(4, 3, bias=False), nn.Conv2d(4, 3, 6), nn.Conv2d(4, 3, 6, bias=False)]
)
def test_of_one_sample_at_one_position_it_is_the_squared_norm_of_its_gradient(layer: nn.Module) -> None:
    """The block is the outer product of the gradient with itself then; equal samples of a mean loss do not change it."""
    model = nn.Sequential(layer, nn.Tanh(), nn.Flatten()).double()
    x = torch.randn(1, 4, 6, 6).double() if isinstance(layer, nn.Conv2d) else torch.randn(1, 4).double()
    alone = measured(model, lambda: model(x).square().sum(1).mean(), 1)
    norm = sum(float(p.grad.square().sum()) for p in model.parameters() if p.grad is not None)
    assert alone == {"0.weight": pytest.approx(norm)}
    many = torch.cat([x] * 7)
    assert measured(model, lambda: model(many).square().sum(1).mean(), 7) == {"0.weight": pytest.approx(norm)}
    assert measured(model, lambda: model(many).square().sum(1).sum(), 7, scale=1) == {"0.weight": pytest.approx(norm)}


@pytest.mark.parametrize("reentrant", [True, False])
def test_layers_that_compute_again_count_once(reentrant: bool) -> None:
    model, (x, y) = network(), batch()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    def again() -> Tensor:
        middle = checkpoint(model[1:12], model[0](x), use_reentrant=reentrant)
        return nn.functional.cross_entropy(model[12:](middle), y)  # type: ignore[misc]

    few = {"iterations": 20}
    model[1] = nn.Tanh()
    assert measured(model, again, len(x), **few) == pytest.approx(measured(model, loss, len(x), **few), nan_ok=True)


def test_passes_without_gradients_and_without_a_loss_do_not_count() -> None:
    model, (x, y) = network(), batch()

    def loss() -> Tensor:
        return nn.functional.cross_entropy(model(x), y)

    def more() -> Tensor:
        with torch.no_grad():
            model(3 * x)
        model(5 * x)
        found = loss()
        found.backward(retain_graph=True)
        return 7 * found  # a second backward pass through the same graph

    few = {"iterations": 20}
    assert measured(model, more, len(x), **few) == pytest.approx(measured(model, loss, len(x), **few), nan_ok=True)


def test_an_exchanged_layer_is_measured_as_the_dense_one() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(12, 10), nn.ReLU(inplace=True), nn.Linear(10, 4))
    mask = torch.rand(10, 12) < 0.3
    sparse = nn.Sequential(SparseLinear.from_dense(dense[0], mask), nn.ReLU(inplace=True), dense[2])
    dense[0].weight.data *= mask
    x, few = torch.randn(6, 12), {"iterations": 50}
    found, expected = (measured(m, lambda m=m: m(x).square().sum(1).mean(), 6, **few) for m in (sparse, dense))
    assert found == pytest.approx(expected, rel=1e-4)


def test_layers_that_share_a_weight() -> None:
    """Used in the same way they are one layer, also with several biases, which are left out; a transposed one is another."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6), nn.Unflatten(1, (2, 3)))
    model[2].weight = model[0].weight
    model += nn.Sequential(nn.Conv1d(2, 4, 2, bias=False), nn.ConvTranspose1d(4, 2, 2, bias=False))
    model[5].weight = model[4].weight
    model.double()
    layers = watchable_layers(model)
    assert {name: len(some) for name, some in layers.items()} == {"0.weight": 2, "4.weight": 1, "5.weight": 1}
    assert list(watchable_layers(model, include=["5.*"])) == ["4.weight", "5.weight"]
    x = torch.randn(4, 6).double()

    def loss() -> Tensor:
        return model(x).square().sum((1, 2)).mean()

    found = measured(model, loss, 4)
    for i in (0, 2):
        model[i].bias.requires_grad_(False)  # the oracle's way to leave one out
    assert found == pytest.approx(radii(layers, loss, 4), rel=ROUNDING)


def test_what_no_layer_is_called_for_is_not_listed() -> None:
    attention = nn.MultiheadAttention(4, 2)
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    model = nn.ModuleDict({"attention": attention, "lstm": nn.LSTM(4, 4), "normed": normed, "fc": nn.Linear(4, 4)})
    assert list(watchable_layers(model)) == ["fc.weight"]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"include": ["nothing*"]}, r"include='nothing\*' matches the weight of no linear layer.*0\.weight, 2\.weight"),
        ({"exclude": ["nothing*"]}, r"exclude='nothing\*' matches the weight of no linear layer.*0\.weight, 2\.weight"),
        ({"exclude": ["*"]}, r"no layer is left to watch.*0\.weight, 2\.weight"),
    ],
)
def test_refused_globs(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        watchable_layers(nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3)), **options)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_inf_and_nan_give_nan(value: float) -> None:
    layer, rows = nn.Linear(3, 3), torch.ones(2, 3)
    bad = rows.clone()
    bad[0, 0] = value
    assert not math.isfinite(kfac_spectral_radius([WatchedCall(layer, bad, rows)], 2))
    assert math.isnan(kfac_spectral_radius([WatchedCall(layer, rows, bad)], 2))
    assert math.isnan(kfac_spectral_radius([], 2))


def test_small_gradients_are_not_lost_in_float32_and_zero_ones_are_zero() -> None:
    layer, rows = nn.Linear(3, 3, bias=False), torch.ones(2, 3)
    assert kfac_spectral_radius([WatchedCall(layer, rows, 1e-30 * rows)], 2) == pytest.approx(9e-60)
    assert kfac_spectral_radius([WatchedCall(layer, rows, 0 * rows)], 2) == 0


def test_a_measurement_leaves_nothing() -> None:
    model, (x, y) = network(), batch()
    before = torch.get_rng_state()
    measured(model, lambda: nn.functional.cross_entropy(model(x), y), len(x), iterations=5)
    assert not any(m._forward_hooks for m in model.modules())
    assert torch.equal(torch.get_rng_state(), before)
