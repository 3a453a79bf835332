"""The published setting of truly sparse MLPs: its network, its updates, and a short run of it on other images."""

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from torch import nn

from sparse_callbacks import AllReLU
from sparse_callbacks.core.calendar import RunLength, resolve_times
from sparse_callbacks.tasks import build, models

PRESET = "experiment=set_mlp_fashion_mnist"
EPOCHS, STEPS = 500, math.ceil(55_000 / 128)


def module_of(cfg: DictConfig) -> Any:
    return build.build_module(cfg, SimpleNamespace(input_shape=(1, 28, 28), num_classes=10))  # type: ignore[arg-type]


def test_the_network_and_its_plan_are_the_published_ones(composed: Callable[..., DictConfig]) -> None:
    cfg = composed(PRESET)
    module, method = module_of(cfg), build.build_method(cfg)
    layers = [m for m in module.modules() if isinstance(m, nn.Linear)]
    assert [tuple(m.weight.shape) for m in layers] == [(1000, 784), (1000, 1000), (1000, 1000), (10, 1000)]
    slopes = [m.slope for m in module.modules() if isinstance(m, AllReLU)]
    assert slopes == [-0.6, 0.6, -0.6]
    assert [m.p for m in module.modules() if isinstance(m, nn.Dropout)] == [0.3] * 3
    for layer in layers:
        assert float(layer.weight.detach().abs().max()) == pytest.approx(math.sqrt(6 / layer.in_features), rel=1e-2)
        assert not layer.bias.any()
    active = [row.size - (row.zeros or 0) for row in method.plan(module) if row.name.endswith("weight")]  # type: ignore[union-attr]
    # epsilon 20 times inputs and outputs; the last layer would be denser than dense
    assert active == pytest.approx([35_680, 40_000, 40_000, 10_000], abs=1)
    optim = module.optim
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.nesterov, optim.lr_schedule) == (
        0.01,
        0.9,
        2e-4,
        False,
        "constant",
    )
    assert (cfg.data.batch_size, cfg.trainer.max_epochs) == (128, EPOCHS)


def test_updates_come_at_the_end_of_each_epoch_but_the_last(composed: Callable[..., DictConfig]) -> None:
    method: Any = build.build_method(composed(PRESET))
    times = (method.every, method.start, method.stop, method.published_every)
    calendar = resolve_times(*times, RunLength(total=lambda: EPOCHS * STEPS, epoch=lambda: STEPS))
    found, done = [], None
    grid = max(calendar.start, method.first_update)
    while (due := calendar.next(0 if done is None else done, grid, done)) is not None:
        found.append(due)
        done = due
    assert [number / STEPS for number in found] == list(range(1, EPOCHS))
    assert (method.drop, method.arguments["new_weights"]) == ("signed", "'uniform'")
    method.calendar = calendar
    assert {method.fraction_at(number) for number in found} == {0.3}


def test_a_short_run_of_it(composed: Callable[..., DictConfig], tmp_path: Path) -> None:
    from train import train

    short = ("data=digits", "model.hidden=[40, 40]", "method.every=9", "method.start=9", "method.neuron_importance=0.2")
    times = ("method.importance_start=18", "method.importance_every=9", "trainer.max_epochs=6", "report=false")
    quiet = (
        "logger=[]",
        "trainer.enable_progress_bar=false",
        "data.batch_size=128",
        "method.distribution='epsilon(5)'",
    )
    metrics = train(composed(PRESET, *short, *times, *quiet, f"output_dir={tmp_path}"))
    # 5 times inputs and outputs of each layer: 520, 400 and 250 weights; removed neurons make them fewer
    assert metrics["sparsity/total"] > 1 - 1100 / 4560
    assert metrics["updates"] >= 5


# ---------------------------------------------------------------------- the network


def test_without_the_new_arguments_the_network_is_as_before() -> None:
    torch.manual_seed(0)
    made = models.mlp((1, 8, 8), 10, hidden=(5, 6))
    assert [type(m) for m in made] == [nn.Flatten, nn.Linear, nn.ReLU, nn.Linear, nn.ReLU, nn.Linear]
    torch.manual_seed(0)
    sizes = itertools.pairwise((64, 5, 6, 10))
    assert all(torch.equal(made[2 * i + 1].weight, nn.Linear(a, b).weight) for i, (a, b) in enumerate(sizes))


def test_dropout_follows_each_activation() -> None:
    made = models.mlp((12,), 3, hidden=(5, 6), activation="all_relu", dropout=0.25)
    hidden = [nn.Linear, AllReLU, nn.Dropout]
    assert [type(m) for m in made] == [nn.Flatten, *hidden, *hidden, nn.Linear]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"activation": "tanh"}, "model.activation='tanh' is not known. Use model.activation=relu, or all_relu"),
        ({"dropout": 1.0}, r"model.dropout=1\.0 is not a rate from 0 to 1"),
        ({"dropout": -0.1}, r"model.dropout=-0\.1 is not a rate from 0 to 1"),
        ({"init": "he_normal"}, "model.init='he_normal' is not known. Use model.init=xavier_uniform, he_uniform"),
    ],
    ids=["activation", "dropout of all", "negative dropout", "init"],
)
def test_what_is_not_known_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        models.mlp((12,), 3, **arguments)
