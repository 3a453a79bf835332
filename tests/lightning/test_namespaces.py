"""The callbacks belong to both Lightning packages, and either Trainer takes one of them without a list."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import loader
from support.nets import mlp

import sparse_callbacks
from sparse_callbacks import RigL, methods

PACKAGES = ["pytorch_lightning", "lightning.pytorch"]


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_is_a_callback_of_both_packages(name: str, package: str) -> None:
    assert issubclass(getattr(sparse_callbacks, name), pytest.importorskip(package).Callback)


@pytest.mark.parametrize("package", PACKAGES)
def test_one_callback_without_a_list(package: str, tmp_path: Path) -> None:
    pytest.importorskip(package)
    lightning: Any = importlib.import_module(package)

    class Task(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = mlp(12, 20, 6)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            x, y = batch
            return torch.nn.functional.mse_loss(self.net(x), y)

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)

    callback, module = RigL(0.9), Task()
    trainer = lightning.Trainer(
        accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        default_root_dir=tmp_path, fast_dev_run=True, callbacks=callback,
    )  # fmt: skip
    before = {n: p.detach().clone() for n, p in module.named_parameters()}
    trainer.fit(module, loader(4))
    assert trainer.global_step == 1
    assert callback.masks
    for name, mask in callback.masks.items():
        weight = module.get_parameter(name).detach()
        assert not weight[~mask].any()
        assert not torch.equal(weight, before[name])
    assert (
        callback.measured_sparsity()["sparsity/total"]
        == pytest.approx(callback.plan().total)
        == pytest.approx(0.9, abs=0.01)
    )
