"""The progress bar's names, and what a log file gets instead."""

import re
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch

from sparse_callbacks.tasks.progress_bar import NAMES, ShortProgressBar, that_fit

FIGURES = {"sparsity/total": 0.9, "train/loss": 1.94321, "val/acc": 0.25, "own": "text", "train/acc": 0.5}


class Module(pl.LightningModule):
    """Logs what `train.py` logs, and an accuracy of validation that is that of the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", 0.5, prog_bar=True)
        self.log("sparsity/total", 0.9, prog_bar=True)
        self.log("smcp/share", 0.9, logger=False)
        return loss

    def validation_step(self, batch: torch.Tensor, batch_idx: int) -> None:
        self.log("val/acc", 0.25 + self.trainer.current_epoch / 10, prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def printed(terminal: bool, folder: Path, capsys: pytest.CaptureFixture[str], every: int = 1) -> str:
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[ShortProgressBar()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
        check_val_every_n_epoch=every,
        default_root_dir=folder,
    )
    data = torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2)
    trainer.fit(Module(), data, data)
    out = capsys.readouterr()
    return out.out + out.err if terminal else out.out


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("columns", "words"),
    [
        (64, r"train=0.500, val=0.250\]?"),
        (80, r"train=0.500, val=0.250, sparse=0.900\]?"),
        (100, r"train acc=0.500, val acc=0.250, sparsity=0.900\]?"),
    ],
)
def test_a_bar_has_what_its_terminal_has_room_for(
    columns: int, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(columns))
    out = printed(True, tmp_path, capsys)
    assert re.search(words, out)
    assert "v_num" not in out
    if columns == 64:
        # whole figures, and none that would be cut
        assert not any("spars" in line for line in out.split("\r") if "val=" in line)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("every", [1, 2])
def test_a_log_file_gets_a_line_of_each_epoch(
    every: int, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: False)
    out = printed(False, tmp_path, capsys, every)
    lines = [line for line in out.splitlines() if line.startswith("epoch")]
    assert [line.split()[:3] for line in lines] == [["epoch", "0", "loss"], ["epoch", "1", "loss"]]
    # no value of an epoch before
    of_first = "  val acc 0.2500" if every == 1 else ""
    assert lines[0].endswith(f"train acc 0.5000{of_first}  sparsity 0.9000")
    assert lines[1].endswith("train acc 0.5000  val acc 0.3500  sparsity 0.9000")
    assert "%|" not in out


@pytest.mark.parametrize(
    ("room", "shown"),
    [
        (200, "loss=1.94, train acc=0.500, val acc=0.250, sparsity=0.900, own=text"),
        (67, "loss=1.94, train acc=0.500, val acc=0.250, sparsity=0.900, own=text"),
        (66, "loss=1.94, train=0.500, val=0.250, sparse=0.900, own=text"),
        (47, "loss=1.94, train=0.500, val=0.250, sparse=0.900"),
        (46, "loss=1.94, train=0.500, val=0.250"),
        (3, "loss=1.94"),
    ],
)
def test_figures_are_whole_and_as_many_as_fit(room: int, shown: str) -> None:
    assert ", ".join(f"{name}={text}" for name, text in that_fit(FIGURES, room).items()) == shown


def test_every_name_is_shorter_on_a_narrow_terminal_or_the_same() -> None:
    assert all(len(short) <= len(long) for long, short in NAMES.values())
