"""Every preset runs shortened, by `trainer.limit_train_batches=10` or fewer epochs, on data that stands in for its files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from sparse_callbacks.core.calendar import RunLength
from sparse_callbacks.tasks import build
from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.data.loaders import Samples
from sparse_callbacks.tasks.data.module import ImageData, MemoryData
from sparse_callbacks.tasks.resolvers import epochs_as_share

Compose = Callable[..., DictConfig]
CONF = Path(__file__).parents[2] / "conf"
PRESETS = [path.stem for path in sorted((CONF / "experiment").glob("*.yaml"))]
# the networks for CIFAR-10 take images of any size
SHAPES = {"cifar10": (3, 8, 8), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28)}
SHAPES_BY_MAKER = {"digits": (1, 8, 8), "image_folder": (3, 32, 32)}
WHOLE = 352  # batches of a whole epoch, more than any number that is cut to 10


class BegunError(Exception):
    """The first batch has come, so nothing was refused."""


def stand_in(shape: tuple[int, ...], batch_size: int) -> MemoryData:
    source = torch.Generator().manual_seed(0)
    count = 12 * batch_size
    everything = Samples(torch.rand(count, *shape, generator=source), torch.arange(count) % 10)
    few = everything.take(torch.arange(20))
    kind = ImageData if len(shape) == 3 else MemoryData
    return kind(everything, few, few, num_classes=10, batch_size=batch_size)


@pytest.fixture
def preset(composed: Compose, tmp_path: Path) -> Compose:
    """The configuration of a preset by its name and further overrides."""

    def make(name: str, *overrides: str) -> DictConfig:
        quiet = ("logger=[]", "report=false", "trainer.enable_progress_bar=false", f"output_dir={tmp_path}")
        if "two_jobs" in (CONF / f"experiment/{name}.yaml").read_text():
            # one job of those that run beside each other, and the dense network that it begins with is not there
            overrides = ("hydra/launcher=basic", "initial_weights=null", *overrides)
        if name == "my_photos":  # a download, which no test waits for
            overrides = ("model.pretrained=false", *overrides)
        return composed(f"experiment={name}", *quiet, *overrides)

    return make


def use_stand_in(monkeypatch: pytest.MonkeyPatch, cfg: DictConfig) -> None:
    import train

    shape = SHAPES.get(str(cfg.data.get("name")), (500,))
    shape = next((given for maker, given in SHAPES_BY_MAKER.items() if maker in cfg.data._target_), shape)
    data = stand_in(shape, cfg.data.batch_size)
    monkeypatch.setattr(train.run_data, "build_data", lambda cfg: data)


@pytest.mark.combinations
@pytest.mark.parametrize("epochs", [None, 1, 2])
@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_with_ten_batches_an_epoch_begins(
    name: str, epochs: int | None, preset: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    fewer = () if epochs is None else (f"trainer.max_epochs={epochs}",)
    cfg = preset(name, "trainer.limit_train_batches=10", "data.batch_size=8", *fewer)
    use_stand_in(monkeypatch, cfg)

    def begun(self: Classifier, batch: Any, batch_idx: int) -> None:
        raise BegunError

    monkeypatch.setattr(Classifier, "training_step", begun)
    with pytest.raises(BegunError):
        train.train(cfg)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", [name for name in PRESETS if name != "my_photos"])  # tests/tasks/test_my_photos.py
def test_a_preset_runs_to_its_end_in_three_epochs_of_ten_batches(
    name: str, preset: Compose, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    cfg = preset(name, "trainer.limit_train_batches=10", "trainer.max_epochs=3", "data.batch_size=2")
    if "hidden" in cfg.model:
        cfg.model.hidden = [60 for _ in cfg.model.hidden]  # in place of thousands
    use_stand_in(monkeypatch, cfg)
    metrics = train.train(cfg)
    assert (metrics["epochs"], metrics["steps"]) == (3, 30)
    assert "test/acc" in metrics
    method: Any = build.build_method(cfg)
    moves = getattr(method, "start", None) is not None
    assert (metrics["updates"] > 0) == moves
    if moves and method.plans_counts and "epsilon" not in str(method.distribution):
        assert metrics["sparsity/total"] > 0.8  # at its target, although the run was short


@pytest.mark.combinations
@pytest.mark.parametrize("epochs", ["its own", 10])
@pytest.mark.parametrize("name", PRESETS)
def test_a_shortened_preset_is_a_small_copy_of_the_whole_one(name: str, epochs: Any, preset: Compose) -> None:
    """Updates begin and end, and the learning rate falls, at the same shares of the run."""
    cfg = preset(name) if epochs == "its own" else preset(name, f"trainer.max_epochs={epochs}")
    count = cfg.trainer.max_epochs

    def course(batches: int) -> dict[str, Any]:
        method: Any = build.build_method(cfg)
        total = float(count * batches)
        found: dict[str, Any] = {}
        if method is not None and getattr(method, "start", None) is not None:
            length = RunLength(total=lambda: total, epoch=lambda: float(batches), samples=lambda: 128.0)
            method.attachment.host = Silent()
            if hasattr(method, "phases"):
                method.aux = {"phase/run": torch.tensor(0), "phase/optimizers": torch.tensor(0)}
            calendar = method.make_calendar(length)
            found = {"start": calendar.start / total, "stop": calendar.stop / total}
        optim = build.optim_of(cfg)
        found["rates"] = [optim.factor(round(share / 19 * total), lambda: total) for share in range(19)]
        return found

    whole, short = course(WHOLE), course(10)
    step = 1 / (count * 10)
    assert short == {
        # the eight phases of GaP, and the times at which rates are compared, are rounded to steps
        key: pytest.approx(value, abs={"stop": 8, "rates": 2}.get(key, 1) * step)
        for key, value in whole.items()
    }


class Silent:
    """A host that hears what a calendar has to say."""

    def inform(self, text: str) -> None: ...

    def warn(self, text: str) -> None: ...


# ---------------------------------------------------------------------- epochs as shares


@pytest.mark.parametrize(
    ("epochs", "count", "share"),
    [(500, 1, 0.002), (500, -1, 0.998), (10, 2, 0.2), (3, 1, 1 / 3), (1, 1, 0.25), (1, -1, 0.75), (2, -1, 0.75)],
)
def test_epochs_are_shares_of_the_run(epochs: int, count: int, share: float, composed: Compose) -> None:
    assert epochs_as_share(count, _root_=composed(f"trainer.max_epochs={epochs}")) == pytest.approx(share)


def test_updates_of_set_come_once_an_epoch_whatever_an_epoch_is(preset: Compose) -> None:
    for overrides, batches in ((("trainer.max_epochs=10",), 430), ((), 10)):
        cfg = preset("set_mlp_fashion_mnist", *overrides)
        method: Any = build.build_method(cfg)
        method.attachment.host = Silent()
        total = float(cfg.trainer.max_epochs * batches)
        calendar = method.make_calendar(RunLength(total=lambda n=total: n, epoch=lambda: 1.0))  # type: ignore[misc]
        assert calendar.times() == [batches, batches, total - batches]


def test_a_run_without_a_number_of_epochs_has_no_shares_of_them(preset: Compose) -> None:
    import train

    cfg = preset("set_mlp_fashion_mnist", "trainer.max_epochs=-1", "trainer.max_steps=50")
    with pytest.raises(Exception, match=r"\$\{epochs:1\} is a share of trainer.max_epochs, which is -1"):
        train.train(cfg)
