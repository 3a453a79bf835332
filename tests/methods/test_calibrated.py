"""Criteria of channels from derivatives on calibration batches: tables, and oracles that know no feature map."""

from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from oracles.calibrated import SOSP_QUADRATIC, SOSP_TANH, TAYLOR_2017
from support.calibrated import NETWORKS, Parts, everything, losses, network
from torch import Tensor, nn
from torch.autograd.functional import hvp
from torch.func import functional_call
from torch.nn import functional

from sparse_callbacks.channels.groups import Group, Member, channel_groups
from sparse_callbacks.core.calibration import BatchLoss
from sparse_callbacks.methods.channels.calibrated import (
    normalised,
    sosp,
    sosp_scores,
    taylor_2017,
    taylor_2017_scores,
)
from sparse_callbacks.methods.channels.criteria import unit_weights

D = torch.float64


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=D)


# ---------------------------------------------------------------------- tables


def test_taylor_2017_of_a_feature_map() -> None:
    scores = taylor_2017(tensor(TAYLOR_2017["activations"]), tensor(TAYLOR_2017["gradients"]))
    assert torch.allclose(scores, tensor(TAYLOR_2017["scores"]), rtol=1e-12, atol=0)
    # the table has ten digits
    assert torch.allclose(normalised(scores), tensor(TAYLOR_2017["normalised"]), rtol=0, atol=1e-10)
    assert torch.equal(normalised(torch.zeros(3)), torch.zeros(3))


def test_the_feature_map_of_the_table_in_a_network() -> None:
    """The layer reads the map itself, and the weights of the loss are the gradients of the table."""
    weights = tensor(TAYLOR_2017["gradients"])
    net = nn.Sequential(nn.Conv2d(2, 2, 1, bias=False), nn.Conv2d(2, 2, 1, bias=False)).double()
    for layer in net:
        layer.weight.data = torch.eye(2, dtype=D)[:, :, None, None]
    x = tensor(TAYLOR_2017["activations"])
    (group, _) = channel_groups(net, x)
    (found,) = taylor_2017_scores(net, [group], (BatchLoss((net(x) * weights).sum(), 2) for _ in range(2)))
    assert torch.allclose(found, tensor(TAYLOR_2017["normalised"]), rtol=0, atol=1e-10)


def test_sosp_of_a_quadratic_loss() -> None:
    theta, gradient, hessian = (tensor(SOSP_QUADRATIC[key]) for key in ("theta", "gradient", "hessian"))
    along = hessian @ theta
    assert torch.allclose(along, tensor(SOSP_QUADRATIC["along"]), rtol=1e-12, atol=0)
    first = (theta * gradient).view(2, 2).sum(1)
    assert torch.allclose(first.abs(), tensor(SOSP_QUADRATIC["first_order"]), rtol=1e-12, atol=0)
    found = sosp(first, (theta * along).view(2, 2).sum(1))
    assert torch.allclose(found, tensor(SOSP_QUADRATIC["saliency"]), rtol=1e-12, atol=0)


def test_sosp_of_a_network() -> None:
    net = nn.Sequential(nn.Linear(2, 4, bias=False), nn.Tanh(), nn.Linear(4, 1, bias=False)).double()
    net[0].weight.data, net[2].weight.data = tensor(SOSP_TANH["first"]), tensor(SOSP_TANH["second"])
    x, y = tensor(SOSP_TANH["inputs"]), tensor(SOSP_TANH["targets"])
    (group, _) = channel_groups(net, x)
    (found,) = sosp_scores(net, [group], everything([group]), [BatchLoss(0.5 * (net(x) - y).square().mean(), 4)])
    assert torch.allclose(found, tensor(SOSP_TANH["saliency"]), rtol=0, atol=1e-10)
    assert found.argsort().tolist() == SOSP_TANH["pruned_first"]


# ---------------------------------------------------------------------- Taylor, from the weights of the consumers alone


def slices_of(values: Tensor, member: Member, unit: int) -> Tensor:
    """The entries of a parameter that are a unit's."""
    return values.movedim(member.dim, 0)[member.units == unit]


def taylor_by_samples(net: nn.Module, group: Group, batches: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """The sum of a * dL/da over what a layer reads is that of w * dL/dw over the weights that read it, sample by sample."""
    found = torch.zeros(group.size, dtype=D)
    weights = [net.get_parameter(c.parameter) for c in group.consumers]
    for x, y in batches:
        for n in range(len(x)):
            loss = functional.cross_entropy(net(x[n : n + 1]), y[n : n + 1])
            gradients = torch.autograd.grad(loss, weights)
            for unit in range(group.size):
                parts = zip(group.consumers, weights, gradients, strict=True)
                found[unit] += sum(slices_of(w.detach() * g, c, unit).sum() for c, w, g in parts).abs()
    return found / found.norm()


@pytest.mark.parametrize("name", NETWORKS)
def test_taylor_is_that_of_the_weights_that_read_a_unit(name: str) -> None:
    net, groups, batches = network(name)
    for group, found in zip(groups, taylor_2017_scores(net, groups, losses(net, batches)), strict=True):
        # the order of sums differs
        assert torch.allclose(found, taylor_by_samples(net, group, batches), rtol=1e-8, atol=1e-12), group.name


def uneven(batches: Sequence[tuple[Tensor, Tensor]]) -> list[tuple[Tensor, Tensor]]:
    """The same samples in batches of 7, 4 and 1."""
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    return list(zip(x.split([7, 4, 1]), y.split([7, 4, 1]), strict=True))


@pytest.mark.parametrize("name", ["parts", "residual"])
def test_each_sample_counts_the_same_in_batches_of_any_size(name: str) -> None:
    net, groups, batches = network(name)
    whole = [(torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches]))]
    for group, found in zip(groups, taylor_2017_scores(net, groups, losses(net, uneven(batches))), strict=True):
        assert torch.allclose(found, taylor_by_samples(net, group, whole), rtol=1e-8, atol=1e-12), group.name
    live = everything(groups)
    found = sosp_scores(net, groups, live, losses(net, uneven(batches)))
    for group, one, other in zip(groups, found, sosp_by_hvp(net, groups, live, whole), strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-14), group.name  # the order of sums differs


def test_the_networks_have_units_of_every_kind() -> None:
    groups = [g for name in NETWORKS for g in network(name)[1]]
    assert any(len(g.consumers) > 1 for g in groups)
    assert any(len(g.producers) > 1 for g in groups)
    assert any(g.name.endswith("in_proj_weight") for g in groups)
    assert any(len(c.units) > g.size for g in groups for c in g.consumers)
    assert any(len(c.units) < len(p.units) for g in groups for c in g.consumers for p in g.producers)


@pytest.mark.parametrize("name", ["parts", "residual", "attention"])
def test_taylor_is_the_change_of_the_loss_when_a_unit_is_scaled(name: str) -> None:
    """Finite differences: of one sample the loss changes by the score when all that reads a unit reads more of it."""
    net, groups, batches = network(name)
    x, y = batches[0][0][:1], batches[0][1][:1]
    step = 1e-5
    for group, found in zip(groups, taylor_2017_scores(net, groups, losses(net, [(x, y)])), strict=True):
        changes = []
        for unit in range(group.size):
            values = []
            for factor in (1 + step, 1 - step):
                scaled = {}
                for consumer in group.consumers:
                    weight = net.get_parameter(consumer.parameter).detach()
                    gates = torch.where(consumer.units == unit, factor, 1.0).double()
                    shape = [-1 if d == consumer.dim else 1 for d in range(weight.ndim)]
                    scaled[consumer.parameter] = weight * gates.view(shape)
                with torch.no_grad():
                    values.append(float(functional.cross_entropy(functional_call(net, scaled, (x,)), y)))
            changes.append(abs(values[0] - values[1]) / (2 * step))
        expected = tensor(changes) / tensor(changes).norm()
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-7), group.name  # the error of central differences


def test_signs_count_until_the_sum_over_consumers() -> None:
    """What helps one reader as much as it harms the other is of no importance."""
    net = Parts().double().eval()
    (group,) = [g for g in channel_groups(net, torch.zeros(1, 2, 5, 5, dtype=D)) if g.name == "one"]
    assert len(group.consumers) == 2

    def loss() -> Iterator[BatchLoss]:
        x = torch.ones(3, 6, 4, 4, dtype=D)
        a, b = nn.functional.conv_transpose2d(x, net.up.weight), nn.functional.conv2d(x, net.side.weight, padding=1)
        yield BatchLoss(a[:, :, 1:-1, 1:-1].sum() - b[:, :, 1:-1, 1:-1].sum(), 3)

    with torch.no_grad():
        net.side.weight[:] = net.up.weight.transpose(0, 1).flip(2, 3)
        net.up.weight[0] *= 2
    (found,) = taylor_2017_scores(net, [group], loss())
    assert found[0] > 0.99
    assert found[1:].max() < 1e-10


def test_frozen_layers_before_a_consumer_do_not_matter() -> None:
    net, groups, batches = network("residual")
    expected = taylor_2017_scores(net, groups, losses(net, batches))
    net[0].requires_grad_(False)
    net[1].requires_grad_(False)
    for one, other in zip(expected, taylor_2017_scores(net, groups, losses(net, batches)), strict=True):
        assert torch.equal(one, other)


def test_channels_that_cannot_be_told_apart_are_refused() -> None:
    net = nn.Linear(6, 2)
    member = Member("", "weight", 1, "in", torch.arange(4))
    with pytest.raises(
        ValueError, match=r"weight reads 6 channels, and its channels are known as 4\. .*exclude=.*'l1'"
    ):
        taylor_2017_scores(
            net, [Group("maker", 4, (), (member,), ())], (BatchLoss(net(torch.ones(3, 6)).sum(), 3) for _ in range(1))
        )


def test_products_of_half_precision_are_made_in_float32() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2)).bfloat16()
    (group, _) = channel_groups(net, torch.zeros(1, 3, dtype=torch.bfloat16))
    x = torch.ones(2, 3, dtype=torch.bfloat16)
    (found,) = taylor_2017_scores(net, [group], (BatchLoss(net(x).sum(), 2) for _ in range(1)))
    assert found.dtype == torch.float32
    (found,) = sosp_scores(net, [group], everything([group]), (BatchLoss(net(x).sum(), 2) for _ in range(1)))
    assert found.dtype == torch.float32


@pytest.mark.parametrize("scores", [taylor_2017_scores, lambda *a: sosp_scores(*a[:2], everything(a[1]), a[2])])
def test_a_group_that_the_loss_does_not_depend_on_is_refused_by_name(scores: Any) -> None:
    net, groups, batches = network("residual")

    def apart() -> Any:
        for x, _ in batches:
            yield BatchLoss(net[1](net[0](x)).square().mean(), len(x))

    with pytest.raises(ValueError, match=r"does not depend on the channels of (0|3\.one), .*exclude=.*'l1'"):
        scores(net, groups, apart())


# ---------------------------------------------------------------------- SOSP, by torch's own product with a Hessian


def sosp_by_hvp(
    net: nn.Module, groups: Sequence[Group], live: Sequence[Tensor], batches: Sequence[tuple[Tensor, Tensor]]
) -> list[Tensor]:
    names = sorted({m.parameter for g in groups for m in unit_weights(net, g)})
    weights = tuple(net.get_parameter(n).detach() for n in names)
    theta = {n: torch.zeros_like(w) for n, w in zip(names, weights, strict=True)}
    for group, alive in zip(groups, live, strict=True):
        for member in unit_weights(net, group):
            for unit in alive.nonzero()[:, 0].tolist():
                at = (member.units == unit).nonzero()[:, 0]
                values = net.get_parameter(member.parameter).detach().index_select(member.dim, at)
                theta[member.parameter].index_copy_(member.dim, at, values)

    def mean_loss(*values: Tensor) -> Tensor:
        parameters = dict(zip(names, values, strict=True))
        each = [functional.cross_entropy(functional_call(net, parameters, (x,)), y) for x, y in batches]
        return torch.stack(each).mean()

    gradients = torch.autograd.functional.vjp(mean_loss, weights)[1]
    _, products = hvp(mean_loss, weights, tuple(theta[n] for n in names))
    first, second = (dict(zip(names, v, strict=True)) for v in (gradients, products))
    found = []
    for group in groups:
        own = unit_weights(net, group)
        rows = []
        for unit in range(group.size):
            dots = [
                sum(slices_of(theta[m.parameter] * of[m.parameter], m, unit).sum() for m in own)
                for of in (first, second)
            ]
            rows.append(abs(float(dots[0])) + 0.5 * abs(float(dots[1])))
        found.append(tensor(rows))
    return found


@pytest.mark.parametrize("name", ["parts", "residual"])
def test_sosp_is_that_of_torchs_hessian_products(name: str) -> None:
    net, groups, batches = network(name)
    live = everything(groups)
    live[0][1] = False
    found = sosp_scores(net, groups, live, losses(net, batches))
    for group, one, other in zip(groups, found, sosp_by_hvp(net, groups, live, batches), strict=True):
        assert torch.allclose(one, other, rtol=1e-8, atol=1e-14), group.name  # the order of sums differs
    assert found[0][1] == 0


def test_sosp_of_attention_by_differences_of_gradients() -> None:
    net, groups, batches = network("attention")
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        found = sosp_scores(net, groups, everything(groups), losses(net, batches))
    members = [unit_weights(net, g) for g in groups]
    weights = list({m.parameter: net.get_parameter(m.parameter) for own in members for m in own}.values())
    theta = [w.detach().clone() for w in weights]  # every slice of these weights is of a unit
    sides = []
    for step in (1e-5, -1e-5):
        for w, t in zip(weights, theta, strict=True):
            w.data = t * (1 + step)
        sides.append(torch.autograd.grad(torch.stack([b.loss for b in losses(net, batches)]).mean(), weights))
    for w, t in zip(weights, theta, strict=True):
        w.data = t
    gradients = torch.autograd.grad(torch.stack([b.loss for b in losses(net, batches)]).mean(), weights)
    for group, own, one in zip(groups, members, found, strict=True):
        for unit in range(group.size):
            first = second = 0.0
            for member in own:
                at = next(i for i, w in enumerate(weights) if w is net.get_parameter(member.parameter))
                along = (sides[0][at] - sides[1][at]) / 2e-5
                first += float(slices_of(theta[at] * gradients[at], member, unit).sum())
                second += float(slices_of(theta[at] * along, member, unit).sum())
            # the error of central differences
            assert float(one[unit]) == pytest.approx(abs(first) + 0.5 * abs(second), rel=1e-4, abs=1e-8)


def test_weights_of_a_unit_are_filters_and_depthwise_weights() -> None:
    net, groups, _ = network("parts")
    by_name = {g.name: [m.parameter for m in unit_weights(net, g)] for g in groups}
    assert by_name["split"] == ["split.weight", "deep.weight"]
    assert by_name["stem"] == ["stem.weight"]  # and not its norm
    net, groups, _ = network("attention")
    assert [m.parameter for m in unit_weights(net, groups[0])] == ["layer.self_attn.in_proj_weight"]  # and no bias


def test_frozen_weights_are_scored_and_stay_frozen() -> None:
    net, groups, batches = network("residual")
    expected = sosp_scores(net, groups, everything(groups), losses(net, batches))
    net[0].requires_grad_(False)
    found = sosp_scores(net, groups, everything(groups), losses(net, batches))
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    assert [p.requires_grad for p in net.parameters()] == [False, False, *[True] * (len(list(net.parameters())) - 2)]


def test_one_hessian_product_for_each_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    net, groups, batches = network("residual")
    calls, real = [], torch.autograd.grad

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(options.get("create_graph", False))
        return real(*args, **options)

    monkeypatch.setattr(torch.autograd, "grad", counted)
    sosp_scores(net, groups, everything(groups), losses(net, batches))
    assert calls == [True, False] * len(batches)
