"""Cosines of activations: the sums, the layers on whose two sides they are taken, and what an update makes of them."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from oracles.ctre import COSINE, COSINE_SOFTMAX_OUTPUT, GROWTH_INIT, INITIAL_ZERO_SIMILARITY, UPDATE
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.methods.ctre.activations import measure
from sparse_callbacks.methods.ctre.similarity import (
    CosineSums,
    Grown,
    add_batch,
    as_probabilities,
    cosine,
    empty_sums,
    explore,
    growth_bound,
    layers_of,
    propose,
)  # fmt: skip


def weights(net: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in net.named_parameters() if n.endswith("weight") and p.dim() > 1}


def passes(net: nn.Module, *batches: Any) -> Iterator[Any]:
    with torch.no_grad():
        for batch in batches:
            yield net(batch)


def similarities(net: nn.Module, *batches: Any) -> dict[str, Tensor]:
    return {n: cosine(s) for n, s in measure(net.eval(), weights(net), passes(net, *batches)).items()}


def direct(x: Tensor, a: Tensor) -> Tensor:
    """|cosine| of the columns of a [n, out] and x [n, in], as [out, in]; 0 where a column is zero."""
    x, a = x.double().reshape(-1, x.shape[-1]), a.double().reshape(-1, a.shape[-1])
    dots = (a.T @ x).abs()
    norms = a.norm(dim=0)[:, None] * x.norm(dim=0)[None]
    return torch.where(norms > 0, dots / norms.clamp(min=1e-30), 0.0)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), atol=3e-6)  # sums in float32


# ---------------------------------------------------------------------- sums and cosines


def test_cosines_as_in_the_reference() -> None:
    source = torch.tensor(COSINE["source_activations"], dtype=torch.float64)
    target = torch.tensor(COSINE["target_activations"], dtype=torch.float64)
    layer = nn.Linear(4, 3).double()
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, source, target)
    assert cosine(sums).T.tolist() == [pytest.approx(row, abs=1e-11) for row in COSINE["similarity"]]  # 12 digits are given


def test_the_output_layer_counts_with_probabilities_as_in_the_reference() -> None:
    source = torch.tensor(COSINE_SOFTMAX_OUTPUT["source_activations"], dtype=torch.float64)
    target = torch.tensor(COSINE_SOFTMAX_OUTPUT["target_logits"], dtype=torch.float64)
    layer = nn.Linear(2, 2, bias=False).double()
    layer.weight.data = torch.linalg.lstsq(source, target).solution.T  # not exact: so the logits are given by hand
    expected = [pytest.approx(row, abs=1e-9) for row in COSINE_SOFTMAX_OUTPUT["similarity"]]  # 10 digits are given
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, source, as_probabilities(target, 1))
    assert cosine(sums).T.tolist() == expected

    class Given(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2, bias=False).double()

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x).copy_(target)

    assert similarities(Given(), source)["layer.weight"].T.tolist() == expected


def test_two_halves_sum_up_to_the_whole_and_their_cosines_do_not() -> None:
    torch.manual_seed(0)
    layer, x, a = nn.Linear(5, 4), torch.randn(20, 5), torch.randn(20, 4)
    whole, halves = empty_sums(layer, layer.weight), [empty_sums(layer, layer.weight) for _ in range(2)]
    add_batch(whole, layer, x, a)
    for half, part in zip(halves, (slice(0, 7), slice(7, 20)), strict=True):
        add_batch(half, layer, x[part], a[part])
    merged = CosineSums(*(sum(pair) for pair in zip(*(h.tensors() for h in halves), strict=True)))
    averaged = sum(cosine(h) for h in halves) / 2
    expected = cosine(whole)
    assert close(cosine(merged), expected)
    assert not close(averaged, expected)


@pytest.mark.parametrize("bad", [0.0, math.inf, math.nan])
def test_a_neuron_without_a_signal_is_like_no_other(bad: float) -> None:
    layer = nn.Linear(3, 2)
    sums = empty_sums(layer, layer.weight)
    x = torch.ones(4, 3)
    x[:, 1] = bad
    add_batch(sums, layer, x, torch.ones(4, 2))
    assert cosine(sums).tolist() == [pytest.approx([1, 0, 1])] * 2


def test_a_whisper_counts_as_the_smallest_norm() -> None:
    layer = nn.Linear(2, 1).double()
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, torch.tensor([[1e-8, 1.0]] * 4), torch.ones(4, 1))
    assert cosine(sums).tolist() == [pytest.approx([4e-8 / (1e-6 * 2), 1.0])]  # and not 1 for both
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, torch.ones(4, 2), torch.full((4, 1), 1e-8))
    assert cosine(sums).tolist() == [pytest.approx([4e-8 / (1e-6 * 2)] * 2)]


def test_sums_are_as_wide_as_they_must_be() -> None:
    for dtype, wide in ((torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        layer = nn.Linear(3, 2).to(dtype)
        sums = empty_sums(layer, layer.weight)
        add_batch(sums, layer, torch.full((4096, 3), 2.0, dtype=dtype), torch.ones(4096, 2, dtype=dtype))
        assert sums.dots.dtype == wide
        assert sums.rows.dtype == sums.columns.dtype == torch.float64
        assert sums.dots.tolist() == [[8192.0] * 3] * 2
        assert sums.columns.tolist() == [[16384.0] * 3]


CONVOLUTIONS: list[tuple[type[nn.Module], tuple[int, ...], dict[str, Any]]] = [
    (nn.Conv1d, (9,), {"kernel_size": 3}),
    (nn.Conv2d, (7, 6), {"kernel_size": 3, "padding": 1}),
    (nn.Conv2d, (8, 7), {"kernel_size": (3, 2), "stride": (2, 1), "padding": (2, 0), "dilation": (1, 2)}),
    (nn.Conv2d, (7, 7), {"kernel_size": 3, "stride": 2, "groups": 2}),
    (nn.Conv2d, (7, 7), {"kernel_size": 3, "padding": "same"}),
    (nn.Conv2d, (6, 7), {"kernel_size": 2, "padding": "same", "padding_mode": "reflect"}),
    (nn.Conv2d, (7, 7), {"kernel_size": 3, "padding": 1, "padding_mode": "circular"}),
    (nn.Conv3d, (4, 5, 4), {"kernel_size": 2}),
    (nn.ConvTranspose1d, (5,), {"kernel_size": 3}),
    (nn.ConvTranspose2d, (4, 5), {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1, "groups": 2}),
]


def pairs(layer: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    """Similarity of a kernel, one weight at a time: its samples are found by a layer with that weight alone."""
    found = torch.zeros_like(layer.weight)
    for index in torch.cartesian_prod(*(torch.arange(s) for s in found.shape)):
        at = tuple(index.tolist())
        with torch.no_grad():
            layer.weight.zero_()[at] = 1
        seen = layer(x)  # what this weight alone passes on, at every position of the output
        row = next(o for o in range(seen.shape[1]) if seen[:, o].any())
        one, other = seen[:, row].flatten(), a[:, row].flatten()
        if isinstance(layer, nn.ConvTranspose1d | nn.ConvTranspose2d):  # positions that it does not reach are no samples
            reached = layer(torch.ones_like(x))[:, row].flatten() != 0
            one, other = x[:, at[0]].flatten(), other[reached]
            if one.shape != other.shape:
                found[at] = math.nan  # at the border some inputs reach nothing
                continue
        found[at] = (one @ other).abs() / (one.norm() * other.norm())
    return found


@pytest.mark.parametrize(("kind", "space", "options"), CONVOLUTIONS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_positions_are_the_samples_of_a_kernel(kind: Any, space: tuple[int, ...], options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    layer = kind(4, 6, bias=False, **options).double()
    x = torch.rand(3, 4, *space, dtype=torch.float64) + 0.1
    a = torch.randn_like(layer(x).detach())
    sums = empty_sums(layer, layer.weight)
    for part in (slice(0, 1), slice(1, 3)):
        add_batch(sums, layer, x[part], a[part])
    found, expected = cosine(sums), pairs(layer, x, a).detach()
    known = expected.isfinite()
    assert known.any()
    assert found.shape == layer.weight.shape
    assert torch.allclose(found[known], expected[known], atol=1e-12)


def test_one_image_without_a_batch_dimension() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(2, 3, 3), torch.randn(2, 6, 6)
    one, other = empty_sums(layer, layer.weight), empty_sums(layer, layer.weight)
    a = layer(x).detach()
    add_batch(one, layer, x, a)
    add_batch(other, layer, x[None], a[None])
    assert torch.equal(cosine(one), cosine(other))


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([[1.0, 2.0], [0.0, 0.0]], torch.tensor([[1.0, 2.0], [0.0, 0.0]]).softmax(1).tolist()),
        ([[0.25, 0.75], [1.0, 0.0]], [[0.25, 0.75], [1.0, 0.0]]),
        ([[3.0], [-2.0]], [[3.0], [-2.0]]),
        ([[-1.0, 2.0], [0.5, 0.5]], torch.tensor([[-1.0, 2.0], [0.5, 0.5]]).softmax(1).tolist()),  # sums of one, but a negative
    ],
)
def test_probabilities_stay_and_logits_become_some(given: list[list[float]], expected: list[list[float]]) -> None:
    assert as_probabilities(torch.tensor(given), 1).tolist() == [pytest.approx(row) for row in expected]


# ---------------------------------------------------------------------- which activations


class Functional(nn.Module):
    """Two layers, functional activations and a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.last = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        one = functional.gelu(self.first(x))
        two = functional.relu(one + self.second(one), inplace=True)
        return self.last(input=two)


def test_functional_activations_and_residuals() -> None:
    torch.manual_seed(0)
    net, x = Functional(), torch.randn(9, 6)
    with torch.no_grad():
        one = functional.gelu(net.first(x))
        two = functional.relu(one + net.second(one))
        out = net.last(two).softmax(1)
    found = similarities(net, x[:4], x[4:])
    assert close(found["first.weight"], direct(x, one))
    assert close(found["second.weight"], direct(one, two))
    assert close(found["last.weight"], direct(two, out))


HIDDEN: dict[str, Callable[[], list[nn.Module]]] = {
    "relu": lambda: [nn.ReLU()],
    "relu in place": lambda: [nn.ReLU(inplace=True)],
    "batch norm": lambda: [nn.BatchNorm1d(5), nn.ReLU()],
    "dropout": lambda: [nn.ReLU(), nn.Dropout(0.5)],
    "dropout before": lambda: [nn.Dropout(0.5), nn.Tanh()],
    "layer norm": lambda: [nn.LayerNorm(5), nn.SiLU(), nn.Identity()],
    "unflatten": lambda: [nn.Unflatten(1, (5, 1)), nn.ReLU(), nn.Flatten()],
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_the_activations_of_a_layer_are_what_the_next_one_takes(hidden: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 5), *HIDDEN[hidden](), nn.Linear(5, 3)).eval()
    x = torch.randn(8, 4)
    with torch.no_grad():
        between = net[:-1](x)
        out = net[-1](between).softmax(1)
    found = similarities(net, x)
    assert close(found["0.weight"], direct(x, between))
    assert close(found[f"{len(net) - 1}.weight"], direct(between, out))


def test_a_sequence_of_tokens_counts_each_as_a_sample() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(2, 7, 4)
    assert close(similarities(net, x)["0.weight"], direct(x, net[:2](x).detach()))


def kernel_similarity(layer: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, x, a)
    return cosine(sums)


AFTER_A_CONVOLUTION: dict[str, tuple[Callable[[], list[nn.Module]], Callable[[Tensor], Tensor]]] = {
    "flatten": (lambda: [nn.ReLU(), nn.Flatten(), nn.Linear(96, 3)], torch.relu),
    "flatten first": (lambda: [nn.Flatten(), nn.ReLU(), nn.Linear(96, 3)], torch.relu),
    "pooled after": (lambda: [nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(24, 3)], torch.relu),
    "average after": (lambda: [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 3)], torch.relu),
    "pooled before": (
        lambda: [nn.MaxPool2d(2), nn.ReLU(), nn.Conv2d(6, 3, 1)],
        lambda z: functional.max_pool2d(z, 2).relu().repeat_interleave(2, 2).repeat_interleave(2, 3),
    ),
    "bare pooling": (
        lambda: [nn.MaxPool2d(2), nn.Conv2d(6, 3, 1)],
        lambda z: functional.max_pool2d(z, 2).repeat_interleave(2, 2).repeat_interleave(2, 3),
    ),
    "no layer after": (lambda: [nn.AdaptiveAvgPool2d(1), nn.Flatten()], lambda z: z.softmax(1)),
    "activation and no layer after": (lambda: [nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()], torch.relu),
}


@pytest.mark.parametrize("case", AFTER_A_CONVOLUTION)
def test_what_comes_after_a_convolution(case: str) -> None:
    torch.manual_seed(0)
    make, activation = AFTER_A_CONVOLUTION[case]
    net, x = nn.Sequential(nn.Conv2d(2, 6, 3), *make()), torch.randn(5, 2, 6, 6)
    expected = kernel_similarity(net[0], x, activation(net[0](x).detach()))
    assert close(similarities(net, x)["0.weight"], expected)


class ChannelsLast(nn.Module):
    """A convolution whose output is turned, as in ConvNeXt, and turned back by an inverse that has the same sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(2, 4, 3), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.gelu(self.norm(self.conv(x).permute(0, 2, 3, 1)))).mean((1, 2))


def test_turned_activations_are_turned_back() -> None:
    torch.manual_seed(0)
    net, x = ChannelsLast(), torch.randn(3, 2, 6, 6)  # 4 channels and 4 x 4 positions: sizes alone say nothing
    with torch.no_grad():
        a = functional.gelu(net.norm(net.conv(x).movedim(1, 3))).movedim(3, 1)
    assert close(similarities(net, x)["conv.weight"], kernel_similarity(net.conv, x, a))


OUTPUTS: dict[str, tuple[nn.Module, Callable[[Tensor], Tensor]]] = {
    "logits": (nn.Identity(), lambda z: z.softmax(1)),
    "softmax": (nn.Softmax(1), lambda z: z.softmax(1)),
    "log softmax": (nn.LogSoftmax(1), lambda z: z.softmax(1)),
    "sigmoid": (nn.Sigmoid(), torch.sigmoid),
    "relu": (nn.ReLU(), torch.relu),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_the_last_layer_counts_with_the_networks_output(case: str) -> None:
    torch.manual_seed(0)
    end, activation = OUTPUTS[case]
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3), end), torch.randn(8, 4)
    with torch.no_grad():
        inputs, logits = net[:2](x), net[:3](x)
    assert close(similarities(net, x)["2.weight"], direct(inputs, activation(logits)))


class Heads(nn.Module):
    """Two outputs in a dict, one of them a single number, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.classes, self.value, self.unused = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1), nn.Linear(5, 5)

    def forward(self, x: Tensor) -> dict[str, Any]:
        hidden = self.body(x).relu()
        return {"classes": self.classes(hidden), "other": [self.value(hidden).squeeze(-1)]}


def test_several_outputs_and_an_unused_layer() -> None:
    torch.manual_seed(0)
    net, x = Heads(), torch.randn(8, 4)
    with torch.no_grad():
        hidden = net.body(x).relu()
        classes, value = net.classes(hidden).softmax(1), net.value(hidden)
    found = similarities(net, x)
    assert set(found) == {"body.weight", "classes.weight", "value.weight"}
    assert close(found["classes.weight"], direct(hidden, classes))
    assert close(found["value.weight"], direct(hidden, value))


def test_tied_weights_count_the_samples_of_all_their_uses() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    net[2].weight = net[0].weight
    x = torch.randn(8, 4)
    with torch.no_grad():
        one, two = net[:2](x), net[:4](x)
    found = similarities(net, x)
    assert close(found["0.weight"], direct(torch.cat([x, one]), torch.cat([one, two])))
    called_twice = nn.Sequential(net[0], net[1], net[0], net[3], net[4])
    called_twice[0].bias = called_twice[2].bias = net[2].bias
    with torch.no_grad():
        one, two = called_twice[:2](x), called_twice[:4](x)
    assert close(similarities(called_twice, x)["0.weight"], direct(torch.cat([x, one]), torch.cat([one, two])))


def test_the_network_is_left_as_it_was_also_after_an_error() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    similarities(net, torch.randn(2, 4))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        similarities(net, torch.randn(2, 5))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert torch.relu(torch.tensor(-1.0)) == 0  # nothing is followed any more


def test_an_autocast_pass_sums_in_float32() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3)), torch.randn(64, 4)

    def outputs() -> Iterator[Tensor]:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            found = net(x)
        yield found

    sums = measure(net, weights(net), outputs())
    assert sums["0.weight"].dots.dtype == torch.float32
    found, expected = cosine(sums["0.weight"]), similarities(net, x)["0.weight"]
    assert (found - expected).abs().max() < 0.01  # three digits in bfloat16


# ---------------------------------------------------------------------- refusals


def test_a_network_without_activations_is_refused() -> None:
    for net in (
        nn.Sequential(nn.Linear(4, 5), nn.Linear(5, 3)),
        nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.5), nn.Identity(), nn.Linear(5, 3)),
        nn.Sequential(nn.Conv2d(4, 5, 1), nn.Flatten(), nn.Linear(5, 3)),
    ):
        x = torch.rand(2, 4, 1, 1) if isinstance(net[0], nn.Conv2d) else torch.rand(2, 4)
        with pytest.raises(ValueError, match=r"no activation between the layers: the next layer takes the output of 0\.weight as it is"):
            similarities(net, x)


def test_activations_that_change_nothing_on_this_batch_are_activations() -> None:
    net = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3))
    with torch.no_grad():
        net[0].weight.abs_()
        net[0].bias.abs_()
    assert set(similarities(net, torch.rand(6, 4))) == {"0.weight", "2.weight"}


def test_a_bottleneck_without_activation_counts_with_its_own_output() -> None:
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 2), nn.Linear(2, 3)), torch.randn(8, 4)
    with torch.no_grad():
        expected = direct(net[:2](x), net[:3](x))
    assert close(similarities(net, x)["2.weight"], expected)


@pytest.mark.parametrize(
    ("module", "name", "kind"),
    [
        (nn.LSTM(4, 5), "weight_ih_l0", "LSTM"),
        (nn.Embedding(4, 5), "weight", "Embedding"),
        (nn.MultiheadAttention(4, 2), "in_proj_weight", "an attention"),
        (nn.MultiheadAttention(4, 2), "out_proj.weight", "an attention"),
    ],
)
def test_layers_without_two_known_sides_are_refused(module: nn.Module, name: str, kind: str) -> None:
    with pytest.raises(ValueError, match=rf"{name} \({kind}\): the activations .* exclude="):
        list(layers_of(module, {name: module.get_parameter(name)}))


def test_all_that_is_refused_is_named_at_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 5), nn.GRU(4, 3))
    params = {n: p for n, p in net.named_parameters() if p.ndim == 2}
    with pytest.raises(ValueError, match=r"exclude=\['1.weight_hh_l0', '1.weight_ih_l0', '2.weight_hh_l0', '2.weight_ih_l0'\]"):
        list(layers_of(net, params))


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.value, self.out = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(functional.scaled_dot_product_attention(self.query(x), x, self.value(x)))


class Detour(nn.Module):
    """The output of the last layer leaves torch, and comes back as something new."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tensor(self.last(self.first(x).relu()).tolist())


class Overwriting(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        out = self.last(hidden)
        hidden.mul_(2)
        return out


class Shuffled(nn.Module):
    """Turned and flattened: nobody can tell which neuron is where."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Conv2d(2, 4, 3), nn.Linear(36, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).permute(0, 2, 3, 1).flatten(1).relu())


@pytest.mark.parametrize(
    ("net", "x", "message"),
    [
        (Attention(), torch.randn(1, 3, 4), r"the activations of query\.weight, value\.weight are not known .*(mm|scaled_dot).*exclude="),
        (nn.Sequential(nn.Linear(4, 4), nn.GRU(4, 3)), torch.randn(1, 3, 4), r"the activations of 0\.weight are not known"),
        (Detour(), torch.randn(3, 4), r"last\.weight are not known \(they reach neither a layer nor the output\).*forward="),
        (Overwriting(), torch.randn(3, 4), r"the network writes into the activations around (first|last)\.weight .*inplace=False"),
    ],
    ids=["attention", "recurrent", "detour", "overwriting"],
)
def test_activations_that_cannot_be_followed_are_refused(net: nn.Module, x: Tensor, message: str) -> None:
    params = {n: p for n, p in weights(net).items() if "_l0" not in n}
    with pytest.raises(ValueError, match=message):
        measure(net, params, passes(net, x))


def test_neurons_that_are_shuffled_count_before_the_shuffle() -> None:
    torch.manual_seed(0)
    net, x = Shuffled(), torch.randn(3, 2, 5, 5)
    expected = kernel_similarity(net.first, x, net.first(x).detach())
    assert close(similarities(net, x)["first.weight"], expected)


# ---------------------------------------------------------------------- what an update makes of it


def table(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_an_update_by_similarity_as_in_the_reference() -> None:
    given, expected = UPDATE["inputs"], UPDATE["ctre_seq_or_cte"]
    mask = table(given["mask"]).bool()
    kept, proposed = propose(mask, table(given["weights"]), table(given["similarity"]), UPDATE["n_prune"])
    assert kept.int().tolist() == UPDATE["mask_kept"]
    assert (mask & ~kept).int().tolist() == UPDATE["mask_deleted"]
    assert proposed.int().tolist() == expected["mask_grown"]
    assert (kept | proposed).int().tolist() == expected["mask_after"]
    assert (proposed & ~mask).int().tolist() == expected["newly_initialised"]


def test_rejected_proposals_become_random_as_in_the_reference() -> None:
    given, expected = UPDATE["inputs"], UPDATE["ctre_sim"]
    mask, source, pool = table(given["mask"]).bool(), torch.Generator().manual_seed(0), set()
    kept, proposed = propose(mask, table(given["weights"]), table(given["similarity"]), UPDATE["n_prune"])
    assert proposed.int().tolist() == expected["similarity_candidates"]
    assert (proposed & mask).int().tolist() == expected["re_added"]
    for _ in range(200):
        accepted, drawn = explore(mask, kept, proposed, torch.rand(12, generator=source))
        assert accepted.int().tolist() == expected["mask_similarity_part"]
        assert int(drawn.sum()) == expected["n_random"]
        assert not (drawn & (kept | accepted)).any()
        assert int((kept | accepted | drawn).sum()) == expected["n_active_after"]
        pool |= set(drawn.nonzero().flatten().tolist())
    assert sorted(pool) == expected["random_pool_intended"]


def test_of_equal_similarities_the_lower_index_grows_as_in_the_reference() -> None:
    given = INITIAL_ZERO_SIMILARITY
    mask, zeros = table(given["mask"]).bool(), torch.zeros(10)
    kept, proposed = propose(mask, table(given["weights"]), zeros, given["n_prune"])
    assert kept.int().tolist() == given["mask_kept"]
    assert proposed.int().tolist() == given["mask_grown"]


def test_the_count_stays_over_a_thousand_random_updates() -> None:
    source = torch.Generator().manual_seed(0)
    for trial in range(1000):
        shape = (int(torch.randint(1, 7, (), generator=source)), int(torch.randint(1, 9, (), generator=source)))
        mask = torch.rand(shape, generator=source) < 0.1 + 0.8 * (trial % 10) / 10
        active = int(mask.sum())
        count = int(torch.randint(0, active + 1, (), generator=source))
        weight, similarity, draw = (torch.rand(shape, generator=source).mul(4).round() for _ in range(3))  # with many ties
        kept, proposed = propose(mask, weight * mask, similarity, count)
        accepted, drawn = explore(mask, kept, proposed, draw)
        assert int((kept | proposed).sum()) == int((kept | accepted | drawn).sum()) == active
        assert int(kept.sum() + accepted.sum() + drawn.sum()) == active  # no position is counted twice


def test_new_weights_are_bounded_as_in_the_reference() -> None:
    for inputs, bound in GROWTH_INIT["bounds"].items():
        assert growth_bound((3, int(inputs))) == pytest.approx(bound, abs=1e-12)
    assert growth_bound((8, 50, 3, 4)) == growth_bound((1, 600))


def test_figures_of_an_update() -> None:
    grown = Grown()
    assert grown.figures() == {"by_similarity": 0.0, "at_random": 0.0}
    grown.add(torch.tensor([0.5, 0.9, 0.1]), torch.tensor([True, False, True]))
    grown.drawn += 6
    assert grown.figures() == pytest.approx({"by_similarity": 0.25, "at_random": 0.75, "mean_similarity": 0.3})
