"""Sup-tickets in two processes: one merged ticket with one set of statistics."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import ticket_ranks
from support.processes import matrices, run_processes
from support.ticket_ranks import train

from sparse_callbacks import SET, RigL
from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("tickets")
    return run_processes("tickets", folder, script=ticket_ranks.__file__)


@pytest.mark.parametrize("base", [RigL, SET], ids=["rigl", "set"])
def test_ranks_end_with_one_network(base: type[Any], two: list[dict[str, Any]]) -> None:
    first, second = (found[base.__name__] for found in two)
    assert first["whole"]["tickets"] == 3
    assert int(first["whole"]["buffers"]["net.2.num_batches_tracked"]) == 4 * 2  # four of either rank
    for run in ("whole", "resumed", "alike"):
        for part in ("end", "buffers", "masks"):
            assert differences(first[run][part], second[run][part]) == [], (run, part)
    assert differences(first["whole"], first["resumed"]) == []


@pytest.mark.parametrize("base", [RigL, SET], ids=["rigl", "set"])
def test_two_processes_equal_one_on_the_joined_batch(base: type[Any], two: list[dict[str, Any]]) -> None:
    alone, found = train(base, matrices(0), 0, 1), two[0][base.__name__]["alike"]
    assert differences(alone["masks"], found["masks"]) == []
    # the mean of two halves rounds otherwise
    for key, value in alone["end"]["weights"].items():
        assert torch.allclose(value, found["end"]["weights"][key], rtol=1e-7, atol=1e-10), key
