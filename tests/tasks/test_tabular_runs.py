"""Runs of `train.py` on tables: configuration, resume, and the experiment on Madelon."""

import inspect
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from sparse_callbacks.tasks import build, models
from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.data import tabular
from sparse_callbacks.tasks.data.module import MemoryData
from sparse_callbacks.tasks.safe_stop import RunStopped

CONF = Path(__file__).parents[2] / "conf"
Compose = Callable[..., DictConfig]
Run = Callable[..., dict[str, float]]


@pytest.mark.parametrize("name", ["madelon", "tabular"])
def test_the_yaml_spells_out_every_argument_with_its_default(name: str) -> None:
    cfg = OmegaConf.load(CONF / f"data/{name}.yaml")
    del cfg["_target_"]
    assert OmegaConf.to_container(cfg) == {
        key: p.default for key, p in inspect.signature(getattr(tabular, name)).parameters.items()
    }


@pytest.mark.parametrize("shuffle", ["true", "false"])
def test_a_run_learns_from_features(run: Run, tmp_path: Path, shuffle: str) -> None:
    features = np.random.default_rng(1).normal(size=(400, 6))
    np.savez(tmp_path / "a.npz", X=features, Y=np.where(features[:, 0] + features[:, 1] > 0, "up", "down"))
    options = (
        f"data.root={tmp_path}",
        "data.path=a.npz",
        f"data.shuffle={shuffle}",
        "data.batch_size=20",
        "trainer.max_epochs=8",
    )
    metrics = run("data=tabular", "sparsity=0.5", *options)
    assert metrics["test/acc"] > 0.85
    assert metrics["sparsity/total"] == pytest.approx(0.5, abs=0.01)


def test_a_run_on_madelons_files_resumes_bitwise(
    run: Run, madelon_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = (
        "data=madelon",
        f"data.root={madelon_folder}",
        "data.batch_size=9",
        "data.shuffle=false",
        "method=set",
        "method.every=4",
    )
    complete = run(*options, folder="whole")
    steps, step = [0], Classifier.training_step

    def stopped_in_the_ninth(self: Classifier, batch: Any, index: int) -> torch.Tensor:
        steps[0] += 1
        if steps[0] == 9:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, batch, index)

    monkeypatch.setattr(Classifier, "training_step", stopped_in_the_ninth)
    with pytest.raises(RunStopped) as caught:
        run(*options)
    resumed = run(*options, f"ckpt_path={caught.value.checkpoint}")
    assert resumed["test/loss"] == complete["test/loss"]
    assert resumed["steps"] == complete["steps"] == 18


def test_weights_start_xavier_uniform_with_zero_biases() -> None:
    torch.manual_seed(0)
    layers = [m for m in models.mlp((500,), 2, hidden=(1000, 1000), init="xavier_uniform") if isinstance(m, nn.Linear)]
    for layer in layers:
        bound = (6 / (layer.in_features + layer.out_features)) ** 0.5
        assert 0.98 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / 3**0.5, rel=0.05)
        assert not layer.bias.any()


def test_an_unknown_init() -> None:
    with pytest.raises(ValueError, match=r"model.init='zeros' is not known. Use model.init=xavier_uniform"):
        models.mlp((4,), 2, init="zeros")


# ---------------------------------------------------------------------- the experiment


SET_ARGUMENTS = ("method=set", "method.every=18", "method.stop=1.0", "method.drop_fraction='constant(0.2)'")
COMMANDS = [(), ("method.variant=seq", "method.monitor=val/acc"), SET_ARGUMENTS, ("method=static",)]


@pytest.mark.parametrize("overrides", COMMANDS)
def test_every_command_of_the_madelon_experiment_makes_the_published_network(
    composed: Compose, overrides: tuple[str, ...]
) -> None:
    cfg = composed("experiment=ctre_madelon", *overrides)
    method = build.build_method(cfg)
    data = MemoryData(*[tabular_samples(18 if i == 0 else 4) for i in range(3)], num_classes=2, batch_size=100)
    plan = method.plan(build.build_module(cfg, data))  # type: ignore[union-attr]
    # 1500 + 2000 + 2000 + 1002 of 2,502,000 weights (oracle for Erdos-Renyi with epsilon 1)
    assert plan.total == pytest.approx(1 - 6502 / 2_502_000, abs=1e-9)
    assert (cfg.data.shuffle, cfg.data.batch_size, cfg.test, cfg.trainer.max_epochs) == (False, 100, "best", 500)
    optim = build.build_module(cfg, data).optim
    assert (optim.lr, optim.weight_decay, optim.momentum, optim.nesterov, optim.lr_schedule) == (
        0.01,
        1e-4,
        0.9,
        True,
        "constant",
    )


def tabular_samples(count: int) -> Any:
    return tabular.Samples(torch.zeros(count, 500), torch.zeros(count, dtype=torch.int64))


def test_the_commands_in_the_head_of_the_experiment_are_these() -> None:
    lines = [
        line.split()
        for line in (CONF / "experiment/ctre_madelon.yaml").read_text().splitlines()
        if "python train.py" in line
    ]
    assert [tuple(word.strip('"') for word in words[5:]) for words in lines] == COMMANDS
