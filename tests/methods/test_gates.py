"""Hard-concrete gates: the reference tables, autograd and Monte Carlo; what goes with a convolution's channels."""

import copy
import doctest
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.l0 import (
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
from support.hard_concrete import expected_l2, log_alpha_for, p_one
from torch import Tensor, nn

from sparse_callbacks.core.dense_copy import undone
from sparse_callbacks.methods.l0 import constraint, gates
from sparse_callbacks.methods.l0.channel_members import ChannelMembers, find_members, refuse_decay
from sparse_callbacks.methods.l0.norm_check import check_norms


def double(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def close(found: Tensor | float, expected: object) -> None:
    assert torch.as_tensor(found, dtype=torch.float64).tolist() == pytest.approx(expected, abs=2e-10)


def test_the_examples() -> None:
    assert doctest.testmod(gates).failed == doctest.testmod(constraint).failed == 0


# ---------------------------------------------------------------------- one gate


def test_the_table_of_gates() -> None:
    log_alpha = double(list(GATES))
    opened, one, median, louizos, slope = zip(*GATES.values(), strict=True)
    close(gates.p_open(log_alpha), opened)
    close(p_one(log_alpha), one)
    close(gates.median(log_alpha), median)
    close(gates.p_open_slope(log_alpha), slope)
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
    close(gates.p_open_slope(log_alpha.detach()), expected.tolist())


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
    assert float((z == 1).float().mean()) == pytest.approx(float(p_one(double(log_alpha))), abs=0.001)


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
    assert gates.trained(log_alpha).flatten().tolist() == [0, pytest.approx(GATES[-2.0][0], abs=1e-9), 0]
    twice = gates.trained(log_alpha.T.expand(2, 3).contiguous())
    assert twice.flatten().tolist() == [0, pytest.approx(GATES[-2.0][0], abs=1e-9), 0, 0, 0, 0]


@pytest.mark.parametrize("shape", [(1, 40), (40, 1, 1, 1), (1, 40, 1), (8, 5), (3, 4, 5, 2)])
def test_medians_stay_where_one_is_open(shape: tuple[int, ...]) -> None:
    source = torch.Generator().manual_seed(0)
    for lowered in (0.0, 3.0, 9.0):
        log_alpha = torch.randn(shape, generator=source, dtype=torch.float64) - lowered
        median = gates.median(log_alpha)
        best = torch.zeros_like(median)
        best.view(-1)[log_alpha.argmax()] = gates.p_open(log_alpha.max())
        assert torch.equal(gates.trained(log_alpha), median if median.any() else best)
    assert not median.any()


# ---------------------------------------------------------------------- layers


@pytest.mark.parametrize("droprate", INITIAL)
def test_initial_gates(droprate: float) -> None:
    log_alpha, opened, median = INITIAL[droprate]
    assert gates.log_alpha_at(droprate) == pytest.approx(log_alpha, abs=1e-9)
    close(gates.p_open(double(log_alpha)), opened)
    close(gates.median(double(log_alpha)), median)


@pytest.mark.parametrize("density", LOG_ALPHA_FOR)
def test_log_alpha_for_a_density(density: float) -> None:
    assert log_alpha_for(density) == pytest.approx(LOG_ALPHA_FOR[density], abs=1e-9)
    close(gates.p_open(double(log_alpha_for(density))), density)


def test_expected_densities_of_a_network() -> None:
    inputs = [784, 300, 100]
    log_alphas = [
        torch.full((1, n), gates.log_alpha_at(d), dtype=torch.float64)
        for n, d in zip(inputs, MLP_DROPRATES, strict=True)
    ]
    for log_alpha, density in zip(log_alphas, MLP_DENSITIES, strict=True):
        close(gates.expected_density([log_alpha], [1.0]), density)
    close(gates.expected_density(log_alphas, [s / sum(MLP_SIZES) for s in MLP_SIZES]), MLP_DENSITY)


def test_expected_density_of_single_weights() -> None:
    weight, bias = double(MATRIX_LOG_ALPHA).view(3, 4), double(BIAS_LOG_ALPHA)
    close(gates.expected_density([weight, bias], [12 / 15, 3 / 15]), MATRIX_DENSITY)


def test_one_constraint_or_one_for_each_layer() -> None:
    log_alphas = [double([log_alpha_for(d)]) for d in LAYERS_DENSITY]
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
    penalty = expected_l2(weight, log_alpha)
    close(penalty.detach(), CONV_L2)
    penalty.backward()
    assert weight.grad is not None
    close(weight.grad.flatten(), CONV_L2_GRADIENT)
    close((gates.p_open(log_alpha) * weight).detach().flatten(), CONV_L2_GRADIENT)  # as the method adds it
    assert log_alpha.grad is None


def test_expected_l2_of_a_matrix_is_weighed_by_inputs() -> None:
    found = expected_l2(double(LINEAR_L2_WEIGHT), double([LINEAR_L2_LOG_ALPHA]))
    close(found + 0.5 * double(LINEAR_L2_BIAS).square().sum(), LINEAR_L2)


@pytest.mark.parametrize(
    ("parameter", "gate"),
    [
        ((5, 4), (1, 4)),
        ((5, 4), (5, 4)),
        ((6, 3, 2, 2), (6, 1, 1, 1)),
        ((3, 6, 2), (1, 6, 1)),
        ((6,), (6, 1, 1)),
        ((12,), (1, 6, 1)),
    ],
)
def test_the_gradient_of_gates_is_that_of_autograd(parameter: tuple[int, ...], gate: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    dense, gradient = torch.randn(parameter, dtype=torch.float64), torch.randn(parameter, dtype=torch.float64)
    log_alpha = torch.randn(gate, dtype=torch.float64).requires_grad_()
    u = torch.rand(gate, dtype=torch.float64)
    z = (torch.sigmoid((torch.logit(u) + log_alpha) * 1.5) * 1.2 - 0.1).clamp(0, 1)
    factor = z if len(gate) == len(parameter) else z.flatten().repeat(parameter[0] // z.numel())
    (expected,) = torch.autograd.grad((factor * dense * gradient).sum(), log_alpha)
    assert torch.allclose(
        gates.log_alpha_gradient(gradient, dense, gates.sample(log_alpha.detach(), u)), expected, atol=1e-9
    )


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
        mine -= 0.1 * gates.adam_direction(mean, square, double(step))
        optimizer.step()
        assert torch.allclose(mine, p.detach(), rtol=0, atol=1e-12)


def test_what_others_wrote_is_found_behind_the_gate() -> None:
    gate, dense = double([0.0, 0.25, 1.0, 1 / 3]), double([5.0, 2.0, 3.0, 0.7])
    assert torch.equal(undone(gate * dense, gate, dense), dense)
    written = gate * dense
    written[:2] = torch.tensor([9.0, -1.0])  # what was written behind a closed gate is lost
    assert undone(written, gate, dense).tolist() == [5.0, -4.0, 3.0, 0.7]


# ---------------------------------------------------------------------- what goes with channels


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.relu = nn.ReLU()
        self.conv2, self.bn2 = nn.Conv2d(8, 4, 3, bias=False), nn.BatchNorm2d(4)
        self.inner = nn.Sequential(
            nn.ConvTranspose2d(4, 6, 2), nn.BatchNorm2d(6), nn.Conv2d(6, 2, 1), nn.ReLU(), nn.BatchNorm2d(2)
        )
        self.side = nn.ModuleList([nn.Conv2d(3, 5, 1, bias=False), nn.BatchNorm2d(3)])
        self.head = nn.Linear(2, 5)


def test_biases_and_the_norms_right_behind() -> None:
    kernels = ["conv1.weight", "conv2.weight", "inner.0.weight", "inner.2.weight", "head.weight", "side.0.weight"]
    found = find_members(Block(), kernels)
    assert found["conv1.weight"] == ChannelMembers(("conv1.bias",), ("bn1",))
    assert found["conv1.weight"].names == ("conv1.bias", "bn1.weight", "bn1.bias")
    assert found["conv2.weight"] == ChannelMembers((), ("bn2",))
    assert found["inner.0.weight"] == ChannelMembers(("inner.0.bias",), ("inner.1",))
    assert found["inner.2.weight"] == ChannelMembers(("inner.2.bias",))
    assert found["head.weight"] == found["side.0.weight"] == ChannelMembers()
    assert set(find_members(Block(), kernels[:1])) == {"conv1.weight"}
    assert find_members(nn.Conv2d(2, 3, 1), ["weight"])["weight"] == ChannelMembers(("bias",))


def test_a_shared_kernel_takes_the_biases_of_both_convolutions() -> None:
    net = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    net[1].weight = net[0].weight
    assert find_members(net, ["0.weight"])["0.weight"].biases == ("0.bias", "1.bias")


def test_a_bias_of_two_kernels_is_refused() -> None:
    net = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    net[1].bias = net[0].bias
    with pytest.raises(
        ValueError, match=r"0\.bias goes with the output channels of both 0\.weight and 1\.weight.*exclude="
    ):
        find_members(net, ["0.weight", "1.weight"])


def test_a_norm_without_parameters_is_refused() -> None:
    net = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3, affine=False))
    with pytest.raises(
        ValueError, match=r"1 stands behind 0\.weight and has no weight and bias \(affine=False\).*exclude="
    ):
        find_members(net, ["0.weight"])


def test_a_norm_of_two_convolutions_is_refused() -> None:
    net = nn.ModuleDict({"one": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(3), "two": nn.Conv2d(3, 3, 1)})
    net["again"] = net["norm"]
    elsewhere = nn.ModuleDict(
        {"first": nn.Sequential(net["one"], net["norm"]), "second": nn.Sequential(net["two"], net["norm"])}
    )
    for model, names in ((net, ("norm", "one", "two")), (elsewhere, ("first.1", "first.0", "second.0"))):
        norm, *kernels = names
        message = rf"{norm} goes with the output channels of both {kernels[0]}\.weight and {kernels[1]}\.weight"
        with pytest.raises(ValueError, match=message):
            find_members(model, [f"{k}.weight" for k in kernels])


# ---------------------------------------------------------------------- what flows into norms


class Flow(nn.Module):
    """``one``, its norm ``bn1``, ``two`` and its norm ``bn2``, registered in an ``order`` and run by ``forward``, for
    [n, 4, 5, 5]."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], order: str = "one bn1 two bn2", seed: int = 0) -> None:
        torch.manual_seed(seed)
        super().__init__()
        made = {
            "one": lambda: nn.Conv2d(4, 4, 3, padding=1),
            "two": lambda: nn.Conv2d(4, 4, 3, padding=1, bias=False),
            "bn1": lambda: nn.BatchNorm2d(4),
            "bn2": lambda: nn.BatchNorm2d(4),
            "plain": lambda: nn.BatchNorm2d(4, affine=False),
            "up": lambda: nn.ConvTranspose2d(4, 4, 2),
            "pool": lambda: nn.MaxPool2d(2),
            "relu": nn.ReLU,
            "inplace": lambda: nn.ReLU(inplace=True),
        }
        for name in order.split():
            self.add_module(name, made[name]())
        self.run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)

    def check(self, *kernels: str) -> list[str]:
        state = copy.deepcopy(self.state_dict())
        example = torch.randn(1, 4, 5, 5)
        kept = example.clone()
        found = find_members(self, [f"{k}.weight" for k in kernels or ("one", "two")])
        try:
            return check_norms(self, found, example)
        finally:
            assert torch.equal(example, kept)
            assert self.training
            assert not any(m._forward_hooks for m in self.modules())
            assert all(torch.equal(v, state[k]) for k, v in self.state_dict().items())


def test_a_norm_that_takes_its_convolution_is_right() -> None:
    one = {"order": "one bn1 relu inplace pool"}
    for run, options in (
        (lambda m, x: m.bn2(m.two(m.bn1(m.one(x)))), {}),
        (lambda m, x: m.bn1(m.relu(m.one(x))), one),  # activations between do not matter
        (lambda m, x: m.bn1(m.inplace(m.one(x))), one),
        (lambda m, x: m.bn1(m.pool(nn.functional.hardswish(m.one(x)))), one),
        (lambda m, x: m.bn1(torch.sigmoid(m.one(x)) * 2 - 3), one),
        (lambda m, x: m.bn1(m.one(m.one(x))), one),  # twice, of which the norm sees one
        (lambda m, x: x + m.bn1(m.up(x))[:, :, :5, :5], {"order": "up bn1"}),
        (lambda m, x: m.relu(x), one),  # they do not run in eval mode: nothing is known of them
    ):
        net = Flow(run, **options)
        assert net.check(*[n for n in ("one", "two", "up") if hasattr(net, n)]) == []


@pytest.mark.parametrize(
    ("run", "order", "norm", "kernel", "what"),
    [
        (lambda m, x: m.bn2(m.two(m.bn1(m.one(x)))), "one two bn1 bn2", "bn1", "two", "the output of one"),
        (lambda m, x: m.bn1(m.two(m.one(x))), "one bn1 two", "bn1", "one", "the output of two"),
        (lambda m, x: m.bn1(m.two(m.bn1(m.one(x)))), "one bn1 two", "bn1", "one", "the output of two"),
        (lambda m, x: m.bn1(m.one(x) + x), "one bn1 two", "bn1", "one", "more than"),
        (lambda m, x: m.bn1(m.one(x).add_(x)), "one bn1 two", "bn1", "one", "more than"),
        (lambda m, x: m.bn1(m.one(x) + m.two(x)), "one bn1 two", "bn1", "one", "more than"),
        (lambda m, x: m.bn1(m.one(x) + m.two(torch.zeros_like(x))), "one bn1 two", "bn1", "one", "more than"),
        (lambda m, x: m.bn1(m.one(x).flip(1)), "one bn1 two", "bn1", "one", "more than"),
        (lambda m, x: m.bn1(x) + m.one(x), "one bn1 two", "bn1", "one", "more than"),
        (lambda m, x: m.bn1(m.one(x)) + m.bn1(x), "one bn1 two", "bn1", "one", "more than"),
        (lambda m, x: m.bn1(x) + m.bn1(torch.relu(m.one(x))), "one bn1 two", "bn1", "one", "more than"),
        (lambda m, x: m.bn1(torch.ones_like(x)) + m.one(x), "one bn1 two", "bn1", "one", "more than"),
        (lambda m, x: m.bn1(torch.relu(m.two(m.one(x)))), "one bn1 two", "bn1", "one", "more than"),
    ],
)
def test_a_norm_that_takes_something_else_is_refused(run: Any, order: str, norm: str, kernel: str, what: str) -> None:
    message = rf"^{norm} is registered right behind the convolution of {kernel}\.weight.*but it takes {what}.*Register every.*exclude="
    with pytest.raises(ValueError, match=message):
        Flow(run, order).check(kernel)


def test_norms_that_are_registered_elsewhere_are_reported() -> None:
    for run, order, kernels, norms in (
        (lambda m, x: m.bn2(m.two(m.bn1(m.one(x)))), "one relu two bn1 bn2 ", ["one"], ["bn1"]),
        (lambda m, x: m.bn1(m.relu(m.one(x))), "one relu bn1", ["one"], ["bn1"]),
        (lambda m, x: m.plain(m.relu(m.one(x))), "one relu plain", ["one"], ["plain"]),
        (lambda m, x: m.bn1(m.one(y := m.two(x))) + m.bn2(y), "one bn1 two relu bn2", ["two"], ["bn2"]),
        (lambda m, x: m.bn1(y := m.one(x)) + m.bn2(y), "one bn1 two relu bn2", ["one"], ["bn2"]),
        (lambda m, x: m.bn1(y := m.one(x)) + m.bn2(y), "one relu bn1 bn2", ["one"], ["bn1 and bn2"]),
        (lambda m, x: m.bn1(m.one(x) + x), "one relu bn1", ["one"], []),  # the sum has channels that are open
        (lambda m, x: m.one(m.relu(m.bn1(x))), "bn1 relu one", ["one"], []),
    ):
        found = Flow(run, order).check(*kernels)
        assert len(found) == len(norms)
        for text, name in zip(found, norms, strict=True):
            assert text.startswith(f"{kernels[0]}.weight has gates, and its output goes into {name}, which")


def test_the_check_runs_as_often_as_it_must() -> None:
    class Counted(Flow):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return super().forward(x)

    for run, runs in (
        (lambda m, x: m.bn2(m.two(m.bn1(m.one(x)))), 1),
        (lambda m, x: m.bn2(torch.relu(m.two(m.bn1(m.one(x))))), 2),
    ):
        net = Counted(run)
        net.check()
        assert net.runs == runs


def test_decay_beside_expected_l2_is_refused() -> None:
    layer = nn.Linear(2, 2)
    optimizer = torch.optim.SGD([{"params": [layer.weight], "weight_decay": 0.1}, {"params": [layer.bias]}], lr=0.1)
    with pytest.raises(
        ValueError, match=r"l2=0\.01 already decays.*weight_decay=0\.1 for weight\. Put them into a parameter group"
    ):
        refuse_decay([optimizer], {id(layer.weight): "weight"}, 0.01)
    refuse_decay([optimizer], {id(layer.weight): "weight"}, 0.0)
    refuse_decay([optimizer], {id(layer.bias): "bias"}, 0.01)


def test_the_least_density_is_that_of_the_clamp() -> None:
    assert float(gates.p_open(double(-gates.LIMIT))) == pytest.approx(GATES[-4.605170186][0], abs=1e-9)
    assert math.isclose(gates.LIMIT, -math.log(0.01))
