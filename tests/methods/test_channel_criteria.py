"""Criteria of ChannelPruning: what they score a channel by, against tables and gates that are really there."""

import ast
import functools
import re
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.channels import FILTERS, GATES, PRUNINGS
from support.pruning import announced, at_once, pruning, scored
from support.smcp import Residual, conv_net, normed
from support.smcp_encoder import Encoder
from torch import Tensor, nn

from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.methods.channels import gate_criteria
from sparse_callbacks.methods.channels.criteria import CRITERIA
from sparse_callbacks.methods.channels.gate_criteria import GateTaylor, gate_gradients, gates_of_slices
from sparse_callbacks.methods.channels.rankings import removals
from sparse_callbacks.methods.channels.weight_criteria import filter_norms
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")
IMAGE = torch.zeros(1, 2, 5, 5)


def scores(criterion: str, network: Any, number: int = 0) -> list[Tensor]:
    return CRITERIA[criterion]().scores(network, number)


def ids(model: nn.Module) -> set[int]:
    return {id(p) for p in model.parameters()}


# ---------------------------------------------------------------------- norms


def test_the_l1_norms_of_filters_and_the_smallest_ones_of_a_layer() -> None:
    weight = torch.tensor(FILTERS["weight"])
    found = filter_norms(weight, 0, 1)
    assert found.tolist() == pytest.approx(FILTERS["l1"])
    order = removals([torch.arange(1, 5)], [found], [1])[: FILTERS["prune"]]
    assert [count for _, count in order] == [3, 2]
    assert found.argsort()[: FILTERS["prune"]].sort().values.tolist() == FILTERS["pruned"]


def test_one_pruning_by_l1_removes_the_filters_of_the_table() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 2, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 4))
    net[0].weight.data = torch.tensor(FILTERS["weight"])

    class OneColour(Classifier):
        def loss(self, batch: Any) -> Tensor:
            return nn.functional.cross_entropy(self.net(batch[0][:, :1, :3, :3]), batch[1])

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x[:, :1, :3, :3])

    callback = at_once(0.5, criterion="l1", ranking="layer")
    fit(OneColour(net), callback, max_steps=1)
    assert [(~live).nonzero().flatten().tolist() for live in callback.live] == [FILTERS["pruned"]]


@pytest.mark.parametrize(("criterion", "order"), [("l1", 1), ("l2", 2)])
def test_norms_are_summed_over_producers_and_depthwise_weights_count(criterion: str, order: int) -> None:
    net = conv_net()
    by_group = dict(zip(["0", "3.one", "6"], scores(criterion, scored(net, IMAGE)), strict=True))

    def norms(*layers: nn.Module) -> Tensor:
        return sum(torch.stack([w.norm(order) for w in layer.weight]) for layer in layers)

    assert torch.allclose(by_group["0"], norms(net[0], net[3].two, net[4]))  # a residual sum, and a depthwise layer
    assert torch.allclose(by_group["3.one"], norms(net[3].one))
    assert torch.allclose(by_group["6"], norms(net[6]))


def test_norms_of_transposed_convolutions_and_of_parts_of_a_unit() -> None:
    net = nn.Sequential(nn.ConvTranspose2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 2, 1))
    assert torch.allclose(scores("l1", scored(net, IMAGE))[0], net[0].weight.abs().sum((0, 2, 3)))
    grouped = nn.Sequential(nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 2, 1))
    (first, _) = scores("l1", scored(grouped, IMAGE))
    rows = grouped[0].weight.abs().sum((1, 2, 3))
    assert torch.allclose(first, rows[:2] + rows[2:])  # the second loses the same inputs in both of its groups


def test_random_scores_derive_from_seed_step_and_group() -> None:
    draws = []
    for seed in (0, 0, 1):
        callback = pruning(0.4, criterion="random", seed=seed)
        fit(Classifier(conv_net()), callback)
        draws.append(torch.cat(callback.live).tolist())
    assert draws[0] == draws[1] != draws[2]
    network = scored(conv_net(), IMAGE)
    one, other = scores("random", network, 1), scores("random", network, 2)
    assert all(not torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert not torch.equal(one[0], one[1])  # of the same size


# ---------------------------------------------------------------------- gains of norms


def test_gains_are_summed_over_the_norms_of_a_group() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), nn.Flatten(), nn.Linear(200, 4)
    )
    gains = [net[1].weight, net[3].norms[0].weight, net[3].norms[1].weight]
    for gain in gains:
        nn.init.normal_(gain)
    found = scores("bn_gain", scored(net, IMAGE))
    assert torch.equal(found[0], gains[0].abs() + gains[2].abs())
    assert torch.equal(found[1], gains[1].abs())


def test_groups_without_a_norm_are_refused_by_name() -> None:
    net = nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4, affine=False),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.Flatten(),
        nn.Linear(4, 4),
    )
    with pytest.raises(
        ValueError,
        match=r"the outputs of net\.0 pass through none.*exclude=\['net\.0\.weight'\], or give another criterion",
    ):
        fit(Classifier(net), at_once(criterion="bn_gain"))
    fit(Classifier(net), at_once(0.9, criterion="bn_gain", exclude=["net.0.weight"]), max_steps=1)


class WithHeads(nn.Module):
    """Two convolutions with norms, and a transformer layer without any that has a gain for each channel."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.Sequential(
            nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.Conv2d(8, 6, 1)
        )
        self.encoder, self.last = Encoder(), nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.encoder(self.convolutions(x).flatten(2).mT))


def test_the_advice_beside_groups_without_a_norm_can_be_followed() -> None:
    module = Classifier(WithHeads())
    with pytest.raises(ValueError, match=r"net\.encoder\.layer\.self_attn\.in_proj_weight") as refused:
        fit(module, at_once(criterion="bn_gain"))
    advice = re.search(r"exclude=(\[.*?\])", str(refused.value))
    assert advice
    callback = at_once(0.99, criterion="bn_gain", exclude=ast.literal_eval(advice[1]))
    fit(module, callback, max_steps=1)
    assert [g.name for g in callback.groups] == ["net.convolutions.0"]


Masks = list[dict[str, Tensor]]


def with_penalty(penalty: float, clip: float | None) -> tuple[list[Tensor], Masks]:
    """The gains of a norm after each batch, and the masks before the first one and after each."""
    callback, module = pruning(0.6, criterion="bn_gain", penalty=penalty, stop=8, round_to=1), Classifier(normed())
    gains: list[Tensor] = []
    masks: Masks = []

    def note(*_: Any) -> None:
        masks.append({n: m.clone() for n, m in callback.masks.items()})
        gains.append(module.net[1].weight.detach().clone())

    begin = pl.callbacks.LambdaCallback(on_train_start=note)
    fit(module, callback, begin, watch(note), gradient_clip_val=clip, precision="64-true")
    assert callback.updates > 1
    return gains[1:], masks


def by_hand(penalty: float, clip: float | None, masks: Masks) -> list[Tensor]:
    """The same gains in a plain loop with these masks, whose penalty ends with the pruning of step 8."""
    module, gains = Classifier(normed()), []
    configured = module.configure_optimizers()
    optimizer, rates = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    weights = dict(module.named_parameters())
    for number, (x, y) in enumerate(Batches().all(2), start=1):
        optimizer.zero_grad()
        module.loss((x.double(), y)).backward()
        for name, mask in masks[number - 1].items():
            weights[name].grad.mul_(mask)
        for norm in (module.net[1], module.net[4], module.net[6]) if number <= 8 else ():
            norm.weight.grad.add_(penalty * norm.weight.detach().sign())
        if clip is not None:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
        rates.step()
        for name, mask in masks[number].items():
            weights[name].data.mul_(mask)
        gains.append(module.net[1].weight.detach().clone())
    return gains


@pytest.mark.parametrize("clip", [None, 0.05])
def test_the_penalty_joins_the_gradient_before_the_clip_until_the_last_pruning(clip: float | None) -> None:
    gains, masks = with_penalty(0.1, clip)
    assert all(torch.allclose(a, b, rtol=1e-9) for a, b in zip(gains, by_hand(0.1, clip, masks), strict=True))
    assert not torch.allclose(gains[0], with_penalty(0.0, clip)[0][0], rtol=1e-6)


def test_gains_in_an_optimizer_of_their_own_are_refused_unless_there_is_no_penalty() -> None:
    class Apart(Classifier):
        def __init__(self) -> None:
            super().__init__(normed())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizers = self.optimizers()
            for optimizer in optimizers:
                optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            for optimizer in optimizers:
                optimizer.step()

        def configure_optimizers(self) -> Any:
            norms = [p for n, p in self.named_parameters() if p.ndim == 1]
            return [
                torch.optim.SGD([p for p in self.parameters() if p.ndim > 1], lr=0.1),
                torch.optim.SGD(norms, lr=0.1),
            ]

    with pytest.raises(
        ValueError, match=r"gradients of net\.1\.weight, net\.4\.weight.*without any weight that may be pruned"
    ):
        fit(Apart(), pruning(criterion="bn_gain"))
    fit(Apart(), pruning(criterion="bn_gain", penalty=0), max_steps=2)


# ---------------------------------------------------------------------- gates


def test_gates_of_the_table() -> None:
    x, y = torch.tensor(GATES["x"]), torch.tensor(GATES["y"])
    first, second = (nn.Parameter(torch.tensor(GATES[key])) for key in ("first", "second"))

    def loss(rows: slice) -> Tensor:
        return 0.5 * ((x[rows] @ first.T).relu() @ second.T - y[rows]).square().sum(1).mean()

    (gradient,) = torch.autograd.grad(loss(slice(0, 3)), first)
    gates = gates_of_slices(first, gradient)
    assert gates.square().tolist() == pytest.approx(GATES["squared_batch"], abs=1e-6)
    each = torch.stack([gates_of_slices(first, torch.autograd.grad(loss(slice(i, i + 1)), first)[0]) for i in range(3)])
    assert torch.allclose(each, torch.tensor(GATES["by_sample"]), atol=1e-6)
    # other criteria: the squares of samples, and of the products for each weight
    assert each.square().mean(0).tolist() == pytest.approx(GATES["squared_samples"], abs=1e-6)
    assert (first * gradient).square().sum(1).tolist() == pytest.approx(GATES["squared_products"], abs=1e-6)


class Gated(nn.Module):
    """A gate of one on the channels that a module gives."""

    def __init__(self, inner: nn.Module, size: int) -> None:
        super().__init__()
        self.inner, self.gate = inner, nn.Parameter(torch.ones(size, dtype=torch.float64))

    def forward(self, x: Tensor) -> Tensor:
        out = self.inner(x)
        return out * self.gate.view(1, -1, *[1] * (out.ndim - 2))


def plain() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Flatten())


def with_norm() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Flatten())


def transposed() -> nn.Sequential:
    return nn.Sequential(nn.ConvTranspose2d(2, 6, 3), nn.Tanh(), nn.Conv2d(6, 4, 7), nn.Flatten())


def depthwise() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.Tanh(), nn.Conv2d(6, 6, 2, groups=6), nn.Conv2d(6, 4, 2), nn.Flatten()
    )


def linear() -> nn.Sequential:
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 6), nn.Tanh(), nn.Linear(6, 4))


@pytest.mark.parametrize(
    ("make", "gated"),
    [(plain, 0), (with_norm, 1), (transposed, 0), (depthwise, 1), (linear, 1)],
    ids=["convolution", "norm", "transposed", "depthwise", "linear"],
)
@pytest.mark.parametrize("bias", [True, False])
def test_gates_that_are_not_there_have_the_gradient_of_gates_that_are(
    make: Callable[[], nn.Sequential], gated: int, bias: bool
) -> None:
    torch.manual_seed(0)
    net = make().double()
    for module in net:
        if not bias and isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            module.bias = None
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight), nn.init.normal_(module.bias)
    network = scored(net, IMAGE.double())
    x, y = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.randint(4, (5,))
    nn.functional.cross_entropy(net(x), y).backward()
    found = gate_gradients(network.groups[:1], net, network.norm_behind, ids(net))[0]
    there = Gated(net[gated], 6)
    net[gated] = there
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    assert torch.allclose(found, there.gate.grad, rtol=1e-9)
    assert found.abs().min() > 1e-6


def residual() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), Residual(8), nn.Flatten(), nn.Linear(200, 4)
    ).double()


def test_gates_of_a_residual_sum_are_summed_over_its_producers() -> None:
    net = residual()
    network = scored(net, IMAGE.double())
    x, y = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.randint(4, (5,))
    nn.functional.cross_entropy(net(x), y).backward()
    found = gate_gradients(network.groups[:1], net, network.norm_behind, ids(net))[0]
    both = [Gated(net[1], 8), Gated(net[3].norms[1], 8)]
    net[1], net[3].norms[1] = both
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    one, other = (gated.gate.grad for gated in both)
    assert torch.allclose(found, one + other, rtol=1e-9)
    assert not torch.allclose(found.square(), one.square() + other.square())


def frozen_gain(net: nn.Sequential) -> None:
    net[1].weight.requires_grad_(False)


def without_gain(net: nn.Sequential) -> None:
    net[1] = nn.BatchNorm2d(6, affine=False).double()


@pytest.mark.parametrize("change", [frozen_gain, without_gain])
def test_where_a_norm_has_no_gradient_the_gates_stand_before_the_consumers(
    change: Callable[[nn.Sequential], None],
) -> None:
    torch.manual_seed(0)
    net = with_norm().double()
    change(net)
    network = scored(net, IMAGE.double())
    x, y = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.randint(4, (5,))
    nn.functional.cross_entropy(net(x), y).backward()
    found = gate_gradients(network.groups[:1], net, network.norm_behind, ids(net))[0]
    net[2] = Gated(net[2], 6)
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    assert torch.allclose(found, net[2].gate.grad, rtol=1e-9)


def behind_activation() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.Flatten())


def behind_pooling() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 2), nn.MaxPool2d(2), nn.BatchNorm2d(6), nn.Conv2d(6, 4, 2), nn.Flatten())


def behind_depthwise() -> nn.Sequential:
    return nn.Sequential(
        *(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)),
        *(nn.BatchNorm2d(6), nn.Conv2d(6, 4, 3), nn.Flatten()),
    )


def instance_norm() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.InstanceNorm2d(6, affine=True), nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten()
    )


def instance_norm_without_parameters() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.InstanceNorm2d(6), nn.Conv2d(6, 4, 3), nn.Flatten())


def norm_over_positions() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3), nn.ReLU(), nn.LayerNorm([3, 3]), nn.Conv2d(6, 4, 3), nn.Flatten())


class OwnNorm(nn.Module):
    """A norm that is not of torch's classes: a function of torch, or written out."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.weight, self.bias = kind, nn.Parameter(torch.ones(6)), nn.Parameter(torch.rand(6))

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "instance":
            return nn.functional.instance_norm(x, weight=self.weight, bias=self.bias)
        if self.kind == "batch":
            return nn.functional.batch_norm(x, None, None, self.weight, self.bias, training=True)
        centred = x - x.mean((0, 2, 3), keepdim=True)
        normal = centred / (centred.square().mean((0, 2, 3), keepdim=True) + 1e-5).sqrt()
        return normal * self.weight.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)


def own_norm(kind: str) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(2, 6, 3), OwnNorm(kind), nn.Tanh(), nn.Conv2d(6, 4, 3), nn.Flatten())


@pytest.mark.parametrize(
    "make",
    [
        *(functools.partial(own_norm, kind) for kind in ("instance", "batch", "written out")),
        behind_activation,
        behind_pooling,
        behind_depthwise,
        instance_norm,
        instance_norm_without_parameters,
        norm_over_positions,
    ],
)
def test_where_a_norm_follows_later_the_gates_stand_before_the_consumers(make: Callable[[], nn.Sequential]) -> None:
    torch.manual_seed(0)
    net = make().double()
    network = scored(net, IMAGE.double())
    x, y = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.randint(4, (5,))
    nn.functional.cross_entropy(net(x), y).backward()
    found = gate_gradients(network.groups[:1], net, network.norm_behind, ids(net))[0]
    last = len(net) - 3  # what the layer that reads the channels takes
    net[last] = Gated(net[last], 6)
    net.zero_grad()
    nn.functional.cross_entropy(net(x), y).backward()
    assert torch.allclose(found, net[last].gate.grad, rtol=1e-9)
    assert found.abs().min() > 1e-6


def test_the_gate_of_a_head_stands_on_its_output() -> None:
    net = Encoder().double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    network = scored(net, x)
    heads = next(g for g in network.groups if g.size == 6)
    (net(x) - 1).square().mean().backward()
    found = gate_gradients([heads], net, network.norm_behind, ids(net))[0]
    out = net.layer.self_attn.out_proj
    expected = (out.weight * out.weight.grad).sum(0).view(6, 4).sum(1)
    assert torch.allclose(found, expected, rtol=1e-9)


class Dense(nn.Module):
    """Each layer reads the outputs of all layers before it, behind a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(2, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4 * n) for n in range(1, 5))
        self.layers = nn.ModuleList(nn.Conv2d(4 * n, 4, 1) for n in range(1, 5))

    def forward(self, x: Tensor) -> Tensor:
        features = [self.first(x)]
        for norm, layer in zip(self.norms, self.layers, strict=True):
            features.append(layer(norm(torch.cat(features, 1)).relu()))
        return features[-1].flatten(1)


def test_the_gates_of_a_layer_that_reads_many_groups_are_computed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    net = Dense()
    network, computed = scored(net, IMAGE), []

    def counted(weight: Tensor, gradient: Tensor, dim: int = 0) -> Tensor:
        computed.append(weight)
        return gates_of_slices(weight, gradient, dim)

    monkeypatch.setattr(gate_criteria, "gates_of_slices", counted)
    net(torch.randn(3, 2, 5, 5)).square().sum().backward()
    found = gate_gradients(network.groups, net, network.norm_behind, ids(net))
    assert [g.size for g in network.groups] == [4] * 4
    assert [len(g.consumers) for g in network.groups] == [4, 3, 2, 1]
    assert len(computed) == 4
    for place, (group, gates) in enumerate(zip(network.groups, found, strict=True)):
        readers = net.layers[place:]
        slices = slice(4 * place, 4 * place + 4)
        expected = sum((r.weight * r.weight.grad).sum((0, 2, 3))[slices] for r in readers)
        assert torch.allclose(gates, expected, rtol=1e-4, atol=1e-6), group.name


def test_without_gradients_a_step_says_nothing() -> None:
    net = plain()
    network = scored(net, IMAGE)
    assert gate_gradients(network.groups, net, {}, ids(net)) == [None]


def test_two_prunings_with_momentum(monkeypatch: pytest.MonkeyPatch) -> None:
    """Gradients at gates are those of the table; what is pruned stays pruned and counts nothing."""
    model = nn.ParameterDict({"one": torch.ones(1, 4), "two": torch.ones(1, 3)})
    groups = [
        Group(name, size, (), (Member("", name, 1, "in", torch.arange(size)),), ())
        for name, size in (("one", 4), ("two", 3))
    ]
    network, rule = scored(model, groups=groups), GateTaylor()
    rule.begin(network)
    batch: dict[str, Tensor] = {}
    monkeypatch.setattr(gate_criteria, "gate_gradients", lambda groups, *_: [batch[g.name] for g in groups])

    def train(gradients: Any) -> list[Tensor]:
        for one, two in zip(*gradients, strict=True):
            batch.update(one=torch.tensor(one), two=torch.tensor(two))
            rule.before_step(network, announced(network), last=False)
            rule.after_step(network, announced(network))
        return rule.scores(network, 0)

    def lowest(found: list[Tensor]) -> list[tuple[int, int]]:
        options = [torch.arange(int(live.sum()) + 1) for live in network.live]
        among = [s.masked_fill(~live, -torch.inf) for s, live in zip(found, network.live, strict=True)]
        units = [s.argsort(descending=True, stable=True).tolist() for s in among]
        return sorted((g, units[g][count]) for g, count in removals(options, among, [1, 1])[:2])

    first = train(PRUNINGS["before_first"])
    for found, expected in zip(first, PRUNINGS["first"], strict=True):
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert lowest(first) == PRUNINGS["pruned_first"]
    for group, unit in PRUNINGS["pruned_first"]:
        network.live[group][unit] = False
    rule.after_update(network, [0, 1])
    second = train(PRUNINGS["before_second"])
    for found, expected in zip(second, PRUNINGS["second"], strict=True):
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    assert lowest(second) == PRUNINGS["pruned_second"]
    alone = [torch.tensor(g).square().mean(0) for g in PRUNINGS["before_second"]]
    assert lowest(alone) == PRUNINGS["pruned_second_without_momentum"]


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_step_whose_gates_are_not_finite_counts_for_nothing(bad: float) -> None:
    net = with_norm()
    network, rule = scored(net, IMAGE), GateTaylor()
    rule.begin(network)
    for value in (1.0, bad):
        net.zero_grad()
        (value * net(torch.randn(5, 2, 5, 5)).square().sum()).backward()
        for name, parameter in net.named_parameters():
            if name == "0.weight" or name == "3.weight":
                parameter.grad.nan_to_num_(0, 0, 0)  # so that the step itself is finite by what it knows
        rule.before_step(network, announced(network), last=False)
        rule.after_step(network, announced(network))
    (window,) = [key for key in network.aux if key.startswith("steps.")]
    assert int(network.aux[window]) == 1
    assert bool(rule.scores(network, 2)[0].isfinite().all())
