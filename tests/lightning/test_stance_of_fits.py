"""Compiled code of the process runs compiled again, in whatever way a fit with sparse storage ends; it resumes exactly."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import OnExceptionCheckpoint
from support.exchanged import Hooked, fit, layers_of, left, mlp, sparse
from support.processes import matrices
from support.stance import stance

from sparse_callbacks.testing.comparison import assert_counts, differences
from sparse_callbacks.testing.networks import ByHand

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

EACH = {"every": 1, "stop": 6}
"""Nearly each window is one of an update, which reads gradients."""


class Broken(Exception):  # noqa: N818  of these tests
    pass


def breaks(at: int, error: type[BaseException] = Broken) -> Callable[..., None]:
    """A hook that raises when it is called with this number of a batch, within a window that records."""

    def hook(trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == at:
            assert stance() == "force_eager"
            raise error

    return hook


@pytest.mark.parametrize("error", [Broken, KeyboardInterrupt])
@pytest.mark.parametrize("at", [0, 5])  # in the first batch; in the window of an update
def test_an_error_in_training_leaves_no_window_open(at: int, error: type[BaseException]) -> None:
    module = mlp()
    kept = pytest.raises((error, SystemExit))  # Lightning makes an exit of a Ctrl-C
    with kept as info:
        fit(sparse(**EACH), module, Hooked("on_train_batch_start", breaks(at, error)), accumulate_grad_batches=2)
    assert stance() == "default"
    assert info.tb is not None  # as a notebook keeps it
    assert all(layer.records is None and not layer._forward_pre_hooks for layer in layers_of(module).values())


@pytest.mark.parametrize("at", [0, 5])
def test_a_callback_that_fails_when_a_fit_has_failed_leaves_no_window_open(at: int) -> None:
    class FailsAgain(pl.Callback):
        def on_exception(self, *_: Any) -> None:
            raise Broken

    fails = Hooked("on_train_batch_start", breaks(at, ZeroDivisionError))
    with pytest.raises(Broken):
        fit([FailsAgain(), sparse(**EACH)], None, fails, accumulate_grad_batches=2)
    assert stance() == "default"


def test_a_fit_that_another_callback_refuses_leaves_no_window_open() -> None:
    def refuses(*_: Any) -> None:
        assert stance() == "force_eager"
        raise Broken

    module = mlp()
    with pytest.raises(Broken):
        fit(sparse(**EACH), module, Hooked("on_train_start", refuses))
    assert stance() == "default"
    assert not layers_of(module)


def test_a_fit_that_goes_on_after_a_failed_one_opens_windows_again() -> None:
    callback, module, seen = sparse(**EACH), mlp(), []
    with pytest.raises(Broken):
        fit(callback, module, Hooked("on_train_batch_start", breaks(5)), accumulate_grad_batches=2)
    look = Hooked("on_train_batch_start", lambda *_: seen.append(stance()))
    fit(callback, module, look, accumulate_grad_batches=2)
    assert "force_eager" in seen
    assert "default" in seen
    assert stance() == "default"


def after_batch(at: int) -> pl.Callback:
    """Raises when this batch is over, the first one of a window: as Ctrl-C between two batches."""

    def hook(trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == at:
            raise Broken

    return Hooked("on_train_batch_end", hook)


@pytest.mark.combinations
@pytest.mark.parametrize("storage", ["masked", "sparse", "grouped"])
@pytest.mark.parametrize("make", [mlp, lambda: ByHand(matrices(0), window=2, clip=0.1)], ids=["automatic", "manual"])
def test_a_fit_that_an_error_has_ended_within_a_window_resumes_bitwise(storage: str, make: Any, tmp_path: Path) -> None:
    options = {} if isinstance(make(), ByHand) else {"accumulate_grad_batches": 2}
    callback = sparse("rigl", storage, **EACH)
    expected = left(*fit(callback, make(), **options), callback)

    saves = OnExceptionCheckpoint(tmp_path)
    with pytest.raises(Broken):
        fit(sparse("rigl", storage, **EACH), make(), after_batch(4), saves, enable_checkpointing=True, **options)
    state = next(iter(torch.load(saves.ckpt_path, weights_only=True)["callbacks"].values()))
    assert ("records" in state) == (storage != "masked")
    callback = sparse("rigl", storage, **EACH)
    found = left(*fit(callback, make(), ckpt_path=saves.ckpt_path, **options), callback)
    assert differences(expected, found) == []
    assert_counts(callback)
