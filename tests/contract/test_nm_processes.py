"""N:M in two processes: the same masks on both, and those of one process on the joined batch."""

from typing import Any

import pytest
from support import processes
from support.methods import moves
from support.processes import run_processes

from sparse_callbacks.core.nm_masks import in_groups
from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    return run_processes("patterns", tmp_path_factory.mktemp("ddp"))


@pytest.mark.parametrize(("name", "pattern"), processes.PATTERNED)
def test_masks_are_those_of_one_process_on_every_rank(
    name: str, pattern: str, two_processes: list[dict[Any, Any]]
) -> None:
    one, other = (found[name, pattern]["masks"] for found in two_processes)
    assert differences(one, other) == []
    alone = processes.train_patterned(name, pattern, 0, 1)["masks"]
    assert differences(alone, one) == []
    assert all(bool((in_groups(mask, 4).sum(-1) == 2).all()) for masks in one for mask in masks.values())
    assert (differences(one[0], one[-1]) != []) == moves(name)
