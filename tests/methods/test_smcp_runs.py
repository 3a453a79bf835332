"""SMCP in a run: resume, several optimizers, figures, and what is refused."""

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.inside import owners_of_groups
from support.smcp import conv_net, method, mlp
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_callbacks import SMCP
from sparse_callbacks.channels.latency.table import Grid, Table
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.methods.channels import allocation
from sparse_callbacks.testing.comparison import assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize(("after", "scaling"), [(1, None), (6, None), (8, "kept"), (14, "importance"), (15, None)])
def test_resume_is_bitwise(after: int, scaling: str | None, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == after:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    one, other = method(0.4, norm_scaling=scaling), method(0.4, norm_scaling=scaling)
    module, resumed = Classifier(conv_net(), "adamw"), Classifier(conv_net(7), "adamw")
    expected = snapshot(fit(module, one, Save()), module, one)
    assert differences(expected, snapshot(fit(resumed, other, ckpt_path=tmp_path / "run.ckpt"), resumed, other)) == []
    torch.load(tmp_path / "run.ckpt", weights_only=True)


def test_several_optimizers_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    solves: list[list[int]] = []
    allocate = allocation.allocate

    def record(network: Any, options: Any, *rest: Any) -> Any:
        solves.append([len(o) for o in options])
        return allocate(network, options, *rest)

    monkeypatch.setattr(allocation, "allocate", record)

    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__(conv_net())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            parts = [list(self.net[:4].parameters()), list(self.net[4:].parameters())]
            return [torch.optim.SGD(p, lr=0.05) for p in parts]

    def check(*_: Any) -> None:
        assert_effective(module, callback)
        if last := callback.progress.done.get(1):  # in the batch in which both have had their solve
            assert callback.figures()["smcp/cost"] <= callback.share_at(last) + 1e-9

    callback, module = method(0.4), Two()
    fit(module, callback, watch(check))
    assert callback.at_target
    assert owners_of_groups(callback) == [0, 1]  # the first group is read by layers of both
    assert callback.left_out["net.0"] == "net.3.one.weight, net.6.weight are in several optimizers"
    assert callback.network.realised(callback.kept) <= 0.4 * callback.network.dense
    # one solve of the whole network for each time, and one of what the first optimizer has left
    assert solves == [[4, 6], [1, 6]] * (len(solves) // 2)


def test_a_second_fit_goes_on_with_the_masks() -> None:
    callback, module = method(0.4), Classifier(conv_net())
    fit(module, callback)
    masks = callback.masks
    fit(module, callback)
    assert differences(masks, callback.masks) == []


def test_the_figures_of_a_solve(tmp_path: Path) -> None:
    callback = method(0.4)
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(Classifier(conv_net()), callback, logger=logger, log_every_n_steps=1000)
    rows = [r for r in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines() if r]
    *_, final, end = [dict(zip(rows[0].split(","), r.split(","), strict=True)) for r in rows[1:]]
    assert (final["step"], end["step"], end["smcp/gap"]) == ("13", "15", "")
    assert end["smcp/cost"] == final["smcp/cost"]
    assert float(final["smcp/cost"]) == pytest.approx(callback.network.realised(callback.kept) / callback.network.dense)
    assert float(final["smcp/share"]) == 0.4
    assert float(final["smcp/gap"]) == 0.0
    assert [float(final[f"smcp/kept/{g.name}"]) for g in callback.groups] == callback.kept


def test_the_example_comes_from_the_module_or_from_its_data() -> None:
    module = Classifier(conv_net())
    module.example_input_array = torch.zeros(3, 2, 5, 5)
    ours, given = method(), method()
    fit(module, given)
    fit(Classifier(conv_net()), ours)
    assert differences(ours.masks, given.masks) == []


def test_an_example_of_another_precision_is_converted() -> None:
    module, callback = Classifier(conv_net()), method(0.5)
    module.example_input_array = torch.zeros(2, 2, 5, 5)
    fit(module, callback, precision="64-true", loader=None, enable_model_summary=False)
    assert module.net[0].weight.dtype == torch.float64
    assert callback.at_target


@pytest.mark.parametrize("compiled", ["module", "net"])
def test_compiled_modules_are_looked_at_too(compiled: str) -> None:
    module, callback = Classifier(conv_net()), method(0.5)
    if compiled == "net":
        module.net.compile(backend="eager")
        fit(module, callback)
    else:
        fit(torch.compile(module, backend="eager"), callback)
    assert {g.name for g in callback.groups} == {"net.0", "net.3.one", "net.6"}
    small, proof = slim(module, callback.masks, torch.randn(3, 2, 5, 5))
    assert proof.removed == sum(g.size for g in callback.groups) - sum(callback.kept)
    assert small(torch.randn(3, 2, 5, 5)).shape == (3, 4)


def test_a_run_that_ends_before_its_last_solve_says_so() -> None:
    callback = method(0.4)
    with pytest.warns(
        UserWarning, match=r"SMCP ended at 0\.\d+ of the dense FLOPs, before the solve for its budget of 0\.4: 8 steps"
    ):
        fit(Classifier(conv_net()), callback, max_epochs=1)
    assert not callback.at_target


def test_the_plan_names_the_budget() -> None:
    plan = method(0.4, cost="parameters").plan(conv_net())
    assert str(plan).startswith("SMCP: 0.4 of the parameters")
    assert {r.zeros for r in plan if r.name in plan.selected} == {None}


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, r"budget=0\.0 is out of range\. Give a number above 0 and below 1"),
        ({"budget": 1.0}, "budget=1.0 is out of"),
        ({"budget": True}, "budget=True is out of"),
        ({"budget": "half"}, "budget='half' is out of"),
        ({"decay": -1.0}, r"decay=-1\.0 is out of range"),
        ({"decay": float("nan")}, "decay=nan is out of range"),
        ({"hysteresis": 0.0}, r"hysteresis=0\.0 is not a factor on scores.*Give a number above 0 and at most 1"),
        ({"hysteresis": 1.5}, r"hysteresis=1\.5 is not a factor"),
        ({"hysteresis": "half"}, "hysteresis='half' is not a factor.*Give a number above 0 and at most 1"),
        ({"hysteresis": float("nan")}, "hysteresis=nan is not a factor.*Give a number above 0"),
        ({"criterion": "l1"}, r"criterion= is not an argument of SMCP\. It takes budget=, cost=, importance="),
        ({"round_to": 0}, r"round_to=0 is not a number of channels\. Give a whole"),
        ({"chunk": 1.5}, "chunk=1.5 is not a number of channels"),
        ({"importance": "l2"}, r"importance='l2' is not known\. Give 'taylor' or 'magnitude'"),
        ({"curve": "cubic"}, r"curve='cubic' is not known\. Give 'exp' or 'linear' or 'exp2'"),
        (
            {"cost": "latency"},
            r"cost='latency' is not known\. Give 'parameters', 'flops' or the path of a latency table",
        ),
        ({"sparsity": 0.9}, r"sparsity= is not an argument of SMCP.*Give budget="),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        SMCP(**arguments)


def test_a_budget_that_no_network_meets_is_refused_with_the_smallest_one() -> None:
    module = Classifier(conv_net())
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"budget=0\.01 of the FLOPs cannot be met.*Give budget=0\.\d+ or more, or a small"
    ) as error:
        fit(module, method(0.01))
    assert differences(before, dict(module.state_dict())) == []
    dense = float(re.search(r"costs \S+ of (\S+)\. ", str(error.value))[1])  # type: ignore[index]
    with FlopCounterMode(display=False) as counter:
        module(torch.zeros(1, 2, 5, 5))
    assert dense == pytest.approx(counter.get_total_flops(), rel=1e-5)
    feasible = float(str(error.value).split("Give budget=")[1].split(" ")[0])
    callback = method(feasible)
    fit(module, callback)
    assert callback.kept == [4, 4, 4]


def test_a_chunk_that_divides_no_group_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"chunk=3 does not divide the units of net.1 \(16\)\. Give a chunk that divides all of them"
    ):
        fit(Classifier(mlp()), method(chunk=3))


def test_what_can_go_and_why_the_rest_stays_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Classifier(conv_net()), method(0.8, prune_stem=False, print_plan=True), max_steps=1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "net.3.one 16 4, 8, ... 16 net.6 24 4, 8, ... 24 net.10 stay these are outputs of the network" in shown
    assert "net.0 stay net.0 is the stem" in shown
    assert re.search(r"With the fewest channels 0\.\d{4} of the FLOPs are left\.", shown)
    assert "net.0.weight 16x2x3x3 288 budget" in shown


def test_a_model_without_channels_to_remove_is_refused() -> None:
    with pytest.raises(
        ValueError,
        match=r"no channels can be removed from this model: outputs of net\.1: .* or use a method that prunes",
    ):
        fit(Classifier(nn.Sequential(nn.Flatten(), nn.Linear(50, 4))), method())


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    Table({"model": "other", "input": [2, 5, 5]}, {}).save(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"the latency table of other \(input \[2, 5, 5\]\) does not cover net\.0"):
        fit(Classifier(conv_net()), method(cost=str(tmp_path / "t.json")))


def test_a_table_of_another_network_of_the_same_layers_is_refused(tmp_path: Path) -> None:
    net = mlp()
    grids = {"linear map 1": Grid([1, 12, 16, 50], [1, 12, 16, 50], [[1.0 + i for _ in range(4)] for i in range(4)])}
    for layer_sum, fits in ((6.0, False), (4.0 + 3.0 + 2.0, True)):  # of inputs 50, 16 and 12
        Table({"model": "m:net", "model_ms_by_table": layer_sum}, grids).save(tmp_path / "t.json")
        callback = method(0.8, cost=str(tmp_path / "t.json"), round_to=1)
        if fits:
            fit(Classifier(net), callback)
        else:
            with pytest.raises(
                ValueError, match=r"is the table of another model: m:net comes to 6 ms by it, and this one to 9 ms"
            ):
                fit(Classifier(net), callback)


def test_data_that_gives_no_example_is_refused() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Batches().all(1))

    with pytest.raises(
        ValueError, match=r"with one sample.*this is a DataLoader over an IterableDataset\. Set example_input_array"
    ):
        fit(Classifier(conv_net()), method(), loader=torch.utils.data.DataLoader(Stream(), batch_size=None))
