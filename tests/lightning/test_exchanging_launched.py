"""Sparse storage in processes that the Trainer starts: weights come back dense, and places with the callback."""

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from support import exchanged_launched

from sparse_callbacks.testing.comparison import differences

CASES = [("ddp_fork", "grouped"), ("ddp_spawn", "sparse")]
LAYERS = ["net.1", "net.3", "net.5"]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    """Five fits in a row, by strategy and storage; one program for all."""
    folder = tmp_path_factory.mktemp("launched")
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TMPDIR": str(folder)}
    command = [sys.executable, exchanged_launched.__file__, "all", str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return dict(torch.load(folder / "found.pt", weights_only=False))


@pytest.mark.parametrize("case", CASES)
def test_places_come_back_with_the_callback_and_weights_to_dense_layers(case: Any, found: dict[Any, Any]) -> None:
    for fit in found[case][:2]:
        assert fit["ends"]["layers"] == LAYERS
        assert fit["here"]["layers"] == []
        assert differences(fit["ends"]["masks"], fit["here"]["masks"]) == []
        assert fit["ends"]["updates"] == fit["here"]["updates"] > 0
        for name, mask in fit["here"]["masks"].items():
            assert not fit["weights"][name][~mask].any()
            assert fit["weights"][name].any()


@pytest.mark.parametrize("case", CASES)
def test_each_fit_goes_on_with_the_places_of_the_one_before(case: Any, found: dict[Any, Any]) -> None:
    first, second, third = found[case][:3]
    assert differences(first["here"]["masks"], second["begins"]["masks"]) == []
    assert differences(second["here"]["masks"], third["begins"]["masks"]) == []
    assert differences(first["here"]["masks"], third["here"]["masks"]) != []
    assert third["here"]["layers"] == LAYERS


@pytest.mark.parametrize("case", CASES)
def test_layers_that_are_sparse_here_are_refused_until_they_are_dense_again(case: Any, found: dict[Any, Any]) -> None:
    third, fourth, fifth = found[case][2:]
    assert "net.1.weight is of a SparseLinear" in fourth["refused"]
    assert "Call to_dense(module)" in fourth["refused"]
    assert differences(third["here"], fourth["here"]) == []
    assert differences(third["weights"], fourth["weights"]) == []
    assert fifth["refused"] == ""
    assert differences(third["here"]["masks"], fifth["begins"]["masks"]) == []
