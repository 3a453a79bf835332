"""Masks that are given for layers which wait to be trained."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sparse_callbacks import RigL, SparseRun, Static, sparsify
from sparse_callbacks.core.method import Method

LAYERS = ("0.weight", "2.weight", "4.weight")
METHODS: dict[str, Any] = {
    "static": lambda start: Static(initial_mask=start, print_plan=False),
    "rigl": lambda start: RigL(initial_mask=start, every=5, stop=10, print_plan=False),
}


def pruned() -> tuple[nn.Sequential, torch.optim.Optimizer]:
    """A pruned network whose last layer alone is trained, and its optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Tanh(), nn.Linear(10, 10), nn.Tanh(), nn.Linear(10, 4))
    for name in LAYERS:
        weight = model.get_parameter(name)
        weight.data *= torch.rand(weight.shape) > 0.7
    model[:4].requires_grad_(False)
    return model, torch.optim.SGD(model[4:].parameters(), lr=0.05)


def train(run: SparseRun, model: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        x = torch.randn(6, 12, generator=torch.Generator().manual_seed(step))
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def thaw(model: nn.Sequential, optimizer: torch.optim.Optimizer) -> None:
    model[:4].requires_grad_(True)
    optimizer.add_param_group({"params": list(model[:4].parameters())})


def masks_and_weights(run: SparseRun, model: nn.Module) -> dict[str, torch.Tensor]:
    return {**run.masks, **{f"w {n}": p.detach().clone() for n, p in model.named_parameters()}}


@pytest.mark.combinations
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("given", ["nonzero", "a file"])
def test_a_run_from_before_the_thaw_goes_on_without_what_the_masks_came_from(
    name: str, given: str, tmp_path: Path
) -> None:
    model, optimizer = pruned()
    found = {n: model.get_parameter(n) != 0 for n in LAYERS}
    start: Any = given
    if given == "a file":
        start = tmp_path / "pruned.pt"
        torch.save(model.state_dict(), start)
    method: Method = METHODS[name](start)
    run = sparsify(method, model, optimizer, steps=12)
    train(run, model, optimizer, 0, 3)
    saved, weights, state = copy.deepcopy((run.state_dict(), model.state_dict(), optimizer.state_dict()))
    assert set(run.masks) == {LAYERS[2]}
    thaw(model, optimizer)
    train(run, model, optimizer, 3, 4)
    assert all(torch.equal(run.masks[n], found[n]) for n in LAYERS[:2])
    assert not [key for key in method.aux if key.startswith("waiting/")]
    train(run, model, optimizer, 4, 9)
    if given == "a file":
        start.unlink()
    again, theirs = pruned()
    again.load_state_dict(weights)
    theirs.load_state_dict(state)
    resumed = sparsify(METHODS[name](start), again, theirs, steps=12, state=saved)
    thaw(again, theirs)
    train(resumed, again, theirs, 3, 9)
    one, other = masks_and_weights(run, model), masks_and_weights(resumed, again)
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_saved_mask_of_a_waiting_layer_that_is_none_is_refused() -> None:
    model, optimizer = pruned()
    run = sparsify(METHODS["rigl"]("nonzero"), model, optimizer, steps=12)
    saved = run.state_dict()
    run.close()
    saved["aux"]["waiting/0.weight"] = torch.ones(3, 3)
    again, theirs = pruned()
    with pytest.raises(ValueError, match=r"its waiting/0\.weight is .* and not a mask of that parameter"):
        sparsify(METHODS["rigl"]("nonzero"), again, theirs, steps=12, state=saved)
