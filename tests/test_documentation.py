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
from omegaconf import OmegaConf
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
from support.shell_commands import assert_alike, composed, run_here, to_run, understood, why_not_run
from torch import nn

import sparse_callbacks
from sparse_callbacks import RigL, methods
from sparse_callbacks.tasks import build

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


# ---------------------------------------------------------------------- commands that run


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
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))  # no login of this machine reaches W&B
    shown = {b: source for b in blocks(page) if kind_of(b) == "output" and (source := source_of(b)) is not None}
    shown = {b: source for b, source in shown.items() if kind_of(source) == "commands" and saved_by(source) is None}
    printed: dict[str, str] = {}
    for words in to_run(page):
        warned = run_here(words, as_shown=any(words in map(words_of, lines_of(s.text)) for s in shown.values()))
        streams = capsys.readouterr()
        printed[" ".join(words)] = "\n".join([warned, streams.out, streams.err])
    assert len(list(tmp_path.rglob("metrics.json"))) == sum(text.startswith("python train.py") for text in printed)
    for block, source in shown.items():
        said = "".join(printed.get(" ".join(words_of(line)), "") for line in lines_of(source.text))
        if said:  # of commands that do not run here the reason is in `why_not_run`
            assert_alike(block, said)


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


@pytest.mark.parametrize("page", TEXTS, ids=documents.shown)
def test_rows_of_tables_have_as_many_cells_as_their_head(page: Path) -> None:
    """A bar within a cell, as of |w|, ends the cell, and what stands behind the last column is not shown."""
    wide, wrong = None, []
    for line in without_blocks(page).splitlines():
        if not line.startswith("|"):
            wide = None
            continue
        cells = len(re.split(r"(?<!\\)\|", line.strip().removeprefix("|").removesuffix("|")))
        wide = wide or cells
        if cells != wide:
            wrong.append(line)
    assert wrong == []


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


def test_the_page_of_wandb_names_every_sweep() -> None:
    page = (ROOT / "docs/wandb.md").read_text()
    sweeps = [path.stem for path in (ROOT / "conf/sweep").glob("*.yaml")]
    assert [name for name in sweeps if f"`{name}`" not in page and f"conf/sweep/{name}.yaml" not in page] == []
