"""SparsityReport: a fit is recorded whatever else its Trainer does, and the record goes on where the fit is resumed."""

import pickle
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, EarlyStopping, LearningRateMonitor
from pytorch_lightning.loggers import CSVLogger
from support import recorded_processes
from support.processes import run_processes
from support.recorded import recorded
from support.recorded_processes import Net, rigl, samples
from torch import Tensor

from sparse_callbacks import GMP, SET, SparsityReport, Static
from sparse_callbacks.core.record.record_file import RecordedRun, has_record, read_record
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.runs import Stops, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore")

FORWARD, DENSE = 110, 1089  # multiply-adds of a forward pass at sparsity 0.9, and of the dense network


class Numbers(Batches):
    """Batches of 8 of so many samples, the last of what is left, whose position is resumed."""

    def __init__(self, number: int) -> None:
        super().__init__(-(-number // 8), 8)
        self.x, self.y = torch.randn(number, 21, generator=torch.Generator().manual_seed(0)), torch.zeros(number)


def report(folder: Path | None, **options: Any) -> SparsityReport:
    return SparsityReport(folder, **({"every": 4, "page": False} | options))


def fit(folder: Path, *callbacks: pl.Callback, module: Any = None, number: int = 97, **options: Any) -> RecordedRun:
    """The record of a fit of two epochs of 13 batches, the last of a single sample."""
    ckpt_path = options.pop("ckpt_path", None)
    trainer = trainer_for(list(callbacks), folder, **options)
    trainer.fit(
        module or Net(), Numbers(number), samples(16), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None
    )
    return read_record(folder)


def timeless(found: RecordedRun) -> list[dict[str, Any]]:
    return [{key: value for key, value in row.items() if key != "seconds"} for row in found.rows]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> RecordedRun:
    """The record of a fit without a stop."""
    folder = tmp_path_factory.mktemp("whole")
    return fit(folder, rigl(), report(folder, title="a title"))


# ---------------------------------------------------------------------- what is recorded


def test_a_fit_is_recorded(whole: RecordedRun) -> None:
    events = [(row["step"], row["event"]) for row in whole.rows]
    assert (events[0], events[-1]) == ((0, "start"), (26, "end"))
    assert {(13, "validation"), (26, "validation"), (16, "log"), (4, "update")} <= set(events)
    last = whole.rows[-1]
    assert (last["samples"], last["epoch"], last["lr"]) == (2 * 97, 2.0, 0.05)
    assert last["flops/training_dense"] == 2 * 2 * 97 * 3 * DENSE
    said = whole.run
    assert (said.method, said.status, said.length, said.batch, said.title) == ("RigL", "finished", 26, 8, "a title")
    assert said.chain == ["net.0.weight", "net.2.weight"]
    assert {layer.name for layer in said.layers if layer.sparse} == {"net.0.weight", "net.2.weight"}
    assert set(whole.masks) == {"net.0.weight", "net.2.weight"}
    assert "pytorch-lightning" in said.libraries


@pytest.mark.parametrize("first", [True, False])
def test_warnings_are_recorded_wherever_the_callback_stands(tmp_path: Path, first: bool) -> None:
    method, recorded = GMP(0.9, stop=50, print_plan=False), report(tmp_path)
    ordered = [recorded, method] if first else [method, recorded]
    warnings = fit(tmp_path, *ordered).run.warnings
    assert [text.partition(":")[0] for text in warnings] == ["doctor/short_run"]


def test_metrics_of_a_validation_are_in_its_row_and_at_the_end(whole: RecordedRun) -> None:
    with_loss = [row["event"] for row in whole.rows if "val/loss" in row]
    assert with_loss == ["validation", "validation", "end"]
    assert all("train/loss" in row for row in whole.rows if row["event"] in ("log", "update"))


class Scheduled(Net):
    """Whose learning rate is another one in each step, and those of its two groups too."""

    groups = 1

    def configure_optimizers(self) -> Any:
        weights = list(self.parameters())
        halves = [weights] if self.groups == 1 else [weights[:2], weights[2:]]
        optimizer = torch.optim.SGD([{"params": p, "lr": 0.1 * 10**i} for i, p in enumerate(halves)], 0.1)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize("method", [rigl, None])
@pytest.mark.parametrize("monitored", [True, False])
def test_the_learning_rate_of_a_row_is_that_of_its_own_step(tmp_path: Path, method: Any, monitored: bool) -> None:
    """A monitor logs it every few steps, and when a batch is over the schedule has gone on."""
    monitors = [LearningRateMonitor(logging_interval="step")] if monitored else []
    callbacks = [report(tmp_path), *monitors, *([method()] if method else [])]
    found = fit(tmp_path, *callbacks, module=Scheduled(), logger=CSVLogger(tmp_path), log_every_n_steps=7)
    name = "lr-SGD" if monitored else "lr"
    rates = {row["step"]: row[name] for row in found.rows if name in row}
    assert len(rates) > 5
    assert rates == {step: pytest.approx(0.1 / step) for step in rates}


def test_each_group_has_its_own_rate_and_other_figures_of_a_monitor_stay(tmp_path: Path) -> None:
    module = Scheduled()
    module.groups = 2
    monitor = LearningRateMonitor(logging_interval="step", log_momentum=True)
    found = fit(tmp_path, report(tmp_path), monitor, module=module, logger=CSVLogger(tmp_path), log_every_n_steps=7)
    rows = [row for row in found.rows if "lr-SGD/pg1" in row]
    assert len(rows) > 5
    for row in rows:
        assert (row["lr-SGD/pg1"], row["lr-SGD/pg2"]) == (
            pytest.approx(0.1 / row["step"]),
            pytest.approx(1 / row["step"]),
        )
    momenta = {value for row in rows for name, value in row.items() if "momentum" in name}
    assert momenta == {0.0}


def test_its_place_among_callbacks_does_not_matter(whole: RecordedRun, tmp_path: Path) -> None:
    assert timeless(fit(tmp_path, report(tmp_path), rigl())) == timeless(whole)


def test_a_dense_fit_is_recorded_too(tmp_path: Path) -> None:
    found = fit(tmp_path, report(tmp_path))
    assert (found.run.method, found.run.plan, found.masks) == ("dense", "", {})
    assert [layer.positions for layer in found.run.layers] == [1, 0, 1, 0]
    last = found.rows[-1]
    assert last["flops/training"] == last["flops/training_dense"] == 2 * 2 * 97 * 3 * DENSE
    assert last["sparsity/model"] == 0.0
    assert last["active/mean"] == DENSE + 33 + 12
    assert "topology/churn" not in last


def test_several_callbacks_have_one_record(tmp_path: Path) -> None:
    first = SET(0.9, every=2, distribution="uniform", include="net.0*", print_plan=False)
    second = Static(0.9, distribution="uniform", include="net.2*", print_plan=False)
    found = fit(tmp_path, first, report(tmp_path), second)
    assert found.run.method == "SET + Static"
    assert found.run.arguments["1.sparsity"] == "0.9"
    assert found.rows[-1]["flops/training"] == 2 * 2 * 97 * 3 * FORWARD
    assert set(found.rows[-1]["layers"]) == {"net.0.weight", "net.2.weight"}
    assert found.run.chain == ["net.0.weight", "net.2.weight"]


@pytest.mark.parametrize("accumulate", [1, 3])
def test_accumulated_batches_are_one_step(tmp_path: Path, accumulate: int) -> None:
    method = Static(0.9, distribution="uniform", print_plan=False)
    found = fit(tmp_path, method, report(tmp_path), accumulate_grad_batches=accumulate)
    assert found.rows[-1]["step"] == 2 * -(-13 // accumulate)
    assert found.rows[-1]["samples"] == 2 * 97
    assert found.rows[-1]["flops/training"] == 2 * 2 * 97 * 3 * FORWARD
    assert found.run.batch == 8 * accumulate


class TwoByHand(Net):
    """Manual optimization with two optimizers, the second of which steps in every other batch."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:  # type: ignore[override]
        first, second = self.optimizers()  # type: ignore[misc]
        self.manual_backward(self.net(batch[0]).square().mean())
        first.step()
        if batch_idx % 2 == 0:
            second.step()
            second.zero_grad()
        first.zero_grad()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(layer.parameters(), lr=0.01) for layer in (self.net[0], self.net[2])]


def test_manual_optimization_charges_each_batch_once(tmp_path: Path) -> None:
    method = Static(0.9, distribution="uniform", print_plan=False)
    last = fit(tmp_path, method, report(tmp_path), module=TwoByHand()).rows[-1]
    assert last["samples"] == 2 * 97
    assert last["flops/training"] == 2 * 2 * 97 * 3 * FORWARD
    assert last["step"] == 2 * (13 + 7)  # as Lightning counts


class Thaws(BaseFinetuning):
    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, train_bn=False)


def test_a_layer_that_joins_is_counted_from_then_on(tmp_path: Path) -> None:
    class Partly(Net):
        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(filter(lambda p: p.requires_grad, self.parameters()), lr=0.01)

    method = GMP(0.9, distribution="uniform", every=1, stop=4, print_plan=False)
    found = fit(tmp_path, method, report(tmp_path), Thaws(), module=Partly())
    layers = {layer.name: layer.sparse for layer in found.run.layers}
    assert layers["net.0.weight"]
    at_epoch = next(row for row in found.rows if row["event"] == "validation")
    # frozen in the first epoch: its forward pass is made, and no gradient
    dense = 97 * (693 + 3 * 396)
    assert at_epoch["flops/training"] < 2 * dense
    assert found.rows[-1]["flops/inference"] == 2 * FORWARD
    added = found.rows[-1]["flops/training"] - at_epoch["flops/training"]
    assert added == 2 * 97 * 3 * FORWARD


def test_early_ends_are_ends(tmp_path: Path) -> None:
    stopping = EarlyStopping("val/loss", min_delta=1e9, patience=1)
    found = fit(tmp_path, Static(0.9, print_plan=False), report(tmp_path), stopping, max_epochs=9)
    assert (found.run.status, found.rows[-1]["event"]) == ("finished", "end")
    assert found.rows[-1]["step"] == 26
    assert found.run.length == 9 * 13


# ---------------------------------------------------------------------- what is not recorded


def test_a_trial_run_is_not_recorded(tmp_path: Path) -> None:
    trainer = trainer_for([Static(0.9, print_plan=False), report(tmp_path)], tmp_path, fast_dev_run=True)
    trainer.fit(Net(), samples(), samples())
    assert not has_record(tmp_path)


def test_validation_and_test_without_a_fit_are_not_recorded(tmp_path: Path) -> None:
    trainer = trainer_for([report(tmp_path)], tmp_path)
    trainer.validate(Net(), samples(), verbose=False)
    assert not has_record(tmp_path)


@pytest.mark.parametrize("kind", ["rate", "batch"])
def test_the_trials_of_a_tuner_are_not_recorded(tmp_path: Path, kind: str) -> None:
    class Tuned(Net):
        def __init__(self) -> None:
            super().__init__()
            self.lr, self.batch_size = 0.05, 8

        def train_dataloader(self) -> Any:
            return samples(97, self.batch_size)

    module = Tuned()
    trainer = trainer_for(
        [Static(0.9, distribution="uniform", print_plan=False), report(tmp_path)], tmp_path, max_epochs=1
    )
    trainer.limit_val_batches = 0
    tuner = pl.tuner.Tuner(trainer)
    if kind == "rate":
        tuner.lr_find(module, num_training=5)
    else:
        tuner.scale_batch_size(module, max_trials=1, steps_per_trial=1, init_val=8)
    assert not has_record(tmp_path)
    trainer.fit(module)
    found = read_record(tmp_path)
    assert found.rows[0]["step"] == 0
    assert found.rows[-1]["flops/training"] == 2 * 97 * 3 * FORWARD


def test_only_training_is_counted(tmp_path: Path) -> None:
    found = fit(
        tmp_path, Static(0.9, distribution="uniform", print_plan=False), report(tmp_path), num_sanity_val_steps=2
    )
    assert found.rows[0]["event"] == "start"
    assert found.rows[-1]["samples"] == 2 * 97


# ---------------------------------------------------------------------- resume and errors


@pytest.mark.combinations
@pytest.mark.parametrize("stop", [3, 11, 17])
@pytest.mark.parametrize("first", [True, False])
def test_a_resumed_record_is_that_of_a_fit_without_a_stop(
    whole: RecordedRun, tmp_path: Path, stop: int, first: bool
) -> None:
    class KilledError(Exception):
        pass

    class Kill(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == stop + 2:
                raise KilledError

    stops = Stops(tmp_path, after=(stop,))
    # whoever saves checkpoints may stand before the report or behind it
    ordered = [stops, rigl(), report(tmp_path)] if first else [rigl(), report(tmp_path), stops]
    with pytest.raises(KilledError):
        fit(tmp_path, *ordered, Kill())
    assert read_record(tmp_path).run.status == "failed"
    again = fit(tmp_path, rigl(), report(tmp_path), ckpt_path=stops.path(stop))
    assert again.run.status == "finished"
    for one, other in zip(timeless(again), timeless(whole), strict=True):
        assert one == other


def test_a_resumed_record_goes_on_in_another_folder(whole: RecordedRun, tmp_path: Path) -> None:
    stops = Stops(tmp_path, after=(10,))
    fit(tmp_path / "a", rigl(), report(tmp_path / "a"), stops, max_steps=12)
    again = fit(tmp_path / "b", rigl(), report(tmp_path / "b"), ckpt_path=stops.path(10))
    assert [row["step"] for row in again.rows] == [row["step"] for row in whole.rows]
    assert again.rows[-1]["flops/training"] == whole.rows[-1]["flops/training"]
    assert read_record(tmp_path / "a").rows[-1]["step"] == 12  # as it was


def test_a_window_that_a_checkpoint_splits_is_counted_whole(tmp_path: Path) -> None:
    stops = Stops(tmp_path, after=(8,))
    whole = fit(tmp_path / "a", rigl(), report(tmp_path / "a"), stops, accumulate_grad_batches=3)
    again = fit(tmp_path / "b", rigl(), report(tmp_path / "b"), ckpt_path=stops.path(8), accumulate_grad_batches=3)
    assert timeless(again) == timeless(whole)


def test_a_resumed_fit_that_nobody_had_recorded_begins_at_its_step(tmp_path: Path) -> None:
    stops = Stops(tmp_path, after=(10,))
    trainer_for([rigl(), stops], tmp_path, max_epochs=1).fit(Net(), Numbers(97), samples(16))
    found = fit(tmp_path / "a", rigl(), report(tmp_path / "a"), ckpt_path=stops.path(10))
    assert (found.rows[0]["step"], found.rows[0]["event"]) == (10, "start")
    assert found.rows[-1]["step"] == 26
    assert found.rows[-1]["samples"] == 8 + 8 + 1 + 97


def test_a_second_fit_of_a_trainer_goes_on(tmp_path: Path) -> None:
    trainer, module = trainer_for([Static(0.9, print_plan=False), report(tmp_path)], tmp_path, max_epochs=1), Net()
    trainer.fit(module, samples(97), samples(16))
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, samples(97), samples(16))
    found = read_record(tmp_path)
    assert found.rows[-1]["samples"] == 2 * 97
    assert [row["event"] for row in found.rows].count("start") == 1


def test_another_fit_in_the_same_folder_replaces_the_record(tmp_path: Path) -> None:
    fit(tmp_path, rigl(), report(tmp_path))
    found = fit(tmp_path, report(tmp_path), max_epochs=1)
    assert (found.run.method, found.masks, found.rows[-1]["samples"]) == ("dense", {}, 97)


@pytest.mark.parametrize(("error", "status"), [(ValueError, "failed"), (KeyboardInterrupt, "stopped")])
def test_an_error_leaves_the_rows_so_far(tmp_path: Path, error: type[BaseException], status: str) -> None:
    class Raises(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 6:
                raise error
            return super().training_step(batch, batch_idx)

    with pytest.raises((ValueError, SystemExit, KeyboardInterrupt)):
        fit(tmp_path, rigl(), report(tmp_path), module=Raises())
    found = read_record(tmp_path)
    assert found.run.status == status
    assert found.rows[-1]["step"] == 4


def test_a_state_of_a_later_version_is_refused() -> None:
    with pytest.raises(ValueError, match="later version"):
        report(None).load_state_dict({"version": 99})


def test_a_dense_run_without_a_record_is_refused_before_the_first_batch(tmp_path: Path) -> None:
    module = Net()
    with pytest.raises(FileNotFoundError, match=r"dense=.* holds no record"):
        fit(tmp_path, report(tmp_path, dense=tmp_path / "dense"), module=module)
    assert not has_record(tmp_path)


@pytest.mark.parametrize(
    ("every", "error", "words"),
    [
        (0, ValueError, r"every=0 is not a number of optimizer steps"),
        (-1, ValueError, r"every=-1 is not a number of optimizer steps"),
        (True, TypeError, r"every=True is not .* Give a whole number or None"),
        (2.5, TypeError, r"every=2\.5 is not .* Give a whole number or None"),
    ],
)
def test_an_interval_is_a_number_of_steps(every: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SparsityReport(every=every)


# ---------------------------------------------------------------------- folder and page


def test_without_a_folder_it_is_that_of_the_logger(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="name", version=3)
    callback = report(None)
    trainer_for([callback], tmp_path / "root", logger=logger, max_steps=2).fit(Net(), samples())
    assert callback.folder == tmp_path / "name" / "version_3"
    assert has_record(callback.folder)
    callback = report(None)
    trainer_for([callback], tmp_path / "root", max_steps=2).fit(Net(), samples())
    assert callback.folder == tmp_path / "root"


def test_the_page_is_written_when_the_fit_is_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[tuple[Path, Path | None, str]] = []

    def write(folder: Path, dense: Path | None) -> Path:
        written.append((folder, dense, read_record(folder).run.status))
        return folder / "report.html"

    monkeypatch.setattr("sparse_callbacks.core.record.page.write_page", write)
    monkeypatch.setattr("sparse_callbacks.lightning.sparsity_report.why_no_page", lambda: "")
    recorded(tmp_path / "dense", method="dense")
    fit(tmp_path, report(tmp_path, page=True, dense=tmp_path / "dense"), max_epochs=1)
    assert written == [(tmp_path, tmp_path / "dense", "finished")]


def test_a_missing_extra_is_said_at_the_start_and_the_run_is_recorded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.warns(UserWarning, match=r"sparse-callbacks\[report\]") as caught:
        found = fit(tmp_path, report(tmp_path, page=True), max_epochs=1)
    assert len([w for w in caught if "[report]" in str(w.message)]) == 1
    assert found.run.status == "finished"
    assert not (tmp_path / "report.html").exists()


def test_results_are_added_after_the_fit(tmp_path: Path) -> None:
    callback = report(tmp_path, configuration={"a": {"b": (1, float("nan"))}}, command="python x.py")
    found = fit(tmp_path, Static(0.9, print_plan=False), callback, max_epochs=1)
    assert (found.run.configuration, found.run.command) == ({"a": {"b": [1, "nan"]}}, "python x.py")
    callback.add(results={"test/acc": 0.5})
    found = read_record(tmp_path)
    assert (found.run.results, found.run.status) == ({"test/acc": 0.5}, "finished")


def test_samples_that_no_tensor_tells_are_counted_by_batches(tmp_path: Path) -> None:
    class Texts(Net):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.net(torch.ones(2, 21)).square().mean()

    texts = torch.utils.data.DataLoader(["a", "b", "c", "d"], batch_size=2)
    trainer = trainer_for([report(tmp_path)], tmp_path, max_epochs=1)
    with pytest.warns(UserWarning, match="counts each batch as one sample"):
        trainer.fit(Texts(), texts)
    assert read_record(tmp_path).rows[-1]["samples"] == 2


# ---------------------------------------------------------------------- processes


def test_two_processes_have_one_record(tmp_path: Path) -> None:
    run_processes("ddp", tmp_path, script=recorded_processes.__file__)
    found = read_record(tmp_path)
    last = found.rows[-1]
    assert (last["step"], last["samples"]) == (6, 2 * recorded_processes.SAMPLES)
    assert found.run.machine["processes"] == "2"
    assert found.run.batch == 16
    assert last["flops/training_dense"] == 2 * 2 * recorded_processes.SAMPLES * 3 * DENSE
    steps = [row["step"] for row in found.rows]
    assert steps == sorted(steps)
    state = torch.load(tmp_path / "4.ckpt", weights_only=True)["callbacks"]
    saved = next(value for key, value in state.items() if "SparsityReport" in key)
    assert saved["account"]["samples"] == recorded_processes.SAMPLES + 16


def test_the_callback_reaches_processes_that_a_trainer_starts(tmp_path: Path) -> None:
    callback = report(tmp_path)
    fit(tmp_path, callback, max_epochs=1)
    copy = pickle.loads(pickle.dumps(callback))
    assert (copy.folder, copy.is_recorded) == (tmp_path, False)
