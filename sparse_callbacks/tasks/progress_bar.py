"""The progress bar: loss, accuracy and sparsity on one line of 80 columns."""

import sys
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

# what the bar writes for the logged keys
SHORT_NAMES = {
    "train/loss": "loss",
    "train/acc": "train",
    "val/acc": "val",
    "test/acc": "test",
    "sparsity/total": "sparse",
}


class ShortProgressBar(TQDMProgressBar):
    """Lightning's tqdm bar with short names of the metrics.

    Where the output is not a terminal, e.g. in a log file, it prints a line at the end of each epoch instead.
    """

    # without Lightning's rate and elapsed time, so that the metrics of training fit into 80 columns
    BAR_FORMAT = "{l_bar}{bar}| {n_fmt}/{total_fmt} [{remaining}{postfix}]"

    def __init__(self) -> None:
        self._on_terminal = sys.stdout.isatty()
        # a refresh rate of 0 switches Lightning's bar off
        super().__init__(refresh_rate=1 if self._on_terminal else 0)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        return {SHORT_NAMES.get(name, name): value for name, value in shown.items()}

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._on_terminal or not trainer.is_global_zero:
            return
        figures = [
            f"{_name_in_line(key)} {float(value):.4f}"
            for key, value in trainer.callback_metrics.items()
            if key in SHORT_NAMES
        ]
        print(f"epoch {trainer.current_epoch}  " + "  ".join(figures), flush=True)


def _name_in_line(key: str) -> str:
    """A name in the line of an epoch, which has room to say that a number is an accuracy."""
    return f"{SHORT_NAMES[key]} acc" if key.endswith("/acc") else SHORT_NAMES[key]
