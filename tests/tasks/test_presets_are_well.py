"""Presets of every method on digits, for a few epochs: the doctor has nothing to say of them."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from omegaconf import DictConfig

from sparse_callbacks import DoctorWarning

METHODS = sorted(path.stem for path in (Path(__file__).parents[2] / "conf/method").glob("*.yaml"))


@pytest.mark.parametrize("method", METHODS)
def test_no_preset_is_warned_about(method: str, composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    from train import train

    epochs = 4 if "gap" in method or method == "sup_tickets" else 2  # three phases, and fine-tuning; or three cycles
    short = ("logger=[]", "trainer.enable_progress_bar=false", f"trainer.max_epochs={epochs}", f"output_dir={tmp_path}")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DoctorWarning)
        train(composed(*short, f"method={method}"))
