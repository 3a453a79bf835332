"""Slimming: outputs in containers and objects are followed and compared, and what cannot be looked at is refused."""

import collections
import dataclasses
import functools
import types
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from support.channel_nets import OUTPUTS
from torch import Tensor, distributions, nn

from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.outputs import OpaqueOutputError, output_tensors
from sparse_callbacks.channels.slim import slim, slimmable_groups

# masks are made for dense networks here
pytestmark = pytest.mark.filterwarnings("ignore:the masks cut weights:UserWarning")


class Plain:
    """An object with attributes, and a way back to itself."""

    def __init__(self, h: Tensor) -> None:
        self.held, self.itself = {"h": h}, self


class Slotted:
    __slots__ = ("__hidden", "free")

    def __init__(self, h: Tensor) -> None:
        self.__hidden = [h]


class Listed(list[Tensor]):
    """A list with an attribute."""

    def __init__(self, h: Tensor) -> None:
        self.more = h


@dataclasses.dataclass(slots=True)
class Record:
    value: Any


class Named(NamedTuple):
    value: Any


def stored(h: Tensor) -> nn.Module:
    """A module that holds what it has seen."""
    module = nn.Identity()
    module.seen = h
    return module


class Buffered(nn.Module):
    def __init__(self, h: Tensor) -> None:
        super().__init__()
        self.register_buffer("seen", h.detach())


def done(h: Tensor) -> Any:
    future: Any = torch.futures.Future()
    future.set_result(h)
    return future


# checking its arguments, which torch does unless Dynamo was imported, makes the program depend on all of them
normal = functools.partial(distributions.Normal, validate_args=False)
HOLDERS: dict[str, Callable[[Tensor], Any]] = {
    "normal": lambda h: normal(h, torch.ones_like(h)),
    "independent": lambda h: distributions.Independent(normal(h, 1.0), 1),
    "transformed": lambda h: distributions.TransformedDistribution(normal(h, 1.0), [distributions.SigmoidTransform()]),
    "mixture": lambda h: distributions.MixtureSameFamily(
        distributions.Categorical(torch.ones(h.shape)), normal(h, 1.0), validate_args=False
    ),
    "namespace": lambda h: types.SimpleNamespace(deep=types.SimpleNamespace(h=h)),
    "object": Plain,
    "slots": Slotted,
    "dataclass": Record,
    "named tuple": lambda h: Named(({"deep": [Named(h)]},)),
    "ordered": lambda h: collections.OrderedDict(a=collections.deque([h])),
    "set": lambda h: {h},
    "frozen set": lambda h: [frozenset([(h,)])],
    "list with an attribute": Listed,
    "closure": lambda h: lambda: h,
    "default": lambda h: lambda h=h: h,
    "partial": lambda h: functools.partial(torch.add, h),
    "method": lambda h: Record(h).__eq__,
    "module": stored,
    "buffer": lambda h: nn.Sequential(Buffered(h)),
    "future": done,
    "key": lambda h: {(h,): 1},
    "values": lambda h: {"h": h}.values(),
    "items": lambda h: {"h": h}.items(),
}


class Holding(nn.Module):
    """Hidden units that are outputs too, inside an object."""

    def __init__(self, holder: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.holder = holder
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Any:
        h = self.first(x)
        return self.last(h), self.holder(h)


@pytest.mark.parametrize("name", HOLDERS)
def test_channels_that_an_object_among_the_outputs_holds_stay(name: str) -> None:
    net, x = Holding(HOLDERS[name]), torch.randn(3, 4)
    assert channel_groups(net, x)[0].reason == OUTPUTS
    small, proof = slim(net, {"last.weight": torch.arange(6) < 3}, x)
    assert (small.first.out_features, proof.removed) == (6, 0)


def test_arrays_of_numpy_are_compared() -> None:
    net, x = Holding(lambda h: h.detach().numpy()), torch.randn(3, 4)
    assert len(output_tensors(net(x))) == 2
    assert slimmable_groups(net, x)[0].reason == "the network's code takes them out of torch by numpy"
    assert slim(net, {"last.weight": torch.arange(6) < 3}, x)[1].removed == 0


def test_parameters_of_modules_that_are_not_the_models_own_are_compared() -> None:
    net, x = Holding(lambda h: nn.ParameterList([h])), torch.randn(3, 4)
    assert slimmable_groups(net, x)[0].reason.startswith("without them the outputs differ")
    assert slim(net, {"last.weight": torch.arange(6) < 3}, x)[1].removed == 0


@pytest.mark.parametrize(
    ("holder", "message"),
    [
        (lambda h: (t for t in [h]), r"returns a generator \(output\[1\]\), whose tensors cannot be looked at"),
        (lambda h: types.SimpleNamespace(rows=iter([h])), r"returns a list_iterator \(output\[1\].rows\)"),
        (lambda h: {"both": {h, h + 1}}, r"returns a set of 2 tensors \(output\[1\]\['both'\]\), which has no order"),
        (lambda h: [h.to_sparse()], r"returns a sparse \(sparse_coo\) tensor \(output\[1\]\[0\]\), whose entries"),
        (lambda h: h.to_sparse_csr(), r"returns a sparse \(sparse_csr\) tensor \(output\[1\]\), whose entries"),
        (lambda h: torch.futures.Future(), r"returns a future \(output\[1\]\) that is not done"),
    ],
)
@pytest.mark.parametrize("search", [channel_groups, slimmable_groups])
def test_outputs_that_cannot_be_looked_at_are_refused(holder: Any, message: str, search: Any) -> None:
    with pytest.raises(OpaqueOutputError, match=message):
        search(Holding(holder), torch.randn(3, 4))


def test_numbers_modules_parameters_and_empty_cells_are_no_outputs() -> None:
    def unset() -> Any:
        return later

    own = nn.Linear(2, 2)
    nothing = [1, 2.0, None, "text", torch.Size([2]), torch.float32, own, range(2), unset]
    assert output_tensors(nothing, nn.Sequential(own)) == []
    assert len(output_tensors([own], nn.Sequential())) == 2
    later = 0


def test_keys_and_values_that_the_model_reads_again_are_no_outputs() -> None:
    kind = type("Cache", (), {"__module__": "transformers.cache_utils"})
    cache = type("DynamicCache", (kind,), {})()
    cache.keys = [torch.zeros(2)]
    assert output_tensors({"past_key_values": cache}) == []


class Reused(nn.Module):
    """Gives the same buffer each time, and writes the outputs into it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)
        self.register_buffer("out", torch.zeros(3, 2), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x)
        self.out.copy_(self.last(h * h.shape[1]))
        return self.out


def test_outputs_in_a_buffer_that_is_written_again_are_compared() -> None:
    assert slim(Reused(), {"last.weight": torch.arange(6) < 3}, torch.randn(3, 4))[1].removed == 0
