"""Pages of the documentation, the blocks of code in them, and what stands in their examples for the reader's own."""

import os
import re
import shlex
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import Static
from sparse_callbacks.testing.networks import Classifier

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# pages whose code is checked too, and which the README need not lead to
FOR_DEVELOPERS = [ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "benchmarks/README.md")]
FENCE = re.compile(
    r"^(?P<indent> *)(?P<fence>`{3,}|~{3,})(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)(?P=fence) *$", re.M | re.S
)
INLINE = re.compile(r"(?<!`)`([^`\n]+)`(?!`)")
SNIPPET = re.compile(r'^ *--8<-- "([^"]+)"$', re.M)
LONGEST = 3
"""Epochs that a Trainer in an example trains at most; one that asks for more trains a single one."""


def shown(page: Path) -> str:
    return str(page.relative_to(ROOT) if page.is_relative_to(ROOT) else page.name)


@dataclass(frozen=True, eq=False)
class Block:
    """A block of code between fences.

    Attributes:
        page: the page.
        line: the line of its first fence.
        language: the word behind the fence; empty where there is none.
        options: what else is there: ``file=`` of a block that the reader saves, ``title=``.
        text: the code, without the indentation of its fence.
        follows: the block before it under the same heading; None where it is the first one there.
    """

    page: Path
    line: int
    language: str
    options: Mapping[str, str]
    text: str
    follows: "Block | None"

    def __str__(self) -> str:
        return f"{shown(self.page)}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """Every block of a page, in order."""
    text, found, end = page.read_text(), list[Block](), 0
    for match in FENCE.finditer(text):
        language, _, rest = match["info"].strip().partition(" ")
        options = dict(word.partition("=")[::2] for word in shlex.split(rest) if "=" in word)
        code = SNIPPET.sub(lambda m: (ROOT / m[1]).read_text(), textwrap.dedent(match["text"]))
        same = found and not re.search(r"^#+ ", text[end : match.start()], re.MULTILINE)
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(page, line, language, options, code, found[-1] if same else None))
        end = match.end()
    return found


def without_blocks(page: Path) -> str:
    return FENCE.sub("", page.read_text())


def inline(page: Path) -> list[str]:
    """What stands between single backticks within sentences."""
    return INLINE.findall(without_blocks(page))


def saved_files(page: Path) -> dict[str, str]:
    """The files that the reader of a page is asked to save, by name."""
    return {block.options["file"]: block.text for block in blocks(page) if "file" in block.options}


def save_files(page: Path, folder: Path) -> list[str]:
    """Save what the reader is asked to save; gives the text of each file."""
    for name, text in saved_files(page).items():
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(text)
    return list(saved_files(page).values())


# ---------------------------------------------------------------------- commands

PROGRAMS = (
    "python",
    "pip",
    "pytest",
    "wandb",
    "torchrun",
    "srun",
    "uv",
    "git",
    "twine",
    "ruff",
    "mypy",
    "mkdocs",
    "jupytext",
    "cd",
)
VARIABLE = re.compile(r"[A-Z_]+=\S*")


def is_command(line: str) -> bool:
    """Whether a line begins with a program, behind variables of its environment."""
    words = [word for word in line.split() if not VARIABLE.fullmatch(word)]
    return bool(words) and (Path(words[0]).name in PROGRAMS or words[0].startswith(".ci/"))


def lines_of(text: str) -> Iterator[str]:
    """The commands of a block, without comments; one that goes on in the next line is one."""
    for line in text.replace("\\\n", " ").splitlines():
        for part in line.removeprefix("$ ").split(" && "):
            if shlex.split(part, comments=True):
                yield part


def is_of_commands(block: Block) -> bool:
    return block.language in ("", "bash", "sh", "shell", "console") and all(map(is_command, lines_of(block.text)))


def words_of(line: str) -> list[str]:
    """A command as words, without variables of its environment."""
    words = shlex.split(line, comments=True)
    while words and VARIABLE.fullmatch(words[0]):
        words = words[1:]
    return words


def commands(page: Path) -> list[list[str]]:
    """Every command of a page as words: the lines of its blocks, and those within sentences. An ellipsis stands for words that
    are not shown, and a program's name alone is no command."""
    lines = [line for block in blocks(page) if is_of_commands(block) for line in lines_of(block.text)]
    lines += [part for text in inline(page) for part in text.split(" && ") if is_command(part) and " " in part]
    return [words_of(line) for line in lines if not re.search(r"(^| )\.\.\.( |$)", line)]


# ---------------------------------------------------------------------- what the reader has


def image_net(first: int = 4, others: int = 16) -> nn.Module:
    """A network for images of three channels and 4 classes, with as many channels in its first convolution and in the others."""
    return nn.Sequential(
        nn.Conv2d(3, first, 3, 2),
        nn.ReLU(),
        nn.Conv2d(first, others, 3),
        nn.BatchNorm2d(others),
        nn.ReLU(),
        nn.Conv2d(others, others, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(4 * others, 4),
    )


def shorten_trainers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Trainers of this test are silent, on the CPU, and short."""
    trainer = pl.Trainer

    def shortened(**options: Any) -> pl.Trainer:
        keeps = any(isinstance(callback, ModelCheckpoint) for callback in options.get("callbacks", []))
        epochs = options.get("max_epochs", 1)
        short = {
            "max_epochs": epochs if epochs <= LONGEST else 1,
            "logger": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        return trainer(**(options | short), accelerator="cpu", enable_checkpointing=keeps)

    monkeypatch.setattr(pl, "Trainer", shortened)


def names_for(code: str) -> dict[str, Any]:
    """What stands in an example for the reader's own: a small network for images, and three batches, the same for each example.

    Args:
        code: the example; what it does not name is not made.
    """
    torch.manual_seed(0)
    x, y = torch.randn(12, 3, 16, 16), torch.randint(0, 4, (12,))
    names: dict[str, Any] = {
        "your_module": Classifier(image_net()),
        "your_data": DataLoader(TensorDataset(x, y), batch_size=4),
        "your_validation_data": DataLoader(TensorDataset(x, y), batch_size=4),
        "example_input": x,
    }
    if re.search(r"\b(model|callback|optimizer)\b", code):
        module, callback = Classifier(image_net()), Static(0.5, print_plan=False)
        if re.search(r"\bcallback\b", code):
            pl.Trainer(callbacks=[callback]).fit(module, names["your_data"])
        optimizer = torch.optim.SGD(module.parameters(), lr=0.01)
        names |= {"model": module, "callback": callback, "optimizer": optimizer}
    return names


def run_example(code: str, source: str, names: dict[str, Any] | None = None) -> dict[str, Any]:
    """Run the code of a page; gives the names that it has left."""
    found = names_for(code) if names is None else names
    exec(compile(code, source, "exec"), found)
    return found


def environment(*folders: Path) -> dict[str, str]:
    """The environment of a process that finds modules in these folders and in the repository."""
    path = os.pathsep.join(map(str, (*folders, ROOT)))
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "WANDB_MODE": "offline"}
