"""A hand-written loop whose gradients of pruned weights are inf or NaN."""

from typing import Any

import pytest
import torch
from support.inside import gates_of, parameters_of
from support.loops import METHODS, STEPS, adamw, assert_masked, batches, begin, data, loss_of, net, sgd
from torch import Tensor, nn

from sparse_callbacks.core.saved_bits import is_bits
from sparse_callbacks.testing.comparison import per_element_state


def clip(parameters: list[nn.Parameter]) -> object:
    return nn.utils.clip_grad_norm_(parameters, 0.5)


def unseen(method: Any, name: str) -> Tensor:
    factor, mask = gates_of(method, name), method.masks[name]
    return ~mask if factor is None else (factor == 0).expand(mask.shape)


@pytest.mark.combinations
@pytest.mark.parametrize("options", [{}, {"clip": clip}], ids=["plain", "clipped"])
@pytest.mark.parametrize("make", [sgd, adamw])
@pytest.mark.parametrize("name", METHODS)
def test_active_weights_step_and_nothing_keeps_them(name: str, make: Any, options: dict[str, Any]) -> None:
    model = net()
    optimizer = make(model)
    run = begin(name, model, optimizer, **options)
    spoilt = 0
    for number, batch in enumerate(batches(data(), 0, STEPS)):
        with run.batch():
            loss_of(model, batch).backward()
            for key, p in parameters_of(run.method).items() if number in (0, 9, 10, 20) else ():
                assert p.grad is not None
                p.grad[unseen(run.method, key)] = (torch.nan, torch.inf)[number % 2]
                spoilt += int(unseen(run.method, key).sum())
        before = [p.detach().clone() for p in model.parameters()]
        optimizer.step()
        optimizer.zero_grad()
        assert_masked(model, run)
        if number in (0, 9, 10, 20):
            assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))
        state = run.state_dict()
        kept = [value for part in ("aux", "dense") for value in state[part].values() if not is_bits(value)]
        tensors = [*kept, *(p.detach() for p in model.parameters())]
        tensors += [s for p in model.parameters() for s in per_element_state(optimizer, p).values()]
        assert all(bool(t.isfinite().all()) for t in tensors)
    assert spoilt > 0
