"""The table of optimizers in docs/optimizers.md: every optimizer that a package exports, tried."""

import importlib.metadata
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.optimizers import DecaysAlways
from torch import Tensor

from sparse_callbacks.core import optimizer_needs
from sparse_callbacks.core.fresh_state import FreshState

ROOT = Path(__file__).parents[1]
sys.path.append(str(ROOT / "benchmarks"))
import optimizers as table  # noqa: E402

WRITTEN = table.read((ROOT / "docs/optimizers.md").read_text())
# behind the marker, so that a run without it imports none of these packages
OTHERS = [name for name in table.PACKAGES if name != "torch"]


def kinds(text: str) -> list[str]:
    """The outcomes in a row, without the reasons, whose words are torch's or another package's of today."""
    return re.findall(r"\bright\b|refused|left out|wrong", text)


@pytest.mark.parametrize("name", table.classes("torch.optim"))
def test_every_optimizer_of_torch_is_right_or_refused_as_the_table_says(name: str) -> None:
    found = table.row(name, table.outcomes(getattr(torch.optim, name)))
    assert "wrong" not in kinds(found), found
    assert kinds(found) == kinds(WRITTEN["torch"][name]), f"{found}: run python benchmarks/optimizers.py torch"


@pytest.mark.third_party
@pytest.mark.parametrize("package", OTHERS)
def test_every_optimizer_of_another_package_is_right_or_refused_as_the_table_says(package: str) -> None:
    pytest.importorskip(table.PACKAGES[package].partition(".")[0])
    found = {n: table.row(n, table.outcomes(kind)) for n, kind in table.classes(table.PACKAGES[package]).items()}
    assert [row for row in found.values() if "wrong" in kinds(row)] == []
    version = f"Version {importlib.metadata.version(package)}:"
    if version in (ROOT / "docs/optimizers.md").read_text():
        assert {n: kinds(row) for n, row in found.items()} == {n: kinds(row) for n, row in WRITTEN[package].items()}


def test_the_table_has_no_row_of_what_is_silently_wrong() -> None:
    assert WRITTEN.keys() == table.PACKAGES.keys()
    assert [name for rows in WRITTEN.values() for name, text in rows.items() if "wrong" in kinds(text)] == []
    assert all(text for rows in WRITTEN.values() for text in rows.values())


# ---------------------------------------------------------------------- the trials find what is wrong


def test_a_trial_finds_state_that_is_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    def zero(self: Any, parameter: Tensor, where: Tensor, is_zero: bool = False) -> None:
        for value in self._optimizer.state[parameter].values():
            if value.shape == parameter.shape:
                value.masked_fill_(where, 0)

    monkeypatch.setattr(FreshState, "write", zero)
    assert table.outcomes(torch.optim.Rprop)["SET"] == "wrong: grown weights do not move"


def test_a_trial_finds_state_that_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    class Momentum(torch.optim.SGD):
        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=1e-3, momentum=0.99)

        def step(self, closure: Any = None) -> Any:
            for p in self.param_groups[0]["params"]:
                if "momentum_buffer" in self.state[p]:
                    self.state[p]["momentum_buffer"][p == 0] = 100.0  # what fresh state is to clear
            return super().step(closure)

    assert table.outcomes(Momentum)["SET"].startswith("refused: the first step of a new weight is")
    monkeypatch.setattr(optimizer_needs, "rehearse_growth", lambda *_: None)
    assert table.outcomes(Momentum)["SET"].startswith("wrong: the first step of grown weights is")


def test_a_trial_finds_what_moves_in_a_replaced_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizer_needs, "refuse_replaced_steps", lambda *_: None)
    assert table.outcomes(DecaysAlways)["RigL"] == "wrong: weights move in a replaced step"


def test_a_trial_leaves_out_what_does_not_train_without_us() -> None:
    class Fails(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            raise RuntimeError("no such device")

    assert table.outcomes(Fails) == {"": "left out: its step, without us too: RuntimeError: no such device"}
