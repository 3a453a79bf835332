"""Sup-tickets around bases with arguments of their own: how they drop and grow, share out, and begin."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.loops import data
from torch import Tensor, nn

from sparse_callbacks import SET, SNFS, DropAndGrow, RigL, Score, Spdy, SupTickets, sparsify
from sparse_callbacks.testing.comparison import differences

STEPS, BOUNDS = 24, [12, 18, 24]


def loss_of(module: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


BASES: dict[str, Callable[..., DropAndGrow]] = {
    "set-signed": lambda **o: SET(0.8, drop="signed", new_weights="uniform", **o),
    "set-neurons": lambda **o: SET(0.8, neuron_importance=0.2, importance_start=4, importance_every=2, **o),
    "set-spdy": lambda **o: SET(distribution=Spdy(budget=0.5, input=(12,)), **o),
    "rigl-lamp": lambda **o: RigL(0.8, distribution="lamp", **o),
    "rigl-snip": lambda **o: RigL(0.8, initial_mask=Score("snip", batches=2, loss=loss_of), **o),
    "snfs-global": lambda **o: SNFS(0.8, distribution="global", rescale="layer", **o),
}


def around(name: str) -> SupTickets:
    base = BASES[name](every=2, print_plan=False)
    return SupTickets(base, share=0.5, cycles=2, low_lr=0.01, high_lr=0.05)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 4)
    )


def trained(method: Any, saved: Any = None, saves: list[Any] | None = None) -> tuple[nn.Module, list[list[int]]]:
    """Trains for 24 steps; the network, and the active weights of each layer after each step."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    begin, counts = 0, []
    if saved is not None:
        module.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        begin = saved["step"]
    with sparsify(method, module, optimizer, STEPS, data=data(), state=saved and saved["run"]) as run:
        for number, batch in list(enumerate(list(data()) * 2))[begin:]:
            optimizer.zero_grad()
            loss_of(module, batch).backward()
            optimizer.step()
            counts.append([int(mask.sum()) for mask in run.masks.values()])
            parts = {"model": module, "optimizer": optimizer, "run": run}
            if saves is not None:
                state = {name: part.state_dict() for name, part in parts.items()}
                saves.append(copy.deepcopy(state | {"step": number + 1}))
    return module, counts


@pytest.mark.parametrize("name", BASES)
def test_the_first_part_has_the_masks_of_the_base_alone(name: str) -> None:
    method, alone = around(name), BASES[name](every=2, print_plan=False)
    trained(method, saves=(saves := []))
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    with sparsify(alone, module, optimizer, BOUNDS[0], data=data()):
        for batch in data():
            optimizer.zero_grad()
            loss_of(module, batch).backward()
            optimizer.step()
    assert differences(saves[BOUNDS[0] - 1]["model"], module.state_dict()) == []


@pytest.mark.parametrize("name", BASES)
def test_the_merged_ticket_has_as_many_weights_as_the_first_part_ends_with(name: str) -> None:
    method = around(name)
    module, counts = trained(method)
    first = counts[BOUNDS[0] - 1]
    assert counts[BOUNDS[0] : -1] == [first] * (STEPS - BOUNDS[0] - 1)
    assert sum(counts[-1]) == sum(first)
    assert method.is_merged
    if name == "set-neurons":
        assert sum(first) < sum(counts[0])
    else:
        assert first == counts[0]
    assert sum(int(p.count_nonzero()) for p in module.parameters() if p.ndim == 2) == sum(first)


def test_a_budget_of_cost_holds_for_the_merged_ticket() -> None:
    method = around("set-spdy")
    module, counts = trained(method)
    assert counts == [counts[0]] * STEPS
    assert method.plan().joint is None
    dense, sparse = (sum(map(count, module.parameters())) for count in (Tensor.numel, lambda p: int(p.count_nonzero())))
    others = sum(p.numel() for p in module.parameters() if p.ndim == 1)
    assert sparse - others == sum(counts[0]) <= 0.5 * (dense - others)
    # the same magnitudes under one threshold would share them out otherwise
    _, joint = trained(around("rigl-lamp"))
    assert joint[-1] != joint[0]


@pytest.mark.parametrize("name", BASES)
def test_resume_is_bitwise_around_the_bounds(name: str) -> None:
    whole, _ = trained(around(name), saves=(saves := []))
    for step in (3, 11, 12, 13, 18, 23):
        resumed, _ = trained(around(name), saved=saves[step - 1])
        assert differences(resumed.state_dict(), whole.state_dict()) == [], step


def test_the_arguments_of_the_base_are_read_as_they_were_given() -> None:
    method = around("set-signed")
    assert (method.arguments["drop"], method.arguments["new_weights"]) == ("'signed'", "'uniform'")
    assert copy.deepcopy(method).arguments == method.arguments
