"""Runs with averages resume bit by bit, wherever they were saved; what Lightning's own callbacks lose comes back."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from support.averaging import AVERAGING, everything, fit
from support.methods import method

from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.networks import Classifier


class Steady(Classifier):
    """With a constant learning rate, as Lightning does not resume a schedule that StochasticWeightAveraging replaces."""

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def made(name: str, kind: str) -> tuple[Any, Any]:
    drop = {"drop_fraction": 0.5} if name in ("rigl", "set", "snfs", "ctre") else {}
    return method(name, every=3, stop=20, restart=False, gate_lr=0.3, dual_lr=0.1, **drop), AVERAGING[kind]()


def what_trains(found: list[str]) -> list[str]:
    """What differs besides what nobody needs once training is over: the schedule and the count of
    StochasticWeightAveraging, and the calendar."""
    return [f for f in found if not f.startswith(("/averager", "/rates", "/callbacks/0/times")) and "/lr:" not in f]


@pytest.mark.combinations
@pytest.mark.parametrize("ours_first", [True, False])
@pytest.mark.parametrize("kind", ["ema", "third", "epochs", "swa"])
@pytest.mark.parametrize("name", ["set", "dpf", "l0", "smcp", "channels", "gap"])
def test_within_an_epoch_and_behind_its_last_batch(name: str, kind: str, ours_first: bool, tmp_path: Path) -> None:
    def run(**options: Any) -> dict[str, Any]:
        pair = made(name, kind)
        trainer, module = fit(list(pair if ours_first else pair[::-1]), tmp_path, Steady(), **options)
        return everything(trainer, module, *pair)

    # the last of them lies in the epoch that StochasticWeightAveraging adds
    stops = (7, 8, 11, 16, 21, 24, *((32,) if kind == "swa" else ()))
    whole = run(stops=stops)
    for stop in stops:
        found = differences(whole, run(ckpt_path=tmp_path / f"{stop}.ckpt"))
        assert not (what_trains(found) if stop >= 24 else found), stop


@pytest.mark.combinations
@pytest.mark.parametrize("trigger", [{"save_on_train_epoch_end": True}, {}])
@pytest.mark.parametrize("kind", ["ema", "epochs", "swa"])
def test_at_the_ends_of_epochs_and_of_validations(kind: str, trigger: dict[str, Any], tmp_path: Path) -> None:
    def run(*more: Any, **options: Any) -> dict[str, Any]:
        pair = made("set", kind)
        saves = {"enable_checkpointing": bool(more)}
        trainer, module = fit([*pair, *more], tmp_path, Steady(), validate=True, **saves, **options)
        return everything(trainer, module, *pair)

    whole = run(ModelCheckpoint(tmp_path / "kept", save_top_k=-1, **trigger))
    found = sorted((tmp_path / "kept").glob("*.ckpt"))
    assert len(found) == (4 if kind == "swa" else 3)
    for path in found:
        assert not what_trains(differences(whole, run(ckpt_path=path))), path.name


def test_a_checkpoint_behind_a_resumed_epochs_beginning_knows_the_averages(tmp_path: Path) -> None:
    """Lightning's own hook is left out there, and its callback would save that it has taken none."""
    fit(list(made("set", "swa")), tmp_path, Steady(), stops=(19, 20))
    taken = torch.load(tmp_path / "20.ckpt", weights_only=False)["callbacks"]["StochasticWeightAveraging"]
    fit(list(made("set", "swa")), tmp_path, Steady(), stops=(1,), ckpt_path=tmp_path / "19.ckpt")
    again = torch.load(tmp_path / "1.ckpt", weights_only=False)["callbacks"]["StochasticWeightAveraging"]
    assert again["n_averaged"] == taken["n_averaged"] == 2
    assert differences(taken, again) == []


def test_averages_begin_where_a_run_without_them_is_resumed(tmp_path: Path) -> None:
    callback, _ = made("set", "ema")
    fit([callback], tmp_path, Steady(), stops=(11,))
    callback, averager = made("set", "ema")
    _, module = fit([callback, averager], tmp_path, Steady(), ckpt_path=tmp_path / "11.ckpt")
    assert int(averager._average_model.n_averaged) == 13
    assert not any(module.get_parameter(n)[~m].any() for n, m in callback.masks.items())


def changed(path: Path, change: Any) -> Path:
    found = torch.load(path, weights_only=True)
    change(found)
    torch.save(found, path.with_name("changed.ckpt"))
    return path.with_name("changed.ckpt")


def test_a_file_that_has_lost_the_weights_beside_the_averages_is_refused(tmp_path: Path) -> None:
    fit(list(made("set", "ema")), tmp_path, Steady(), stops=(11,))
    for key in ("current_model_state", "averaging_state"):
        path = changed(tmp_path / "11.ckpt", lambda found, key=key: found.pop(key))
        module = Steady()
        before = {k: t.clone() for k, t in module.state_dict().items()}
        with pytest.raises(ValueError, match=rf"it holds averages in the place of weights, and {key} in it is missing"):
            fit(list(made("set", "ema")), tmp_path, module, ckpt_path=path)
        assert differences(before, dict(module.state_dict())) == []
    path = changed(tmp_path / "11.ckpt", lambda found: found["current_model_state"].pop("net.4.weight"))
    with pytest.raises(ValueError, match=r"does not fit the model: net\.4\.weight missing"):
        fit(list(made("set", "ema")), tmp_path, Steady(), ckpt_path=path)


def test_a_file_whose_births_are_not_among_the_masks_is_refused(tmp_path: Path) -> None:
    callback, averager = made("set", "epochs")
    fit([callback, averager], tmp_path, Steady(), stops=(11,))

    def change(found: Any) -> None:
        ours = found["callbacks"][callback.state_key] = with_truths(found["callbacks"][callback.state_key])
        name, born = next(iter(ours["averages"][averager.state_key]["born"].items()))
        born[~ours["masks"][name]] = True

    with pytest.raises(ValueError, match=r"born since an average are not among the active ones"):
        fit(list(made("set", "epochs")), tmp_path, Steady(), ckpt_path=changed(tmp_path / "11.ckpt", change))
