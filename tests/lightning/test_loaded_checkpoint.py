"""Weights that a Trainer loads to test, validate or predict, and the masks that belong to them."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.methods import every_method, method
from support.rig import copied_masks

from sparse_callbacks import GMP, RigL, SparsityCallback, saved_masks
from sparse_callbacks.testing.comparison import assert_effective, differences, lasting
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, fit, trainer_for, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

STOP = 5


class Evaluated(Classifier):
    """May be tested, validated and used to predict."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self.net(batch[0])


def described(callback: SparsityCallback) -> dict[str, Any]:
    """What a user reads of a callback, and what a later fit goes on from."""
    read = (callback.measured_sparsity(), callback.figures(), callback.outcome(), callback.at_target, callback.updates)
    return {"state": lasting(callback.state_dict()), "read": read}


def fit_with_stop(callback: SparsityCallback, module: Classifier, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Fit, with a checkpoint on the way; its path, and what the callback was there."""
    stops, seen = Stops(folder, (STOP,)), {}

    def look(trainer: pl.Trainer, _: Any, batches: int) -> None:
        if batches + 1 == STOP:
            seen.update(described(callback))

    fit(module, callback, watch(look), stops)
    return stops.path(STOP), seen


@every_method
def test_a_callback_describes_the_network_whose_weights_were_loaded(name: str, tmp_path: Path) -> None:
    callback, module = method(name), Evaluated()
    path, expected = fit_with_stop(callback, module, tmp_path)
    assert differences(expected, described(callback)) != []
    trainer_for(callback).test(module, Batches(), ckpt_path=path, verbose=False)
    assert differences(expected, described(callback)) == []
    assert_effective(module, callback)


@every_method
def test_a_new_callback_takes_the_masks_of_the_checkpoint_that_is_tested(name: str, tmp_path: Path) -> None:
    path, expected = fit_with_stop(method(name), Evaluated(), tmp_path)
    callback, module = method(name), Evaluated()
    trainer_for(callback).validate(module, Batches(), ckpt_path=path, verbose=False)
    found = described(callback)
    assert differences(expected["state"], found["state"]) == []
    assert expected["read"][0] == found["read"][0]
    assert_effective(module, callback)


@every_method
def test_a_later_fit_goes_on_from_the_loaded_network(name: str, tmp_path: Path) -> None:
    callback, module = method(name), Evaluated()
    path, _ = fit_with_stop(callback, module, tmp_path)
    trainer_for(callback).predict(module, Batches(), ckpt_path=path)
    before, masks, begun = callback.state_dict(), copied_masks(callback), []
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}

    def begin(*_: Any) -> None:
        state = callback.state_dict()
        begun.append((copied_masks(callback), state["dense"], {n: p.clone() for n, p in module.named_parameters()}))

    fit(module, callback, pl.callbacks.LambdaCallback(on_train_start=begin))
    assert differences([(masks, before["dense"], weights)], begun) == []
    assert_effective(module, callback)


def test_two_callbacks_take_their_own_masks(tmp_path: Path) -> None:
    times = {"every": 2, "stop": 14, "print_plan": False}
    one, other = RigL(0.5, include="net.4*", **times), GMP(0.8, include="net.7*", **times)
    module, stops = Evaluated(), Stops(tmp_path, (STOP,))
    fit(module, one, other, stops)
    late = copied_masks(one) | copied_masks(other)
    trainer_for([one, other]).test(module, Batches(), ckpt_path=stops.path(STOP), verbose=False)
    assert_effective(module, one, other)
    for callback in (one, other):
        assert any(not torch.equal(m, late[n]) for n, m in callback.masks.items())


UNFIT = {
    "other arguments": r"RigL does not take the masks of the checkpoint.*written by RigL with other arguments",
    "no state": "",
    "weights alone": "",
    "a later version": r"RigL does not take the masks of the checkpoint.*has sparsity state of version 99",
    "other masks": r"RigL does not take the masks of the checkpoint.*(its masks have \d+ zeros|masks of the last fit would cut)",
}


def unfit_checkpoint(kind: str, path: Path) -> None:
    """Write a checkpoint whose weights load, and whose state the callback of the test cannot take."""
    written = method("rigl", sparsity=0.7 if kind == "other arguments" else 0.8)
    trainer = fit(Evaluated(), *([] if kind == "no state" else [written]), max_steps=9)
    trainer.save_checkpoint(path, weights_only=kind == "weights alone")
    checkpoint = torch.load(path, weights_only=True)
    for state in checkpoint.get("callbacks", {}).values():
        state["version"] = 99 if kind == "a later version" else state["version"]
        if kind == "other masks":
            state["masks"] = {n: ~m for n, m in saved_masks(checkpoint).items()}
    torch.save(checkpoint, path)


@pytest.mark.parametrize("kind", UNFIT)
def test_masks_that_do_not_belong_to_loaded_weights_are_not_reported(kind: str, tmp_path: Path) -> None:
    unfit_checkpoint(kind, tmp_path / "unfit.ckpt")
    callback, module = method("rigl", sparsity=0.8), Evaluated()
    fit(module, callback)
    before = callback.state_dict()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        trainer_for(callback).test(module, Batches(), ckpt_path=tmp_path / "unfit.ckpt", verbose=False)
    words = [str(w.message) for w in seen if "does not take the masks" in str(w.message)]
    assert len(words) == bool(UNFIT[kind])
    assert all(re.match(UNFIT[kind], text) for text in words)
    assert differences(before, callback.state_dict()) == []
    with pytest.raises(ValueError, match=r"hold weights that the masks of the last fit would cut.*load_state_dict"):
        callback.measured_sparsity()


def test_weights_that_the_user_loads_are_not_described_by_old_masks(tmp_path: Path) -> None:
    callback, module = method("gmp"), Evaluated()
    early = {k: v.clone() for k, v in module.state_dict().items()}
    fit(module, callback)
    assert 0 < callback.measured_sparsity()["sparsity/total"] < 1
    module.load_state_dict(early)
    with pytest.raises(ValueError, match=r"net.0.weight.* hold weights that the masks of the last fit would cut"):
        callback.measured_sparsity()


def test_a_new_process_reports_no_channels_of_groups_that_it_does_not_know(tmp_path: Path) -> None:
    path, _ = fit_with_stop(method("smcp"), Evaluated(), tmp_path)
    callback = method("smcp")
    trainer_for(callback).test(Evaluated(), Batches(), ckpt_path=path, verbose=False)
    assert (callback.figures(), callback.outcome()) == ({}, {})
    assert re.match(r"SMCP ended before the solve for its budget of 0.6: 5 steps", callback.shortfall())


def test_groups_of_another_model_say_nothing_about_a_loaded_one(tmp_path: Path) -> None:
    path, _ = fit_with_stop(method("smcp"), Evaluated(), tmp_path)
    callback = method("smcp")
    wide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(50, 24), torch.nn.ReLU(), torch.nn.Linear(24, 4))
    fit(Classifier(wide), callback)
    assert callback.figures()
    trainer_for(callback).test(Evaluated(), Batches(), ckpt_path=path, verbose=False)
    assert callback.figures() == {}
