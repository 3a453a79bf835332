"""Whole runs: what they leave, what the loggers got, several jobs, sweeps, signals to a real process."""

import json
import math
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, SHORT
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from support import wandb_file

from sparse_callbacks.tasks import loggers, summary
from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.safe_stop import RunStopped

Run = Callable[..., dict[str, float]]


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`python train.py ...` in this process, started in an empty folder."""
    import train

    monkeypatch.chdir(tmp_path)

    def go(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *arguments])
        GlobalHydra.instance().clear()
        train.main()

    yield go
    GlobalHydra.instance().clear()


def child(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *arguments],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        start_new_session=True,
    )


def wandb_files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.wandb"))


def test_a_run_leaves_metrics_and_a_table(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metrics = run("method=rigl", "sparsity=0.8")
    written = json.loads((tmp_path / "run/metrics.json").read_text())
    assert written == pytest.approx(metrics)
    assert {
        "test/acc",
        "val/acc",
        "sparsity/total",
        "sparsity/model",
        "updates",
        "epochs",
        "steps",
        "seconds",
    } <= written.keys()
    assert written["epochs"] == 3
    assert written["steps"] == 27
    saved = torch.load(tmp_path / "run/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    weights = [value for name, value in saved.items() if name.startswith("model.") and value.dim() == 2]
    # grown weights may be exactly zero, so there are at least as many zeros as the masks have
    assert sum(int((w == 0).sum()) for w in weights) >= round(
        written["sparsity/total"] * sum(w.numel() for w in weights)
    )
    shown = capsys.readouterr().out
    assert f"{100 * written['test/acc']:.2f} %" in shown
    assert f"{written['sparsity/total']:.6f}" in shown
    for name in ("model.1.weight", "model.3.weight"):
        assert re.search(rf"{name} +│ {written[f'sparsity/{name}']:.6f}", shown)
    for word in ("topology updates", "checkpoint", "metrics"):
        assert word in shown


def test_the_sparsity_is_exact(run: Run) -> None:
    metrics = run("method=static", "method.distribution=uniform", "sparsity=0.8")
    zeros = math.floor(0.8 * 64 * 24) + math.floor(0.8 * 24 * 10)
    assert metrics["sparsity/total"] == zeros / (64 * 24 + 24 * 10)
    assert metrics["sparsity/model"] == zeros / (64 * 24 + 24 + 24 * 10 + 10)


def test_storage_is_an_override_and_the_run_ends_slim(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("model=mlp", "model.hidden=[32,16]", "method=rigl", "test=best", "slim=true")
    masked, sparse = run(*few, folder="masked"), run(*few, "method.storage=sparse", folder="sparse")
    assert {k: v for k, v in masked.items() if k.startswith("sparsity")} == {
        k: v for k, v in sparse.items() if k.startswith("sparsity")
    }
    assert sparse["slim/difference"] < 1e-6  # float32
    assert sparse["slim/test/acc"] == sparse["test/acc"]
    assert "sparse" in capsys.readouterr().out
    state = torch.load(tmp_path / "sparse" / "checkpoints" / "best.ckpt", weights_only=False)
    assert any("patterns" in held for held in state["callbacks"].values())


def test_the_same_seed_gives_the_same_run_and_another_one_another(run: Run) -> None:
    a, b, c = (run("method=rigl", f"seed={seed}") for seed in (0, 0, 1))
    assert a["test/loss"] == b["test/loss"] != c["test/loss"]


def test_a_run_that_ends_before_its_target_says_so(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # the target is due at step 1000 of 27
    metrics = run("method=gmp", "sparsity=0.9", "method.stop=1000", "method.every=5")
    shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
    # the floors of 0.9 x 1536 and 0.9 x 240, over 1776
    assert f"target sparsity 0.8998, reached {metrics['sparsity/total']:.4f}" in shown
    assert metrics["sparsity/total"] < 0.5
    # no epoch counted as the best
    assert not (tmp_path / "run/checkpoints/best.ckpt").exists()


def test_the_best_checkpoint_and_early_stopping_count_epochs_at_target(run: Run, tmp_path: Path) -> None:
    options = ("method=gmp", "sparsity=0.9", "method.stop=0.5", "method.every=1", "trainer.max_epochs=8")
    metrics = run(*options, "test=best")
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    weight = best["state_dict"]["model.1.weight"]
    assert int((weight == 0).sum()) >= math.floor(0.9 * weight.numel())
    assert metrics["sparsity/total"] == pytest.approx(0.9, abs=1e-3)
    # lr is so small that no epoch is better than the first: without the gate the run would stop at the second
    stopped = run(*options, "early_stopping=1", "optim.lr=1e-12", folder="early")
    assert stopped["epochs"] >= 5


def test_testing_the_best_checkpoint_tests_its_weights(run: Run, tmp_path: Path) -> None:
    metrics = run("method=rigl", "test=best", "trainer.max_epochs=4")
    best = torch.load(tmp_path / "run/checkpoints/best.ckpt", weights_only=True)
    from sparse_callbacks.tasks import data, models

    digits = data.digits()
    model = models.mlp(digits.input_shape, 10, [24])
    model.load_state_dict({k.removeprefix("model."): v for k, v in best["state_dict"].items()})
    images, labels = next(iter(digits.test_dataloader()))
    accuracy = (model.eval()(images).argmax(1) == labels).float().mean()
    assert metrics["test/acc"] == pytest.approx(float(accuracy))


def test_a_failed_run_is_finished_too(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("out of luck")

    monkeypatch.setattr(Classifier, "training_step", fail)
    with pytest.raises(RuntimeError, match="out of luck"):
        run("logger=[wandb]")
    (path,) = wandb_files(tmp_path)
    assert wandb_file.exit_codes(path) == [1]


def test_the_gradient_norm_is_of_the_masked_gradient(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    hook = Classifier.on_before_optimizer_step

    def spy(self: Classifier, optimizer: torch.optim.Optimizer) -> None:
        gradient = self.model[1].weight.grad
        if gradient is not None:
            seen.append(float((gradient == 0).float().mean()))
        hook(self, optimizer)

    monkeypatch.setattr(Classifier, "on_before_optimizer_step", spy)
    run("method=static", "method.distribution=uniform", "sparsity=0.9", "trainer.max_epochs=1")
    assert min(seen) >= math.floor(0.9 * 64 * 24) / (64 * 24)


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({}, "offline"),
        ({"WANDB_MODE": "disabled"}, "disabled"),
        ({"WANDB_MODE": "offline", "WANDB_API_KEY": "k"}, "offline"),
        ({"WANDB_API_KEY": "k"}, "online"),
    ],
)
def test_wandb_mode(environment: dict[str, str], mode: str, tmp_path: Path) -> None:
    assert loggers.wandb_mode({"HOME": str(tmp_path), **environment}) == mode


def test_a_login_in_the_netrc_file_is_used(tmp_path: Path) -> None:
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123\n")
    home = {"HOME": str(tmp_path)}
    assert loggers.wandb_mode(home) == "online"
    assert loggers.wandb_mode({**home, "WANDB_BASE_URL": "https://wandb.example.org"}) == "offline"
    (tmp_path / ".netrc").write_text("no netrc at all")
    assert loggers.wandb_mode(home) == "offline"


def test_without_wandb_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ImportError, match=r"pip install 'sparse-callbacks\[train\]', or choose logger=csv"):
        loggers.wandb_logger(str(tmp_path), "project")


def test_multirun_makes_one_folder_and_one_wandb_run_a_job(command: Callable[..., None], tmp_path: Path) -> None:
    quick = [text for text in SHORT if not text.startswith("logger")]
    command("-m", "method=set,rigl", "seed=0,1", "logger=[csv,wandb]", *quick)
    found = sorted(tmp_path.rglob("metrics.json"))
    assert len(found) == 4
    assert len({json.loads(path.read_text())["test/loss"] for path in found}) == 4
    files = wandb_files(tmp_path)
    assert len(files) == 4
    assert all(wandb_file.exit_codes(path) == [0] for path in files)
    settings = {(wandb_file.config(path)["method"]["_target_"], wandb_file.config(path)["seed"]) for path in files}
    assert settings == {(f"sparse_callbacks.{name}", seed) for name in ("SET", "RigL") for seed in (0, 1)}


def test_a_stopped_command_exits_with_the_signal_and_prints_how_to_resume(
    command: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    step = Classifier.training_step

    def stopped(self: Classifier, batch: Any, batch_idx: int) -> Any:
        if self.trainer.global_step == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    folder = tmp_path / "a folder, with=signs"
    arguments = ["method=rigl", *SHORT, f"hydra.run.dir='{folder}'"]
    with monkeypatch.context() as patch:
        patch.setattr(Classifier, "training_step", stopped)
        with pytest.raises(SystemExit) as caught:
            command(*arguments)
    assert caught.value.code == 130
    printed = capsys.readouterr().err
    assert "stopped by SIGINT; state saved in" in printed
    line = printed.split("Resume with:\n")[1].strip().splitlines()[0]
    words = shlex.split(line)
    assert words[0] == "python"
    assert Path(words[1]) == ROOT / "train.py"
    command(*words[2:])
    resumed = json.loads((folder / "metrics.json").read_text())
    command(*arguments[:-1], f"hydra.run.dir={tmp_path / 'whole'}")
    assert resumed["test/loss"] == json.loads((tmp_path / "whole/metrics.json").read_text())["test/loss"]


def test_resume_command_replaces_an_older_checkpoint() -> None:
    given = ["method=rigl", "ckpt_path=old.ckpt", "hydra.run.dir=old"]
    text = summary.resume_command("train.py", given, Path("/runs/a/last.ckpt"), Path("/runs/a"))
    assert text == "python train.py method=rigl ckpt_path=/runs/a/last.ckpt hydra.run.dir=/runs/a"


def test_numbers_that_are_not_finite_are_null_in_json(tmp_path: Path) -> None:
    summary.write_metrics(tmp_path / "m.json", {"b": float("nan"), "a": 1.0})
    assert (tmp_path / "m.json").read_text() == '{\n  "a": 1.0,\n  "b": null\n}\n'


def wait_for(path: Path, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if path.exists():
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.05)
    raise AssertionError(f"{path} did not appear")


LONG = (
    "logger=[]",
    "trainer.enable_progress_bar=false",
    "trainer.max_epochs=4000",
    "checkpoint_every=20",
    "method=rigl",
)


@pytest.mark.slow
def test_a_second_ctrl_c_exits_at_once(tmp_path: Path) -> None:
    # every batch waits a minute, so only the second Ctrl-C can end it
    program = (
        "import sys, time, train; from sparse_callbacks.tasks.classifier import Classifier\n"
        "def step(self, batch, i):\n    open('started', 'w').close(); end = time.time() + 60\n"
        "    while time.time() < end: time.sleep(0.05)\n"
        "Classifier.training_step = step\n"
        "train.main()\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, *LONG],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for(tmp_path / "started", process)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert "Press Ctrl-C again to exit at once" in process.communicate()[1]


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_stopped_process_resumes_to_the_same_end(signum: signal.Signals, tmp_path: Path) -> None:
    options = (*LONG[:2], "trainer.max_epochs=60", *LONG[3:], "trainer.accumulate_grad_batches=3")
    process = child(tmp_path, *options, "hydra.run.dir=stopped")
    last = tmp_path / "stopped/checkpoints/last.ckpt"
    wait_for(last, process)
    time.sleep(0.3)
    process.send_signal(signum)
    _, err = process.communicate()
    assert process.returncode == (-signum if signum == signal.SIGKILL else 128 + signum)
    assert (signum == signal.SIGKILL) != ("Resume with:" in err)
    resumed = child(tmp_path, *options, f"ckpt_path={last}", "hydra.run.dir=stopped")
    whole = child(tmp_path, *options, "hydra.run.dir=whole")
    assert [resumed.communicate() and resumed.returncode, whole.communicate() and whole.returncode] == [0, 0]
    a, b = (torch.load(tmp_path / name / "checkpoints/last.ckpt", weights_only=True) for name in ("stopped", "whole"))
    assert all(torch.equal(a["state_dict"][name], b["state_dict"][name]) for name in b["state_dict"])


@pytest.mark.slow
def test_two_processes_train_one_network(tmp_path: Path) -> None:
    process = child(
        tmp_path,
        "trainer=ddp",
        "trainer.accelerator=cpu",
        "trainer.devices=2",
        *SHORT[1:],
        "hydra.run.dir=both",
        "method=rigl",
        "trainer.max_epochs=15",
        "sparsity=0.5",
    )
    out, err = process.communicate()
    assert process.returncode == 0, err
    metrics = json.loads((tmp_path / "both/metrics.json").read_text())
    assert metrics["steps"] == 15 * math.ceil(1077 // 2 / 128)
    assert metrics["test/acc"] > 0.5
    assert out.count("topology updates") == 1
    assert len(wandb_files(tmp_path)) == 1


@pytest.mark.slow
def test_accuracies_on_digits(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    from train import train

    def mean(*overrides: str) -> float:
        quiet = ("logger=[]", "trainer.enable_progress_bar=false", f"output_dir={tmp_path}")
        return 100 * statistics.mean(
            train(composed(*quiet, *overrides, f"seed={seed}"))["test/acc"] for seed in range(3)
        )

    dense = mean("method=none")
    assert dense >= 97.5
    assert mean("method=rigl", "sparsity=0.9") >= dense - 2
    rigl, static = (mean("experiment=lenet_300_100_digits", f"method={name}") for name in ("rigl", "static"))
    assert rigl >= 90
    assert rigl >= static + 20


def test_run_stopped_names_signal_and_place() -> None:
    assert str(RunStopped(signal.SIGTERM, Path("a.ckpt"))) == "stopped by SIGTERM; state saved in a.ckpt"


def test_a_dense_run_does_not_go_on_from_a_sparse_one(run: Run, tmp_path: Path) -> None:
    run("method=static", "trainer.max_epochs=1")
    checkpoint = next(tmp_path.rglob("last.ckpt"))
    with pytest.raises(
        ValueError, match=r"is of a sparse run \(Static.*method=none would train its zeros away.*method=static"
    ):
        run("method=none", f"ckpt_path={checkpoint}")
