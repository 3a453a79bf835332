"""What is said of exchanged layers that the first batch of a loop makes no use of, or another than by calling them."""

import warnings
from typing import Any

import pytest
import torch
from support import loops
from torch import Tensor, nn

from sparse_callbacks import sparsify
from sparse_callbacks.methods import SET


class Idle(nn.Module):
    """Its second layer is not called, and the weight of its third is read."""

    def __init__(self, calls: bool, reads: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.idle, self.read = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 4)
        self.calls, self.reads = calls, reads

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        x = self.idle(x) if self.calls else x
        return nn.functional.linear(x, self.read.weight, self.read.bias) if self.reads else self.read(x)


@pytest.mark.parametrize("calls", [True, False])
@pytest.mark.parametrize("reads", [True, False])
def test_one_warning_names_layers_that_the_first_batch_did_not_call_and_weights_that_are_read(
    calls: bool, reads: bool
) -> None:
    model = Idle(calls, reads)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsify(SET(0.5, storage="sparse", distribution="uniform", print_plan=False, every=2), model, optimizer, 6)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for x, y in [*loops.data()][:3]:
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
    texts = [str(w.message) for w in caught if "sparse storage" in str(w.message) or "dense matrix" in str(w.message)]
    assert len(texts) == (0 if calls and not reads else 1)
    if not calls:
        assert "(idle.weight)" in texts[0] or "(idle.weight, read.weight)" in texts[0]
    if reads:
        assert "reads read.weight" in texts[0]
    assert not model.first._forward_pre_hooks


def test_a_compiled_layer_is_known_to_be_used_by_its_gradient() -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    sparsify(SET(0.5, storage="sparse", distribution="uniform", print_plan=False, every=2), model, optimizer, 6)
    compiled: Any = torch.compile(model, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        for x, y in [*loops.data()][:2]:
            nn.functional.cross_entropy(compiled(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()


def test_a_model_that_is_converted_after_the_run_has_begun_goes_on() -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.1)
    run = sparsify(SET(0.5, storage="sparse", distribution="uniform", print_plan=False, every=2), model, optimizer, 6)
    model.double()
    for x, y in [*loops.data()][:6]:
        nn.functional.cross_entropy(model(x.double()), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert run.updates == 2
    assert model[0].values.dtype == torch.float64
