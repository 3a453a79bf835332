"""Runs cells and writes docs/compatibility.md: ``PYTHONPATH=tests:. python -m compatibility.write [WORD ...]``.

With words, only rows whose title or group contains one of them are run, and the others stay as the page has them.
"""

import logging
import sys
import tempfile
import time
import warnings
from pathlib import Path

import torch
from support.methods import METHODS

from compatibility import launching, models, storage, training
from compatibility.cells import Feature, Outcome, ordered, outcome_of
from compatibility.page import PAGE, by_name, read, written

PARTS = (training, models, storage, launching)
"""The modules that make the rows."""


def outcomes(row: Feature) -> dict[str, Outcome]:
    """The cells of a row by the names of methods."""
    if row.launch is not None:
        with tempfile.TemporaryDirectory() as folder:
            return row.launch(Path(folder))
    return {name: outcome(row, name) for name in METHODS}


def outcome(row: Feature, name: str) -> Outcome:
    """One cell of a row that needs no launch."""
    run = row.run
    assert run is not None
    with tempfile.TemporaryDirectory() as folder:
        return outcome_of(lambda: run(name, Path(folder)))


def main(words: list[str]) -> None:
    """Run the chosen rows, and write the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    table = by_name(read(PAGE.read_text())) if words and PAGE.exists() else {}
    for title, row in ordered().items():
        if words and not any(word in f"{title} {row.group}" for word in words):
            continue
        begun = time.monotonic()
        found = outcomes(row)
        table |= {(title, name): cell for name, cell in found.items()}
        PAGE.write_text(written(table))  # at once, as a row of several processes may fail on a busy machine
        seen = " ".join(cell.word for cell in found.values())
        print(f"{time.monotonic() - begun:6.1f} s  {title}: {seen}", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
