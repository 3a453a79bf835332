"""Docstrings of the package as Markdown: an extension of Griffe that mkdocstrings reads the package with."""

import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parent))  # Griffe loads this file by its path
from site_api import homes

Link = Callable[[str], str | None]
"""Gives the anchor of the dotted path in a role, or None where the site does not explain it."""

_ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc|obj):`(?P<short>~?)(?P<target>[^`]+)`")
_CODE = re.compile(r"(^ *```.*?^ *```$)", re.MULTILINE | re.DOTALL)
# an entry of Args that explains several arguments at once
_SHARED = re.compile(r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): (?P<text>.*)$")
_OPEN_NAMES = re.compile(r"^    \*{0,2}\w+(?:, \*{0,2}\w+)*,$")
_PARAGRAPH = r"(?:\A|(?<=\n\n))"
_DIFFERS = re.compile(rf"{_PARAGRAPH}(?P<title>Differs from [^:\n]+):\s(?P<text>(?:\S.*(?:\n|\Z))+)")
_REFERENCE = re.compile(rf"{_PARAGRAPH}(?P<title>References?|Sources?):\s(?P<text>(?:\S.*(?:\n|\Z))+)")
# within such a paragraph
_ALSO = re.compile(r"(?<=[.;)])\s(?P<lead>Differs\sfrom\s[^:.]{3,40}|From\sthe\sreleased\scode):(?=\s)")
_PASSES = re.compile(rf"{_PARAGRAPH}(?P<lead>Passes over the weights in a step:)")


class MarkdownDocstrings(griffe.Extension):
    """Makes the docstrings of a package Markdown when it is loaded."""

    def on_package(self, *, pkg: griffe.Module, **kwargs: Any) -> None:
        explained = homes()
        _rewrite(pkg, pkg, explained)


def _rewrite(obj: Any, package: griffe.Module, explained: dict[str, str]) -> None:
    if obj.docstring is not None:
        obj.docstring.value = as_markdown(
            obj.docstring.value, lambda target: anchor_of(target, obj, package, explained)
        )
    for member in obj.members.values():
        if not member.is_alias:
            _rewrite(member, package, explained)


def anchor_of(target: str, obj: Any, package: griffe.Module, explained: dict[str, str]) -> str | None:
    """The anchor in the site of what a docstring refers to; None: the site does not explain it.

    Args:
        target: the dotted path in the role, or a name of the object's own module or class.
        obj: the object whose docstring it is.
        package: the package.
        explained: anchors of public objects by the path of their definition.
    """
    owners = (obj.path, obj.parent.path if obj.parent is not None else "", obj.module.path)
    for path in (target, *(f"{owner}.{target}" for owner in owners)):
        if path in explained:
            return explained[path]
        if path in explained.values():
            return path
        owner, _, member = path.rpartition(".")
        if owner in explained and not member.startswith("_") and _has_docstring(path, package):
            return path
    return None


def _has_docstring(path: str, package: griffe.Module) -> bool:
    try:
        found = package[path.partition(".")[2]]
    except KeyError:
        return False
    return not found.is_alias and found.docstring is not None


def as_markdown(text: str, anchor: Link) -> str:
    """A docstring in Google's style, with roles and literal blocks of reStructuredText, as Markdown in Google's style.

    Args:
        text: the docstring, without indentation.
        anchor: gives the anchor of what a role names.

    Example:
        >>> print(as_markdown("With :func:`f` and k::\\n\\n    k = 1", lambda target: None))
        With `f` and k:
        <BLANKLINE>
        ```text
        k = 1
        ```
    """
    lines = _with_fences(_with_each_name(text.split("\n")))
    parts = _CODE.split("\n".join(lines))
    return "".join(part if number % 2 else _prose(part, anchor) for number, part in enumerate(parts))


def _prose(text: str, anchor: Link) -> str:
    text = _DIFFERS.sub(lambda found: _admonition("note", found["title"], found["text"]), text)
    text = _REFERENCE.sub(lambda found: _admonition("quote", found["title"], found["text"]), text)
    text = _PASSES.sub(r"**\g<lead>**", text)
    text = re.sub(r"^Example:$", "Examples:", text, flags=re.MULTILINE)
    return _ROLE.sub(lambda found: _linked(found, anchor), text)


def _admonition(kind: str, title: str, text: str) -> str:
    text = _ALSO.sub(r"\n\n**\g<lead>:**", text.strip("\n"))
    if re.match(r"[a-z]{2,}\b", text):  # a word, and not the letter of a formula or a name in code
        text = text[0].upper() + text[1:]
    inner = "\n".join(f"    {line}".rstrip() for line in text.split("\n"))
    return f'!!! {kind} "{title}"\n\n{inner}\n'


def _linked(found: re.Match[str], anchor: Link) -> str:
    target = found["target"]
    shown = f"`{target.rpartition('.')[2] if found['short'] else target}`"
    place = anchor(target)
    return f"[{shown}][{place}]" if place else shown


def _with_each_name(lines: list[str]) -> list[str]:
    """Entries of Args for several arguments become one for each of them."""
    made: list[str] = []
    waiting: list[str] = []  # entries that come behind the one whose text is being read
    in_args = False
    for line in _joined_names(lines):
        if waiting and line and not line.startswith("     "):
            made[_end(made) : _end(made)] = waiting
            waiting = []
        if line and not line.startswith(" "):
            in_args = line in ("Args:", "Attributes:")
        if in_args and (found := _SHARED.match(line)):
            first, *others = found["names"].split(", ")
            see = found["text"] if found["text"].startswith("see ") else f"see `{first}`."
            made.append(f"    {first}: {found['text']}")
            waiting = [f"    {name}: {see}" for name in others]
            continue
        made.append(line)
    made[_end(made) : _end(made)] = waiting
    return made


def _joined_names(lines: list[str]) -> list[str]:
    """With names that go on in a second line in the first one."""
    made: list[str] = []
    for line in lines:
        if made and _OPEN_NAMES.match(made[-1]):
            made[-1] = f"{made[-1]} {line.strip()}"
        else:
            made.append(line)
    return made


def _end(lines: list[str]) -> int:
    """The number of lines without the empty ones at the end."""
    return max((number for number, line in enumerate(lines, 1) if line.strip()), default=0)


def _with_fences(lines: list[str]) -> list[str]:
    """Literal blocks, and examples outside of an Example section, between fences."""
    made: list[str] = []
    number = 0
    while number < len(lines):
        line = lines[number]
        indent = len(line) - len(line.lstrip())
        if line.rstrip().endswith("::") and (block := _block(lines, number + 1, indent)):
            made += [line.rstrip()[:-1], "", *_fenced(block, indent, "text")]
            number += 1 + len(block)
        elif line == "Example:" and (block := _block(lines, number + 1, 0)):
            code = [inner[4:] for inner in block]
            shown = block if any(inner.startswith(">>>") for inner in code) else ["", *_fenced(block, 4, "python")]
            made += ["Example:", *shown]
            number += 1 + len(block)
        elif line.startswith(">>>"):
            end = next((n for n in range(number, len(lines)) if not lines[n].strip()), len(lines))
            made += _fenced(lines[number:end], 0, "pycon")
            number = end
        else:
            made.append(line)
            number += 1
    return made


def _block(lines: list[str], start: int, indent: int) -> list[str]:
    """The lines from ``start`` on that are indented more than ``indent``, with the empty ones around and between."""
    end = start
    while end < len(lines) and (not lines[end].strip() or len(lines[end]) - len(lines[end].lstrip()) > indent):
        end += 1
    return lines[start:end] if any(line.strip() for line in lines[start:end]) else []


def _fenced(block: list[str], indent: int, language: str) -> list[str]:
    text = textwrap.dedent("\n".join(block)).strip("\n").split("\n")
    margin = " " * indent
    return [f"{margin}```{language}", *(f"{margin}{line}".rstrip() for line in text), f"{margin}```", ""]
