"""The operations over the weights that each method adds to a step of SGD, as a list, and the counts in its docstring."""

import math
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.passes import WIDTHS, Passes, added_passes, network

import sparse_callbacks
from sparse_callbacks import methods, sparsify

QUIET: dict[str, Any] = {"print_plan": False}
LATE: dict[str, Any] = {**QUIET, "every": 100}
METHODS: dict[str, Callable[[], Any]] = {
    "Static": lambda: methods.Static(0.8, **QUIET),
    "PruneAtStart": lambda: methods.PruneAtStart(0.8, score="magnitude", **QUIET),
    "EarlyCroP": lambda: methods.EarlyCroP(0.8, loss=lambda module, x: module(x).square().mean(), **QUIET),
    "SET": lambda: methods.SET(0.8, **LATE),
    "RigL": lambda: methods.RigL(0.8, **LATE),
    "SNFS": lambda: methods.SNFS(0.8, **LATE),
    "CTRE": lambda: methods.CTRE(0.8, **LATE),
    "GMP": lambda: methods.GMP(0.8, start=0, stop=900, **LATE),
    "GaP": lambda: methods.GaP(0.8, partitions=3, every=300, restart=False, **QUIET),
    "DPF": lambda: methods.DPF(0.8, stop=900, **LATE),
    "NM": lambda: methods.NM("2:4", **LATE),
    "SMCP": lambda: methods.SMCP(0.5, start=10, stop=900, every=20, **QUIET),
    "ChannelPruning": lambda: methods.ChannelPruning(0.5, start=60, stop=900, **LATE),
    "ConstrainedL0": lambda: methods.ConstrainedL0(0.5, **QUIET),
    "SupTickets": lambda: methods.SupTickets(methods.SET(0.8, **LATE)),
}
# none for SMCP: scores are of layers that read channels, and decay is of channels that were pruned, so it is for each
# operation another share of the weights
LISTS: dict[str, Passes] = {
    **{key: {("bitwise_and", "in place"): 1, ("sum", "reads"): 1} for key in METHODS},
    "SNFS": {
        ("add", "in place"): 1,
        ("bitwise_and", "in place"): 1,
        ("mul", "in place"): 1,
        ("sum", "reads"): 1,
    },
    "NM": {("add", "in place"): 1, ("bitwise_and", "in place"): 1, ("sub", "in place"): 1, ("sum", "reads"): 1},
    "SMCP": {},
    "ConstrainedL0": {("mul", "in place"): 4, ("sum", "reads"): 2},
}
OF_SINGLE_WEIGHTS: Passes = {
    ("add", "in place"): 9,
    ("addcmul", "in place"): 3,
    ("amax", "reads"): 1,
    ("clamp", "in place"): 3,
    ("copy", "in place"): 1,
    ("div", "in place"): 3,
    ("lerp", "in place"): 1,
    ("logit", "in place"): 1,
    ("mean", "reads"): 1,
    ("mul", "in place"): 14,
    ("sigmoid", "in place"): 3,
    ("sign", "in place"): 1,
    ("sqrt", "in place"): 1,
    ("sum", "reads"): 1,
}
SENTENCE = re.compile(r"Passes over the weights in a step: (\d+) in place\s.*?and (\d+) that reads?\s", re.DOTALL)


@pytest.mark.parametrize("name", METHODS)
def test_a_step_without_an_update_adds_these_operations_and_takes_no_fresh_memory(name: str) -> None:
    found = added_passes(METHODS[name])
    assert not [key for key in found if key[1] == "fresh"], found
    if LISTS[name]:
        assert found == LISTS[name]
    documented = SENTENCE.search(getattr(methods, name).__doc__ or "")
    assert documented, f"{name} does not say how many passes over the weights a step adds"
    counts = [math.ceil(sum(size for key, size in found.items() if key[1] == kind)) for kind in ("in place", "reads")]
    assert [int(n) for n in documented.groups()] == counts


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_gates_of_single_weights_compute_in_memory_that_is_there(optimizer: str) -> None:
    method = methods.ConstrainedL0
    found = added_passes(lambda: method(0.5, unit="weight", gate_optimizer=optimizer, **QUIET))
    if optimizer == "adam":
        assert found == OF_SINGLE_WEIGHTS
        in_place = sum(size for key, size in found.items() if key[1] == "in place")
        assert f"{in_place:g} in place" in (method.__doc__ or "")
    assert not [key for key in found if key[1] == "fresh"], found


def test_every_method_is_in_the_list() -> None:
    assert METHODS.keys() | {"ParallelGaP"} == set(methods.__all__)
    assert sparse_callbacks.ParallelGaP.__doc__  # needs a Trainer; its steps are those of GaP


@pytest.mark.filterwarnings("ignore:ConstrainedL0 ended at an expected density", "ignore:SMCP ended at")
@pytest.mark.parametrize("name", ["ConstrainedL0", "SMCP"])
def test_a_run_that_is_over_lets_go_of_the_memory_that_steps_computed_in(name: str) -> None:
    method = METHODS[name]()
    model, batch = network(), torch.rand(4, WIDTHS[0])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with sparsify(method, model, optimizer, 20, data=[batch] * 20, forward=lambda m, x: m(x)) as run:
        for _ in range(12):
            with run.batch():
                model(batch).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        assert method.weights.scratch.nbytes > 0
    assert method.weights.scratch.nbytes == 0
