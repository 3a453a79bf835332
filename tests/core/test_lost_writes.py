"""What users write into dense copies of exchanged layers is lost, and is said once."""

import copy
import gc
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support import loops
from support.sparse_layers import STORAGES, twins
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import RigL, SparseLinear, sparsify
from sparse_callbacks.methods import SET

UNIFORM = {"distribution": "uniform", "print_plan": False, "every": 2}


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("grad", [True, False])
def test_a_write_into_a_copy_is_noticed_once_and_the_copy_is_not_held(storage: str, grad: bool) -> None:
    layer: SparseLinear = twins(storage)[1]
    with torch.set_grad_enabled(grad):
        held = layer.weight
        memory = StorageWeakRef(layer.weight.untyped_storage())
    gc.collect()
    assert memory.expired()
    assert not layer.handed_out.were_written()
    with torch.no_grad():
        held.sum()
        assert not layer.handed_out.were_written()
        for write in (
            lambda: held.clamp_(-1, 1),
            lambda: layer.weight.mul_(2),
            lambda: layer.state_dict()["weight"].zero_(),
        ):
            write()
            assert layer.handed_out.were_written()
            assert not layer.handed_out.were_written()


def test_copies_of_a_layer_have_handed_out_nothing() -> None:
    layer = twins("sparse")[1]
    with torch.no_grad():
        layer.weight.zero_()
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other.handed_out.were_written()
    assert layer.handed_out.were_written()


class Clamped(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))

    def training_step(self, batch: Any, _: int) -> Any:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), 0.1)

    def clamp(self) -> None:
        with torch.no_grad():
            self.net[0].weight.clamp_(-0.01, 0.01)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_train_epoch_end", "on_train_end", "on_validation_end"])
def test_a_hook_of_the_module_that_clamps_a_copy_is_told_of_it_once(hook: str) -> None:
    module = Clamped()
    setattr(module, hook, lambda *_: module.clamp())
    x, y = torch.randn(48, 12), torch.randint(0, 4, (48,))
    loader = DataLoader(TensorDataset(x, y), batch_size=8)
    trainer: Any = pl.Trainer(
        max_epochs=2,
        callbacks=[RigL(0.5, storage="sparse", **UNIFORM)],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        num_sanity_val_steps=0,
    )
    module.validation_step = lambda *_: None  # type: ignore[method-assign]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, loader, loader)
    said = [str(w.message) for w in caught if "has written into" in str(w.message)]
    assert len(said) == 1
    assert "written into net.0.weight and changed nothing" in said[0]
    assert "layer.values" in said[0]


@pytest.mark.parametrize(
    ("use", "expected"),
    [
        (lambda layer: layer.weight.mul_(0.5), 1),
        (lambda layer: layer.state_dict()["weight"].copy_(torch.zeros(24, 12)), 1),
        (lambda layer: layer.values.mul_(0.5), 0),
        (lambda layer: layer.weight.norm(), 0),
        (lambda layer: layer.load_state_dict(layer.state_dict()), 0),
    ],
)
def test_a_loop_is_told_of_writes_and_not_of_reads(use: Callable[[Any], object], expected: int) -> None:
    model = nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sparsify(SET(0.5, storage="sparse", **UNIFORM), model, optimizer, 6):
            for x, y in [*loops.data()][:3]:
                nn.functional.cross_entropy(model(x), y).backward()
                optimizer.step()
                optimizer.zero_grad()
                with torch.no_grad():
                    use(model[0])
    assert len([w for w in caught if "has written into 0.weight" in str(w.message)]) == expected
