"""A callback in a later fit: with the same model, a changed one, a copy of the callback, or a checkpoint."""

import copy
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import callbacks as lightning_callbacks
from support.data import loader
from support.nets import Regression
from support.rig import copied_masks, fit_steps, short_callback
from torch import nn

from sparse_callbacks import DPF, GMP, SET, SNFS, RigL, Static
from sparse_callbacks.testing.comparison import assert_effective
from sparse_callbacks.testing.runs import trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


METHODS = [RigL, SET, SNFS, GMP, Static]


@pytest.mark.parametrize("make", METHODS, ids=lambda m: m.__name__)
def test_a_callback_can_be_pickled_and_copied(make: Any, tmp_path: Path) -> None:
    callback = short_callback(make)
    assert repr(pickle.loads(pickle.dumps(callback))) == repr(callback)
    fit_steps(tmp_path, callback, Regression(), 4)
    for twin in (pickle.loads(pickle.dumps(callback)), copy.deepcopy(callback)):
        assert all(torch.equal(m, twin.masks[n]) for n, m in callback.masks.items())
        assert twin.step == callback.step
        fit_steps(tmp_path, twin, Regression(), 4)


def test_a_layer_frozen_between_two_fits_leaves_the_masks_of_the_others(tmp_path: Path) -> None:
    callback, module = short_callback(Static), Regression()
    fit_steps(tmp_path, callback, module, 4)
    before = copied_masks(callback)
    names = list(before)
    dict(module.named_parameters())[names[0]].requires_grad_(False)
    fit_steps(tmp_path, callback, module, 4)
    assert list(callback.masks) == names[1:]
    assert all(torch.equal(callback.masks[n], before[n]) for n in names[1:])


def test_a_layer_of_another_shape_gets_a_new_mask(tmp_path: Path) -> None:
    callback, module = short_callback(RigL), Regression()
    fit_steps(tmp_path, callback, module, 4)
    before = copied_masks(callback)
    last = list(before)[-1]
    owner = module.get_submodule(last.rpartition(".")[0])
    owner.weight = nn.Parameter(torch.randn(owner.weight.shape[0], owner.weight.shape[1] * 2))
    with pytest.raises(RuntimeError):  # the network itself no longer fits together: only the masks are looked at
        fit_steps(tmp_path, callback, module, 4)
    assert callback.masks[last].shape == owner.weight.shape
    assert all(torch.equal(callback.masks[n], before[n]) for n in before if n != last)


def test_weights_from_elsewhere_are_not_cut_by_old_masks(tmp_path: Path) -> None:
    callback, module = short_callback(RigL), Regression()
    fit_steps(tmp_path, callback, module, 4)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    weights = {n: p.clone() for n, p in module.named_parameters()}
    message = r"hold weights that the masks of the last fit would cut.*Resume with ckpt_path=.*fresh_start=True"
    with pytest.raises(ValueError, match=message):
        fit_steps(tmp_path, callback, module, 4)
    assert all(torch.equal(p, weights[n]) for n, p in module.named_parameters())
    anew = short_callback(RigL, fresh_start=True)
    fit_steps(tmp_path, anew, module, 4)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(1.0)
    fit_steps(tmp_path, anew, module, 4)
    assert anew.step < 4 == anew.step + anew.updates


def test_the_same_callback_and_module_resume_from_an_earlier_checkpoint(tmp_path: Path) -> None:
    callback, module = short_callback(RigL), Regression()
    fit_steps(tmp_path, callback, module, 4).save_checkpoint(tmp_path / "early.ckpt")
    early = copied_masks(callback)
    fit_steps(tmp_path, callback, module, 6)
    assert any(not torch.equal(m, early[n]) for n, m in callback.masks.items())
    starts = []
    watch = lightning_callbacks.LambdaCallback(on_train_start=lambda *_: starts.append(copied_masks(callback)))
    trainer_for([callback, watch], tmp_path, max_steps=8).fit(module, loader(8), ckpt_path=tmp_path / "early.ckpt")
    assert all(torch.equal(m, starts[0][n]) for n, m in early.items())


def test_a_second_run_past_the_calendar_is_warned_about(tmp_path: Path) -> None:
    callback, module = short_callback(RigL), Regression()
    fit_steps(tmp_path, callback, module, 20)
    with pytest.warns(
        UserWarning, match=r"RigL will not move a mask in this run: \d+ steps were counted before.*fresh_start=True"
    ):
        fit_steps(tmp_path, callback, module, 6)


def test_a_run_that_ends_before_its_first_update_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(
        UserWarning, match=r"RigL will not move a mask in this run: the first would be at step 50, after the run's 6"
    ):
        fit_steps(tmp_path, RigL(0.5, every=2, start=50, stop=60), Regression(), 6)


@pytest.mark.parametrize(("make", "moves"), [(SET, True), (SNFS, True), (GMP, True), (DPF, True), (RigL, False)])
def test_an_update_after_the_last_step_is_an_update(make: Any, moves: bool, tmp_path: Path) -> None:
    callback = make(0.5, every=6, start=6, stop=12, print_plan=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit_steps(tmp_path, callback, Regression(), 6)
    assert (callback.updates > 0) is moves
    assert any("will not move a mask" in str(w.message) for w in caught) is not moves


def test_a_resumed_run_needs_the_checkpoint_of_its_mask_no_more(tmp_path: Path) -> None:
    source = tmp_path / "source.pt"
    pruned = Regression()
    with torch.no_grad():
        for p in pruned.parameters():
            p.mul_(torch.rand(p.shape) > 0.5)
    torch.save(pruned.state_dict(), source)
    module = Regression()
    module.load_state_dict(pruned.state_dict())
    callback = Static(from_checkpoint=source, print_plan=False)
    fit_steps(tmp_path, callback, module, 4).save_checkpoint(tmp_path / "middle.ckpt")
    source.unlink()
    resumed = Static(from_checkpoint=tmp_path / "moved.pt", print_plan=False)
    trainer_for(resumed, tmp_path, max_steps=8).fit(Regression(), loader(8), ckpt_path=tmp_path / "middle.ckpt")
    assert all(torch.equal(m, resumed.masks[n]) for n, m in callback.masks.items())


@pytest.mark.parametrize("first", [True, False])
def test_a_fit_that_is_refused_leaves_the_masks_of_the_last_one(first: bool, tmp_path: Path) -> None:
    """Its own were never written into the weights, and a later fit would take the weights for foreign ones."""
    callback, module = short_callback(RigL), Regression()
    if not first:
        fit_steps(tmp_path, callback, module, 9)
        module.net.append(nn.Linear(6, 6))
    before = copied_masks(callback)

    def refuse(*_: Any) -> None:
        raise ValueError("somebody refuses")

    with pytest.raises(ValueError, match="somebody refuses"):
        fit_steps(tmp_path, [lightning_callbacks.LambdaCallback(on_train_start=refuse), callback], module, 4)
    assert callback.masks.keys() == before.keys()
    fit_steps(tmp_path, callback, module, 9)
    assert_effective(module, callback)
