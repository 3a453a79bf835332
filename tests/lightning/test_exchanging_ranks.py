"""Sparse storage under two DistributedDataParallel processes: the network of one process, on every rank."""

from typing import Any

import pytest
import torch
from support import exchanged_processes
from support.exchanged_processes import RUNS, STOP, train
from support.processes import run_processes

from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

each_run = pytest.mark.parametrize(("name", "storage"), list(RUNS))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Any]]:
    """What each of two processes found; one launch for all."""
    return run_processes("all", tmp_path_factory.mktemp("ranks"), script=exchanged_processes.__file__)


@each_run
def test_both_ranks_hold_one_network_after_every_batch(name: str, storage: str, ranks: list[dict[Any, Any]]) -> None:
    first, second = (found[name, storage]["whole"] for found in ranks)
    assert differences(first["places"], second["places"]) == []
    assert differences(first["end"]["weights"], second["end"]["weights"]) == []
    assert differences(first["end"]["optimizers"], second["end"]["optimizers"]) == []
    assert (differences(first["places"][0], first["places"][-1]) != []) == (name != "static")


@each_run
def test_two_ranks_train_the_network_of_one(name: str, storage: str, ranks: list[dict[Any, Any]]) -> None:
    alone, found = train(name, storage, 0, 1), ranks[0][name, storage]["whole"]
    assert differences(alone["places"], found["places"]) == []
    for key, value in alone["end"]["weights"].items():  # the mean of two parts rounds otherwise
        assert torch.allclose(value, found["end"]["weights"][key], rtol=1e-7, atol=1e-10), key


@each_run
def test_two_ranks_resume_exactly_within_an_accumulation_window(
    name: str, storage: str, ranks: list[dict[Any, Any]]
) -> None:
    for found in ranks:
        whole, resumed = found[name, storage]["whole"], found[name, storage]["resumed"]
        assert differences(whole["places"][STOP:], resumed["places"]) == []
        assert differences(whole["end"]["masks"], resumed["end"]["masks"]) == []
        for key, value in whole["end"]["weights"].items():
            # gradients of an open window are saved as the mean over ranks
            assert torch.allclose(value, resumed["end"]["weights"][key], rtol=1e-9, atol=1e-12), key


def test_a_layer_without_gradients_is_the_same_on_both_ranks(ranks: list[dict[Any, Any]]) -> None:
    assert differences(ranks[0]["unused"]["weights"], ranks[1]["unused"]["weights"]) == []
    assert differences(ranks[0]["unused"]["masks"], ranks[1]["unused"]["masks"]) == []


def test_patterns_are_not_among_the_buffers_that_are_broadcast(ranks: list[dict[Any, Any]]) -> None:
    assert all(found["buffers"]["buffers"] == 0 for found in ranks)


def test_ranks_whose_places_differ_are_refused_with_the_name_of_the_layer(ranks: list[dict[Any, Any]]) -> None:
    assert all("net.1" in found["apart"] for found in ranks)
