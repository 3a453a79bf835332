"""The page of compatibility: its rows and columns are those of the code, and its cells what runs show."""

from pathlib import Path

import pytest
from support.methods import METHODS

from compatibility import write
from compatibility.cells import EXACT, FEATURES, REFUSED, Outcome, ordered, outcome_of
from compatibility.page import PAGE, by_name, read, rows, written

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

PRINTED = by_name(read(PAGE.read_text()))
RUN_HERE = [title for title, row in FEATURES.items() if row.run is not None]
LAUNCHED = [title for title, row in FEATURES.items() if row.launch is not None]
# each row with another method: all methods and all rows that need no launch, in a minute
SAMPLE = [(title, METHODS[(5 * index) % len(METHODS)]) for index, title in enumerate(RUN_HERE)]


def test_rows_and_columns_are_those_of_the_code() -> None:
    assert rows(PRINTED) == list(ordered())
    assert list(PRINTED) == [(title, name) for title in ordered() for name in METHODS]


def test_the_page_is_what_its_own_table_writes() -> None:
    """So the head, the notes and their numbers are those of the code; `python -m compatibility.write` mends it."""
    assert written(PRINTED) == PAGE.read_text()


def test_what_is_not_exact_has_a_note() -> None:
    assert [cell for cell, found in PRINTED.items() if (found.word == EXACT) == bool(found.note)] == []


def agree(title: str, name: str, found: Outcome) -> None:
    printed = PRINTED[title, name]
    assert found.word == printed.word, found.note
    assert by_name(read(written(PRINTED | {(title, name): found})))[title, name].note == printed.note


@pytest.mark.parametrize(("title", "name"), SAMPLE)
def test_a_cell_of_every_row_is_what_the_page_says(title: str, name: str) -> None:
    agree(title, name, write.outcome(FEATURES[title], name))


@pytest.mark.parametrize(
    ("title", "name"), [cell for cell, found in PRINTED.items() if found.word == REFUSED and cell[0] in RUN_HERE]
)
def test_refused_cells_are_refused_with_the_words_of_their_notes(title: str, name: str) -> None:
    agree(title, name, write.outcome(FEATURES[title], name))


@pytest.mark.slow
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("title", RUN_HERE)
def test_every_cell_is_what_the_page_says(title: str, name: str) -> None:
    agree(title, name, write.outcome(FEATURES[title], name))


@pytest.mark.slow
@pytest.mark.parametrize("title", LAUNCHED)
def test_every_row_of_several_processes_is_what_the_page_says(title: str, tmp_path: Path) -> None:
    for name, found in write.outcomes(FEATURES[title]).items():
        agree(title, name, found)


# ---------------------------------------------------------------------- the outcomes themselves


def test_an_error_that_is_not_ours_is_no_refusal() -> None:
    def run() -> None:
        raise ValueError("torch says so")

    with pytest.raises(ValueError, match="torch says so"):
        outcome_of(run)
