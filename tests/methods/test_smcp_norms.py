"""SMCP's scores behind a norm: they do not depend on how much of the group is kept."""

from typing import Any

import pytest
import torch
from support.smcp import Residual
from torch import nn

from sparse_callbacks import SMCP
from sparse_callbacks.channels.norms import normalized_outputs
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


def test_a_factor_of_an_output_weighs_its_scores() -> None:
    scores = torch.tensor([[1.0, 2.0], [10.0, 20.0]])
    assert input_scores(scores, 1, torch.tensor([0.5, 0.1])).tolist() == [1.5, 3.0]
    assert input_scores(scores, 0, torch.tensor([0.5, 0.1])).tolist() == pytest.approx([0.7, 7.0])


# ---------------------------------------------------------------------- which norm divides what


def test_norms_and_what_they_divide_together() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Conv2d(4, 6, 1), nn.InstanceNorm2d(6), nn.Conv2d(6, 4, 1),
        nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 8, 1), nn.LayerNorm(3), nn.Conv2d(8, 2, 1), nn.LayerNorm([2, 3, 3]),
        nn.Flatten(), nn.Linear(18, 5), nn.RMSNorm(5), nn.Linear(5, 7), nn.ReLU(), nn.LayerNorm(7),
    )  # fmt: skip
    assert normalized_outputs(net, torch.zeros(1, 2, 5, 5)) == {
        "0": ("1", 2),
        "2": ("3", 1),
        "4": ("5", 1),
        "6": ("7", 1),
        "8": ("9", 2),
        "11": ("12", 5),
    }


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


NETWORKS: dict[str, tuple[Any, tuple[str, ...]]] = {
    "convolutions with batch norms": (convolutions, ("net.2",)),
    "linear with batch norm": (lambda: linear(nn.BatchNorm1d), ("net.1",)),
    "linear with layer norm": (lambda: linear(nn.LayerNorm), ("net.1",)),
    "residual sums": (residual, ("net.0",)),
    "inside residual blocks": (residual, ("net.3.one", "net.4.one")),
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
