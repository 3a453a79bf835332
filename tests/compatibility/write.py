"""Runs cells and writes docs/compatibility.md: ``PYTHONPATH=tests:. python -m compatibility.write [WORD ...]``.

With words, only rows whose title or group contains one of them are run, and the others stay as the page has them; so do the
columns of other methods with ``--methods NAME ...``.
"""

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from support.methods import METHODS

from compatibility import launching, models, storage, training
from compatibility.cells import Feature, Outcome, ordered, outcome_of
from compatibility.page import PAGE, by_name, read, written

PARTS = (training, models, storage, launching)
"""The modules that make the rows."""


def outcomes(row: Feature, methods: Sequence[str] = METHODS) -> dict[str, Outcome]:
    """The cells of a row by the names of methods; rows of several processes run all of them."""
    if row.launch is not None:
        with tempfile.TemporaryDirectory() as folder:
            found = row.launch(Path(folder))
        return {name: found[name] for name in methods}
    return {name: outcome(row, name) for name in methods}


def outcome(row: Feature, name: str) -> Outcome:
    """One cell of a row that needs no launch."""
    run = row.run
    assert run is not None
    with tempfile.TemporaryDirectory() as folder:
        return outcome_of(lambda: run(name, Path(folder)))


def main() -> None:
    """Run the chosen rows, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="of the rows that are run")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS, help="whose cells are run")
    given = parser.parse_args()
    words: list[str] = given.words
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    kept = bool(words) or given.methods != METHODS
    table = by_name(read(PAGE.read_text())) if kept and PAGE.exists() else {}
    for title, row in ordered().items():
        if words and not any(word in f"{title} {row.group}" for word in words):
            continue
        begun = time.monotonic()
        found = outcomes(row, given.methods)
        table |= {(title, name): cell for name, cell in found.items()}
        PAGE.write_text(written(table))  # at once, as a row of several processes may fail on a busy machine
        seen = " ".join(cell.word for cell in found.values())
        print(f"{time.monotonic() - begun:6.1f} s  {title}: {seen}", flush=True)


if __name__ == "__main__":
    main()
