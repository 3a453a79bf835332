"""Gradients of pruned weights that are inf or NaN: active weights step on, and nothing keeps them."""

import copy
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.inside import gates_of, parameters_of
from support.methods import every_method, method
from torch import Tensor, nn

from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.testing.comparison import assert_effective, per_element_state
from sparse_callbacks.testing.networks import OPTIMIZERS, ByHand, Classifier, conv_net
from sparse_callbacks.testing.runs import fit, watch

BAD_BATCHES = (0, 5, 6, 11)


def unseen(callback: Any, name: str) -> Tensor:
    """Weights that the forward pass did not see: gates of a sample may be closed where the medians are open."""
    factor, mask = gates_of(callback, name), callback.masks[name]
    return ~mask if factor is None else (factor == 0).expand(mask.shape)


def spoil(callback: Any, bad: float, seen: list[int]) -> None:
    """Gradients of weights that the forward pass did not see become ``bad``."""
    for name, p in parameters_of(callback).items():
        if p.grad is not None:
            p.grad[unseen(callback, name)] = bad
            seen.append(int(unseen(callback, name).sum()))


class Spoilt(Classifier):
    def __init__(self, net: nn.Module | None = None, optimizer: str = "sgd", bad: float = torch.nan) -> None:
        super().__init__(net, optimizer)
        self.bad, self.batches, self.seen = bad, 0, []  # type: ignore[var-annotated]
        self.callback: Any = None

    def on_after_backward(self) -> None:
        if self.batches in BAD_BATCHES:
            spoil(self.callback, self.bad, self.seen)
        self.batches += 1


class SpoiltByHand(ByHand):
    """The gradients of a pruned weight come out of the backward pass itself, before anybody else sees them."""

    def __init__(self, net: nn.Module | None = None, bad: float = torch.nan, clip: float | None = 0.5) -> None:
        super().__init__(net, "adamw", clip=clip)
        self.bad, self.batches, self.seen = bad, 0, []  # type: ignore[var-annotated]
        self.callback: Any = None

    def on_before_backward(self, loss: Tensor) -> None:
        handles = []

        def spoilt(name: str, p: nn.Parameter) -> None:
            def hook(gradient: Tensor) -> Tensor:
                self.seen.append(int(unseen(self.callback, name).sum()))
                return torch.where(unseen(self.callback, name), self.bad, gradient)

            handles.append(p.register_hook(hook))

        for name, p in parameters_of(self.callback).items() if self.batches in BAD_BATCHES else ():
            spoilt(name, p)
        self.handles = handles

    def on_after_backward(self) -> None:
        for handle in self.handles:
            handle.remove()
        self.batches += 1


def assert_clean(trainer: pl.Trainer, module: Any, callback: Any) -> None:
    """No weight, dense value, saved tensor or optimizer state is inf or NaN, and pruned weights are zero."""
    assert_effective(module, callback)
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    state = with_truths(callback.state_dict())
    for kind in ("aux", "dense"):
        for key, tensor in state[kind].items():
            assert bool(tensor.isfinite().all()), (kind, key)
    for p in module.parameters():
        for key, tensor in per_element_state(trainer.optimizers[0], p).items():
            assert bool(tensor.isfinite().all()), key


def run(module: Any, callback: Any) -> None:
    module.callback = callback
    last: dict[str, Tensor] = {}

    def check(trainer: pl.Trainer, module: Any, index: int) -> None:
        assert_clean(trainer, module, callback)
        now = {n: p.detach().clone() for n, p in module.named_parameters()}
        if index in BAD_BATCHES and last:
            rested = [n for n in callback.masks if n.endswith("weight") and torch.equal(last[n], now[n])]
            assert rested == [], "active weights did not step"
        last.update(copy.deepcopy(now))

    fit(module, callback, watch(check))
    assert sum(module.seen) > 0


@pytest.mark.combinations
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@every_method
def test_active_weights_step_and_nothing_keeps_them(name: str, bad: float, optimizer: str) -> None:
    run(Spoilt(optimizer=optimizer, bad=bad), method(name, restart=False))


@every_method
def test_in_every_precision(name: str) -> None:
    for dtype in (torch.float64, torch.bfloat16):
        run(Spoilt(conv_net().to(dtype)), method(name, restart=False))


@pytest.mark.combinations
@pytest.mark.parametrize("bad", [torch.nan, -torch.inf])
@every_method
def test_a_clip_by_hand_does_not_spread_them(name: str, bad: float) -> None:
    run(SpoiltByHand(bad=bad), method(name, restart=False))


@every_method
def test_where_nobody_waits_for_the_device(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU, where whether a gradient was finite is a tensor."""
    original = torch_optimizers.all_finite
    monkeypatch.setattr(torch_optimizers, "all_finite", lambda g: torch.tensor(bool(original(g))))
    module, callback = Spoilt(optimizer="adamw"), method(name, restart=False)
    module.callback = callback
    last: list[pl.Trainer] = []

    def check(trainer: pl.Trainer, module: Any, index: int) -> None:
        assert_effective(module, callback)
        assert all(bool(p.isfinite().all()) for p in module.parameters())
        last[:] = [trainer]

    monkeypatch.setattr("sparse_callbacks.core.engine.ROOTS_EVERY", 2)
    fit(module, callback, watch(check))
    # its cleaning comes from time to time
    assert_clean(last[0], module, callback)
