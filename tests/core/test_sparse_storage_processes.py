"""Exchanged layers in two processes: one network, and that of one process on the joined batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import exchanged_ranks
from support.processes import run_processes


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder: Path = tmp_path_factory.mktemp("ranks")
    return run_processes("all", folder, script=exchanged_ranks.__file__)


@pytest.mark.parametrize("name", exchanged_ranks.methods())
def test_two_processes_train_the_network_of_one(ranks: list[dict[str, Any]], name: str) -> None:
    alone = exchanged_ranks.train(exchanged_ranks.methods()[name], 0, 1)
    assert alone["updates"] >= 3
    for found in (rank[name] for rank in ranks):
        assert found["updates"] == alone["updates"]
        for there, here in zip(alone["seen"], found["seen"], strict=True):
            assert all(torch.equal(keys, here[layer]) for layer, keys in there.items())
        for parameter, values in alone["values"].items():
            assert (values - found["values"][parameter]).abs().max() < 1e-10, parameter
    assert all(torch.equal(v, ranks[1][name]["values"][p]) for p, v in ranks[0][name]["values"].items())
    assert not torch.equal(alone["seen"][0]["2.weight"], alone["seen"][-1]["2.weight"])


def test_fabric_trains_one_network_of_layers_that_were_exchanged_before(ranks: list[dict[str, Any]]) -> None:
    one, other = (rank["fabric"] for rank in ranks)
    assert one["updates"] == other["updates"] >= 3
    assert all(torch.equal(keys, other["places"][name]) for name, keys in one["places"].items())
    assert all(torch.equal(a, b) for a, b in zip(one["values"], other["values"], strict=True))
    assert "exchange_layers(method, model)" in ranks[0]["fabric first"]["refused"]
    assert not ranks[0]["fabric first"]["exchanged"]


def test_other_places_on_one_rank_are_an_error_at_the_next_update(ranks: list[dict[str, Any]]) -> None:
    assert all("the masks of 0.weight are not the same on every rank" in rank["refused"] for rank in ranks)
