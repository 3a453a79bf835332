"""Calibration in a Trainer: the loss of training_step without logs, manual optimization, precision, and two processes."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from support import calibrated_ranks
from support.calibrated_ranks import RUNS, data, train
from support.processes import run_processes
from support.smcp import conv_net
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from sparse_callbacks import ChannelPruning
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Classifier
from sparse_callbacks.testing.runs import Stops, fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Calibrates(pl.Callback):
    """Computes losses when training starts, or before a batch."""

    def __init__(self, callback: ChannelPruning, at: int | None = None, **options: Any) -> None:
        self.callback, self.at, self.options = callback, at, options
        self.losses: list[float] = []
        self.samples: list[Any] = []

    def compute(self) -> None:
        with self.callback.host.calibration(2, **self.options).losses(order=2) as losses:
            for batch in losses:
                self.losses.append(float(batch.loss))
                self.samples.append(batch.samples)

    def on_train_start(self, *_: Any) -> None:
        if self.at is None:
            self.compute()

    def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, index: int) -> None:
        if index == self.at:
            self.compute()


def method(criterion: str = "l1", **options: Any) -> ChannelPruning:
    given = {"round_to": 1, "print_plan": False, "start": 1, "stop": 7, "every": 2} | options
    return ChannelPruning(0.6, criterion=criterion, **given)


def loader(**options: Any) -> DataLoader:
    return DataLoader(data(), **({"batch_size": 8, "shuffle": True} | options))


def run(module: pl.LightningModule, *more: Any, callback: Any = None, **options: Any) -> Calibrates:
    callback = callback or method()
    calibrates = Calibrates(callback, **options.pop("calibrate", {}))
    given = options.pop("loader", None) or loader()
    fit(module, callback, calibrates, *more, loader=given, max_epochs=1, **options)
    return calibrates


class Logging(Classifier):
    """Logs in every way that a training_step may, and calls a batch index odd that is not its epoch's."""

    def __init__(self) -> None:
        super().__init__(conv_net())
        self.kinds: list[str] = []
        self.calls = 0

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        loss = self.loss(batch)
        self.calls += 1
        self.kinds.append(type(self.logger).__name__)
        self.log("loss", loss, on_step=True, on_epoch=True, prog_bar=True)
        self.log_dict({"twice": 2 * loss})
        if self.logger is not None:
            self.logger.log_metrics({"direct": float(loss)}, step=999)
            self.logger.experiment.anything(batch_idx)
        return {"loss": loss, "batch": batch_idx}


class Recording(CSVLogger):
    """Keeps what it is given."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.given: list[Any] = []

    def log_metrics(self, metrics: Any, step: Any = None) -> None:
        self.given.append((metrics, step))

    @property
    def experiment(self) -> Any:
        return type("Experiment", (), {"anything": lambda _, index: self.given.append(index), "save": lambda _: None})()


def test_nothing_is_logged_and_the_loss_of_a_mapping_is_found(tmp_path: Path) -> None:
    plain, logged = Recording(tmp_path), Recording(tmp_path)
    torch.manual_seed(0)
    without = Logging()
    fit(without, method(), loader=loader(), max_epochs=1, logger=plain)
    torch.manual_seed(0)
    module = Logging()
    calibrates = run(module, logger=logged, calibrate={"at": 3})
    assert module.calls == without.calls + 2
    assert calibrates.samples == [8, 8]
    assert module.kinds.count("DummyLogger") == 2
    assert str(plain.given) == str(logged.given)  # the training is the same to the last digit too
    assert len(logged.given) > 8


def test_a_module_without_a_logger() -> None:
    module = Logging()
    run(module)
    assert set(module.kinds) == {"NoneType"}


class NoIndex(Classifier):
    def training_step(self, batch: Any) -> Tensor:
        return self.loss(batch)


def test_training_steps_without_an_index() -> None:
    assert len(run(NoIndex(conv_net())).losses) == 2


def test_manual_optimization_needs_a_loss() -> None:
    for criterion in ("taylor_2017", "sosp"):
        with pytest.raises(
            ValueError,
            match=r"ByHand is in manual optimization, where training_step takes steps of its own\. Give loss=",
        ):
            run(ByHand(conv_net()), callback=method(criterion))


def test_manual_optimization_with_a_loss() -> None:
    given = {"loss": lambda module, batch: module.loss(batch)}
    module = ByHand(conv_net())
    callback = method("taylor_2017", batches=2, **given)
    assert len(run(module, callback=callback, calibrate=given).losses) == 2
    assert callback.at_target


class Fetches(Classifier):
    """Fetches its batches by itself."""

    def training_step(self, dataloader_iter: Any) -> Any:
        return self.loss(next(dataloader_iter)[0])


def test_a_step_that_fetches_its_batches_needs_a_loss() -> None:
    with pytest.raises(ValueError, match=r"Fetches\.training_step fetches its own from dataloader_iter\. Give loss="):
        run(Fetches(conv_net()), callback=method("sosp", stop=3))


class Skips(Classifier):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Fails(Classifier):
    """Looks at outputs that there are in train mode only."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if not self.training:
            raise AttributeError("no auxiliary logits")
        return self.loss(batch)


def test_a_step_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match=r"a scalar, and a NoneType came in its place\. Give loss="):
        run(Skips(conv_net()), callback=method("sosp"))


def test_a_step_that_fails_says_why_it_was_called() -> None:
    with pytest.raises(ValueError, match="no auxiliary logits") as caught:
        run(Fails(conv_net()), callback=method("sosp"))
    [note] = caught.value.__cause__.__notes__
    assert "Fails.training_step was called in eval mode" in note
    assert "Give loss=" in note


class Stream(IterableDataset):
    def __iter__(self) -> Any:
        return iter(list(data()))

    def __len__(self) -> int:
        return 64


def test_streams_need_batches() -> None:
    stream = DataLoader(Stream(), batch_size=8)
    module = Classifier(conv_net())
    module.example_input_array = torch.zeros(1, 2, 5, 5)
    with pytest.raises(ValueError, match=r"over an IterableDataset\. Give batches=, a list or loader"):
        run(module, loader=stream, callback=method("taylor_2017"))
    given = DataLoader(data(1), batch_size=16)
    callback = method("taylor_2017", batches=given)
    fit(module, callback, loader=stream, max_epochs=1)
    assert callback.at_target


def test_autocast_is_off_and_inputs_are_those_of_training() -> None:
    seen: list[tuple[torch.dtype, bool]] = []

    class Typed(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            seen.append((self.net(batch[0]).dtype, self.net[0].weight.dtype == batch[0].dtype))
            return self.loss(batch)

    run(Typed(conv_net()), precision="bf16-mixed")
    assert seen[:2] == [(torch.float32, True)] * 2
    assert seen[2][0] == torch.bfloat16
    seen.clear()
    run(Typed(conv_net()), precision="64-true")
    assert seen[:2] == [(torch.float64, True)] * 2


# ---------------------------------------------------------------------- in a run


@pytest.mark.parametrize("name", RUNS)
def test_runs_under_accumulation_meet_the_budget_and_leave_no_trace(name: str) -> None:
    found = train(name, 0, 1, **RUNS[name])
    assert differences(found["masks"][0], found["masks"][-1])
    values, same, size = found["scores"][0]
    assert len(values) == 2
    assert same
    assert size > 0  # a window was open


@pytest.mark.parametrize("name", ["taylor_2017", "sosp"])
def test_a_run_goes_on_in_the_middle_of_a_ramp(name: str, tmp_path: Path) -> None:
    whole, resumed = (method(name, batches=2, start=1, stop=7, every=2) for _ in range(2))
    stops = Stops(tmp_path, (4,))
    for callback, more, options in ((whole, [stops], {}), (resumed, [], {"ckpt_path": stops.path(4)})):
        module = Classifier(conv_net())
        module.example_input_array = torch.zeros(1, 2, 5, 5)
        torch.manual_seed(len(more))
        fit(module, callback, *more, loader=Batches(), max_epochs=1, **options)
    assert whole.updates > 2
    assert differences(whole.masks, resumed.masks) == []
    assert differences(whole.model.state_dict(), resumed.model.state_dict()) == []


def test_ispasp_before_the_first_step_says_what_goes_by_l1(caplog: pytest.LogCaptureFixture) -> None:
    callback = ChannelPruning(
        0.6,
        criterion="ispasp",
        ranking="layer",
        start=0,
        stop=0,
        batches=2,
        round_to=1,
        prune_stem=True,
        print_plan=False,
    )
    with caplog.at_level("INFO"):
        fit(Classifier(conv_net()), callback, loader=loader(), max_epochs=1)
    texts = [r.message for r in caplog.records if "criterion='ispasp'" in r.message]
    assert len(texts) == 1
    assert "By l1 go those of net.0 (2 layers make these channels" in texts[0]
    assert callback.at_target


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ranking": "knapsack", "start": 0, "stop": 0}, r"ranking='knapsack' cannot be used with criterion='ispasp'"),
        ({"ranking": "layer", "start": 1, "stop": 5}, r"criterion='ispasp' prunes once"),
    ],
)
def test_ispasp_is_for_equal_shares_at_once(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelPruning(0.5, criterion="ispasp", **options)


def test_two_processes_score_on_the_same_batches(tmp_path: Path) -> None:
    first, second = run_processes("calibrated", tmp_path, 2, calibrated_ranks.__file__)
    for name in RUNS:
        assert differences(first[name]["masks"], second[name]["masks"]) == []
        assert differences(first[name]["masks"][0], first[name]["masks"][-1])
        for mine, other in zip(first[name]["scores"], second[name]["scores"], strict=True):
            assert mine[0] == other[0]  # losses on the batches of the first process
            assert mine[1]
            assert other[1]
