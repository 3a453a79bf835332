"""Pages of the methods, which are found in the package, and the page that shows all of them."""

import ast
import inspect
import re
from pathlib import Path
from typing import NamedTuple

from site_configuration import CONF, first_comment
from site_configuration import page_of as page_of_group
from site_markdown import heading_anchor
from site_repository import METHODS as INDEX
from site_repository import ROOT

from sparse_callbacks import methods
from sparse_callbacks.core.hooks import Hooks

NAMES = sorted(methods.__all__, key=str.lower)
"""Classes of the public methods."""

_FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
# what a reader of one page wants to see is a section on a method, or on a few; one on all of them says little of each
_FEW = 7


class Mention(NamedTuple):
    """A section of a page that names a method.

    Attributes:
        page: title of the page.
        uri: its file in docs.
        section: heading of the section; empty for the beginning of the page.
    """

    page: str
    uri: str
    section: str


def page_of(name: str) -> str:
    """The page of a method in the site."""
    return f"methods/{name.lower()}.md"


def card(name: str) -> str:
    """The docstring of a method's class."""
    return inspect.getdoc(getattr(methods, name)) or ""


def sentence(name: str) -> str:
    """What a method does, in one sentence: the first of its card, without its name and source."""
    first = " ".join(card(name).split("\n\n")[0].split())
    first = re.sub(r"\s*\([^()]*\d{4}[^()]*\)", "", first)
    first = re.sub(rf"^(?:{name}|[\w\- ]+):\s+", "", first)
    return f"{first[:1].upper()}{first[1:].rstrip('.')}."


def call(name: str) -> str:
    """A call that makes the method: the one in the list of docs/methods.md, or with a sparsity, or that of its card's example."""
    listed = (
        (ROOT / "docs/methods.md")
        .read_text(encoding="utf-8")
        .partition("\n## What each needs\n")[2]
        .partition("\n## ")[0]
    )
    if found := re.search(rf"`({name}\([^`]*\))`", listed):
        return found[1]
    if "sparsity" in inspect.signature(getattr(methods, name)).parameters:
        return f"{name}(sparsity=0.9)"
    return _first_call(card(name).partition("\nExample:\n")[2], name)


def _first_call(text: str, name: str) -> str:
    """The first call of a name in a text, up to the parenthesis that closes it."""
    start = text.index(f"{name}(")
    depth = 0
    for end in range(start, len(text)):
        depth += (text[end] == "(") - (text[end] == ")")
        if text[end] == ")" and not depth:
            return text[start : end + 1]
    raise ValueError(f"the example of {name} has a call without an end: {text[start:]!r}.")


def choices(name: str) -> list[Path]:
    """The files of ``conf/method`` that make a method, the plainest name first."""
    target = re.compile(rf"^_target_: sparse_callbacks\.{name}$", re.MULTILINE)
    found = (path for path in CONF.glob("method/*.yaml") if target.search(path.read_text(encoding="utf-8")))
    return sorted(found, key=lambda path: (path.stem != name.lower(), path.stem))


def only_in_a_trainer() -> set[str]:
    """Methods that a loop of one's own cannot host: their callbacks are of another kind than those of the others."""
    tree = ast.parse((ROOT / "sparse_callbacks/lightning/methods.py").read_text(encoding="utf-8"))
    classes = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    return {node.name for node in classes if "SparsityCallback" not in map(ast.unparse, node.bases)}


def method_pages() -> dict[str, str]:
    """The page of each method, and the one that shows all of them, by their places in the site."""
    found = mentions()
    return {INDEX: _gallery()} | {page_of(name): _page(name, found[name]) for name in NAMES}


def pictures(name: str) -> dict[str, str]:
    """The pictures of a method in the folder of pages, by ``light`` and ``dark``; only those that are there."""
    paths = {scheme: f"images/methods/{name.lower()}_{scheme}.svg" for scheme in ("light", "dark")}
    return {scheme: path for scheme, path in paths.items() if (ROOT / "docs" / path).is_file()}


def _picture(name: str, link: str = "") -> str:
    shown = "".join(
        f"![How the topology of {name} changes over a run](../{path}#only-{scheme})"
        for scheme, path in pictures(name).items()
    )
    return f"[{shown}]({link})" if shown and link else shown


def _gallery() -> str:
    shown = {title: "\n\n".join(map(_in_gallery, names)) for title, names in groups().items()}
    parts = "\n\n".join(
        f'## {title}\n\n<div class="methods" markdown>\n\n{cards}\n\n</div>' for title, cards in shown.items()
    )
    excepted = " and ".join(f"`{name}`" for name in sorted(only_in_a_trainer()))
    return f"""---
title: All methods
hide: [toc]
---

# All methods

Each method is a callback of a Trainer and a choice of `python train.py method=`; all but {excepted} also train in
[a loop of your own](../loops.md). What they share, and what each needs, is in [arguments of methods](../methods.md); what has
been measured is in [results](../results.md).

{parts}
"""


def groups() -> dict[str, list[str]]:
    """Methods by what they start with, as the table of the README says it, and those that its words below call methods of channels."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    starts = dict(re.findall(r"^\| `(\w+)` \| ([^|]+) \|", readme, re.MULTILINE))
    (listed,) = re.findall(r"^(.*) decide about whole channels", readme, re.MULTILINE)
    channels = re.findall(r"`(\w+)`", listed)
    found: dict[str, list[str]] = {"Sparse from the start": [], "Dense at first, or in part": [], "Whole channels": []}
    sparse, dense, whole = found.values()
    for name in NAMES:
        (whole if name in channels else sparse if starts[name] == "sparse" else dense).append(name)
    return found


def _in_gallery(name: str) -> str:
    linked = f"**[{name}]({name.lower()}.md)**{_among_choices(name)}"
    return f"-   {_picture(name, f'{name.lower()}.md')}\n\n    {linked}\n\n    {sentence(name)}"


def _among_choices(name: str) -> str:
    return " · " + ", ".join(f"`{path.stem}`" for path in choices(name)) if choices(name) else ""


def _page(name: str, found: list[Mention]) -> str:
    picture = _picture(name)
    if picture:
        picture += (
            f"\n\nA run on scikit-learn's handwritten digits; `python docs/pictures/methods.py --only {name}` draws it."
        )
    return f"""---
title: {name}
description: {sentence(name).replace(": ", ", ")}
---

# {name} {{ #sparse_callbacks.{name} }}

{sentence(name)}

{picture}

## How to use it

{_uses(name)}

## What it does

::: sparse_callbacks.methods.{name}
    options:
      show_root_heading: false
      show_root_toc_entry: false
      members: false

## Its configuration

{_configuration(name)}

## Where else it is explained

{_elsewhere(found)}
"""


def _uses(name: str) -> str:
    made = call(name)
    used = [name, *(other for other in NAMES if other != name and re.search(rf"\b{other}\(", made))]
    imported = ", ".join(sorted(used, key=lambda word: (not word.isupper(), word)))
    trainer = f"""In a Trainer:

```python
import pytorch_lightning as pl

from sparse_callbacks import {imported}

trainer = pl.Trainer(max_epochs=90, callbacks=[{made}])
trainer.fit(your_module, your_data)
```
"""
    if name in only_in_a_trainer():
        loop = "A loop of your own cannot host it, because it trains several networks in turn.\n"
    else:
        loop = f"In a loop of your own, or in Fabric's ([more](../loops.md)):\n\n{_loop(name, imported)}"
    files = choices(name)
    words = {path: first_comment(path) for path in files}
    width = max((len(path.stem) for path in files), default=0)
    lines = "\n".join(
        f"python train.py method={path.stem}"
        + (f"{' ' * (width - len(path.stem))}  # {words[path]}" if len(files) > 1 else "")
        for path in files
    )
    return f"{trainer}\n{loop}\nOn the [command line](../command_line.md):\n\n```\n{lines}\n```\n"


def _loop(name: str, imported: str) -> str:
    """A block of code for a loop, with what the method asks of it."""
    takes = inspect.signature(getattr(methods, name)).parameters
    head, made, last = [], call(name), ""
    if "loss" in takes and "score" in takes:
        head = [
            "import torch\n",
            f"from sparse_callbacks import sparsify\nfrom sparse_callbacks.methods import {imported}\n\n",
            "def loss_of(module, batch):  # which the scores are made of",
            "    inputs, labels = batch",
            "    return torch.nn.functional.cross_entropy(module(inputs), labels)\n\n",
        ]
        made = f"{made[:-1]}, loss=loss_of)"
    else:
        head = [f"from sparse_callbacks import sparsify\nfrom sparse_callbacks.methods import {imported}\n"]
    if "restart" in takes and takes["restart"].default:
        head.append(
            "\ndef restart():  # optimizers start anew with each phase; make your learning rate schedule again here"
        )
        head.append("    pass\n\n")
        last = ", on_restart=restart"
    lines = [*head, f"run = sparsify({made}, model, optimizer, steps=1000, data=your_data{last})"]
    if getattr(methods, name).batch_start is not Hooks.batch_start:  # what LoopBatches asks
        lines.insert(0, "import torch\n")
        lines += [
            "for inputs, labels in your_data:",
            "    with run.batch():  # inside, the weights hold sampled gates",
            "        torch.nn.functional.cross_entropy(model(inputs), labels).backward()",
            "    optimizer.step()",
            "    optimizer.zero_grad()",
        ]
    return "```python\n" + "\n".join(lines) + "\n```\n"


def _configuration(name: str) -> str:
    parts = []
    for path in choices(name):
        place = path.relative_to(ROOT).as_posix()
        text = path.read_text(encoding="utf-8").rstrip()
        parts.append(f'```yaml title="{place}"\n{text}\n```')
    first, *others = parts
    if others:
        group = page_of_group("method")
        links = ", ".join(f"[`{path.stem}`](../{group}#{path.stem})" for path in choices(name)[1:])
        return f"{first}\n\nThe same keys with other values: {links}."
    return first


def _elsewhere(found: list[Mention]) -> str:
    lines = []
    for uri, page in dict.fromkeys((mention.uri, mention.page) for mention in found):
        sections = [mention.section for mention in found if mention.uri == uri and mention.section]
        links = ", ".join(f"[{section}](../{uri}#{heading_anchor(_plain(section), '-')})" for section in sections)
        lines.append(f"- [{page}](../{uri})" + (f": {links}" if links else ""))
    lines.append("- [What works with what](../compatibility.md): this method with every feature, from runs")
    return "\n".join(lines)


def _plain(heading: str) -> str:
    """The text of a heading, without marks of code and links."""
    return re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")


def mentions() -> dict[str, list[Mention]]:
    """Sections of the pages of docs that are about a method, by its class: those that name it and few others."""
    found: dict[str, list[Mention]] = {name: [] for name in NAMES}
    spoken = {name: re.compile(rf"(?<![\w.])(?:{name})(?!\w)") for name in NAMES}
    for path in sorted((ROOT / "docs").glob("*.md")):
        if path.stem in ("index", "compatibility"):
            continue
        title, sections = _sections(path.read_text(encoding="utf-8"))
        for heading, text in sections:
            named = [name for name, word in spoken.items() if word.search(text)]
            for name in named:
                if len(named) <= _FEW or spoken[name].search(heading):
                    found[name].append(Mention(title, path.name, heading))
    return found


def _sections(markdown: str) -> tuple[str, list[tuple[str, str]]]:
    """The title of a page, and its sections: headings with what stands below them, blocks of code included."""
    title, heading, sections = "", "", dict[str, list[str]]()
    blocks: dict[str, str] = {}

    def hidden(match: re.Match[str]) -> str:
        blocks[key := f"\0{len(blocks)}\0"] = match[0]
        return key

    for line in _FENCE.sub(hidden, markdown).splitlines():
        line = re.sub(r"\0\d+\0", lambda match: blocks[match[0]], line)
        if marked := re.match(r"(#+) (.*)$", line):
            if marked[1] == "#":
                title = marked[2]
            elif len(marked[1]) <= 3:
                heading = marked[2]
        sections.setdefault(heading, []).append(line)
    return title, [(heading, "\n".join(lines)) for heading, lines in sections.items()]
