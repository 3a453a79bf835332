"""What is recorded of a run is what ran: one sparsity, names and groups, a file that starts the same run again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from omegaconf import DictConfig, OmegaConf

from sparse_callbacks.tasks import build, recorded_config, run_names

Composed = Callable[..., DictConfig]
Run = Callable[..., dict[str, float]]
METHODS = sorted(path.stem for path in (ROOT / "conf" / "method").glob("*.yaml"))


@pytest.mark.parametrize(
    ("overrides", "sparsity", "own"),
    [
        ((), 0.9, 0.9),
        (("sparsity=0.95",), 0.95, 0.95),
        (("method.sparsity=0.8",), 0.8, 0.8),
        (("method=gmp",), 0.9, 0.9),
        (("method=gmp", "sparsity=0.95"), 0.95, 0.95),  # its file says 0.9
        (("method=gmp", "schedule=linear", "sparsity=0.8"), 0.8, 0.8),
        (("method=dpf", "method.sparsity='linear(0.5, 0.7)'"), 0.7, "linear(0.5, 0.7)"),
        (("method=l0", "method.density=0.33"), 0.67, None),
        (("method=l0", "method.constraint=layer", "method.density={model.1.weight: 0.1}"), None, None),
        (("method=none",), 0.0, None),
        (("method=smcp",), None, None),  # a budget
        (("method=ctre", "method.distribution='epsilon(1)'"), None, None),  # the layers decide
        (("method=static", "method.initial_mask=nonzero"), None, None),  # the weights decide
        (("method=set", "sparsity=0.0"), 0.0, 0.0),
    ],
)
def test_one_sparsity_is_recorded_in_both_places(
    overrides: tuple[str, ...], sparsity: float | None, own: object, composed: Composed, tmp_path: Path
) -> None:
    cfg = composed(*overrides)
    given, method = cfg.copy(), build.build_method(cfg)
    recorded = recorded_config.as_run(cfg, method)
    assert (recorded.sparsity, recorded.method.get("sparsity")) == (sparsity, own)
    assert ("sparsity" in recorded_config.settings(recorded)) is (sparsity is not None)
    assert cfg == given

    # Hydra's file says it too, and a run that is started from it is the same one
    path = tmp_path / "config.yaml"
    OmegaConf.save(cfg, path)
    recorded_config.correct_file(path, recorded)
    again = OmegaConf.load(path)
    assert isinstance(again, DictConfig)
    assert str(build.build_method(again)) == str(method)
    if own == sparsity is not None:
        assert again.sparsity == again.method.sparsity == sparsity
    assert again.method.get("seed") == 0
    assert "${seed}" in path.read_text()


def test_a_sparsity_that_the_layers_decide_is_recorded_when_training_starts(run: Run, tmp_path: Path) -> None:
    metrics = run("method=set", "method.distribution='epsilon(3)'", "logger=[csv]", "trainer.max_epochs=1")
    told = yaml.safe_load((tmp_path / "run/csv/version_0/hparams.yaml").read_text())
    assert told["sparsity"] == pytest.approx(metrics["sparsity/total"], abs=1e-6)
    assert 0.3 < told["sparsity"] < 0.9
    assert told["calendar"] == {"every": 7, "start": 0, "stop": 7}


def test_a_sparsity_of_targets_by_layer_is_recorded_when_training_starts(run: Run, tmp_path: Path) -> None:
    targets = "{model.1.weight: 0.25, model.3.weight: 0.5}"
    run("method=l0", "method.constraint=layer", f"method.density={targets}", "logger=[csv]", "trainer.max_epochs=1")
    told = yaml.safe_load((tmp_path / "run/csv/version_0/hparams.yaml").read_text())
    assert told["sparsity"] == pytest.approx((64 * 24 * 0.75 + 24 * 10 * 0.5) / (64 * 24 + 24 * 10), abs=0.02)


def test_under_a_budget_the_sparsity_that_was_reached_is_recorded(run: Run, tmp_path: Path) -> None:
    metrics = run("method=smcp", "method.round_to=1", "logger=[csv]")
    told = yaml.safe_load((tmp_path / "run/csv/version_0/hparams.yaml").read_text())
    assert told["sparsity"] == round(metrics["sparsity/total"], 4) > 0
    assert told["method"]["budget"] == 0.5


def test_a_dense_run_is_recorded_with_sparsity_zero_and_without_a_calendar(run: Run, tmp_path: Path) -> None:
    run("method=none", "logger=[csv]", "trainer.max_epochs=1")
    told = yaml.safe_load((tmp_path / "run/csv/version_0/hparams.yaml").read_text())
    assert told["sparsity"] == 0.0
    assert "calendar" not in told


@pytest.mark.parametrize("name", METHODS)
def test_a_run_has_the_name_of_its_method_in_the_configuration(name: str, composed: Composed) -> None:
    cfg = composed(f"method={name}")
    assert run_names.method_name(build.build_method(cfg)) == {"none": "dense"}.get(name, name)


@pytest.mark.parametrize(
    ("overrides", "name"),
    [
        (("seed=7",), "rigl-0.9-mlp-s7"),
        (("method=none", "model=resnet20"), "dense-resnet20-s0"),
        (("method=smcp", "method.budget=0.25"), "smcp-0.25-mlp-s0"),
        (("method=l0", "method.density=0.1"), "l0-0.9-mlp-s0"),
        (("method=l0", "method.constraint=layer", "method.density={model.1.weight: 0.1}"), "l0-mlp-s0"),
        (("method=ctre", "method.epsilon=1"), "ctre-epsilon(1)-mlp-s0"),
        (("method=static", "method.initial_mask=some.ckpt"), "static-mlp-s0"),
        (("method=gmp", "model=torchvision", "model.name=resnet50"), "gmp-0.9-resnet50-s0"),
    ],
)
def test_names(overrides: tuple[str, ...], name: str, composed: Composed) -> None:
    cfg = composed(*overrides)
    assert run_names.run_name(cfg, build.build_method(cfg)) == name


def group(composed: Composed, *overrides: str) -> str:
    cfg = composed(*overrides)
    method = build.build_method(cfg)
    return run_names.group_name(recorded_config.as_run(cfg, method), method)


def test_a_group_has_all_seeds_of_one_setting_however_it_was_written(composed: Composed) -> None:
    plain = group(composed)
    same = [
        ("seed=1",),
        ("method.seed=5", "data.seed=6"),
        ("sparsity=0.9",),
        ("method.sparsity=0.9",),
        ("output_dir=there", "ckpt_path=x.ckpt", "checkpoint_every=10", "logger=[csv]", "curvature=10"),
        ("trainer.enable_progress_bar=false",),
    ]
    assert {group(composed, *overrides) for overrides in same} == {plain}
    others = [
        ("method.drop_fraction=0.2",),
        ("sparsity=0.95",),
        ("optim.lr=0.01",),
        ("trainer.max_epochs=2",),
        ("data.batch_size=7",),
        ("method=set",),
    ]
    assert len({plain, *(group(composed, *overrides) for overrides in others)}) == 1 + len(others)


def test_names_that_the_user_gives_are_kept(composed: Composed) -> None:
    cfg = composed("logger.wandb.name=mine", "logger.wandb.tags=[a]")
    method = build.build_method(cfg)
    (logger,) = build.build_loggers(cfg, method)
    made = logger._wandb_init  # type: ignore[attr-defined]
    assert (made["name"], list(made["tags"])) == ("mine", ["a"])
    assert made["group"].startswith("rigl-0.9-mlp-digits-")
    environment = {"WANDB_NAME": "theirs", "WANDB_RUN_GROUP": "g"}
    assert run_names.for_wandb(cfg, method, environment).keys() == {"tags"}


def test_a_resumed_run_has_a_tag(composed: Composed) -> None:
    tags = [run_names.tags(composed(*overrides), None) for overrides in ((), ("ckpt_path=last.ckpt",))]
    assert tags == [["dense", "mlp", "digits"], ["dense", "mlp", "digits", "resumed"]]
