"""Which runs of a test an ordinary session takes, of grids marked `combinations` and of classes marked `variants`."""

import itertools
from types import SimpleNamespace
from typing import Any

import pytest

pytest_plugins = ["pytester"]

GRID = """
import pytest

@pytest.mark.combinations
@pytest.mark.parametrize("letter", "abcd")
@pytest.mark.parametrize("number", [1, 2, 3])
def test_grid(letter, number): ...

@pytest.mark.parametrize("letter", "ab")
@pytest.mark.parametrize("number", [1, 2])
def test_unmarked(letter, number): ...
"""
CLASSES = """
import pytest

class Cases:
    def test_one(self): ...
    def test_two(self): ...
    @pytest.mark.parametrize("x", [1, 2])
    def test_three(self, x): ...

@pytest.mark.variants("alike")
class TestFirst(Cases): ...

@pytest.mark.variants("alike")
class TestSecond(Cases):
    def test_its_own(self): ...

@pytest.mark.variants("another")
class TestAnother(Cases): ...

class TestPlain(Cases): ...
"""


@pytest.fixture
def chosen(pytester: pytest.Pytester, request: pytest.FixtureRequest) -> Any:
    """Names of the runs of a module that the suite's rules take, with these options."""
    rules = request.config.pluginmanager.get_plugin(str(request.config.rootpath / "tests/conftest.py"))

    def take(source: str, **options: bool) -> list[str]:
        items = pytester.getitems(source)
        taken = SimpleNamespace(
            getoption=lambda name: options.get(name.strip("-").replace("-", "_"), False),
            hook=SimpleNamespace(pytest_deselected=lambda items: None),
        )
        rules.pytest_collection_modifyitems(taken, items)
        return [item.nodeid.partition("::")[2] for item in items]

    return take


@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
def test_every_value_of_a_grid_runs_and_every_run_of_other_tests(chosen: Any) -> None:
    taken = chosen(GRID)
    grid = [name[len("test_grid[") : -1].split("-") for name in taken if name.startswith("test_grid")]
    assert len(grid) == 4
    assert {number for number, _ in grid} == {"1", "2", "3"}
    assert {letter for _, letter in grid} == {*"abcd"}
    assert sum(name.startswith("test_unmarked") for name in taken) == 4
    assert len(chosen(GRID, all_combinations=True)) == 12 + 4


@pytest.mark.filterwarnings("ignore::pytest.PytestUnknownMarkWarning")
def test_a_case_of_variants_runs_for_one_of_them_in_turn(chosen: Any) -> None:
    taken = chosen(CLASSES)
    cases = ["test_one", "test_two", "test_three[1]", "test_three[2]"]
    for name, case in itertools.product(("TestAnother", "TestPlain"), cases):
        assert f"{name}::{case}" in taken
    alike = [name.split("::") for name in taken if name.startswith(("TestFirst", "TestSecond"))]
    assert sorted(case for _, case in alike) == sorted([*cases, "test_its_own"])
    shared = [name for name, case in alike if case != "test_its_own"]
    assert shared.count("TestFirst") == shared.count("TestSecond") == 2
    assert len(chosen(CLASSES, all_combinations=True)) == 4 * 4 + 1
