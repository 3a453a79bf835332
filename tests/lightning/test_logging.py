"""What reaches the loggers, at which steps, and what callbacks of the user can monitor."""

import csv
from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning.callbacks import ModelCheckpoint, TQDMProgressBar
from pytorch_lightning.loggers import CSVLogger
from support.data import loader
from support.inside import figures_to_log
from support.nets import Regression, mlp

from sparse_callbacks import GMP, SET, SNFS, RigL, SparsityCallback, Static
from sparse_callbacks.testing.runs import trainer_for

LAYERS = {"sparsity/net.0.weight", "sparsity/net.2.weight"}
ALWAYS = {"sparsity/total", "sparsity/model"} | LAYERS
UPDATE = {"update/drop_fraction", "update/changed", "update/ever_active"}


def logged(path: Path, callbacks: Any, steps: int = 12, **options: Any) -> dict[int, dict[str, float]]:
    """Figures by step as they stand in the CSV file, NaN and empty cells left out."""
    logger = CSVLogger(path, name="log", version="0", flush_logs_every_n_steps=1)
    given = {"log_every_n_steps": 5, "max_steps": steps, "logger": logger} | options
    trainer_for(callbacks, path, **given).fit(Regression(), loader(steps * given.get("accumulate_grad_batches", 1)))
    found: dict[int, dict[str, float]] = {}
    with (path / "log" / "0" / "metrics.csv").open() as lines:
        for line in csv.DictReader(lines):
            figures = {k: float(v) for k, v in line.items() if v and k not in ("step", "epoch")}
            found.setdefault(int(line["step"]), {}).update(figures)
    return found


def test_sparsity_is_logged_every_n_steps_and_updates_when_they_happen(tmp_path: Path) -> None:
    callback = RigL(0.6, distribution="uniform", every=4, stop=40, drop_fraction="constant(0.5)")
    found = logged(tmp_path, callback, 17)
    # updates replace the optimizer steps 0, 5, 10 and 15; Lightning's rows of every five steps are at 4, 9 and 14
    assert sorted(found) == [0, 4, 5, 9, 10, 14, 15]
    for step, figures in found.items():
        assert figures.keys() == (ALWAYS | UPDATE if step in (0, 5, 10, 15) else ALWAYS)
        assert figures["sparsity/total"] == pytest.approx(callback.measured_sparsity()["sparsity/total"])
        assert figures["sparsity/model"] == pytest.approx(216 / 386)
        assert figures["sparsity/net.0.weight"] == figures["sparsity/net.2.weight"] == pytest.approx(0.6)


@pytest.mark.parametrize(("method", "steps"), [(SET, [0, 4, 8]), (SNFS, [0, 4, 8])], ids=["SET", "SNFS"])
def test_updates_after_a_step_are_logged_at_that_step(method: Any, steps: list[int], tmp_path: Path) -> None:
    found = logged(tmp_path, method(0.6, every=4, stop=40))
    assert [s for s, figures in sorted(found.items()) if figures.keys() >= UPDATE] == steps
    assert sorted(found) == sorted({*steps, 4, 9})


class Follow(Callback):
    """Works the figures of an update out from the masks before and after it."""

    def __init__(self, callback: SparsityCallback) -> None:
        self.figures: dict[int, dict[str, float]] = {}
        self.callback = callback

    def on_train_batch_start(self, made: Any, *_: Any) -> None:
        self.before = {n: m.clone() for n, m in self.callback.masks.items()}
        if made.global_step == 0:
            self.ever = {n: m.clone() for n, m in self.before.items()}

    def on_train_batch_end(self, made: Any, *_: Any) -> None:
        after = self.callback.masks
        self.ever = {n: self.ever[n] | after[n] for n in after}
        moved = sum(int((after[n] ^ self.before[n]).sum()) for n in after)
        active = sum(int(after[n].sum() + self.before[n].sum()) for n in after)
        ever = sum(int(m.sum()) for m in self.ever.values()) / sum(m.numel() for m in after.values())
        self.figures[made.global_step - 1] = {"update/changed": moved / active, "update/ever_active": ever}


@pytest.mark.parametrize("method", [RigL, SET, SNFS], ids=lambda m: m.__name__)
def test_the_figures_of_an_update_are_those_of_its_masks(method: Any, tmp_path: Path) -> None:
    callback = method(0.6, distribution="uniform", every=4, stop=40, drop_fraction="linear(0.5)")
    follow = Follow(callback)
    found = logged(tmp_path, [follow, callback], 12)
    updates = {s: figures for s, figures in found.items() if "update/changed" in figures}
    assert len(updates) == 3
    for step, figures in updates.items():
        expected = follow.figures[step]
        assert 0 < figures["update/changed"] == pytest.approx(expected["update/changed"])
        assert 0.4 < figures["update/ever_active"] == pytest.approx(expected["update/ever_active"])
    shares = [updates[s]["update/ever_active"] for s in sorted(updates)]
    assert shares == sorted(shares)
    first = 0 if method is RigL else 1
    fractions = [updates[s]["update/drop_fraction"] for s in sorted(updates)]
    assert fractions == pytest.approx([0.5 * (1 - (first + 4 * i) / 40) for i in range(3)])


def test_gradual_pruning_logs_its_rise(tmp_path: Path) -> None:
    found = logged(tmp_path, GMP(0.8, every=5, stop=16), 20)
    curve = [found[s]["sparsity/total"] for s in sorted(found)]
    assert curve == sorted(curve)
    assert curve[0] < 0.2
    assert curve[-1] == pytest.approx(0.8)
    assert [s for s in sorted(found) if "update/changed" in found[s]] == [0, 5, 10, 15]
    assert not any("update/drop_fraction" in f or "update/ever_active" in f for f in found.values())
    assert all(0 < found[s]["update/changed"] < 1 for s in (0, 5, 10, 15))


def test_a_static_mask_logs_no_updates(tmp_path: Path) -> None:
    found = logged(tmp_path, Static(0.5))
    assert sorted(found) == [4, 9]
    assert all(figures.keys() == ALWAYS for figures in found.values())


def test_accumulation_logs_each_step_once(tmp_path: Path) -> None:
    lines: list[int] = []

    class Counting(CSVLogger):
        def log_metrics(self, metrics: Any, step: int | None = None) -> None:
            if "sparsity/total" in metrics:
                lines.append(step)
            super().log_metrics(metrics, step)

    logger = Counting(tmp_path)
    logged_steps = trainer_for(
        Static(0.5), tmp_path, logger=logger, log_every_n_steps=2, max_steps=6, accumulate_grad_batches=3
    )
    logged_steps.fit(Regression(), loader(18))
    assert lines == [1, 3, 5]


def test_every_logger_gets_the_figures(tmp_path: Path) -> None:
    loggers = [CSVLogger(tmp_path / name) for name in "ab"]
    trainer_for(Static(0.5), tmp_path, logger=loggers, log_every_n_steps=2, max_steps=4).fit(Regression(), loader(4))
    for logger in loggers:
        logger.save()
        assert "sparsity/total" in (Path(logger.log_dir) / "metrics.csv").read_text()


def test_two_callbacks_speak_of_one_network(tmp_path: Path) -> None:
    pair = [
        RigL(0.5, distribution="uniform", include="net.0*", every=4, stop=40),
        SET(0.75, include="net.2*", every=3, stop=40),
    ]
    found = logged(tmp_path, pair, 16)
    joint = (120 + 90) / 360
    seen = {k for figures in found.values() for k in figures}
    assert seen == ALWAYS | UPDATE
    for figures in found.values():
        if "sparsity/total" in figures:
            assert figures["sparsity/total"] == pytest.approx(joint)
            assert figures["sparsity/model"] == pytest.approx(210 / 386)
    assert all(found[s].keys() >= ALWAYS for s in (4, 9, 14))
    assert found[4]["sparsity/net.0.weight"] == pytest.approx(0.5)
    assert found[4]["sparsity/net.2.weight"] == pytest.approx(0.75)


def test_the_trainers_metrics_and_the_progress_bar_have_the_total(tmp_path: Path) -> None:
    shown: list[Any] = []

    class Bar(TQDMProgressBar):
        def on_train_batch_end(self, made: Any, module: Any, *rest: Any) -> None:
            shown.append(self.get_metrics(made, module).get("sparsity/total"))

    callback = GMP(0.8, every=5, stop=11)
    made = trainer_for([callback, Bar()], tmp_path, max_steps=15, enable_progress_bar=True)
    made.fit(Regression(mlp(12, 20, 6)), loader(15))
    assert float(made.callback_metrics["sparsity/total"]) == pytest.approx(0.8)
    assert shown[0] is not None
    assert float(shown[-1]) == pytest.approx(0.8)


@pytest.mark.parametrize("batches", [3, 5])
def test_a_checkpoint_callback_may_monitor_the_total(batches: int, tmp_path: Path) -> None:
    best = ModelCheckpoint(
        tmp_path, monitor="sparsity/total", mode="max", filename="{step}", save_on_train_epoch_end=True
    )
    callback = GMP(0.8, every=2, stop=batches * 2)
    made = trainer_for([callback, best], tmp_path, max_epochs=3, enable_checkpointing=True)
    made.fit(Regression(), loader(batches))
    assert float(best.best_model_score) == pytest.approx(0.8)
    assert (
        torch.load(best.best_model_path, weights_only=True)["global_step"] == batches * 2
    )  # the first epoch at the target


def test_without_loggers_nothing_is_missed(tmp_path: Path) -> None:
    callback = SET(0.5, every=2, stop=8)
    made = trainer_for(callback, tmp_path, max_steps=6, log_every_n_steps=0)
    made.fit(Regression(), loader(6))
    assert callback.updates == 3
    assert not figures_to_log(callback)
