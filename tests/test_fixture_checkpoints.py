"""Checkpoints that version 0.1.0 wrote resume to the end that it reached, saved configurations are read, and public names stay.

Floating-point results differ between processors and versions of torch. So each run is repeated without this package first: where that
comes out with the same bits as on the machine that wrote the checkpoint, the resumed run must too, and where not, ``test_..._bitwise``
is reported as skipped. Masks, counters and everything else that is whole are compared exactly in either case.
"""

import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.runs import FOLDER, RUNS, close, differences, end_of, fingerprint, functions, same_bits, unpacked

from sparse_callbacks import Static, methods

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
every_run = pytest.mark.parametrize("name", RUNS)


@cache
def resumed(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is kept of the run ``name``, and what the run ends with that goes on from its checkpoint, begun with other weights."""
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, kept = unpacked(name, Path(temporary))
        callbacks = RUNS[name].callbacks()
        trainer, module = RUNS[name].fit(callbacks, ckpt_path=checkpoint, salt=1)
        end = end_of(trainer, Path(temporary) / "end.ckpt")
    for callback in callbacks:  # what the user reads is what is saved
        assert not differences(callback.state_dict(), end["callbacks"][callback.state_key], same_bits)
        assert not differences(callback.masks, end["callbacks"][callback.state_key]["masks"], same_bits)
        assert not any(module.get_parameter(n).detach()[~m].any() for n, m in callback.masks.items())
    return kept, end


@every_run
def test_a_kept_checkpoint_resumes_to_the_same_end(name: str) -> None:
    kept, end = resumed(name)
    assert kept["writer"]["sparse_callbacks"] == "0.1.0"
    assert differences(kept["end"], end, close) == []


@every_run
def test_a_kept_checkpoint_resumes_bitwise(name: str, record_property: Any) -> None:
    kept, end = resumed(name)
    plain = fingerprint(RUNS[name].fit([])[1].state_dict().values())
    bitwise = (plain, fingerprint(functions())) == (kept["plain"], kept["functions"])
    record_property("bitwise", bitwise)
    if not bitwise:
        here = f"torch {torch.__version__} with {torch.backends.cpu.get_cpu_capability()}"
        pytest.skip(f"a run without this package has other bits with {here} than with {kept['writer']}")
    assert differences(kept["end"], end, same_bits) == []


def test_every_method_has_a_kept_checkpoint() -> None:
    kept = {type(callback).__name__ for run in RUNS.values() for callback in run.callbacks()}
    assert kept >= set(methods.__all__)
    assert {p.name for p in FOLDER.iterdir()} == {f"{name}.{kind}.gz" for name in RUNS for kind in ("ckpt", "end")}


def test_masks_are_taken_from_a_kept_checkpoint(tmp_path: Path) -> None:
    checkpoint, _ = unpacked("snfs", tmp_path)
    (state,) = torch.load(checkpoint, weights_only=True)["callbacks"].values()
    callback = Static(from_checkpoint=str(checkpoint), print_plan=False)
    RUNS["static"].fit([callback])
    assert not differences(state["masks"], callback.masks, same_bits)
