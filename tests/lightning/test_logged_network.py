"""What loggers get of a network at the end of its run, and of the run's record while it lasts."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from support.data import loader
from support.nets import Regression, mlp
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from sparse_callbacks import SET, RigL, SparsityReport, Static
from sparse_callbacks.lightning import sparsity_report
from sparse_callbacks.lightning.logged_network import COLUMNS, layers_of, log_network
from sparse_callbacks.testing.runs import trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


def trained(callbacks: Any, net: nn.Module | None = None, data: Any = None, **options: Any) -> Any:
    trainer = trainer_for(callbacks, **({"max_epochs": 1} | options))
    trainer.fit(Regression(net), loader(6) if data is None else data)
    return trainer


def board(logger: TensorBoardLogger) -> EventAccumulator:
    logger.experiment.flush()
    read = EventAccumulator(logger.log_dir, size_guidance={"scalars": 0})
    read.Reload()
    return read


@pytest.mark.parametrize("storage", ["masked", "sparse"])
def test_layers_have_their_active_weights_and_the_inputs_of_each_output(storage: str) -> None:
    method = SET(0.5, distribution="uniform", every=2, stop=6, storage=storage, print_plan=False)
    trained(method, mlp(12, 20, 6))
    for layer in layers_of([method]):
        mask = method.masks[layer.name]
        weight = method.model.get_submodule(layer.name.removesuffix(".weight")).weight.detach()
        assert torch.equal(layer.values.sort().values, weight[mask].sort().values)
        assert layer.fan_in.tolist() == mask.sum(1).tolist()
        row = dict(zip(COLUMNS, layer.row(), strict=True))
        assert (row["weights"], row["active"], row["target"]) == (mask.numel(), int(mask.sum()), 0.5)
        counts = sorted(mask.sum(1).tolist())
        middle = (counts[(len(counts) - 1) // 2] + counts[len(counts) // 2]) / 2
        assert (row["fewest inputs"], row["median"], row["most"]) == (counts[0], middle, counts[-1])
        assert row["without inputs"] == counts.count(0)


def test_inputs_of_a_convolution_are_channels() -> None:
    net = nn.Sequential(nn.Unflatten(1, (3, 2, 2)), nn.Conv2d(3, 4, 2), nn.Flatten(), nn.Linear(4, 6))
    method = Static(0.5, distribution="uniform", include="net.1.weight", print_plan=False)
    trained(method, net)
    (layer,) = layers_of([method])
    assert (layer.name, layer.shape) == ("net.1.weight", (4, 3, 2, 2))
    assert layer.fan_in.tolist() == method.masks["net.1.weight"].flatten(2).any(2).sum(1).tolist()


def test_several_callbacks_are_one_network_and_other_loggers_are_passed_over(tmp_path: Path) -> None:
    pair = [
        Static(0.5, include="net.0*", print_plan=False),
        SET(0.75, include="net.2*", every=3, stop=5, print_plan=False),
    ]
    trained(pair)
    shown, passed = TensorBoardLogger(tmp_path), CSVLogger(tmp_path / "csv")
    log_network([passed, shown], pair, 6)
    read = board(shown)
    assert read.Tags()["histograms"] == [f"{kind}/net.{i}.weight" for i in (0, 2) for kind in ("weights", "fan_in")]
    assert not passed.experiment.metrics
    assert read.Histograms("weights/net.2.weight")[0].step == 6


def test_a_dense_run_shows_nothing(tmp_path: Path) -> None:
    log_network([TensorBoardLogger(tmp_path)], [], 6)
    assert not list(tmp_path.rglob("events*"))


class Kept(CSVLogger):
    """Keeps the rows in the order in which they came."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.rows.append((step, dict(metrics)))

    def of(self, key: str) -> Sequence[tuple[int | None, float]]:
        return [(step, row[key]) for step, row in self.rows if key in row]


def test_loggers_get_what_the_record_says_besides_metrics(tmp_path: Path) -> None:
    kept = Kept(tmp_path)
    callbacks = [RigL(0.5, every=4, stop=20, print_plan=False), SparsityReport(tmp_path / "run", page=False)]
    trained(callbacks, logger=kept, log_every_n_steps=2, max_epochs=2)
    training = kept.of("flops/training")
    # rows of Lightning and of the callback are at 1, 3, ...; updates at 0, 5 and 10; the last step has the end too
    due = [step for step, _ in kept.of("sparsity/total")]
    assert {step for step, _ in training} <= set(due)
    assert {1, 3, 7, 9, 11} <= {step for step, _ in training}
    assert [value for _, value in training] == sorted(value for _, value in training)
    assert training[0][1] > 0
    assert training[-1][0] == 11
    assert kept.of("topology/churn")
    assert kept.of("bytes/masks")
    for step, row in kept.rows:
        assert step is not None
        assert row["epoch"] == step // 6
        if "flops/training" in row:
            assert not {"lr", "sparsity/total", "event", "step", "layers"} & row.keys()


@pytest.mark.parametrize("page", [True, False])
def test_the_report_shows_its_end_in_loggers_where_it_writes_the_page(
    page: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sparsity_report, "page_or_warning", lambda *_: None)  # drawing takes seconds
    logger = TensorBoardLogger(tmp_path)
    trained([Static(0.5, print_plan=False), SparsityReport(tmp_path / "run", page=page)], logger=logger)
    assert bool(board(logger).Tags()["histograms"]) is page
