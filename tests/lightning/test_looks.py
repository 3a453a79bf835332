"""Under a Trainer and in a loop the first batch meets the model as the user has made it."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.loops import data, sgd
from torch import Tensor, nn

from sparse_callbacks import CTRE, SMCP, ChannelPruning, ConstrainedL0, SparsityCallback, sparsify


class Watched(nn.Module):
    """Keeps the largest input and the number of its calls as tensors, in eval mode too, as observers do."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.last = nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Linear(64, 4)
        self.register_buffer("largest", torch.zeros(()))
        self.register_buffer("calls", torch.tensor(0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.largest = torch.maximum(self.largest, x.detach().abs().max())
        # behind an activation function, so that L0 looks with NaN where it comes from
        return self.last(self.norm(self.conv(x).relu()).flatten(1))


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Watched()
        self.at_first: tuple[float, int] | None = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        if self.at_first is None:
            self.at_first = float(self.net.largest), int(self.net.calls)
        loss = nn.functional.cross_entropy(self(batch[0]), batch[1])
        self.log("loss", loss, on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self) -> Any:
        return sgd(self)


METHODS = {
    "l0": lambda: ConstrainedL0(density=0.5, print_plan=False),
    "smcp": lambda: SMCP(budget=0.9, every=2, print_plan=False, round_to=1, prune_stem=True),
    "channels": lambda: ChannelPruning(budget=0.9, every=2, print_plan=False, round_to=1, prune_stem=True),
    "ctre": lambda: CTRE(0.5, every=2, print_plan=False),
}


def fit(callbacks: SparsityCallback | list[SparsityCallback], module: Module) -> pl.Trainer:
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    trainer = pl.Trainer(max_epochs=1, accelerator="cpu", callbacks=callbacks, **quiet)
    trainer.fit(module, data(2, 6, 6, batches=4))
    return trainer


@pytest.mark.parametrize("method", METHODS)
def test_the_first_batch_of_a_trainer_meets_an_untouched_model(method: str) -> None:
    module = Module()
    fit(METHODS[method](), module)
    assert module.at_first == (0, 0)
    assert (int(module.net.calls), int(module.net.norm.num_batches_tracked)) == (4, 4)


@pytest.mark.parametrize("method", METHODS)
def test_the_first_batch_of_a_loop_meets_an_untouched_model(method: str) -> None:
    net, loader = Watched(), data(2, 6, 6, batches=4)
    optimizer = sgd(net)
    with sparsify(METHODS[method](), net, optimizer, steps=4, data=loader) as run:
        assert (float(net.largest), int(net.calls)) == (0, 0)
        for x, y in loader:
            optimizer.zero_grad()
            with run.batch():
                nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert int(net.calls) == 4


def test_a_pass_logs_nothing() -> None:
    def forward(module: Any, batch: Any) -> Tensor:
        module.log("of the pass", 1.0)
        return module(batch[0])

    class Logged(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            if batch_idx == 0:
                found.append(dict(trainer._results))

    found: list[Any] = []
    module = Module()
    trainer = fit([CTRE(0.5, every=2, print_plan=False, forward=forward), Logged()], module)
    assert found == [{}]
    assert "loss" in trainer.callback_metrics
    assert "of the pass" not in trainer.callback_metrics
    assert "log" not in vars(module)
