"""Pages of the notebooks: their text, code and outputs as they were executed."""

import base64
import json
import posixpath
import re
from collections.abc import Iterator, Mapping
from textwrap import indent
from typing import Any

from site_markdown import for_python_markdown
from site_repository import ROOT, with_links_of_site

FOLDER = ROOT / "notebooks"
INDEX = "notebooks/index.md"

_ENDINGS = {"image/png": "png", "image/gif": "gif", "image/jpeg": "jpg", "image/svg+xml": "svg"}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
# icons of a player's buttons, which another site would have to give
_FETCHED = re.compile(r"<link\b[^>]*>", re.IGNORECASE)


def notebook_pages() -> tuple[dict[str, str], dict[str, bytes]]:
    """The pages of the notebooks, and the pictures in them, each by its place in the site."""
    pages: dict[str, str] = {}
    pictures: dict[str, bytes] = {}
    rows = []
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        uri = f"notebooks/{path.stem}.md"
        parts = [
            part for number, cell in enumerate(notebook["cells"]) for part in _cell(cell, path.stem, number, pictures)
        ]
        pages[uri] = "\n\n".join(parts) + "\n"
        title, words = _beginning(notebook)
        rows.append(f"| [{title or path.stem}]({path.stem}.md) | {words} | `notebooks/{path.name}` |")
    table = "\n".join(rows)
    pages[INDEX] = (
        "# Notebooks\n\nThey run without a download, on two cores, and are shown here as they were executed.\n\n"
        f"| notebook | what it shows | file |\n| --- | --- | --- |\n{table}\n"
    )
    return pages, pictures


def _beginning(notebook: Mapping[str, Any]) -> tuple[str, str]:
    """The title of a notebook, and the first sentence below it."""
    text = "".join(notebook["cells"][0]["source"])
    title = re.search(r"^# (.+)$", text, re.MULTILINE)
    after = text[title.end() :].strip() if title else ""
    first = " ".join(after.split("\n\n")[0].split())
    return (title[1] if title else ""), re.split(r"(?<=[.:])\s", first)[0].replace("|", "\\|")


def _cell(cell: Mapping[str, Any], stem: str, number: int, pictures: dict[str, bytes]) -> Iterator[str]:
    source = "".join(cell["source"]).strip()
    if cell["cell_type"] == "markdown":
        yield for_python_markdown(with_links_of_site(source, f"notebooks/{stem}.ipynb", f"notebooks/{stem}.md"))
        return
    if cell["cell_type"] != "code" or not source:
        return
    code = f"```python\n{source}\n```"
    folded = cell["metadata"].get("jupyter", {}).get("source_hidden", False)
    yield f'??? quote "The code of this cell"\n\n{indent(code, "    ")}' if folded else code
    for count, output in enumerate(cell["outputs"]):
        if output["output_type"] == "stream":
            yield _text("".join(output["text"]))
        elif output["output_type"] in ("display_data", "execute_result"):
            yield from _shown(output["data"], f"{stem}_{number}_{count}", pictures)


def _shown(data: Mapping[str, Any], name: str, pictures: dict[str, bytes]) -> Iterator[str]:
    """The richest form of an output that needs nothing from elsewhere."""
    for kind, ending in _ENDINGS.items():
        if kind in data:
            raw = "".join(data[kind])
            uri = f"notebooks/{name}.{ending}"
            pictures[uri] = raw.encode() if ending == "svg" else base64.b64decode(raw)
            said = "".join(data.get("text/plain", "")).replace("[", "").replace("]", "")
            yield f"![{said if said and not said.startswith('<') else 'What the cell above draws'}]({posixpath.basename(uri)}){{ .drawn }}"
            return
    if "text/html" in data:
        html = re.sub(r"\n\s*\n", "\n", _FETCHED.sub("", "".join(data["text/html"])))
        yield f'<div class="output">\n{html}\n</div>'
    elif "text/markdown" in data:
        yield for_python_markdown("".join(data["text/markdown"]))
    elif "text/plain" in data:
        yield _text("".join(data["text/plain"]))


def _text(text: str) -> str:
    return f"```text\n{_COLOURS.sub('', text).rstrip()}\n```" if text.strip() else ""
