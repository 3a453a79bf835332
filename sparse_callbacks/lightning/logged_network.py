"""What dashboards show of a network at the end of its run: a table of layers, histograms, figures."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pytorch_lightning.loggers import Logger, TensorBoardLogger, WandbLogger
from pytorch_lightning.utilities import rank_zero_only
from torch import Tensor

from sparse_callbacks.core.inspection import extra
from sparse_callbacks.core.local_parts import is_sharded
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.record.fans import fans_of_layer, fans_of_mask, groups_of

COLUMNS = (
    "parameter",
    "shape",
    "weights",
    "active",
    "sparsity",
    "target",
    "fewest inputs",
    "median",
    "most",
    "without inputs",
)
BINS = 64


@dataclass(frozen=True)
class Layer:
    """A sparse parameter at the end of a run.

    Attributes:
        name: its name in the model.
        shape: the shape of the dense weight.
        size: number of weights, active or not.
        target: planned sparsity; None where it was decided during training.
        values: the active weights, 1-d, on the CPU.
        fan_in: inputs that each output reads, ``[outputs]``, on the CPU.
    """

    name: str
    shape: tuple[int, ...]
    size: int
    target: float | None
    values: Tensor
    fan_in: Tensor

    def row(self) -> tuple[str | int | float | None, ...]:
        """The row of `COLUMNS`."""
        active, shape = self.values.numel(), "x".join(map(str, self.shape))
        inputs = self.fan_in.double()
        spread = (int(inputs.min()), float(inputs.quantile(0.5)), int(inputs.max()))
        sparsity = 1 - active / self.size
        return (self.name, shape, self.size, active, sparsity, self.target, *spread, int((inputs == 0).sum()))


def layers_of(methods: Sequence[Method]) -> Iterator[Layer]:
    """The sparse layers of a model, one at a time; without those whose parameters are sharded over processes, of which nobody
    holds a whole one.

    Args:
        methods: all methods of one model, after a fit.
    """
    for method in methods:
        entries = {entry.name: entry for entry in method.entries}
        targets = {row.name: row.sparsity for row in method.plan()}
        stored = method.weights.layers_stored
        groups = groups_of(method.model, list(method.params))
        for name, parameter in method.params.items():
            if is_sharded(parameter):
                continue
            entry, values = entries[name], parameter.detach()
            if name in stored:  # it holds its live weights alone, and its mask may be larger than the memory
                fans = fans_of_layer(stored[name])
            else:
                mask = method.masks[name]
                fans, values = fans_of_mask(mask, entry, groups[name]), values[mask]
            yield Layer(name, tuple(entry.shape), entry.size, targets[name], values.flatten().cpu(), fans.fan_in.cpu())


@rank_zero_only
def log_network(loggers: Iterable[Logger], methods: Sequence[Method], step: int) -> None:
    """Show the network that a run ended with in W&B and TensorBoard: a table of its sparse layers, and histograms of the
    active weights and of the inputs that each output reads. Other loggers are passed over.

    It costs a copy of one layer's active weights, and is meant for the end of a run.

    Args:
        loggers: the loggers of the run.
        methods: all methods of the model, after the fit; empty for a dense run.
        step: the step number of the rows.

    Example:
        trainer = pl.Trainer(callbacks=[method], logger=WandbLogger())
        trainer.fit(module)
        log_network(trainer.loggers, [method], trainer.global_step)
    """
    able = [logger for logger in loggers if isinstance(logger, WandbLogger | TensorBoardLogger)]
    if not able or not methods:
        return
    rows = []
    for layer in layers_of(methods):
        rows.append(layer.row())
        for logger in able:
            _log_histograms(logger, {f"weights/{layer.name}": layer.values, f"fan_in/{layer.name}": layer.fan_in}, step)
    for logger in able:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_text("layers", _markdown(rows), step)
        else:
            with _kept_in_run(logger):
                logger.log_table("layers", columns=list(COLUMNS), data=[list(row) for row in rows], step=step)


def _log_histograms(logger: Logger, samples: dict[str, Tensor], step: int) -> None:
    filled = {key: values.float() for key, values in samples.items() if values.numel()}
    if isinstance(logger, TensorBoardLogger):
        for key, values in filled.items():
            logger.experiment.add_histogram(key, values, step)
        return
    histogram = extra("wandb", "train").Histogram
    made: dict[str, Any] = {}
    for key, values in filled.items():
        counts, edges = torch.histogram(values, BINS)
        made[key] = histogram(np_histogram=(counts.long().tolist(), edges.tolist()))
    logger.log_metrics(made, step=step)


@contextmanager
def _kept_in_run(logger: WandbLogger) -> Iterator[None]:
    """Inside, what W&B keeps of an offline run for its upload goes into the folder of that run. W&B makes an artifact of each
    table, and would copy it into the user's home.
    """
    run = logger.experiment
    variable = "WANDB_DATA_DIR"
    if variable in os.environ or str(run.settings.mode) != "offline":
        yield
        return
    os.environ[variable] = str(Path(run.dir).parent)
    try:
        yield
    finally:
        del os.environ[variable]


def _markdown(rows: Sequence[Sequence[Any]]) -> str:
    """The table of layers as text."""
    shown = [["" if v is None else f"{v:.4f}" if isinstance(v, float) else str(v) for v in row] for row in rows]
    lines = [COLUMNS, ["---"] * len(COLUMNS), *shown]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


@rank_zero_only
def log_pictures(loggers: Iterable[Logger], folder: Path, step: int) -> None:
    """Show the figures of a report in W&B and TensorBoard, as ``figures/<name of the file>``. Other loggers are passed over.

    Args:
        loggers: the loggers of the run.
        folder: the folder of the figures, which are its PNG files.
        step: the step number of the rows.
    """
    for path in sorted(folder.glob("*.png")):
        for logger in loggers:
            if isinstance(logger, WandbLogger):
                logger.log_image(f"figures/{path.stem}", [str(path)], step=step)
            elif isinstance(logger, TensorBoardLogger):
                picture = extra("matplotlib.image", "report").imread(path)  # [height, width, channels] in [0, 1]
                logger.experiment.add_image(f"figures/{path.stem}", picture, step, dataformats="HWC")


@rank_zero_only
def summarize(loggers: Iterable[Logger], figures: Mapping[str, float]) -> None:
    """Put figures into the summary of W&B runs, the columns of their table, where the latest value of every logged metric is
    already. Other loggers are passed over.

    Args:
        loggers: the loggers of the run.
        figures: numbers by the names of their columns.
    """
    for logger in loggers:
        if isinstance(logger, WandbLogger):
            logger.experiment.summary.update(dict(figures))


def log_end(loggers: Iterable[Logger], methods: Sequence[Method], folder: Path, step: int) -> None:
    """`log_network`, and the figures of the report in the folder of the run."""
    log_network(loggers, methods, step)
    log_pictures(loggers, folder / "report", step)
