"""Puts this folder on the import path, so that tests in subfolders find the helper modules; one thread for
everything; no test may leave compiled code switched off."""

import gc
import os
from collections.abc import Iterator

# the networks are tiny: two threads gain nothing, and on a busy machine they wait for each other most of the time
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch
from support.stance import stance

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _compiled_code_stays_compiled() -> Iterator[None]:
    """A stance that a test leaves would let every later test of the process run compiled code eagerly, silently."""
    yield
    if stance() != "default":
        gc.collect()  # a run that the test did not close, and that nobody can reach, ends now
    if (left := stance()) != "default":
        torch.compiler.set_stance("default")
        pytest.fail(f"the test has left torch.compiler's stance at {left!r}")
