"""Runs that begin with the weights of another run."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig

Run = Callable[..., dict[str, float]]


def weights(path: Path) -> dict[str, torch.Tensor]:
    return dict(torch.load(path, weights_only=True)["state_dict"])


def test_a_run_begins_with_the_weights_of_the_dense_run(run: Run, tmp_path: Path) -> None:
    run("method=none", "trainer.max_epochs=1", folder="dense")
    dense = tmp_path / "dense/checkpoints/last.ckpt"
    start = (f"initial_weights={dense}", "optim.lr=1e-30", "optim.weight_decay=0", "trainer.max_epochs=1")
    run("method=static", "method.initial_mask=magnitude", "method.distribution=uniform", "sparsity=0.5", *start)
    before, after = weights(dense), weights(tmp_path / "run/checkpoints/last.ckpt")
    for name in ("model.1.weight", "model.3.weight"):
        magnitudes = before[name].abs()
        kept = magnitudes > magnitudes.flatten().kthvalue(magnitudes.numel() // 2).values
        assert torch.equal(after[name], before[name] * kept)
    # a resumed run has weights of its own, and the file may be gone
    dense.unlink()
    resumed = run(
        "method=static", "sparsity=0.5", "method.initial_mask=magnitude", "method.distribution=uniform", start[0], "optim.lr=1e-30",
        "optim.weight_decay=0", "trainer.max_epochs=2", f"ckpt_path={tmp_path / 'run/checkpoints/last.ckpt'}", folder="resumed",
    )  # fmt: skip
    assert resumed["epochs"] == 2


def test_weights_that_do_not_fit_are_refused(run: Run, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"initial_weights=gone\.ckpt is not there"):
        run("initial_weights=gone.ckpt")
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": {"model.1.weight": torch.zeros(2, 2)}}, path)
    with pytest.raises(ValueError, match=r"is of another model: model\.1\.bias, model\.3\.bias"):
        run(f"initial_weights={path}")
    path.write_text("no checkpoint")
    with pytest.raises(ValueError, match="is not a whole torch file"):
        run(f"initial_weights={path}")


def test_top_5_accuracy_is_logged_for_more_than_five_classes(run: Run, composed: Callable[..., DictConfig]) -> None:
    from sparse_callbacks.tasks.classifier import Classifier, Optim

    metrics = run("trainer.max_epochs=1")
    assert 0 <= metrics["test/acc"] <= metrics["test/acc5"] <= 1
    assert metrics["test/acc5"] > metrics["test/acc"]
    assert "val/acc5" in metrics
    few = Classifier(torch.nn.Linear(2, 5), 5, Optim())
    assert len(few.top_accuracy) == 0
