"""Slimming: what becomes of outputs that are dead, where something reads them."""

import pytest
import torch
from support.channel_nets import IMAGE, OUTPUTS, Concat, Residual, dead_rows, made, masked, outputs
from torch import Tensor, nn

from sparse_callbacks import DPF
from sparse_callbacks.channels.idle_masks import NOTHING_DEAD
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.testing.networks import Classifier, conv_net
from sparse_callbacks.testing.runs import fit

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")


@pytest.mark.parametrize(("padding", "mode"), [(0, "zeros"), (1, "reflect")])
@pytest.mark.parametrize("groups", [1, 2])
def test_the_constant_of_a_dead_output_goes_into_the_bias_of_its_reader(padding: int, mode: str, groups: int) -> None:
    reader = nn.Conv2d(8, 4, 3, padding=padding, padding_mode=mode, groups=groups, bias=False)
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Sigmoid(), reader)).double()
    x = torch.randn(IMAGE, dtype=torch.float64)
    mask = torch.tensor([0, 1, 1, 0] * 2).bool().view(8, 1, 1, 1)  # the same places in both groups
    small, proof = slim(net, {"0.weight": mask}, x)
    assert small[0].out_channels == 4
    assert small[3].bias.shape == (4,)
    torch.testing.assert_close(
        outputs(small, 2 * x), outputs(masked(net, {"0.weight": mask}), 2 * x), rtol=1e-10, atol=1e-10
    )
    assert proof.removed == 4


def test_a_linear_reader_takes_the_constants_behind_a_flattening() -> None:
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Sigmoid(), nn.Flatten(), nn.Linear(6 * 36, 2))).double()
    x = torch.randn(IMAGE, dtype=torch.float64)
    small, _ = slim(net, {"0.weight": dead_rows(2, 6)}, x)
    assert (small[0].out_channels, small[3].in_features) == (4, 4 * 36)
    torch.testing.assert_close(
        outputs(small, 2 * x), outputs(masked(net, {"0.weight": dead_rows(2, 6)}), 2 * x), rtol=1e-10, atol=1e-10
    )


def test_zero_padding_lets_only_zeros_pass() -> None:
    net = made(lambda: nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)))
    with torch.no_grad():
        net[1].bias.copy_(torch.tensor([-9, -9, -9, 9, 0, 0, 0, 0.0]))  # ReLU makes zeros of three of the constants
        net[0].bias.zero_()
    small, proof = slim(net, {"0.weight": dead_rows(4, 8)}, torch.randn(IMAGE))
    assert small[0].out_channels == 5
    assert (
        proof.rows[0].reason == "1 units stay: what they hold is not a constant, or one that zero padding would change"
    )


def test_a_dead_output_that_is_added_to_a_living_one_stays() -> None:
    small, proof = slim(made(Residual), {"outer.weight": dead_rows(4, 8)}, torch.randn(IMAGE))
    assert small.outer.out_channels == 8
    assert proof.left_out == {"stem": NOTHING_DEAD, "inner": NOTHING_DEAD, "head": OUTPUTS}


@pytest.mark.parametrize("turned", [False, True])
def test_constants_of_two_groups_add_up_in_one_reader(turned: bool) -> None:
    net, x = made(lambda: Concat(turned)).double(), torch.randn(IMAGE, dtype=torch.float64)
    masks = {"a.weight": dead_rows(2, 4), "b.weight": dead_rows(3, 6)}
    with torch.no_grad():
        net.norm.bias.abs_()
        net.norm.running_mean.copy_(-9 * torch.ones(10))
    small, _ = slim(net, masks, x)
    assert (small.a.out_channels, small.b.out_channels, small.head.in_channels) == (2, 3, 5)
    torch.testing.assert_close(outputs(small, x / 9), outputs(masked(net, masks), x / 9), rtol=1e-10, atol=1e-10)


class Gated(nn.Module):
    """Units that a second input switches off: bools, numbers of channels, or whether it is small."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.table = nn.Linear(6, 8), nn.Linear(8, 3), torch.tensor([0.0, 1, 1, 1, 1])

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        if gate.is_floating_point():
            on = (gate.abs().amax() < 6).to(x)
        else:
            on = gate.unsqueeze(-1) if gate.dtype == torch.bool else (gate[:, :1, None] > 3)
        return self.last(self.first(x).relu() * on).mean(1)


GATES = {
    "bools": (torch.ones(2, 7, dtype=torch.bool), torch.tensor([[True] * 3 + [False] * 4] * 2)),
    "integers": (torch.tensor([[5, 1, 1, 1], [6, 0, 2, 1]]), torch.tensor([[1, 5, 1, 1], [0, 6, 2, 1]])),
    "numbers": (torch.randn(2, 7), torch.full((2, 7), 9.0)),
}


@pytest.mark.parametrize("kind", GATES)
def test_constants_that_hang_on_another_input_are_none(kind: str) -> None:
    torch.manual_seed(0)
    net, x = Gated(), torch.randn(2, 7, 6)
    with torch.no_grad():
        net.first.bias.fill_(1.0)
    given, other = GATES[kind]
    small, proof = slim(net, {"first.weight": (torch.arange(8) % 2 == 0)[:, None]}, (x, given))
    assert proof.removed == 0
    assert proof.rows[0].reason.startswith("4 units stay")
    assert small(x, other).shape == (2, 3)


def test_inputs_that_cannot_be_varied_stay_as_they_are() -> None:
    """Attention with nothing to attend to is NaN, and lengths have to be in order."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(6, 8), nn.Linear(8, 3)

        def forward(self, x: Tensor, there: Tensor, lengths: Tensor) -> Tensor:
            assert lengths.tolist() == sorted(lengths.tolist(), reverse=True)
            weights = torch.zeros(there.shape, dtype=x.dtype).masked_fill(~there, float("-inf")).softmax(1)
            return self.last((self.first(x).relu() * weights.unsqueeze(-1)).sum(1))

    example = torch.randn(30, 2, 6), torch.ones(30, 2, dtype=torch.bool), torch.arange(30, 0, -1)
    assert slim(Masked(), {"last.weight": torch.arange(8) < 5}, example)[1].removed == 3


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_only_exact_constants_go_whatever_a_model_casts_to(dtype: torch.dtype) -> None:
    class Cast(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            layers = [
                nn.Conv2d(3, 8, 1),
                nn.Sigmoid(),
                nn.Conv2d(8, 8, 3, padding=1),
                nn.Flatten(),
                nn.Linear(8 * 64, 3),
            ]
            self.layers = nn.Sequential(*layers)

        def forward(self, x: Tensor) -> Tensor:
            return self.layers(x.to(dtype))

    net = made(Cast).to(dtype)
    masks = {"layers.0.weight": dead_rows(2, 8), "layers.0.bias": torch.arange(8) != 1}
    with torch.no_grad():
        net.layers[0].bias[0] = -99.0  # Sigmoid makes it zero, or nearly
    small, proof = slim(net, masks, torch.randn(IMAGE))
    assert proof.removed == 1
    assert small.layers[0].out_channels == 7
    assert proof.precision == torch.float64  # its cast too goes to float64 while outputs are compared


def test_unit_and_input_masks_together() -> None:
    net, x = made(Residual).double(), torch.randn(IMAGE, dtype=torch.float64)
    masks = {"stem.weight": dead_rows(3, 8), "outer.weight": dead_rows(3, 8) & (torch.arange(6) < 4).view(1, 6, 1, 1)}
    with torch.no_grad():
        net.inner.padding_mode = "reflect"
        net.inner._reversed_padding_repeated_twice = (1, 1, 1, 1)
    small, _ = slim(net, masks, x)
    assert (small.stem.out_channels, small.inner.out_channels) == (5, 4)
    torch.testing.assert_close(outputs(small, 2 * x), outputs(masked(net, masks), 2 * x), rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_trained_module_with_the_masks_of_its_callback() -> None:
    """Filters that DPF prunes are dead outputs; the module still hangs on its trainer."""
    module = Classifier(conv_net())
    callback = DPF("constant(0.5)", unit="filter", distribution="uniform", keep_dense="last", print_plan=False)
    trainer = fit(module, callback)
    x = torch.randn(3, 2, 5, 5)
    small, proof = slim(module, callback.masks, x)
    torch.testing.assert_close(outputs(small.net, x), outputs(module.net, x))
    assert proof.removed > 0
    assert module.trainer is trainer


class Woken(nn.Module):
    """Dead outputs of one layer are read by a branch of training, those of another are made in it."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.f, self.g, self.h = nn.Linear(8, 8), nn.Linear(8, 3), nn.Linear(8, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = self.a(x).relu()
        return (self.f(x), self.h(self.g(x).relu())) if self.training else self.f(x)


@pytest.mark.parametrize("name", ["a", "g"])
def test_dead_outputs_that_a_branch_of_training_reads_go(name: str) -> None:
    torch.manual_seed(0)
    net, x = Woken(), torch.randn(2, 8)
    mask = torch.ones_like(net.get_parameter(f"{name}.weight"), dtype=torch.bool)
    mask[0] = False
    small, proof = slim(net, {f"{name}.weight": mask}, x)
    assert proof.removed == 1
    full = masked(net, {f"{name}.weight": mask}).train()
    torch.testing.assert_close(small.train()(x), full(x))


def test_dead_outputs_that_nothing_is_seen_to_read_stay() -> None:
    class Sometimes(Woken):
        def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
            if self.training and len(x) == 1:
                raise ValueError("one is not enough to train on")
            return super().forward(x)

    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[0] = False
    _, proof = slim(Sometimes(), {"g.weight": mask}, torch.randn(1, 8))
    assert proof.removed == 0
