"""The site of the docs: built without a warning, nothing in it comes from elsewhere, and it has every method, choice and public name."""

import importlib
import inspect
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

import pytest
import pytorch_lightning as pl
import torch
from support.documents import image_net
from support.methods import CONFIGS
from torch.utils.data import DataLoader, TensorDataset

import sparse_callbacks
from sparse_callbacks import methods
from sparse_callbacks.testing.networks import Classifier

pytest.importorskip("mkdocs", reason="the extra docs is not installed")

ROOT = Path(__file__).parents[1]
HOOKS = ROOT / "docs/hooks"
# attributes whose target a browser fetches by itself when a page is opened
FETCHED = {
    **dict.fromkeys(("script", "img", "iframe", "source", "video", "audio", "embed"), ("src", "srcset", "poster")),
    "link": ("href",),
    "object": ("data",),
    "image": ("href", "xlink:href"),
    "use": ("href", "xlink:href"),
}


class Page(HTMLParser):
    """What a page of the site holds: ids, links, what it fetches, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.fetched: list[str] = []
        self.text = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value for name, value in attrs if value}
        self.ids.update(given[name] for name in ("id", "name") if name in given and tag != "meta")
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and given.get("rel") in ("prev", "next", "canonical"):  # which are not fetched
            self.links.append(given["href"])
            return
        for name in FETCHED.get(tag, ()):
            if name in given:
                self.fetched.extend(
                    part.split()[0] for part in given[name].split(",") if not given[name].startswith("data:")
                )

    def handle_data(self, data: str) -> None:
        self.text += data


class Site(NamedTuple):
    """A build of the site: its folder, its log, and its pages by their paths in it."""

    folder: Path
    log: str
    code: int
    pages: dict[str, Page]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Site:
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    pages = {path.relative_to(folder).as_posix(): Page(path) for path in sorted(folder.rglob("*.html"))}
    return Site(folder, done.stdout + done.stderr, done.returncode, pages)


@pytest.fixture(scope="module")
def hooks() -> Iterator[Any]:
    """Imports a module of docs/hooks by its name."""
    sys.path.insert(0, str(HOOKS))
    yield importlib.import_module
    sys.path.remove(str(HOOKS))


# ---------------------------------------------------------------------- the whole site


def test_it_is_built_without_a_warning(site: Site) -> None:
    assert site.code == 0, site.log[-4000:]
    assert re.findall(r"^(?:WARNING|ERROR).*$", site.log, re.MULTILINE) == []
    assert "index.html" in site.pages


def test_opening_a_page_fetches_nothing_from_elsewhere(site: Site) -> None:
    elsewhere = re.compile(r"(?:https?:)?//")
    assert {url for page in site.pages.values() for url in page.fetched if elsewhere.match(url)} == set()
    styles = "".join(path.read_text(encoding="utf-8") for path in site.folder.rglob("*.css"))
    assert [url for url in re.findall(r"(?:url\(|@import )[\"']?([^\"')]+)", styles) if elsewhere.match(url)] == []


def test_all_links_and_pictures_lead_to_something_in_the_site(site: Site) -> None:
    missing = set()
    for name, page in site.pages.items():
        if name == "404.html":  # a server shows it in place of any page, so its addresses are absolute
            continue
        for link in (*page.links, *page.fetched):
            if re.match(r"[a-z]+:|//", link):
                continue
            file, _, anchor = unquote(link).partition("#")
            target = (page.path.parent / file).resolve() if file else page.path.resolve()
            other = site.pages.get(target.relative_to(site.folder.resolve()).as_posix()) if target.is_file() else None
            if not target.is_file() or (other and anchor and anchor not in other.ids and not anchor.startswith("__")):
                missing.add((name, link))
    assert sorted(missing) == []


def test_programs_of_the_docs_are_not_pages(site: Site) -> None:
    assert list(site.folder.rglob("*.py")) == []


def test_colours_follow_the_system_and_can_be_chosen(site: Site) -> None:
    page = (site.folder / "index.html").read_text(encoding="utf-8")
    media = re.findall(r'data-md-color-media="([^"]*)"', page)
    assert [m for m in media if m] == [
        "(prefers-color-scheme)",
        "(prefers-color-scheme: light)",
        "(prefers-color-scheme: dark)",
    ]


# ---------------------------------------------------------------------- methods


@pytest.mark.parametrize("name", methods.__all__)
def test_every_method_has_a_page_with_its_card_and_its_configuration(site: Site, name: str) -> None:
    page = site.pages[f"methods/{name.lower()}.html"]
    assert f"sparse_callbacks.{name}" in page.ids
    text = " ".join(page.text.split())
    for word in ("Parameters:", "Raises:", "Examples:", "How to use it", "Its configuration"):
        assert word in text, word
    assert "Differs from the paper:" not in text  # it is a box with that title
    files = [stem for stem, config in CONFIGS.items() if config["_target_"].endswith(f".{name}")]
    assert files
    for stem in files:
        assert f"python train.py method={stem}" in text
    assert any(f"conf/method/{stem}.yaml" in text for stem in files)
    assert any(link.split("#")[0] == f"{name.lower()}.html" for link in site.pages["methods/index.html"].links)
    for scheme in ("light", "dark"):
        if (ROOT / f"docs/images/methods/{name.lower()}_{scheme}.svg").exists():
            assert f"../images/methods/{name.lower()}_{scheme}.svg#only-{scheme}" in page.fetched


@pytest.mark.parametrize("name", methods.__all__)
@pytest.mark.filterwarnings("ignore")
def test_what_the_page_of_a_method_says_runs(
    hooks: Any, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    page = hooks("site_methods").method_pages()[f"methods/{name.lower()}.md"]
    monkeypatch.chdir(tmp_path)
    trainer = pl.Trainer
    quick = {"limit_train_batches": 1, "logger": False, "enable_checkpointing": False}
    quick |= {"enable_model_summary": False, "enable_progress_bar": False}
    monkeypatch.setattr(pl, "Trainer", lambda **given: trainer(**(given | quick), accelerator="cpu"))
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 1 + (name != "ParallelGaP")
    for block in blocks:
        model = Classifier(image_net(16, 32))
        data = DataLoader(TensorDataset(torch.randn(24, 3, 16, 16), torch.randint(0, 4, (24,))), batch_size=4)
        given = {"your_module": model, "your_data": data, "model": model.net if hasattr(model, "net") else model}
        exec(
            compile(block, page[:40], "exec"),
            given | {"optimizer": torch.optim.SGD(given["model"].parameters(), lr=0.01)},
        )


# ---------------------------------------------------------------------- configuration and API


def test_every_choice_and_key_of_the_configuration_is_explained(site: Site) -> None:
    for path in sorted((ROOT / "conf").rglob("*.yaml")):
        lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        if path.parent == ROOT / "conf":
            page = site.pages["reference/configuration/index.html"]
            keys = {line.split(":")[0] for line in lines if re.match(r"\w+: \S", line)} & root_keys()
            assert keys <= page.ids, keys - page.ids
            continue
        group = path.parent.relative_to(ROOT / "conf").as_posix().replace("/", "_")
        page = site.pages[f"reference/configuration/{group}.html"]
        assert path.stem in page.ids
        assert [line for line in lines if line not in page.text] == []


def root_keys() -> set[str]:
    text = (ROOT / "conf/train.yaml").read_text(encoding="utf-8")
    return set(re.findall(r"^(\w+): \S", text, re.MULTILINE))


def public_names() -> list[str]:
    """Public names with the module that users import them from."""
    modules = ("sparse_callbacks.schedules", "sparse_callbacks.distributions", "sparse_callbacks.ops")
    named = {module: importlib.import_module(module.replace("callbacks.", "callbacks.core.")) for module in modules}
    named |= {
        module: importlib.import_module(module) for module in ("sparse_callbacks.testing", "sparse_callbacks.channels")
    }
    found = [f"{module}.{name}" for module, imported in named.items() for name in imported.__all__]
    submodules = {module.rpartition(".")[2] for module in modules}
    top = [f"sparse_callbacks.{name}" for name in sparse_callbacks.__all__ if name not in submodules]
    return [*top, *(name for name in found if name != "sparse_callbacks.channels.channel_groups")]


def test_every_public_name_is_in_the_reference(site: Site) -> None:
    ids = {
        name
        for path, page in site.pages.items()
        if path.startswith(("reference/api/", "methods/"))
        for name in page.ids
    }
    assert [name for name in public_names() if name not in ids] == []


def test_the_reference_has_cards_and_not_names_alone(site: Site) -> None:
    text = " ".join(site.pages["reference/api/loops.html"].text.split())
    assert "Train model sparse in a loop of your own" in text
    assert "optimizer steps of the whole run" in text


# ---------------------------------------------------------------------- what it is made with


def test_links_of_the_repository_lead_into_the_site(hooks: Any) -> None:
    changed = hooks("site_repository").with_links_of_site
    for link, expected in {
        "../README.md#methods": "methods/index.md",
        "../benchmarks/results/zoo.md": "results/zoo.md",
        "../benchmarks/README.md": "results/benchmarks.md",
        "../conf/experiment/my_photos.yaml": "reference/configuration/experiment.md#my_photos",
        "../conf/experiment": "reference/configuration/experiment.md",
        "../examples": "repository/examples/index.md",
        "../examples/dqn.py": "repository/examples/dqn.py.md",
        "../ARCHITECTURE.md": "reference/architecture.md",
        "methods.md#what-is-logged": "methods.md#what-is-logged",
        "../no_such_file.md": "../no_such_file.md",
        "https://semver.org": "https://semver.org",
        "#here": "#here",
    }.items():
        assert changed(f"[x]({link})", "docs/loops.md", "loops.md") == f"[x]({expected})"
    assert changed("[x](guarantees.md)", "docs/migrating/a.md", "migrating/a.md") == "[x](guarantees.md)"
    assert changed("[x](docs/loops.md)", "README.md", "readme.md") == "[x](loops.md)"
    assert (
        changed("[x](../../docs/slimming.md)", "benchmarks/results/zoo.md", "results/zoo.md") == "[x](../slimming.md)"
    )
    code = "`[x](../examples)`\n\n```\n[x](../examples)\n```\n"
    assert changed(code, "docs/loops.md", "loops.md") == code
    picture = '<img src="docs/images/report.png"> <a href="docs/loops.md#a">x</a>'
    assert changed(picture, "README.md", "readme.md") == '<img src="images/report.png"> <a href="loops.html#a">x</a>'


@pytest.mark.parametrize(
    ("written", "read"),
    [
        (
            "1. a\n\n   ```\n   code\n     deeper\n   ```\n\nafter",
            "1. a\n\n    ```\n    code\n      deeper\n    ```\n\nafter",
        ),
        ("- a\n  b\n\n  c\n- d", "- a\n  b\n\n    c\n- d"),
        ("- a\n  - b\n    - c\n- d", "- a\n    - b\n        - c\n- d"),
        ("text\n- a\n- b", "text\n\n- a\n- b"),
        ("<!-- x -->\n| a |\n| --- |", "<!-- x -->\n\n| a |\n| --- |"),
        ("```yaml file=method/mine.yaml\n- a\n  - b\n```", '```yaml title="method/mine.yaml"\n- a\n  - b\n```'),
        ("a\n\n    code\n\nb", "a\n\n    code\n\nb"),
    ],
)
def test_lists_and_blocks_are_those_of_a_code_host(hooks: Any, written: str, read: str) -> None:
    assert hooks("site_markdown").for_python_markdown(written) == read


def test_a_docstring_becomes_markdown(hooks: Any) -> None:
    pytest.importorskip("griffe")
    text = """A: b.

With :class:`~p.C` and :func:`f`::

    x = 1

Differs from the paper: it is. Differs from the released code: there.

Args:
    start, stop: when
        it is.
    other: see.

Example:
    >>> 1
    1

Reference: Somebody. 2020."""
    found = hooks("site_docstrings").as_markdown(text, {"p.C": "q.C"}.get)
    assert (
        found
        == """A: b.

With [`C`][q.C] and `f`:

```text
x = 1
```

!!! note "Differs from the paper"

    It is.

    **Differs from the released code:** there.

Args:
    start: when
        it is.
    stop: see `start`.
    other: see.

Examples:
    >>> 1
    1

!!! quote "Reference"

    Somebody. 2020.
"""
    )


def docstrings() -> Iterator[tuple[str, str]]:
    """Docstrings of public names and of their public members, with their places."""
    for path in public_names():
        module, _, name = path.rpartition(".")
        public = getattr(importlib.import_module(module), name)
        yield path, inspect.getdoc(public) or ""
        for member, value in vars(public).items() if inspect.isclass(public) else ():
            if not member.startswith("_") and (inspect.isroutine(value) or isinstance(value, property)):
                yield f"{path}.{member}", inspect.getdoc(value) or ""


def faults_of(markdown: str) -> list[str]:
    """What a browser would take for HTML outside of code, and marks of reStructuredText within blocks of code."""
    blocks = re.findall(r"^ *```.*?^ *```$", markdown, re.MULTILINE | re.DOTALL)
    words = re.sub(r"^ *```.*?^ *```$|^ *(?:>>>|\.\.\.) .*$", "", markdown, flags=re.MULTILINE | re.DOTALL)
    words = re.sub(r"(`+)[^`].*?\1", "", words, flags=re.DOTALL)
    return [
        *re.findall(r"<[A-Za-z/!].*", words),
        *(line for block in blocks for line in block.splitlines()[1:-1] if "``" in line),
    ]


def test_no_docstring_loses_words_to_html_or_shows_marks_of_another_language(hooks: Any) -> None:
    pytest.importorskip("griffe")
    as_markdown = hooks("site_docstrings").as_markdown
    assert faults_of("beta = <w, S> and `<w>`:\n\n```text\nat ``stop``\n```\n") == [
        "<w, S> and :",
        "at ``stop``",
    ]
    found = {place: faults_of(as_markdown(text, lambda target: None)) for place, text in docstrings()}
    assert len(found) > 150
    assert {place: faults for place, faults in found.items() if faults} == {}


def test_the_gallery_has_every_method_in_one_group(hooks: Any) -> None:
    groups = hooks("site_methods").groups()
    assert sorted(name for names in groups.values() for name in names) == sorted(methods.__all__)
    assert groups["Whole channels"] == ["ChannelPruning", "ConstrainedL0", "SMCP"]
    assert {"RigL", "Static"} <= set(groups["Sparse from the start"])
    assert {"GMP", "GaP"} <= set(groups["Dense at first, or in part"])


def test_cells_of_notebooks_that_are_folded_are_folded_in_the_site(hooks: Any) -> None:
    pages, pictures = hooks("site_notebooks").notebook_pages()
    page = pages["notebooks/03_how_topology_moves.md"]
    before_the_picture = page[: page.index("data:image/gif")]
    shown = [line for line in before_the_picture.splitlines() if not line.startswith("    ")]
    # the picture is in sight after a screen of words and a short cell
    assert '??? quote "The code of this cell"' in shown
    assert before_the_picture.count("    class Recorder(pl.Callback):") == 1
    assert len(shown) < 45
    assert pages["notebooks/01_first_sparse_network.md"].count("???") == 0
    assert pictures


def test_pictures_of_notebooks_can_be_told_from_others_by_their_style(hooks: Any) -> None:
    page = hooks("site_notebooks").notebook_pages()[0]["notebooks/03_how_topology_moves.md"]
    assert len(re.findall(r"\.png\)\{ \.drawn \}", page)) == 2
