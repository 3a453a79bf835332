"""Activations of a layer: which tensors they are, in networks of every kind."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from support.similarities import close, direct, kernel_similarity, similarities, weights
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.methods.ctre.activations import measure_similarity
from sparse_callbacks.methods.ctre.similarity import cosine_similarity


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
    """A convolution whose output is permuted, as in ConvNeXt, and permuted back by an inverse that has the same
    sizes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.linear = nn.Conv2d(2, 4, 3), nn.LayerNorm(4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(functional.gelu(self.norm(self.conv(x).permute(0, 2, 3, 1)))).mean((1, 2))


def test_permuted_activations_are_permuted_back() -> None:
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
        self.body, self.classes, self.value, self.unused = (
            nn.Linear(4, 5),
            nn.Linear(5, 3),
            nn.Linear(5, 1),
            nn.Linear(5, 5),
        )

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


def test_shared_weights_count_the_samples_of_all_their_uses() -> None:
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

    sums = measure_similarity(net, weights(net), outputs())
    assert sums["0.weight"].dots.dtype == torch.float32
    found, expected = cosine_similarity(sums["0.weight"]), similarities(net, x)["0.weight"]
    assert (found - expected).abs().max() < 0.01  # three digits in bfloat16


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
