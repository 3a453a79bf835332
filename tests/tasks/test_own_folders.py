"""Runs that begin in the same second: each writes into a folder of its own, in multiruns too."""

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path

import hydra.core.utils
import pytest
from conftest import ROOT
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from sparse_callbacks.tasks import multirun, own_folders


class Noon(datetime):
    """The clock that Hydra reads: it stands still."""

    @classmethod
    def now(cls, tz: object = None) -> "Noon":
        return cls(2027, 1, 31, 12)


def pretended(cfg: DictConfig, *config_file: Path) -> dict[str, float]:
    """A run that takes no time, and writes its seed into its folder."""
    import train

    (train.run_folder(cfg) / "metrics.json").write_text(json.dumps({"seed": cfg.seed, "test/acc": 0.5}))
    return {"val/acc": 0.5}


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """`python train.py ...` in an empty folder, always at noon."""
    import train

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, "train", pretended)
    monkeypatch.setattr(hydra.core.utils, "datetime", Noon)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    for name in ("WORLD_SIZE", "SLURM_NTASKS"):
        monkeypatch.delenv(name, raising=False)

    def go(*arguments: str) -> None:
        monkeypatch.setattr(sys, "argv", [str(ROOT / "train.py"), *arguments])
        GlobalHydra.instance().clear()
        with multirun.multirun_shown():
            train.main()

    yield go
    GlobalHydra.instance().clear()


def seeds(folder: Path) -> dict[str, int]:
    """The seed of each run below a folder, by its path from there."""
    found = sorted(folder.rglob("metrics.json"))
    return {path.parent.relative_to(folder).as_posix(): json.loads(path.read_text())["seed"] for path in found}


def test_single_runs_of_one_second(command: Callable[..., None], tmp_path: Path) -> None:
    for seed in range(3):
        command(f"seed={seed}")
    day = "outputs/2027-01-31"
    assert seeds(tmp_path) == {f"{day}/12-00-00": 0, f"{day}/12-00-00-2": 1, f"{day}/12-00-00-3": 2}
    # what Hydra writes lies there too
    for number, name in enumerate(("12-00-00", "12-00-00-2", "12-00-00-3")):
        assert f"seed={number}" in (tmp_path / day / name / ".hydra/overrides.yaml").read_text()


def test_multiruns_of_one_second(
    command: Callable[..., None], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command("-m", "seed=0,1")
    capsys.readouterr()
    command("-m", "seed=2,3")
    day = "multirun/2027-01-31"
    assert seeds(tmp_path) == {
        f"{day}/12-00-00/0": 0,
        f"{day}/12-00-00/1": 1,
        f"{day}/12-00-00-2/0": 2,
        f"{day}/12-00-00-2/1": 3,
    }
    assert f"compared in {tmp_path / day / '12-00-00-2/compare.html'}" in capsys.readouterr().out
    assert (tmp_path / day / "12-00-00-2/multirun.yaml").is_file()


def test_the_time_in_a_name_of_ones_own_counts_too(command: Callable[..., None], tmp_path: Path) -> None:
    for seed in range(2):
        command(f"seed={seed}", "hydra.run.dir='a, b/${now:%H}_${method._target_}'")
    name = "a, b/12_sparse_callbacks.RigL"
    assert seeds(tmp_path) == {name: 0, f"{name}-2": 1}
    for seed in range(2):
        command("-m", f"seed={seed},5", "hydra.sweep.dir='c, d/${now:%H}'")
    assert seeds(tmp_path / "c, d") == {"12/0": 0, "12/1": 5, "12-2/0": 1, "12-2/1": 5}


def test_a_folder_that_was_typed_is_taken_as_it_is(command: Callable[..., None], tmp_path: Path) -> None:
    for seed in range(2):
        command(f"seed={seed}", "hydra.run.dir=mine")
        command("-m", f"seed={seed},7", "hydra.sweep.dir=several")
    assert seeds(tmp_path) == {"mine": 1, "several/0": 1, "several/1": 7}


@pytest.mark.parametrize("variable", ["WORLD_SIZE", "SLURM_NTASKS"])
def test_processes_of_one_run_share_a_folder(
    command: Callable[..., None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    monkeypatch.setenv(variable, "2")
    for seed in range(2):
        command(f"seed={seed}")
    assert seeds(tmp_path) == {"outputs/2027-01-31/12-00-00": 1}


def test_processes_that_a_trainer_starts_are_given_the_folder(
    command: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    given: list[tuple[str, str]] = []

    def seen(cfg: DictConfig, *config_file: Path) -> dict[str, float]:
        # what Lightning's launcher writes behind hydra.run.dir=
        given.append((HydraConfig.get().run.dir, train.run_folder(cfg).as_posix()))
        return {"val/acc": 0.5}

    monkeypatch.setattr(train, "train", seen)
    command()
    command()
    assert [run_dir for run_dir, _ in given] == ["outputs/2027-01-31/12-00-00", "outputs/2027-01-31/12-00-00-2"]
    assert all(folder.endswith(run_dir) for run_dir, folder in given)


def test_showing_the_configuration_creates_nothing(command: Callable[..., None], tmp_path: Path) -> None:
    command("--cfg", "all", "--resolve")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_left_to_hydra(command: Callable[..., None], tmp_path: Path) -> None:
    (tmp_path / "outputs").write_text("a file\n")
    with pytest.raises(OSError, match="outputs"):
        command()


def test_many_at_once_get_a_folder_each(tmp_path: Path) -> None:
    with ThreadPoolExecutor(16) as pool:
        folders = list(pool.map(own_folders.new_folder, [tmp_path / "new/run"] * 64))
    assert len(set(folders)) == 64
    assert all(folder.is_dir() for folder in folders)
