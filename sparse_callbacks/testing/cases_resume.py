"""The contract for checkpoints: plain models load them, and a resumed run is bitwise the same."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from sparse_callbacks.core.saved_masks import saved_masks
from sparse_callbacks.testing.comparison import assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Classifier, conv_net
from sparse_callbacks.testing.runs import Stops, fit, watch
from sparse_callbacks.testing.subject import STEPS, Contract


def test_state_dict_keys_stay_and_a_plain_model_loads_strictly(self: Contract, tmp_path: Path) -> None:
    """The keys of the model stay, and a plain model loads its checkpoint strictly."""
    module, callback = Classifier(optimizer="adamw"), self.method()
    keys = list(module.state_dict())
    seen: list[list[str]] = []
    trainer = fit(module, callback, watch(lambda trainer, module, _: seen.append(list(module.state_dict()))))
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    assert all(k == keys for k in seen)
    assert len(seen) == STEPS
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    plain = Classifier(conv_net(seed=5))
    plain.load_state_dict(saved["state_dict"], strict=True)
    x = Batches().x
    assert torch.equal(plain.eval().net(x), module.eval().net(x))
    assert_effective(plain, callback)


def resumed_differently(
    make: Callable[[], list[Any]],
    folder: Path,
    after: tuple[int, ...],
    optimizer: str,
    trained: Callable[..., pl.LightningModule] = Classifier,
    **options: Any,
) -> dict[int, list[str]]:
    """What differs at the end of a run between never stopping and resuming after each of these batches, with other
    initial weights and another RNG state."""
    torch.manual_seed(1)
    module, callbacks, stops = trained(conv_net(), optimizer), make(), Stops(folder, after)
    expected = snapshot(fit(module, *callbacks, stops, **options), module, *callbacks)
    found = {}
    for batch in after:
        assert torch.load(stops.path(batch), weights_only=True)["callbacks"]
        module, callbacks = trained(conv_net(seed=100 + batch), optimizer), make()
        torch.manual_seed(1000 + batch)
        trainer = fit(module, *callbacks, ckpt_path=stops.path(batch), **options)
        found[batch] = differences(expected, snapshot(trainer, module, *callbacks))
    return found


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_is_bitwise(self: Contract, optimizer: str, tmp_path: Path) -> None:
    """A run that is resumed ends bitwise like one that never stopped."""
    # updates come with batches 1, 5, 9, ... where they replace a step, and after 1, 4, 7, ... where they follow one
    after = (1, 2, 3, 4, 5, 8, 9, 13, 14)
    options: dict[str, Any] = {"gradient_clip_val": 0.5} if optimizer == "sgd" else {}
    assert resumed_differently(lambda: [self.method()], tmp_path, after, optimizer, **options) == {b: [] for b in after}


def test_resume_is_bitwise_with_times_in_fractions_of_the_run(self: Contract, tmp_path: Path) -> None:
    """Resume is bitwise also with times in fractions of the run."""
    after = (5, 11)

    def make() -> list[Any]:
        return [self.method(every=0.2, start=0.1, stop=0.8)]

    assert resumed_differently(make, tmp_path, after, "adamw") == {b: [] for b in after}


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_inside_an_accumulation_window_is_bitwise(self: Contract, optimizer: str, tmp_path: Path) -> None:
    """Resume is bitwise also inside an accumulation window."""
    after = (1, 2, 4, 5, 12, 14, 15, 18)  # windows end after 3, 6, 9, 12, 15, ...
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "loader": Batches(batches=12)}

    def make() -> list[Any]:
        return [self.method(every=2, stop=6)]

    assert resumed_differently(make, tmp_path, after, optimizer, **options) == {b: [] for b in after}
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"]
    assert "grads" in next(iter(saved.values()))


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_resume_inside_a_window_of_manual_optimization_is_bitwise(
    self: Contract, optimizer: str, tmp_path: Path
) -> None:
    """Resume is bitwise also inside an accumulation window in manual optimization, where gradients are masked after
    each backward pass."""
    by_hand = partial(ByHand, window=3, clip=0.5)
    after = (1, 2, 4, 5, 13, 14, 16, 17)  # windows end after 3, 6, 9, ...

    def make() -> list[Any]:
        return [self.method(every=1, stop=6)]

    found = resumed_differently(make, tmp_path, after, optimizer, by_hand, loader=Batches(batches=12))
    assert found == {b: [] for b in after}
    saved = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"]
    assert "grads" in next(iter(saved.values()))


def test_callback_state_loads_as_weights_only(self: Contract, tmp_path: Path) -> None:
    """The state of the callback loads with weights_only=True."""
    callback = self.method()
    trainer = fit(Classifier(), callback)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)["callbacks"][callback.state_key]
    assert differences(callback.state_dict(), saved) == []
    assert differences(callback.masks, saved_masks(tmp_path / "run.ckpt")) == []
