"""What README and the pages of docs say is true: their code runs, their commands are understood, their links lead
somewhere."""

import doctest
import functools
import importlib
import importlib.util
import inspect
import io
import json
import pkgutil
import re
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from packaging.requirements import Requirement
from support import documents
from support.documents import (
    FOR_DEVELOPERS,
    PAGES,
    ROOT,
    Block,
    blocks,
    commands,
    inline,
    is_of_commands,
    lines_of,
    save_files,
    saved_files,
    without_blocks,
    words_of,
)
from support.nets import mlp
from torch import nn

import sparse_callbacks
from sparse_callbacks import RigL, methods
from sparse_callbacks.channels.latency import command
from sparse_callbacks.methods.spdy import command as allocate_command
from sparse_callbacks.reporting import comparison_command, report_command
from sparse_callbacks.tasks import build, convert_command

TEXTS = [*PAGES, *FOR_DEVELOPERS, ROOT / "CHANGELOG.md"]
CODE = [*PAGES, *FOR_DEVELOPERS]
every_page = pytest.mark.parametrize("page", CODE, ids=documents.shown)


# ---------------------------------------------------------------------- every block has a check


def kind_of(block: Block) -> str:
    """What a block is, which decides how it is checked; empty where nobody knows."""
    is_text = block.language in ("", "text", "console")
    if block.language in ("python", "yaml", "json", "toml"):
        return block.language
    if is_of_commands(block):
        return "commands"
    if is_text and source_of(block) is not None:
        return "output"
    if is_text and block.text.startswith("RigL: sparsity 0.9\n"):
        return "plan"
    if (is_text or block.language == "mermaid") and re.search(r"--[a-z]*-*>", block.text):
        return "drawing"
    return ""


def source_of(block: Block) -> Block | None:
    """The code or the commands before a block, under the same heading; None where there are none."""
    before = block.follows
    while before is not None and kind_of(before) not in ("python", "commands"):
        before = before.follows
    return before


@every_page
def test_every_block_of_code_has_a_check(page: Path) -> None:
    assert re.findall(r"^ *(?:```|~~~).*", without_blocks(page), re.M) == [], "a fence that does not close"
    checks = {"python", "yaml", "json", "toml", "commands", "output", "plan", "drawing"}
    unknown = [f"{b}: language {b.language!r} of {b.text[:60]!r}" for b in blocks(page) if kind_of(b) not in checks]
    assert unknown == [], "nothing checks these blocks"


def test_a_block_that_nothing_checks_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    for text in (
        "```rust\nfn main() {}\n```\n",
        "```\nsomething else\n```\n",
        "```python\n1\n```\n# Next\n```text\n0.9\n```\n",
    ):
        page.write_text(text)
        assert kind_of(blocks(page)[-1]) == "", text
    page.write_text('1. words\n\n   ```python title="x"\n   print(1)\n   ```\n\n```text\n1\n```\n')
    assert [(kind_of(b), b.line, b.text) for b in blocks(page)] == [
        ("python", 3, "print(1)\n"),
        ("output", 7, "1\n"),
    ]
    assert blocks(page)[0].options == {"title": "x"}


# ---------------------------------------------------------------------- code


@pytest.fixture
def _short(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Trainers are short, and files are written into a folder of the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    documents.shorten_trainers(monkeypatch)


def packages_of(code: str) -> set[str]:
    """Packages that code imports."""
    return set(re.findall(r"^ *(?:from|import) (\w+)", code, re.M))


def required() -> set[str]:
    """Packages of every extra that the tests need, by the names that they are imported by."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    return {
        re.split(r"[^\w-]", line)[0].replace("-", "_")
        for name in ("train", "channels", "onnx", "dev")
        for line in extras[name]
    }


def lacking(block: Block) -> list[str]:
    """Packages that a block imports, that are not installed, and that the tests do not need. Such code is compiled alone."""
    own = {Path(name).stem for name in saved_files(block.page)}
    return [name for name in packages_of(block.text) - required() - own if importlib.util.find_spec(name) is None]


@pytest.mark.parametrize(
    "page", [p for p in CODE if any(b.language == "python" for b in blocks(p))], ids=documents.shown
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.usefixtures("_short")
def test_examples_run_and_print_what_the_page_shows(
    page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_files(page, tmp_path)
    printed: dict[int, str] = {}
    for block in blocks(page):
        if block.language == "python":
            code = compile(block.text, str(block), "exec")
            if not lacking(block):
                exec(code, documents.names_for(block.text))
            printed[block.line] = capsys.readouterr().out
        elif kind_of(block) == "output":
            source = source_of(block)
            assert source is not None
            if source.language == "python" and not lacking(source):
                said = printed[source.line].strip()
                assert f"\n{block.text.strip()}\n" in f"\n{said}\n", f"{block} is not what is printed: {said}"
            elif saved := saved_by(source):
                assert_alike(block, printed[saved.line])


def saved_by(block: Block) -> Block | None:
    """The block that is the script which a block of commands runs; None where it is another."""
    scripts = [words[1] for words in map(words_of, lines_of(block.text)) if words[0] == "python" and len(words) > 1]
    return next((b for b in blocks(block.page) if b.options.get("file") in scripts), None)


def assert_alike(shown: Block, said: str) -> None:
    """What is shown is among the lines that were printed, but for numbers: a training here is shorter than the reader's."""
    lines = {without_numbers(line) for line in said.splitlines()}
    missing = [line for line in shown.text.splitlines() if without_numbers(line) not in lines | {""}]
    assert missing == [], f"{shown} is not what is printed"


def without_numbers(text: str) -> str:
    return re.sub(r"\s+", " ", re.sub(r"-*[\d.,:]+|-{3,}", "0", text)).strip()


def test_a_method_from_outside_passes_the_contract_and_runs_on_the_command_line(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """By the page alone: its files, its pytest command, and train.py with the folder on both paths.

    The whole contract takes a minute and runs with --all-combinations; tests/contract/test_outside.py has one from outside too.
    """
    some = (
        [] if request.config.getoption("--all-combinations") else ["-k", "resume_is_bitwise or weights_are_effective"]
    )
    method, settings, _ = save_files(ROOT / "docs/writing_a_method.md", tmp_path)
    assert sum(bool(line.strip()) for line in f"{method}{settings}".splitlines()) <= 40
    environment = documents.environment(tmp_path)
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
    save_files(next(page for page in PAGES if "method/mine.yaml" in saved_files(page)), tmp_path)
    mine = composed(["method=mine", f"hydra.searchpath=[file://{tmp_path}]"]).method
    assert (mine.distribution, mine.drop_fraction) == ("uniform", 0.1)
    others = {key for key, value in composed(["method=rigl"]).method.items() if mine[key] != value}
    assert others == {"distribution", "drop_fraction"}
    asked = [str(ROOT / "train.py"), "--config-dir", str(tmp_path), "method=mine", "--cfg", "job"]
    done = subprocess.run([sys.executable, *asked], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "drop_fraction: 0.1" in done.stdout, done.stderr[-2000:]


@pytest.mark.parametrize("page", PAGES, ids=documents.shown)
def test_callbacks_within_sentences_can_be_made(page: Path) -> None:
    for code in inline(page):
        if re.match(rf"({'|'.join(methods.__all__)})\(.*\)$", code) and "..." not in code:
            assert isinstance(
                eval(code, {name: getattr(sparse_callbacks, name) for name in (*methods.__all__, "Spdy")}),
                sparse_callbacks.SparsityCallback,
            )


def test_the_plan_that_is_shown_is_the_one_that_is_printed() -> None:
    shown = [b for page in PAGES for b in blocks(page) if kind_of(b) == "plan"]
    assert shown
    net = nn.ModuleDict({"net": mlp(64, 256, 128, 10)})
    for block in shown:
        assert str(RigL(0.9).plan(net)).splitlines() == block.text.splitlines(), block


def test_there_are_examples_and_commands() -> None:
    assert {"README", "loops", "methods", "torch_prune"} <= {
        p.stem for p in PAGES if any(b.language == "python" for b in blocks(p))
    }
    assert {page.stem for page in PAGES if commands(page)} >= {"README", "channels", "results"}


# ---------------------------------------------------------------------- commands


@pytest.mark.parametrize("page", CODE, ids=documents.shown)
def test_every_command_is_understood(page: Path, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    save_files(page, tmp_path)
    for words in commands(page):
        understood(words, page, tmp_path, request.config)


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


def run_here(words: list[str]) -> None:
    """Run a command in this process, in the folder that it is in. A training is one of three epochs, and its page is written by
    the command that does nothing else."""
    if words[1] == "train.py":
        train = importlib.import_module("train")
        given = {word.partition("=")[0] for word in words}
        short = {
            "trainer.max_epochs": "3",
            "logger": "[]",
            "trainer.enable_progress_bar": "false",
            "report": "record",
            "threads": "1",
        }
        sys.argv = [
            str(ROOT / "train.py"),
            *words[2:],
            *(f"{key}={value}" for key, value in short.items() if key not in given),
        ]
        GlobalHydra.instance().clear()
        train.main()
        GlobalHydra.instance().clear()
        return
    importlib.import_module(words[2]).main(words[3:])


def to_run(page: Path) -> list[list[str]]:
    return [words for words in commands(page) if not why_not_run(words)]


@pytest.mark.parametrize(
    "page",
    [p for p in CODE if any("train.py" in " ".join(c) or "allocate" in " ".join(c) for c in commands(p))],
    ids=documents.shown,
)
@pytest.mark.filterwarnings("ignore")
def test_commands_run(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In an empty folder, one after the other: what a command writes is there for those that follow."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [])
    monkeypatch.syspath_prepend(ROOT)
    printed: dict[str, str] = {}
    for words in to_run(page):
        run_here(words)
        said = capsys.readouterr()
        printed[" ".join(words)] = said.out + said.err
    assert len(list(tmp_path.rglob("metrics.json"))) == sum(text.startswith("python train.py") for text in printed)
    for block in blocks(page):
        source = source_of(block) if kind_of(block) == "output" else None
        if source is not None and kind_of(source) == "commands" and saved_by(source) is None:
            assert_alike(block, "".join(printed.get(" ".join(words_of(line)), "") for line in lines_of(source.text)))


def test_commands_that_do_not_run_have_a_reason() -> None:
    reasons = {" ".join(words): why_not_run(words) for page in CODE for words in commands(page)}
    ran = [text for text, reason in reasons.items() if not reason]
    assert len(ran) >= 8, ran
    assert reasons["python train.py method=rigl"] == ""
    assert reasons["python train.py experiment=ctre_madelon data.root=PATH"] == "it names what the reader has"


# ---------------------------------------------------------------------- settings


def flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    for key, value in settings.items():
        yield f"{prefix}{key}"
        if isinstance(value, Mapping) and value:
            yield from flat(value, f"{prefix}{key}.")


class Recipe(yaml.SafeLoader):
    """Reads tags that it does not know, such as the modifiers of SparseML, as mappings with their name."""


Recipe.add_multi_constructor("!", lambda loader, tag, node: {"!": tag, **loader.construct_mapping(node, deep=True)})


def modifiers_in(value: Any) -> Iterator[dict[str, Any]]:
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    for part in inner:
        yield from modifiers_in(part)
    if isinstance(value, dict) and "!" in value:
        yield value


def check_yaml(block: Block, folder: Path) -> None:
    """Settings compose, or have keys that somebody reads."""
    settings = yaml.load(block.text, Recipe)
    if modifiers := list(modifiers_in(settings)):
        text = without_blocks(block.page)
        for modifier in modifiers:
            for key in (modifier["!"], *modifier.keys() - {"!"}):
                assert re.search(rf"`{key}[`=:]", text), f"{block}: the page says nothing of {key}"
        return
    assert isinstance(settings, dict), f"{block} has no keys"
    if "file" in block.options:
        group, _, name = block.options["file"].partition("/")
        config = composed([f"hydra.searchpath=[file://{folder}]", f"{group}={Path(name).stem}"])
        if group == "method":
            assert isinstance(build.build_method(config), sparse_callbacks.SparsityCallback)
        return
    if "program" in settings:  # a sweep of W&B
        known = {key for file in (ROOT / "conf/sweep").glob("*.yaml") for key in yaml.safe_load(file.read_text())}
        assert settings.keys() <= known
        for key, choices in settings["parameters"].items():
            values = choices.get("values", [choices[k] for k in ("value", "min") if k in choices])
            composed([f"{key}={values[0]}"])
        return
    if "_target_" in settings:
        method = OmegaConf.create({k: v for k, v in settings.items() if v is None or "${" not in str(v)})
        target = functools.reduce(getattr, method.pop("_target_").split(".")[1:], sparse_callbacks)
        assert (
            not settings.keys()
            - {"_target_"}
            - inspect.signature(target).parameters.keys()
            - sparse_callbacks.Options.__annotations__.keys()
        )
        return
    choices = [
        f"{group}={name}"
        for group, name in settings.items()
        if isinstance(name, str) and (ROOT / "conf" / group).is_dir()
    ]
    known = set(flat(OmegaConf.to_container(composed(choices), resolve=False)))  # type: ignore[arg-type]
    assert [key for key in flat(settings) if key not in known] == [], f"{block} has keys that train.py does not know"


READ: dict[str, Callable[[str], Any]] = {"json": json.loads, "toml": tomllib.loads}


@pytest.mark.parametrize(
    "page", [p for p in CODE if any(kind_of(b) in ("yaml", *READ) for b in blocks(p))], ids=documents.shown
)
def test_settings_are_read(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    save_files(page, tmp_path)
    for block in blocks(page):
        if block.language == "yaml":
            check_yaml(block, tmp_path)
        elif block.language in READ:
            READ[block.language](block.text)


@pytest.mark.parametrize(
    "text",
    [
        "methods: rigl\n",
        "- 1\n",
        "_target_: sparse_callbacks.RigL\ndropfraction: 0.1\n",
        "- !GMPruningModifier\n  sparsities: 1\n",
    ],
)
def test_settings_that_nobody_reads_are_found(text: str, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"```yaml\n{text}```\n")
    with pytest.raises(AssertionError):
        check_yaml(blocks(page)[0], tmp_path)


# ---------------------------------------------------------------------- drawings


@pytest.mark.parametrize(
    "page", [p for p in CODE if any(kind_of(b) == "drawing" for b in blocks(p))], ids=documents.shown
)
def test_what_is_drawn_is_in_the_package(page: Path) -> None:
    source = "\n".join(path.read_text() for path in (ROOT / "sparse_callbacks").rglob("*.py"))
    for block in blocks(page):
        if kind_of(block) == "drawing":
            names = re.findall(r"(?<![\w.])[A-Z][a-z]+(?:[A-Z]\w*)+|(?<=\s)\.[a-z_]+", block.text)
            assert names
            unknown = [
                n for n in names if not re.search(rf"\bclass {n}\b" if n[0] != "." else rf"\bself\{n}\b", source)
            ]
            assert unknown == [], block


# ---------------------------------------------------------------------- docstrings


def modules_with_examples() -> list[str]:
    package = Path(sparse_callbacks.__file__).parent
    found = []
    for module in pkgutil.walk_packages([str(package)], "sparse_callbacks."):
        file = package.joinpath(*module.name.split(".")[1:])
        text = (file / "__init__.py" if module.ispkg else file.with_suffix(".py")).read_text()
        if re.search(r"^ *>>> ", text, re.M):
            found.append(module.name)
    return found


class Alike(doctest.OutputChecker):
    """Numbers are equal but for their last places, which depend on the processor."""

    def check_output(self, want: str, got: str, optionflags: int) -> bool:
        return super().check_output(rounded(want), rounded(got), optionflags)


def rounded(text: str) -> str:
    return re.sub(r"\d+\.\d{9,}", lambda number: f"{float(number[0]):.8g}", text)


@pytest.mark.parametrize("module", modules_with_examples())
@pytest.mark.filterwarnings("ignore")
def test_examples_in_docstrings_run(module: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    found = importlib.import_module(module)
    runner, said = doctest.DocTestRunner(Alike(), optionflags=doctest.ELLIPSIS), io.StringIO()
    for test in doctest.DocTestFinder().find(found, extraglobs={"torch": torch}):
        runner.run(test, out=said.write)
    assert runner.tries
    assert runner.failures == 0, said.getvalue()


def public_docstrings() -> Iterator[tuple[str, str]]:
    """Every public name, and the public methods of its class, with their docstrings."""
    for name in sparse_callbacks.__all__:
        found = getattr(sparse_callbacks, name)
        yield name, inspect.getdoc(found) or ""
        if inspect.isclass(found):
            for part, value in vars(found).items():
                if not part.startswith("_") and callable(value):
                    yield f"{name}.{part}", inspect.getdoc(value) or ""


@pytest.mark.parametrize(
    ("name", "text"), list(public_docstrings()), ids=lambda value: value if len(value) < 60 else ""
)
def test_code_in_docstrings_is_of_the_kind_that_runs(name: str, text: str) -> None:
    """An example begins with >>>, so that the test above runs it."""
    assert "```" not in text, "nothing runs a block between fences in a docstring"
    for example in re.findall(r"^Examples?:\n(.*?)(?=^\S|\Z)", text, re.M | re.S):
        assert example.strip().startswith(">>> "), example


# ---------------------------------------------------------------------- links


def anchors(text: str) -> set[str]:
    """Anchors that GitHub gives to the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", documents.FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


def links_of(page: Path) -> list[tuple[str, Path, str]]:
    """The links of a page to files of the repository: as they are written, the file, and the anchor in it."""
    found = [link for link in re.findall(r"\]\(([^)\s]+)\)", without_blocks(page)) if not link.startswith("http")]
    parts = [(link, *link.partition("#")[::2]) for link in found]
    return [(link, (page.parent / file).resolve() if file else page, anchor) for link, file, anchor in parts]


@pytest.mark.parametrize("page", TEXTS, ids=documents.shown)
def test_links_lead_somewhere(page: Path) -> None:
    for link, target, anchor in links_of(page):
        assert target.exists(), link
        if anchor and target.suffix == ".md":  # of a picture it is for the style of the site
            assert anchor in anchors(target.read_text()), link


def test_the_readme_leads_to_every_page() -> None:
    """By links of its own, and of the pages that it leads to."""
    reached, waiting = {ROOT / "docs/index.md"}, [ROOT / "README.md"]  # the site begins there
    while waiting:
        page = waiting.pop()
        reached.add(page)
        waiting += [target for _, target, _ in links_of(page) if target in PAGES and target not in reached]
    assert [documents.shown(page) for page in PAGES if page not in reached] == []


def test_the_readme_has_a_row_for_every_method() -> None:
    rows = re.findall(r"^\| `(\w+)` \|", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert sorted(rows) == sorted(methods.__all__)
