"""Scores of weights: tables, and an oracle that differentiates a function of one flat vector of weights."""

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from oracles.scores import LINEAR, SYNFLOW, TWO_BATCHES
from support.calibrated import NETWORKS
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from sparse_callbacks.core import scores
from sparse_callbacks.core.calibration import BatchLoss, Calibration
from sparse_callbacks.core.randomness import generator
from sparse_callbacks.core.replaced_parameters import masked, replaced

D = torch.float64


def tensor(values: Any) -> Tensor:
    return torch.tensor(values, dtype=D)


def squares(module: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(1).mean()


def entropy(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def weights_of(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.ndim > 1}


def linear() -> tuple[nn.Linear, Calibration]:
    layer = nn.Linear(2, 2, bias=False, dtype=D)
    layer.weight.data = tensor(LINEAR["weight"])
    batch = tensor(LINEAR["inputs"]), tensor(LINEAR["targets"])
    return layer, Calibration(layer, lambda: [batch], squares)


# ---------------------------------------------------------------------- tables


def test_snip_of_a_linear_layer() -> None:
    layer, calibration = linear()
    found = scores.snip_scores(calibration.losses, {"weight": layer.weight})["weight"]
    assert torch.allclose(found, tensor(LINEAR["snip"]), rtol=0, atol=1e-10)  # the tables have ten digits
    assert torch.allclose(found / found.sum(), tensor(LINEAR["snip_normalised"]), rtol=0, atol=1e-10)


def test_grasp_and_crop_of_a_linear_layer() -> None:
    layer, calibration = linear()
    params = {"weight": layer.weight}
    flow = scores.gradient_flow(calibration.losses, params)
    assert torch.allclose(flow.gradients["weight"], tensor(LINEAR["gradient"]), rtol=0, atol=1e-10)
    assert torch.allclose(flow.products["weight"], tensor(LINEAR["product"]), rtol=0, atol=1e-10)
    grasp = scores.grasp_scores(calibration.losses, params)["weight"]
    assert torch.allclose(grasp, -tensor(LINEAR["grasp"]), rtol=0, atol=1e-10)
    crop = scores.crop_scores(calibration.losses, params)["weight"]
    assert torch.allclose(crop, tensor(LINEAR["crop"]), rtol=0, atol=1e-10)


def test_the_absolute_value_is_taken_after_the_mean_over_batches() -> None:
    weight = nn.Parameter(tensor(TWO_BATCHES["weight"]))

    @contextmanager
    def losses(order: int) -> Iterator[Iterator[BatchLoss]]:
        yield (BatchLoss((weight * tensor(g)).sum(), 4) for g in TWO_BATCHES["gradients"])

    found = scores.snip_scores(losses, {"weight": weight})["weight"]
    assert torch.allclose(found, tensor(TWO_BATCHES["abs_of_mean"]), rtol=0, atol=1e-12)
    assert int(found.argmax()) == TWO_BATCHES["kept"]


def synflow_net() -> nn.Sequential:
    net = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    net[0].weight.data, net[1].weight.data = torch.tensor(SYNFLOW["first"]), torch.tensor(SYNFLOW["second"])
    return net


def test_synflow_of_two_layers() -> None:
    net = synflow_net()
    found = scores.synflow_scores(net, torch.zeros(1, 3), weights_of(net))
    assert torch.equal(found["0.weight"], tensor(SYNFLOW["first_scores"]))
    assert torch.equal(found["1.weight"], tensor(SYNFLOW["second_scores"]))
    assert [float(s.sum()) for s in found.values()] == [SYNFLOW["sum"]] * 2


# ---------------------------------------------------------------------- an oracle of flat vectors


class Flat:
    """The mean loss of a model over all samples, as a function of one vector of weights."""

    def __init__(self, module: nn.Module, batches: list[Any]) -> None:
        self.module, self.batches = copy.deepcopy(module).eval(), batches
        self.shapes = {name: p.shape for name, p in weights_of(module).items()}
        self.theta = torch.cat([p.detach().flatten() for p in weights_of(module).values()])

    def loss(self, theta: Tensor) -> Tensor:
        parts = torch.split(theta, [math.prod(shape) for shape in self.shapes.values()])
        values = {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}
        logits = [functional_call(self.module, values, (x,)) for x, _ in self.batches]
        # all samples in one mean, where the code under test adds up batches
        return functional.cross_entropy(torch.cat(logits), torch.cat([y for _, y in self.batches]))

    def gradient(self) -> Tensor:
        return torch.func.grad(self.loss)(self.theta)

    def product(self, along: Tensor) -> Tensor:
        """By a forward derivative of the gradient, where the code under test goes backward twice."""
        with sdpa_kernel(SDPBackend.MATH):  # the fused kernel has no forward derivative
            return torch.func.jvp(torch.func.grad(self.loss), (self.theta,), (along.detach(),))[1]

    def by_name(self, flat: Tensor) -> dict[str, Tensor]:
        parts = torch.split(flat, [math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for (name, shape), part in zip(self.shapes.items(), parts, strict=True)}


def random_network(name: str, seed: int) -> tuple[nn.Module, list[Any]]:
    """A network in float64 with statistics in its norms, and batches of other sizes."""
    torch.manual_seed(seed)
    make, shape = NETWORKS[name]
    module = make().double()
    with torch.no_grad():
        for _ in range(3):
            module(torch.randn(8, *shape, dtype=D))
    sizes = (5, 1, 3)
    return module, [(torch.randn(n, *shape, dtype=D), torch.randint(0, 3, (n,))) for n in sizes]


def close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.detach().abs().max())  # sums of float64 in another order
        assert torch.allclose(found[name], value, rtol=1e-9, atol=1e-10 * scale), name


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("name", ["residual", "parts", "attention"])
def test_scores_of_the_loss_are_those_of_a_flat_vector(name: str, seed: int) -> None:
    module, batches = random_network(name, seed)
    params, flat = weights_of(module), Flat(module, batches)
    losses = Calibration(module, lambda: batches, entropy).losses
    g = flat.gradient()
    close(scores.snip_scores(losses, params), flat.by_name((flat.theta * g).abs()))
    close(scores.grasp_scores(losses, params), flat.by_name(flat.theta * flat.product(g)))
    close(scores.crop_scores(losses, params), flat.by_name((flat.theta * flat.product(g)).abs()))
    each = torch.stack([Flat(module, [batch]).gradient().square() for batch in batches])
    close(scores.fisher_scores(losses, params), flat.by_name(0.5 * flat.theta.square() * each.mean(0)))


def test_the_gradient_flow_of_a_pruned_network_has_no_part_in_pruned_weights() -> None:
    module, batches = random_network("residual", 2)
    draw = torch.Generator().manual_seed(1)
    masks = {name: torch.rand(p.shape, generator=draw) < 0.5 for name, p in weights_of(module).items()}
    with masked(module, masks) as params:
        flat = Flat(module, batches)
        found = scores.grasp_scores(Calibration(module, lambda: batches, entropy).losses, params, masks)
    keep = torch.cat([mask.flatten() for mask in masks.values()])
    assert torch.equal(flat.theta[~keep], torch.zeros(int((~keep).sum()), dtype=D))
    close(found, flat.by_name(flat.theta * flat.product(flat.gradient() * keep)))


class Recurrent(nn.Module):
    """A recurrent layer, and a norm with negative gains and means."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.norm, self.last = (
            nn.RNN(3, 5, nonlinearity="relu", batch_first=True),
            nn.BatchNorm1d(5),
            nn.Linear(5, 2),
        )
        self.register_buffer("bias_mask", torch.tensor([0.0, -math.inf]))
        nn.init.uniform_(self.norm.weight, -2, 2)
        self.norm.running_mean.uniform_(-1, 1)
        self.norm.running_var.uniform_(0.5, 2)

    def forward(self, x: Tensor) -> Tensor:
        out = self.norm(self.rnn(x)[0][:, -1])
        return self.last(out) + self.bias_mask.softmax(0)


def test_synflow_equals_a_copy_with_absolute_parameters_and_leaves_the_network_alone() -> None:
    torch.manual_seed(0)
    module = Recurrent().train()
    before, parameters = copy.deepcopy(module.state_dict()), [*module.parameters()]
    versions = [p._version for p in parameters]
    twin = copy.deepcopy(module).double().eval()
    for p in twin.parameters():
        p.data.abs_()
    twin.norm.running_mean.abs_()
    ones = torch.ones(1, 4, 3, dtype=D)
    twin(ones).sum().backward()
    expected = {name: p.detach() * p.grad for name, p in twin.named_parameters() if p.ndim > 1}
    found = scores.synflow_scores(module, torch.randn(1, 4, 3), weights_of(module))
    assert found.keys() == expected.keys() == weights_of(module).keys()
    assert {s.dtype for s in found.values()} == {D}
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-12), name
    assert float(found["rnn.weight_hh_l0"].sum()) > 0
    # nothing was written, and the network is made of the same parameters in the same places
    assert [id(p) for p in module.parameters()] == [id(p) for p in parameters]
    assert [p._version for p in parameters] == versions
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    assert module.training
    assert all(p.grad is None for p in parameters)
    assert all(a is b for a, b in zip(module.rnn._flat_weights, [*module.rnn.parameters()], strict=True))


def test_synflow_is_conserved_and_scores_masked_weights_zero() -> None:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Linear(6, 8, bias=False), nn.ReLU(), nn.Linear(8, 5, bias=False), nn.Linear(5, 3, bias=False)
    )
    masks = {name: torch.rand_like(p) < 0.6 for name, p in weights_of(net).items()}
    found = scores.synflow_scores(net, torch.zeros(1, 6), weights_of(net), masks)
    sums = [float(s.sum()) for s in found.values()]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-12)
    assert sums[0] > 0
    assert all(bool((found[name] == 0)[~mask].all()) for name, mask in masks.items())


def test_synflow_says_where_a_network_does_not_compute_in_float64() -> None:
    class Single(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return functional.linear(x.float(), self.weight, self.bias)

    module = nn.Sequential(nn.Linear(3, 4), Single(4, 2))
    with pytest.raises(
        ValueError, match=r"ones through Sequential in float64, which its forward does not take \(RuntimeError"
    ):
        scores.synflow_scores(module, torch.ones(1, 3), ["0.weight"])


def test_synflow_does_not_overflow_where_float32_would() -> None:
    net = nn.Sequential(*[nn.Linear(4, 4, bias=False) for _ in range(12)])
    for layer in net:
        nn.init.constant_(layer.weight, 1e4)
    found = scores.synflow_scores(net, torch.zeros(1, 4), weights_of(net))
    assert all(bool(s.isfinite().all()) for s in found.values())
    assert float(found["0.weight"].max()) > 1e48


# ---------------------------------------------------------------------- what has no score


class Apart(nn.Module):
    """A layer that training reads and evaluation does not, as auxiliary heads."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.beside = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) + (self.beside(x) if self.training else 0.0)


BATCH = [(torch.ones(2, 4), torch.tensor([0, 2]))]


@pytest.mark.parametrize("score", ["snip", "grasp", "crop", "fisher", "synflow"])
def test_parameters_that_nothing_depends_on_are_missing(score: str) -> None:
    module = Apart()
    every, beside = weights_of(module), {"beside.weight": module.beside.weight}

    def found(params: dict[str, nn.Parameter]) -> dict[str, Tensor]:
        if score == "synflow":
            return scores.synflow_scores(module, torch.ones(1, 4), params)
        made: Callable[..., dict[str, Tensor]] = getattr(scores, f"{score}_scores")
        return made(Calibration(module, lambda: BATCH, entropy).losses, params)

    assert list(found(every)) == ["body.weight"]
    with pytest.raises(ValueError, match=r"does not depend on any of the sparse weights.*masks by magnitude"):
        found(beside)


def test_a_loss_that_is_linear_in_the_weights_has_no_second_derivative() -> None:
    layer = nn.Linear(4, 3, bias=False)
    losses = Calibration(layer, lambda: BATCH, lambda module, batch: module(batch[0]).sum()).losses
    flow = scores.gradient_flow(losses, {"weight": layer.weight})
    assert torch.equal(flow.products["weight"], torch.zeros(3, 4))
    assert torch.equal(flow.gradients["weight"], torch.full((3, 4), 2.0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_scores_of_half_precision_are_products_in_float32(dtype: torch.dtype) -> None:
    layer = nn.Linear(4, 3, bias=False).to(dtype)
    batch = [(torch.randn(2, 4, dtype=dtype), torch.tensor([0, 2]))]
    losses = Calibration(layer, lambda: batch, entropy).losses
    g = scores.mean_gradients(losses, {"weight": layer.weight})["weight"]
    assert g.dtype == torch.float32
    found = scores.snip_scores(losses, {"weight": layer.weight})["weight"]
    assert torch.equal(found, (layer.weight.detach().float() * g).abs())


def test_magnitude_and_chance() -> None:
    params = {"weight": nn.Parameter(torch.tensor([[-2.0, 0.5]]))}
    assert torch.equal(scores.magnitude_scores(params)["weight"], torch.tensor([[2.0, 0.5]]))
    first, again = (scores.random_scores(params, lambda name: generator(0, 0, name))["weight"] for _ in range(2))
    assert torch.equal(first, again)
    assert bool(((first >= 0) & (first < 1)).all())


# ---------------------------------------------------------------------- parameters in the place of others


def test_a_tied_parameter_is_replaced_under_all_of_its_names() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    own = net[0].weight
    with replaced(net, {"0.weight": torch.zeros(3, 3)}) as made:
        assert net[0].weight is net[1].weight is made["0.weight"]
        assert [name for name, _ in net.named_parameters()] == ["0.weight", "0.bias", "1.bias"]
        assert not bool(net[1].weight.any())
    assert net[0].weight is net[1].weight is own


def test_parameters_come_back_after_an_error() -> None:
    net = nn.Linear(3, 3)
    own = net.weight

    def fail() -> None:
        with replaced(net, {"weight": torch.zeros(3, 3)}):
            raise RuntimeError("an error of the forward pass, on the way")

    with pytest.raises(RuntimeError, match="on the way"):
        fail()
    assert net.weight is own
