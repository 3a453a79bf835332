"""LightningCLI of either package takes every callback, by flags and by a yaml file."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import sparse_callbacks

pytest.importorskip("jsonargparse")
pytestmark = pytest.mark.filterwarnings("ignore:LightningCLI's args parameter")
PACKAGES = ["pytorch_lightning", "lightning.pytorch"]

# an argument of each method's own, and its value as the command line has it and as the callback keeps it
OWN = {
    "CTRE": ("variant", "sim", "sim"),
    "DPF": ("every", "5", 5),
    "GMP": ("every", "0.25", 0.25),
    "SET": ("drop_fraction", "0.2", 0.2),
    "SMCP": ("budget", "0.4", 0.4),
    "ChannelPruning": ("criterion", "taylor_fo", "taylor_fo"),
    "SNFS": ("distribution", "uniform", "uniform"),
    "ConstrainedL0": ("density", "0.3", 0.3),
    "EarlyCroP": ("lr_after", "restart", "restart"),
    "GaP": ("partitions", "2", 2),
    "ParallelGaP": ("rounds", "2", 2),
    "PruneAtStart": ("score", "grasp", "grasp"),
    "RigL": ("sparsity", "0.8", 0.8),
    "Static": ("keep_dense", "last", "last"),
}


def parsed(package: str, arguments: list[str], folder: Path) -> Any:
    """The callbacks of the Trainer that LightningCLI makes of ``arguments``."""
    cli = pytest.importorskip(f"{package}.cli")
    demos = importlib.import_module(f"{package}.demos.boring_classes")

    class Net(demos.BoringModel):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 2))

    quiet = ["accelerator=cpu", "logger=false", "enable_checkpointing=false", f"default_root_dir={folder}"]
    quiet += ["max_steps=2", "enable_progress_bar=false", "enable_model_summary=false"]
    return cli.LightningCLI(
        Net,
        demos.BoringDataModule,
        args=[*arguments, *(f"--trainer.{flag}" for flag in quiet)],
        save_config_callback=None,
        run=False,
    )


def ours(cli: Any) -> Any:
    (callback,) = [c for c in cli.trainer.callbacks if isinstance(c, sparse_callbacks.SparsityCallback)]
    return callback


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", OWN)
def test_a_callback_by_flags(name: str, package: str, tmp_path: Path) -> None:
    argument, text, value = OWN[name]
    flags = [f"--trainer.callbacks+=sparse_callbacks.{name}", f"--trainer.callbacks.{argument}={text}"]
    callback = ours(parsed(package, flags, tmp_path))
    assert type(callback) is getattr(sparse_callbacks, name)
    assert getattr(callback, argument) == value


@pytest.mark.parametrize("package", PACKAGES)
@pytest.mark.parametrize("name", OWN)
def test_a_callback_by_yaml(name: str, package: str, tmp_path: Path) -> None:
    argument, text, value = OWN[name]
    config = tmp_path / "config.yaml"
    config.write_text(f"""
trainer:
  callbacks:
    - class_path: sparse_callbacks.{name}
      init_args:
        {argument}: {text}
        print_plan: false
""")
    callback = ours(parsed(package, [f"--config={config}"], tmp_path))
    assert type(callback) is getattr(sparse_callbacks, name)
    assert getattr(callback, argument) == value
    assert callback.print_plan is False


@pytest.mark.parametrize("package", PACKAGES)
def test_a_run_by_the_command_line_trains_sparse(package: str, tmp_path: Path) -> None:
    flags = ["--trainer.callbacks+=sparse_callbacks.RigL", "--trainer.callbacks.sparsity=0.75"]
    cli = parsed(package, flags, tmp_path)
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    mask = ours(cli).masks["layer.0.weight"]
    assert not mask.all()
    assert not torch.count_nonzero(cli.model.layer[0].weight.detach()[~mask])
