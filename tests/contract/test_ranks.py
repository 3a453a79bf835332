"""Two and four processes, over every method: the masks of one process, few collective operations, and ranks that
differ."""

from typing import Any

import pytest
import torch
from support import ranks
from support.methods import STEADY, every_steady_method, moves_at_all
from support.processes import run_processes

from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module", params=[pytest.param(2, marks=pytest.mark.slow), 4])
def of_ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of several DDP processes found, over every method; one launch for all."""
    return run_processes("all", tmp_path_factory.mktemp("ranks"), request.param, ranks.__file__)


@every_steady_method
def test_several_processes_equal_one_also_where_the_last_batch_is_shared_unequally(
    name: str, of_ranks: list[dict[str, Any]]
) -> None:
    alone = ranks.train(name, 0, 1)
    assert len(alone["masks"]) == 12
    for found in of_ranks:
        assert differences(alone["masks"], found[name]["trained"]["masks"]) == []
        # float64; the mean of the parts rounds otherwise
        for key, value in alone["weights"].items():
            assert torch.allclose(value, found[name]["trained"]["weights"][key], rtol=1e-7, atol=1e-10), key


@every_steady_method
def test_masks_are_equal_where_shares_of_a_data_pass_are_not_equally_long(
    name: str, of_ranks: list[dict[str, Any]]
) -> None:
    first = of_ranks[0][name]["passes"]["masks"]
    assert first
    assert (len(differences(first[0], first[-1])) > 0) == moves_at_all(name)
    for other in of_ranks[1:]:
        assert differences(first, other[name]["passes"]["masks"]) == []


@every_steady_method
def test_steps_without_an_update_ask_nothing_of_other_ranks(name: str, of_ranks: list[dict[str, Any]]) -> None:
    calls = [found[name]["trained"]["calls"] for found in of_ranks]
    assert all(mine == calls[0] for mine in calls)
    # after the first step, which an update of RigL puts off by one, there is a look at the other ranks
    assert not any(asked for asked, updates in calls[0][2:] if not updates)
    assert sum(asked for asked, updates in calls[0][:2] if not updates) <= 1
    assert calls[0].count((0, 0)) >= 6
    assert any(asked for asked, updates in calls[0] if updates) == moves_at_all(name)


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """What two ranks that differ are refused with."""
    return run_processes("differ", tmp_path_factory.mktemp("differ"), 2, ranks.__file__)


@pytest.mark.parametrize("case", [f"weights of {name}" for name in STEADY] + ["a loop"])
def test_ranks_whose_weights_differ_are_refused_with_the_name_of_the_layer(
    case: str, words: list[dict[str, str]]
) -> None:
    layer = "1.weight" if case == "a loop" else "net.3.weight"
    for said in words:
        assert said[case].startswith(f"RuntimeError: the weights of {layer} are not the same on every rank"), said[case]


@pytest.mark.parametrize("case", ["rounding", "scores", "addresses"])
def test_what_may_differ_between_ranks_is_not_refused(case: str, words: list[dict[str, str]]) -> None:
    """What hardware rounds otherwise, where objects lie in memory, and scores: masks that are computed from them are
    those of rank 0 on all ranks."""
    assert [said[case] for said in words] == ["", ""]


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("seeds", "ValueError: RigL has other arguments on other ranks"),
        ("lengths", "ValueError: the run has 14 optimizer steps on one rank and 16 on another"),
        ("lengths without times", "ValueError: the run has 14 optimizer steps on one rank and 16"),
    ],
)
def test_ranks_that_cannot_train_together_are_refused_before_the_first_batch(
    case: str, match: str, words: list[dict[str, str]]
) -> None:
    for said in words:
        assert said[case].startswith(match), said[case]
