"""Masks and state come back from processes that the Trainer starts, as the weights do."""

from pathlib import Path
from typing import Any

import pytest
from support import launched
from support.methods import METHODS, every_method

from sparse_callbacks.testing.comparison import differences


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of temporary files of all fits."""
    return tmp_path_factory.mktemp("launched")


@pytest.fixture(scope="module")
def launched_fits(folder: Path) -> dict[str, Any]:
    """What the main process has after fits in forked and spawned processes; one program for all."""
    return launched.run(folder, "every_method", "several_fits", "other_weights", "spawned", "nobody_looks")


@pytest.fixture
def launched_methods(launched_fits: dict[str, Any]) -> dict[str, Any]:
    """By the name of each method what the main process has after a fit in a forked process."""
    return dict(launched_fits["every_method"])


@every_method
def test_the_main_process_has_what_the_launched_one_ended_with(name: str, launched_methods: dict[str, Any]) -> None:
    assert launched_methods.keys() == set(METHODS)
    found = launched_methods[name]
    assert differences(found["there"], found["here"]) == []
    assert found["here"]["masks"]


@every_method
def test_the_next_fit_goes_on_from_what_came_back(name: str, launched_methods: dict[str, Any]) -> None:
    expected, begun = launched_methods[name]["end"]
    assert differences(expected, begun) == []


def test_what_only_the_other_process_knows_is_said(launched_methods: dict[str, Any]) -> None:
    words, afterwards = launched_methods["l0"]["words"]
    assert "knows its expected density again in the next fit" in words
    assert "expected density" in afterwards


@every_method
def test_the_file_is_there_until_somebody_looks(name: str, launched_methods: dict[str, Any]) -> None:
    found = launched_methods[name]
    assert len(found["files"]) == 1
    assert found["left"] == []


def test_fits_and_tests_follow_each_other_in_processes(launched_fits: dict[str, Any]) -> None:
    found = launched_fits["several_fits"]
    assert len(found["files"]) == 2
    assert differences(*found["first"]) == []
    assert found["twin"] == {}  # a copy of a callback waits for no file of the other's
    assert "the disk is full, say" in found["error"]
    assert found["left by the failure"] == []
    assert differences(*found["after the failure"]) == []
    assert differences(*found["second"]) == []
    before, after = found["steps"]
    assert after > before
    assert found["gates"] == 32
    assert found["left"] == []


def test_a_file_that_nobody_reads_does_not_stay(launched_fits: dict[str, Any], folder: Path) -> None:
    found = launched_fits["nobody_looks"]
    assert found["waits"] == found["waits until the end"] == 1
    assert differences(*found["copied"]) == []
    assert found["begun anew"] in (2, 3)
    assert found["gone with its callback"] == []
    assert launched.left_in(folder) == []  # the process has ended since


def test_masks_that_came_back_are_not_put_on_other_weights(launched_fits: dict[str, Any]) -> None:
    found = launched_fits["other_weights"]
    assert "hold weights that the masks of the last fit would cut" in found["error"]
    assert differences(*found["masks"]) == []
    assert differences(*found["untouched"]) == []
    assert found["another model"] == ["net.1.weight"]


def test_a_spawned_process_goes_on_from_the_masks_of_the_main_one(launched_fits: dict[str, Any]) -> None:
    found = launched_fits["spawned"]
    assert differences(*found["begun"]) == []
    assert differences(*found["end"]) == []
    steps, more_steps, updates, more_updates = found["counts"]
    assert more_steps > steps
    assert more_updates > updates > 1
    assert found["left"] == []
