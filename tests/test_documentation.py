"""What README and the pages of docs say is true: their code runs, their commands are understood, their links lead
somewhere."""

import importlib
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig
from pytorch_lightning.callbacks import ModelCheckpoint
from support.nets import mlp
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import sparse_callbacks
from sparse_callbacks import RigL, Static, methods
from sparse_callbacks.channels.latency import command
from sparse_callbacks.methods.spdy import command as allocate_command
from sparse_callbacks.reporting import comparison_command, report_command
from sparse_callbacks.tasks import build, convert_command
from sparse_callbacks.testing.networks import Classifier

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXTS = [
    *PAGES,
    *(ROOT / f"{name}.md" for name in ("ARCHITECTURE", "CONTRIBUTING", "CHANGELOG")),
    ROOT / "benchmarks/README.md",
]
FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# a block that the reader saves as a file
SAVED = re.compile(r"^```\w+ file=(\S+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)


def fences(page: Path, language: str) -> list[str]:
    return [code for kind, code in FENCE.findall(page.read_text()) if kind == language]


def inline(page: Path) -> list[str]:
    return INLINE.findall(FENCE.sub("", page.read_text()))


def commands(page: Path) -> list[list[str]]:
    """Every command of a page as words: the lines of its blocks, and those within sentences."""
    lines = [line for block in fences(page, "") for line in block.splitlines()]
    lines = [part for line in [*lines, *inline(page)] for part in line.split(" && ")]
    starts = ("python ", "pip ", "pytest", "wandb sweep ")
    return [shlex.split(line, comments=True) for line in lines if line.startswith(starts) and " ... " not in line]


# ---------------------------------------------------------------------- code


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, Any]:
    """What stands in the examples for the reader's own: a small network for images, and three batches."""
    monkeypatch.chdir(tmp_path)
    trainer = pl.Trainer
    short = {"max_epochs": 1, "logger": False, "enable_progress_bar": False}

    def shortened(**options: Any) -> pl.Trainer:
        keeps = any(isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", []))
        return trainer(**(options | short), accelerator="cpu", enable_checkpointing=keeps)

    monkeypatch.setattr(pl, "Trainer", shortened)
    x, y = torch.randn(12, 3, 16, 16), torch.randint(0, 4, (12,))
    module, callback = Classifier(image_net()), Static(0.5)
    pl.Trainer(callbacks=[callback]).fit(module, DataLoader(TensorDataset(x, y), batch_size=4))
    return {
        "your_module": Classifier(image_net()),
        "your_data": DataLoader(TensorDataset(x, y), batch_size=4),
        "your_validation_data": DataLoader(TensorDataset(x, y), batch_size=4),
        "example_input": x,
        "model": module,
        "callback": callback,
        "optimizer": torch.optim.SGD(module.parameters(), lr=0.01),
        "torch": torch,
    }


def image_net() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, 2),
        nn.ReLU(),
        nn.Conv2d(4, 16, 3),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(64, 4),
    )


def save_files(page: Path, folder: Path) -> list[str]:
    """Save what the reader is asked to save; gives the text of each file."""
    found = SAVED.findall(page.read_text())
    for name, text in found:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    return [text for _, text in found]


@every_page
@pytest.mark.filterwarnings("ignore")
def test_examples_run(
    page: Path,
    names: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_files(page, tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for code in fences(page, "python"):
        exec(compile(code, page.name, "exec"), dict(names))


def test_a_method_from_outside_passes_the_contract_and_runs_on_the_command_line(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By the page alone: its files, its pytest command, and train.py with the folder on both paths.

    The whole contract takes a minute and runs with --all-combinations; tests/contract/test_outside.py has one from outside too.
    """
    some = (
        [] if request.config.getoption("--all-combinations") else ["-k", "resume_is_bitwise or weights_are_effective"]
    )
    method, yaml, _ = save_files(ROOT / "docs/writing_a_method.md", tmp_path)
    assert sum(bool(line.strip()) for line in f"{method}{yaml}".splitlines()) <= 40
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    overrides = ["method=acdc", "sparsity=0.95", "logger=csv", "trainer.max_epochs=2", f"hydra.run.dir={tmp_path}/run"]
    for arguments in (
        ["-m", "pytest", "-q", "-p", "no:cacheprovider", *some, str(tmp_path / "test_acdc.py")],
        [str(ROOT / "train.py"), "--config-dir", str(tmp_path), *overrides],
    ):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert "0.949" in done.stdout or "0.95" in done.stdout


def test_a_choice_of_ones_own_has_the_values_of_the_choice_that_it_is_made_of(tmp_path: Path) -> None:
    """By the page alone, in the folder that --config-dir names."""
    save_files(ROOT / "docs/command_line.md", tmp_path)
    mine = composed(["method=mine", f"hydra.searchpath=[file://{tmp_path}]"]).method
    assert (mine.distribution, mine.drop_fraction) == ("uniform", 0.1)
    others = {key for key, value in composed(["method=rigl"]).method.items() if mine[key] != value}
    assert others == {"distribution", "drop_fraction"}
    asked = [str(ROOT / "train.py"), "--config-dir", str(tmp_path), "method=mine", "--cfg", "job"]
    done = subprocess.run([sys.executable, *asked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "drop_fraction: 0.1" in done.stdout, done.stderr[-2000:]


def test_there_are_examples_and_commands() -> None:
    assert [page.stem for page in PAGES if fences(page, "python")] == [
        "README",
        "averaging",
        "channels",
        "comparing",
        "distributed",
        "doctor",
        "guarantees",
        "loops",
        "methods",
        "real_speed",
        "recording",
        "report",
        "sharpness",
        "slimming",
        "start",
        "trainer",
        "wandb",
        "writing_a_method",
        "your_data",
    ]
    assert {page.stem for page in PAGES if commands(page)} >= {"README", "channels", "results"}


@every_page
def test_callbacks_within_sentences_can_be_made(page: Path) -> None:
    for code in inline(page):
        if re.match(rf"({'|'.join(methods.__all__)})\(.*\)$", code):
            assert isinstance(
                eval(code, {name: getattr(sparse_callbacks, name) for name in (*methods.__all__, "Spdy")}),
                sparse_callbacks.SparsityCallback,
            )


def test_the_plan_that_is_shown_is_the_one_that_is_printed() -> None:
    (shown,) = (text for text in fences(ROOT / "docs/methods.md", "") if text.startswith("RigL: "))
    net = nn.ModuleDict({"net": mlp(64, 256, 128, 10)})
    assert str(RigL(0.9).plan(net)).splitlines() == shown.splitlines()


# ---------------------------------------------------------------------- commands


@every_page
def test_commands_are_understood(page: Path, tmp_path: Path) -> None:
    save_files(page, tmp_path)
    for words in commands(page):
        match words:
            case ["python", "train.py", "--help"]:
                pass
            case ["python", "train.py", "--config-dir", "FOLDER", *overrides]:
                understood_by_train([f"hydra.searchpath=[file://{tmp_path}]", *overrides])
            case ["python", "train.py", *overrides]:
                understood_by_train(overrides)
            case ["python", "-m", "sparse_callbacks.latency", *arguments]:
                given = command._parser().parse_args(arguments)
                module, name = given.model.split(":")
                assert callable(getattr(importlib.import_module(module), name))
            case ["python", "-m", "sparse_callbacks.allocate", *arguments]:
                given = allocate_command._parser().parse_args(arguments)
                module, name = given.model.split(":")
                assert callable(getattr(importlib.import_module(module), name))
            case ["python", "-m", "sparse_callbacks.convert", *arguments]:
                assert convert_command._parser().parse_args(arguments).network
            case ["python", "-m", "sparse_callbacks.report", *arguments]:
                assert report_command._parser().parse_args(arguments).runs
            case ["python", "-m", "sparse_callbacks.compare", *arguments]:
                if "RUNS" not in arguments:
                    comparison_command._parser().parse_args(arguments)
            case ["python", script, *arguments]:
                saved = dict(SAVED.findall(page.read_text()))
                source = saved[script] if script in saved else with_imported(ROOT / script)
                assert [word for word in arguments if word.startswith("--") and f'"{word}"' not in source] == []
            case ["pip", "install", *what]:
                extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
                assert set(re.findall(r"\[(.*)\]", what[-1])[0].split(",")) <= extras.keys()
            case ["wandb", "sweep", file]:
                assert (ROOT / file).is_file()
            case ["pytest", *options]:
                saved = [name for name, _ in SAVED.findall(page.read_text())]
                assert options in (["-n", "2", "--dist", "loadscope"], ["-m", "slow"], *([name] for name in saved))
            case _:
                pytest.fail(f"nothing checks the command {' '.join(words)}")


def with_imported(script: Path) -> str:
    """The text of a script and of those beside it that it imports, which may hold its options."""
    text = script.read_text()
    beside = [script.with_name(f"{name}.py") for name in re.findall(r"^from (\w+) import", text, re.MULTILINE)]
    return "\n".join([text, *(path.read_text() for path in beside if path.is_file())])


def understood_by_train(overrides: list[str]) -> None:
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


# ---------------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", TEXTS, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", page.read_text())):
        if link.startswith("http"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target.read_text()), link


def test_the_readme_leads_to_every_page() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in PAGES[1:] if f"(docs/{page.name}" not in readme] == []


def test_the_readme_has_a_row_for_every_method() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(methods.__all__)
