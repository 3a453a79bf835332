"""Hard-concrete gates: the reference tables, autograd and Monte Carlo; what goes with a convolution's channels."""

import doctest
import math

import pytest
import torch
from oracles_l0 import (
    ASCENTS,
    BIAS_LOG_ALPHA,
    CLAMP,
    CONV_L2,
    CONV_L2_GRADIENT,
    CONV_LOG_ALPHA,
    DEFECTS,
    GATES,
    INITIAL,
    LAYERS_DEFECTS,
    LAYERS_DENSITY,
    LAYERS_SIZES,
    LAYERS_TARGET,
    LINEAR,
    LINEAR_L2,
    LINEAR_L2_BIAS,
    LINEAR_L2_LOG_ALPHA,
    LINEAR_L2_WEIGHT,
    LOG_ALPHA_FOR,
    MATRIX_DENSITY,
    MATRIX_LOG_ALPHA,
    MEANS,
    MLP_DENSITIES,
    MLP_DENSITY,
    MLP_DROPRATES,
    MLP_SIZES,
    MODEL_DEFECT,
    MODEL_DENSITY,
    QUANTILES,
    SHIFT,
    SLOPES,
)
from torch import Tensor, nn

from sparse_callbacks import gates, tied


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor | float, expected: object) -> None:
    assert torch.as_tensor(found, dtype=torch.float64).tolist() == pytest.approx(expected, abs=2e-10)


def test_the_examples() -> None:
    assert doctest.testmod(gates).failed == 0


# ---------------------------------------------------------------------- one gate


def test_the_table_of_gates() -> None:
    log_alpha = double(list(GATES))
    opened, one, median, louizos, slope = zip(*GATES.values(), strict=True)
    close(gates.p_open(log_alpha), opened)
    close(gates.p_one(log_alpha), one)
    close(gates.median(log_alpha), median)
    close(gates.p_slope(log_alpha), slope)
    other = (torch.sigmoid(log_alpha) * 1.2 - 0.1).clamp(0, 1)  # without the temperature: an easy mistake
    close(other, louizos)
    assert (other - gates.median(log_alpha)).abs().max() > 0.08


@pytest.mark.parametrize("log_alpha", QUANTILES)
def test_a_sample_is_a_quantile_of_its_noise(log_alpha: float) -> None:
    u = double([0.1, 0.25, 0.5, 0.75, 0.9])
    close(gates.sample(torch.full_like(u, log_alpha), u), QUANTILES[log_alpha])


def test_the_slope_of_p_open_is_that_of_autograd() -> None:
    log_alpha = double(list(GATES)).requires_grad_()
    (expected,) = torch.autograd.grad(torch.sigmoid(log_alpha + gates.SHIFT).sum(), log_alpha)
    close(gates.p_slope(log_alpha.detach()), expected.tolist())


def test_medians_are_clipped_at_the_thresholds() -> None:
    assert pytest.approx(SHIFT, abs=1e-9) == gates.SHIFT
    assert pytest.approx(CLAMP, abs=1e-9) == gates.LIMIT
    below, above = gates.SHIFT * (1 - 1e-9), gates.SHIFT * (1 + 1e-9)
    median = gates.median(double([-above, -below, below, above])).tolist()
    assert median[0] == 0 < median[1] < 1e-8
    assert 1 - 1e-8 < median[2] < 1 == median[3]


def test_a_median_is_closed_exactly_where_the_gate_is_open_at_most_half_of_the_time() -> None:
    log_alpha = torch.linspace(-4.6, 4.6, 10_001, dtype=torch.float64)
    assert torch.equal(gates.median(log_alpha) == 0, gates.p_open(log_alpha) <= 0.5)


@pytest.mark.parametrize(("u", "log_alpha", "z", "slope"), SLOPES)
def test_the_slope_of_a_sample(u: float, log_alpha: float, z: float, slope: float) -> None:
    found = gates.sample(double([log_alpha]), double([u]))
    close(found, [z])
    close(gates.slope(found), [slope])


def test_the_slope_of_samples_is_that_of_autograd() -> None:
    source = torch.Generator().manual_seed(0)
    log_alpha = (torch.rand(20_000, generator=source, dtype=torch.float64) * 9 - 4.5).requires_grad_()
    u = torch.rand(20_000, generator=source, dtype=torch.float64)
    s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + log_alpha) * 1.5)
    z = (s * 1.2 - 0.1).clamp(0, 1)
    (expected,) = torch.autograd.grad(z.sum(), log_alpha)
    found = gates.sample(log_alpha.detach(), u)
    assert torch.allclose(found, z, rtol=0, atol=1e-12)
    assert torch.allclose(gates.slope(found), expected, rtol=0, atol=1e-10)
    assert 0.2 < float((expected == 0).double().mean()) < 0.9


@pytest.mark.parametrize("log_alpha", MEANS)
def test_means_of_samples(log_alpha: float) -> None:
    """The method's own noise: means, and shares that are exactly 0 and 1."""
    like = torch.full((4_000_000,), log_alpha)
    z = gates.sample(like, gates.noise(like, torch.Generator().manual_seed(3)))
    assert float(z.mean()) == pytest.approx(MEANS[log_alpha], abs=0.002)
    assert float((z > 0).float().mean()) == pytest.approx(float(gates.p_open(double(log_alpha))), abs=0.001)
    assert float((z == 1).float().mean()) == pytest.approx(float(gates.p_one(double(log_alpha))), abs=0.001)


@pytest.mark.parametrize("size", [1, 3, 4, 1001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_is_uniform_inside_0_and_1(size: int, dtype: torch.dtype) -> None:
    first, again = (gates.noise(torch.empty(size, 1, dtype=dtype), torch.Generator().manual_seed(1)) for _ in range(2))
    assert torch.equal(first, again)
    assert (first.shape, first.dtype) == ((size, 1), dtype)
    assert bool(((first > 0) & (first < 1)).all())
    many = gates.noise(torch.empty(1_000_000, dtype=dtype), torch.Generator().manual_seed(size))
    assert float(many.min()) + float(many.max()) == 1
    assert 0 < float(many.min()) < 1e-4
    histogram = torch.histc(many.double(), 16, 0, 1)
    assert (histogram - 62_500).abs().max() < 5 * 62_500**0.5
    assert abs(float(torch.corrcoef(torch.stack([many[:-1], many[1:]]))[0, 1])) < 0.005


def test_the_likeliest_gate_stays() -> None:
    log_alpha = double([[-4.0], [-2.0], [-2.0]])
    assert gates.likeliest(log_alpha).flatten().tolist() == [0, pytest.approx(GATES[-2.0][0], abs=1e-9), 0]


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize("droprate", INITIAL)
def test_initial_gates(droprate: float) -> None:
    log_alpha, opened, median = INITIAL[droprate]
    assert gates.log_alpha_at(droprate) == pytest.approx(log_alpha, abs=1e-9)
    close(gates.p_open(double(log_alpha)), opened)
    close(gates.median(double(log_alpha)), median)


@pytest.mark.parametrize("density", LOG_ALPHA_FOR)
def test_log_alpha_for_a_density(density: float) -> None:
    assert gates.log_alpha_for(density) == pytest.approx(LOG_ALPHA_FOR[density], abs=1e-9)
    close(gates.p_open(double(gates.log_alpha_for(density))), density)


def test_expected_densities_of_a_network() -> None:
    inputs = [784, 300, 100]
    log_alphas = [torch.full((1, n), gates.log_alpha_at(d), dtype=torch.float64) for n, d in zip(inputs, MLP_DROPRATES, strict=True)]
    for log_alpha, density in zip(log_alphas, MLP_DENSITIES, strict=True):
        close(gates.expected_density([log_alpha], [1.0]), density)
    close(gates.expected_density(log_alphas, [s / sum(MLP_SIZES) for s in MLP_SIZES]), MLP_DENSITY)


def test_expected_density_of_single_weights() -> None:
    weight, bias = double(MATRIX_LOG_ALPHA).view(3, 4), double(BIAS_LOG_ALPHA)
    close(gates.expected_density([weight, bias], [12 / 15, 3 / 15]), MATRIX_DENSITY)


def test_one_constraint_or_one_for_each_layer() -> None:
    log_alphas = [double([gates.log_alpha_for(d)]) for d in LAYERS_DENSITY]
    for log_alpha, defect in zip(log_alphas, LAYERS_DEFECTS, strict=True):
        close(gates.expected_density([log_alpha], [1.0]) - LAYERS_TARGET, defect)
    joint = gates.expected_density(log_alphas, [s / sum(LAYERS_SIZES) for s in LAYERS_SIZES])
    close(joint, MODEL_DENSITY)
    close(joint - LAYERS_TARGET, MODEL_DEFECT)


def test_a_linear_layer_with_its_median_gates() -> None:
    weight, log_alpha = double(LINEAR["weight_out_in"]), double([LINEAR["log_alpha_per_input"]])
    gate = gates.median(log_alpha)
    close(gate[0], LINEAR["gates"])
    close(nn.functional.linear(double(LINEAR["x"]), weight * gate, double(LINEAR["bias"])), LINEAR["y"])
    kept = gate[0].nonzero().flatten()
    assert kept.tolist() == LINEAR["kept_inputs"]
    for row, expected in zip((weight * gate)[:, kept], LINEAR["purged_weight"], strict=True):
        close(row, expected)


def test_expected_l2_of_a_convolution() -> None:
    weight = (torch.arange(12, dtype=torch.float64) / 10).view(3, 2, 2, 1).requires_grad_()
    log_alpha = double(CONV_LOG_ALPHA).view(3, 1, 1, 1).requires_grad_()
    penalty = gates.expected_l2(weight, log_alpha)
    close(penalty.detach(), CONV_L2)
    penalty.backward()
    assert weight.grad is not None
    close(weight.grad.flatten(), CONV_L2_GRADIENT)
    close((gates.p_open(log_alpha) * weight).detach().flatten(), CONV_L2_GRADIENT)  # as the method adds it
    assert log_alpha.grad is None


def test_expected_l2_of_a_matrix_is_weighed_by_inputs() -> None:
    found = gates.expected_l2(double(LINEAR_L2_WEIGHT), double([LINEAR_L2_LOG_ALPHA]))
    close(found + 0.5 * double(LINEAR_L2_BIAS).square().sum(), LINEAR_L2)


@pytest.mark.parametrize(
    ("parameter", "gate"),
    [((5, 4), (1, 4)), ((5, 4), (5, 4)), ((6, 3, 2, 2), (6, 1, 1, 1)), ((3, 6, 2), (1, 6, 1)), ((6,), (6, 1, 1)), ((12,), (1, 6, 1))],
)
def test_the_pull_on_gates_is_that_of_autograd(parameter: tuple[int, ...], gate: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dense, gradient = torch.randn(parameter, dtype=torch.float64), torch.randn(parameter, dtype=torch.float64)
    log_alpha = torch.randn(gate, dtype=torch.float64).requires_grad_()
    u = torch.rand(gate, dtype=torch.float64)
    z = (torch.sigmoid((torch.logit(u) + log_alpha) * 1.5) * 1.2 - 0.1).clamp(0, 1)
    factor = z if len(gate) == len(parameter) else z.flatten().repeat(parameter[0] // z.numel())
    (expected,) = torch.autograd.grad((factor * dense * gradient).sum(), log_alpha)
    assert torch.allclose(gates.pull(gradient, dense, gates.sample(log_alpha.detach(), u)), expected, atol=1e-9)


# ---------------------------------------------------------------------- multipliers and steps


@pytest.mark.parametrize("case", ASCENTS, ids=str)
def test_multipliers_ascend(case: tuple[float, bool]) -> None:
    rate, restarts = case
    multiplier = double(0.0)
    for defect, (before, after) in zip(DEFECTS, ASCENTS[case], strict=True):
        close(multiplier, before)
        multiplier = gates.ascend(multiplier, double(defect), rate, restarts)
        close(multiplier, after)


def test_without_restarts_a_multiplier_is_never_negative() -> None:
    assert float(gates.ascend(double(0.01), double(-0.5), 0.1, restarts=False)) == 0


def test_adam_is_torchs() -> None:
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(7, dtype=torch.float64))
    mine, mean, square = p.detach().clone(), torch.zeros(7, dtype=torch.float64), torch.zeros(7, dtype=torch.float64)
    optimizer = torch.optim.Adam([p], lr=0.1)
    for step in range(1, 20):
        p.grad = torch.randn(7, dtype=torch.float64)
        mean.lerp_(p.grad, 1 - gates.BETAS[0])
        square.mul_(gates.BETAS[1]).addcmul_(p.grad, p.grad, value=1 - gates.BETAS[1])
        mine -= 0.1 * gates.adam(mean, square, double(step))
        optimizer.step()
        assert torch.allclose(mine, p.detach(), rtol=0, atol=1e-12)


def test_what_others_wrote_is_found_behind_the_gate() -> None:
    gate, dense = double([0.0, 0.25, 1.0, 1 / 3]), double([5.0, 2.0, 3.0, 0.7])
    assert torch.equal(gates.undone(gate * dense, gate, dense), dense)
    written = gate * dense
    written[:2] = torch.tensor([9.0, -1.0])  # what was written behind a closed gate is lost
    assert gates.undone(written, gate, dense).tolist() == [5.0, -4.0, 3.0, 0.7]


# ---------------------------------------------------------------------- what goes with channels


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.inner = nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1), nn.ReLU(), nn.BatchNorm2d(2))
        self.side = nn.ModuleList([nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(3)])
        self.head = nn.Linear(2, 5)


def test_biases_and_the_norms_right_behind() -> None:
    kernels = ["conv1.weight", "conv2.weight", "inner.0.weight", "inner.2.weight", "head.weight", "side.0.weight"]
    found = tied.find_tied(Block(), kernels)
    assert found["conv1.weight"] == tied.Tied(("conv1.bias",), ("bn1",))
    assert found["conv1.weight"].members == ("conv1.bias", "bn1.weight", "bn1.bias")
    assert found["conv2.weight"] == tied.Tied((), ("bn2",))
    assert found["inner.0.weight"] == tied.Tied(("inner.0.bias",), ("inner.1",))
    assert found["inner.2.weight"] == tied.Tied(("inner.2.bias",))
    assert found["head.weight"] == found["side.0.weight"] == tied.Tied()
    assert set(tied.find_tied(Block(), kernels[:1])) == {"conv1.weight"}
    assert tied.find_tied(nn.Conv2d(2, 3, 1), ["weight"])["weight"] == tied.Tied(("bias",))


def test_a_tied_kernel_takes_the_biases_of_both_convolutions() -> None:
    net = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    net[1].weight = net[0].weight
    assert tied.find_tied(net, ["0.weight"])["0.weight"].biases == ("0.bias", "1.bias")


def test_a_bias_of_two_kernels_is_refused() -> None:
    net = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    net[1].bias = net[0].bias
    with pytest.raises(ValueError, match=r"0\.bias goes with the output channels of both 0\.weight and 1\.weight.*exclude="):
        tied.find_tied(net, ["0.weight", "1.weight"])


def test_a_norm_without_parameters_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False))
    with pytest.raises(ValueError, match=r"1 stands behind 0\.weight and has no weight and bias \(affine=False\).*exclude="):
        tied.find_tied(net, ["0.weight"])


def test_values_by_glob() -> None:
    names = ["conv1.weight", "conv2.weight", "fc.weight"]
    assert tied.by_glob(0.5, names, "density") == dict.fromkeys(names, 0.5)
    assert tied.by_glob({"conv1*": 0.1, "conv*": 0.2, "*": 1}, names, "density") == dict(zip(names, (0.1, 0.2, 1.0), strict=True))
    with pytest.raises(ValueError, match=r"density= has a value for 'norm\*', which matches no gated parameter.*conv1\.weight"):
        tied.by_glob({"norm*": 0.1, "*": 0.5}, names, "density")
    with pytest.raises(ValueError, match=r"droprate= has no value for fc\.weight. Add a glob"):
        tied.by_glob({"conv*": 0.1}, names, "droprate")


def test_decay_beside_expected_l2_is_refused() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias]}], lr=0.1)
    with pytest.raises(ValueError, match=r"l2=0\.01 already decays.*weight_decay=0\.1 for weight\. Put them into a parameter group"):
        tied.refuse_decay([optimizer], {id(layer.weight): "weight"}, 0.01)
    tied.refuse_decay([optimizer], {id(layer.weight): "weight"}, 0.0)
    tied.refuse_decay([optimizer], {id(layer.bias): "bias"}, 0.01)


def test_the_least_density_is_that_of_the_clamp() -> None:
    assert float(gates.p_open(double(-gates.LIMIT))) == pytest.approx(GATES[-4.605170186][0], abs=1e-9)
    assert math.isclose(gates.LIMIT, -math.log(0.01))
