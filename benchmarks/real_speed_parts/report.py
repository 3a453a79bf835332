"""The file of figures of real_speed.py, and the tables that are written from it."""

import json
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

from real_speed_parts import accuracy, layers, memory, peers, steps, updates
from sparse_callbacks.core.machine import processor

RESULTS = Path(__file__).parents[1] / "results" / "real_speed.json"
Figures = dict[str, dict[str, Any]]
Rows = list[dict[str, Any]]


def both(*tables: Callable[[Rows], str]) -> Callable[[Rows], str]:
    return lambda rows: "\n\n".join(text for table in tables if (text := table(rows)))


# the heading of each part, what its figures are, and what makes text of its rows
PARTS: dict[str, tuple[str, str, Callable[[Rows], str]]] = {
    "steps": ("Whole Lightning steps", steps.ABOUT, both(steps.table, steps.not_measured, steps.goals)),
    "updates": ("Updates", updates.ABOUT, both(updates.table, updates.goals)),
    "set_mlp": ("SET-MLP", peers.ABOUT, peers.set_mlp_table),
    "accuracy": ("Accuracy at equal epochs", accuracy.ABOUT, accuracy.table),
    "memory": ("Peak memory and sizes of files", memory.ABOUT, memory.table),
    "differences": ("Masked and sparse in float32", memory.ABOUT_DIFFERENCES, memory.differences_table),
    "largest": ("The largest network", memory.ABOUT_LARGEST, memory.largest_table),
    "layers": ("One layer over density and width", layers.ABOUT, layers.table),
}
# why a part has no figures
NOT_RUN = {
    "set_mlp": "Not run: no checkout of that code was at hand where the other figures were measured, and this package holds no "
    "copy of it. With one, `python benchmarks/real_speed.py --parts set_mlp --set-mlp FOLDER` writes the table.",
    "accuracy": "Not run: it needs the data sets, in the folder that `--data FOLDER` names.",
    "largest": "Not run: it needs up to 20 GiB of memory, and is asked for with `--parts largest`.",
}
BY_ITSELF = ("steps", "updates", "memory", "differences", "layers")  # parts that need neither files nor much memory
KEYS = {
    "steps": ("network", "optimizer", "sparsity"),
    "updates": ("width",),
    "largest": ("neurons",),
    "memory": ("network",),
}


def rounded(value: Any) -> Any:
    """Numbers with four digits, in lists too; more are not measured."""
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) else value


def take(figures: Figures, part: str, rows: Rows) -> None:
    """Put the rows of a part in, in place of those that it had of the same cells."""
    keys, old = KEYS.get(part, ()), figures.get(part, {})
    rows = [{key: rounded(value) for key, value in row.items()} for row in rows]
    new = {tuple(row[key] for key in keys) for row in rows}
    kept = [row for row in old.get("rows", []) if tuple(row[key] for key in keys) not in new]
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, pytorch-lightning {pl.__version__}"
    source = f"`{command(part, sys.argv[1:])}`; {processor()}, {platform.machine()}; {versions}"
    sources = [source, *(other for other in old.get("sources", []) if kept and other != source)]
    figures[part] = {"sources": sources, "rows": [*kept, *rows]}


def command(part: str, arguments: list[str]) -> str:
    """The command that measures a part as the given one does, with FOLDER for folders of the user's."""
    words, option = ["python benchmarks/real_speed.py", "--parts", part], ""
    for word in arguments:
        option = word if word.startswith("--") else option
        if option != "--parts":
            words.append("FOLDER" if option in ("--data", "--set-mlp", "--out") and word != option else word)
    return " ".join(words)


def source(figures: Figures, part: str) -> str:
    """The commands, machines and versions of a part's figures."""
    return "; ".join(figures[part]["sources"]) + "."


def read(file: Path) -> Figures:
    """The figures that the file has, none where there is no file."""
    found: Figures = json.loads(file.read_text()) if file.is_file() else {}
    return found


def write(figures: Figures, file: Path) -> None:
    """Write the figures, one row a line, and beside them the tables."""
    parts = []
    for part, found in figures.items():
        head = {key: value for key, value in found.items() if key != "rows"}
        rows = ",\n    ".join(json.dumps(row) for row in found["rows"])
        parts.append(f'  {json.dumps(part)}: {json.dumps(head)[:-1]}, "rows": [\n    {rows}\n  ]}}')
    file.write_text("{\n" + ",\n".join(parts) + "\n}\n")
    file.with_suffix(".md").write_text(text(figures))


def text(figures: Figures) -> str:
    """All tables as Markdown, with the command and the machine of each."""
    found = [
        "# What truly sparse storage gains\n\nWritten by `python benchmarks/real_speed.py` from the figures in `real_speed.json`. "
        "One thread, CPU time of the process, interleaved rounds: ratios are medians over rounds of the run's time over the "
        "baseline's in the same round, with their quartiles in brackets.\n"
    ]
    for part, (heading, about, table) in PARTS.items():
        if part in figures:
            found.append(f"## {heading}\n\n{about}\n\n{table(figures[part]['rows'])}\n\n{source(figures, part)}\n")
        else:
            found.append(f"## {heading}\n\n{about}\n\n{NOT_RUN.get(part, 'Not run.')}\n")
    return "\n".join(found)
