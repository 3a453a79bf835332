"""Hooks of MkDocs: pages that are made of the code, and what pages link to beside the folder of pages."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]  # the other modules here, and the package

from site_api import api_pages  # noqa: E402
from site_configuration import configuration_pages  # noqa: E402
from site_markdown import for_python_markdown, heading_anchor  # noqa: E402
from site_methods import method_pages  # noqa: E402
from site_notebooks import notebook_pages  # noqa: E402
from site_repository import ROOT, Brought, brought, with_links_of_site  # noqa: E402

WANTED = (
    "README.md",
    "ARCHITECTURE.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/README.md",
    *(path.relative_to(ROOT).as_posix() for path in sorted((ROOT / "benchmarks/results").glob("*.md"))),
)
"""Files of the repository that the site has whether or not a page links to them."""

_SHORT_CELL = re.compile(r"(<t[dh](?: [^>]*)?>)([^<>]{1,16})(</t[dh]>)")

_sources: dict[str, str] = {}  # of each page that is not in docs, its path in the repository
_generated: dict[str, str] = {}
_pictures: dict[str, bytes] = {}  # of notebooks
_brought: list[Brought] = []


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Make the pages, and put them where the navigation has their folders."""
    _generated.clear()
    _generated.update(method_pages() | configuration_pages() | api_pages())
    notebooks, pictures = notebook_pages()
    _generated.update(notebooks)
    _pictures.clear()
    _pictures.update(pictures)
    _brought[:] = brought(WANTED)
    _sources.clear()
    _sources.update({found.uri: found.path for found in _brought if found.text is not None})
    config.nav = _expanded(config.nav, [*_generated, *_sources])
    # as code hosts make anchors, so that links between pages hold there and here
    config.mdx_configs.setdefault("toc", {})["slugify"] = heading_anchor
    return config


def _expanded(nav: Any, uris: list[str]) -> Any:
    """The navigation with pages in place of entries such as ``methods/*.md``; what it names itself is left out of these."""
    named = set(_strings(nav))

    def walk(entry: Any) -> Any:
        if isinstance(entry, list):
            return [
                one for inner in entry for one in (_matching(inner, uris, named) if _is_glob(inner) else [walk(inner)])
            ]
        return {title: walk(inner) for title, inner in entry.items()} if isinstance(entry, dict) else entry

    return walk(nav)


def _is_glob(entry: Any) -> bool:
    return isinstance(entry, str) and entry.endswith("/*.md")


def _matching(entry: str, uris: list[str], named: set[str]) -> list[str]:
    folder = entry.removesuffix("/*.md")
    found = [uri for uri in uris if uri.rpartition("/")[0] == folder and uri not in named]
    if not found:
        raise ValueError(f"nav has {entry!r}, and no page is made in {folder}/. Mend the entry in mkdocs.yml.")
    return found


def _strings(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    return [text for inner in (nav.values() if isinstance(nav, dict) else nav) for text in _strings(inner)]


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made, and the files that pages link to."""
    for uri, content in (_generated | _pictures).items():
        files.append(File.generated(config, uri, content=content))
    for found in _brought:
        if found.text is not None:
            files.append(File.generated(config, found.uri, content=found.text))
        else:
            files.append(File.generated(config, found.uri, abs_src_path=str(ROOT / found.path)))
    return files


def on_page_markdown(markdown: str, *, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Let links lead to pages of the site, and lists and tables be read as code hosts read them."""
    uri = page.file.src_uri
    if uri in _generated:
        return markdown
    source = _sources.get(uri, f"docs/{uri}")
    return for_python_markdown(with_links_of_site(markdown, source, uri))


def on_page_content(html: str, **_: Any) -> str:
    """Short cells of tables, such as "97.9 %", stay in one line."""
    return _SHORT_CELL.sub(lambda found: found[1] + found[2].replace(" ", "&nbsp;") + found[3], html)
