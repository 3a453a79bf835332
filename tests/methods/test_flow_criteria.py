"""CroP and GraSP on channels: tables, gates that exist, and which units of pruned networks count."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracles.early_crop import GATES
from support.calibrated import NETWORKS, everything, losses, network
from support.pruning import at_once, scored
from support.smcp import conv_net
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from sparse_callbacks import ChannelPruning
from sparse_callbacks.channels.groups import Group, Member, channel_groups
from sparse_callbacks.core.calibration import BatchLoss
from sparse_callbacks.core.scores import Losses
from sparse_callbacks.methods.channels.flow_criteria import CroP, GraSP, gate_flow
from sparse_callbacks.methods.channels.rankings import best_of_groups
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit

D = torch.float64


def of_batches(net: nn.Module, batches: Sequence[tuple[Tensor, Tensor]]) -> Losses:
    @contextmanager
    def each(order: int) -> Iterator[Any]:
        yield losses(net, batches)

    return each


def of_loss(make: Any) -> Losses:
    @contextmanager
    def each(order: int) -> Iterator[Any]:
        yield [BatchLoss(make(), None)]

    return each


# ---------------------------------------------------------------------- tables


@pytest.mark.parametrize("name", GATES)
def test_the_table(name: str) -> None:
    table = {key: torch.tensor(value) for key, value in GATES[name].items()}
    net = nn.Sequential(
        nn.Linear(3, 4, bias=False), nn.ReLU() if name == "relu" else nn.Identity(), nn.Linear(4, 2, bias=False)
    ).double()
    net[0].weight.data, net[2].weight.data = (torch.tensor(GATES[name][k], dtype=D) for k in ("first", "second"))
    x, y = (torch.tensor(GATES[name][k], dtype=D) for k in ("inputs", "targets"))
    (group, _) = channel_groups(net, x)

    def loss() -> Tensor:
        return 0.5 * (net(x) - y).square().sum(1).mean()

    (flow,) = gate_flow(net, [group], everything([group]), of_loss(loss))
    # the table has ten digits
    assert torch.allclose(flow, torch.tensor(GATES[name]["flow"], dtype=D), rtol=0, atol=1e-9)
    (kept,) = best_of_groups([flow.abs()], [2], [1])
    assert kept.nonzero()[:, 0].tolist() == table["crop_kept"].tolist()
    (kept,) = best_of_groups([flow], [2], [1])
    assert kept.nonzero()[:, 0].tolist() == table["grasp_kept"].tolist()


@pytest.mark.parametrize(("rule", "name"), [(CroP, "crop_kept"), (GraSP, "grasp_kept")], ids=["crop", "grasp"])
def test_the_criteria_rank_by_their_own_sign(rule: Any, name: str) -> None:
    """Through the criterion itself, on a host that knows one loss."""
    net = nn.Sequential(nn.Linear(3, 4, bias=False), nn.ReLU(), nn.Linear(4, 2, bias=False)).double()
    net[0].weight.data, net[2].weight.data = (torch.tensor(GATES["relu"][k], dtype=D) for k in ("first", "second"))
    x, y = (torch.tensor(GATES["relu"][k], dtype=D) for k in ("inputs", "targets"))

    class Host:
        def calibration(self, *_: Any, **__: Any) -> Any:
            class Calibration:
                def losses(self, order: int, limit: int | None) -> Any:
                    return of_loss(lambda: 0.5 * (net(x) - y).square().sum(1).mean())(order)

            return Calibration()

    found = scored(net, groups=[channel_groups(net, x)[0]], host=Host())
    (kept,) = best_of_groups(rule().scores(found, 0), [2], [1])
    assert kept.nonzero()[:, 0].tolist() == GATES["relu"][name]


# ---------------------------------------------------------------------- gates that exist


def slices(member: Member, gates: Tensor, ndim: int) -> Tensor:
    padded = torch.cat([gates, torch.ones(1, dtype=gates.dtype)])  # units of -1 are of other groups
    return padded[member.units].view([-1 if d == member.dim else 1 for d in range(ndim)])


def flow_of_real_gates(
    net: nn.Module, groups: Sequence[Group], live: Sequence[Tensor], batches: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    """d/dc of <g(1), g(c)>: gates are multiplied onto the weights that read the units, and torch differentiates twice."""
    base = {n: p.detach().clone().requires_grad_() for n, p in net.named_parameters()}
    weights = [p for p in base.values() if p.ndim > 1]
    gates = [alive.to(D).requires_grad_() for alive in live]

    def gradient() -> tuple[Tensor, ...]:
        used = dict(base)
        for group, own in zip(groups, gates, strict=True):
            for member in group.consumers:
                used[member.parameter] = used[member.parameter] * slices(member, own, base[member.parameter].ndim)
        each = [functional.cross_entropy(functional_call(net, used, (x,)), y) for x, y in batches]
        return torch.autograd.grad(torch.stack(each).mean(), weights, create_graph=True)

    now = gradient()
    z = sum((g.detach() * g).sum() for g in now)
    return list(torch.autograd.grad(z, gates))


@pytest.mark.parametrize("name", NETWORKS)
def test_it_is_the_derivative_by_gates_that_exist(name: str) -> None:
    net, groups, batches = network(name)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = gate_flow(net, groups, everything(groups), of_batches(net, batches))
        expected = flow_of_real_gates(net, groups, everything(groups), batches)
    for group, one, other in zip(groups, found, expected, strict=True):
        assert float(one.abs().max()) > 0
        # the order of sums differs
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-12), group.name


@pytest.mark.parametrize("name", ["parts", "residual"])
def test_units_that_are_gone_have_gates_of_zero(name: str) -> None:
    net, groups, batches = network(name)
    live = everything(groups)
    live[0][:2] = False
    expected = flow_of_real_gates(net, groups, live, batches)
    for group, alive in zip(groups, live, strict=True):
        for key, mask in group.masks(net, alive).items():
            net.get_parameter(key).data *= mask
    found = gate_flow(net, groups, live, of_batches(net, batches))
    for group, alive, one, other in zip(groups, live, found, expected, strict=True):
        assert torch.allclose(one[alive], other[alive], rtol=1e-8, atol=1e-12), group.name


def test_scores_of_half_precision_are_float32() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).bfloat16()
    (group, _) = channel_groups(net, torch.zeros(1, 3, dtype=torch.bfloat16))
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    (found,) = gate_flow(net, [group], everything([group]), of_loss(lambda: net(x).square().sum()))
    assert found.dtype == torch.float32


def test_a_group_that_the_loss_does_not_depend_on_is_refused_by_name() -> None:
    net, groups, batches = network("residual")
    with pytest.raises(ValueError, match=r"does not depend on the layers that read (0|3\.one), .*exclude=.*'l1'"):
        gate_flow(net, groups, everything(groups), of_loss(lambda: net[1](net[0](batches[0][0])).square().mean()))


# ---------------------------------------------------------------------- in runs


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    "options", [{"criterion": "crop"}, {"criterion": "grasp", "ranking": "global"}], ids=["crop", "grasp"]
)
def test_a_trainer_prunes_by_it(options: dict[str, Any]) -> None:
    callback, module = at_once(0.4, step=3, batches=2, **options), Classifier(conv_net())
    fit(module, callback)
    assert callback.at_target
    assert callback.network.realised(callback.kept) <= 0.4 * callback.network.dense


def test_grasp_takes_no_knapsack() -> None:
    with pytest.raises(
        ValueError, match=r"ranking='knapsack' cannot be used with criterion='grasp', whose scores may be neg"
    ):
        ChannelPruning(0.5, criterion="grasp")
