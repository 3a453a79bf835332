"""CurvatureMonitor: figures beside brute force, in every way to train, and nothing left of a measurement."""

import copy
import math
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.curvature import radii
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.plugins import MixedPrecision
from support import curvature_ranks
from support.curvature_ranks import COSTS, Rows
from support.data import loader
from support.nets import Regression
from support.processes import run_processes
from support.sam import ClosureTwice
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sparse_callbacks import CurvatureMonitor, ParallelGaP, RigL, SparsityReport, Static
from sparse_callbacks.core.record.record_file import read_record
from sparse_callbacks.core.watched_layers import watchable_layers
from sparse_callbacks.testing.comparison import differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Classifier, conv_net
from sparse_callbacks.testing.runs import Stops, fit, trainer_for, watch

EXACT: dict[str, Any] = {"iterations": 1000, "tolerance": 0.0}
ROUNDING = 1e-5


class Expected(pl.Callback):
    """Brute force over the network and batch of each micro-batch, before the pass."""

    def __init__(self, **options: Any) -> None:
        self.found: list[dict[str, float]] = []
        self.options = options

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        net = copy.deepcopy(module.net)
        layers = {f"net.{name}": some for name, some in watchable_layers(net).items()}
        layers = {n: some for n, some in layers.items() if some[0].weight.requires_grad}

        def loss() -> Tensor:
            return nn.functional.cross_entropy(net(batch[0].to(next(net.parameters()).dtype)), batch[1])

        self.found.append(radii(layers, loss, len(batch[0]), **self.options))


def double() -> Classifier:
    return Classifier(conv_net().double())


def with_max(found: dict[str, float]) -> Any:
    return pytest.approx(found | {"max": max(found.values())}, rel=ROUNDING)


# ---------------------------------------------------------------------- figures


def test_a_network_without_a_figure_is_told_of() -> None:
    module = Classifier()
    for layer in (0, 4, 7):
        module.net[layer].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match=r"no figure for net\.0\.weight, net\.4\.weight, net\.7\.weight: frozen, "):
        fit(module, CurvatureMonitor(every=2), max_epochs=1)


@pytest.mark.parametrize("sparse", [True, False])
def test_every_third_step_has_the_radii_of_its_batch(sparse: bool) -> None:
    """Under masks, of the masked network, and beside the figures of the method."""
    method = [RigL(0.5, every=2, stop=8, print_plan=False)] if sparse else []
    rows, expected, monitor = Rows(), Expected(), CurvatureMonitor(every=3, **EXACT)
    fit(double(), *method, expected, monitor, logger=rows, max_epochs=2, log_every_n_steps=3)
    found = rows.curvature()
    assert list(found) == [0, 3, 6, 9, 12, 15]
    for step, row in found.items():
        assert row == with_max(expected.found[step])
        assert row.keys() == {"net.0.weight", "net.4.weight", "net.7.weight", "max"}
        assert rows.rows[step]["epoch"] == step // 8
        assert rows.rows[step].keys() >= COSTS
        assert rows.rows[step]["curvature/milliseconds"] > 0
        assert rows.rows[step]["curvature/share_of_step"] > 0
    assert monitor.radii == {name: value for name, value in found[15].items() if name != "max"}
    if sparse:
        assert "sparsity/net.4.weight" in rows.rows[0]


def test_the_csv_logger_has_them(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Classifier(), CurvatureMonitor(every=4), logger=logger, max_epochs=1)
    header = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"curvature/net.4.weight", "curvature/max", *COSTS} <= {*header}


def test_of_accumulated_batches_the_first_of_the_step_is_measured() -> None:
    """Lightning divides its loss by their number."""
    rows, expected = Rows(), Expected()
    fit(double(), expected, CurvatureMonitor(every=2, **EXACT), logger=rows, accumulate_grad_batches=3, max_epochs=1)
    found = rows.curvature()
    assert list(found) == [0, 2]  # of steps 0, 1 and 2, the last of two batches
    for step, row in found.items():
        assert row == with_max(expected.found[3 * step])


class Summed(Classifier):
    def loss(self, batch: Any) -> Tensor:
        return len(batch[0]) * super().loss(batch)


def test_a_loss_that_is_a_sum() -> None:
    found = []
    for module, reduction in ((Classifier(conv_net().double()), "mean"), (Summed(conv_net().double()), "sum")):
        rows = Rows()
        fit(module, CurvatureMonitor(reduction=reduction, **EXACT), logger=rows, max_steps=1)
        found.append(rows.curvature()[0])
    assert found[0] == pytest.approx(found[1], rel=ROUNDING)


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_in_half_precision_gradients_are_unscaled(precision: Any) -> None:
    def found(**options: Any) -> Any:
        rows = Rows()
        fit(Classifier(), CurvatureMonitor(every=2), logger=rows, max_epochs=1, **options)
        return rows.curvature()

    scaler = torch.amp.GradScaler("cpu", init_scale=4096.0)
    fp16 = precision == "16-mixed"
    options = {"plugins": [MixedPrecision(precision, "cpu", scaler=scaler)]} if fp16 else {"precision": precision}
    half, whole = found(**options), found()
    assert list(half) == list(whole) == [0, 2, 4, 6]
    assert half[0] == pytest.approx(whole[0], rel=0.02 if fp16 else 0.2)


def test_a_skipped_step_has_no_figures_and_the_next_one_has() -> None:
    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (math.inf if batch_idx == 2 else 1.0)

    rows, scaler = Rows(), torch.amp.GradScaler("cpu", init_scale=256.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(Overflows(), CurvatureMonitor(every=2), logger=rows, plugins=plugin, max_epochs=1)
    assert not [w for w in warned if "no figure" in str(w.message)]
    assert list(rows.curvature()) == [0, 4, 6]


def test_manual_optimization() -> None:
    rows, expected = Rows(), Expected()
    module = ByHand(conv_net().double())
    fit(module, expected, CurvatureMonitor(every=2, **EXACT), logger=rows, max_epochs=1)
    found = rows.curvature()
    assert list(found) == [0, 2, 4, 6]
    for step, row in found.items():
        assert row == with_max(expected.found[step])


class Raw(ByHand):
    """A backward pass that Lightning does not announce, then another one."""

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.loss(batch).backward()
        optimizer.step()


def test_a_backward_pass_without_a_hook() -> None:
    rows, expected = Rows(), Expected()
    fit(Raw(conv_net().double()), expected, CurvatureMonitor(every=4, **EXACT), logger=rows, max_epochs=1)
    assert rows.curvature()[4] == with_max(expected.found[4])


def test_of_an_optimizer_of_two_passes_the_first_pass_is_measured() -> None:
    """At the weights themselves, and not where it has moved them for the second one."""

    class Sharp(Classifier):
        def configure_optimizers(self) -> Any:
            return ClosureTwice(self.parameters(), rho=0.5, lr=0.05)

    rows, expected = Rows(), Expected()
    fit(Sharp(conv_net().double()), expected, CurvatureMonitor(every=4, **EXACT), logger=rows, max_epochs=1)
    found = rows.curvature()
    assert list(found) == [0, 4]
    for step, row in found.items():
        assert row == with_max(expected.found[step])


def test_two_processes_log_the_mean_of_what_each_measures(tmp_path: Path) -> None:
    ranks = run_processes("", tmp_path, script=curvature_ranks.__file__)
    first, second = (rank["own"] for rank in ranks)
    assert first.keys() == second.keys()
    assert len(first) == 3
    assert first != second
    mean = {name: (first[name] + second[name]) / 2 for name in first}
    assert ranks[0]["logged"] == pytest.approx(mean | {"max": max(mean.values())}, rel=ROUNDING)
    assert ranks[0]["radii"] == ranks[1]["radii"] == pytest.approx(mean, rel=ROUNDING)


# ---------------------------------------------------------------------- layers


def test_globs_choose_layers_and_what_has_no_figure_is_said_once() -> None:
    rows, module = Rows(), Classifier()
    module.net[4].weight.requires_grad_(False)
    with pytest.warns(UserWarning, match="no figure for net.4.weight: frozen, ") as warned:
        fit(module, CurvatureMonitor(every=2, include=["net.[04]*"]), logger=rows, max_epochs=1)
    assert len([w for w in warned if "no figure" in str(w.message)]) == 1
    assert rows.curvature()[2].keys() == {"net.0.weight", "max"}
    rows = Rows()
    fit(Classifier(), CurvatureMonitor(exclude="net.7.*"), logger=rows, max_steps=1)
    assert rows.curvature()[0].keys() == {"net.0.weight", "net.4.weight", "max"}


def test_a_transformer_and_batches_of_a_class_of_their_own() -> None:
    """Its samples are counted by the inputs of the layers."""

    class Tokens(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks = nn.TransformerEncoderLayer(10, 2, 12, dropout=0.0, batch_first=True)
            self.head = nn.Linear(10, 4)
            self.double()

        def forward(self, x: Tensor) -> Any:
            return self.head(self.blocks(x.flatten(1).unflatten(1, (5, 10))).mean(1))

    class Own:
        def __init__(self, x: Tensor, y: Tensor) -> None:
            self.pair = (x, y)

        def __getitem__(self, i: int) -> Tensor:
            return self.pair[i]

    rows, expected, batches = Rows(), Expected(), Batches(size=3)
    own = [Own(x, y) for x, y in batches.all(1)]
    module = Classifier(Tokens())
    module.loss = lambda batch: nn.functional.cross_entropy(module.net(batch[0].double()), batch[1])  # type: ignore[method-assign]
    data: Any = DataLoader(own, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        fit(module, expected, CurvatureMonitor(**EXACT), loader=data, logger=rows, max_steps=1)
    assert not [w for w in warned if "no figure" in str(w.message)]
    names = {"net.blocks.linear1.weight", "net.blocks.linear2.weight", "net.head.weight"}
    assert rows.curvature()[0].keys() == names | {"max"}
    assert rows.curvature()[0] == with_max(expected.found[0])


def test_a_layer_that_is_thawed_has_figures_from_then_on() -> None:
    rows, module = Rows(), Classifier()
    module.net[0].requires_grad_(False)
    thaw = watch(lambda trainer, module, batch: module.net[0].requires_grad_(batch >= 3) and None)
    fit(module, thaw, CurvatureMonitor(every=2), logger=rows, max_epochs=1)
    assert {step: "net.0.weight" in row for step, row in rows.curvature().items()} == {
        0: False,
        2: False,
        4: True,
        6: True,
    }


def test_layers_that_hold_live_weights_alone() -> None:
    rows: list[Rows] = []
    for storage in ("masked", "sparse"):
        rows.append(Rows())
        module = Classifier(conv_net().double())
        static = Static(0.5, storage=storage, include=["net.4.weight"], print_plan=False)
        fit(module, static, CurvatureMonitor(**EXACT), logger=rows[-1], max_steps=1)
    assert rows[1].curvature()[0] == pytest.approx(rows[0].curvature()[0], rel=ROUNDING)


# ---------------------------------------------------------------------- nothing is left


@pytest.mark.parametrize("options", [{}, {"precision": "bf16-mixed"}, {"accumulate_grad_batches": 2}])
def test_the_network_trains_as_without_the_callback(options: Any) -> None:
    ends = []
    for monitors in ([], [CurvatureMonitor(every=2)]):
        torch.manual_seed(0)
        module, method = Classifier(), RigL(0.5, every=2, stop=8, print_plan=False)
        module.net.insert(3, nn.Dropout(0.5))
        ends.append(snapshot(fit(module, method, *monitors, **options), module, method))
    assert differences(*ends) == []


def test_no_hook_is_there_in_other_steps_and_none_after_the_backward_pass() -> None:
    seen: list[bool] = []

    class Looks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append(any(m._forward_hooks for m in self.modules()))
            return super().training_step(batch, batch_idx)

        def on_after_backward(self) -> None:
            assert not any(m._forward_hooks for m in self.modules())

    fit(Looks(), CurvatureMonitor(every=4))
    assert seen == [True, False, False, False] * 4


def test_an_error_in_a_measured_step_leaves_no_hook() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            super().training_step(batch, batch_idx)
            raise KeyError("mine")

    module, monitor = Fails(), CurvatureMonitor()
    with pytest.raises(KeyError, match="mine"):
        fit(module, monitor)
    assert not any(m._forward_hooks for m in module.modules())
    fit(Classifier(), monitor, max_steps=1)  # the next fit of the same callback measures
    assert len(monitor.radii) == 3


def test_a_measured_batch_that_the_module_leaves_out_is_followed_by_another() -> None:
    class Leaves(Classifier):
        def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
            return -1 if batch_idx == 2 else None

    rows, module = Rows(), Leaves()
    fit(module, CurvatureMonitor(every=2), logger=rows, max_epochs=3)
    assert list(rows.curvature()) == [0, 2, 4]
    assert not any(m._forward_hooks for m in module.modules())


def test_a_compiled_model_is_compiled_once() -> None:
    compiled = []

    def backend(graph: Any, inputs: Any) -> Any:
        compiled.append(graph)
        return graph.forward

    torch._dynamo.reset()
    module, rows = Classifier(), Rows()
    module.net = torch.compile(module.net, backend=backend)
    fit(module, CurvatureMonitor(every=3), logger=rows, max_epochs=2)
    assert list(rows.curvature()) == [0, 3, 6, 9, 12, 15]
    assert rows.curvature()[3].keys() == {f"net._orig_mod.{i}.weight" for i in (0, 4, 7)} | {"max"}
    assert len(compiled) == 1


def test_a_resumed_fit_measures_the_same_steps(tmp_path: Path) -> None:
    whole, rest = Rows(), Rows()
    stops = Stops(tmp_path, after=(7,))
    fit(double(), CurvatureMonitor(every=3, **EXACT), stops, logger=whole)
    fit(double(), CurvatureMonitor(every=3, **EXACT), logger=rest, ckpt_path=stops.path(7))
    assert rest.curvature() == {s: r for s, r in whole.curvature().items() if s >= 7}


def test_it_can_be_copied_and_sent_to_a_process() -> None:
    monitor = pickle.loads(pickle.dumps(CurvatureMonitor(every=7)))
    states: list[Any] = []

    class Looks(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            states.append(monitor.__getstate__())
            return super().training_step(batch, batch_idx)

    fit(Looks(), monitor, max_steps=1)
    assert len(monitor.radii) == 3
    assert (states[0]["every"], states[0]["_watched"], states[0]["_layers"]) == (7, None, {})
    copied = CurvatureMonitor()
    vars(copied).update(states[0])
    fit(Classifier(), copied, max_steps=1)
    assert copied.radii == pytest.approx(monitor.radii)


def test_a_record_finds_the_same_chain(tmp_path: Path) -> None:
    chains = []
    for i, monitors in enumerate(([], [CurvatureMonitor()])):
        report = SparsityReport(tmp_path / str(i), page=False)
        trainer = trainer_for([*monitors, Static(0.5, print_plan=False), report], tmp_path, max_steps=2)
        trainer.fit(Regression(), loader(2))
        chains.append(read_record(tmp_path / str(i)).run.chain)
    assert chains == [["net.0.weight", "net.2.weight"]] * 2


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"every": 0}, "every=0 is out of range"),
        ({"iterations": 0}, "iterations=0 is out of range"),
        ({"tolerance": 2.0}, "tolerance=2.0 is out of range"),
        ({"include": []}, r"include=\[\] is neither a glob nor a list of globs"),
    ],
)
def test_refused_arguments(options: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        CurvatureMonitor(**options)


def test_an_argument_of_another_type_is_refused() -> None:
    with pytest.raises(TypeError, match=r"every='x' is not of a type that CurvatureMonitor takes. Give a whole number"):
        CurvatureMonitor(every="x")  # type: ignore[arg-type]


def test_a_glob_without_a_layer_is_refused_before_the_first_batch() -> None:
    module = Classifier()
    with pytest.raises(ValueError, match=r"include='net.1.\*' matches the weight of no linear layer"):
        fit(module, CurvatureMonitor(include="net.1.*"))
    assert not any(m._forward_hooks for m in module.modules())


def test_strategies_and_methods_that_cannot_be_measured_are_refused() -> None:
    class FSDPStrategy(pl.strategies.SingleDeviceStrategy):
        pass

    trainer = trainer_for(CurvatureMonitor(), strategy=FSDPStrategy("cpu"))
    with pytest.raises(ValueError, match="CurvatureMonitor under FSDPStrategy: layers may see parts"):
        trainer.fit(Classifier(), Batches())
    with pytest.raises(ValueError, match="CurvatureMonitor beside ParallelGaP: several networks train there"):
        fit(Classifier(), ParallelGaP(0.5, partitions=2), CurvatureMonitor())
