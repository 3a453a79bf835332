"""The tables of the zoo."""

import statistics
from collections.abc import Sequence
from typing import Any

Row = dict[str, Any]
NONE = "-"
SMALLEST = 32 << 20
"""Bytes in float64 of the smallest model whose peak memory says something about slimming."""
GOALS = {"timm": ("parameters_left", 0.30), "transformers": ("core_left", 0.60)}
"""By library, the share that is meant to be left at most in the median, after the key that rows have it under."""
TITLES = {
    "timm": "timm", "transformers": "transformers", "smp": "segmentation-models-pytorch", "torchvision": "torchvision's classifiers",
    "detection": "torchvision's detectors",
}  # fmt: skip
SHARES = ("parameters_left", "core_left", "flops_left", "core_flops_left")


def library(row: Row) -> str:
    return str(row["name"]).partition("/")[0]


def is_slimmed(row: Row) -> bool:
    """Whether our side gave a network, right or wrong."""
    return "equal" in row["ours"]


def time_ratio(row: Row) -> float | None:
    """Our CPU time over torch-pruning's, where both end."""
    ours, peer = row["ours"].get("seconds"), row["peer"].get("seconds")
    return ours / peer if ours and peer else None


def memory_ratio(row: Row) -> float | None:
    """Peak memory in sizes of the model in float64, where it is large enough for that."""
    ours = row["ours"]
    return ours["peak"] / ours["double"] if ours.get("double", 0) >= SMALLEST else None


def shown(value: float | None, digits: int) -> str:
    return NONE if value is None else f"{value:.{digits}f}"


def middle_and_worst(values: Sequence[float | None]) -> list[str]:
    """The median and the largest of the values that there are."""
    found = [v for v in values if v is not None]
    return [shown(statistics.median(found), 1), shown(max(found), 1)] if found else [NONE, NONE]


def median_left(rows: Sequence[Row], key: str) -> float:
    """The median share that is left; all of it where a model could not be slimmed."""
    return statistics.median(row["ours"].get(key, 1.0) for row in rows)


def table(heads: Sequence[str], lines: Sequence[Sequence[Any]]) -> str:
    """A table in Markdown; the word "None." where it has no lines."""
    if not lines:
        return "None."
    rows = [list(heads), ["---"] * len(heads), *lines]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in row) + " |" for row in rows
    )


# ---------------------------------------------------------------------- over models


def summary(rows: Sequence[Row]) -> str:
    """One line for each library, and one for all."""
    heads = [
        "", "models", "slimmed", "equal", "not equal", "parameters left", "core left", "FLOPs left", "core FLOPs left",
        "torch-pruning runs", "its parameters left", "time: median ratio", "worst", "memory: median", "worst",
    ]  # fmt: skip
    lines = []
    for name, title in {**TITLES, "all": "all"}.items():
        part = [row for row in rows if name in ("all", library(row))]
        if part:
            slim, runs = [r for r in part if is_slimmed(r)], [r for r in part if r["peer"].get("runs")]
            equal = sum(r["ours"]["equal"] for r in slim)
            left = statistics.median(r["peer"]["parameters_left"] for r in runs) if runs else None
            lines.append([
                title, len(part), len(slim), equal, len(slim) - equal, *(shown(median_left(part, key), 3) for key in SHARES), len(runs),
                shown(left, 3), *middle_and_worst([time_ratio(r) for r in part]), *middle_and_worst([memory_ratio(r) for r in part]),
            ])  # fmt: skip
    return table(heads, lines)


def both(rows: Sequence[Row]) -> str:
    """What the two sides leave of the models on which both give a network."""
    shared = [row for row in rows if is_slimmed(row) and row["peer"].get("runs")]
    if not shared:
        return "There is no model of which both give a network."
    ours, peer = (statistics.median(row[side]["parameters_left"] for row in shared) for side in ("ours", "peer"))
    return (
        f"Of the {len(shared)} models of which both give a network that runs, `slim` leaves {ours:.3f} of the parameters in the "
        f"median, and torch-pruning {peer:.3f}."
    )


def above(rows: Sequence[Row]) -> str:
    """The models of which more is left than the goal says, and the reasons that keep most weights."""
    lines = []
    for row in rows:
        key, goal = GOALS.get(library(row), ("", 1.0))
        left = row["ours"].get(key, 1.0)
        if left > goal:
            kept = [f"{k['reason']} ({k['groups']}; {k['share']:.1%})" for k in row["ours"].get("stays", [])]
            lines.append([row["name"], shown(left, 3), f"{goal:.2f}", row["ours"].get("failed") or "; ".join(kept)])
    return table(
        ["model", "left", "goal", "what keeps it (groups; share of the parameters in the layers that make them)"], lines
    )


def reasons(rows: Sequence[Row]) -> str:
    """Every kind of reason, with the groups and models that have it."""
    found: dict[str, list[tuple[str, Row]]] = {}
    for row in rows:
        for kind in row["ours"].get("stays", []):
            found.setdefault(kind["reason"], []).append((row["name"], kind))
    lines = [
        [reason, sum(kind["groups"] for _, kind in seen), len(seen), f"{seen[0][0]}: `{seen[0][1]['first']}`"]
        for reason, seen in found.items()
    ]
    return table(["reason", "groups", "models", "first of them"], sorted(lines, key=lambda line: -line[1]))


def failures(rows: Sequence[Row], side: str) -> str:
    """The models of which a side gives no network that runs, or a wrong one, and why."""
    lines = []
    for row in rows:
        found = row[side]
        why = found.get("failed") or found.get("why")
        if not why and side == "ours" and not is_slimmed(row):
            why = "no open group"
        if why:
            lines.append([row["name"], why])
    return table(["model", "why"], lines)


def models(rows: Sequence[Row]) -> str:
    """One line for each model."""
    heads = [
        "model", "equal", "difference", "groups cut", "parameters left", "core left", "FLOPs left", "core FLOPs left", "latency, ms",
        "time, s", "ratio", "memory", "torch-pruning", "its parameters left", "its time, s",
    ]  # fmt: skip
    return table(heads, [[row["name"], *our_cells(row), *peer_cells(row)] for row in rows])


def our_cells(row: Row) -> list[Any]:
    """Our side of the line of a model."""
    ours = row["ours"]
    if not is_slimmed(row):
        return ["no network", *[NONE] * 10]
    before, after = ours["latency"]
    precision = "" if ours["precision"] == "float64" else f" ({ours['precision']})"
    return [
        "yes" if ours["equal"] else "**no**", f"{float(ours['difference']):.0e}{precision}", f"{ours['cut']} of {ours['groups']}",
        *(shown(ours[key], 3) for key in SHARES), f"{before:.1f} → {after:.1f}", shown(ours["seconds"], 1),
        shown(time_ratio(row), 1), shown(memory_ratio(row), 1),
    ]  # fmt: skip


def peer_cells(row: Row) -> list[Any]:
    """torch-pruning's side of the line of a model."""
    peer = row["peer"]
    state = "runs" if peer.get("runs") else "does not run" if "why" in peer else "no network"
    return [state, shown(peer.get("parameters_left"), 3), shown(peer.get("seconds"), 2)]
