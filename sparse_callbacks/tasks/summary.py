"""What a run leaves: metrics.json, and a table on the terminal."""

import json
import math
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from sparse_callbacks.lightning.callback import SparsityCallback


def sparsities(method: SparsityCallback | None) -> dict[str, float]:
    """Measured sparsity overall and per layer; all zero for a dense run."""
    return {"sparsity/total": 0.0, "sparsity/model": 0.0} if method is None else method.measured_sparsity()


def write_metrics(path: Path, metrics: Mapping[str, float]) -> None:
    """JSON with sorted keys; a number that is not finite becomes null, which JSON has a word for."""
    finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
    path.write_text(json.dumps(dict(sorted(finite.items())), indent=2) + "\n")


def target_note(method: SparsityCallback | None) -> str | None:
    """A warning where the run ended before its target sparsity; None where it is reached."""
    if method is None or method.at_target:
        return None
    if not method.plans_counts:
        return method.shortfall()
    reached = method.measured_sparsity()["sparsity/total"]
    return (
        f"The run ended before its target: target sparsity {method.plan().total:.4f}, reached {reached:.4f}. "
        "Train longer (trainer.max_epochs), or let the method stop earlier (method.stop)."
    )


def relative(path: Path) -> str:
    """A path as short as it can be written from here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def table(metrics: Mapping[str, float], method: SparsityCallback | None, places: Mapping[str, str], resumed: bool = False) -> Table:
    """Accuracy, exact sparsity overall and per layer, updates done, and where everything lies."""
    out = Table(title="dense run" if method is None else type(method).__name__, title_justify="left", show_header=False)
    out.add_column(style="bold")
    out.add_column(overflow="fold")
    for key, what in (("test/acc", "test accuracy"), ("slim/test/acc", "test accuracy, slim"), ("val/acc", "val accuracy")):
        if key in metrics:
            out.add_row(what, f"{100 * metrics[key]:.2f} %")
    since = " since the resume" if resumed else ""
    out.add_row("epochs, steps", f"{metrics['epochs']:g}, {metrics['steps']:g} in {metrics['seconds']:.1f} s{since}")
    if method is not None:
        out.add_section()
        masks = method.masks
        active, size = sum(int(m.sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
        out.add_row("sparsity", f"{metrics['sparsity/total']:.6f}  ({active:,} of {size:,} weights left)")
        out.add_row("sparsity of the whole model", f"{metrics['sparsity/model']:.6f}")
        for name, mask in masks.items():
            out.add_row(f"  {name}", f"{metrics[f'sparsity/{name}']:.6f}  ({int(mask.sum()):,} of {mask.numel():,})")
        out.add_row("topology updates", str(method.updates))
        for what, reached in method.outcome().items():
            out.add_row(what, reached)
        note = target_note(method)
        if note is not None:
            out.add_row("target", note, style="yellow")
    out.add_section()
    for what, where in places.items():
        out.add_row(what, where)
    return out


def show(metrics: Mapping[str, float], method: SparsityCallback | None, places: Mapping[str, str], resumed: bool = False) -> None:
    """Print the table; paths are folded, never cut, also where the output is no terminal."""
    console = Console()
    console.print(table(metrics, method, places, resumed))


def resume_command(script: str, overrides: Sequence[str], checkpoint: Path, folder: Path) -> str:
    """The shell command that goes on from `checkpoint` in the same run folder."""
    kept = [text for text in overrides if text.lstrip("+").partition("=")[0] not in ("ckpt_path", "hydra.run.dir")]
    words = [*kept, f"ckpt_path={quoted(str(checkpoint))}", f"hydra.run.dir={quoted(str(folder))}"]
    return " ".join(["python", shlex.quote(script), *map(shlex.quote, words)])


def quoted(value: str) -> str:
    """A value as Hydra's override grammar reads it back, whatever characters it has."""
    if re.fullmatch(r"[\w/.:\-]+", value):
        return value
    escaped = value.replace("\\", "\\\\").replace("'", "\\'")
    return f"'{escaped}'"
