"""The page docs/compatibility.md: its table is written from outcomes, and read back."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from support.methods import CONFIGS, METHODS

from compatibility.cells import DENSE, EXACT, GROUPS, NOT_APPLICABLE, NOT_RUN, REFUSED, Outcome, ordered

PAGE = Path(__file__).parents[2] / "docs/compatibility.md"
Table = Mapping[tuple[str, str], Outcome]
"""Outcomes by the title of a feature and the name of a method."""

SYMBOLS = {EXACT: "✓", REFUSED: "✗", DENSE: "dense", NOT_APPLICABLE: "o", NOT_RUN: "?"}
WORDS = {symbol: word for word, symbol in SYMBOLS.items()}
HEAD = """# What works with what

Every method with every feature: this page is about what is exact, what is refused in words before the first batch, and what has no
meaning. It is written by the runs themselves (CONTRIBUTING says how), one of them for each cell.

| cell | what the run has shown |
| --- | --- |
| ✓ | **exact**, as below |
| ✗ n | **refused** before the first batch, with the words of note n; nothing was changed |
| dense n | trained, and a part of the network **stays dense**, with the warning of note n |
| o n | **not applicable**, for the reason of note n |

**Exact** means: after each step every weight outside of its mask is zero; at the end there are as many zeros as `plan()` announces
(where the method announces a number), everything is finite, and masks have moved where the method moves them. In rows marked R a run that
goes on from a checkpoint ends bitwise where one ends that never stopped. In rows of several processes masks and weights are the same
on all ranks after each step.

{times}
"""
RESUMED = ("precision", "loops", "checkpoints")
NOT_RESUMED = (
    "16-mixed, with skipped steps",
    "a second fit",
    "a loop by hand",
    "Fabric",
    "on an exception",
    "weights only",
)
TIMES = """Unequal numbers of training batches break DistributedDataParallel itself, which waits for ever for the rank that is done;
unequal sizes of batches do not."""


def class_name(name: str) -> str:
    """The class of a method."""
    return str(CONFIGS[name]["_target_"]).rpartition(".")[2]


def column(name: str) -> str:
    """The heading of a method's column: its class, with the method's own name where others have the same class."""
    alone = [class_name(other) for other in METHODS].count(class_name(name)) == 1
    return class_name(name) if alone else f"{class_name(name)}, {name}"


def written(table: Table) -> str:
    """The text of the page."""
    notes: dict[str, int] = {}
    lines = [HEAD.format(times=TIMES)]
    for group in GROUPS:
        lines.append(f"\n## {group.capitalize()}\n")
        lines.append("| | " + " | ".join(map(column, METHODS)) + " |")
        lines.append("| --- |" + " :-: |" * len(METHODS))
        for title, row in ordered().items():
            if row.group == group:
                cells = [_cell(table.get((title, name), Outcome(NOT_RUN)), notes) for name in METHODS]
                mark = " (R)" if group in RESUMED and title not in NOT_RESUMED else ""
                lines.append(f"| {title}{mark} | " + " | ".join(cells) + " |")
    lines.append("\n## Notes\n")
    lines += [f"{number}. {note}" for note, number in notes.items()]
    return "\n".join(lines) + "\n"


def _cell(outcome: Outcome, notes: dict[str, int]) -> str:
    symbol = SYMBOLS[outcome.word]
    return f"{symbol} {notes.setdefault(_generic(outcome.note), len(notes) + 1)}" if outcome.note else symbol


def _generic(note: str) -> str:
    """A note without the method's name where it begins with it, so that all methods share it; long lists are cut."""
    names = "|".join(sorted({class_name(name) for name in METHODS}, key=len, reverse=True))
    text = re.sub(rf"^(?:{names}) (leaves|trains|counts)\b", r"It \1", note.replace("|", "\\|"))
    return text if len(text) <= 400 else text[:400].rpartition(" ")[0] + " ..."


def read(text: str) -> dict[tuple[str, str], Outcome]:
    """The table of a page."""
    notes = dict(re.findall(r"^(\d+)\. (.*)$", text, re.MULTILINE))
    found, columns = {}, []
    for line in text.splitlines():
        cells = [c.strip() for c in line.strip("|").split(" | ")] if line.startswith("| ") else []
        if len(cells) != len(METHODS) + 1:
            continue
        if not WORDS.keys() & {c.split(" ")[0] for c in cells[1:]}:
            columns = cells[1:] if cells[1] != ":-:" else columns
            continue
        for name, cell in zip(columns, cells[1:], strict=True):
            symbol, _, number = cell.partition(" ")
            found[cells[0].removesuffix(" (R)"), name] = Outcome(WORDS[symbol], notes[number] if number else "")
    return found


def rows(table: Table) -> list[str]:
    """Titles of a table in their order."""
    return list(dict.fromkeys(title for title, _ in table))


def by_name(table: Table) -> dict[tuple[str, str], Outcome]:
    """A table that was read, by the names of methods in place of the headings of columns."""
    names: Iterable[tuple[str, str]] = ((column(name), name) for name in METHODS)
    headed = dict(names)
    return {(title, headed[heading]): outcome for (title, heading), outcome in table.items()}
