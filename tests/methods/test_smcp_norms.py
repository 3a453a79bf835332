"""SMCP's scores behind a norm: they do not depend on how much of the group is kept."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.smcp import Residual
from torch import Tensor, nn

from sparse_callbacks import SMCP
from sparse_callbacks.channels.normalized import normalized_outputs
from sparse_callbacks.methods.channels.rankings import Choice, Offer
from sparse_callbacks.methods.smcp.scores import deviation_left, input_scores
from sparse_callbacks.testing.networks import Classifier, Layers
from sparse_callbacks.testing.runs import fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

# ---------------------------------------------------------------------- the standard deviation that is left


def test_the_deviation_left_by_hand() -> None:
    weight = torch.tensor([[3.0, 4.0], [0.0, 0.0], [0.0, 12.0], [5.0, 0.0]])
    first = torch.tensor([True, False])
    assert deviation_left(weight, 1, first).tolist() == pytest.approx([0.6, 1.0, 0.0, 1.0])
    assert deviation_left(weight.T, 0, first).tolist() == pytest.approx([0.6, 1.0, 0.0, 1.0])
    # rows that a norm divides by one number: 3 of 5, and 5 of 13
    assert deviation_left(weight, 1, first, 2).tolist() == pytest.approx([0.6, 0.6, 5 / 13, 5 / 13])
    kernel = torch.tensor([[[[3.0, 0.0]], [[0.0, 4.0]]]])
    assert deviation_left(kernel, 1, first).tolist() == pytest.approx([0.6])
    assert deviation_left(kernel.half(), 1, first).dtype == torch.float32


@pytest.mark.parametrize("together", [1, 6])
def test_the_deviation_left_is_what_outputs_of_uncorrelated_inputs_have(together: int) -> None:
    torch.manual_seed(0)
    weight, kept, x = torch.randn(6, 40), torch.rand(40) < 0.3, torch.randn(50_000, 40)
    masked, every = x @ (weight * kept).T, x @ weight.T
    # a layer norm takes the deviation over the outputs of one sample
    variances = [y.var(0) if together == 1 else y.var(0).mean().expand(6) for y in (masked, every)]
    expected = (variances[0] / variances[1]).sqrt()
    # a standard deviation over 50,000 samples is right to about 1 in 300
    assert torch.allclose(deviation_left(weight, 1, kept, together), expected, rtol=0.02)


KINDS = [
    (kind, groups, norm)
    for kind in ("Linear", *(f"Conv{t}{d}d" for t in ("", "Transpose") for d in (1, 2, 3)))
    for groups in ((1,) if kind == "Linear" else (1, 2, 8))
    for norm in ("batch", "group", "instance", "layer", "rms")
]


@pytest.mark.parametrize(("kind", "groups", "norm"), KINDS)
def test_the_deviation_left_of_every_layer_before_every_norm(kind: str, groups: int, norm: str) -> None:
    torch.manual_seed(0)
    dims = int(kind[-2]) if "Conv" in kind else 0
    layer: Any = getattr(nn, kind)(16, 24, *((1,) if dims else ()), bias=False, **({"groups": groups} if dims else {}))
    image = (2,) * dims
    behind: nn.Module = {
        "batch": lambda: getattr(nn, f"BatchNorm{max(dims, 1)}d")(24),
        "group": lambda: nn.GroupNorm(3, 24),
        "instance": lambda: getattr(nn, f"InstanceNorm{max(dims, 1)}d")(24),
        "layer": lambda: nn.LayerNorm([24, *image]),
        "rms": lambda: nn.RMSNorm([24, *image]),
    }[norm]()
    x = torch.randn(2, 16, *image)
    if not dims and norm == "instance":  # it would take features as positions
        x = torch.randn(2, 24, 16)
    ((_, together),) = normalized_outputs(nn.Sequential(layer, behind), x).values()
    expected_together = {"batch": 1, "group": 8, "instance": 1 if dims else 24}.get(norm, 24)
    assert together == expected_together
    dim = 0 if "Transpose" in kind else 1
    kept = torch.rand(layer.weight.shape[dim]) < 0.5
    weight = layer.weight.detach()
    masked = weight * kept.view(-1, *[1] * (weight.ndim - 1 - dim))
    # the response to each input alone; in a shape of one position, [inputs, outputs]
    make = (
        nn.functional.linear
        if not dims
        else getattr(nn.functional, f"conv_transpose{dims}d" if dim == 0 else f"conv{dims}d")
    )
    extra = {"groups": groups} if dims else {}
    squares = [
        make(torch.eye(16).view(16, 16, *[1] * dims), w, **extra).flatten(1).square().sum(0) for w in (masked, weight)
    ]
    sums = [v.view(-1, together).sum(1).repeat_interleave(together) for v in squares]
    expected = (sums[0] / sums[1]).sqrt()
    found = deviation_left(weight, dim, kept, together, groups)
    if dim == 0 and groups > 1:
        expected = expected.view(groups, -1).repeat_interleave(16 // groups, 0)
    assert found.shape == expected.shape
    assert torch.allclose(found, expected, atol=1e-6)


def test_a_factor_of_an_output_weighs_its_scores() -> None:
    scores = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    assert input_scores(scores, 1, torch.tensor([0.5, 0.1])).tolist() == [1.5, 3.0]
    assert input_scores(scores, 0, torch.tensor([0.5, 0.1])).tolist() == pytest.approx([0.7, 7.0])
    pairs = torch.tensor([[1.0, 0.5], [0.1, 0.2]])
    assert input_scores(scores, 1, pairs).tolist() == pytest.approx([2.0, 5.0])
    assert input_scores(scores, 0, pairs).tolist() == pytest.approx([2.0, 5.0])


# ---------------------------------------------------------------------- which norm divides what


def test_norms_and_what_they_divide_together() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1), nn.InstanceNorm2d(6), nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 8, 1), nn.LayerNorm(3), nn.Conv2d(8, 2, 1), nn.LayerNorm([2, 3, 3]),
        nn.Flatten(), nn.Linear(18, 5), nn.RMSNorm(5), nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7),
    )  # fmt: skip
    assert normalized_outputs(net, torch.zeros(1, 2, 5, 5)) == {
        "0": (("1",), 2),
        "2": (("3",), 1),
        "4": (("5",), 1),
        "6": (("7",), 1),
        "8": (("9",), 2),
        "11": (("12",), 5),
        "13": (("15",), 7),
    }


class Between(nn.Module):
    """A layer, a function, and a norm of its result."""

    def __init__(self, function: Callable[[nn.Module, Tensor], Tensor], layer: nn.Module, norm: nn.Module) -> None:
        super().__init__()
        self.function, self.layer, self.norm = function, layer, norm
        self.gain, self.other = nn.Parameter(torch.ones(4, 1, 1)), nn.BatchNorm2d(4)
        self.depthwise, self.biased = (nn.Conv2d(4, 4, 3, groups=4, bias=b) for b in (False, True))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, self.layer(x))


BETWEEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], bool]] = {
    "nothing": (lambda m, y: m.norm(y), True),
    "named argument": (lambda m, y: m.norm(input=y), True),
    "relu": (lambda m, y: m.norm(y.relu()), True),
    "in place": (lambda m, y: m.norm(y.relu_()), True),
    "leaky relu, average pooling": (
        lambda m, y: m.norm(nn.functional.avg_pool2d(nn.functional.leaky_relu(y), 2)),
        True,
    ),
    "max pooling, a constant": (lambda m, y: m.norm(nn.functional.max_pool2d(y, 2) * 2.0 / 3), True),
    "a factor of each channel": (lambda m, y: m.norm(y * m.gain), True),
    "means over the image": (lambda m, y: m.norm(nn.functional.adaptive_avg_pool2d(y, 1)), True),
    "depthwise": (lambda m, y: m.norm(m.depthwise(y)), True),
    "other shapes": (lambda m, y: m.norm(y.flatten(2).permute(0, 2, 1).transpose(1, 2).unsqueeze(-1)), True),
    "two norms": (lambda m, y: m.norm(y) + m.other(y.relu()), True),
    "a norm and a sum": (lambda m, y: m.norm(y) * 0.1 + y, False),
    "a norm and the output": (lambda m, y: torch.cat([m.norm(y), y]), False),
    "a sum before": (lambda m, y: m.norm(y + 1), False),
    "sigmoid": (lambda m, y: m.norm(y.sigmoid()), False),
    "a square": (lambda m, y: m.norm(y * y), False),
    "relu6": (lambda m, y: m.norm(nn.functional.relu6(y)), False),
    "biased": (lambda m, y: m.norm(m.biased(y)), False),
    "mixed channels": (lambda m, y: m.norm(y.mean(1, keepdim=True).expand_as(y)), False),
    "no norm": (lambda m, y: y.relu(), False),
}


@pytest.mark.parametrize("name", BETWEEN)
def test_a_norm_counts_through_what_is_homogeneous_and_where_nothing_goes_past_it(name: str) -> None:
    function, counts = BETWEEN[name]
    net = Between(function, nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4))
    assert ("layer" in normalized_outputs(net, torch.randn(2, 2, 9, 9))) == counts
    if not counts:
        return
    # what it stands for: the scale of the layer has no effect on the output
    outputs = [net(torch.randn(4, 2, 9, 9, generator=torch.Generator().manual_seed(0)))]
    with torch.no_grad():
        for parameter in net.layer.parameters():
            parameter.mul_(torch.tensor([2.0, 3.0, 4.0, 5.0]).view(-1, *[1] * (parameter.ndim - 1)))
    outputs += [net(torch.randn(4, 2, 9, 9, generator=torch.Generator().manual_seed(0)))]
    assert torch.allclose(*outputs, atol=0.02)


def test_channels_that_are_last_are_divided_together_by_a_layer_norm() -> None:
    class Last(nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.movedim(1, -1)).movedim(-1, 1)

    for net in (
        Between(lambda m, y: m.norm(y.movedim(1, -1)), nn.Conv2d(2, 4, 3), nn.LayerNorm(4)),
        Between(lambda m, y: m.norm(y), nn.Conv2d(2, 4, 3), Last(4)),
        Between(lambda m, y: m.norm(y), nn.Linear(9, 4), nn.BatchNorm2d(2)),  # takes statistics over features
    ):
        assert normalized_outputs(net, torch.randn(2, 2, 9, 9)) == {"layer": (("norm",), 4)}


# ---------------------------------------------------------------------- scores under given masks


class Fixed(SMCP):
    """Keeps the first ``few`` channels of each of ``pruned``, and remembers the scores under these masks."""

    few: int
    pruned: tuple[str, ...]

    def choose(self, number: int, offer: Offer) -> Choice:
        self.seen = dict(zip((g.name for g in self.groups), self.scores(), strict=True))
        super().choose(number, offer)  # gains by importance ask for the latest scores
        kept = [self.few if g.name in self.pruned else g.size for g in self.groups]
        return Choice([torch.arange(g.size) < k for g, k in zip(self.groups, kept, strict=True)], {})


class Resting(Classifier):
    """Weights that hardly move."""

    def __init__(self, net: nn.Module, norms_rest: bool) -> None:
        super().__init__(net)
        self.norms_rest = norms_rest

    def on_train_batch_start(self, *_: Any) -> None:
        for norm in self.modules() if self.norms_rest else ():
            if isinstance(norm, nn.BatchNorm2d):
                norm.eval()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=1e-6)


def convolutions(norm: bool = True) -> nn.Module:
    """Three convolutions; the 64 outputs of the second are the channels."""
    one, two = (nn.BatchNorm2d(64) if norm else nn.Identity() for _ in range(2))
    return Layers(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1), one, nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), two, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def linear(norm: type[nn.Module]) -> nn.Module:
    """Three matrices; the 64 outputs of the first are the channels."""
    return Layers(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32), norm(32), nn.ReLU(), nn.Linear(32, 4))


def residual() -> nn.Module:
    """A sum whose 64 channels three convolutions with norms read."""
    head = nn.Conv2d(64, 32, 1), nn.BatchNorm2d(32), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4)
    stem = nn.Conv2d(1, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU()
    return Layers(*stem, Residual(64), Residual(64), *head)


def with_between(*between: nn.Module) -> nn.Module:
    """As :func:`convolutions`, with modules between the last convolution and its norm."""
    return Layers(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), *between, nn.BatchNorm2d(64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


class PastNorm(nn.Module):
    """A norm, and a path past it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(64)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.norm(x) * 0.1 + x
        return out


def past_norm() -> nn.Module:
    return Layers(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1), nn.BatchNorm2d(64), nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1), PastNorm(), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )  # fmt: skip


def grouped_transposed() -> nn.Module:
    """64 channels that a grouped transposed convolution with a group norm reads."""
    return Layers(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 64, 3, padding=1), nn.ReLU(),
        nn.ConvTranspose2d(64, 64, 3, padding=1, groups=16), nn.GroupNorm(2, 64), nn.ReLU(), nn.Conv2d(64, 8, 3), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip


NETWORKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "convolutions with batch norms": (convolutions, ("net.2",)),
    "linear with batch norm": (lambda: linear(nn.BatchNorm1d), ("net.1",)),
    "linear with layer norm": (lambda: linear(nn.LayerNorm), ("net.1",)),
    "residual sums": (residual, ("net.0",)),
    "inside residual blocks": (residual, ("net.3.one", "net.4.one")),
    "a ReLU before the norm": (lambda: with_between(nn.ReLU()), ("net.2",)),
    "pooling before the norm": (lambda: with_between(nn.AvgPool2d(2)), ("net.2",)),
    "a path past the norm": (past_norm, ("net.2",)),
    "without norms": (lambda: convolutions(norm=False), ("net.2",)),
}


def score(network: str, few: int, norms_rest: bool = False, **options: Any) -> float:
    """Mean score of the channels from the fifth on where ``few`` channels are kept."""
    torch.manual_seed(0)
    build, pruned = NETWORKS[network]
    method = Fixed(0.9, round_to=1, every=10, start=0, stop=18, prune_stem=True, print_plan=False, **options)
    method.few, method.pruned = few, pruned
    source = torch.Generator().manual_seed(1)
    data = torch.utils.data.TensorDataset(
        torch.randn(640, 1, 8, 8, generator=source), torch.randint(4, (640,), generator=source)
    )
    fit(Resting(build(), norms_rest), method, loader=torch.utils.data.DataLoader(data, batch_size=32), max_epochs=1)
    return float(torch.cat([method.seen[name][4:] for name in pruned]).mean())


@pytest.mark.parametrize("network", NETWORKS)
def test_scores_do_not_depend_on_how_much_of_the_group_is_kept(network: str) -> None:
    assert 0.5 < score(network, 4) / score(network, 64) < 2.0


@pytest.mark.parametrize("scaling", ["kept", "importance"])
def test_nor_on_gains_that_shrink_with_it(scaling: str) -> None:
    network = "convolutions with batch norms"
    found = score(network, 4, norm_scaling=scaling)
    assert 0.5 < found / score(network, 64, norm_scaling=scaling) < 2.0


def test_norms_that_take_running_statistics_divide_by_the_same_for_every_mask() -> None:
    network = "convolutions with batch norms"
    assert 0.5 < score(network, 4, norms_rest=True) / score(network, 64, norms_rest=True) < 2.0


def test_a_grouped_transposed_convolution_before_a_group_norm_trains() -> None:
    torch.manual_seed(0)
    method = SMCP(0.5, round_to=1, every=2, start=2, stop=8, print_plan=False)
    data = torch.utils.data.TensorDataset(torch.randn(320, 1, 8, 8), torch.randint(4, (320,)))
    fit(Classifier(grouped_transposed()), method, loader=torch.utils.data.DataLoader(data, batch_size=32), max_epochs=1)
    example = torch.zeros(1, 1, 8, 8)
    assert normalized_outputs(grouped_transposed(), example)["4"] == (("5",), 32)
    assert any(not mask.all() for name, mask in method.masks.items() if name == "net.4.weight")
