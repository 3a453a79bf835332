"""Learning rates of single steps: set within the step alone."""

from typing import Any

import pytest
import torch
from torch import nn

from sparse_callbacks import SparsityCallback, Step, methods, sparsify
from sparse_callbacks.core.step import SetsRates


class Tenth(SetsRates, methods.Static):
    """Takes every second step at a tenth of the rate."""

    count = 0

    def before_step(self, step: Step) -> None:
        self.count += 1
        if self.count % 2 == 0:
            step.use_rates([group["lr"] / 10 for group in step.optimizer.param_groups])
        super().before_step(step)


class Callback(Tenth, SparsityCallback):
    """The same for a Trainer."""


@pytest.mark.parametrize("closure", [False, True], ids=["step", "closure"])
def test_a_step_has_its_rates_and_the_optimizer_its_own_afterwards(closure: bool) -> None:
    torch.manual_seed(0)
    module = nn.Linear(4, 4).double()
    optimizer, method, used = torch.optim.SGD(module.parameters(), lr=0.5), Tenth(0.5, print_plan=False), list[float]()

    def loss() -> Any:
        optimizer.zero_grad()
        value = module(torch.ones(2, 4).double()).pow(2).sum()
        value.backward()
        return value

    with sparsify(method, module, optimizer, 4):
        for _ in range(4):
            before = module.bias.detach().clone()
            if closure:
                optimizer.step(loss)
            else:
                loss()
                optimizer.step()
            assert module.bias.grad is not None
            used.append(float((before - module.bias.detach()).norm() / module.bias.grad.norm()))
            assert optimizer.param_groups[0]["lr"] == 0.5
    assert used == pytest.approx([0.5, 0.05, 0.5, 0.05])
    assert not optimizer._optimizer_step_pre_hooks


def test_a_skipped_step_sets_nothing_that_a_schedule_would_see() -> None:
    """The GradScaler finds an inf in every second step, of those that would be at a tenth of the rate."""
    from pytorch_lightning.plugins.precision import MixedPrecision

    from sparse_callbacks.testing.networks import Classifier
    from sparse_callbacks.testing.runs import fit, watch

    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.loss(batch) * (float("inf") if batch_idx % 2 else 1.0)

    def rates(*callbacks: Any) -> list[float]:
        found: list[float] = []
        precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
        see = watch(lambda trainer, *_: found.append(trainer.optimizers[0].param_groups[0]["lr"]))
        fit(Overflows(), *callbacks, see, plugins=[precision])
        return found

    assert rates(Callback(0.5, print_plan=False)) == rates()
