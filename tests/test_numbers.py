"""Every measured number in README and docs has a source in the repository or a citation, and is what its source says.

What is looked at: numbers with a unit, decimal fractions, and the cells of tables that are numbers; nothing within code. A
number is a setting, and needs no source, where

- its section has it in code, in its heading, or in the head or the first column of a table (as `sparsity=0.9` or 90 %),
- it stands before "zeros", "sparse" or "of the FLOPs", or after a name ("torch 2.14", "version 0.1", "sparsity 0.9"),
- the head of its column says so: default, sparsity, target, ...

Everything else needs a source. In its block, for a table in the one before, or in its section:

- a link to a file under benchmarks/results, or a command that writes one by the table in benchmarks/README.md: the number is
  found in that file, equal after rounding to the digits shown; a cell of a table in the row that has the words of its own
  row and column;
- `python train.py ...`, `python examples/...`, a notebook, or a preset under conf/experiment, which print it;
- `<!-- set in PATH -->`: a limit or default of the code, found in that file.

In its sentence or row: author and year, or a link to another site. Directly behind it: `<!-- 0.31 / 0.69 -->`, how it is
computed; decimal fractions in that are found in the sources.

Not looked at: pages that a benchmark writes whole (by the same table), and what one has written between `<!-- figures: NAME -->`
and `<!-- end -->`, which its own test compares.
"""

import ast
import functools
import itertools
import operator
import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]

NUMBER = r"(?<![\w.,:/^=+\u00d7-])(?<!x )(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e-?\d+)?(?![\w:^/\u00d7]|,?\d|\.\d|-\w)"
JOINED = rf"{NUMBER}(?:(?:,| and| to| or| by| against| of| ±|, and) {NUMBER})*"
TIME = r"ns|µs|ms|s|(?:micro|milli)?seconds?|minutes?|hours?"
MEMORY = r"[kMG]i?B|bytes?"
RATIO = r"times(?=\u00b7* (?:as|the|that|its|what|more|less|fewer|faster|slower|smaller|larger)\b)"
UNIT = rf"(?:%|(?:points?|percent|{RATIO}|{TIME}|{MEMORY}|steps (?:a|per) second)\b)"
WITH_UNIT = re.compile(rf"({JOINED})\s?({UNIT})")
DECIMAL = re.compile(NUMBER)
WORD = "(?:one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve)"
IN_WORDS = re.compile(rf"\b{WORD} to {WORD} (?:points|times)|\b{WORD} (?:percent|{TIME})\b")
IN_FIRST_COLUMN = re.compile(rf"({JOINED})\s?({TIME}|{MEMORY})\b")
CELL = re.compile(rf"(?:\*|\(|\)|[±/,;+\u2212-]|\bto\b|\bn=\d+|\s|{UNIT}|{NUMBER})+")
SETTING_AFTER = re.compile(r"(?:[, ]|and|to|or|\d|\.)*\s?%?\s?(?:zeros|sparse\b|unstructured|of the FLOPs)")
SETTING_BEFORE = re.compile(
    r"(?:\b[A-Z][\w-]*|version|release|torch|below|sparsity|sparsities|density|budgets?|rate|momentum)"
    r"(?: of)? (?:[\d.]+(?:,| and|, and| to| or) )*$"
)
SETTING_HEAD = re.compile(r"default|sparsity|target|budget|density|seed|epochs|unit|published", re.IGNORECASE)
CITATION = re.compile(r"\b[A-Z][\w'-]+(?: et al\.?| and [A-Z][\w'-]+)?,? (?:[A-Z]\w* )?\(?(?:19|20)\d\d\b|https?://")
FILE_NUMBER = re.compile(r"(?<![\w.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?!\w|\.\d)")
MEAN = re.compile(r"(?<=\|)[ \d.]+(?:, [\d.]+)+ (?=\|)")
HIDDEN = re.compile(r"<!--(.*?)-->", re.DOTALL)
FENCE = re.compile(r"^[ ]*```")
GENERATED = re.compile(r"<!-- figures: .*?<!-- end -->", re.DOTALL)


# ---------------------------------------------------------------------- pages


@dataclass
class Block:
    """A paragraph, a list item, a table or a block of code, as it is written."""

    kind: str
    line: int
    lines: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.lines)


@dataclass
class Section:
    """What stands between two headings."""

    heading: str
    blocks: list[Block] = field(default_factory=list)


def sections_of(text: str) -> list[Section]:
    """The sections of a page, with the commands alone of what a benchmark has written between `<!-- figures: NAME -->` and `<!-- end -->`.

    That is what the benchmark's own test compares.
    """
    text = GENERATED.sub(lambda m: "\n".join(line * ("`python " in line) for line in m[0].split("\n")), text)
    found, block, fenced = [Section("")], Block("text", 1), False
    for number, line in enumerate(text.splitlines(), 1):
        bare = line.strip()
        kind = "table" if bare.startswith("|") else "text"
        if FENCE.match(line):
            fenced = not fenced
            if not fenced:
                block.lines.append(line)
            block = Block("code" if fenced else "text", number, [line] if fenced else [])
            found[-1].blocks.append(block)
        elif fenced:
            block.lines.append(line)
        elif re.match(r"#+ ", line):
            found.append(Section(bare))
            block = Block("text", number)
        else:
            if not bare or re.match(r"[-*] |\d+\. |!!! |=== ", bare) or (kind != block.kind) or not block.lines:
                block = Block(kind, number)
                found[-1].blocks.append(block)
            if bare:
                block.lines.append(line)
    for section in found:
        section.blocks = [b for b in section.blocks if b.lines]
    return found


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip())[1:-1]]


def masked(text: str) -> str:
    """The same text without code, targets of links, tags and comments; every character stays in its place."""
    for pattern in (HIDDEN, re.compile(r"`+[^`]+`+"), re.compile(r"(?<=\])\([^()\s]*\)"), re.compile(r"<[^<>\n]+>")):
        text = pattern.sub(lambda match: re.sub(r"[^\n]", "\N{MIDDLE DOT}", match[0]), text)
    return text


# ---------------------------------------------------------------------- sources


@functools.cache
def written_by() -> list[tuple[set[str], str]]:
    """For each command in the table of benchmarks/README.md: its words, and the file that it writes."""
    rows: list[tuple[set[str], str]] = []
    for line in (ROOT / "benchmarks/README.md").read_text().splitlines():
        cells = cells_of(line)
        if line.startswith("| `python benchmarks/") and len(cells) == 3:
            target = re.search(r"results/\w+\.md|docs/\w+\.md", cells[2])
            path = target[0] if target else rows[-1][1] if cells[2] == "the same" else ""
            rows.append((words_of(cells[0]), f"benchmarks/{path}" if path.startswith("results") else path))
    return rows


def words_of(command: str) -> set[str]:
    return set(command.strip("`").split()) - {"FOLDER", "--root", "--data"}


@functools.cache
def numbers_in(path: Path) -> list[float]:
    """The numbers of a file."""
    text = path.read_text()
    if path.suffix != ".md":
        return [as_float(n) for n in re.findall(r"\d[\d_]*(?:\.\d+)?(?:e-?\d+)?", text)]
    return numbers_in_text(text)


def numbers_in_text(text: str) -> list[float]:
    text = masked(text)
    numbers = [as_float(n) for n in FILE_NUMBER.findall(text)]
    # of the figures of each seed in one cell the mean counts too
    for cell in MEAN.findall(text):
        each = [float(n) for n in cell.split(", ")]
        numbers.append(sum(each) / len(each))
    return numbers


def as_float(number: str) -> float:
    return float(number.rstrip(",").replace(",", "").replace("_", ""))


@functools.cache
def numbers_of_files(paths: tuple[Path, ...]) -> list[float]:
    return [value for path in paths for value in numbers_in(path)]


@dataclass
class Sources:
    """What a text names: files that hold its numbers, and what else makes them."""

    files: list[Path] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    others: bool = False

    def __bool__(self) -> bool:
        return bool(self.files or self.missing or self.others)

    def values(self) -> list[float]:
        return numbers_of_files(tuple(self.files))


def sources_of(text: str, page: Path) -> Sources:
    found, named = Sources(), re.findall(r"benchmarks/results/\w+\.md", text)
    for comment in HIDDEN.findall(text):
        named += re.findall(r"^ set in (\S+) $", comment)
    for command in re.findall(r"python benchmarks/[^`\n]+", text):
        fitting = [(len(words), path) for words, path in written_by() if words <= words_of(command)]
        path = max(fitting)[1] if fitting else ""
        if path and ROOT / path != page:
            named.append(path)
        else:
            found.others = True
    found.others |= bool(re.search(r"python (?:train\.py|examples/)|conf/experiment|\w\.ipynb", text))
    for name in dict.fromkeys(named):
        found.files += [ROOT / name] if (ROOT / name).is_file() else []
        found.missing += [] if (ROOT / name).is_file() else [name]
    return found


def is_in(shown: str, unit: str, values: list[float]) -> bool:
    """Whether one of the values is the number that is shown, after rounding to its digits."""
    value = Decimal(shown.replace(",", ""))
    half = 0.5 * 10.0 ** int(value.as_tuple().exponent) * (1 + 1e-6)
    scales = {"%": (1, 100), "points": (1, 100), "MB": (1, 1e-6), "kB": (1, 1e-3)}.get(unit, (1,))
    return any(abs(abs(v) * scale - float(value)) <= half for v in values for scale in scales)


OPERATIONS: dict[type, Callable[[float, float], float]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: operator.pow,
}


def computed(node: ast.expr) -> float:
    """The value of an expression of numbers."""
    if isinstance(node, ast.BinOp):
        return OPERATIONS[type(node.op)](computed(node.left), computed(node.right))
    value = ast.literal_eval(node)
    assert isinstance(value, int | float)
    return value


# ---------------------------------------------------------------------- numbers


@dataclass
class Published:
    """A number of a page that has been measured."""

    shown: str
    unit: str
    line: int
    sentence: str
    formula: str = ""
    row: int = -1
    column: int = -1

    def __str__(self) -> str:
        return f"line {self.line}: {self.shown} {self.unit}".rstrip()


def settings_of(section: Section) -> set[float]:
    """Numbers that a section has in code, in its heading, or in the heads and first columns of its tables."""
    texts = [section.heading]
    for block in section.blocks:
        if block.kind == "code":
            texts.append(block.text)
        elif block.kind == "table":
            texts += [block.lines[0], *(line.strip("| ").split("|")[0] for line in block.lines)]
        texts += re.findall(r"`([^`\n]+)`", block.text)
    found = {float(n) for text in texts for n in re.findall(r"\d+(?:\.\d+)?", text)}
    return found | {round(100 * n, 6) for n in found if n < 1}


def numbers_of(text: str, line: int, settings: set[float], pattern: re.Pattern[str] = WITH_UNIT) -> Iterator[Published]:
    """The measured numbers of a text: those with a unit, and decimal fractions."""
    plain = masked(text)
    seen: set[int] = set()

    def published(start: int, end: int, unit: str, unit_end: int) -> Published:
        before = plain[:start]
        sentence = max(before.rfind(mark) + 1 for mark in (". ", ".\n", "; ")), re.search(r"[.;]\s|$", plain[end:])
        assert sentence[1] is not None
        behind = re.match(r"\s*<!--([^>]*)-->", text[unit_end:])
        formula = behind[1].strip() if behind and re.fullmatch(r"[\d\s.+*/()-]+", behind[1]) else ""
        of_it = text[sentence[0] : end + sentence[1].end()]
        return Published(plain[start:end], unit, line + before.count("\n"), of_it, formula)

    for match in pattern.finditer(plain):
        for number in DECIMAL.finditer(match[1]):
            start, end = match.start() + number.start(), match.start() + number.end()
            seen.add(start)
            is_setting = float(number[0].replace(",", "")) in settings and match[2] == "%"
            if not is_setting and not SETTING_AFTER.match(plain[end:]):
                unit_end = match.end() if end == match.start() + len(match[1]) else end
                yield published(start, end, match[2], unit_end)
    if pattern is not WITH_UNIT:
        return
    for number in DECIMAL.finditer(plain):
        if number.start() not in seen and re.search(r"\.|e-", number[0]):
            before = plain[: number.start()].replace("\n", " ")
            if not SETTING_BEFORE.search(before) and float(number[0].replace(",", "")) not in settings:
                yield published(*number.span(), "", number.end())
    for words in IN_WORDS.finditer(plain):
        yield published(*words.span(), "", words.end())


def numbers_of_table(block: Block, settings: set[float]) -> Iterator[Published]:
    """The same of a table, with their rows and columns; cells that are numbers alone are measured."""
    head = cells_of(block.lines[0])
    for row, line in enumerate(block.lines[2:], 2):
        for column, cell in enumerate(cells_of(line)):
            if column and column < len(head) and SETTING_HEAD.search(head[column]):
                continue
            plain = masked(cell).strip()
            if column and plain and CELL.fullmatch(plain) and DECIMAL.search(plain):
                unit = re.search(UNIT, plain)
                found = [Published(n, unit[0] if unit else "", 0, line) for n in DECIMAL.findall(plain)]
                formula = re.search(r"<!--([\d\s.+*/()-]+)-->", cell)
                found[-1].formula = formula[1].strip() if formula else ""
            else:
                found = list(numbers_of(cell, 0, settings, WITH_UNIT if column else IN_FIRST_COLUMN))
            for number in found:
                number.line, number.row, number.column, number.sentence = block.line + row, row, column, line
                yield number


def faults_of(page: Path) -> list[str]:
    """What is wrong with the numbers of a page."""
    generated = any(ROOT / path == page for _, path in written_by()) or "written by the runs" in page.read_text()[:1000]
    found: list[str] = []
    for section in [] if generated else sections_of(page.read_text()):
        settings = settings_of(section)
        of_section = sources_of("\n\n".join(block.text for block in section.blocks), page)
        for before, block in itertools.pairwise([Block("text", 0), *section.blocks]):
            if block.kind == "code":
                continue
            is_table = block.kind == "table"
            introduced = sources_of(before.text, page) if is_table else Sources()
            sources = sources_of(block.text, page) or introduced or of_section
            numbers = [
                *(numbers_of_table(block, settings) if is_table else numbers_of(block.text, block.line, settings))
            ]
            found += [f"{number}: {fault}" for number in numbers if (fault := fault_of(number, sources))]
            if is_table and sources.files:
                found += faults_of_cells(block, [n for n in numbers if not fault_of(n, sources)], sources)
    return found


def fault_of(number: Published, sources: Sources) -> str:
    values = sources.values()
    if number.formula:
        tree = ast.parse(number.formula, mode="eval").body
        unknown = [n for n in re.findall(r"\d+\.\d+", number.formula) if not is_in(n, "%", values)]
        if unknown:
            return f"{unknown} of <!-- {number.formula} --> is in none of {names(sources)}"
        return "" if is_in(number.shown, "", [computed(tree)]) else f"{number.formula} is {computed(tree):.6g}"
    if CITATION.search(number.sentence):
        return ""
    if not sources:
        return "has no source"
    if sources.missing:
        return f"{sources.missing} is not there"
    if not sources.files or sources.others or not DECIMAL.fullmatch(number.shown):
        return ""
    if is_in(number.shown, number.unit, values):
        return ""
    return f"is not in {names(sources)}"


def names(sources: Sources) -> str:
    return ", ".join(path.name for path in sources.files) or "no file"


@dataclass
class Row:
    """A row of a table in a results file: the words of its cells and of its heading, and its numbers."""

    heading: set[str]
    words: set[str]
    numbers: list[float]
    firsts: list[float]
    """The first number of each cell, behind which spread and quartiles stand; of a list of numbers their mean."""


@functools.cache
def rows_in(path: Path) -> list[Row]:
    found, heading = [], set[str]()
    lines = path.read_text().splitlines()
    for line, following in itertools.pairwise([*lines, ""]):
        if line.startswith("#"):
            heading = words_in(line)
        elif line.startswith("|") and not line.startswith(("|-", "| -")) and not following.startswith(("|-", "| -")):
            cells = cells_of(line)
            texts = [cell for cell in cells if not CELL.fullmatch(masked(cell))]
            each = [(f"| {cell} |", numbers_in_text(f"| {cell} |")) for cell in cells]
            firsts = [numbers[-1 if MEAN.search(cell) else 0] for cell, numbers in each if numbers]
            numbers = [number for _, of_cell in each for number in of_cell]
            found.append(Row(heading, words_in(" ".join(texts)), numbers, firsts))
    return found


def words_in(label: str) -> set[str]:
    """The words and numbers of a label; 50 % is 0.5."""
    label = re.sub(r"(\d+(?:\.\d+)?) ?%", lambda match: f"{float(match[1]) / 100:g}", label.lower())
    return set(re.findall(r"[a-z0-9.]*[a-z0-9]", label)) - {"a", "at", "by", "in", "of", "on", "the", "over", "with"}


def best(rows: list[Row], words: set[str], said: Callable[[Row], set[str]]) -> list[Row]:
    """The rows that share most with some words; a word counts the less, the more labels have it."""
    counts = Counter(word for label in {frozenset(said(row)) for row in rows} for word in label)
    scores = [sum(1 / counts[word] for word in words & said(row)) for row in rows]
    return [row for row, score in zip(rows, scores, strict=True) if score >= max(scores) - 1e-9]


def faults_of_cells(block: Block, numbers: list[Published], sources: Sources) -> Iterator[str]:
    """Numbers of a table that are in a file, but not in the row that has the words of their own row and column."""
    cells = [cells_of(line) for line in block.lines]
    rows = [row for path in sources.files if path.suffix == ".md" for row in rows_in(path)]
    for number in numbers:
        if number.formula or CITATION.search(number.sentence) or not rows:
            continue
        label = words_in(" ".join(c for c in cells[number.row] if not CELL.fullmatch(masked(c) or "-")))
        head = words_in(cells[0][number.column] if number.column < len(cells[0]) else "")
        # first the table, by its heading, and in it the row; where the column says nothing of it, any row
        there = best(rows, label, lambda row: row.heading)
        chosen = best(there, label | head, lambda row: row.words) if any(head & row.words for row in there) else there
        alone = len(DECIMAL.findall(cells[number.row][number.column])) == 1 or "±" in cells[number.row][number.column]
        if not any(is_in(number.shown, number.unit, row.firsts if alone else row.numbers) for row in chosen):
            there_are = "; ".join(", ".join(f"{first:g}" for first in row.firsts) for row in chosen[:3])
            yield f"{number}: is not in the row of {' '.join(sorted(label | head))} of {names(sources)}: {there_are}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_measured_numbers_are_what_their_source_says(page: Path) -> None:
    faults = faults_of(page)
    assert not faults, "\n".join(faults)


# ---------------------------------------------------------------------- the test of the test

SOURCE = "See [figures](../benchmarks/results/update.md)."  # where one RigL update takes 212 ms


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        (f"An update takes 212 ms. {SOURCE}", ""),
        (f"An update takes 213 ms. {SOURCE}", "line 1: 213 ms: is not in update.md"),
        ("An update takes 212 ms.", "line 1: 212 ms: has no source"),
        (f"A section.\n\n## Another\n\nAn update takes 212 ms.\n\n{SOURCE}", ""),
        (f"{SOURCE}\n\n## Another\n\nAn update takes 212 ms.", "line 5: 212 ms: has no source"),
        ("An update takes 212 ms, by `python benchmarks/update.py`.", ""),
        ("An update takes 213 ms, by `python benchmarks/update.py`.", "line 1: 213 ms: is not in update.md"),
        ("It gains 0.7 points, by `python train.py method=rigl`.", ""),
        ("It gains 0.7 points (Evci et al., ICML 2020).", ""),
        ("Evci et al. (2020) say more. It gains 0.7 points.", "line 1: 0.7 points: has no source"),
        (f"It takes 21.3 times<!-- 4530 / 212 --> as long. {SOURCE}", "4530 / 212 is 21.3679"),
        (f"It takes 21.4 times<!-- 4530 / 212 --> as long. {SOURCE}", ""),
        (f"It takes 2.5 times<!-- 2.75 / 1.1 --> as long. {SOURCE}", "is in none of update.md"),
        ("Pages have 300 points<!-- set in sparse_callbacks/reporting/series.py -->.", ""),
        ("Pages have 301 points<!-- set in sparse_callbacks/reporting/series.py -->.", "is not in series.py"),
        ("In a loop with 90 % zeros, at sparsity 0.9, with torch 2.14 and `lr=0.1`, 0.1 is a setting.", ""),
        ("```\npython train.py sparsity=0.8\n```\n\nAt 80 % it ends.", ""),
        (f"{SOURCE}\n\n| | ours |\n| --- | --- |\n| one RigL update | 212 ms |", ""),
        (f"{SOURCE}\n\n| | ours |\n| --- | --- |\n| one global mask | 212 ms |", "is not in the row of global"),
        ("| | steps |\n| --- | --- |\n| RigL | 12 |", "line 3: 12: has no source"),
        ("| argument | default |\n| --- | --- |\n| `drop_fraction` | 0.3 |", ""),
        ("<!-- figures: steps -->\n| a | b |\n| --- | --- |\n| c | 0.3 |\n<!-- end -->\n", ""),
    ],
)
def test_faults_are_found(tmp_path: Path, text: str, fault: str) -> None:
    page = tmp_path / "page.md"
    page.write_text(text)
    found = faults_of(page)
    assert len(found) == bool(fault), found
    assert not fault or fault in found[0]
