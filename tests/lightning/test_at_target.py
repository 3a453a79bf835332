"""The best checkpoint and early stopping of epochs at target sparsity, in Trainers of both Lightnings."""

import importlib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_callbacks import GMP, BestAtTarget, EarlyStoppingAtTarget

STEPS = 4  # of an epoch


@pytest.fixture(params=["pytorch_lightning", "lightning.pytorch"])
def lightning(request: pytest.FixtureRequest) -> Any:
    return pytest.importorskip(request.param)


def trained(
    lightning: Any, folder: Path, scores: Sequence[float], callbacks: Sequence[Any], **options: Any
) -> tuple[Any, list[int]]:
    """A Trainer after a fit in which each epoch's validation has one of these scores, and the epochs at target sparsity."""

    class Scored(lightning.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.layer = torch.nn.Linear(6, 6)

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return self.layer(batch).square().mean()

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("score", float(scores[self.trainer.current_epoch]))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.01)

    counted: list[int] = []

    class Watch(lightning.Callback):  # type: ignore[misc, name-defined]
        def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
            if all(c.at_target for c in callbacks if isinstance(c, GMP)):
                counted.append(trainer.current_epoch)

    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "num_sanity_val_steps": 0}
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=len(scores),
        callbacks=[*callbacks, Watch()],
        default_root_dir=folder,
        enable_checkpointing=any(isinstance(c, BestAtTarget) for c in callbacks),
        **(quiet | options),
    )
    data = torch.utils.data.DataLoader(torch.randn(2 * STEPS, 6), batch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(Scored(), data, data)
    assert not [w for w in caught if "also counts epochs" in str(w.message)]
    return trainer, counted


def pruning(stop: int = 10) -> GMP:
    return GMP(0.5, every=2, start=0, stop=stop, print_plan=False)


def test_the_best_epoch_is_the_best_of_those_at_the_target(lightning: Any, tmp_path: Path) -> None:
    best = BestAtTarget("score", "max", tmp_path / "kept")
    # given first, and called last, as a checkpoint has to hold what the other callbacks have done
    trainer, counted = trained(lightning, tmp_path, [9, 8, 1, 3, 2], [best, pruning()])
    assert counted == [2, 3, 4]
    assert trainer.callbacks[-1] is best
    assert trainer.checkpoint_callbacks == [best]
    assert best.best_model_path == str(tmp_path / "kept/best.ckpt")
    assert float(best.best_model_score) == 3
    saved = torch.load(best.best_model_path, weights_only=True)
    assert saved["epoch"] == 3
    assert (saved["state_dict"]["layer.weight"] == 0).sum() == 18
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["best.ckpt"]


def test_of_a_dense_run_every_epoch_counts(lightning: Any, tmp_path: Path) -> None:
    best = BestAtTarget("score", "min", tmp_path, filename="lowest")
    trained(lightning, tmp_path, [3, 1, 2], [best])
    assert torch.load(tmp_path / "lowest.ckpt", weights_only=True)["epoch"] == 1


def test_without_an_epoch_at_the_target_there_is_no_best(tmp_path: Path) -> None:
    best = BestAtTarget("score", "max", tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _, counted = trained(importlib.import_module("pytorch_lightning"), tmp_path, [1, 2], [pruning(50), best])
    assert (counted, best.best_model_path, best.best_model_score) == ([], "", None)


def test_patience_begins_at_the_target(lightning: Any, tmp_path: Path) -> None:
    stopping = EarlyStoppingAtTarget("score", "max", patience=1)
    trainer, counted = trained(lightning, tmp_path, [9, 8, 1, 3, 2, 7, 7], [pruning(), stopping])
    assert counted == [2, 3, 4]
    assert (trainer.current_epoch, stopping.stopped_epoch) == (5, 4)


@pytest.mark.parametrize(("delta", "epochs"), [(0.0, 6), (5.0, 5)])
def test_a_better_value_is_better_by_the_least_difference(delta: float, epochs: int, tmp_path: Path) -> None:
    stopping = EarlyStoppingAtTarget("score", "max", patience=2, min_delta=delta)
    lightning = importlib.import_module("pytorch_lightning")
    trainer, _ = trained(lightning, tmp_path, [9, 8, 1, 3, 2, 2, 9], [pruning(), stopping])
    assert trainer.current_epoch == epochs


def test_epochs_without_a_validation_do_not_count(lightning: Any, tmp_path: Path) -> None:
    stopping, best = EarlyStoppingAtTarget("score", "max", patience=2), BestAtTarget("score", "max", tmp_path)
    scores = [0, 5, 0, 4, 0, 6, 0, 1]
    trainer, counted = trained(lightning, tmp_path, scores, [pruning(6), stopping, best], check_val_every_n_epoch=2)
    assert counted == [1, 2, 3, 4, 5, 6, 7]
    assert trainer.current_epoch == 8
    assert torch.load(tmp_path / "best.ckpt", weights_only=True)["epoch"] == 5


def test_a_metric_that_nobody_logs_is_refused(lightning: Any, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="could not find the monitored key"):
        trained(lightning, tmp_path, [1, 2], [pruning(4), BestAtTarget("loss", "min", tmp_path)])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"patience": 0}, "patience=0 is not a number of epochs to wait. Give 1 or more."),
        ({"patience": 1.5}, "patience=1.5 is not of a type that EarlyStoppingAtTarget takes. Give a whole number."),
        ({"patience": True}, "patience=True is not of a type that EarlyStoppingAtTarget takes. Give a whole number."),
        ({"min_delta": -0.1}, "min_delta=-0.1 is not by how much a value has to be better. Give 0 or more."),
        ({"monitor": ""}, "monitor='' names no metric. Give one that the module logs, such as monitor='val_loss'."),
        ({"mode": "least"}, "mode='least' is not of a type that EarlyStoppingAtTarget takes."),
    ],
)
def test_what_early_stopping_cannot_wait_for_is_refused(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises((TypeError, ValueError), match=re.escape(words)):
        EarlyStoppingAtTarget(**{"monitor": "score", **wrong})


def test_a_file_without_a_name_is_refused() -> None:
    with pytest.raises(ValueError, match=r"filename='' names nothing\. Give for example filename='best'"):
        BestAtTarget("score", filename="")
