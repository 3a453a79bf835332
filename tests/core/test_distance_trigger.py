"""The trigger of EarlyCroP: tables, the times of its looks, and parameters in shards."""

import math
from typing import Any

import pytest
import torch
from oracles.early_crop import SEQUENCES, TRIGGER
from torch import Tensor

from sparse_callbacks.core.calendar import Calendar, RunLength
from sparse_callbacks.core.distance_trigger import distance_calendar, has_settled, relative_distance, tolerance
from sparse_callbacks.core.shards import Shards, lying_as


def first_epoch(distances: list[float], share: float) -> int | None:
    ends = range(1, len(distances) + 1)
    return next((t for t in ends if has_settled(distances[:t], share)), None)


def test_distances_of_the_table() -> None:
    initial = {"w": torch.tensor(TRIGGER["theta_0"])}
    found = [relative_distance({"w": torch.tensor(theta)}, initial) for theta in TRIGGER["theta"]]
    assert found == pytest.approx(TRIGGER["d"], rel=1e-6)  # float32 weights
    for sparsity, epoch in TRIGGER["epochs"].items():
        assert first_epoch(found, tolerance(sparsity)) == epoch


@pytest.mark.parametrize("number", range(len(SEQUENCES)))
def test_epochs_of_the_table(number: int) -> None:
    table = SEQUENCES[number]
    assert {s: first_epoch(table["d"], tolerance(s)) for s in table["unstructured"]} == table["unstructured"]
    fires = {s: epoch for s, epoch in table["structured"].items() if s < 0.9}
    assert {s: first_epoch(table["d"], tolerance(s, structured=True)) for s in fires} == fires
    assert all(epoch is None for s, epoch in table["structured"].items() if s >= 0.9)


@pytest.mark.parametrize("sparsity", [0.9, 0.95])
def test_a_share_of_channels_at_which_it_never_fires_is_refused(sparsity: float) -> None:
    with pytest.raises(
        ValueError, match=r"can never prune 0\.9.* by channels: .* not positive from 0\.9 on\. .*when= as a time"
    ):
        tolerance(sparsity, structured=True)
    assert tolerance(sparsity) > 0


def test_no_share_of_channels_counts_for_more_than_the_published_limit() -> None:
    assert tolerance(-0.5, structured=True) == 0.99
    assert tolerance(0.001, structured=True) == pytest.approx(0.899)


def test_the_comparison_is_strict_and_needs_two_epochs() -> None:
    assert not has_settled([0.5], 1.0)
    assert not has_settled([0.5, 0.75], 0.5)
    assert has_settled([0.5, 0.75], 0.5000001)
    assert has_settled([0.5, 0.25], 0.5000001)  # also on the way back
    assert not has_settled([0.5, math.nan], 0.5)


def test_a_distance_is_over_all_tensors_together() -> None:
    values = {"a": torch.tensor([3.0, 0.0]), "b": torch.tensor([[0.0, 5.0]])}
    initial = {"b": torch.tensor([[0.0, 1.0]]), "a": torch.tensor([0.0, 0.0])}
    assert relative_distance(values, initial) == pytest.approx(5.0)  # (9 + 16) ** 0.5 / 1


def test_half_precision_is_measured_in_double() -> None:
    values, initial = torch.full((1000,), 300.0).half(), torch.full((1000,), 200.0).half()  # squares overflow in half
    assert relative_distance({"w": values}, {"w": initial}) == 0.5


def test_parts_of_other_processes_count() -> None:
    """Two processes hold a half each; the sum over processes adds what the other one has."""

    class Other:
        rank, size = 0, 2

        def __init__(self) -> None:
            self.rest = [9.0, 1.0]  # squares of the other half: of what it has moved, and of its initial values

        def sum(self, numbers: Tensor) -> Tensor:
            return numbers + self.rest.pop(0)

        def collect(self, part: Tensor) -> list[Tensor]:
            return []

    layout = Shards(torch.Size([4]), 0, 0, 2, Other())
    part = lying_as(torch.tensor([5.0, 0.0]), layout)
    found = relative_distance({"w": part}, {"w": torch.tensor([1.0, 0.0])})
    assert found == pytest.approx(math.sqrt(25 / 2))


def length(total: float, epoch: float, lenient: bool = False) -> RunLength:
    return RunLength(lambda: total, lambda: epoch, lenient)


@pytest.mark.parametrize(
    ("stop", "total", "epoch", "expected"),
    [
        (0.5, 100, 10, Calendar(10, 10, 50, final=True)),
        (0.5, 55, 10, Calendar(10, 10, 28, final=True)),
        (7, 100, 10, Calendar(10, 7, 7, final=True)),
        (0.5, 1, 1, Calendar(1, 1, 1, final=True)),
        (40, math.inf, 10, Calendar(10, 10, 40, final=True)),
    ],
    ids=["half", "within an epoch", "before the first", "one step", "endless"],
)
def test_it_looks_at_the_ends_of_epochs(stop: Any, total: float, epoch: float, expected: Calendar) -> None:
    assert distance_calendar(stop, length(total, epoch)) == expected


def test_a_loader_without_length_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"end of each epoch, and this run's loader has no length\. .*epoch=.*when= as a time"
    ):
        distance_calendar(0.5, length(100, math.inf))
