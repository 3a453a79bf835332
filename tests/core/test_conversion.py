"""Conversion to N:M: tables, fits that are optima of the layer's own outputs, and what comes of a network."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from support.nets import mlp
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import SparseLinear, convert, recalibrate_batchnorm, saved_masks, sparsify
from sparse_callbacks.core.conversion import input_passes, layer_fits
from sparse_callbacks.core.conversion.adam_fit import KeptInputs, fit_by_adam
from sparse_callbacks.core.conversion.candidates import chosen_weights
from sparse_callbacks.core.conversion.layer_fits import fitted, mean_squared_error, recorder_for
from sparse_callbacks.core.conversion.least_squares import Moments, refit
from sparse_callbacks.core.conversion.starts import absorb_mean
from sparse_callbacks.core.nm_counts import chance_of_nm
from sparse_callbacks.core.nm_masks import NMPattern, in_groups, nm_mask
from sparse_callbacks.methods import Static

TWO_OF_FOUR = NMPattern(2, 4)

# ---------------------------------------------------------------------- tables

X = torch.tensor(
    [
        [-0.71, -1.93, 1.36, -1.05, 0.45, -1.41, -0.31, -2.0],
        [-0.74, -0.79, 0.21, -1.45, -1.65, -1.74, -1.1, -1.07],
        [-1.37, 1.24, 0.14, -0.73, 0.95, 1.47, -1.95, 1.53],
        [-1.16, -1.73, -0.98, 1.08, 1.97, -0.26, 1.88, 1.02],
        [0.48, 0.16, -1.35, 1.19, 1.44, -1.25, -0.56, -1.89],
        [-1.4, -0.58, -1.51, 0.27, 1.27, 1.57, 1.99, 0.13],
        [-0.96, 1.28, 0.62, 1.63, -0.65, 0.6, 0.32, -1.86],
        [0.63, -0.11, -1.17, -1.83, 0.83, 1.85, -0.69, -0.44],
        [-1.21, 1.78, -1.43, 1.84, -0.59, -1.15, -1.79, 0.29],
        [-0.89, -1.91, 0.43, 0.66, 1.72, 1.01, 1.9, -1.2],
        [-0.53, -0.92, 1.82, 1.76, 1.33, -0.7, 0.51, 1.75],
        [-1.87, -1.5, -0.49, 1.38, -0.87, -0.39, 0.28, 0.94],
    ],
    dtype=torch.float64,
)
W = torch.tensor(
    [
        [-0.95, 0.64, 0.94, 0.55, 0.12, -0.69, 0.92, 0.66],
        [0.37, -0.17, -0.07, -0.9, -0.87, 0.74, 0.05, -0.1],
        [-0.43, 0.19, 0.22, -0.71, 0.14, -0.82, 0.6, -0.51],
    ],
    dtype=torch.float64,
)
MASK = torch.tensor([[1, 0, 1, 0, 0, 1, 1, 0], [1, 0, 0, 1, 1, 1, 0, 0], [1, 0, 0, 1, 0, 1, 1, 0]]).bool()
ABSORBED = [
    [-0.355, 0.0, 1.535, 0.0, 0.0, -0.3, 1.31, 0.0],
    [0.25, 0.0, 0.0, -1.02, -0.895, 0.715, 0.0, 0.0],
    [-0.225, 0.0, 0.0, -0.505, 0.0, -1.005, 0.415, 0.0],
]
OPTIMUM = [
    [-1.2007577678, 0.0, 0.7650638342, 0.0, 0.0, -0.4683928574, 0.6653147886, 0.0],
    [0.3030279643, 0.0, 0.0, -0.96723872, -0.7424531501, 0.6556431908, 0.0, 0.0],
    [-0.2890630812, 0.0, 0.0, -0.7337301672, 0.0, -0.8989200737, 0.5898246916, 0.0],
]
OPTIMUM_WITH_BIAS = [
    [-1.824829228, 0.0, 0.6711115323, 0.0, 0.0, -0.491698622, 0.6142057497, 0.0],
    [0.3347674912, 0.0, 0.0, -0.9623331603, -0.7568830063, 0.6628382826, 0.0, 0.0],
    [0.0357035219, 0.0, 0.0, -0.731281771, 0.0, -0.8960184862, 0.6185951267, 0.0],
]
BIAS_SHIFT = [-0.8846478747, 0.0451066794, 0.4516792187]


def table_layer(bias: bool) -> nn.Linear:
    layer = nn.Linear(8, 3, bias=bias, dtype=torch.float64)
    layer.load_state_dict({"weight": W} | ({"bias": torch.tensor([0.5, -1.0, 2.0]).double()} if bias else {}))
    return layer


def seen(layer: nn.Module, x: Tensor) -> Any:
    recorder = recorder_for(layer)
    recorder.add(x)
    return recorder


def close(found: Tensor, expected: Any) -> None:
    torch.testing.assert_close(found, torch.as_tensor(expected, dtype=found.dtype), rtol=0, atol=2e-9)


def test_the_mask_of_the_table_is_that_of_the_magnitudes() -> None:
    assert torch.equal(nm_mask(W.abs(), 2, 4), MASK)


def test_absorbed_means_as_in_the_tables() -> None:
    group, mask = torch.tensor([[1.0, -0.2, 0.6, 0.1]]), torch.tensor([[True, False, True, False]])
    torch.testing.assert_close(absorb_mean(group, mask, 4), torch.tensor([[0.95, 0.0, 0.55, 0.0]]))
    close(absorb_mean(W, MASK, 4), ABSORBED)


def test_absorbed_means_keep_the_sum_of_each_group_of_a_convolution() -> None:
    weight = torch.randn(6, 8, 3, 3, dtype=torch.float64)
    for axis in (0, 1):
        own = weight if axis else weight.transpose(0, 1)
        mask = nm_mask(own.abs(), 2, 4, axis)
        found = absorb_mean(own, mask, 4, axis)
        assert not found[~mask].any()
        torch.testing.assert_close(in_groups(found, 4, axis).sum(-1), in_groups(own, 4, axis).sum(-1))


def test_absorbed_means_leave_a_group_without_any_active_weight_at_zero() -> None:
    assert not absorb_mean(torch.ones(1, 4), torch.zeros(1, 4, dtype=torch.bool), 4).any()


def test_the_chance_that_a_random_group_fits_as_in_the_table() -> None:
    assert chance_of_nm(0.7, 2, 4) == pytest.approx(0.9163, abs=1e-8)
    assert chance_of_nm(0.7, 4, 8) == pytest.approx(0.94203235, abs=1e-8)
    assert [chance_of_nm(s, 2, 4) for s in (0.0, 1.0)] == [0.0, 1.0]


def test_the_layer_of_the_table_is_fitted() -> None:
    layer = table_layer(bias=False)
    fit = fitted(layer, seen(layer, X), MASK, TWO_OF_FOUR, "adaprune")
    close(fit.weight, OPTIMUM)
    assert (fit.how, fit.bias, fit.rows) == ("least squares", None, 12)
    assert fit.before == pytest.approx(0.9978485339, abs=1e-9)
    assert fit.after == pytest.approx(0.8932561794, abs=1e-9)
    assert fit.before / fit.power == pytest.approx(0.2572163335, abs=1e-9)
    assert fit.after / fit.power == pytest.approx(0.2302554662, abs=1e-9)
    absorbed = fitted(layer, seen(layer, X), MASK, TWO_OF_FOUR, "absorbed")
    close(absorbed.weight, ABSORBED)
    assert absorbed.after == pytest.approx(1.699821685, abs=1e-9)
    assert torch.equal(fitted(layer, seen(layer, X), MASK, TWO_OF_FOUR, "masked").weight, W * MASK)


def test_the_layer_of_the_table_with_its_bias() -> None:
    layer = table_layer(bias=True)
    fit = fitted(layer, seen(layer, X), MASK, TWO_OF_FOUR, "adaprune")
    close(fit.weight, OPTIMUM_WITH_BIAS)
    assert fit.bias is not None
    close(fit.bias - layer.bias.detach(), BIAS_SHIFT)
    assert fit.after == pytest.approx(0.7577896284, abs=1e-9)


@pytest.mark.parametrize("bias", [False, True])
def test_adam_comes_within_a_hundredth_of_the_optimum_of_the_table(bias: bool) -> None:
    layer = table_layer(bias)
    inputs = KeptInputs(layer)
    inputs.add(X)
    optimum = 0.7577896284 if bias else 0.8932561794
    # with the usual number of steps the weights of the second table cannot move as far as they have to
    dense = W, layer.bias.detach() if bias else None
    weight, shifted = fit_by_adam(inputs, dense, (W * MASK, dense[1]), MASK, steps=4000 if bias else 1000)
    assert optimum <= mean_squared_error(inputs, dense, (weight, shifted)) <= 1.01 * optimum
    assert not weight[~MASK].any()
    assert not fit_by_adam(inputs, dense, dense, MASK, steps=2)[0][~MASK].any()  # wherever it begins
    fit = fitted(layer, inputs, MASK, TWO_OF_FOUR, "adaprune")
    assert fit.how == "Adam"
    assert optimum <= fit.after < fit.before
    assert fit.before == pytest.approx(0.9978485339, abs=1e-9)


def test_adam_begins_where_the_error_is_smaller(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inputs with one common value suit absorbed means, which are exact there; the table's do not."""
    began: list[Tensor] = []

    def noted(inputs: KeptInputs, dense: Any, start: Any, mask: Tensor) -> Any:
        began.append(start[0])
        return fit_by_adam(inputs, dense, start, mask, steps=1)

    monkeypatch.setattr(layer_fits, "fit_by_adam", noted)
    layer = table_layer(bias=False)
    for x, expected in ((X, W * MASK), (torch.ones_like(X), absorb_mean(W, MASK, 4))):
        inputs = KeptInputs(layer)
        inputs.add(x)
        fit = fitted(layer, inputs, MASK, TWO_OF_FOUR, "adaprune")
        assert torch.equal(began.pop(), expected)
    assert (fit.how, fit.after) == ("absorbed means", pytest.approx(0, abs=1e-25))


# ---------------------------------------------------------------------- fits are optima of the layer's own outputs


def conv(dimensions: int, *sizes: int, **options: Any) -> nn.Module:
    return (nn.Conv1d, nn.Conv2d, nn.Conv3d)[dimensions - 1](*sizes, **options)


LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 5), (40, 12)),
    "linear, sequences": (lambda: nn.Linear(8, 5, bias=False), (6, 9, 8)),
    "conv1d": (lambda: conv(1, 8, 5, 3, padding=1), (6, 8, 11)),
    "conv2d": (lambda: conv(2, 4, 6, 3, stride=2, padding=1), (5, 4, 9, 8)),
    "conv2d, one image": (lambda: conv(2, 4, 6, 3, bias=False), (4, 12, 12)),
    "conv2d, groups": (lambda: conv(2, 8, 6, (2, 3), groups=2, dilation=(2, 1), padding="same"), (4, 8, 9, 8)),
    "conv2d, reflected": (lambda: conv(2, 4, 3, 3, padding=(2, 1), padding_mode="reflect"), (5, 4, 8, 7)),
    "conv3d": (lambda: conv(3, 4, 3, 2, padding_mode="circular", padding=1), (3, 4, 4, 5, 4)),
}


def correlated(size: tuple[int, ...]) -> Tensor:
    """Inputs whose entries share a part along every axis: of independent ones no weight could do another's work."""
    return torch.randn(size) + sum(torch.randn(n).view(-1, *[1] * (len(size) - i - 1)) for i, n in enumerate(size))


def loss_of(layer: nn.Module, x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """The mean squared error of the layer's own forward pass with other parameters."""
    found: Tensor = torch.func.functional_call(layer, parameters, (x,))
    return (found - layer(x).detach()).square().mean()


@pytest.mark.parametrize("name", LAYERS)
def test_no_step_along_the_support_makes_the_error_smaller(name: str) -> None:
    torch.manual_seed(0)
    make, size = LAYERS[name]
    layer, x = make().double(), correlated(size).double()
    weight = layer.get_parameter("weight").detach()
    mask = nm_mask(weight.abs(), 2, 4)
    fit = fitted(layer, seen(layer, x), mask, TWO_OF_FOUR, "adaprune")
    now = {"weight": fit.weight.requires_grad_()} | ({} if fit.bias is None else {"bias": fit.bias.requires_grad_()})
    loss = loss_of(layer, x, now)
    assert fit.how == "least squares"
    assert fit.after == pytest.approx(loss.item(), rel=1e-9)
    assert fit.before == pytest.approx(loss_of(layer, x, {"weight": weight * mask}).item(), rel=1e-9)
    assert 0 < fit.after < 0.9 * fit.before
    by_weight, *by_bias = torch.autograd.grad(loss, list(now.values()))
    # rounding alone: the ridge of 1e-8 has been taken back
    assert by_weight[mask].abs().max() < 1e-10 * fit.power
    assert all(gradient.abs().max() < 1e-10 * fit.power for gradient in by_bias)
    assert not fit.weight.detach()[~mask].any()


@pytest.mark.parametrize("name", [n for n in LAYERS if n != "conv3d"])
def test_adam_reads_the_same_outputs_and_makes_the_error_smaller(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_fits, "fit_by_adam", partial(fit_by_adam, steps=100))
    torch.manual_seed(0)
    make, size = LAYERS[name]
    layer, x = make(), correlated(size)
    weight = layer.get_parameter("weight").detach()
    mask = nm_mask(weight.abs(), 2, 4)
    kept = KeptInputs(layer)
    kept.add(x)
    exact = fitted(layer, seen(layer, x), mask, TWO_OF_FOUR, "adaprune")
    fit = fitted(layer, kept, mask, TWO_OF_FOUR, "adaprune")
    assert (fit.before, fit.power, fit.rows) == (
        pytest.approx(exact.before, rel=1e-4),
        pytest.approx(exact.power, rel=1e-4),
        fit.rows,
    )
    assert exact.after * (1 - 1e-5) <= fit.after < fit.before
    assert not fit.weight[~mask].any()


@pytest.mark.parametrize("groups", [1, 2])
def test_transposed_convolutions_are_fitted_by_adam(groups: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_fits, "fit_by_adam", partial(fit_by_adam, steps=400))
    torch.manual_seed(0)
    layer, x = (
        nn.ConvTranspose2d(8, 4, 3, stride=2, padding=1, output_padding=1, groups=groups),
        correlated((60, 8, 5, 5)),
    )
    net = nn.Sequential(layer).eval()
    made, report = convert(net, "2:4", data=[x], keep_dense=None)
    row = report["0.weight"]
    new = made[0].weight.detach()
    assert (in_groups(new != 0, 4, 0).sum(-1) == 2).all()
    assert (row.how, row.active) == ("Adam", 9 * 4 // groups)
    assert row.after is not None
    assert row.before is not None
    assert row.after < 0.95 * row.before
    assert row.after == pytest.approx((made(x) - net(x)).square().mean().item(), rel=1e-4)


# ---------------------------------------------------------------------- equations that leave something open


def least_squares(x: Tensor, mask: Tensor, w: Tensor) -> Tensor:
    """The smallest change, in units of each input's root mean square, by a pseudo-inverse of the inputs themselves."""
    found = torch.zeros_like(w)
    scale = x.square().sum(0).sqrt()
    scale[scale == 0] = 1
    for i, row in enumerate(mask):
        missing = x[:, ~row] @ w[i, ~row]
        inverse = torch.linalg.pinv(x[:, row] / scale[row], rtol=1e-6)
        found[i, row] = w[i, row] + (inverse @ missing) / scale[row]
    return found


@pytest.mark.parametrize("case", ["dead", "twice", "few rows", "scales"])
def test_what_the_data_leaves_open_stays_close_to_the_weights(case: str) -> None:
    torch.manual_seed(0)
    x, w = torch.randn(40, 12, dtype=torch.float64), torch.randn(6, 12, dtype=torch.float64)
    if case == "dead":
        x[:, [0, 5]] = 0
    if case == "twice":
        x[:, 1], x[:, 7] = 2 * x[:, 0], x[:, 6]
    if case == "few rows":
        x = x[:4]
    if case == "scales":
        x = x * torch.logspace(-4, 4, 12, dtype=torch.float64)
    mask = nm_mask(w.abs(), 2, 4)
    found = refit((x.T @ x)[None], w, mask)
    torch.testing.assert_close(found, least_squares(x, mask, w), rtol=1e-6, atol=1e-6)
    if case == "dead":
        assert torch.equal(found[:, [0, 5]], (w * mask)[:, [0, 5]])
    if case == "few rows":
        torch.testing.assert_close(x @ found.T, x @ w.T, rtol=1e-6, atol=1e-6)


def test_damping_helps_on_other_data_where_there_are_as_many_rows_as_weights() -> None:
    torch.manual_seed(0)
    mixing = torch.randn(8, 64, dtype=torch.float64)
    x, other = (
        torch.randn(n, 8, dtype=torch.float64) @ mixing + 0.3 * torch.randn(n, 64, dtype=torch.float64)
        for n in (32, 500)
    )
    w = torch.randn(16, 64, dtype=torch.float64)
    mask = nm_mask(w.abs(), 2, 4)
    errors = {
        damping: float((other @ (refit((x.T @ x)[None], w, mask, damping) - w).T).square().mean())
        for damping in (0.0, 0.01)
    }
    masked = float((other @ (w * mask - w).T).square().mean())
    assert 10 * errors[0.01] < masked < errors[0.0]


def test_damping_is_a_share_of_each_inputs_second_moment() -> None:
    """By the normal equations of the damped problem, as a dense solution of one row."""
    torch.manual_seed(0)
    x, w = torch.randn(40, 8, dtype=torch.float64) * torch.arange(1, 9), torch.randn(1, 8, dtype=torch.float64)
    mask = nm_mask(w.abs(), 2, 4)
    h, s = x.T @ x, mask[0]
    damped = h[s][:, s] + 0.3 * torch.diag(h.diagonal()[s])
    change = torch.linalg.solve(damped, h[s][:, ~s] @ w[0, ~s])
    torch.testing.assert_close(refit(h[None], w, mask, 0.3)[0, s], w[0, s] + change)


def test_outputs_with_different_numbers_of_active_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """As transposable masks may have; rows that are solved one after the other come to the same."""
    from sparse_callbacks.core.conversion import least_squares as module

    torch.manual_seed(0)
    x, w = torch.randn(40, 8, dtype=torch.float64), torch.randn(5, 8, dtype=torch.float64)
    mask = torch.rand(5, 8) < torch.tensor([[0.0], [0.3], [0.5], [0.9], [1.0]])
    found = refit((x.T @ x)[None], w, mask)
    torch.testing.assert_close(found, least_squares(x, mask, w), rtol=1e-9, atol=1e-9)
    monkeypatch.setattr(module, "SOLVED", 1)
    torch.testing.assert_close(refit((x.T @ x)[None], w, mask), found, rtol=1e-12, atol=1e-12)
    assert not refit((x.T @ x)[None], w, torch.zeros_like(mask)).any()


def test_moments_of_several_calls_are_those_of_one(monkeypatch: pytest.MonkeyPatch) -> None:
    from sparse_callbacks.core.conversion import layer_products

    layer, x = nn.Conv2d(4, 2, 3).double(), torch.randn(6, 4, 7, 7, dtype=torch.float64)
    at_once = seen(layer, x)
    monkeypatch.setattr(layer_products, "UNFOLDED", 1)
    parts = Moments(layer)
    for part in x.split(2):
        parts.add(part)
    torch.testing.assert_close(parts.matrix, at_once.matrix)
    assert parts.rows == at_once.rows == 6 * 25


# ---------------------------------------------------------------------- networks


class Net(nn.Module):
    """A small residual network with a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.body, self.body_norm = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.odd = nn.Conv2d(8, 6, 1)
        self.narrow = nn.Conv2d(6, 8, 1)
        self.unused = nn.Linear(8, 8)
        self.hidden, self.drop, self.head = nn.Linear(8, 16), nn.Dropout(0.5), nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.stem(x)).relu()
        x = x + self.body_norm(self.body(x)).relu_()
        x = self.narrow(self.odd(x)).relu().mean((2, 3))
        found: Tensor = self.head(self.drop(self.hidden(x).relu()))
        return found


def net() -> Net:
    torch.manual_seed(0)
    made = Net()
    made(torch.randn(64, 3, 8, 8))  # statistics of norms
    return made.eval()


IMAGES = torch.randn(96, 3, 8, 8, generator=torch.Generator().manual_seed(1))
LOADER = DataLoader(TensorDataset(IMAGES, torch.zeros(96)), batch_size=32)


def test_a_network_is_converted_and_the_given_one_stays() -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    made, report = convert(model, "2:4", data=LOADER)
    assert torch.equal(torch.random.get_rng_state(), random)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not model.training
    assert not made.training
    assert set(report.masks) == {"body.weight", "odd.weight", "hidden.weight"}
    for name, mask in report.masks.items():
        assert torch.equal(mask, nm_mask(model.get_parameter(name).abs(), 2, 4))
        assert torch.equal(made.get_parameter(name) != 0, mask)
    assert report.left_dense == {
        "stem.weight": "first layer, kept dense on request",
        "narrow.weight": "6 inputs do not divide into groups of 4",
        "unused.weight": "not called on the data",
        "head.weight": "last layer, kept dense on request",
    }
    assert (report.batches, report.norms, report.sparsity, report.sparsity_given) == (3, 2, 0.5, 0)
    unconverted = ("stem.weight", "narrow.weight", "unused.weight", "head.weight", "head.bias")
    assert all(torch.equal(made.get_parameter(n), before[n]) for n in unconverted)
    assert not torch.equal(made.hidden.bias, before["hidden.bias"])


def input_of(model: nn.Module, name: str) -> Tensor:
    found: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, x: found.append(x[0]))
    model(IMAGES)
    handle.remove()
    return found[0]


@torch.no_grad()
def test_the_fit_is_to_the_inputs_of_the_dense_network_and_helps_the_outputs() -> None:
    model = net()
    errors = {}
    for fit in ("masked", "absorbed", "adaprune"):
        made, report = convert(model, data=LOADER, fit=fit, norms=False)  # type: ignore[arg-type]
        errors[fit] = float((made(IMAGES) - model(IMAGES)).square().mean())
        for name in ("odd", "hidden"):
            layer, own, x = model.get_submodule(name), made.get_submodule(name), input_of(model, name)
            row = report[f"{name}.weight"]
            assert row.after == pytest.approx(float((own(x) - layer(x)).square().mean()), rel=1e-4)
            assert row.power == pytest.approx(float(layer(x).square().mean()), rel=1e-4)
    assert errors["adaprune"] < 0.7 * errors["masked"]


def test_more_damping_leaves_more_of_the_error() -> None:
    errors = [convert(net(), data=LOADER, damping=damping)[1]["hidden.weight"].after for damping in (0.0, 0.01, 1.0)]
    usual = convert(net(), data=LOADER)[1]["hidden.weight"].after
    assert errors == sorted(errors)  # type: ignore[type-var]
    assert errors[0] < errors[1] == usual < errors[2]  # type: ignore[operator]


def test_norms_are_those_of_the_converted_network() -> None:
    made, _ = convert(net(), data=LOADER)
    other, report = convert(net(), data=LOADER, norms=False)
    assert report.norms == 0
    assert torch.equal(other.body_norm.running_mean, net().body_norm.running_mean)
    assert not torch.equal(made.body_norm.running_mean, other.body_norm.running_mean)
    recalibrate_batchnorm(other, LOADER)
    assert all(torch.equal(value, made.state_dict()[name]) for name, value in other.state_dict().items())


def test_several_passes_come_to_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    once, _ = convert(net(), data=LOADER)
    monkeypatch.setattr(input_passes, "AT_ONCE", 1)
    often, report = convert(net(), data=LOADER)
    assert report.batches == 3
    assert all(torch.equal(value, often.state_dict()[name]) for name, value in once.state_dict().items())


def test_wide_layers_take_steps_and_the_others_equations(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_fits, "WIDEST", 8)
    _, report = convert(net(), data=LOADER)
    assert [report[f"{n}.weight"].how for n in ("body", "odd", "hidden")] == ["Adam", "least squares", "least squares"]
    assert report["body.weight"].after < report["body.weight"].before  # type: ignore[operator]


def test_an_unstructured_network_keeps_its_output_where_groups_fit() -> None:
    """At 1:4 in each group nothing is lost by 2:4; and a group with more zeros than it needs may get a weight more."""
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).eval()
    for layer in (model[0], model[2]):
        with torch.no_grad():
            layer.weight.mul_(nm_mask(layer.weight.abs(), 1, 4))
    x = torch.randn(80, 8)
    made, report = convert(model, "2:4", data=[x], keep_dense=None)
    torch.testing.assert_close(made(x), model(x), rtol=1e-5, atol=1e-6)
    assert report.sparsity_given == 0.75
    assert report.sparsity == 0.5
    assert report.chances["2:4"] == pytest.approx(chance_of_nm(0.75, 2, 4))


def test_the_table_says_what_became_of_each_layer() -> None:
    _, report = convert(net(), "2:4", data=LOADER)
    lines = str(report).splitlines()
    assert lines[0] == "2:4: sparsity 0.5000 of the converted weights, which had 0.0000"
    body = next(line for line in lines if line.startswith("body.weight"))
    row = report["body.weight"]
    assert row.before is not None
    assert row.after is not None
    assert body.split() == [
        *("body.weight", "8x8x3x3", "576", "288"),
        *(f"{row.before / row.power:.4f}", f"{row.after / row.power:.4f}", "least", "squares"),
    ]
    assert lines[-2] == "a random group fits already at sparsity 0.0000: 2:4 0.0000, 4:8 0.0000, 8:16 0.0000"
    assert lines[-1] == "batch norms re-estimated: 2"
    with pytest.raises(KeyError, match=r"'fc' is not a weight that could be sparse. Known: stem.weight, body.weight"):
        report["fc"]


def test_too_few_rows_are_said() -> None:
    _, report = convert(mlp(64, 64, 8).eval(), data=[torch.randn(8, 64)], keep_dense="last")
    assert "8 rows of data for 32 weights of an output, so the error says little: give more" in str(report)


def test_layers_whose_inputs_are_not_seen_or_shared_stay_dense() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.other, self.scaled = nn.Linear(8, 8), nn.Linear(8, 8), Scaled(8, 8)
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.exchanged, self.plain = SparseLinear.random(8, 8, fan_in=4), nn.Linear(8, 8)
            self.other.weight = self.one.weight

        def forward(self, x: Tensor) -> Tensor:
            x = self.scaled(self.other(self.one(x)))
            x = self.attention(x, x, x)[0]
            found: Tensor = self.plain(self.exchanged(x))
            return found

    model = Odd().requires_grad_(False).eval()
    made, report = convert(model, data=[torch.randn(6, 5, 8)], keep_dense=None)
    assert report.left_dense == {
        "one.weight": "tied: one.weight and other.weight are one weight, with inputs of several layers",
        "scaled.weight": "the inputs of its product are not seen (Scaled)",
        "attention.in_proj_weight": "the inputs of its product are not seen (MultiheadAttention)",
        "attention.out_proj.weight": "not called on the data",
        "exchanged.weight": "an exchanged layer: to_dense(model) makes it an nn.Linear",
    }
    assert list(report.masks) == ["plain.weight"]
    assert made.other.weight is made.one.weight
    assert not made.plain.weight.requires_grad


def test_groups_of_a_grouped_convolution_do_not_reach_into_each_other() -> None:
    grouped = nn.Sequential(nn.Conv2d(8, 12, 1, groups=2), nn.Conv2d(12, 12, 1, groups=3)).eval()
    entries, layers = chosen_weights(grouped, NMPattern(2, 4, True), None, None, None)
    assert {e.name: e.reason for e in entries} == {
        "0.weight": "6 outputs do not divide into groups of 4",
        "1.weight": "",
    }
    assert list(layers) == ["1.weight"]


@pytest.mark.filterwarnings("ignore:.*nested tensors:UserWarning")
def test_layers_inside_of_transformer_blocks_are_called() -> None:
    """In eval mode torch gives its blocks padded sequences as nested tensors, and computes a whole block at once."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 1).eval()
    batch = torch.randn(8, 6, 8), torch.arange(6) >= torch.arange(1, 9).clamp_max(6)[:, None]
    options: dict[str, Any] = {"keep_dense": None, "forward": lambda m, b: m(b[0], src_key_padding_mask=b[1])}
    _, report = convert(encoder, data=[batch], **options)
    assert set(report.masks) == {"layers.0.linear1.weight", "layers.0.linear2.weight"}
    assert report["layers.0.linear1.weight"].rows == 48


def test_half_precision_is_computed_in_float64_and_stored_as_it_was() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8), nn.Linear(8, 4)).to(torch.bfloat16).eval()
    made, report = convert(model, data=[torch.randn(64, 16, dtype=torch.bfloat16)], keep_dense="last")
    assert made[0].weight.dtype == made[0].bias.dtype == torch.bfloat16
    assert report["0.weight"].after < 0.9 * report["0.weight"].before  # type: ignore[operator]


def test_a_forward_of_ones_own_and_a_list_without_labels() -> None:
    model = nn.ModuleDict({"net": mlp(8, 16, 8).eval()}).eval()
    batches = [{"x": torch.randn(64, 8)}]
    made, report = convert(model, data=batches, keep_dense=None, forward=lambda m, batch: m["net"](batch["x"]))
    assert set(report.masks) == {"net.0.weight", "net.2.weight"}
    assert set(made.state_dict()) == set(model.state_dict())


def test_transposable_masks_have_two_of_four_in_both_directions() -> None:
    _, report = convert(net(), "transposable 2:4", data=LOADER)
    assert set(report.masks) == {"body.weight", "hidden.weight"}
    assert report.left_dense["odd.weight"] == "6 outputs do not divide into groups of 4"
    for mask in report.masks.values():
        assert all((in_groups(mask, 4, axis).sum(-1) == 2).all() for axis in (0, 1))
    assert report["hidden.weight"].after < report["hidden.weight"].before  # type: ignore[operator]


# ---------------------------------------------------------------------- training goes on


def trained_on(method: Static, model: nn.Module, steps: int = 3) -> dict[str, Tensor]:
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    with sparsify(method, model, optimizer, steps=steps) as run:
        for _ in range(steps):
            optimizer.zero_grad()
            model(IMAGES).square().mean().backward()
            optimizer.step()
        return {name: mask.clone() for name, mask in run.masks.items()}


@pytest.mark.parametrize("way", ["mapping", "file", "nonzero", "pattern"])
def test_static_trains_on_under_the_masks(way: str, tmp_path: Path) -> None:
    model, report = convert(net(), "2:4", data=LOADER)
    saved = report.checkpoint(model)
    torch.save(saved, tmp_path / "converted.pt")
    given: Any = {
        "mapping": {"from_checkpoint": saved},
        "file": {"initial_mask": tmp_path / "converted.pt"},
        "nonzero": {"initial_mask": "nonzero"},
        "pattern": {"from_checkpoint": saved, "pattern": "2:4"},
    }[way]
    before = model.body.weight.detach().clone()
    masks = trained_on(Static(**given, include=list(report.masks), print_plan=False), model)
    assert masks.keys() == report.masks.keys()
    for name, mask in report.masks.items():
        assert torch.equal(masks[name], mask)
        assert torch.equal(model.get_parameter(name) != 0, mask)
    assert not torch.equal(model.body.weight, before)


ENDS = ("stem", "head")


def test_zeros_of_layers_that_stay_dense_train_on_under_masks_too() -> None:
    given = net()
    with torch.no_grad():
        for name in ("body", *ENDS):
            weight = given.get_submodule(name).weight
            weight.mul_(torch.rand_like(weight) > 0.5)
    model, report = convert(given, "2:4", data=LOADER)
    assert not {f"{name}.weight" for name in ENDS} & report.masks.keys()
    zeros = {name: p.detach() == 0 for name, p in model.named_parameters() if p.dim() > 1}
    masks = trained_on(Static(from_checkpoint=report.checkpoint(model), print_plan=False), model)
    assert {f"{name}.weight" for name in ENDS} < masks.keys()
    for name, mask in masks.items():
        assert not model.get_parameter(name)[~mask].any()
        assert torch.equal(~mask, zeros[name])


def test_a_kept_weight_that_is_zero_is_in_the_masks_of_the_checkpoint(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(8, 4, bias=False)).eval()
    with torch.no_grad():
        model[0].weight[0] = 0
    made, report = convert(model, data=[torch.randn(32, 8)], keep_dense=None)
    assert not made[0].weight[0].any()
    torch.save(report.checkpoint(made), tmp_path / "c.pt")
    assert torch.equal(saved_masks(tmp_path / "c.pt")["0.weight"], report.masks["0.weight"])
    assert report.masks["0.weight"][0].sum() == 4


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"pattern": "4:2"},
            r"pattern='4:2' names no pattern that a network is converted to. Give 'N:M' with N below M",
        ),
        ({"data": []}, r"data=\[\] holds no batch, so nothing is known of the inputs"),
        ({"data": iter([IMAGES])}, r"is an iterator, which gives its batches once"),
        ({"data": IMAGES}, r"data=a tensor .* is not a collection of batches. Give a loader"),
        ({"data": [IMAGES[:, :2]]}, r"Net.forward failed on a batch"),
        ({"data": [IMAGES / 0]}, r"the layer of body.weight reads inf or NaN on the data"),
        (
            {"pattern": "2:5"},
            r"pattern='2:5' fits no layer that could be sparse: stem.weight \(first layer.*keep_dense=None",
        ),
        ({"damping": -0.1}, r"damping=-0.1 is not a number from 0 on"),
        ({"include": "fc"}, r"include=\['fc'\] matches no parameter that can be sparse"),
        ({"include": "unused*"}, r"data= calls none of the layers that fit the pattern: unused.weight. Give batches"),
    ],
)
def test_refused(options: dict[str, Any], message: str) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        convert(model, **{"data": LOADER, **options})
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_a_network_in_train_mode_or_with_inf_is_refused() -> None:
    with pytest.raises(ValueError, match=r"model=Net is in train mode \(it, stem, norm\).*Call model.eval\(\) first"):
        convert(net().train(), data=LOADER)
    broken = net()
    with torch.no_grad():
        broken.body.weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match=r"body.weight holds inf or NaN, so nobody knows which of its weights"):
        convert(broken, data=LOADER)


def test_errors_are_those_of_the_mean_square() -> None:
    layer = nn.Linear(4, 2)
    x = torch.randn(30, 4)
    other = torch.randn(2, 4), torch.randn(2)
    expected = float((x @ other[0].T + other[1] - layer(x).detach()).square().mean())
    dense = layer.weight.detach(), layer.bias.detach()
    kept = KeptInputs(layer)
    kept.add(x)
    for recorder in (seen(layer, x), kept):
        assert mean_squared_error(recorder, dense, other) == pytest.approx(expected, rel=1e-4)
