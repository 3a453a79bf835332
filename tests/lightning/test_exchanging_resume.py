"""Fits with sparse storage that go on from a checkpoint: bit by bit, in other storages not at all."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from support.exchanged import fit, layers_of, left, mlp, patterns_of, sparse
from support.processes import matrices
from torch import nn

from sparse_callbacks.core.storages import auto_storage
from sparse_callbacks.testing.comparison import assert_counts, differences
from sparse_callbacks.testing.networks import ByHand, Classifier
from sparse_callbacks.testing.runs import Stops

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

STOP = 5  # inside the first epoch, between the updates after steps 3 and 6


def resumed_as_never_stopped(
    name: str, storage: str, make: Any, folder: Path, stop: int = STOP, again: Any = None, **options: Any
) -> None:
    """A fit with a checkpoint on the way, and one that goes on from it in a new module with a new callback."""
    times = options.pop("times", {})
    callback = sparse(name, storage, **times)
    expected = left(*fit(callback, make(), folder=folder, stops=(stop,), **options), callback)
    path = folder / f"{stop}.ckpt"
    callback, module = sparse(name, storage, **times), make() if again is None else again
    found = left(*fit(callback, module, ckpt_path=path, **options), callback)
    assert differences(expected, found) == []
    assert_counts(callback)


@pytest.mark.combinations
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("name", ["static", "set", "rigl"])
def test_a_resumed_fit_is_the_one_that_never_stopped(name: str, storage: str, optimizer: str, tmp_path: Path) -> None:
    resumed_as_never_stopped(name, storage, lambda: mlp(optimizer), tmp_path)


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_resume_is_exact_where_a_checkpoint_has_weights_that_are_live_and_zero(storage: str, tmp_path: Path) -> None:
    resumed_as_never_stopped("set", storage, mlp, tmp_path, stop=6)  # right behind an update
    state = torch.load(tmp_path / "6.ckpt", weights_only=True)
    saved = next(iter(state["callbacks"].values()))["patterns"]
    assert set(saved) == {"net.1.weight", "net.3.weight", "net.5.weight"}
    live = sum(p["col"].numel() if storage == "sparse" else 4 * p["idx"].numel() for p in saved.values())
    assert sum(int(state["state_dict"][name].count_nonzero()) for name in saved) < live


class MadeInConfigureModel(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Identity(), "adamw")

    def configure_model(self) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = matrices(0)


def test_layers_made_in_configure_model_resume_exactly(tmp_path: Path) -> None:
    resumed_as_never_stopped("rigl", "sparse", MadeInConfigureModel, tmp_path)


@pytest.mark.combinations
@pytest.mark.parametrize("stop", [3, 5, 9])
@pytest.mark.parametrize(("name", "storage"), [("set", "sparse"), ("rigl", "sparse"), ("rigl", "grouped")])
def test_resume_is_exact_within_an_accumulation_window(name: str, storage: str, stop: int, tmp_path: Path) -> None:
    # with an update in each window, of which RigL needs what the first micro-batch has seen
    options = {"times": {"every": 1, "stop": 6}, "accumulate_grad_batches": 2}
    resumed_as_never_stopped(name, storage, mlp, tmp_path, stop, **options)


def test_resume_is_exact_in_manual_optimization(tmp_path: Path) -> None:
    resumed_as_never_stopped("rigl", "sparse", lambda: ByHand(matrices(0), window=2, clip=0.1), tmp_path)


def test_a_module_that_was_exchanged_before_takes_the_pattern_of_the_checkpoint(tmp_path: Path) -> None:
    module = mlp()
    fit(sparse("set", seed=7), module, max_epochs=1)
    other = patterns_of(module)
    resumed_as_never_stopped("set", "sparse", mlp, tmp_path, again=module)
    assert differences(other, patterns_of(module)) != []


def test_a_plain_module_loads_each_checkpoint_strictly(tmp_path: Path) -> None:
    fit(sparse("rigl"), folder=tmp_path, stops=(3, 16))
    for stop in (3, 16):
        mlp().load_state_dict(torch.load(tmp_path / f"{stop}.ckpt", weights_only=True)["state_dict"])


def test_a_checkpoint_of_another_storage_is_refused_in_words_and_nothing_changes(tmp_path: Path) -> None:
    fit(sparse("set", "masked"), folder=tmp_path, stops=(STOP,))
    module = mlp(seed=3)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"storage='masked', and this run has storage='sparse'.*fresh_start=True"):
        fit(sparse("set"), module, ckpt_path=tmp_path / f"{STOP}.ckpt")
    assert differences(before, module.state_dict()) == []
    assert not layers_of(module)


@pytest.mark.parametrize(("there", "here"), [("masked", "sparse"), ("sparse", "masked"), ("grouped", "auto")])
def test_a_fresh_start_with_optimizer_states_of_another_storage_is_refused(
    there: str, here: str, tmp_path: Path
) -> None:
    fit(sparse("set", there), folder=tmp_path, stops=(STOP,))
    module = mlp(seed=3)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=f"storage='{there}', and this run has storage='{here}'.*load_state_dict"):
        fit(sparse("set", here, fresh_start=True), module, ckpt_path=tmp_path / f"{STOP}.ckpt")
    assert differences(before, module.state_dict()) == []
    assert not layers_of(module)


@pytest.mark.parametrize("storage", ["sparse", "grouped", {"net.1.*": "sparse"}])
def test_a_fresh_start_with_optimizer_states_of_other_places_is_refused(storage: Any, tmp_path: Path) -> None:
    """They have the right shapes where as many weights live, and are those of other weights."""
    fit(sparse("set", storage), folder=tmp_path, stops=(STOP,))
    module = mlp(seed=3)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"of the live weights of net\.1\.weight.*load_state_dict\(\), and give no ckpt_path"
    ):
        fit(sparse("set", storage, fresh_start=True, seed=5), module, ckpt_path=tmp_path / f"{STOP}.ckpt")
    assert differences(before, module.state_dict()) == []
    assert not layers_of(module)


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
def test_a_fresh_start_of_layers_that_are_sparse_already_goes_on_from_the_places_in_the_file(
    storage: str, tmp_path: Path
) -> None:
    fit(sparse("static", storage), mlp(), folder=tmp_path, stops=(STOP,))
    path, module = tmp_path / f"{STOP}.ckpt", mlp(seed=3)
    fit(sparse("static", storage, seed=7), module, max_epochs=1)
    fit(sparse("static", storage, fresh_start=True, seed=5), module, ckpt_path=path)
    other = mlp(seed=4)
    fit(sparse("static", storage), other, ckpt_path=path)
    assert differences(patterns_of(other), patterns_of(module)) == []
    assert differences(other.state_dict(), module.state_dict()) == []


def timed(faster: str) -> Any:
    """Times by which this storage is the faster one for each layer."""
    return lambda *_, **__: {"masked": 1.0, "sparse": 2.0} | {faster: 0.1}


@pytest.mark.parametrize(("there", "here"), [("masked", "sparse"), ("sparse", "masked"), ("sparse", "sparse")])
def test_auto_with_a_fresh_start_decides_as_the_states_of_the_optimizers_need_it(
    there: str, here: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(auto_storage, "times_of", timed(there))
    fit(sparse("set", "auto", rows=6), folder=tmp_path, stops=(STOP,))
    monkeypatch.setattr(auto_storage, "times_of", timed(here))
    callback, module = sparse("set", "auto", rows=6, fresh_start=True), mlp(seed=3)
    if there == "sparse":
        with pytest.raises(ValueError, match=r"of the live weights of net\.1\.weight"):
            fit(callback, module, ckpt_path=tmp_path / f"{STOP}.ckpt")
        return
    fit(callback, module, ckpt_path=tmp_path / f"{STOP}.ckpt")
    assert not layers_of(module)
    assert "the checkpoint has optimizer states of its masked weights" in str(callback.plan())
    assert_counts(callback)


def test_auto_with_a_fresh_start_times_anew_where_optimizers_had_no_states(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Plain(Classifier):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.05)

    monkeypatch.setattr(auto_storage, "times_of", timed("masked"))
    fit(sparse("set", "auto", rows=6), Plain(matrices(0)), folder=tmp_path, stops=(STOP,))
    monkeypatch.setattr(auto_storage, "times_of", timed("sparse"))
    module = Plain(matrices(3))
    fit(sparse("set", "auto", rows=6, fresh_start=True), module, ckpt_path=tmp_path / f"{STOP}.ckpt")
    assert len(layers_of(module)) == 3


@pytest.mark.parametrize("start", ["random", "magnitude"])
def test_fresh_start_draws_new_masks_over_the_loaded_weights_as_masked_storage_does(start: str, tmp_path: Path) -> None:
    fit(sparse("set"), folder=tmp_path, stops=(STOP,))
    path, found = tmp_path / f"{STOP}.ckpt", {}
    # optimizer states differ in shape between the storages, so that it is resumed without any
    state = torch.load(path, weights_only=True)
    for optimizer in state["optimizer_states"]:
        optimizer["state"] = {}
    torch.save(state, path)
    for storage in ("masked", "sparse"):
        callback = sparse("set", storage, fresh_start=True, initial_mask=start, seed=5)
        _, module = fit(callback, mlp(seed=3), ckpt_path=path)
        found[storage] = (callback.masks, module.state_dict())
    assert differences(found["masked"][0], found["sparse"][0]) == []
    for name, value in found["masked"][1].items():
        assert torch.allclose(value, found["sparse"][1][name], rtol=0, atol=1e-10), name


def damaged(path: Path, change: Any) -> None:
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


def a_weight_outside(state: Any) -> None:
    weight = state["state_dict"]["net.1.weight"]
    weight[(weight == 0).nonzero()[0].unbind()] = 1.0


def columns_outside(state: Any) -> None:
    next(iter(state["callbacks"].values()))["patterns"]["net.1.weight"]["col"] += 50


def fewer_places(state: Any) -> None:
    pattern = next(iter(state["callbacks"].values()))["patterns"]["net.1.weight"]
    pattern["crow"], pattern["col"] = pattern["crow"].clamp(max=10), pattern["col"][:10]


def no_pattern(state: Any) -> None:
    del next(iter(state["callbacks"].values()))["patterns"]["net.3.weight"]


@pytest.mark.parametrize("change", [a_weight_outside, columns_outside, fewer_places, no_pattern])
def test_a_damaged_pattern_is_refused_before_a_weight_is_loaded(change: Any, tmp_path: Path) -> None:
    fit(sparse("set"), folder=tmp_path, stops=(STOP,))
    path = tmp_path / f"{STOP}.ckpt"
    damaged(path, change)
    module = mlp(seed=3)
    before, objects = {n: t.clone() for n, t in module.state_dict().items()}, list(module.modules())
    with pytest.raises(ValueError, match=re.escape(str(path))):
        fit(sparse("set"), module, ckpt_path=path)
    assert differences(before, module.state_dict()) == []
    assert [id(m) for m in module.modules()] == [id(m) for m in objects]


def test_a_compact_checkpoint_resumes_exactly(tmp_path: Path) -> None:
    def make_compact(trainer: Any, module: Any, *_: Any) -> None:
        for layer in layers_of(module).values():
            layer.compact_state = True

    from support.exchanged import Hooked

    compact = Hooked("on_train_start", make_compact)
    callback = sparse("set")
    expected = left(*fit(callback, mlp(), compact, Stops(tmp_path, (STOP,))), callback)
    path = tmp_path / f"{STOP}.ckpt"
    assert "net.1.weight.values" in torch.load(path, weights_only=True)["state_dict"]
    callback = sparse("set")
    found = left(*fit(callback, mlp(), compact, ckpt_path=path), callback)
    assert differences(expected, found) == []
