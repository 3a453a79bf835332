"""Rows about precision, loops, tools of Lightning and checkpoints."""

import copy
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from pytorch_lightning.callbacks import BackboneFinetuning, ModelCheckpoint, StochasticWeightAveraging
from pytorch_lightning.plugins.precision import MixedPrecision
from pytorch_lightning.tuner import Tuner
from support.methods import method
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from compatibility.cells import NotApplicable, StaysDense, Trained, check_end, feature, resumes, train
from sparse_callbacks import sparsify
from sparse_callbacks.testing.comparison import assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Classifier, Rivals, conv_net
from sparse_callbacks.testing.runs import trainer_for

# ---------------------------------------------------------------------- precision


@feature("precision", "float32")
def float32(name: str, folder: Path) -> None:
    resumes(name, Classifier, folder)


@feature("precision", "64-true")
def float64(name: str, folder: Path) -> None:
    # from the start: Lightning loads a checkpoint before it converts the module, and would round to float32
    resumes(name, lambda: Classifier(conv_net().double()), folder, precision="64-true")


@feature("precision", "bf16-mixed")
def bf16_mixed(name: str, folder: Path) -> None:
    resumes(name, Classifier, folder, precision="bf16-mixed")


@feature("precision", "bf16-true")
def bf16_true(name: str, folder: Path) -> None:
    resumes(name, Classifier, folder, precision="bf16-true")


@feature("precision", "16-mixed, with skipped steps")
def fp16(name: str, folder: Path) -> None:
    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if batch_idx in (1, 4) else 1.0)

    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    train(name, Overflows(), plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler)], max_epochs=4)
    assert scaler.get_scale() < 256.0


# ---------------------------------------------------------------------- loops


@feature("loops", "accumulation and clipping")
def accumulation(name: str, folder: Path) -> None:
    options = {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3, "max_epochs": 4}
    resumes(name, Classifier, folder, **options)


@feature("loops", "manual optimization")
def manual(name: str, folder: Path) -> None:
    resumes(name, lambda: ByHand(window=2, clip=0.3), folder, max_epochs=4)


@feature("loops", "several optimizers")
def several(name: str, folder: Path) -> None:
    resumes(name, Rivals, folder)


@feature("loops", "a second fit")
def second_fit(name: str, folder: Path) -> None:
    module = Classifier()
    _, callback = train(name, module)
    masks = {n: m.clone() for n, m in callback.masks.items()}
    begun: list[Any] = []
    begin = pl.callbacks.LambdaCallback(on_train_start=lambda *_: begun.append(copy.deepcopy(callback.masks)))
    trainer_for([callback, begin, Trained(callback)]).fit(module, Batches())
    assert differences(masks, begun[0]) == []
    check_end(name, module, callback)


def _by_hand(name: str, model: Any, optimizer: Any, backward: Any, fabric: Any = None) -> None:
    callback, loader = method(name), Batches()
    run = sparsify(callback, model, optimizer, 16, data=loader, epoch=8, on_restart=lambda: None)
    net = model
    if fabric is not None:
        net, optimizer = fabric.setup(model, optimizer)
    with run:
        for epoch in range(2):
            loader.set_epoch(epoch)
            for x, y in loader:
                with run.batch():
                    backward(nn.functional.cross_entropy(net(x), y))
                optimizer.step()
                optimizer.zero_grad()
                assert_effective(model, callback)
            run.epoch_end()
    check_end(name, model, callback)


@feature("loops", "a loop by hand")
def plain_loop(name: str, folder: Path) -> None:
    net = conv_net()
    _by_hand(name, net, torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.0), lambda loss: loss.backward())


@feature("loops", "Fabric")
def in_fabric(name: str, folder: Path) -> None:
    fabric, net = Fabric(accelerator="cpu", devices=1), conv_net()
    _by_hand(name, net, torch.optim.AdamW(net.parameters(), 1e-2, weight_decay=0.0), fabric.backward, fabric)


# ---------------------------------------------------------------------- tools of Lightning


class Tuned(Classifier):
    """Has a learning rate and a batch size that Lightning's tuner can change."""

    def __init__(self) -> None:
        super().__init__()
        self.lr, self.batch_size = 0.05, 2

    def train_dataloader(self) -> Any:
        data = Batches()
        return DataLoader(TensorDataset(data.x, data.y), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return []

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


def _tuned(name: str, folder: Path, tune: Any) -> None:
    """The tuner's runs leave no trace: the fit after them ends where one ends without a tuner."""
    module, callback, plain = Tuned(), method(name), Tuned()
    trainer = trainer_for([callback], folder, max_epochs=2)
    tune(Tuner(trainer), module)
    rate, size = module.lr, module.batch_size
    trainer.fit(module)
    check_end(name, module, callback)
    plain.lr, plain.batch_size = rate, size
    other = method(name)
    theirs = trainer_for([other], folder, max_epochs=2)
    theirs.fit(plain)
    assert differences(snapshot(theirs, plain, other)["weights"], snapshot(trainer, module, callback)["weights"]) == []
    assert differences(dict(other.masks), dict(callback.masks)) == []


@feature("tools", "Tuner: lr_find")
def lr_find(name: str, folder: Path) -> None:
    _tuned(name, folder, lambda t, m: t.lr_find(m, num_training=16, early_stop_threshold=None))


@feature("tools", "Tuner: batch size")
def batch_size(name: str, folder: Path) -> None:
    _tuned(name, folder, lambda t, m: t.scale_batch_size(m, steps_per_trial=4, max_trials=2, mode="power"))


@feature("tools", "compile")
def compiled(name: str, folder: Path) -> None:
    torch._dynamo.reset()
    usual, module = Classifier(), Classifier()
    module.net.compile(backend="eager")
    expected = snapshot(*_with(name, usual))
    assert differences(expected, snapshot(*_with(name, module))) == []


def _with(name: str, module: pl.LightningModule) -> tuple[Any, Any, Any]:
    trainer, callback = train(name, module)
    return trainer, module, callback


# ---------------------------------------------------------------------- averages and freezing


def _averaged(name: str, folder: Path, callback: Any) -> None:
    """The average that the module holds after the fit is as sparse as the masks."""
    train(name, Classifier(), callback, folder=folder, max_epochs=3)


def _averaging_named(class_name: str) -> Any:
    found = getattr(pl.callbacks, class_name, None)
    if found is None:
        raise NotApplicable("this Lightning has no such callback.")
    return found


@feature("averages", "EMAWeightAveraging")
def ema(name: str, folder: Path) -> None:
    _averaged(name, folder, _averaging_named("EMAWeightAveraging")(decay=0.9))


@feature("averages", "WeightAveraging")
def weight_averaging(name: str, folder: Path) -> None:
    _averaged(name, folder, _averaging_named("WeightAveraging")())


@feature("averages", "StochasticWeightAveraging")
def swa(name: str, folder: Path) -> None:
    _averaged(name, folder, StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=1))


class WithBackbone(Classifier):
    """A backbone that is thawed in the second epoch, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = self.net[:4]

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.05)


@feature("freezing", "BackboneFinetuning")
def thawed(name: str, folder: Path) -> None:
    module, callback = WithBackbone(), method(name)
    thaws = BackboneFinetuning(unfreeze_backbone_at_epoch=1, verbose=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_for([callback, thaws, Trained(callback)], max_epochs=3).fit(module, Batches())
    check_end(name, module, callback)
    if "net.0.weight" not in callback.masks and "backbone.0.weight" not in callback.masks:
        said = [str(w.message) for w in caught if "dense" in str(w.message)]
        assert said
        raise StaysDense(said[0])


@feature("freezing", "frozen layers")
def frozen(name: str, folder: Path) -> None:
    module = Classifier()
    for p in module.net[0].parameters():
        p.requires_grad_(False)
    before = module.net[0].weight.clone()
    _, callback = train(name, module)
    assert "net.0.weight" not in callback.masks
    assert torch.equal(before, module.net[0].weight)


# ---------------------------------------------------------------------- checkpoints


def _from_every(name: str, folder: Path, saves: ModelCheckpoint, **options: Any) -> list[Path]:
    """Resume from each checkpoint that is written: all end where the run ended that never stopped."""
    module = Classifier()
    trainer, callback = train(name, module, saves, folder=folder, enable_checkpointing=True, **options)
    expected, paths = snapshot(trainer, module, callback), sorted(folder.glob("*.ckpt"))
    assert paths
    for path in paths:
        again = Classifier(conv_net(9))
        theirs, other = train(name, again, ckpt_path=path, **options)
        assert differences(expected, snapshot(theirs, again, other)) == [], path.name
    return paths


@feature("checkpoints", "every n steps")
def every_n_steps(name: str, folder: Path) -> None:
    # fewer than the steps of an epoch: after its last one Lightning writes before the epoch ends
    _from_every(name, folder, ModelCheckpoint(folder, every_n_train_steps=5, save_top_k=-1))


@feature("checkpoints", "save_last")
def save_last(name: str, folder: Path) -> None:
    saves = ModelCheckpoint(folder, every_n_epochs=1, save_last=True, save_on_train_epoch_end=True)
    assert folder / "last.ckpt" in _from_every(name, folder, saves)


@feature("checkpoints", "by time")
def by_time(name: str, folder: Path) -> None:
    saves = ModelCheckpoint(folder, train_time_interval=timedelta(microseconds=1), save_top_k=-1)
    assert len(_from_every(name, folder, saves, limit_train_batches=6, max_epochs=2)) > 3


@feature("checkpoints", "on an exception")
def on_exception(name: str, folder: Path) -> None:
    class Breaks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if self.trainer.current_epoch == 1 and batch_idx == 3:
                raise KeyError("the disk is gone, say")
            return super().training_step(batch, batch_idx)

    saves, broken, callback = ModelCheckpoint(folder, save_on_exception=True), Breaks(), method(name)
    try:
        trainer_for([callback, saves, Trained(callback)], folder, enable_checkpointing=True).fit(broken, Batches())
    except KeyError:
        Trained.batches = 0
    left = copy.deepcopy((dict(callback.masks), callback.step, callback.updates, dict(broken.state_dict())))
    (path,) = (p for p in folder.glob("*.ckpt") if "epoch=1" in p.name)
    begun: list[Any] = []

    def begin(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        again = next(c for c in trainer.callbacks if type(c) is type(callback))
        begun.append(copy.deepcopy((dict(again.masks), again.step, again.updates, dict(module.state_dict()))))

    train(name, Classifier(conv_net(9)), pl.callbacks.LambdaCallback(on_train_start=begin), ckpt_path=path)
    assert differences(left, begun[0], bitwise=False) == []


@feature("checkpoints", "weights only")
def weights_only(name: str, folder: Path) -> None:
    """A plain model loads it strictly and is as sparse as the run's."""
    module = Classifier()
    saves = ModelCheckpoint(folder, save_weights_only=True, save_on_train_epoch_end=True)
    _, callback = train(name, module, saves, folder=folder, enable_checkpointing=True)
    plain = Classifier(conv_net(9))
    (path,) = folder.glob("*.ckpt")
    plain.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    assert_effective(plain, callback)
