"""Commands that pages show: what their programs say to them, which of them run in the tests, and running those."""

import functools
import importlib
import importlib.util
import re
import subprocess
import sys
import tomllib
import warnings
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from packaging.requirements import Requirement

import sparse_callbacks
from sparse_callbacks.channels.latency import command
from sparse_callbacks.methods.spdy import command as allocate_command
from sparse_callbacks.reporting import comparison_command, report_command
from sparse_callbacks.tasks import build, convert_command
from support import documents
from support.documents import ROOT, Block, commands, saved_files


def understood(words: list[str], page: Path, folder: Path, config: pytest.Config) -> None:
    """Let the program that a command is for read its words."""
    match words:
        case ["python", "train.py", "--help"]:
            pass
        case ["python", "train.py", "--config-dir", "FOLDER", *overrides]:
            understood_by_train([f"hydra.searchpath=[file://{folder}]", *overrides])
        case ["python", "train.py", *overrides]:
            understood_by_train(overrides)
        case ["python", "-m", module]:  # what it takes is not shown
            assert is_module(module), module
        case ["python", "-m", "sparse_callbacks.latency", *arguments]:
            given = command._parser().parse_args(arguments)
            assert callable(named(given.model))
        case ["python", "-m", "sparse_callbacks.allocate", *arguments]:
            given = allocate_command._parser().parse_args(arguments)
            assert callable(named(given.model))
        case ["python", "-m", "sparse_callbacks.convert", *arguments]:
            assert convert_command._parser().parse_args(arguments).network
        case ["python", "-m", "sparse_callbacks.report", *arguments]:
            assert report_command._parser().parse_args(arguments).runs
        case ["python", "-m", "sparse_callbacks.compare", *arguments]:
            if "RUNS" not in arguments:
                comparison_command._parser().parse_args(arguments)
        case ["pytest", *options] | ["python", "-m", "pytest", *options]:
            given = config._parser.parse(options)  # with the options of this suite and of its plugins
            files = [name.partition("::")[0] for name in given.file_or_dir]
            assert [name for name in files if name not in saved_files(page) and not (ROOT / name).exists()] == []
        case ["python", "-m", module, *arguments]:
            options_known([sys.executable, "-m", module], arguments)
        case ["python", script, *arguments]:
            saved = saved_files(page)
            source = saved[script] if script in saved else with_imported(ROOT / script)
            assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in source] == []
        case [interpreter, *arguments] if interpreter.endswith(
            "/bin/python"
        ):  # of an environment that the page has made
            understood(["python", *arguments], page, folder, config)
        case ["torchrun", *arguments]:
            launcher = importlib.import_module("torch.distributed.run").get_args_parser()
            given = launcher.parse_args(arguments)
            understood(["python", given.training_script, *given.training_script_args], page, folder, config)
        case ["srun", *rest]:
            understood(rest, page, folder, config)
        case ["pip", "install", *what] | ["uv", "pip", "install", *what]:
            requirements_known(what)
        case ["uv", "venv", _]:
            pass
        case ["wandb", "sweep", file]:
            assert (ROOT / file).is_file()
        case ["wandb", subcommand, *_]:
            assert subcommand in importlib.import_module("wandb.cli.cli").cli.commands
        case ["cd", _]:
            pass
        case ["git", subcommand, *arguments]:
            known = subprocess.run(["git", subcommand, "-h"], capture_output=True, text=True, check=False).stdout
            assert known
            options = re.findall(r"(?<!\S)--?[\w-]+", known.replace("--[no-]", "--").replace(",", " "))
            assert [word for word in arguments if word.startswith("-") and word not in options] == [], known
        case ["twine" | "ruff" | "mypy" | "jupytext" | "mkdocs", *arguments]:
            options_known([sys.executable, "-m", words[0]], arguments)
        case [script, *_] if script.startswith(".ci/"):
            assert (ROOT / script).stat().st_mode & 0o100
        case _:
            pytest.fail(f"nothing checks the command {' '.join(words)}")


def named(text: str) -> Any:
    module, _, name = text.partition(":")
    return getattr(importlib.import_module(module), name)


def requirements_known(words: list[str]) -> None:
    """What is to be installed are requirements, and extras of this package exist."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    what = [
        word
        for option, word in zip(["", *words], words, strict=False)
        if option not in ("--index-url", "--extra-index-url", "--python")
    ]
    for text in (word for word in what if not word.startswith("-")):
        local = text.startswith(".")
        requirement = Requirement(f"sparse-callbacks{text[1:]}" if local else text)
        if requirement.name == "sparse-callbacks":
            assert requirement.extras <= extras.keys(), text


@functools.cache
def help_of(*words: str) -> str:
    done = subprocess.run(
        [*words, "--help"],
        cwd=ROOT,
        env=documents.environment(ROOT / "tests"),
        capture_output=True,
        text=True,
        check=False,
    )
    return done.stdout + done.stderr


def options_known(program: list[str], arguments: list[str]) -> None:
    """The options of a command stand in the help of its program, or in that of its subcommand."""
    assert is_module(program[-1]), program
    if asked := [word for word in arguments if word.startswith("-")]:
        subcommand = arguments[:1] if not arguments[0].startswith("-") else []
        known = help_of(*program, *subcommand)
        assert [word for word in asked if word not in known] == [], known[-500:]


def is_module(name: str) -> bool:
    """Whether Python finds a module, also with the folder of the tests on its path."""
    file = ROOT / "tests" / Path(*name.split("."))
    return file.with_suffix(".py").is_file() or importlib.util.find_spec(name) is not None


def with_imported(script: Path) -> str:
    """The text of a script and of those beside it that it imports, which may hold its options."""
    text = script.read_text()
    beside = [script.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
    return "\n".join([text, *(path.read_text() for path in beside if path.is_file())])


def understood_by_train(overrides: list[str]) -> None:
    if [o for o in overrides if o.startswith("hydra.searchpath")]:
        read_by_train.__wrapped__(*overrides)  # of the folder of one test
    else:
        read_by_train(*overrides)


@functools.cache
def read_by_train(*overrides: str) -> None:
    """Every run of the command has a configuration, whose method can be made."""
    # plugins of Hydra choose how jobs are launched and swept; a composition without them is the same job
    swept = [o for o in overrides if not re.match(r"-m$|hydra/|hydra[.](?!searchpath)", o)] + ["hydra/launcher=basic"]
    for choice in range(4 if "-m" in overrides else 1):
        config = composed([picked(o, choice) for o in swept])
        method = build.build_method(config)
        assert isinstance(method, sparse_callbacks.SparsityCallback) or "_target_" not in config.method


def picked(override: str, choice: int) -> str:
    """One of an override's values in a sweep; the only one where there is no sweep."""
    parsed = OverridesParser.create().parse_override(override)
    if not parsed.is_sweep_override():
        return override
    if parsed.is_interval_sweep():
        return f"{parsed.key_or_group}={parsed.value().start}"
    values = list(parsed.sweep_string_iterator())
    return f"{parsed.key_or_group}={values[choice % len(values)]}"


def composed(overrides: list[str]) -> DictConfig:
    with initialize_config_dir(str(ROOT / "conf"), version_base=None):
        return compose("train", overrides)


# ---------------------------------------------------------------------- commands that run


def why_not_run(words: list[str]) -> str:
    """Why a command is read and not run here; empty for one that runs: it needs what the repository has, and seconds."""
    if words[:2] != ["python", "train.py"] and words[:2] != ["python", "-m"]:
        return "it installs, publishes, starts other processes, or is a script that has tests of its own"
    arguments = words[2:]
    if any(re.search(r"(?<![A-Za-z_.])[A-Z]{3,}(?![A-Za-z_])", word) for word in arguments):
        return "it names what the reader has"
    if words[1] == "train.py":
        if "-m" in arguments:
            return "it is several runs"
        if any(
            word.startswith(("trainer=", "data.", "initial_weights=", "ckpt_path=")) or "pretrained" in word
            for word in arguments
        ):
            return "it needs another machine, other data or other weights"
        if arguments == ["--help"]:
            return "it trains nothing"
        return (
            "" if str(composed(without_hydra(arguments)).data._target_).endswith(".digits") else "it needs other data"
        )
    module, *arguments = arguments
    if not arguments:
        return "what it takes is not shown"
    if module == "sparse_callbacks.allocate" and "--measure" not in arguments:
        return ""
    if module == "sparse_callbacks.report":
        return ""
    return "it measures times, or reads what a longer run has left"


def without_hydra(overrides: list[str]) -> list[str]:
    return [o for o in overrides if not o.startswith("hydra.")]


def run_here(words: list[str], as_shown: bool = False) -> str:
    """Run a command in this process, in the folder that it is in; gives the warnings that it makes.

    Args:
        words: the command. A training is one of three epochs.
        as_shown: whether a page shows what it prints: with loggers and the page of the run, which otherwise takes time for nothing.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if words[1] != "train.py":
            importlib.import_module(words[2]).main(words[3:])
            return ""
        train = importlib.import_module("train")
        given = {word.partition("=")[0] for word in words}
        short = {"trainer.max_epochs": "3", "trainer.enable_progress_bar": "false", "threads": "1"}
        short |= {} if as_shown else {"logger": "[]", "report": "record"}
        options = [f"{key}={value}" for key, value in short.items() if key not in given]
        sys.argv = [str(ROOT / "train.py"), *words[2:], *options]
        GlobalHydra.instance().clear()
        try:
            train.main()
        finally:
            GlobalHydra.instance().clear()
    return "\n".join(str(warning.message) for warning in caught)


def to_run(page: Path) -> list[list[str]]:
    """The commands of a page that run, in order. A report is written of runs that commands before it have made."""
    found, folders = list[list[str]](), set[str]()
    for words in commands(page):
        runs = (
            [word for word in words[3:] if not word.startswith("-")]
            if words[1:3] == ["-m", "sparse_callbacks.report"]
            else []
        )
        if not why_not_run(words) and folders.issuperset(runs):
            found.append(words)
            folders |= {word.removeprefix("hydra.run.dir=") for word in words if word.startswith("hydra.run.dir=")}
    return found


def assert_alike(shown: Block, said: str) -> None:
    """Each paragraph that is shown is printed, but for numbers and breaks of lines: a training here is shorter than the reader's."""
    missing = [part for part in shown.text.split("\n\n") if without_numbers(part) not in without_numbers(said)]
    assert missing == [], f"{shown} is not what is printed: {said}"


def without_numbers(text: str) -> str:
    """Text in which one word that has a digit is like another, and one rule of a table as long as another."""
    return re.sub(r"\s+", " ", re.sub(r"\S*\d\S*|(?<=\s)-+(?=\s)", "0", re.sub("─+", "─", text))).strip()
