"""Methods that prune whole units show parameters, FLOPs and units in the place of a sparsity that says little."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sparse_callbacks import ConstrainedL0, RigL
from sparse_callbacks.core.units_left import bar_figures, units_left

Run = Callable[..., dict[str, float]]
QUICK = {
    "smcp": ("method.round_to=1", "method.every=3"),
    "channels": ("method.round_to=1", "method.every=3", "method.cost=parameters"),
    "l0": ("method.gate_lr=0.3", "method.dual_lr=0.1", "optim.weight_decay=0"),
    "rigl": (),
}
IN_LINES = {"smcp": "parameters", "channels": "parameters", "l0": "expected density", "rigl": "sparsity"}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("method", QUICK)
def test_the_table_and_the_lines_of_epochs_say_what_is_left(
    method: str, run: Run, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    metrics = run(f"method={method}", *QUICK[method], "trainer.enable_progress_bar=true", "slim=true")
    shown = capsys.readouterr().out
    table = dict(re.findall(r"^│ +(.+?) +│ (.+?) +│$", shown, re.MULTILINE))
    lines = [line for line in shown.splitlines() if line.startswith("epoch ")]
    assert len(lines) == 3
    assert all(IN_LINES[method] in line and ("sparsity" in line) == (method == "rigl") for line in lines)
    assert "sparsity/total" in metrics
    if method == "rigl":
        assert table["sparsity"].startswith("0.89")
        assert "parameters" not in table
        return
    assert not any("sparsity" in label for label in table)
    left, dense = int(metrics["slim/parameters"]), 64 * 24 + 24 + 24 * 10 + 10
    assert left < dense
    assert table["parameters"] == f"{left:,} of {dense:,}  ({100 * left / dense:.1f} %)"
    flops, whole = int(metrics["slim/flops"]), 2 * 24 * (64 + 10)
    assert table["FLOPs of one sample"] == f"{flops:,} of {whole:,}  ({100 * flops / whole:.1f} %)"
    kept = 24 - int(metrics["slim/removed"])
    assert table["model.1"] == f"{kept} of 24 units"
    assert metrics[f"{method}/parameters"] == pytest.approx(left / dense)
    assert metrics[f"{method}/flops"] == pytest.approx(flops / whole)
    # the plan, the proof of slimming and the table name a layer alike
    assert re.search(r"^model\.1 +24 ", shown, re.MULTILINE)
    last = float(lines[-1].rpartition(IN_LINES[method])[2])
    if method == "l0":
        assert "expected density" in table
        assert last == pytest.approx(metrics["l0/expected/total"], abs=1e-4)
        assert re.fullmatch(r"\d+ of 64 units", table["inputs of model.1"])
    else:
        assert table["budget"].endswith("(at most 0.5)")
        assert last == pytest.approx(left / dense, abs=1e-4)


def test_of_single_weights_the_sparsity_says_what_is_left() -> None:
    methods: list[Any] = [RigL(0.9), ConstrainedL0(unit="weight")]
    assert [(bar_figures(method), units_left(method)) for method in methods] == [({}, None), ({}, None)]
