"""Optimizers that perturb weights in every k-th step alone, and optimizers without the hooks of torch's."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import loader
from support.loops import batches, begin, data, loss_of, net
from support.nets import Regression
from torch import Tensor

from sparse_callbacks import DPF, Static
from sparse_callbacks.core.two_pass import stepping
from sparse_callbacks.testing.runs import trainer_for


class EveryKth(torch.optim.Optimizer):
    """Perturbs in every k-th step, in a step of one call alone, and has only the step within in all others."""

    def __init__(self, params: Any, k: int = 12) -> None:
        super().__init__(params, {"lr": 0.1})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.1, momentum=0.9)
        self.k, self.taken = k, 0

    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        parameters = self.param_groups[0]["params"]
        with torch.enable_grad():
            loss = closure()
        self.taken += 1
        if self.taken % self.k == 0:
            old = [p.detach().clone() for p in parameters]
            with torch.no_grad():
                for p in parameters:
                    p.add_(p.grad, alpha=0.05)
            with torch.enable_grad():
                loss = closure()
            with torch.no_grad():
                for p, value in zip(parameters, old, strict=True):
                    p.copy_(value)
        self.base_optimizer.step()
        return loss


class Hidden(EveryKth):
    """Its period is in no number that could be seen."""

    def __init__(self, params: Any, k: int = 12) -> None:
        super().__init__(params, k)
        self.k = float(k)  # type: ignore[assignment]


@pytest.mark.parametrize("k", [2, 9, 12, 31])
def test_a_perturbation_in_every_kth_step_is_found_before_the_first_batch(k: int) -> None:
    optimizer = EveryKth(net().parameters(), k)
    assert stepping(optimizer) is optimizer.base_optimizer
    assert optimizer.taken == 0


MESSAGE = (
    r"Hidden asked for gradients a second time within one step, and did not do so in the steps that were tried.*"
    r"moved the weights in between.*go on from a checkpoint"
)


def test_a_late_perturbation_that_was_not_found_is_told_for_what_it_is_in_a_loop() -> None:
    model = net()
    optimizer = Hidden(model.parameters())
    run = begin("dpf", model, optimizer)
    taken = []

    def train() -> None:
        for batch in batches(data(), 0, 20):

            def closure(batch: Any = batch) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, batch)
                loss.backward()
                return loss

            optimizer.step(closure)
            taken.append(batch)

    with pytest.raises(ValueError, match=MESSAGE):
        train()
    assert (len(taken), run.step) == (11, 11)


@pytest.mark.parametrize("method", [DPF, Static], ids=lambda m: m.__name__)
def test_a_trainer_tells_the_same_and_leaves_a_sparse_network(method: Any, tmp_path: Path) -> None:
    module = Regression(configure=Hidden)
    callback = method(0.5, print_plan=False)
    with pytest.raises(ValueError, match=MESSAGE):
        trainer_for(callback, tmp_path, max_steps=40).fit(module, loader(40))
    parameters = dict(module.named_parameters())
    assert all(not parameters[n].detach()[~m].any() for n, m in callback.masks.items())


class WithoutInit(torch.optim.Optimizer):
    """As some wrappers are written."""

    def __init__(self, params: Any) -> None:
        self.inner = torch.optim.SGD(params, lr=0.1)
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)


def test_an_optimizer_whose_constructor_leaves_out_that_of_torch_is_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"WithoutInit has not all .* does not call super\(\).__init__\(.*Call it in"):
        begin("static", net(), WithoutInit(net().parameters()))
