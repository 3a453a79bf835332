"""Exchanged layers in loops of other kinds train as masked ones do: several optimizers, two passes, layers that thaw."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.exchanged_loops import MOVING, batches, loss_of, net
from support.sam import TwoCalls
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sparse_callbacks import SET, RigL, SparseRun, sparsify

Loop = Callable[[Any, nn.Sequential], tuple[SparseRun, nn.Module]]


def same(loop: Loop, method: type, **storage: Any) -> None:
    """The loop ends with the same masks and weights under masked storage and with exchanged layers."""
    (one, masked), (other, sparse) = (
        loop(method(0.8, **MOVING | more), net()) for more in ({}, {"storage": "sparse"} | storage)
    )
    assert other.method.weights.layers_stored
    assert one.updates == other.updates > 1
    for name, mask in one.masks.items():
        assert torch.equal(mask, other.masks[name]), name
    dense = sparse.state_dict()
    for name, weight in masked.state_dict().items():
        assert (weight - dense[name]).abs().max() < 1e-10, name


@pytest.mark.parametrize("method", [SET, RigL])
def test_two_optimizers_that_step_in_turn(method: type) -> None:
    def loop(made: Any, model: nn.Sequential) -> tuple[SparseRun, nn.Module]:
        first = torch.optim.SGD(model[0].parameters(), 0.1, momentum=0.9)
        second = torch.optim.Adam(model[2:].parameters(), 1e-2)
        run, data = sparsify(made, model, [first, second], steps=100), batches()
        for number in range(18):
            loss_of(model, next(data)).backward()
            chosen = second if number % 3 else first  # the other one accumulates
            chosen.step()
            chosen.zero_grad()
        return run, model

    same(loop, method)


@pytest.mark.parametrize("method", [SET, RigL])
def test_an_optimizer_of_two_passes(method: type) -> None:
    def loop(made: Any, model: nn.Sequential) -> tuple[SparseRun, nn.Module]:
        optimizer = TwoCalls(model.parameters())
        run, data = sparsify(made, model, optimizer, steps=100), batches()
        for _ in range(9):
            batch = next(data)
            loss_of(model, batch).backward()
            optimizer.first_step(zero_grad=True)
            loss_of(model, batch).backward()
            optimizer.second_step(zero_grad=True)
        return run, model

    same(loop, method)


def test_layers_that_are_computed_again_in_the_backward_pass() -> None:
    def loop(made: Any, model: nn.Sequential) -> tuple[SparseRun, nn.Module]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run, data = sparsify(made, model, optimizer, steps=100), batches()
        for number in range(12):
            x, y = next(data)
            x.requires_grad_(True)
            hidden: Any = checkpoint(model[:4], x, use_reentrant=number % 4 == 0)
            nn.functional.cross_entropy(model[4](hidden), y).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        return run, model

    same(loop, RigL)


def test_a_clip_of_the_loop_sees_live_gradients() -> None:
    def loop(made: Any, model: nn.Sequential) -> tuple[SparseRun, nn.Module]:
        optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
        norms: list[Tensor] = []

        def clip(parameters: list[nn.Parameter]) -> None:
            norms.append(nn.utils.clip_grad_norm_(parameters, 0.1))

        run, data = sparsify(made, model, optimizer, steps=100, clip=clip), batches()
        for _ in range(12):
            loss_of(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert all(norm > 0.1 for norm in norms)
        return run, model

    same(loop, RigL)


@pytest.mark.parametrize("method", [SET, RigL])
def test_a_layer_that_thaws_joins_with_a_mask(method: type) -> None:
    def loop(made: Any, model: nn.Sequential) -> tuple[SparseRun, nn.Module]:
        model[2].requires_grad_(False)
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        run, data = sparsify(made, model, optimizer, steps=100), batches()
        for number in range(20):
            if number == 7:
                model[2].requires_grad_(True)
            loss_of(model, next(data)).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        assert set(run.masks) == {"0.weight", "2.weight"}
        return run, model

    same(loop, method, storage={"0.weight": "sparse"})


@pytest.mark.parametrize("method", [SET, RigL])
def test_a_layer_that_is_frozen_for_a_while_stays_as_it_is(method: type) -> None:
    """Through windows whose step is an update, too."""

    def loop(made: Any, model: nn.Sequential) -> tuple[SparseRun, nn.Module]:
        optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
        run, data = sparsify(made, model, optimizer, steps=100), batches()
        for number in range(24):
            if number in (6, 16):
                model[2].requires_grad_(number == 16)
            loss_of(model, next(data)).backward()
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        return run, model

    same(loop, method)


def test_a_model_that_is_converted_within_a_window_goes_on() -> None:
    def loop(made: Any, model: nn.Sequential) -> tuple[SparseRun, nn.Module]:
        model.float()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run, data = sparsify(made, model, optimizer, steps=100), batches()
        for number in range(12):
            x, y = next(data)
            loss_of(model, (x.to(model[4].weight.dtype), y)).backward()
            if number == 0:
                model.double()  # gradients too
            if number % 2:
                optimizer.step()
                optimizer.zero_grad()
        return run, model

    same(loop, RigL)
