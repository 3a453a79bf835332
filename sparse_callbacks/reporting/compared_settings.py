"""Settings that are compared: runs that differ in the seed alone, kept apart by data set and model."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from sparse_callbacks.reporting.compared_runs import ComparedRun
from sparse_callbacks.reporting.measures import mean_and_spread

TARGETS = ("sparsity", "density", "budget", "epsilon")
"""Arguments of methods that say how many weights are to be left; of a method's runs these are points of one line."""
_NOT_SETTINGS = {
    "logger",
    "hydra",
    "objective",
    "output_dir",
    "ckpt_path",
    "checkpoint_every",
    "curvature",
    "report",
    "dense_run",
    "threads",
    "slim",  # what becomes of the network once it is trained and tested
}
_NOT_SETTINGS_ANYWHERE = {"seed", "root", "save_dir", "download", "num_workers", "print_plan", "enable_progress_bar"}
_NOT_SETTINGS_ANYWHERE |= {"enable_model_summary", "log_every_n_steps", "fresh_start"}
_FILES = {"path", "initial_mask", "initial_weights", "from_checkpoint"}  # of which the place does not matter
_NOT_THE_DATA = {"data.batch_size"}


@dataclass(frozen=True)
class Spread:
    """A value over the seeds of a setting.

    Attributes:
        mean: its mean.
        deviation: its standard deviation with n - 1; None for a single run.
        count: runs that have it.
    """

    mean: float
    deviation: float | None
    count: int


@dataclass(frozen=True)
class Setting:
    """Runs that differ in nothing but the seed.

    Attributes:
        method: the class of the method; ``"dense"`` where there is none.
        line: the method with what else distinguishes these runs from others of it; settings of one line differ in the
            target alone.
        target: how sparse it was asked to be, such as ``0.9`` or ``"budget 0.5"``; None for dense runs.
        level: the target as a number that methods share; None where it is not a sparsity.
        runs: the runs, by seed.
    """

    method: str
    line: str
    target: float | str | None
    level: float | None
    runs: Sequence[ComparedRun]

    @property
    def name(self) -> str:
        """The line and the target."""
        return self.line if self.target is None else f"{self.line}, {_said(self.target)}"

    def over_seeds(self, key: str) -> Spread | None:
        """Mean and spread of a value; None where no run has it."""
        values = [run.values[key] for run in self.runs if key in run.values]
        return Spread(*mean_and_spread(values), len(values)) if values else None


@dataclass(frozen=True)
class Problem:
    """What is solved: one data set with one model.

    Attributes:
        title: both, in words.
        settings: the settings of it, dense ones first, then by line and target.
        differing: what besides method and target differs among its settings: values by key.
        repeated: lines about runs of one setting and one seed.
    """

    title: str
    settings: Sequence[Setting]
    differing: Mapping[str, Sequence[str]]
    repeated: Sequence[str]


def problems_of(runs: Sequence[ComparedRun]) -> list[Problem]:
    """The runs by problem and setting."""
    found = grouped(runs, _problem_key)
    titles = _titles([members[0] for members in found.values()])
    return [_problem(title, members) for title, members in zip(titles, found.values(), strict=True)]


def _problem(title: str, runs: Sequence[ComparedRun]) -> Problem:
    settings: list[Setting] = []
    for of_method in grouped(runs, lambda run: run.method).values():
        varying = differing_values([line_values(run) for run in of_method])
        settings += [_setting(members, varying) for members in grouped(of_method, _setting_key).values()]
    settings.sort(key=lambda s: (s.method != "dense", s.line, s.level if s.level is not None else 2.0, str(s.target)))
    shared = [{k: v for k, v in setting_values(s.runs[0]).items() if _is_shared(k)} for s in settings]
    return Problem(title, settings, differing_values(shared), [text for s in settings for text in _repeated(s)])


def _setting(runs: Sequence[ComparedRun], varying: Mapping[str, Sequence[str]]) -> Setting:
    first, own = runs[0], line_values(runs[0])
    details = [f"{_short(key)}={_said(own[key])}" for key in sorted(varying) if key in own]
    line = f"{first.method} ({', '.join(details)})" if details else first.method
    target, level = target_of(first)
    return Setting(first.method, line, target, level, sorted(runs, key=_by_seed))


def _by_seed(run: ComparedRun) -> tuple[bool, int, str]:
    # the configurations of other people may hold a seed as text
    return (not isinstance(run.seed, int), run.seed if isinstance(run.seed, int) else 0, str(run.seed))


def _repeated(setting: Setting) -> list[str]:
    by_seed = grouped(setting.runs, lambda run: str(run.seed))
    # a run that is repeated bitwise would make the spread too small
    return [
        f"{setting.name}: seed {seed} has {len(runs)} runs, all of which count"
        for seed, runs in by_seed.items()
        if len(runs) > 1 and seed != "None"
    ]


def grouped(runs: Iterable[ComparedRun], key: Callable[[ComparedRun], str]) -> dict[str, list[ComparedRun]]:
    """Runs by what a function says of them, in the order in which it first says so."""
    found: dict[str, list[ComparedRun]] = {}
    for run in runs:
        found.setdefault(key(run), []).append(run)
    return found


# ---------------------------------------------------------------------- values of the configuration


def setting_values(run: ComparedRun) -> dict[str, Any]:
    """The configuration without seed, paths and what changes nothing in the training."""
    found = {}
    for key, value in run.configuration.items():
        parts = key.split(".")
        if parts[0] in _NOT_SETTINGS or parts[-1] in _NOT_SETTINGS_ANYWHERE:
            continue
        found[key] = PurePath(value).name if parts[-1] in _FILES and isinstance(value, str) else value
    # the root key is the same as the method's own
    if found.get("sparsity") is not None and "method._target_" in found:
        # in a method around another one that one has the argument
        found.pop("method.base.sparsity", None)
        found["method.sparsity"] = found["sparsity"]
    found.pop("sparsity", None)
    return found


def line_values(run: ComparedRun) -> dict[str, Any]:
    """The values of :func:`setting_values` without the targets and what makes the problem."""
    targets = {f"method.{name}" for name in TARGETS}
    return {key: v for key, v in setting_values(run).items() if key not in targets and not _is_of_the_problem(key)}


def target_of(run: ComparedRun) -> tuple[float | str | None, float | None]:
    """How sparse a run was asked to be, and the same as a sparsity."""
    values = setting_values(run)
    if run.method == "dense":
        return None, 0.0
    for name in TARGETS:
        value = _number(values.get(f"method.{name}"))
        if value is not None:
            return (value, value) if name == "sparsity" else (f"{name} {value:g}", None)
    measured = run.values.get("sparsity/total")
    return (None, None) if measured is None else (round(measured, 2), round(measured, 2))


def _number(value: Any) -> float | None:
    """A number, also one that is written as text; None for everything else, such as a schedule."""
    try:
        return None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        return None


def differing_values(configurations: Sequence[Mapping[str, Any]]) -> dict[str, list[str]]:
    """Keys whose values are not the same everywhere, each with its values as text."""
    found = {}
    for key in sorted({key for each in configurations for key in each}):
        values = list(dict.fromkeys(_said(each.get(key)) for each in configurations))
        if len(values) > 1:
            found[key] = values
    return found


def _is_of_the_problem(key: str) -> bool:
    return key.startswith(("data.", "model.")) and key not in _NOT_THE_DATA


def _is_shared(key: str) -> bool:
    return not key.startswith("method.") and not _is_of_the_problem(key)


def _setting_key(run: ComparedRun) -> str:
    return _text(setting_values(run))


def _problem_key(run: ComparedRun) -> str:
    values = {key: value for key, value in setting_values(run).items() if _is_of_the_problem(key)}
    return _text(values) if values else _text(run.layers)


def _titles(firsts: Sequence[ComparedRun]) -> list[str]:
    """A title for each problem; two that would have the same name say what differs."""
    names = [_problem_name(run) for run in firsts]
    titles = []
    for run, name in zip(firsts, names, strict=True):
        alike = [setting_values(other) for other, same in zip(firsts, names, strict=True) if same == name]
        differing = [key for key in differing_values(alike) if _is_of_the_problem(key)]
        said = [f"{key}={_said(setting_values(run).get(key))}" for key in differing]
        titles.append(f"{name} ({', '.join(said)})" if said else name)
    return titles


def _problem_name(run: ComparedRun) -> str:
    values = run.configuration
    if "data._target_" in values or "model._target_" in values:
        parts = [_part_name(values, group) for group in ("data", "model")]
        return ", ".join(part for part in parts if part)
    if not run.layers:
        return "unknown data and model"
    shapes = ", ".join("x".join(map(str, shape)) for shape in run.layers.values() if len(shape) > 1)
    return f"model with weights {shapes}"


def _part_name(values: Mapping[str, Any], group: str) -> str:
    """The name that is given to the function of a group, such as ``mnist``, else that of the function and its file."""
    function = str(values.get(f"{group}._target_", "")).rpartition(".")[2]
    file = values.get(f"{group}.path")
    return str(values.get(f"{group}.name") or (f"{function} {PurePath(str(file)).name}" if file else function))


def _short(key: str) -> str:
    return key.removeprefix("method.")


def _said(value: Any) -> str:
    if value is None:
        return "null"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _text(values: Mapping[str, Any]) -> str:
    return json.dumps(values, sort_keys=True, default=str)
