"""The page of a recorded run, ``report.html``: one file that opens offline, and its figures as PNG."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_callbacks.core.record.record_file import RecordedRun, read_record
from sparse_callbacks.reporting import tables
from sparse_callbacks.reporting.gains import gains, tiles
from sparse_callbacks.reporting.html_pages import write_page
from sparse_callbacks.reporting.mask_pictures import MOST, STATES, pictured
from sparse_callbacks.reporting.pictures import Picture, figures, known_axes, pictures
from sparse_callbacks.reporting.readable import moment, seconds
from sparse_callbacks.reporting.series import AXES, last, stayed_zero
from sparse_callbacks.reporting.style import drawing, figure_png

__all__ = ["FILE", "PICTURES", "figures", "write_report"]

FILE = "report.html"
PICTURES = "report"
"""The folder of the PNG files, in that of the run."""

_SECTIONS = {
    "gained": "What was gained",
    "progress": "Sparsity and accuracy over time",
    "layers": "Layers over time",
    "moved": "What moved",
    "cost": "Training FLOPs",
    "masks": "Masks",
    "dead": "Dead units",
    "plan": "Plan",
    "channels": "Channels before and after",
    "configuration": "Configuration",
    "reproduce": "How to reproduce it",
}


def write_report(folder: Path, dense: Path | None = None, png: bool = True) -> Path:
    """Write ``report.html``, and its figures as PNG, into the folder of a recorded run.

    Args:
        folder: the folder of the run, which holds ``record``.
        dense: the folder of a recorded dense run, which the run is compared with.
        png: whether the figures are also written as PNG, to ``report/`` in the folder.

    Returns:
        The path of the page.

    Raises:
        FileNotFoundError: a folder holds no record.
        ValueError: a record is damaged, or ``dense`` is that of a sparse run.
        ImportError: matplotlib is missing; the message names the extra `report`.

    Example:
        write_report(Path("outputs/rigl"), dense=Path("outputs/dense"))
    """
    run = read_record(folder)
    other = None if dense is None else _dense_record(dense)
    with drawing():
        drawn = pictures(run, other)
        if png:
            for picture in (p for section in drawn.values() for p in section):
                figure_png(picture.figure, folder / PICTURES / f"{picture.name}.png")
        return write_page(folder / FILE, "report.html.j2", **_values(run, other, drawn))


def _dense_record(folder: Path) -> RecordedRun:
    found = read_record(folder)
    if found.run.method != "dense":
        raise ValueError(
            f"{folder} is a run of {found.run.method} and not a dense one. Give the folder of a dense run (method=none), or "
            "compare sparse runs with python -m sparse_callbacks.compare."
        )
    return found


def _values(run: RecordedRun, dense: RecordedRun | None, drawn: Mapping[str, Sequence[Picture]]) -> dict[str, Any]:
    """What the variables of the template stand for."""
    axes = known_axes(run)
    shown = {
        section: [{"name": p.name, "caption": p.caption, "views": p.views(axes)} for p in given]
        for section, given in drawn.items()
    }
    said = run.run
    return {
        "title": _title(run),
        "facts": _facts(run),
        "warnings": said.warnings,
        "sections": list(_SECTIONS.items()),
        "section_names": _SECTIONS,
        "axes": [(axis, "FLOPs" if axis == "flops" else axis) for axis in axes],
        "axis_names": {axis: name for axis, (_, name) in AXES.items()},
        "pictures": shown,
        "why": _why(run),
        "tiles": tiles(run, dense),
        "gains": {
            title: [(g.name, g.own, g.dense, g.difference) for g in given] for title, given in gains(run, dense).items()
        },
        "gains_caption": _gains_caption(dense),
        "states": STATES.values(),
        "masks_note": _masks_note(run),
        "dead": tables.dead_table(run),
        "dead_note": _dead_note(run),
        "plan": tables.plan_table(run),
        "plan_text": tables.cut_text(said.plan),
        "costs": tables.cost_table(run),
        "groups": tables.group_table(run),
        "proof": tables.cut_text(str(said.channels.get("proof") or "")),
        "constructor": tables.constructor_text(run),
        "configuration": tables.configuration_text(run),
        "command": said.command,
        "reproduction": tables.reproduction_table(run),
    }


def _title(run: RecordedRun) -> str:
    if run.run.title:
        return run.run.title
    total = last(run, "sparsity/total")
    if run.run.method == "dense" or total is None:
        return "Dense run" if run.run.method == "dense" else run.run.method
    return f"{run.run.method} at sparsity {total:.4g}"


def _facts(run: RecordedRun) -> list[tuple[str, str]]:
    said = run.run
    epochs, steps, duration = (last(run, key) for key in ("epoch", "step", "seconds"))
    found = [("status", said.status), ("folder", run.folder.resolve().name)]
    if epochs is not None:
        found.append(("epochs", f"{epochs:.4g}"))
    if steps is not None:
        found.append(("steps", f"{steps:,.0f}"))
    if duration is not None:
        found.append(("time", seconds(duration)))
    found.append(("parameters", f"{sum(layer.size for layer in said.layers):,}"))
    if said.seed is not None:
        found.append(("seed", str(said.seed)))
    return [*found, ("started", moment(said.started))]


def _gains_caption(dense: RecordedRun | None) -> str:
    if dense is None:
        return "Dense: the same network and steps without masks, counted and not trained. Give a dense run to compare accuracy."
    return (
        f"Dense: the run in {dense.folder.resolve().name} for metrics, memory and time; the same network and steps without "
        "masks, counted, for weights and FLOPs."
    )


def _masks_note(run: RecordedRun) -> str:
    shown, held = len(pictured(run)), len(run.masks)
    note = (
        "Small layers, and those that read the input. Each row is an output, each column an input; in convolutions each tile is a "
        "kernel."
    )
    return f"{note} {shown} of {held} masks in the record are shown." if held > min(shown, MOST) else note


def _dead_note(run: RecordedRun) -> str:
    if run.run.method == "dense":
        return ""
    if run.run.chain:
        return "Paths are exact: the sparse layers are a chain, each reading the outputs of the one before."
    reason = run.run.chain_reason
    return f"Paths from input to output are not told: {reason}" if reason else ""


def _why(run: RecordedRun) -> dict[str, str]:
    """Why a section is empty."""
    rows = "" if run.rows else "The record has no rows: the run ended before its first. "
    no_masks = "A dense run has no masks." if run.run.method == "dense" else ""
    still = "The masks stayed as they began." if stayed_zero(run, "topology/distance_first") else ""
    alive = (
        "Every unit had active inputs, whenever the run was recorded."
        if stayed_zero(run, "topology/dead_units")
        else ""
    )
    return {
        "gained": rows or "No row holds figures that could be compared.",
        "progress": rows or "No row holds a sparsity or a metric.",
        "layers": rows or no_masks or "No row holds figures of sparse layers.",
        "moved": rows or no_masks or still or "No row holds figures of the topology.",
        "cost": rows or "No row holds FLOPs: they need the sizes of outputs, which the first batch tells.",
        "masks": no_masks
        or "The record holds no mask: only those of small layers and of layers that read the input are kept.",
        "dead": rows or no_masks or alive or "No row holds numbers of dead units.",
        "configuration": "The record holds no configuration: the run was not started by train.py.",
    }
