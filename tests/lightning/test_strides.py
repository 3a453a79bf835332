"""Masks and weights that are not contiguous: whole filters, channels_last, transposed matrices."""

from typing import Any

import pytest
import torch
from support import processes
from support.methods import method
from support.processes import STRIDED, run_processes

from sparse_callbacks import saved_masks
from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.testing.comparison import assert_effective, differences
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of two DDP processes found; one launch for all."""
    return run_processes("strided", tmp_path_factory.mktemp("ddp"))


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("name", STRIDED)
def test_two_processes_equal_one_whatever_the_strides(name: str, two_processes: list[dict[str, Any]]) -> None:
    alone = processes.train_strided(name, 0, 1)
    for found in (results[name] for results in two_processes):
        assert differences(alone["masks"], found["whole"]["masks"]) == []
        assert differences(alone["masks"][processes.REPLICA_STOP :], found["resumed"]["masks"]) == []
        for key, value in alone["end"]["weights"].items():
            for run in ("whole", "resumed"):
                # the mean of two halves rounds otherwise
                assert torch.allclose(value, found[run]["end"]["weights"][key], rtol=1e-7, atol=1e-10), (run, key)


@pytest.mark.parametrize("name", STRIDED)
def test_no_two_elements_of_a_mask_share_their_memory(name: str) -> None:
    """Users may write into them, and the state that was given to a run may be given to another one."""
    base, changes = STRIDED[name]
    module, callback = Classifier(processes.strided(0)), method(base, every=2, stop=8, **changes)
    fit(module, callback, max_epochs=1)
    assert any(not mask.all() for mask in callback.masks.values()) or base in ("l0", "smcp")
    for mask in (*callback.masks.values(), *saved_masks(callback.state_dict()).values()):
        mask[...] = torch.rand(mask.shape) < 0.5  # torch refuses it where elements share memory
    for tensor in with_truths(callback.state_dict())["aux"].values():
        tensor[...] = 0


def test_masks_of_filters_stay_effective() -> None:
    module, callback = Classifier(processes.strided(0)), method("dpf", unit="filter", keep_dense="last", every=1)
    fit(module, callback, max_epochs=1)
    assert_effective(module, callback)
    for name, mask in callback.masks.items():
        by_filter = mask.flatten(1)
        assert torch.equal(by_filter.any(1), by_filter.all(1)), name
