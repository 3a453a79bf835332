"""Runs of `train.py` inside the test process, in a temporary folder and short."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig

ROOT = Path(__file__).parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

SHORT = (
    "logger=[]",
    "report=false",  # whose figures take seconds
    "trainer.enable_progress_bar=false",
    "trainer.max_epochs=3",
    "data.batch_size=128",
    "model.hidden=[24]",
)


@pytest.fixture(autouse=True)
def _no_login(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Neither a login nor a mode of the machine reaches the tests."""
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))


@pytest.fixture
def composed() -> Callable[..., DictConfig]:
    """conf/train.yaml with these overrides."""

    def make(*overrides: str) -> DictConfig:
        with initialize_config_dir(str(ROOT / "conf"), version_base=None):
            return compose("train", overrides=list(overrides))

    return make


@pytest.fixture
def run(composed: Callable[..., DictConfig], tmp_path: Path) -> Callable[..., dict[str, float]]:
    """`train` on a small network and three epochs of nine steps; the folder is tmp_path/run unless given."""
    from train import train

    def go(*overrides: str, folder: str = "run") -> dict[str, float]:
        return train(composed(*SHORT, f"output_dir={tmp_path / folder}", *overrides))

    return go


@pytest.fixture
def madelon_folder(tmp_path: Path) -> Path:
    """60 training and 20 test rows in the layout of the UCI files."""
    folder = tmp_path / "madelon"
    folder.mkdir()
    source = np.random.default_rng(0)
    for part, count, period in (("train", 60, 2), ("valid", 20, 4)):
        rows = source.integers(300, 700, (count, 5))
        (folder / f"madelon_{part}.data").write_text("".join(" ".join(map(str, row)) + " \n" for row in rows))
        (folder / f"madelon_{part}.labels").write_text("\n".join(str(-1 if i % period else 1) for i in range(count)))
    return tmp_path
