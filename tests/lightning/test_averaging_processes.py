"""Averages in two processes: the same on both, and those of one process on the joined batch."""

from typing import Any

import pytest
import torch
from support import processes
from support.processes import run_processes

from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two DDP processes found; one launch for all."""
    return run_processes("averages", tmp_path_factory.mktemp("averages"))


@pytest.mark.parametrize("case", processes.AVERAGED, ids="-".join)
def test_ranks_hold_the_same_averages(case: tuple[str, str], two_processes: list[dict[Any, Any]]) -> None:
    alone = processes.train_averaged(*case, 0, 1)
    for run in ("whole", "resumed"):
        one, other = (results[case][run] for results in two_processes)
        assert differences(one, other) == []
        masks = one["end"]["masks"][0]
        assert differences(alone["end"]["masks"][0], masks) == []
        for name, average in one["average"].items():
            # the mean of two halves rounds otherwise
            assert torch.allclose(average, alone["average"][name], rtol=1e-7, atol=1e-10)
            assert name not in masks or not average[~masks[name]].any()
