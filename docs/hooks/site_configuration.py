"""The configuration reference: a page for each group of ``conf``, and one of the keys at the root."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from site_repository import ROOT

CONF = ROOT / "conf"
FOLDER = "reference/configuration"

_KEY = re.compile(r"^(?P<key>\w+):(?P<value>.*)$")
# shown by --help and used by Hydra itself
_NOT_SHOWN = ("defaults", "hydra")


class Key(NamedTuple):
    """A key at the left margin of a YAML file.

    Attributes:
        name: the key.
        value: what follows the colon; empty where lines below hold it.
        comment: the lines of comments above it, as one line.
    """

    name: str
    value: str
    comment: str


def groups() -> dict[str, list[Path]]:
    """The groups of ``conf`` and the files of their choices, by the name with slashes that Hydra gives them."""
    found: dict[str, list[Path]] = {}
    for path in sorted(CONF.rglob("*.yaml")):
        if path.parent != CONF:
            found.setdefault(path.parent.relative_to(CONF).as_posix(), []).append(path)
    return dict(sorted(found.items()))


def keys(text: str) -> Iterator[Key]:
    """The keys at the left margin of a YAML file, each with the comments right above it."""
    comment: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            comment.append(line.lstrip("# "))
            continue
        if found := _KEY.match(line):
            yield Key(found["key"], found["value"].strip(), " ".join(comment))
        comment = []


def about(path: Path) -> str:
    """The comment that a file begins with, as far as its first line goes on; empty where there is none."""
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# @package"):
            continue
        if not line.startswith("# "):
            break
        if line.startswith("#   ") and lines:  # an example
            break
        lines.append(line.removeprefix("# ").strip())
    return " ".join(lines)


def first_comment(path: Path) -> str:
    """What a choice is, as a table says it: the comment at its head up to a command, or empty."""
    found = about(path)
    keyed = next(iter(keys(path.read_text(encoding="utf-8"))), None)
    # in a file that begins with a key, the comment is that key's
    return found if keyed is None or keyed.name in ("_target_", "defaults") or keyed.comment != found else ""


def page_of(group: str) -> str:
    """The page of a group in the site."""
    return f"{FOLDER}/{group.replace('/', '_')}.md"


def configuration_pages() -> dict[str, str]:
    """The pages of the reference, by their place in the site."""
    pages = {f"{FOLDER}/index.md": _root_page()}
    for group, files in groups().items():
        pages[page_of(group)] = _group_page(group, files)
    return pages


def default_choices() -> dict[str, str]:
    """The choice of each group where nobody chooses, from the list of defaults; ``null`` for none."""
    text = (CONF / "train.yaml").read_text(encoding="utf-8")
    return dict(re.findall(r"^  - (\w+): \[?([\w, ]+)\]?$", text, re.MULTILINE))


def _root_page() -> str:
    text = (CONF / "train.yaml").read_text(encoding="utf-8")
    defaults = default_choices()
    chosen = "\n".join(
        f"| [`{group}`]({page_of(group).rpartition('/')[2]}) | {_default(defaults.get(group))} | "
        f"{', '.join(f'`{path.stem}`' for path in files)} |"
        for group, files in groups().items()
    )
    rows = "\n".join(
        f'| <span id="{key.name}">`{key.name}`</span> | {_shown(key.value)} | {_cell(key.comment)} |'
        for key in keys(text)
        if key.name not in _NOT_SHOWN and key.value
    )
    return f"""# Configuration

Every value of `python train.py` is in a file of `conf`, and every line of it can be given on the command line. A group
is chosen by its name (`method=rigl`), a value of it behind a dot (`method.drop_fraction=0.2`), a key of the root by itself
(`sparsity=0.95`). `python train.py method=rigl --cfg job` prints all values of a run.

These pages are made of the files of `conf`.

## Groups

| group | default | choices |
| --- | --- | --- |
{chosen}

## Keys of the root

| key | default | what it is |
| --- | --- | --- |
{rows}

The values of `method` and `data` that are made of others: `method.seed` and `data.seed` are `seed` unless they are given.
"""


def _default(choice: str | None) -> str:
    return "none" if choice in (None, "null") else f"`{choice}`"


def _shown(value: str) -> str:
    return f"`{value}`" if value else ""


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _group_page(group: str, files: list[Path]) -> str:
    default = default_choices().get(group, "null")
    parts = [f"# {group}\n\n{_how(group, files[0].stem if default == 'null' else default)}\n"]
    for path in files:
        said = first_comment(path)
        text = path.read_text(encoding="utf-8").rstrip()
        place = path.relative_to(ROOT).as_posix()
        sentence = f"{said[:1].upper()}{said[1:]}{'' if said.endswith(('.', ':', '?')) else '.'}\n\n" if said else ""
        parts.append(f'## {path.stem} {{ #{path.stem} }}\n\n{sentence}```yaml title="{place}"\n{text}\n```\n')
    return "\n".join(parts)


def _how(group: str, choice: str) -> str:
    if group == "sweep":
        return f"Files of sweeps by W&B, one for each method: `wandb sweep conf/sweep/{choice}.yaml`."
    if group == "schedule":
        return (
            "The curve of the number that the method moves over the run: `python train.py method=gmp schedule=linear`."
        )
    if group == "logger":
        return "Who records a run, one or several: `python train.py logger=[csv,tensorboard]`; `logger=[]` records nothing."
    if group == "experiment":
        return f"Settings of whole runs: `python train.py experiment={choice}`. Every value in them can be changed on the command line."
    if group == "shrinkbench":
        return "The methods of `python train.py -m experiment=shrinkbench_small`, which chooses among them by itself."
    return f"Chosen by `python train.py {group}={choice}`."
