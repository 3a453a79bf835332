"""HTML pages as tests see them: their ids, headings, texts and addresses, read without a browser."""

from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

EMPTY = {"area", "base", "br", "col", "hr", "img", "input", "link", "meta", "source", "wbr"}
ADDRESSES = ("href", "src", "srcset", "action", "poster", "data", "xlink:href")


class Page(HTMLParser):
    """What a page consists of.

    Attributes:
        source: the whole text.
        ids: every id, in order.
        headings: (level, text) of every heading.
        addresses: what ``href``, ``src`` and the like name.
        texts: all that is read, without the style.
        attributes: (element, its attributes) in order.
        unclosed: elements that are closed in another order than they were opened, or not at all.
    """

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self.ids: list[str] = []
        self.headings: list[tuple[int, str]] = []
        self.addresses: list[str] = []
        self.texts: list[str] = []
        self.attributes: list[tuple[str, dict[str, str | None]]] = []
        self.unclosed: list[str] = []
        self._open: list[str] = []
        self.feed(source)
        self.close()
        self.unclosed += self._open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.attributes.append((tag, given))
        if given.get("id"):
            self.ids.append(str(given["id"]))
        self.addresses += [str(given[name]) for name in ADDRESSES if given.get(name)]
        if tag not in EMPTY:
            self._open.append(tag)
        if tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((int(tag[1]), ""))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in EMPTY:
            self._open.pop()

    def handle_endtag(self, tag: str) -> None:
        if self._open and self._open[-1] == tag:
            self._open.pop()
        else:
            self.unclosed.append(tag)

    def handle_data(self, data: str) -> None:
        if "style" in self._open:
            return
        self.texts.append(data)
        if self._open and self._open[-1] in ("h1", "h2", "h3", "h4"):
            level, text = self.headings[-1]
            self.headings[-1] = (level, text + data)

    @property
    def text(self) -> str:
        """All that is read, with single spaces, and with the signs that keyboards have."""
        return (
            " ".join(" ".join(self.texts).split())
            .replace("\N{MULTIPLICATION SIGN}", "x")
            .replace("\N{MINUS SIGN}", "-")
        )

    def all(self, tag: str) -> list[dict[str, str | None]]:
        """The attributes of every element of a kind."""
        return [given for found, given in self.attributes if found == tag]


def read_page(path: Path) -> Page:
    """The page in a file."""
    return Page(path.read_text(encoding="utf-8"))


def refuse_faults(page: Page) -> None:
    """Fail where a page is not well formed, not accessible, or needs anything but itself."""
    assert page.source.lstrip().startswith("<!doctype html>")
    assert page.unclosed == []
    assert len(page.ids) == len(set(page.ids)), sorted(i for i in page.ids if page.ids.count(i) > 1)
    # one title, and no level is left out on the way down
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels)), page.headings
    assert all(text.strip() for _, text in page.headings)
    # what it refers to lies in itself
    assert all(address.startswith(("#", "data:image/png;base64,")) for address in page.addresses), page.addresses
    assert {a[1:] for a in page.addresses if a.startswith("#")} <= set(page.ids)
    assert "http" not in page.source
    assert "url(" not in page.source.replace("url(#", "")
    assert not page.all("script")
    assert "@import" not in page.source
    # a phone, both colour schemes, and print
    assert any(m.get("name") == "viewport" and "width=device-width" in str(m["content"]) for m in page.all("meta"))
    assert "@media (prefers-color-scheme: dark)" in page.source
    assert "@media print" in page.source
    printed = page.source.partition("@media print")[2]
    # nothing that stays in sight on a screen lies over the lines of a printed table, and no rule behind this one brings it back
    assert "tbody th, thead th:first-child { position: static; background: none;" in printed
    assert "position: sticky" not in printed
    assert page.all("html")[0].get("lang") == "en"
    # drawings are described, cells belong to rows and columns, buttons have names
    assert all(s.get("aria-label") and s.get("role") == "img" for s in page.all("svg"))
    assert all(t.get("scope") in ("row", "col") for t in page.all("th"))
    assert all(t.get("aria-label") for t in page.all("table"))
    assert len(page.all("label")) >= len(page.all("input"))
