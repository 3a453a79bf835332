"""The plan: a table worked by hand, equal to what training then does, printed once."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import loader
from support.nets import Regression, mlp
from support.rig import fit_steps
from torch import nn

from sparse_callbacks import GMP, SET, SNFS, RigL, Static
from sparse_callbacks.core.plan import Plan, Row, plan_rows
from sparse_callbacks.core.selection import Entry
from sparse_callbacks.testing.runs import trainer_for


class Net(nn.Module):
    """20 + 30 + 12 sparse weights beside 8 + 10 + 3 + 4 others."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2, 4)
        self.first = nn.Linear(4, 5)
        self.norm = nn.LayerNorm(5)
        self.second = nn.Linear(5, 6, bias=False)
        self.frozen = nn.Linear(1, 3, bias=False).requires_grad_(False)
        self.third = nn.Linear(6, 2)


TABLE = """\
Static: sparsity 0.75
parameter       shape  weights  sparsity  zeros  why dense
--------------  -----  -------  --------  -----  -------------------------------------------------------
table.weight    2x4          8     dense         embedding: sparse only where include= names it
first.weight    5x4         20    0.7500     15
first.bias      5            5     dense         bias
norm.weight     5            5     dense         norm
norm.bias       5            5     dense         norm
second.weight   6x5         30    0.7333     22
frozen.weight   3x1          3     dense         dense until it is trained: frozen (requires_grad=False)
third.weight    2x6         12    0.7500      9
third.bias      2            2     dense         bias
--------------  -----  -------  --------  -----  -------------------------------------------------------
sparsity/total              62    0.7419     46
sparsity/model              90    0.5111"""


def test_the_table_is_the_one_worked_by_hand() -> None:
    assert str(Static(0.75, distribution="uniform").plan(Net())) == TABLE


def test_rows_tell_shape_size_target_and_reason() -> None:
    plan = Static(0.75, distribution={"third*": 0.0, "*": "uniform"}).plan(Net())
    assert len(plan) == 9 == len(list(plan))
    assert plan["second.weight"] == Row("second.weight", (6, 5), 30, 22, "")
    assert plan["second.weight"].sparsity == 22 / 30
    assert plan["third.weight"] == Row("third.weight", (2, 6), 12, 0, "dense by the distribution")
    assert plan.selected == {"first.weight", "second.weight", "third.weight"}
    assert plan.total == 37 / 62
    assert plan.model == 37 / 90


@pytest.mark.parametrize(("sparsity", "zeros"), [(0.59, 59), (0.599, 59), (0.6, 60)])
def test_counts_are_rounded_down(sparsity: float, zeros: int) -> None:
    assert Static(sparsity, distribution="uniform").plan(mlp(10, 10))["0.weight"].zeros == zeros


def test_an_unknown_row_is_refused_with_the_known_ones() -> None:
    with pytest.raises(KeyError, match=r"'fc' is not a parameter of the model\. Known: 0\.weight, 0\.bias"):
        Static(0.5).plan(mlp(3, 4))["fc"]


def test_scalars_and_empty_parameters_have_rows() -> None:
    rows = plan_rows([Entry("scale", 1, (), reason="other"), Entry("none", 0, (0, 3), reason="empty")], {})
    text = str(Plan("title", rows, frozenset()))
    assert "scale           scalar        1     dense         other" in text
    assert rows[1].sparsity == 0.0
    assert Plan("title", rows, frozenset()).total == 0.0


def test_a_plan_needs_a_model() -> None:
    with pytest.raises(
        ValueError, match=r"plan\(\) knows no model yet\. Give one, plan\(model\), or call it after fit has started"
    ):
        RigL(0.9).plan()


def test_asking_for_the_plan_of_another_model_leaves_the_callback_as_it_was(tmp_path: Path) -> None:
    callback = RigL(0.5, every=2, stop=6)
    callback.plan(mlp(3, 4, 5))
    fit_steps(tmp_path, callback, Regression(), 8)
    before = str(callback.plan())
    callback.plan(mlp(3, 4, 5))
    assert str(callback.plan()) == before
    assert callback.masks.keys() == {"net.0.weight", "net.2.weight"}


KERNELS = {"net.0.weight", "net.2.weight", "net.4.weight"}


@pytest.mark.combinations
@pytest.mark.parametrize("make", [RigL, SET, SNFS, Static, GMP], ids=lambda m: m.__name__)
@pytest.mark.parametrize(
    "distribution", ["uniform", "erdos_renyi", "erdos_renyi_kernel", {"net.0*": 0.9, "*": 0.3}], ids=str
)
def test_training_ends_with_exactly_the_planned_zeros(make: Any, distribution: Any, tmp_path: Path) -> None:
    times = {} if make is Static else {"every": 3, "stop": 8}
    callback = make(0.7, distribution=distribution, print_plan=False, **times)
    module = Regression(mlp(12, 9, 7, 6))
    announced = callback.plan(module)
    fit_steps(tmp_path, callback, module, 13)
    plan = callback.plan()
    assert plan.rows == announced.rows
    measured = callback.measured_sparsity()
    assert measured["sparsity/total"] == pytest.approx(plan.total, abs=1e-15)
    assert measured["sparsity/model"] == pytest.approx(plan.model, abs=1e-15)
    assert measured.keys() == {"sparsity/total", "sparsity/model", *(f"sparsity/{n}" for n in KERNELS)}
    for name, mask in callback.masks.items():
        assert mask.dtype == torch.bool
        assert mask.shape == module.get_parameter(name).shape
        assert int((~mask).sum()) == plan[name].zeros
        assert measured[f"sparsity/{name}"] == pytest.approx(plan[name].sparsity, abs=1e-15)


def test_measured_sparsity_counts_grown_weights_that_are_still_zero(tmp_path: Path) -> None:
    callback = RigL(0.5, distribution="uniform", every=1, stop=10, drop_fraction="constant(0.9)")
    module = Regression()
    fit_steps(tmp_path, callback, module, 1)  # the very first step is an update
    assert callback.updates == 1
    assert callback.measured_sparsity()["sparsity/total"] == 0.5
    zeros = sum(int((module.get_parameter(n) == 0).sum()) for n in callback.masks)
    assert zeros > 180 == sum(m.numel() for m in callback.masks.values()) / 2


@pytest.mark.parametrize("entry", ["fit", "validate"])
def test_the_plan_is_printed_once_at_the_start_of_fit(
    entry: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    callback = Static(0.5)
    module = Regression()
    if entry == "fit":
        fit_steps(tmp_path, callback, module, 6)
    else:
        module.validation_step = lambda batch, batch_idx: None
        trainer_for(callback, tmp_path).validate(module, loader(2), verbose=False)
    printed = capsys.readouterr().out
    assert printed.count("Static: sparsity 0.5") == printed.count("sparsity/total") == (entry == "fit")
    if entry == "fit":
        assert str(callback.plan()) in printed


def test_the_plan_can_be_switched_off(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fit_steps(tmp_path, Static(0.5, print_plan=False), Regression(), 2)
    assert "sparsity" not in capsys.readouterr().out


def test_only_the_first_rank_prints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = trainer_for(Static(0.5), tmp_path, max_steps=1)
    monkeypatch.setattr(type(made), "is_global_zero", property(lambda _: False))
    made.fit(Regression(), loader(1))
    assert "sparsity/total" not in capsys.readouterr().out
