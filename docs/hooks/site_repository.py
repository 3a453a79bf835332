"""Where files of the repository lie in the site, and links that lead there.

Pages link to files beside them, as a code host shows them: ``../examples/plain_loop.py``, ``../README.md#methods``. The site
has a page or a file for each of them, and its links are made of these when it is built.
"""

import json
import posixpath
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]

PAGES = {
    "README.md": "readme.md",
    "ARCHITECTURE.md": "reference/architecture.md",
    "CHANGELOG.md": "reference/changelog.md",
    "CONTRIBUTING.md": "reference/contributing.md",
    "benchmarks/README.md": "results/benchmarks.md",
    "conf": "reference/configuration/index.md",
    "conf/train.yaml": "reference/configuration/index.md",
    "docs": "index.md",
    "notebooks": "notebooks/index.md",
    "sparse_callbacks": "reference/api/index.md",
    "sparse_callbacks/__init__.py": "reference/api/index.md",
}
"""Pages of files and folders that have a place of their own, by their paths in the repository."""
METHODS = "methods/index.md"
"""The page that stands in the site for README's table of methods."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", ".json": "json", ".sh": "bash", "": "text"}
"""Files that are shown as text, by their endings; others are copied as they are."""

_FENCE = r"^[ ]*(?P<fence>`{3,}|~{3,})[^\n]*\n(?:.*?\n)??[ ]*(?P=fence)[^\n]*$"
_INLINE = r"(?<!`)(?P<ticks>`+)(?!`)(?:(?!\n\n).)+?(?<!`)(?P=ticks)(?!`)"
_LINK = r"(?<=\]\()(?P<link>[^)\s]+)(?=[\s)])"
_TARGETS = re.compile(
    "|".join((_FENCE, _INLINE, _LINK, r"\b(?:src|href|srcset)=\"(?P<attribute>[^\"\s]+)\"")), re.MULTILINE | re.DOTALL
)
_ELSEWHERE = re.compile(r"[a-z][a-z0-9+.-]*:|/|#", re.IGNORECASE)


class Place(NamedTuple):
    """Where something of the repository lies in the site.

    Attributes:
        uri: the page (``.md``) or the file, from the folder of pages.
        anchor: the heading on that page; empty for its top.
    """

    uri: str
    anchor: str = ""


def place_of(path: str, anchor: str = "") -> Place:
    """Where a file or folder of the repository lies in the site, whether or not it exists.

    Args:
        path: from the root of the repository, with slashes.
        anchor: a heading of it; empty for its top.
    """
    if (path, anchor) == ("README.md", "methods"):
        return Place(METHODS)
    if path in PAGES:
        return Place(PAGES[path], anchor)
    folder, _, name = path.rpartition("/")
    stem, ending = posixpath.splitext(name)
    if in_pages(path):
        return Place(path.removeprefix("docs/"), anchor)
    if path.startswith("conf/") and ending == ".yaml":
        return Place(_group_page(folder), anchor or stem)
    if path.startswith("conf/"):
        return Place(_group_page(path), anchor)
    if folder == "notebooks" and ending == ".ipynb":
        return Place(f"notebooks/{stem}.md", anchor)
    if folder == "benchmarks/results" and ending == ".md":
        return Place(f"results/{name}", anchor)
    if ending == ".md":
        return Place(f"repository/{path.lower()}", anchor)
    if (ROOT / path).is_dir():
        return Place(f"repository/{path}/index.md", anchor)
    return Place(f"repository/{path}.md" if ending in LANGUAGES else f"repository/{path}", anchor)


def in_pages(path: str) -> bool:
    """A file is in the folder of pages and goes into the site by itself; programs in that folder do not."""
    return path.startswith("docs/") and posixpath.splitext(path)[1] not in LANGUAGES


def _group_page(folder: str) -> str:
    return f"reference/configuration/{folder.removeprefix('conf/').replace('/', '_')}.md"


def links(markdown: str) -> Iterator[str]:
    """Targets of the links and pictures of a page that lead to files of the repository; code is left out."""
    for found in _TARGETS.finditer(markdown):
        target = found["link"] or found["attribute"]
        if target and not _ELSEWHERE.match(target):
            yield target


def linked_paths(markdown: str, source: str) -> set[str]:
    """Paths in the repository that a page links to.

    Args:
        markdown: its text.
        source: its own path in the repository.
    """
    return {_joined(source, target.partition("#")[0]) for target in links(markdown)}


def _joined(source: str, target: str) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(source), target))


def with_links_of_site(markdown: str, source: str, uri: str) -> str:
    """The text of a page whose links lead to pages and files of the site.

    A link to something that does not exist stays as it is, so that MkDocs warns of it.

    Args:
        markdown: its text, with links as in the repository.
        source: its path in the repository.
        uri: its place in the site.
    """

    def changed(found: re.Match[str]) -> str:
        target = found["link"] or found["attribute"]
        if not target or _ELSEWHERE.match(target):
            return found[0]
        file, _, anchor = target.partition("#")
        path = _joined(source, file)
        if not (ROOT / path).exists():
            return found[0]
        place = place_of(path, anchor)
        there = posixpath.relpath(place.uri, posixpath.dirname(uri) or ".")
        if found["attribute"]:  # MkDocs leaves the addresses in HTML alone
            there = re.sub(r"\.md$", ".html", there)
        return found[0].replace(target, f"{there}#{place.anchor}" if place.anchor else there)

    return _TARGETS.sub(changed, markdown)


class Brought(NamedTuple):
    """A file or folder of the repository that the site has.

    Attributes:
        path: where it is in the repository.
        uri: its place in the site.
        text: the text of its page; None: the file is copied as it is.
    """

    path: str
    uri: str
    text: str | None


def brought(more: Iterable[str]) -> list[Brought]:
    """What the site has beside the pages of docs: what they link to, what that links to, and ``more``.

    Args:
        more: paths that are wanted whether or not a page links to them.
    """
    pages = [path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "docs").rglob("*.md"))]
    waiting, seen = [*pages, *more], set[str]()
    found: list[Brought] = []
    while waiting:
        path = waiting.pop(0)
        if path in seen or not (ROOT / path).exists():
            continue
        seen.add(path)
        has_own = is_made(path)
        text = None if has_own else _page_of(path)
        if text is not None and path.endswith(".md"):
            waiting.extend(sorted(linked_paths(text, path)))
        if not in_pages(path) and not has_own:
            if (ROOT / path).is_dir():
                waiting.extend(_listed(path))
            found.append(Brought(path, place_of(path).uri, text))
    return found


def is_made(path: str) -> bool:
    """The page of a file or folder is made by a module of its own."""
    if path in ("docs", "notebooks", "sparse_callbacks", "sparse_callbacks/__init__.py"):
        return True
    return path.split("/")[0] == "conf" or (path.startswith("notebooks/") and path.endswith(".ipynb"))


def _page_of(path: str) -> str | None:
    """The text of the page of a file or folder; None: it has none."""
    file = ROOT / path
    if file.is_dir():
        rows = "\n".join(
            f"| [`{posixpath.basename(name)}`](/{name}) | {first_words(ROOT / name)} |" for name in _listed(path)
        )
        table = f"| file | what it is |\n| --- | --- |\n{rows}"
        return f"# `{path}`\n\n{_made_relative(table, path)}\n"
    if file.suffix == ".md":
        return file.read_text(encoding="utf-8")
    if file.suffix in LANGUAGES:
        text = file.read_text(encoding="utf-8")
        longest = max(map(len, re.findall(r"`{3,}", text)), default=2)
        fence = "`" * (longest + 1)
        return f"# `{path}`\n\n{fence}{LANGUAGES[file.suffix]}\n{text.rstrip()}\n{fence}\n"
    return None


def _made_relative(text: str, folder: str) -> str:
    """Links from the root of the repository, as a page of ``folder`` would write them."""
    return text.replace(f"](/{folder}/", f"]({posixpath.basename(folder)}/")


def _listed(folder: str) -> list[str]:
    """Files of a folder that are shown, by their paths."""
    files = (
        path for path in sorted((ROOT / folder).iterdir()) if path.is_file() and path.suffix in (*LANGUAGES, ".md")
    )
    return [path.relative_to(ROOT).as_posix() for path in files if not path.name.startswith((".", "_"))]


def first_words(file: Path) -> str:
    """The first sentence or comment of a file, such as the first line of a module's docstring."""
    text = file.read_text(encoding="utf-8")
    if file.suffix == ".ipynb":
        text = "".join(json.loads(text)["cells"][0]["source"])
    for line in text.splitlines():
        words = line.strip().strip("\"'#").strip()
        if words and not line.startswith(("#!", "# @package")):
            return words.replace("|", "\\|")
    return ""
