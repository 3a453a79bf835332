"""The progress bar: loss, accuracies and what is left of the network, as far as the line has room."""

import shutil
import sys
from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import TQDMProgressBar

# what is written for the logged keys, in this order; and on a terminal that is too narrow for it
NAMES = {
    "train/loss": ("loss", "loss"),
    "train/acc": ("train acc", "train"),
    "val/acc": ("val acc", "val"),
    "test/acc": ("test acc", "test"),
    "sparsity/total": ("sparsity", "sparse"),
    "smcp/parameters": ("parameters", "params"),
    "channels/parameters": ("parameters", "params"),
    "l0/expected/total": ("expected density", "density"),
}


class ShortProgressBar(TQDMProgressBar):
    """Lightning's tqdm bar with short names of the metrics, of which a narrow terminal shows as many as it has room for.

    Where the output is not a terminal, e.g. in a log file, it prints a line at the end of each epoch instead.
    """

    # without percentage, rate and elapsed time, so that the metrics of training fit into 80 columns
    BAR_FORMAT = "{desc}|{bar}| {n_fmt}/{total_fmt} {remaining}{postfix}"

    def __init__(self) -> None:
        self._on_terminal = sys.stdout.isatty()
        # a refresh rate of 0 switches Lightning's bar off
        super().__init__(refresh_rate=1 if self._on_terminal else 0)

    def get_metrics(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> dict[str, Any]:
        shown = super().get_metrics(trainer, pl_module)
        shown.pop("v_num", None)
        batches = trainer.num_training_batches
        # what surrounds the metrics, with two columns for the bar itself
        around = f"Epoch {trainer.current_epoch}: |##| {batches}/{batches} 00:00, "
        return that_fit(shown, shutil.get_terminal_size().columns - len(around))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        super().on_train_epoch_end(trainer, pl_module)
        if self._on_terminal or not trainer.is_global_zero:
            return
        # what the bar of a terminal shows, and nothing of an earlier epoch
        found = {key: value for key, value in trainer.progress_bar_metrics.items() if key in NAMES}
        every = trainer.check_val_every_n_epoch
        if every is not None and (trainer.current_epoch + 1) % every:
            found = {key: value for key, value in found.items() if not key.startswith("val/")}
        figures = [f"{name} {float(value):.4f}" for name, value in named(found, short=False).items()]
        print(f"epoch {trainer.current_epoch}  " + "  ".join(figures), flush=True)


def named(figures: Mapping[str, Any], short: bool) -> dict[str, Any]:
    """Figures by the names of `NAMES` and in that order; behind them what has none there.

    Args:
        figures: values by their keys.
        short: whether names are those for a narrow terminal.
    """
    known = {names[short]: figures[key] for key, names in NAMES.items() if key in figures}
    return known | {key: value for key, value in figures.items() if key not in NAMES}


def that_fit(figures: Mapping[str, Any], room: int) -> dict[str, str]:
    """Figures as text, by long names where all of them fit into one line, else the first that fit by short ones.

    Args:
        figures: numbers, or text, by their keys.
        room: columns for them.
    """
    for short in (False, True):
        shown = {name: _as_text(name, value) for name, value in named(figures, short).items()}
        if _width(shown) <= room:
            return shown
    while len(shown) > 1 and _width(shown) > room:
        shown.popitem()
    return shown


def _width(shown: Mapping[str, str]) -> int:
    return len(", ".join(f"{name}={text}" for name, text in shown.items()))


def _as_text(name: str, value: Any) -> str:
    if isinstance(value, str):
        return value
    # a loss has no scale, and everything else is a share
    return f"{float(value):.3g}" if "loss" in name else f"{float(value):.3f}"
