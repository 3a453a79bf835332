"""Runs of one setting differ in the seed alone; data sets and models are kept apart."""

from pathlib import Path
from typing import Any

import pytest

from sparse_callbacks.reporting.compared_runs import ComparedRun
from sparse_callbacks.reporting.compared_settings import Problem, problems_of, target_of


def made(method: str = "RigL", acc: float = 0.9, seed: int | None = 0, /, **configuration: Any) -> ComparedRun:
    """A run whose keys have `__` for dots."""
    keys = {key.replace("__", "."): value for key, value in configuration.items()}
    keys = {"data._target_": "x.digits", "model._target_": "x.mlp", "model.hidden": [8], "seed": seed} | keys
    if method != "dense":
        keys = {"method._target_": f"x.{method}", "method.seed": seed, "method.sparsity": None} | keys
    return ComparedRun(Path(f"runs/{seed}"), method, seed, keys, {}, {"test/acc": acc, "sparsity/total": 0.9})


def only(runs: list[ComparedRun]) -> Problem:
    (problem,) = problems_of(runs)
    return problem


def test_seeds_paths_and_what_does_not_train_make_no_setting() -> None:
    others = {
        "data__seed": 1, "data__root": "/b", "output_dir": "/b", "ckpt_path": "b.ckpt", "logger__wandb__name": "b", "threads": 2,
        "method__print_plan": False, "method__initial_mask": "/b/last.ckpt", "trainer__enable_progress_bar": False, "objective": "b",
        "slim": True, "curvature": 10,
    }  # fmt: skip
    first = dict.fromkeys(others, "a") | {"method__initial_mask": "/a/last.ckpt"}
    (setting,) = only([made("RigL", 0.8, 1, **others), made("RigL", 0.9, 0, **first)]).settings
    assert [run.seed for run in setting.runs] == [0, 1]
    spread = setting.over_seeds("test/acc")
    assert spread is not None
    assert (spread.mean, spread.count) == (pytest.approx(0.85), 2)
    assert spread.deviation == pytest.approx(0.1 / 2**0.5)


@pytest.mark.parametrize(
    "other",
    [{"optim__lr": 0.2}, {"method__every": 7}, {"data__batch_size": 8}, {"trainer__max_epochs": 3}, {"test": "best"}],
)
def test_whatever_changes_the_training_makes_another_setting(other: dict[str, Any]) -> None:
    base = {"optim__lr": 0.1, "method__every": 5, "data__batch_size": 4, "trainer__max_epochs": 2, "test": "last"}
    problem = only([made("RigL", 0.9, 0, **base), made("RigL", 0.9, 1, **{**base, **other})])
    assert len(problem.settings) == 2
    (key, value) = next(iter(other.items()))
    name = key.replace("__", ".").removeprefix("method.")
    assert {s.line for s in problem.settings} == {f"RigL ({name}={base[key]})", f"RigL ({name}={value})"}


def test_targets_are_points_of_one_line_and_dense_runs_come_first() -> None:
    runs = [made("SET", 0.9, 0, sparsity=s) for s in (0.98, 0.9)] + [
        made("GMP", 0.9, 0, sparsity=0.9),
        made("dense", 0.95),
    ]
    problem = only(runs)
    assert [(s.line, s.target) for s in problem.settings] == [
        ("dense", None),
        ("GMP", 0.9),
        ("SET", 0.9),
        ("SET", 0.98),
    ]


def test_the_root_key_and_the_methods_own_are_one_sparsity() -> None:
    (setting,) = only(
        [made("RigL", 0.9, 0, sparsity=0.8), made("RigL", 0.9, 1, sparsity=0.8, method__sparsity=0.8)]
    ).settings
    assert setting.target == 0.8


@pytest.mark.parametrize(
    ("method", "configuration", "expected"),
    [
        ("SMCP", {"method__budget": 0.5}, ("budget 0.5", None)),
        ("ConstrainedL0", {"method__density": 0.3}, ("density 0.3", None)),
        ("RigL", {"method__sparsity": "0.8"}, (0.8, 0.8)),
        ("GMP", {"method__sparsity": "linear(0, 0.9)"}, (0.9, 0.9)),  # measured
        ("RigL", {}, (0.9, 0.9)),
        ("dense", {}, (None, 0.0)),
    ],
)
def test_targets_are_what_was_asked_for_else_what_was_measured(method: str, configuration: Any, expected: Any) -> None:
    assert target_of(made(method, **configuration)) == expected


def test_data_sets_and_models_are_kept_apart_and_named() -> None:
    runs = [
        made("RigL"),
        made("RigL", 0.9, 0, model__hidden=[9]),
        made("RigL", 0.9, 0, data___target_="x.torchvision_set", data__name="mnist"),
        made("RigL", 0.9, 0, data__path="/somewhere/Isolet.mat", data___target_="x.tabular"),
    ]
    titles = [problem.title for problem in problems_of(runs)]
    assert titles == [
        "digits, mlp (model.hidden=[8])",
        "digits, mlp (model.hidden=[9])",
        "mnist, mlp",
        "tabular Isolet.mat, mlp",
    ]


def test_runs_without_a_configuration_are_told_apart_by_their_layers() -> None:
    runs = [
        ComparedRun(
            Path("a"), "RigL", seed, {"method.sparsity": "0.9", "method.seed": str(seed)}, {"w": (2, size), "b": (2,)}
        )
        for seed, size in ((0, 3), (1, 3), (0, 4))
    ]
    problems = problems_of(runs)
    assert [problem.title for problem in problems] == ["model with weights 2x3", "model with weights 2x4"]
    assert [len(problem.settings[0].runs) for problem in problems] == [2, 1]
    assert problems[0].settings[0].target == 0.9


def test_what_differs_besides_the_method_is_said() -> None:
    problem = only([made("RigL", 0.9, 0, optim__lr=0.1), made("SET", 0.9, 0, optim__lr=0.05, method__every=3)])
    assert dict(problem.differing) == {"optim.lr": ["0.1", "0.05"]}


def test_two_runs_of_one_seed_are_said() -> None:
    (line,) = only([made("RigL", 0.9, 4), made("RigL", 0.9, 4), made("RigL", 0.9, 5)]).repeated
    assert "seed 4 has 2 runs" in line
