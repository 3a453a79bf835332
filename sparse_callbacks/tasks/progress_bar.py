"""The progress bar: loss, accuracy and sparsity on one line, also on a narrow terminal."""

import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

SHORT = {"train/loss": "loss", "train/acc": "acc", "val/acc": "val", "test/acc": "test", "sparsity/total": "sparse"}


class Bar(TQDMProgressBar):
    """Lightning's tqdm bar with short names; where the output is no terminal, a line at the end of each epoch instead."""

    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"  # 80 columns hold all four figures

    def __init__(self) -> None:
        self._live = sys.stdout.isatty()
        super().__init__(refresh_rate=1 if self._live else 0)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {SHORT.get(name, name): value for name, value in shown.items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if not self._live and trainer.is_global_zero:
            figures = {SHORT[k]: float(v) for k, v in trainer.callback_metrics.items() if k in SHORT}
            print(f"epoch {trainer.current_epoch}  " + "  ".join(f"{k} {v:.4f}" for k, v in figures.items()), flush=True)
