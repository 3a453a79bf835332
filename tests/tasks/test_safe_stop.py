"""A stopped run that is resumed ends bitwise like one that was never stopped."""

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from torch import nn

from sparse_callbacks.tasks import models, safe_stop
from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.data.module import ImageData
from sparse_callbacks.tasks.safe_stop import RunStopped, SafeStop

Run = Callable[..., dict[str, float]]
# training images of the digits by batches of 128: nine an epoch, 27 in the run
BATCHES = 9


@pytest.fixture(autouse=True)
def _noisy_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dropout draws from torch's generator, so that a run with a wrong random state ends elsewhere."""

    def noisy(input_shape: Any, num_classes: int, **options: Any) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(64, 24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, num_classes))

    monkeypatch.setattr(models, "mlp", noisy)


@contextmanager
def signal_in(hook: str, call: int, signum: int, owner: type = Classifier) -> Iterator[None]:
    """Send this process a signal in the middle of the given call (from 1) of a hook of the module."""
    original, calls = getattr(owner, hook), [0]

    def counted(self: Any, *args: Any) -> Any:
        out = original(self, *args)
        calls[0] += 1
        if calls[0] == call:
            os.kill(os.getpid(), signum)
        return out

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, hook, counted)
        yield


@contextmanager
def other_randomness() -> Iterator[None]:
    """Other random states and initial weights than `seed` gives; order and masks keep their seed."""
    real = pl.seed_everything
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl, "seed_everything", lambda seed, **options: real(seed + 1000, **options))
        yield


def same(a: Any, b: Any, where: str = "checkpoint") -> None:
    """Exact equality of two checkpoints' content."""
    assert type(a) is type(b), where
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype, where
        assert torch.equal(a, b), where
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), where
        for key in a:
            same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), where
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            same(x, y, f"{where}/{index}")
    else:
        assert a == b, where


def content(path: Path) -> dict[str, Any]:
    """Everything in a checkpoint but paths, the score of the last file written, and Lightning's progress counters."""
    saved = torch.load(path, weights_only=True)
    names = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch", "run_state", "callbacks")
    kept = {name: saved[name] for name in names}
    for state in kept["callbacks"].values():
        for key in [key for key in state if "path" in key or key in ("best_k_models", "current_score")]:
            del state[key]
    return kept


@contextmanager
def counted_hooks() -> Iterator[dict[str, int]]:
    """How often each validation and each epoch came to its end."""
    counts = {"on_validation_end": 0, "on_train_epoch_end": 0}

    def counting(name: str) -> Callable[[Classifier], None]:
        def hook(self: Classifier) -> None:
            counts[name] += 1

        return hook

    with pytest.MonkeyPatch.context() as patch:
        for name in counts:
            patch.setattr(Classifier, name, counting(name))
        yield counts


def stop_and_resume(run: Run, tmp_path: Path, hook: str, call: int, signum: int, *overrides: str) -> RunStopped:
    with counted_hooks() as in_parts:
        with signal_in(hook, call, signum), pytest.raises(RunStopped) as caught:
            run(*overrides, folder="stopped")
        assert caught.value.exit_code == 128 + signum
        with other_randomness():
            resumed = run(*overrides, f"ckpt_path={caught.value.checkpoint}", folder="stopped")
    with counted_hooks() as at_once:
        whole = run(*overrides, folder="whole")
    assert in_parts == at_once
    for key in ("test/acc", "test/loss", "sparsity/total", "updates", "steps"):
        assert resumed[key] == whole[key]
    same(content(tmp_path / "stopped/checkpoints/last.ckpt"), content(tmp_path / "whole/checkpoints/last.ckpt"))
    return caught.value


@pytest.mark.combinations
@pytest.mark.parametrize("method", ["none", "rigl", "snfs"])
@pytest.mark.parametrize(("hook", "call"), [("training_step", 5), ("training_step", BATCHES), ("validation_step", 1)])
def test_sigterm_then_resume_is_bitwise(run: Run, tmp_path: Path, method: str, hook: str, call: int) -> None:
    stop_and_resume(run, tmp_path, hook, call, signal.SIGTERM, f"method={method}", "early_stopping=50")


@pytest.mark.combinations
@pytest.mark.parametrize("method", ["none", "rigl"])
@pytest.mark.parametrize("call", [2, 8, BATCHES + 3])
def test_ctrl_c_inside_an_accumulation_window(run: Run, tmp_path: Path, method: str, call: int) -> None:
    options = (f"method={method}", "trainer.accumulate_grad_batches=4", "trainer.gradient_clip_val=0.5")
    stop_and_resume(run, tmp_path, "training_step", call, signal.SIGINT, *options)


@pytest.mark.parametrize("optim", ["adam", "adamw"])
def test_adam_resumes_bitwise(run: Run, tmp_path: Path, optim: str) -> None:
    stop_and_resume(run, tmp_path, "training_step", 13, signal.SIGTERM, "method=rigl", f"optim={optim}")


@pytest.mark.parametrize("call", [BATCHES, 13])
def test_runs_counted_in_steps_resume_bitwise(run: Run, tmp_path: Path, call: int) -> None:
    options = ("method=rigl", "trainer.max_steps=25", "trainer.max_epochs=-1")
    stop_and_resume(run, tmp_path, "training_step", call, signal.SIGTERM, *options)


def test_a_stop_before_a_validation_within_the_epoch_waits_for_it(run: Run, tmp_path: Path) -> None:
    stop_and_resume(run, tmp_path, "training_step", 3, signal.SIGTERM, "method=rigl", "trainer.val_check_interval=3")


def test_an_epoch_of_one_batch_is_stopped_at_its_end(run: Run, tmp_path: Path) -> None:
    options = ("method=rigl", "data.batch_size=2000", "trainer.max_epochs=12")
    stop_and_resume(run, tmp_path, "training_step", 3, signal.SIGTERM, *options)


def test_augmented_data_resume_bitwise(run: Run, tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        original = ImageData.train_dataloader
        patch.setattr(ImageData, "train_dataloader", lambda self: (setattr(self, "augment", True), original(self))[1])
        stop_and_resume(run, tmp_path, "training_step", 14, signal.SIGTERM, "method=rigl")


def test_a_stop_in_the_last_batch_leaves_the_finished_run(run: Run, tmp_path: Path) -> None:
    with signal_in("training_step", 3 * BATCHES, signal.SIGTERM), pytest.raises(RunStopped) as caught:
        run("method=rigl", folder="stopped")
    whole = run("method=rigl", folder="whole")
    same(content(caught.value.checkpoint), content(tmp_path / "whole/checkpoints/last.ckpt"))
    with other_randomness():
        resumed = run("method=rigl", f"ckpt_path={caught.value.checkpoint}", folder="resumed")
    assert resumed["test/loss"] == whole["test/loss"]
    assert resumed["sparsity/total"] == whole["sparsity/total"]


@pytest.mark.parametrize("options", [("method=none",), ("method=rigl", "trainer.accumulate_grad_batches=2")])
def test_every_periodic_checkpoint_resumes_bitwise(run: Run, tmp_path: Path, options: tuple[str, ...]) -> None:
    real, copies = safe_stop.save_atomically, []

    def keep(trainer: pl.Trainer, path: Path) -> None:
        real(trainer, path)
        copies.append(shutil.copy(path, tmp_path / f"{trainer.global_step}-{len(copies)}.ckpt"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safe_stop, "save_atomically", keep)
        whole = run(*options, "checkpoint_every=3", folder="whole")
    assert len(copies) >= 5
    for copy in copies[:-1]:
        with other_randomness():
            resumed = run(*options, "checkpoint_every=3", f"ckpt_path={copy}", folder="whole")
        assert resumed["test/loss"] == whole["test/loss"]
        same(content(tmp_path / "whole/checkpoints/last.ckpt"), content(Path(copies[-1])))


def test_periodic_checkpoints_wait_for_the_end_of_the_epoch(run: Run, tmp_path: Path) -> None:
    saved = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(safe_stop, "save_atomically", lambda trainer, path: saved.append(trainer.global_step))
        run("method=none", "checkpoint_every=9")
    # steps 9 and 18 end an epoch: one step later; the last is that of the end
    assert saved == [10, 19, 27]


def test_the_rest_of_the_run_keeps_the_handlers_of_before(run: Run) -> None:
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    run("method=none")
    with signal_in("training_step", 3, signal.SIGTERM), pytest.raises(RunStopped):
        run("method=none")
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_a_signal_before_the_first_batch_says_that_nothing_was_trained(run: Run) -> None:
    early = signal_in("train_dataloader", 1, signal.SIGTERM, owner=ImageData)
    with early, pytest.raises(RunStopped, match="nothing was trained yet") as caught:
        run("method=none")
    assert caught.value.checkpoint is None


def test_a_kill_while_writing_leaves_the_checkpoint_before(run: Run, tmp_path: Path) -> None:
    path = tmp_path / "run/checkpoints/last.ckpt"
    run("method=none")
    before = path.read_bytes()

    def torn(self: pl.Trainer, file: Path, **options: Any) -> None:
        Path(file).write_bytes(b"half")
        raise OSError("disk full")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pl.Trainer, "save_checkpoint", torn)
        with pytest.raises(OSError, match="disk full"):
            run("method=none", "checkpoint_every=2")
    assert path.read_bytes() == before
    assert list(path.parent.glob(".*")) == []


def test_a_checkpoint_interval_below_one_is_refused(run: Run) -> None:
    with pytest.raises(ValueError, match="checkpoint_every=0 is not a number of optimizer steps"):
        run("checkpoint_every=0")


def test_another_number_of_processes_is_refused(run: Run, tmp_path: Path) -> None:
    run("method=none")
    path = tmp_path / "run/checkpoints/last.ckpt"
    saved = torch.load(path, weights_only=True)
    saved["run_state"]["random"] *= 2
    torch.save(saved, path)
    with pytest.raises(ValueError, match="a run with 2 processes and this run has 1"):
        run("method=none", "trainer.max_epochs=4", f"ckpt_path={path}")


def test_fast_dev_run_writes_no_checkpoint(run: Run, tmp_path: Path) -> None:
    run("method=rigl", "trainer.fast_dev_run=true")
    assert not list(tmp_path.rglob("*.ckpt"))


def test_is_called_after_every_other_callback() -> None:
    stop = SafeStop(Path("last.ckpt"))
    trainer = pl.Trainer(callbacks=[stop, pl.Callback()], logger=False, enable_checkpointing=True, accelerator="cpu")
    assert trainer.callbacks.index(stop) > min(i for i, c in enumerate(trainer.callbacks) if type(c) is pl.Callback)
