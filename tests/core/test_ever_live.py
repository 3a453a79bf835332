"""Which units have lived and do not live now: the same in either form, as a set of Python would have it."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_callbacks.core.live.ever_live import as_truths, count_of_former, moved_on, none_yet, why_not_former


class LargestStorage(TorchDispatchMode):
    """Sees the largest memory that a result has."""

    bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, list | tuple) else [result]:
            if isinstance(one, Tensor):
                self.bytes = max(self.bytes, one.untyped_storage().nbytes())
        return result


def drawn(units: int, count: int, seed: int) -> Tensor:
    return torch.randperm(units, generator=torch.Generator().manual_seed(seed))[:count].sort().values


@pytest.mark.parametrize("units", [101, 4000, 100_000])
def test_units_that_leave_are_remembered_until_they_come_back(units: int) -> None:
    former, live, lived, forms = none_yet(torch.device("cpu")), drawn(units, 60, 0), set[int](), set()
    for seed in range(1, 30):
        # half of those that come have lived before, where there are any
        back = torch.tensor(sorted(lived)[: 2 * seed % 17], dtype=torch.int64)
        new = torch.cat([live[seed % 3 :: 3], drawn(units, 30, seed), back]).unique()
        before, now = set(live.tolist()), set(new.tolist())
        # some that leave come back at once
        at_once = set(sorted(before & now)[: seed % 4])
        leaving, coming = (torch.tensor(sorted(moved | at_once)) for moved in (before - now, now - before))
        former = moved_on(former, leaving, coming, units)
        lived, live = (lived | before) - now, new
        forms.add(former.dtype)
        assert count_of_former(former) == len(lived)
        assert as_truths(former, units).nonzero().flatten().tolist() == sorted(lived)
        assert why_not_former(former, live, units) == ""
    assert former.numel() * former.element_size() <= max(units // 8 + 1, 8 * len(lived))
    assert forms == {101: {torch.uint8}, 4000: {torch.int64, torch.uint8}, 100_000: {torch.int64}}[units]


@pytest.mark.parametrize(
    ("former", "words"),
    [
        (torch.tensor([3, 2]), "ascending"),
        (torch.tensor([2, 3, 99]), "below 40"),
        (torch.tensor([2, 7]), "live now"),
        (torch.tensor([2.0]), "not a list of keys"),
        (torch.zeros(4, dtype=torch.uint8), "4 bytes"),
        (torch.tensor([128, 0, 0, 0, 0], dtype=torch.uint8), "live now"),
    ],
)
def test_what_no_run_can_have_kept_is_named(former: Tensor, words: str) -> None:
    assert words in why_not_former(former, torch.tensor([7, 9]), 40)


def test_units_beyond_the_layer_are_named() -> None:
    assert "beyond the 39" in why_not_former(torch.tensor([0, 0, 0, 0, 128], dtype=torch.uint8), torch.tensor([7]), 39)


def test_a_large_field_is_counted_piece_by_piece() -> None:
    """A number of 8 bytes for each byte of the field would take as much as a mask of the layer."""
    units = 8 * 2**20 + 3
    live = drawn(units, 200_000, 0)
    former = moved_on(none_yet(torch.device("cpu")), live, drawn(0, 0, 0), units)
    assert former.dtype == torch.uint8
    with LargestStorage() as seen:
        assert count_of_former(former) == 200_000
    assert seen.bytes <= max(former.numel(), 8 * 2**18)
