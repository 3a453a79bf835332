"""The command that converts a trained network: of a run of train.py, or of a factory and a checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from support.nets import mlp
from torch import Tensor, nn

import sparse_callbacks
from sparse_callbacks import convert, saved_masks
from sparse_callbacks.core.nm_masks import in_groups
from sparse_callbacks.tasks.convert_command import convert_main

Run = Callable[..., dict[str, float]]


def network(width: int = 16) -> nn.Module:
    return mlp(8, width, width, 4)


def batches() -> list[Any]:
    source = torch.Generator().manual_seed(0)
    return [(torch.randn(32, 8, generator=source), torch.zeros(32)) for _ in range(3)]


def nothing() -> int:
    return 3


def named() -> dict[str, Tensor]:
    return {"images": torch.zeros(2, 16)}


def broken() -> list[Tensor]:
    raise KeyError("disk is gone")


FACTORY = ["test_convert_command:network", "--checkpoint", "weights.pt", "--data"]


@pytest.fixture
def trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    """A network whose weights are in the current folder, under the names of a LightningModule that holds it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    model = mlp(8, 16, 16, 4, seed=5)
    torch.save({"state_dict": {f"net.{name}": value for name, value in model.state_dict().items()}}, "weights.pt")
    torch.save(batches(), "batches.pt")
    torch.save(batches()[0][0], "samples.pt")
    return model


def weights(path: Path) -> dict[str, Tensor]:
    return dict(torch.load(path, weights_only=True)["state_dict"])


@pytest.mark.parametrize("data", ["test_convert_command:batches", "batches.pt"])
def test_a_factory_with_a_checkpoint(
    data: str, trained: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    convert_main([*FACTORY, data, "--batches", "2"])
    made, report = convert(trained.eval(), "2:4", data=batches()[:2])
    assert capsys.readouterr().out == f"{report}\nweights and masks in converted.ckpt\n"
    saved = weights(tmp_path / "converted.ckpt")
    assert saved.keys() == made.state_dict().keys()
    assert all(torch.equal(saved[name], value) for name, value in made.state_dict().items())
    assert torch.equal(saved_masks(tmp_path / "converted.ckpt")["2.weight"], report.masks["2.weight"])


def test_its_options(trained: nn.Module, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "new" / "a.ckpt"
    more = ["--pattern", "1:4", "--keep-dense", "none", "--exclude", "4.*", "--fit", "masked", "--out", str(out)]
    convert_main([*FACTORY, "samples.pt", *more])
    saved = weights(out)
    assert all((in_groups(saved[name] != 0, 4).sum(-1) == 1).all() for name in ("0.weight", "2.weight"))
    kept = saved["0.weight"] != 0
    assert torch.equal(saved["0.weight"][kept], trained.state_dict()["0.weight"][kept])
    assert torch.equal(saved["4.weight"], trained.state_dict()["4.weight"])
    assert "matched by exclude=" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "nowhere is not a folder. Give that of a run of train.py, or MODULE:FACTORY with --checkpoint."),
        (["."], "holds no run of train.py (no .hydra/config.yaml)"),
        (["test_convert_command:network"], "needs --checkpoint FILE, its trained weights, and --data"),
        (["test_convert_command:network", "--checkpoint", "gone.pt", "--data", "batches.pt"], "gone.pt is not there"),
        ([*FACTORY, "batches.pt", "--arguments", '{"width": 8}'], "weights.pt is of another model: 0.weight"),
        ([*FACTORY, "test_convert_command:nothing"], "gives no batches, but this: int. Give a loader"),
        ([*FACTORY, "test_convert_command:gone"], "gives no batches (AttributeError"),
        ([*FACTORY, "weights.txt"], "--data weights.txt is not there. Give a file"),
        ([*FACTORY, "test_convert_command:named"], "gives no batches, but this: dict. Give a loader"),
        ([*FACTORY, "test_convert_command:broken"], "gives no batches (KeyError"),
        ([*FACTORY, "text.pt"], "--data text.pt cannot be read"),
        ([*FACTORY, "batches.pt", "--pattern", "4:2"], "pattern='4:2' names no pattern"),
        ([*FACTORY, "batches.pt", "--damping", "nan"], "damping"),
        ([*FACTORY, "batches.pt", "--batches", "0"], "'0' is not a whole number from 1 on"),
        ([*FACTORY, "batches.pt", "--out", "."], "--out . is a folder"),
    ],
)
@pytest.mark.usefixtures("trained")
def test_words_that_cannot_work(words: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("text.pt").write_text("no batches")
    with pytest.raises(SystemExit):
        convert_main(words)
    assert said in capsys.readouterr().err
    assert not Path("converted.ckpt").exists()


def test_a_run_is_converted_and_trains_on_under_the_masks(
    run: Run, composed: Callable[..., DictConfig], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("model.hidden=[24,24]", "trainer.max_epochs=1")
    run("method=none", *options, folder="dense")
    # as Hydra writes it beside a run that the command line has started
    (tmp_path / "dense/.hydra").mkdir()
    OmegaConf.save(composed("method=none", *options, "data.batch_size=128"), tmp_path / "dense/.hydra/config.yaml")
    capsys.readouterr()
    convert_main([str(tmp_path / "dense"), "--batches", "4"])
    out = capsys.readouterr().out
    file = tmp_path / "dense/checkpoints/converted.ckpt"
    assert out.endswith(f"weights and masks in {file}\n")
    mask = saved_masks(file)["model.3.weight"]
    assert (in_groups(mask, 4).sum(-1) == 2).all()
    before, converted = weights(tmp_path / "dense/checkpoints/last.ckpt"), weights(file)
    assert torch.equal(converted["model.1.weight"], before["model.1.weight"])
    assert torch.equal(converted["model.3.weight"] != 0, mask)
    metrics = run(
        "method=static", f"method.from_checkpoint={file}", f"initial_weights={file}", "method.include=[model.3.weight]", *options
    )  # fmt: skip
    assert metrics["sparsity/total"] == pytest.approx(0.5)
    tuned = weights(tmp_path / "run/checkpoints/last.ckpt")["model.3.weight"]
    assert torch.equal(tuned != 0, mask)
    assert not torch.equal(tuned, converted["model.3.weight"])


def test_the_module_of_the_command_does_not_hide_the_function() -> None:
    import importlib

    assert importlib.import_module("sparse_callbacks.convert") is convert  # type: ignore[comparison-overlap]
    assert sparse_callbacks.convert is convert
