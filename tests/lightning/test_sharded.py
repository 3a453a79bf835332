"""FSDP2 in two processes: bit for bit what one process trains, whatever the shards, and over checkpoints of each kind."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support import sharded
from support.processes import run_processes
from support.sharded import OTHERS, RUNS, STOP, WINDOW, train

from sparse_callbacks import saved_masks
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.runs import Stops

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

Ranks = list[dict[str, Any]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where one process has left checkpoints, and two processes leave theirs."""
    found = tmp_path_factory.mktemp("sharded")
    for name in ("rigl", "dpf"):
        train(name, 1, Stops(found / f"{name} one", (STOP,)), max_steps=STOP)
    return found


@pytest.fixture(scope="module")
def ranks(folder: Path) -> Ranks:
    """What each of two processes found; one launch for all runs."""
    return run_processes("all", folder, script=sharded.__file__)


def assert_same_run(alone: dict[str, Any], found: dict[str, Any]) -> None:
    for what in ("weights", "counts", "updates"):
        assert differences(alone[what], found[what]) == [], what
    assert differences(*map(_without_doctor, (alone["state"], found["state"]))) == []


def _without_doctor(state: dict[str, Any]) -> dict[str, Any]:
    """A state but for what was warned about: the runs are of different lengths."""
    return state | {"aux": {key: value for key, value in state["aux"].items() if not key.startswith("doctor/")}}


@pytest.mark.parametrize("name", RUNS)
def test_shards_train_what_one_process_trains_bit_for_bit(name: str, ranks: Ranks) -> None:
    alone = train(name, 1)
    assert (alone["updates"] > 2) == (RUNS[name][0] != "static")
    for run in (name, f"{name} resumed"):
        assert_same_run(alone, ranks[0][run])
        assert differences(ranks[0][run]["weights"], ranks[1][run]["weights"]) == []
        assert differences(ranks[0][run]["counts"], ranks[1][run]["counts"]) == []
    # rank 0 alone has whole masks; each rank holds parts, of which one has no element
    assert ranks[1][name]["state"]["masks"] == {}
    assert [r[name]["masks"]["net.single.weight"].shape for r in ranks] == [(1, 7), (0, 7)]
    assert [r[name]["masks"]["net.columns.weight"].shape for r in ranks] == [(6, 3), (6, 3)]


@pytest.mark.parametrize("name", ["rigl", "dpf"])
def test_checkpoints_go_from_one_process_to_shards_and_back(name: str, ranks: Ranks, folder: Path) -> None:
    alone = train(name, 1)
    assert_same_run(alone, ranks[0][f"{name} from a file"])
    assert_same_run(alone, ranks[0][f"{name} from one process"])
    assert_same_run(alone, train(name, 1, ckpt_path=folder / f"{name} file" / f"{STOP}.ckpt"))


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_and_gradients_that_are_not_finite(name: str, ranks: Ranks) -> None:
    alone = train("set", 1, **OTHERS[name]())
    assert_same_run(alone, ranks[0][name])
    assert alone["state"]["steps"] == {"0": 2 if name == "not finite" else 16}  # an infinite weight stays one


def test_a_checkpoint_inside_an_accumulation_window(ranks: Ranks) -> None:
    assert_same_run(train("rigl", 1, **WINDOW), ranks[0]["window"])


def test_ranks_with_other_batches_hold_the_parts_of_one_mask(ranks: Ranks) -> None:
    one, other = (r["split"] for r in ranks)
    assert differences(one["weights"], other["weights"]) == []
    counts = train("rigl", 1)["counts"]
    for name, mask in saved_masks(one["state"]).items():
        dim = 1 if name == "net.columns.weight" else 0
        assert torch.equal(torch.cat([one["masks"][name], other["masks"][name]], dim), mask), name
        assert int(mask.sum()) == counts[name] == one["counts"][name] == other["counts"][name]
        assert not one["weights"][name][~mask].any()


@pytest.mark.parametrize(
    ("what", "words"),
    [
        ("method", "it reads whole parameters"),
        ("filters", "unit='filter' compares whole filters"),
        ("tensor parallel", "tensor_parallel_size=2"),
        ("by hand", "manual optimization"),
        ("optimizer", "Mixing under ModelParallelStrategy"),
        ("not sharded", "not sharded, so nobody averages their gradients"),
        ("two dimensions", "a mesh of 2 dimensions"),
        ("start", "its start reads whole layers"),
        ("rescaled", "its start reads whole layers"),
        ("pattern", "pattern='fan_in/2' is one of groups of weights"),
        ("neurons", "neuron_importance= sums whole rows"),
        ("averages", "WeightAveraging under ModelParallelStrategy"),
        ("frozen", "net.first.weight frozen or in no optimizer"),
        ("loop", "sharded (DTensor)"),
    ],
)
def test_what_is_not_exact_on_shards_is_refused(what: str, words: str, ranks: Ranks) -> None:
    assert words in ranks[0]["refusals"][what]
    assert ranks[1]["refusals"][what] == ranks[0]["refusals"][what]
