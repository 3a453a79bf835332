"""The results of a run: metrics.json, a table on the terminal, and the command that resumes it."""

import json
import math
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from sparse_callbacks.core.files import replacing
from sparse_callbacks.core.units_left import UnitsLeft
from sparse_callbacks.lightning.callback import SparsityCallback


def sparsities(method: SparsityCallback | None) -> dict[str, float]:
    """Measured sparsity overall and of each layer; zero for a dense run."""
    if method is None:
        return {"sparsity/total": 0.0, "sparsity/model": 0.0}
    return method.measured_sparsity()


def write_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """Write the metrics as JSON with sorted keys; a number that is not finite becomes null, as JSON lacks it.

    The file is written beside its place and then moved there: on a full disk none is left that is half of one.
    """
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    with replacing(path) as beside:
        beside.write_text(json.dumps(dict(sorted(finite.items())), indent=2) + "\n")


def target_warning(method: SparsityCallback | None) -> str | None:
    """A warning where the run ended before its target sparsity; None where the target was reached or there is none."""
    if method is None or method.at_target:
        return None
    # gates and budgets have targets that are not a number of zeros, and name them themselves
    if not method.plans_counts:
        return method.shortfall()
    reached = method.measured_sparsity()["sparsity/total"]
    return (
        f"The run ended before its target: target sparsity {method.plan().total:.4f}, reached {reached:.4f}. "
        "Train longer (trainer.max_epochs), or let the method stop earlier (method.stop)."
    )


def relative(path: Path) -> str:
    """A path relative to the current folder where it lies inside it, else the path itself."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


NARROW = 72
"""Columns below which a table that does not fit goes without its frame."""


def summary_table(
    metrics: Mapping[str, float],
    method: SparsityCallback | None,
    resumed: bool = False,
    tested: str = "last epoch",
    left: UnitsLeft | None = None,
) -> Table:
    """Accuracies, what is left of the network, overall and in each layer, and updates.

    Args:
        metrics: the figures of the run by their keys in metrics.json.
        method: the sparsity callback after training; None for a dense run.
        resumed: whether the run was resumed, so that its time counts only from then on.
        tested: which network was tested, in words.
        left: parameters, FLOPs and units of a network that loses units, which stand in the place of the sparsity; None where
            the sparsity says it.
    """
    name = "dense run" if method is None else type(method).__name__
    # the usual frame has a head of its own, which the first row would get
    out = Table(title=name, title_justify="left", show_header=False, box=box.SQUARE)
    out.add_column(style="bold", overflow="fold")
    out.add_column(overflow="fold")
    labels = {
        "test/acc": f"test accuracy, {tested}",
        "slim/test/acc": "the same, slim",
        "val/acc": "val accuracy, last epoch",
    }
    for key, label in labels.items():
        if key in metrics:
            out.add_row(label, f"{100 * metrics[key]:.2f} %")
    since = " since the resume" if resumed else ""
    out.add_row("epochs, steps", f"{metrics['epochs']:g}, {metrics['steps']:g} in {metrics['seconds']:.1f} s{since}")
    if method is not None:
        out.add_section()
        if left is None:
            _add_sparsity(out, metrics, method)
        else:
            _add_units(out, left)
        out.add_row("topology updates", f"{metrics['updates']:g}")
        for label, reached in method.outcome().items():
            out.add_row(label, escape(reached))
        if (warning := target_warning(method)) is not None:
            out.add_row("target", escape(warning), style="yellow")
    return out


def _add_sparsity(out: Table, metrics: Mapping[str, float], method: SparsityCallback) -> None:
    """Add zeros among the weights, of all and of each layer."""
    weights, active = method.weights, method.weights.active_counts  # masks of exchanged layers would be made for it
    left = f"{sum(active.values()):,} of {weights.size_of_all:,} weights left"
    out.add_row("sparsity", f"{metrics['sparsity/total']:.6f}  ({left})")
    out.add_row("sparsity of the whole model", f"{metrics['sparsity/model']:.6f}")
    for name in method.params:
        out.add_row(
            f"  {escape(name)}", f"{metrics[f'sparsity/{name}']:.6f}  ({active[name]:,} of {weights.size(name):,})"
        )


def _add_units(out: Table, left: UnitsLeft) -> None:
    """Add parameters, FLOPs and units that are kept."""
    shares = left.shares
    out.add_row("parameters", f"{left.parameters:,} of {left.dense_parameters:,}  ({100 * shares['parameters']:.1f} %)")
    out.add_row("FLOPs of one sample", f"{left.flops:,.0f} of {left.dense_flops:,.0f}  ({100 * shares['flops']:.1f} %)")
    for name, (kept, size) in left.units.items():
        out.add_row(f"  {escape(name)}", f"{kept:,} of {size:,} units")


def show(table: Table, places: Mapping[str, str]) -> None:
    """Print a table, as wide as the terminal at most, and below it what is to be found where.

    Args:
        table: that of `summary_table`.
        places: what is to be found where; a line each, which is never broken, as it is there to be copied.
    """
    # a log file has no width that a line could exceed
    width = shutil.get_terminal_size().columns if Console().is_terminal else Console(width=1000).measure(table).maximum
    if width < NARROW and width < Console(width=1000).measure(table).maximum:
        table.box, table.pad_edge = box.SIMPLE, False
    console = Console(width=width)
    console.print(table, width=width)  # a console without cursor control does not look at its own
    for what, where in places.items():
        # an extra's name in brackets is text, and no markup of rich
        console.print(f"{what}: {where}", soft_wrap=True, highlight=False, markup=False)


def resume_command(script: str, overrides: Sequence[str], checkpoint: Path, folder: Path) -> str:
    """The shell command that goes on from a checkpoint in the same run folder.

    Args:
        script: the path of the script that ran, as it was typed.
        overrides: the overrides of the stopped run.
        checkpoint: the file to go on from.
        folder: the folder of the stopped run.
    """
    # a run that was resumed before has these two overrides already
    replaced = ("ckpt_path", "hydra.run.dir")
    kept = [text for text in overrides if text.lstrip("+").partition("=")[0] not in replaced]
    words = [*kept, f"ckpt_path={quoted(str(checkpoint))}", f"hydra.run.dir={quoted(str(folder))}"]
    return " ".join(["python", shlex.quote(script), *map(shlex.quote, words)])


def quoted(value: str) -> str:
    """A value in quotes where Hydra's override grammar needs them to read it back, whatever characters it has."""
    if re.fullmatch(r"[\w/.:\-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
