"""Sparse storage under two DistributedDataParallel processes: the network of one process, on every rank."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import exchanged_processes
from support.exchanged_processes import RUNS, STOP, records_of_rank, train
from support.processes import run_processes

from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

each_run = pytest.mark.parametrize(("name", "storage"), list(RUNS))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two processes leave what they find, and their checkpoints."""
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def ranks(folder: Path) -> list[dict[Any, Any]]:
    """What each of two processes found; one launch for all."""
    return run_processes("all", folder, script=exchanged_processes.__file__)


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


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_a_checkpoint_within_a_window_holds_what_each_rank_has_recorded(
    storage: str, ranks: list[dict[Any, Any]]
) -> None:
    records = ranks[0]["rigl", storage]["records"]
    assert set(records) == {"net.1.weight", "net.3.weight", "net.5.weight"}
    for of_ranks in records.values():
        (x, dy), (other_x, other_dy) = of_ranks  # one micro-batch each
        assert x.shape[1] == dy.shape[1] == other_x.shape[1] == 6
        assert not torch.equal(dy, other_dy)
    assert all(ranks[0][name, storage]["records"] == {} for name in ("static", "set"))


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_one_process_goes_on_from_the_window_of_two(storage: str, ranks: list[dict[Any, Any]], folder: Path) -> None:
    """It takes the records of both, in proportion to the batches that it has from then on."""
    path = folder / f"rigl-{storage}" / f"{STOP}.ckpt"
    alone, found = train("rigl", storage, 0, 1, ckpt_path=path), ranks[0]["rigl", storage]["whole"]
    assert differences(alone["places"], found["places"][STOP:]) == []
    for key, value in alone["end"]["weights"].items():
        assert torch.allclose(value, found["end"]["weights"][key], rtol=1e-7, atol=1e-10), key


def test_records_of_all_ranks_are_gathered_where_one_has_seen_no_batch_of_a_layer(ranks: list[dict[Any, Any]]) -> None:
    expected: dict[str, Any] = {"a": [], "b": []}
    for rank in (0, 1):
        for name in expected:
            expected[name].append([tensor for pair in records_of_rank(rank)[name] for tensor in pair])
    assert differences(expected, ranks[0]["gathered"]) == []
    assert ranks[1]["gathered"] == {}


def test_a_layer_without_gradients_is_the_same_on_both_ranks(ranks: list[dict[Any, Any]]) -> None:
    assert differences(ranks[0]["unused"]["weights"], ranks[1]["unused"]["weights"]) == []
    assert differences(ranks[0]["unused"]["masks"], ranks[1]["unused"]["masks"]) == []


def test_patterns_are_not_among_the_buffers_that_are_broadcast(ranks: list[dict[Any, Any]]) -> None:
    assert all(found["buffers"]["buffers"] == 0 for found in ranks)


def test_ranks_whose_places_differ_are_refused_with_the_name_of_the_layer(ranks: list[dict[Any, Any]]) -> None:
    assert all("net.1" in found["apart"] for found in ranks)
