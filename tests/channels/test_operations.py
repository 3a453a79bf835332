"""The table of operations: every row is probed by calls of its operation."""

from collections import defaultdict
from collections.abc import Callable

import pytest
import torch
from support.operation_probe import Sample, faults, probed
from support.operation_table import OTHER_DEVICES, SAMPLES, missing_here
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.operations.table import RULES

BY_NAME: dict[str, list[Sample]] = defaultdict(list)
for _sample in SAMPLES:
    BY_NAME[_sample.name].append(_sample)


@pytest.mark.parametrize("name", sorted(RULES))
def test_the_rule_says_what_the_operation_does(name: str) -> None:
    if name in OTHER_DEVICES or missing_here(name):
        assert name not in BY_NAME or missing_here(name)
        return
    assert BY_NAME[name], f"{name} has no sample: write one in tests/support, so that its rule is compared with torch"
    found = []
    for sample in BY_NAME[name]:
        probe = probed(sample)
        assert name in probe.reached, f"a sample of {name} calls {sorted(probe.reached)}"
        found += faults(probe)
    assert not found, "\n".join(found)


def test_every_sample_has_a_row() -> None:
    assert set(BY_NAME) <= set(RULES)


class Counted(nn.Module):
    """Channels that meet numbers of their places: in channel 0, 1, 2, ... of whatever is left."""

    def __init__(self, numbers: Callable[[int], Tensor]) -> None:
        super().__init__()
        self.numbers = numbers
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.last(x * self.numbers(x.shape[1]))


@pytest.mark.parametrize(
    "numbers",
    [torch.arange, lambda n: torch.linspace(0, 1, n), lambda n: torch.eye(n)[0]],
    ids=["arange", "linspace", "eye"],
)
def test_channels_that_meet_numbers_of_their_places_stay(numbers: Callable[[int], Tensor]) -> None:
    group = channel_groups(Counted(numbers), torch.randn(2, 4))[0]
    assert "whose entries are counted" in group.reason


class Turned(nn.Module):
    """Hidden units whose axis an operation in place moves or makes."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x).unsqueeze_(1).transpose_(1, 2)
        return self.last(x.squeeze_(2).relu())


def test_operations_that_turn_a_tensor_in_place_are_followed() -> None:
    group = channel_groups(Turned(), torch.randn(6, 4))[0]  # as many entries in the batch as units
    assert (group.name, group.size, group.reason) == ("first", 6, "")


class Chosen(nn.Module):
    """The pixels of a mask over two axes, of which the channels behind them know nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x)[x[..., 0] < 9])


def test_a_mask_over_two_axes_leaves_the_channels_behind_them() -> None:
    group = channel_groups(Chosen(), torch.randn(2, 3, 4))[0]
    assert (group.name, group.size, group.reason) == ("first", 6, "")
    assert [c.parameter for c in group.consumers] == ["last.weight"]


class Pooled(nn.Module):
    """Units of a linear layer, taken for places by a pooling."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 6), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(functional.avg_pool1d(self.first(x), 2))


def test_units_that_are_pooled_as_places_stay() -> None:
    assert "avg_pool2d" in channel_groups(Pooled(), torch.randn(2, 3, 4))[0].reason
