"""Layers with complex weights beside real ones: dense in every method, and their channels stay."""

from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.loops import METHODS, data
from torch import Tensor, nn

from sparse_callbacks import channel_groups, slim, sparsify


class Net(nn.Module):
    """Behind its complex layer two real ones that make and read channels."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.waves = nn.Linear(12, 24, dtype=torch.complex64)
        self.hidden, self.middle, self.last = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.hidden(self.waves(x.to(self.waves.weight)).abs().to(self.hidden.weight)).relu()
        return self.last(self.middle(x).relu())


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.05, momentum=0.9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_every_method_trains_beside_a_complex_layer_under_a_trainer(method: str) -> None:
    callback, module = METHODS[method](), Module()
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    pl.Trainer(max_epochs=2, accelerator="cpu", callbacks=[callback], **quiet).fit(module, data())
    assert "net.hidden.weight" in callback.masks or "net.middle.weight" in callback.masks
    assert "net.waves.weight" not in callback.masks
    assert callback.plan()["net.waves.weight"].reason.startswith("complex64: only weights in float16")
    assert all(bool(p.isfinite().all()) for p in module.parameters())


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.filterwarnings("ignore")
def test_every_method_trains_beside_a_complex_layer_in_a_loop(method: str) -> None:
    net = Net()
    optimizer = torch.optim.AdamW(net.parameters(), 1e-2)
    with sparsify(METHODS[method](), net, optimizer, steps=12, data=data(), on_restart=lambda: None) as run:
        for x, y in data():
            optimizer.zero_grad()
            with run.batch():
                nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
    assert "waves.weight" not in run.masks
    assert all(bool(p.isfinite().all()) for p in net.parameters())


def test_channels_of_complex_layers_stay_and_those_of_others_go() -> None:
    net, example = Net(), torch.randn(1, 12)
    groups = {g.name: g.reason for g in channel_groups(net, example)}
    assert groups["waves"].startswith("waves: weights in complex64 lose no channels")
    assert groups["hidden"] == groups["middle"] == ""
    read = torch.arange(24) % 2 == 0
    masks = {"hidden.weight": read.expand(24, 24), "middle.weight": read.expand(24, 24)}
    small, proof = slim(net, masks, example)
    assert small.waves.weight.shape == (24, 12)
    assert small.middle.weight.shape == (24, 12)
    assert proof.removed == 12
