"""Layers that take each other's places: what moves along, what stays as it was, and what a refused exchange gives back."""

import copy
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import loops
from torch import Tensor, nn

from sparse_callbacks import SparseLinear, exchange_layers, sparsify, to_dense
from sparse_callbacks.methods import SET, RigL, Static


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def sparse(model: nn.Module, **more: Any) -> nn.Module:
    exchange_layers(RigL(0.5, storage="sparse", distribution="uniform", **more), model)
    return model


STARTS: dict[str, Callable[[nn.Module], Any]] = {
    "random": lambda _: "random",
    "magnitude": lambda _: "magnitude",
    "nonzero": lambda _: "nonzero",
    "a state dict": lambda model: {n: t * (torch.rand_like(t) < 0.4) for n, t in model.state_dict().items()},
}


@pytest.mark.parametrize(("start", "group"), [*((start, None) for start in STARTS), ("random", 4), ("magnitude", 4)])
def test_the_first_masks_are_those_of_masked_storage(start: str, group: int | None) -> None:
    model = net()
    if start == "nonzero":
        torch.manual_seed(1)
        for i in (0, 2, 4):
            model[i].weight.data *= torch.rand_like(model[i].weight) < 0.4
    pattern = {"pattern": "fan_in/4"} if group else {}
    storage = {"storage": "grouped", "group": group} if group else {"storage": "sparse"}
    twin = copy.deepcopy(model)
    initial = STARTS[start](model)
    method = RigL(initial_mask=initial, seed=3, **pattern)
    sparsify(method, twin, torch.optim.SGD(twin.parameters(), 0.1), 10).close()
    exchanged = RigL(initial_mask=initial, seed=3, **storage)
    layers = exchange_layers(exchanged, model)
    assert layers.keys() >= {"0.weight", "2.weight"}
    for name, layer in layers.items():
        assert torch.equal(layer.mask, method.masks[name])
        assert torch.equal(layer.weight, twin.get_parameter(name))
    assert [r.zeros for r in exchanged.plan(model)] == [r.zeros for r in method.plan(twin)]


def test_names_their_order_and_everything_else_stay() -> None:
    model = net()
    dense = copy.deepcopy(model)
    bias, container = model[0].bias, model[2]
    model[0].tag, model[0].weight.no_decay = "first", True
    model[0].register_buffer("scale", torch.ones(3))
    model[0].extra = nn.Parameter(torch.zeros(2))
    model[0].eval()
    model[2].bias.requires_grad_(False)
    model[2].weight.grad = torch.arange(576.0).view(24, 24)
    names, keys = [n for n, _ in model.named_parameters()], list(model.state_dict())
    sparse(model)
    assert model[2] is not container
    assert [n for n, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == keys
    layer = model[0]
    assert (layer.tag, layer.training, layer.name, layer.values.no_decay) == ("first", False, "0", True)
    assert layer.bias is bias
    assert layer.scale.shape == (3,)
    assert not model[2].bias.requires_grad
    assert torch.equal(model[2].places.dense(model[2].values.grad), torch.arange(576.0).view(24, 24) * model[2].mask)
    assert [type(m) for m in model] == [SparseLinear, nn.ReLU, SparseLinear, nn.ReLU, SparseLinear]
    masked = {k: t for k, t in dense.state_dict().items() if "weight" in k}
    for name, weight in masked.items():
        assert torch.equal(model.state_dict()[name], weight * model[int(name[0])].mask)


class Held(nn.Module):
    """Linear layers in every kind of container."""

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.Linear(6, 6)
        self.listed = nn.ModuleList([nn.Linear(6, 6), nn.Sequential(OrderedDict(inner=nn.Linear(6, 6), act=nn.ReLU()))])
        self.named = nn.ModuleDict({"a": nn.Linear(6, 6), "b": nn.Identity()})
        self.after = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(self.named["a"](self.listed[1](self.listed[0](self.before(x)))))


def test_a_layer_is_exchanged_wherever_it_is_held() -> None:
    torch.manual_seed(0)
    model = Held()
    order = [name for name, _ in model.named_modules()]
    sparse(model)
    assert [name for name, _ in model.named_modules()] == order
    assert sum(isinstance(m, SparseLinear) for m in model.modules()) == 5
    x = torch.randn(3, 6)
    out = model(x)
    assert to_dense(model) is model
    assert [name for name, _ in model.named_modules()] == order
    assert not [m for m in model.modules() if isinstance(m, SparseLinear)]
    assert torch.allclose(model(x), out, atol=1e-6)


# ---------------------------------------------------------------------- without dense matrices, and back


def test_a_layer_on_the_meta_device_is_never_dense_and_stays_there_until_it_gets_memory() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.Linear(300_000, 200_000), nn.ReLU(), nn.Linear(200_000, 64))
    method = SET(1 - 2e-5, storage={"0*": "sparse", "2*": "grouped"}, group=32, distribution="uniform")
    exchange_layers(method, model)
    assert model[0].values.is_meta
    assert model[0].live == 300_000 * 200_000 - method.plan(model)["0.weight"].zeros == 1_200_000
    assert model[2].live == 64 * 4
    assert "drawn by rejection" in method.plan(model)["0.weight"].remark
    keys = model[0].keys()
    assert bool((keys.diff() > 0).all())
    model.to_empty(device="cpu")
    assert model[0].values.shape == (1, 1_200_000)
    again = nn.Sequential(nn.Linear(300_000, 200_000, device="meta"))
    exchange_layers(SET(1 - 2e-5, storage="sparse", distribution="uniform"), again)
    assert torch.equal(again[0].keys(), keys)
    with pytest.raises(ValueError, match=r"0.weight is on the meta device .*initial_mask='random'"):
        exchange_layers(SET(initial_mask="magnitude", storage="sparse"), nn.Sequential(nn.Linear(8, 8, device="meta")))


def test_an_exchange_where_another_device_is_the_default_is_the_same() -> None:
    model = net()
    twin = copy.deepcopy(model)
    sparse(model)
    with torch.device("meta"):
        exchange_layers(RigL(0.5, storage={"0*": "grouped", "*": "sparse"}, group=4, distribution="uniform"), twin)
    assert torch.equal(model[2].values, twin[2].values)
    assert torch.equal(model[2].keys(), twin[2].keys())
    assert twin[0].values.device.type == "cpu"


def test_a_model_that_a_wrapper_has_set_up_is_not_exchanged() -> None:
    class Wrapped(nn.parallel.DistributedDataParallel):
        def __init__(self, module: nn.Module) -> None:
            nn.Module.__init__(self)
            self.module = module

    model = net()
    with pytest.raises(ValueError, match=r"model= is a DistributedDataParallel.* before it is made"):
        exchange_layers(RigL(0.5, storage="sparse"), Wrapped(model))
    compiled = torch.compile(model, backend="eager")
    assert list(exchange_layers(RigL(0.5, storage="sparse", distribution="uniform"), compiled)) == [
        "0.weight",
        "2.weight",
        "4.weight",
    ]
    assert compiled(torch.zeros(1, 12)).shape == (1, 4)


def test_layers_that_are_sparse_already_keep_their_places_and_their_count() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(SparseLinear.random(12, 24, fan_in=3), nn.ReLU(), nn.Linear(24, 24))
    first, keys = model[0], model[0].keys()
    method = SET(0.5, storage="sparse", distribution="uniform")
    assert list(exchange_layers(method, model)) == ["2.weight"]
    assert model[0] is first
    assert torch.equal(first.keys(), keys)
    plan = method.plan(model)
    assert (plan["0.weight"].zeros, plan["0.weight"].storage) == (24 * 9, "sparse")
    assert exchange_layers(method, model) == {}


def test_to_dense_of_a_layer_itself_gives_the_linear_layer() -> None:
    layer = SparseLinear.random(12, 24, fan_in=3)
    layer.tag = 1
    dense = to_dense(layer)
    assert type(dense) is nn.Linear
    assert dense.tag == 1
    assert torch.equal(dense.weight, layer.weight)
    assert dense.bias is layer.bias
    assert to_dense(dense) is dense


@pytest.mark.parametrize("start", ["random", "nonzero"])
def test_a_second_exchange_after_to_dense_goes_on_with_the_masks_of_the_last_run(start: str) -> None:
    model = net()
    with torch.no_grad():
        model[0].weight[:, ::2] = 0
        model[2].weight[:, ::3] = 0
        model[4].weight[:, ::4] = 0
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    method = Static(initial_mask=start, storage="sparse", print_plan=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with sparsify(method, model, optimizer, 2):
            for x, _ in list(loops.data())[:2]:
                model(x).sum().backward()
                optimizer.step()
    masks = {n: m.clone() for n, m in method.masks.items()}
    to_dense(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), 2).close()
    assert isinstance(model[0], SparseLinear)
    assert all(torch.equal(m, masks[n]) for n, m in method.masks.items())


@pytest.mark.parametrize("given", ["argument", "method"])
def test_rows_for_a_name_that_no_layer_has_are_refused(given: str) -> None:
    rows, model = {"typo*": 8}, net()
    method = RigL(0.75, storage="auto", rows=rows if given == "method" else None)
    with pytest.raises(ValueError, match=r"rows= has a value for 'typo\*', which matches no parameter.*0\.weight"):
        exchange_layers(method, model, rows=None if given == "method" else rows)
    assert all(type(layer) is not SparseLinear for layer in model)
    exchange_layers(RigL(0.75, storage="auto", rows={"0": 8, "*.weight": 4}), model)  # of a layer or of its weight
