"""Every preset runs shortened, `trainer.limit_train_batches=10`, on data that stands in for its files."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig

from sparse_callbacks.tasks.classifier import Classifier
from sparse_callbacks.tasks.data.loaders import Samples
from sparse_callbacks.tasks.data.module import ImageData, MemoryData

CONF = Path(__file__).parents[2] / "conf"
# those of runs beside each other are shortened to the jobs that they consist of
PRESETS = [path.stem for path in sorted((CONF / "experiment").glob("*.yaml")) if "two_jobs" not in path.read_text()]
SHAPES = {"cifar10": (3, 32, 32), "mnist": (1, 28, 28), "fashion_mnist": (1, 28, 28)}


class BegunError(Exception):
    """The first batch has come, so nothing was refused."""


def stand_in(shape: tuple[int, ...], batch_size: int) -> MemoryData:
    source = torch.Generator().manual_seed(0)
    count = 12 * batch_size
    everything = Samples(torch.rand(count, *shape, generator=source), torch.arange(count) % 10)
    few = everything.take(torch.arange(20))
    kind = ImageData if len(shape) == 3 else MemoryData
    return kind(everything, few, few, num_classes=10, batch_size=batch_size)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_with_ten_batches_an_epoch_begins(
    name: str, composed: Callable[..., DictConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train

    cfg = composed(
        *(f"experiment={name}", "trainer.limit_train_batches=10", "logger=[]", "report=false"),
        *("trainer.enable_progress_bar=false", f"output_dir={tmp_path}"),
        # a download, which no test waits for
        *(["model.pretrained=false"] if name == "my_photos" else []),
    )
    data = stand_in(SHAPES.get(str(cfg.data.get("name")), (500,)), cfg.data.batch_size)
    if "image_folder" in cfg.data._target_:
        data = stand_in((3, 32, 32), cfg.data.batch_size)
    if "digits" in cfg.data._target_:
        data = stand_in((1, 8, 8), cfg.data.batch_size)
    monkeypatch.setattr(train.run_data, "build_data", lambda cfg: data)

    def begun(self: Classifier, batch: Any, batch_idx: int) -> None:
        raise BegunError

    monkeypatch.setattr(Classifier, "training_step", begun)
    with pytest.raises(BegunError):
        train.train(cfg)
