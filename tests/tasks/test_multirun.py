"""The end of a multirun: one table, one page, and failures of single jobs."""

import importlib.metadata
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from conftest import ROOT, SHORT
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from sparse_callbacks.reporting.measures import share_to_keep
from sparse_callbacks.tasks import build, checks, models, multirun


def needs(distribution: str) -> pytest.MarkDecorator:
    """Skips a test where a plugin of Hydra is not installed."""
    installed = distribution in {found.metadata["Name"] for found in importlib.metadata.distributions()}
    return pytest.mark.skipif(not installed, reason="pip install 'sparse-callbacks[sweeps]'")


def pretended(cfg: DictConfig, *config_file: Path) -> dict[str, float]:
    """A run that takes no time: its accuracy is 1 - lr."""
    if cfg.optim.lr > 1:
        raise ValueError(f"optim.lr={cfg.optim.lr} is too large.\nThe second line is not shown.")
    import train

    metrics = {
        "test/acc": 1.0 - cfg.optim.lr,
        "val/acc": 1.0 - cfg.optim.lr,
        "sparsity/model": 0.75,
        "sparsity/total": 0.8,
    }
    (train.run_folder(cfg) / "metrics.json").write_text(json.dumps(metrics))
    return metrics


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`python train.py -m ...` in this process with runs that take no time."""
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", pretended)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")  # the error itself, and not the exit of the process

    def go(*arguments: str) -> None:
        monkeypatch.setattr(
            sys, "argv", [str(ROOT / "train.py"), "-m", f"hydra.sweep.dir={tmp_path / 'sweep'}", *arguments]
        )
        GlobalHydra.instance().clear()
        with multirun.multirun_shown():
            train.main()

    yield go
    GlobalHydra.instance().clear()


def test_a_multirun_ends_with_one_table_and_the_page(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("method=set,rigl", "seed=0,1,2", "optim.lr=0.25")
    printed = capsys.readouterr().out
    assert printed.count("digits, mlp") == 1
    rows = [line for line in printed.splitlines() if line.startswith("│")]
    assert len(rows) == 2
    assert all("75.00 ± 0.00" in row and " 3 " in row for row in rows)
    assert f"compared in {tmp_path / 'sweep' / 'compare.html'}" in printed
    assert (tmp_path / "sweep" / "compare.html").is_file()


def test_jobs_that_fail_are_shown_and_hide_none(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match=r"optim\.lr=2 is too large"):
        command("seed=0", "optim.lr=0.5,2,0.1,3")
    printed = " ".join(capsys.readouterr().out.split())
    assert "50.00" in printed
    assert "90.00" in printed
    for number, rate in ((1, 2), (3, 3)):
        assert f"sweep/{number}: failed: ValueError: optim.lr={rate} is too large." in printed
    assert "second line" not in printed
    assert (tmp_path / "sweep" / "compare.html").is_file()
    # the same folder again: job 1 does not fail any more
    command("seed=0", "optim.lr=0.5,0.2")
    assert "sweep/1" not in capsys.readouterr().out


def test_a_stopped_multirun_shows_what_it_has(
    command: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train

    def stopped(cfg: DictConfig, *config_file: Path) -> dict[str, float]:
        if cfg.seed == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return pretended(cfg)

    monkeypatch.setattr(train, "train", stopped)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit, match="143"):
        command("seed=0,1,2")
    assert signal.getsignal(signal.SIGTERM) is before
    printed = capsys.readouterr().out
    assert "digits, mlp" in printed
    assert "sweep/1: has no results" in " ".join(printed.split())
    assert (tmp_path / "sweep" / "compare.html").is_file()


def test_a_job_that_was_killed_is_said(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("seed=0,1")
    (tmp_path / "sweep" / "1" / "metrics.json").unlink()
    multirun.show_comparison(tmp_path / "sweep", "test/acc")
    assert "sweep/1: has no results" in " ".join(capsys.readouterr().out.split())


def test_without_matplotlib_the_table_is_there_and_a_message(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    command("seed=0,1")
    printed = capsys.readouterr().out
    assert "digits, mlp" in printed
    assert "pip install 'sparse-callbacks[report]'" in " ".join(printed.split())


def test_single_runs_and_sweeps_without_jobs_end_without_a_table(
    command: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train

    monkeypatch.setattr(sys, "argv", ["train.py", f"hydra.run.dir={tmp_path / 'one'}"])
    with multirun.multirun_shown():
        train.main()
    with pytest.raises(Exception, match="nothing"):
        command("method=nothing")
    assert "compared in" not in capsys.readouterr().out


def test_main_gives_the_objective_back(command: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    given = []
    end = multirun.MultirunComparison.on_job_end

    def spy(self: Any, config: DictConfig, job_return: Any, **kwargs: Any) -> None:
        given.append(job_return.return_value)
        end(self, config, job_return, **kwargs)

    monkeypatch.setattr(multirun.MultirunComparison, "on_job_end", spy)
    command("optim.lr=0.25", "objective=test/acc,[val/acc,sparsity/model],val/f1")
    assert given == [0.75, (0.75, 0.75), None]


@needs("hydra-optuna-sweeper")
def test_optuna_optimizes_the_objective(command: Callable[..., None], tmp_path: Path) -> None:
    search = [
        "hydra/sweeper=optuna",
        "hydra.sweeper.n_trials=4",
        "hydra.sweeper.direction=maximize",
        "hydra.sweeper.sampler.seed=0",
    ]
    command(*search, "optim.lr=interval(0.01,0.9)", "sparsity=0.9")
    found = yaml.safe_load((tmp_path / "sweep/optimization_results.yaml").read_text())
    tried = [json.loads(path.read_text())["val/acc"] for path in (tmp_path / "sweep").rglob("metrics.json")]
    assert len(tried) == 4
    assert found["best_value"] == max(tried) == 1 - found["best_params"]["optim.lr"]
    with pytest.raises(ValueError, match=r"objective=val/f1 is not among the metrics of the run: sparsity/model"):
        command(*search, "optim.lr=interval(0.01,0.9)", "objective=val/f1")


def test_unknown_threads_are_refused(composed: Callable[..., DictConfig]) -> None:
    for threads in ("0", "two", "1.5", "true"):
        with pytest.raises(ValueError, match="is not a number of threads"):
            checks.set_threads(composed(f"threads={threads}"))
    checks.set_threads(composed("threads=1"))
    checks.set_threads(OmegaConf.create({}))


# ---------------------------------------------------------------------- experiments


def swept(experiment: str) -> dict[str, list[str]]:
    """The values that an experiment's sweep goes through."""
    text = yaml.safe_load((ROOT / f"conf/experiment/{experiment}.yaml").read_text())
    return {key: str(value).split(",") for key, value in text["hydra"]["sweeper"]["params"].items()}


def test_compare_small_is_six_methods_at_three_sparsities_with_three_seeds() -> None:
    assert {key: len(values) for key, values in swept("compare_small").items()} == {
        "method": 6,
        "sparsity": 3,
        "seed": 3,
    }


def test_shrinkbench_small_has_the_ratios_and_both_baselines() -> None:
    params = swept("shrinkbench_small")
    assert {"random", "magnitude"} < set(params["shrinkbench"])
    assert params["seed"] == swept("shrinkbench_dense")["seed"] == ["0", "1", "2"]
    model = models.mlp((1, 8, 8), 10)
    total = sum(p.numel() for p in model.parameters())
    prunable = sum(p.numel() for p in model.parameters() if p.dim() > 1)
    assert (total, prunable) == (85_002, 84_480)
    expected = [1 - share_to_keep(total, prunable, ratio) for ratio in (2, 4, 8, 16, 32)]
    assert [float(text) for text in params["sparsity"]] == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", ["random", "magnitude", "set", "rigl", "gmp", "dpf"])
def test_the_methods_of_shrinkbench_reach_the_ratio(name: str) -> None:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        overrides = ["experiment=shrinkbench_small", "hydra/launcher=basic", f"shrinkbench={name}", "sparsity=0.943293"]
        config = compose("train", overrides=overrides, return_hydra_config=True)
    config.initial_weights = None
    method = build.build_method(config)
    assert method is not None
    model = models.mlp((1, 8, 8), 10)
    left = 85_002 - 84_480 * method.plan(model).total
    assert 85_002 / left == pytest.approx(16, rel=1e-3)


@pytest.mark.slow
@needs("hydra-joblib-launcher")
def test_jobs_beside_each_other_end_with_one_page(tmp_path: Path) -> None:
    """Real runs in processes of joblib's, of which one fails."""
    overrides = [
        "experiment=compare_small",
        "method=rigl",
        "sparsity=0.9",
        "seed=0,1",
        "optim.lr=0.05,-1",
        f"hydra.sweep.dir={tmp_path}",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *overrides, *SHORT[2:]],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 1
    assert done.stdout.count("best sparse setting") == 1
    assert "failed: ValueError: optim.lr=-1 is not positive" in " ".join(done.stdout.split())
    assert (tmp_path / "compare.html").is_file()


@pytest.mark.slow
@needs("hydra-joblib-launcher")
def test_presets_run_beside_each_other(tmp_path: Path) -> None:
    """Shares of epochs in their configurations are read in the processes of joblib's too."""
    count = 400
    source = np.random.default_rng(0)
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for stem in ("train", "t10k"):
        images, labels = source.integers(0, 256, (count, 28, 28), dtype=np.uint8), np.arange(count) % 10
        for kind, magic, values in (("images-idx3", 0x803, images), ("labels-idx1", 0x801, labels)):
            head = b"".join(number.to_bytes(4, "big") for number in (magic, *values.shape))
            (raw / f"{stem}-{kind}-ubyte").write_bytes(head + values.astype(np.uint8).tobytes())
    presets = ["l0_mlp_mnist", "rigl_lenet_300_100_mnist"]
    assert all("epochs:" in (ROOT / f"conf/experiment/{name}.yaml").read_text() for name in presets)
    overrides = [
        f"experiment={','.join(presets)}",
        "hydra/launcher=two_jobs",
        f"data.root=choice('{tmp_path}')",
        "data.val_count=choice(100)",
    ]
    short = [
        "trainer.max_epochs=3",
        "trainer.limit_train_batches=2",
        "threads=1",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    ]
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), "-m", *overrides, *short, *SHORT[:3]],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}, capture_output=True, text=True, check=False, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    metrics = [json.loads(path.read_text()) for path in sorted((tmp_path / "sweep").glob("*/metrics.json"))]
    assert [found["steps"] for found in metrics] == [6, 6]
