"""The progress bar's names, and what a log file gets instead."""

import pytest
import pytorch_lightning as pl
import torch

from sparse_callbacks.tasks.progress_bar import ShortProgressBar


class Module(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)

    def training_step(self, batch: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.layer(batch).square().mean()
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/acc", 0.5, prog_bar=True)
        self.log("val/acc", 0.25, prog_bar=True)
        self.log("sparsity/total", 0.9, prog_bar=True)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("terminal", [True, False])
def test_loss_and_sparsity_on_one_line(terminal: bool, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: terminal)
    bar = ShortProgressBar()
    trainer = pl.Trainer(
        max_epochs=2,
        callbacks=[bar],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(torch.ones(4, 2), batch_size=2))
    out = capsys.readouterr()
    if terminal:
        assert "train=0.500, val=0.250, sparse=0.900" in out.out + out.err
        assert "v_num" not in out.out + out.err
    else:
        lines = [line for line in out.out.splitlines() if line.startswith("epoch")]
        assert [line.split()[:3] for line in lines] == [["epoch", "0", "loss"], ["epoch", "1", "loss"]]
        assert all(line.endswith("train acc 0.5000  val acc 0.2500  sparse 0.9000") for line in lines)
        assert "%|" not in out.out + out.err
