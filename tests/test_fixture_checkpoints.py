"""Checkpoints that version 0.1.0 wrote resume to the end that it reached, saved configurations are read, and public
names stay.

Floating-point results differ between processors and versions of torch. So each run is repeated without this package
first: where that comes out with the same bits as on the machine that wrote the checkpoint, the resumed run must too,
and where not, ``test_..._bitwise`` is reported as skipped. Masks, counters and everything else that is whole are
compared exactly in either case.
"""

import importlib
import inspect
import runpy
import sys
import tempfile
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from fixtures.ends import (
    CONFIGS,
    FILES,
    FOLDER,
    TRAIN,
    close,
    differences,
    end_of,
    in_version_1,
    masked,
    same_bits,
    trained_end,
    unpack,
    unpacked,
)
from fixtures.exact_numbers import fingerprint, functions, scattered
from fixtures.modules import channel_net
from fixtures.runs import CHANNELS, RUNS
from hydra import compose, initialize_config_dir
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

import sparse_callbacks
from sparse_callbacks import SMCP, Static, load_compact
from sparse_callbacks.core.checkpoint import VERSION
from sparse_callbacks.methods.smcp.smcp import CORRECTED

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")
CONFIGURATIONS = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
# names that version 0.1.0 gave: __all__ of the package, and what its three public modules define without an underscore
NAMES = {
    "sparse_callbacks": """
        CTRE DPF GMP SET SMCP SNFS ConstrainedL0 GaP ParallelGaP Plan RigL SparsityCallback Static channel_groups combine distributions
        export_onnx horizon load_compact ops save_compact schedules slim __version__ methods""",
    "sparse_callbacks.methods": "CTRE DPF GMP SET SMCP SNFS ConstrainedL0 GaP ParallelGaP RigL Static",
    "sparse_callbacks.ops": """
        zeros_for drop_count keep_largest keep_largest_jointly kth_largest drop_and_grow random_mask""",
    "sparse_callbacks.schedules": """
        CURVES Schedule constant cosine linear exponential cubic polynomial parse with_curve as_schedule to_steps""",
    "sparse_callbacks.distributions": """
        Distribution Shapes uniform erdos_renyi erdos_renyi_kernel epsilon_sparsity clipped is_epsilon resolve""",
}
# the methods of version 0.1.0: a later one has no checkpoint and no configuration that this version wrote
METHODS_OF_0_1_0 = set(NAMES["sparse_callbacks.methods"].split())
# Runs that a later version begins by another rule: SMCP corrects scores for the norms behind layers, and hysteresis counts.
OTHER_RULE = ("smcp", "smcp_importance", "smcp_magnitude", "smcp_cool_down")
every_run = pytest.mark.parametrize("name", RUNS)


@cache
def resumed(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is kept of the run ``name``, and what the run ends with that goes on from its checkpoint, begun with other
    weights."""
    with tempfile.TemporaryDirectory() as temporary:
        checkpoint, kept = unpacked(name, Path(temporary))
        callbacks = RUNS[name].callbacks()
        trainer, module = RUNS[name].fit(callbacks, ckpt_path=checkpoint, salt=1)
        end = end_of(trainer, Path(temporary) / "end.ckpt")
    for callback in callbacks:  # what the user reads is what is saved
        assert callback.state_dict()["version"] == VERSION
        assert not differences(in_version_1(callback.state_dict()), end["callbacks"][callback.state_key], same_bits)
        assert not differences(callback.masks, end["callbacks"][callback.state_key]["masks"], same_bits)
        assert not any(module.get_parameter(n).detach()[~m].any() for n, m in callback.masks.items())
    return kept, end


@every_run
def test_a_kept_checkpoint_resumes_to_the_same_end(name: str) -> None:
    kept, end = resumed(name)
    assert differences(kept["end"], end, close) == []


@pytest.mark.parametrize("name", [name for name in RUNS if name not in OTHER_RULE])
def test_the_same_run_begun_anew_has_the_same_end(name: str, tmp_path: Path) -> None:
    """First masks, random numbers and calendars are those of version 0.1.0 too."""
    kept, _ = resumed(name)
    trainer, _ = RUNS[name].fit(RUNS[name].callbacks())
    near = same_bits if computes_as_the_writer(name) else close
    assert differences(kept["end"], end_of(trainer, tmp_path / "end.ckpt"), near) == []


def test_saved_runs_of_smcp_go_on_by_the_rule_that_they_began_with(tmp_path: Path) -> None:
    for name in OTHER_RULE:
        (state,) = resumed(name)[1]["callbacks"].values()
        assert CORRECTED not in state["aux"]
        assert "hysteresis" not in state["arguments"]
        trainer, _ = RUNS[name].fit(RUNS[name].callbacks())  # begun anew
        (state,) = end_of(trainer, tmp_path / f"{name}.ckpt")["callbacks"].values()
        assert bool(state["aux"][CORRECTED])


def test_a_resumed_run_of_smcp_says_that_it_goes_on_by_another_rule(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    checkpoint, _ = unpacked("smcp", tmp_path)
    with caplog.at_level("INFO"):
        RUNS["smcp"].fit(RUNS["smcp"].callbacks(), ckpt_path=checkpoint)
    assert "by the rule that it was saved under: scores without regard to norms" in caplog.text


@cache
def computes_as_the_writer(name: str) -> bool:
    """A run without this package comes out with the same bits as on the machine that wrote the checkpoint."""
    kept, _ = resumed(name)
    plain = fingerprint(RUNS[name].fit([])[1].state_dict().values())
    return (plain, fingerprint(functions())) == (kept["plain"], kept["functions"])


@every_run
def test_a_kept_checkpoint_resumes_bitwise(name: str, record_property: Any) -> None:
    kept, end = resumed(name)
    record_property("bitwise", computes_as_the_writer(name))
    if not computes_as_the_writer(name):
        here = f"torch {torch.__version__} with {torch.backends.cpu.get_cpu_capability()}"
        pytest.skip(f"a run without this package has other bits with {here} than with {kept['writer']}")
    assert differences(kept["end"], end, same_bits) == []


def test_every_method_of_version_0_1_0_has_a_kept_checkpoint() -> None:
    kept = {type(callback).__name__ for run in RUNS.values() for callback in run.callbacks()}
    assert kept == METHODS_OF_0_1_0
    assert {p.name for p in FOLDER.iterdir()} == {f"{name}.{kind}.gz" for name in RUNS for kind in ("ckpt", "end")}


def test_masks_are_taken_from_a_kept_checkpoint(tmp_path: Path) -> None:
    checkpoint, _ = unpacked("snfs", tmp_path)
    (state,) = torch.load(checkpoint, weights_only=True)["callbacks"].values()
    callback = Static(from_checkpoint=str(checkpoint), print_plan=False)
    RUNS["static"].fit([callback])
    assert not differences(state["masks"], callback.masks, same_bits)


# ---------------------------------------------------------------------- other files


def test_a_kept_compact_checkpoint_loads(tmp_path: Path) -> None:
    full, _ = masked(unpacked("smcp", tmp_path)[1]["end"])
    small = load_compact(channel_net(salt=1), FILES / "slim.safetensors").eval()
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in full.parameters())
    x = scattered(5, 2, 3, 3, salt=9)
    assert torch.allclose(small(x), full(x), rtol=1e-12, atol=1e-12)  # sums with fewer zeros in them


def test_a_kept_latency_table_is_a_cost() -> None:
    callback = SMCP(0.6, cost=str(FILES / "latency.json"), **CHANNELS)
    RUNS["smcp"].fit([callback])
    reached = f"0.5635 of the dense network's latency in {FILES / 'latency.json'} (at most 0.6)"
    assert callback.outcome() == {"budget": reached}


def test_a_kept_checkpoint_of_the_training_script_resumes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = Path(__file__).parents[1]
    monkeypatch.syspath_prepend(str(root))
    train = importlib.import_module("train").train
    last = unpack(FILES / "train.ckpt.gz", tmp_path)
    with initialize_config_dir(str(root / "conf"), version_base=None):
        train(compose("train", [*TRAIN, f"output_dir={tmp_path}", "trainer.max_epochs=3", f"ckpt_path={last}"]))
    kept = torch.load(unpack(FILES / "train.end.gz", tmp_path), weights_only=True)
    # nine steps in float32, whose sums have an order of their own on each processor
    assert differences(kept, trained_end(tmp_path), lambda a, b: torch.allclose(a, b, rtol=1e-3, atol=1e-4)) == []


# ---------------------------------------------------------------------- saved configurations


def parts(config: Any) -> Iterator[dict[str, Any]]:
    """Every part of a configuration that names a class or function."""
    if isinstance(config, Mapping):
        if "_target_" in config:
            yield dict(config)
        for value in config.values():
            yield from parts(value)


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_a_saved_configuration_is_understood(name: str) -> None:
    config = OmegaConf.to_container(OmegaConf.load(CONFIGS / f"{name}.yaml"), resolve=True)
    for part in parts(config):
        target = get_object(part.pop("_target_"))
        inspect.signature(target).bind_partial(**part)  # raises where an argument is not known any more
    if name != "dense":
        assert isinstance(instantiate(config["method"]), sparse_callbacks.SparsityCallback)


def test_every_method_of_version_0_1_0_has_a_saved_configuration() -> None:
    saved = [OmegaConf.load(CONFIGS / f"{name}.yaml").method.get("_target_", "") for name in CONFIGURATIONS]
    assert {target.rpartition(".")[2] for target in saved} - {""} == METHODS_OF_0_1_0  # "": the dense network


# ---------------------------------------------------------------------- names


@pytest.mark.parametrize("module", NAMES)
def test_public_names_are_importable(module: str) -> None:
    found = importlib.import_module(module)
    assert [name for name in NAMES[module].split() if not hasattr(found, name)] == []


def test_latency_tables_are_measured_by_the_same_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["latency", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_module("sparse_callbacks.latency", run_name="__main__")  # python -m sparse_callbacks.latency --help
    assert ended.value.code == 0
    assert "--input" in capsys.readouterr().out
