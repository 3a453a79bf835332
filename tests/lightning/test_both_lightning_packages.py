"""The callbacks under ``lightning.pytorch``, whose Trainer, module and Callback classes are others than
``pytorch_lightning``'s."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import loader
from support.nets import mlp
from support.rig import copied_masks

from sparse_callbacks import GMP, SET, SNFS, CurvatureMonitor, RigL, SparsityCallback, Static

lightning = pytest.importorskip("lightning.pytorch")


class Task(lightning.LightningModule):  # type: ignore[misc, name-defined]
    def __init__(self) -> None:
        super().__init__()
        self.net = mlp(12, 20, 6)

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        x, y = batch
        return torch.nn.functional.mse_loss(self.net(x), y)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def made(path: Path, callbacks: list[Any], epochs: int, **options: Any) -> Any:
    return lightning.Trainer(
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        default_root_dir=path,
        max_epochs=epochs,
        callbacks=callbacks,
        **options,
    )


def callback(method: Any) -> SparsityCallback:
    times = {} if method is Static else {"every": 2, "stop": 12}
    return method(0.6, print_plan=False, **times)


@pytest.mark.parametrize("method", [RigL, SET, SNFS, Static, GMP], ids=lambda m: m.__name__)
def test_fit_and_resume(method: Any, tmp_path: Path) -> None:
    data = loader(4)
    whole, module = callback(method), Task()
    trainer = made(tmp_path, [whole], 3, gradient_clip_val=1.0)
    trainer.fit(module, data)
    assert whole.updates > 0 or method is Static
    assert whole.at_target
    assert float(trainer.callback_metrics["sparsity/total"]) == pytest.approx(
        whole.measured_sparsity()["sparsity/total"]
    )
    for name, mask in whole.masks.items():
        assert not module.get_parameter(name)[~mask].any()

    first = made(tmp_path, [callback(method)], 2, gradient_clip_val=1.0)
    first.fit(Task(), data)
    first.save_checkpoint(tmp_path / "half.ckpt")
    assert any(method.__name__ in key for key in torch.load(tmp_path / "half.ckpt", weights_only=True)["callbacks"])
    resumed, again = callback(method), Task()
    torch.manual_seed(99)
    made(tmp_path, [resumed], 3, gradient_clip_val=1.0).fit(again, data, ckpt_path=tmp_path / "half.ckpt")
    assert all(torch.equal(m, resumed.masks[n]) for n, m in copied_masks(whole).items())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), again.parameters(), strict=True))
    assert (resumed.step, resumed.updates) == (whole.step, whole.updates)


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "StochasticWeightAveraging"])
def test_its_averages_are_sparse(kind: str, tmp_path: Path) -> None:
    from lightning.pytorch import callbacks

    arguments = {"swa_lrs": 0.01, "swa_epoch_start": 1} if kind == "StochasticWeightAveraging" else {"decay": 0.8}
    one, module, averager = callback(SET), Task(), getattr(callbacks, kind)(**arguments)
    made(tmp_path, [averager, one], 3).fit(module, loader(4))
    average = getattr(averager._average_model, "module", averager._average_model)
    for name, p in module.named_parameters():
        assert torch.equal(p, average.get_parameter(name))
        assert name not in one.masks or not p[~one.masks[name]].any()


def test_a_tested_checkpoint_brings_its_masks(tmp_path: Path) -> None:
    class Tested(Task):
        def test_step(self, batch: Any, batch_idx: int) -> None:
            self.net(batch[0])

    one, module = callback(RigL), Tested()
    save = lightning.callbacks.LambdaCallback(
        on_train_epoch_end=lambda trainer, _: trainer.save_checkpoint(tmp_path / f"{trainer.current_epoch}.ckpt")
    )
    trainer = made(tmp_path, [one, save], 3)
    trainer.fit(module, loader(4))
    late = copied_masks(one)
    trainer.test(module, loader(4), ckpt_path=tmp_path / "0.ckpt", verbose=False)
    assert any(not torch.equal(m, late[n]) for n, m in one.masks.items())
    parameters = dict(module.named_parameters())
    assert not any(parameters[n][~m].any() for n, m in one.masks.items())


def test_curvature_is_measured(tmp_path: Path) -> None:
    monitor = CurvatureMonitor(every=2)
    made(tmp_path, [callback(Static), monitor], 1).fit(Task(), loader(4))
    assert monitor.radii.keys() == {"net.0.weight", "net.2.weight"}
