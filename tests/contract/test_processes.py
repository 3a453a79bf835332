"""The contract for two processes: equal masks, and the result of one process."""

from typing import Any

import pytest
import torch
from support import processes
from support.methods import every_steady_method, moves
from support.processes import run_processes

from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two DDP processes found, over every method; one launch for all."""
    return run_processes("replicas", tmp_path_factory.mktemp("ddp"))


@every_steady_method
def test_ranks_hold_the_same_masks(name: str, two_processes: list[dict[str, Any]]) -> None:
    one, other = (results[name] for results in two_processes)
    for run in ("whole", "resumed"):
        assert differences(one[run], other[run]) == []
    assert differences(one["noisy"]["masks"], other["noisy"]["masks"]) == []
    assert differences(one["noisy"]["end"]["masks"], other["noisy"]["end"]["masks"]) == []
    # other hardware rounds otherwise, which is no reason to end a run
    assert differences(one["noisy"]["end"]["weights"], other["noisy"]["end"]["weights"]) != []


@every_steady_method
def test_fabric_trains_as_the_trainer_does(name: str, two_processes: list[dict[str, Any]]) -> None:
    """With `sparsify` before and after `fabric.setup`; gradients are accumulated, averaged and clipped."""
    for rank in (0, 1):
        ends = two_processes[rank][name]["single"]["end"]
        for found in two_processes[rank][name]["fabric"]:
            assert differences(ends["masks"][0], found["masks"]) == []
            assert differences(ends["weights"], found["weights"]) == []
            assert (found["updates"] > 2) == moves(name)


@every_steady_method
def test_two_processes_equal_one_on_the_joined_batch(name: str, two_processes: list[dict[str, Any]]) -> None:
    alone = processes.train_replica(name, 0, 1)
    found = two_processes[0][name]
    assert differences(alone["masks"], found["whole"]["masks"]) == []
    assert differences(alone["masks"][processes.REPLICA_STOP :], found["resumed"]["masks"]) == []
    assert (alone["end"]["counts"][0][1] > 2) == moves(name)
    for run in ("whole", "resumed"):
        end = found[run]["end"]
        assert differences(alone["end"]["counts"], end["counts"]) == []
        # the mean of two halves rounds otherwise
        for key, value in alone["end"]["weights"].items():
            assert torch.allclose(value, end["weights"][key], rtol=1e-7, atol=1e-10), (run, key)
