"""Layers that are exchanged, and that somebody holds elsewhere: they are never computed with."""

import copy
import pickle
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from support import loops
from torch import Tensor, nn

from sparse_callbacks import SparseLinear, exchange_layers, sparsify, to_dense
from sparse_callbacks.core.storages.exchange import exchange
from sparse_callbacks.methods import SET, RigL

UNIFORM = {"distribution": "uniform", "print_plan": False}


class Called(nn.Module):
    """Calls its first layer through what ``hold`` makes of it."""

    def __init__(self, hold: Callable[[nn.Linear], Any], call: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(12, 24), nn.Linear(24, 4)
        self.held, self.call = hold(self.first), call

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.call(self.held, x).relu())  # type: ignore[no-any-return]


def of_layer(held: Any, x: Tensor) -> Tensor:
    return held(x)  # type: ignore[no-any-return]


HOLDERS: dict[str, tuple[Callable[[nn.Linear], Any], Callable[[Any, Tensor], Tensor]]] = {
    "list": (lambda layer: [layer], lambda held, x: held[0](x)),
    "mapping": (lambda layer: {"a": (layer,)}, lambda held, x: held["a"][0](x)),
    "bound call": (lambda layer: layer.__call__, of_layer),
    "bound forward": (lambda layer: layer.forward, of_layer),
    "partial": (lambda layer: partial(layer), of_layer),
    "closure": (lambda layer: lambda x: layer(x), of_layer),
    "default": (lambda layer: lambda x, layer=layer: layer(x), of_layer),
    "unregistered": (lambda layer: [nn.Sequential(layer, nn.ReLU())], lambda held, x: held[0](x)),
    "weight": (lambda layer: [layer], lambda held, x: nn.functional.linear(x, held[0].weight)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_layer_that_is_called_elsewhere_is_refused_in_the_first_pass(holder: str) -> None:
    model = Called(*HOLDERS[holder])
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsify(SET(0.5, storage="sparse", **UNIFORM), model, optimizer, steps=4)
    what = "reads the weight of" if holder in ("bound forward", "weight") else "calls"
    with pytest.raises(
        RuntimeError, match=rf"something {what} the nn\.Linear that first was .*exclude=\['first\.weight'\]"
    ):
        model(torch.randn(2, 12))


@pytest.mark.parametrize("holder", HOLDERS)
def test_auto_leaves_it_masked_and_the_plan_says_why(holder: str) -> None:
    model = Called(*HOLDERS[holder])
    method: Any = RigL(0.5, storage="auto", rows=8, **UNIFORM)
    assert "held holds the layer too" in str(method.plan(model))
    exchange_layers(method, model)
    assert isinstance(model.first, nn.Linear)
    model(torch.randn(2, 12)).sum().backward()
    assert model.first.weight.grad is not None


def test_what_holds_a_layer_as_its_submodule_or_as_an_argument_leaves_it_to_auto() -> None:
    model = Called(lambda layer: None, lambda held, x: x)
    model.inner = nn.Sequential(nn.Linear(4, 4))
    model.list, model._hparams = [model.inner], {"layer": model.first}
    method: Any = SET(0.5, storage="auto", rows=8, **UNIFORM)
    assert "holds the layer" not in str(method.plan(model))


def test_a_layer_that_is_left_out_is_called_as_before() -> None:
    model = Called(*HOLDERS["list"])
    exchange_layers(SET(0.5, storage={"first*": "masked", "*": "sparse"}, **UNIFORM), model)
    assert isinstance(model.last, SparseLinear)
    assert model(torch.randn(2, 12)).shape == (2, 4)


def test_an_exchange_that_is_undone_gives_the_layer_back() -> None:
    model = Called(*HOLDERS["bound forward"])
    first, weight, names = model.first, model.first.weight, vars(model.first).keys() - {"place"}
    done = exchange(SET(0.5, storage="sparse", **UNIFORM), model)
    with pytest.raises(RuntimeError, match="something calls"):
        first(torch.randn(2, 12))
    done.undo()
    assert type(first) is nn.Linear
    assert model.first is first
    assert first.weight is weight
    assert vars(first).keys() == names
    assert model(torch.randn(2, 12)).shape == (2, 4)


def test_copies_of_a_model_that_holds_such_a_layer_can_be_made() -> None:
    model = Called(*HOLDERS["list"])
    model.call = of_layer
    exchange_layers(SET(0.5, storage="sparse", **UNIFORM), model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with pytest.raises(RuntimeError, match="something calls"):
            other.held[0](torch.randn(2, 12))
        assert type(to_dense(other).first) is nn.Linear


def test_hooks_that_both_layers_have_do_not_say_that_the_new_one_was_called() -> None:
    model = Called(lambda layer: None, lambda held, x: x[:, :1].expand(-1, 24))
    old = model.first
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsify(SET(0.5, storage="sparse", **UNIFORM), model, optimizer, steps=4)
    x, y = next(iter(loops.data()))
    with pytest.raises(RuntimeError, match="something calls"):
        old(x)
    nn.functional.cross_entropy(model(x), y).backward()
    with pytest.warns(UserWarning, match=r"the first batch did not call layers with sparse storage \(first\.weight\)"):
        optimizer.step()
