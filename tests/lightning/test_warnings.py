"""What is true and harmless is said once, before the first batch, and training goes on."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import callbacks as lightning_callbacks
from support.data import loader
from support.nets import Regression, mlp, sgd
from support.rig import fit_steps

from sparse_callbacks import GMP, SET, SNFS, RigL, Static
from sparse_callbacks.testing.runs import trainer_for

METHODS = [RigL, SET, SNFS, Static, GMP]
FADING = [RigL, SET, SNFS]


def test_reduce_on_plateau_is_warned_about(tmp_path: Path) -> None:
    def configure(parameters: Any) -> Any:
        optimizer = sgd(parameters)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "monitor": "sparsity/total"}}

    with pytest.warns(
        UserWarning, match=r"ReduceLROnPlateau does not resume exactly.*Use a schedule over steps or epochs"
    ):
        fit_steps(tmp_path, Static(0.5), Regression(configure=configure), 2)


@pytest.mark.parametrize("kind", ["ModelCheckpoint", "EarlyStopping"])
def test_choosing_the_best_epoch_while_pruning_is_warned_about(kind: str, tmp_path: Path) -> None:
    def other() -> Any:
        if kind == "EarlyStopping":
            return lightning_callbacks.EarlyStopping(monitor="sparsity/total", check_on_train_epoch_end=True)
        return lightning_callbacks.ModelCheckpoint(tmp_path, monitor="sparsity/total")

    given = {"enable_checkpointing": kind == "ModelCheckpoint"}
    message = rf"{kind}\(monitor='sparsity/total'\) also counts epochs before the target sparsity is reached.*at_target"
    with pytest.warns(UserWarning, match=message):
        fit_steps(tmp_path, [GMP(0.5, every=2, stop=4), other()], Regression(), 6, **given)
    for harmless in (RigL(0.5, every=2, stop=4), Static(0.5)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            fit_steps(tmp_path, [harmless, other()], Regression(), 6, **given)
        assert not [w for w in caught if "target sparsity" in str(w.message)]


def test_a_checkpoint_callback_that_waits_for_the_target_is_not_warned_about(tmp_path: Path) -> None:
    best = lightning_callbacks.ModelCheckpoint(tmp_path, monitor="sparsity/total")
    best.only_at_target = True
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_steps(tmp_path, [GMP(0.5, every=2, stop=4), best], Regression(), 6, enable_checkpointing=True)
    assert not [w for w in caught if "target sparsity" in str(w.message)]


@pytest.mark.parametrize("early", [True, False])
def test_a_loader_that_lightning_will_not_resume_is_warned_about(early: bool, tmp_path: Path) -> None:
    def configure(parameters: Any) -> Any:
        if early:
            assert module.trainer.estimated_stepping_batches
        return sgd(parameters)

    module = Regression(configure=configure)
    fit_steps(tmp_path, Static(0.5), module, 6).save_checkpoint(tmp_path / "middle.ckpt")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer_for(Static(0.5), tmp_path, max_epochs=2).fit(module, loader(6), ckpt_path=tmp_path / "middle.ckpt")
    assert bool([w for w in caught if "Lightning will not restore it" in str(w.message)]) == early


def test_a_run_that_ends_before_its_target_says_target_and_reached(tmp_path: Path) -> None:
    callback = GMP(0.8, every=5, stop=100)
    message = (
        r"GMP ended at sparsity 0\.3\d\d\d, before its target of 0\.8000: 20 steps were taken and the target is due at step 100\. "
        r"Train longer, or give an earlier stop="
    )
    with pytest.warns(UserWarning, match=message):
        fit_steps(tmp_path, callback, Regression(), 20)
    assert not callback.at_target
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        finished = GMP(0.8, every=5, stop=15)
        fit_steps(tmp_path, finished, Regression(mlp(12, 20, 6)), 20)
    assert finished.at_target
    assert not [w for w in caught if "ended at sparsity" in str(w.message)]
