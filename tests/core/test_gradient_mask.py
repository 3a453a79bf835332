"""Methods with a mask of their own for gradients: the same in automatic and manual optimization and in loops."""

from typing import Any

import pytest
import torch
from support.loops import batches, data, loss_of, net, sgd
from support.sam import TwoCalls
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from sparse_callbacks import GMP, SparsityCallback, Step, methods, sparsify
from sparse_callbacks.core.gradient_mask import MasksGradients
from sparse_callbacks.testing.comparison import differences, snapshot
from sparse_callbacks.testing.networks import ByHand, Classifier
from sparse_callbacks.testing.runs import fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ARGUMENTS: dict[str, Any] = {"sparsity": "linear(0.5, 0.6)", "every": 2, "start": 0, "stop": 7, "print_plan": False}


class EvenRows(MasksGradients, methods.GMP):
    """Only every second row of a weight is trained, whatever its mask."""

    def gradient_mask(self, name: str) -> Tensor:
        mask = torch.zeros_like(self.weights.masks[name])
        mask[::2] = True
        return mask


class EvenRowsCallback(EvenRows, SparsityCallback):
    """The same under a Trainer."""


class ByItself(GMP):
    """It masks gradients in before_step, and tells nobody."""

    def before_step(self, step: Step) -> None:
        for name in step.names:
            if (gradient := self.params[name].grad) is not None:
                gradient[1::2] = 0.0


class Both(EvenRows):
    """Its own mask leaves nothing of what it asks for."""

    def wants_dense_gradients(self, step: Step) -> bool:
        return True


@pytest.mark.parametrize("window", [1, 2])
def test_a_mask_of_its_own_is_the_same_in_manual_optimization(window: int) -> None:
    automatic, manual = EvenRowsCallback(**ARGUMENTS), EvenRowsCallback(**ARGUMENTS)
    usual, by_hand = Classifier(), ByHand(window=window, clip=0.3)
    one = fit(usual, automatic, accumulate_grad_batches=window, gradient_clip_val=0.3)
    other = fit(by_hand, manual)
    first, second = snapshot(one, usual, automatic), snapshot(other, by_hand, manual)
    # the sign of a masked zero depends on when it was masked
    assert [d for k in ("weights", "optimizers") for d in differences(first[k], second[k], bitwise=False)] == []


@pytest.mark.parametrize("by_hand", [True, False])
def test_a_loop_clips_what_its_mask_leaves(by_hand: bool) -> None:
    model, seen = net(), []

    def clip(parameters: list[nn.Parameter]) -> None:
        seen.append([p.grad.clone() for p in parameters if p.grad is not None and p.ndim > 1])
        clip_grad_norm_(parameters, 0.3)

    optimizer = sgd(model)
    with sparsify(EvenRows(**ARGUMENTS), model, optimizer, steps=8, clip=None if by_hand else clip) as run:
        for batch in batches(data(), 0, 8):
            loss_of(model, batch).backward()
            if by_hand:
                run.before_clipping(optimizer)
                clip([*model.parameters()])
            optimizer.step()
            optimizer.zero_grad()
    assert len(seen) == 8
    assert not any(gradient[1::2].any() for gradients in seen for gradient in gradients)
    assert (seen[-1][0][::2] != 0).sum() > run.masks["0.weight"][::2].sum()  # of pruned weights too


def test_both_passes_of_an_optimizer_move_what_they_may() -> None:
    model = net()
    optimizer, perturbed = TwoCalls(model.parameters()), []
    with sparsify(EvenRows(**ARGUMENTS | {"sparsity": "constant(0.6)"}), model, optimizer, steps=8) as run:
        for batch in batches(data(), 0, 8):
            before = model[0].weight.detach().clone()
            loss_of(model, batch).backward()
            optimizer.first_step(zero_grad=True)
            perturbed.append(model[0].weight.detach() - before)
            assert not perturbed[-1][~run.masks["0.weight"]].any()
            loss_of(model, batch).backward()
            optimizer.second_step()
            optimizer.zero_grad()
    momentum = optimizer.base_optimizer.state[model[0].weight]["momentum_buffer"]
    assert not momentum[1::2].any()
    assert (momentum[::2] != 0).sum() > run.masks["0.weight"][::2].sum()
    assert all(moved.any() for moved in perturbed)


def test_gradients_that_a_method_masks_without_saying_so_are_refused_where_they_were_masked_before() -> None:
    fit(Classifier(), ByItself(**ARGUMENTS))
    with pytest.raises(ValueError, match=r"before_step\(\) of ByItself does not call step\.mask_gradients\(\).*Masks"):
        fit(ByHand(), ByItself(**ARGUMENTS))


def test_dense_gradients_and_a_mask_that_leaves_none_are_refused_together() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"Both overrides wants_dense_gradients\(\) and derives from MasksGradients"):
        sparsify(Both(**ARGUMENTS), model, sgd(model), steps=8)
