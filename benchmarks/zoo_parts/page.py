"""The tables of the zoo, as Markdown, and the file of its figures."""

import importlib.metadata
import json
import math
import platform
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]
GOALS = {"timm": ("parameters_left", 0.30), "transformers": ("core_left", 0.60)}
"""For a library the share of parameters that the median is meant to be below, and under which key rows have it."""
LIBRARIES = ("timm", "transformers", "smp", "torchvision", "detection")
TITLES = {"smp": "segmentation-models-pytorch", "detection": "torchvision's detectors"}
PACKAGES = ("torch", "torchvision", "timm", "transformers", "segmentation-models-pytorch", "torch-pruning")
ABOUT = """# Half of the open channels, over a zoo of models

`channel_groups` offers groups of channels; half of the units of each open group, drawn with seed 0, are masked at the consumers, and
`slim` removes them. **Equal** means that the masked and the slim model agree on fresh inputs in float64 (to 1e-8 of the largest
output), for batches of one and of three. Weights are random, as are norms and scales. *Core* counts without embeddings and output heads. Beside it
stands torch-pruning's `MagnitudePruner` at a ratio of 0.5, with the output layers ignored: its network runs if a forward pass ends,
with outputs of the same shapes. Each model has a process of its own with one thread; times are CPU seconds, *ratio* is our time over
torch-pruning's, latency is that of one sample, and *memory* is the peak over the imports, in sizes of the model in float64.
"""


def library(row: Row) -> str:
    return str(row["name"]).partition("/")[0]


def values(rows: Iterable[Row], side: str, key: str) -> list[float]:
    """What the rows have under ``key``, of those that have it."""
    return [row[side][key] for row in rows if row.get(side, {}).get(key) is not None]


def median(found: Sequence[float], digits: int = 2) -> str:
    return f"{statistics.median(found):.{digits}f}" if found else "–"


def ratio(row: Row) -> float | None:
    """Our CPU time over torch-pruning's, where both end."""
    ours, peer = row["ours"].get("seconds"), row["peer"].get("seconds")
    return ours / peer if ours is not None and peer else None


# ---------------------------------------------------------------------- tables


def summary(rows: Sequence[Row]) -> str:
    """One line for each library, and one for all."""
    head = (
        "| | models | slimmed | equal | unequal | parameters left | core left | FLOPs left | core FLOPs left | torch-pruning runs "
        "| its parameters left | time over torch-pruning's: median | worst | memory: median | worst |"
    )
    lines = [head, "|" + " --- |" * head.count("| ")]
    for name in (*LIBRARIES, "all"):
        part = [r for r in rows if name in ("all", library(r))]
        if not part:
            continue
        slim = [r for r in part if "equal" in r["ours"]]
        ratios = [x for r in part if (x := ratio(r)) is not None]
        memory = values(part, "ours", "peak_ratio")
        runs = [r for r in part if r["peer"].get("runs")]
        cells = [
            TITLES.get(name, name), len(part), len(slim), sum(r["ours"]["equal"] for r in slim), sum(not r["ours"]["equal"] for r in slim),
            *(median(values(part, "ours", k), 3) for k in ("parameters_left", "core_left", "flops_left", "core_flops_left")),
            len(runs), median(values(runs, "peer", "parameters_left"), 3), median(ratios, 1), f"{max(ratios):.1f}" if ratios else "–",
            median(memory, 1), f"{max(memory):.1f}" if memory else "–",
        ]  # fmt: skip
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def models(rows: Sequence[Row]) -> str:
    """One line for each model."""
    head = (
        "| model | equal | difference | groups cut | parameters left | core left | FLOPs left | latency, ms | time, s | ratio | memory "
        "| torch-pruning | its parameters left | its time, s |"
    )
    lines = [head, "|" + " --- |" * head.count("| ")]
    for row in rows:
        ours, peer, times = row["ours"], row["peer"], ratio(row)
        if "failed" in ours:
            cells = [row["name"], "–", ours["failed"], *["–"] * 8]
        elif "equal" not in ours:
            cells = [row["name"], "–", "no open group", f"0 of {ours['groups']}", *["–"] * 7]
        else:
            before, after = ours["latency"]
            cells = [
                row["name"], "yes" if ours["equal"] else "**no**", f"{ours['difference']:.0e}" + ("" if ours["precision"] == "float64" else f" ({ours['precision']})"),
                f"{ours['cut']} of {ours['groups']}", *(f"{ours[k]:.3f}" for k in ("parameters_left", "core_left", "flops_left")),
                f"{before:.1f} → {after:.1f}", f"{ours['seconds']:.1f}", "–" if times is None else f"{times:.1f}", f"{ours['peak_ratio']:.1f}",
            ]  # fmt: skip
        left = peer.get("parameters_left")
        cells += ["runs" if peer.get("runs") else peer.get("failed", peer.get("why", "–")), "–" if left is None else f"{left:.3f}"]
        cells.append(f"{peer['seconds']:.1f}" if "seconds" in peer else "–")
        lines.append("| " + " | ".join(cell_text(c) for c in cells) + " |")
    return "\n".join(lines)


def above(rows: Sequence[Row]) -> str:
    """The models of which more is left than the goal says, and the reasons that keep most weights."""
    lines = ["| model | left | goal | what keeps it: groups, share of the parameters |", "| --- | --- | --- | --- |"]
    for row in rows:
        key, goal = GOALS.get(library(row), ("", math.inf))
        left = row["ours"].get(key, 1.0) if key else 0.0
        if left > goal:
            kept = [f"{k['reason']} ({k['groups']}, {k['share']:.0%})" for k in row["ours"].get("stays", []) if k["share"] >= 0.005]
            what = "; ".join(kept) or row["ours"].get("failed", "nothing but halves that were not masked")
            lines.append(f"| {row['name']} | {left:.3f} | {goal:.2f} | {cell_text(what)} |")
    return "\n".join(lines) if len(lines) > 2 else "None."


def reasons(rows: Sequence[Row]) -> str:
    """Every kind of reason, with the groups and models that have it."""
    found: dict[str, Row] = {}
    for row in rows:
        for kind in row["ours"].get("stays", []):
            seen = found.setdefault(kind["reason"], {"groups": 0, "models": [], "first": kind["first"]})
            seen["groups"] += kind["groups"]
            seen["models"].append(row["name"])
    lines = ["| reason | groups | models | such as |", "| --- | --- | --- | --- |"]
    for kind, seen in sorted(found.items(), key=lambda item: -item[1]["groups"]):
        example = f"{seen['models'][0]}: `{seen['first']}`"
        lines.append(f"| {cell_text(kind)} | {seen['groups']} | {len(seen['models'])} | {example} |")
    return "\n".join(lines)


def cell_text(cell: Any) -> str:
    """Text that fits in a cell of a table."""
    return str(cell).replace("|", "\\|").replace("\n", " ")


# ---------------------------------------------------------------------- files


def machine() -> str:
    """The processor's name and its cores."""
    file = Path("/proc/cpuinfo")
    lines = file.read_text().splitlines() if file.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0] if names else platform.processor()}, {len(names) or '?'} cores, {platform.machine()}"


def versions() -> str:
    """Versions of Python and of the packages that the figures depend on."""
    found = [f"Python {platform.python_version()}"]
    for package in PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"no {package}")
    return ", ".join(found)


def text(rows: Sequence[Row], source: str) -> str:
    """The whole page."""
    parts = [
        ABOUT, f"{source}\n", "## In the median\n", summary(rows), "\n## Models above their goal\n", above(rows),
        "\n## What stays, and why\n", reasons(rows), "\n## Every model\n", models(rows),
    ]  # fmt: skip
    return "\n".join(parts) + "\n"


def write(rows: Sequence[Row], source: str, file: Path) -> None:
    """Write the page and, beside it, the figures, one model a line."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.with_suffix(".md").write_text(text(rows, source))
    lines = ",\n    ".join(json.dumps(rounded(row)) for row in rows)
    file.with_suffix(".json").write_text(f'{{"source": {json.dumps(source)}, "rows": [\n    {lines}\n]}}\n')


def rounded(value: Any) -> Any:
    """Numbers with four digits, in lists and mappings too; more are not measured."""
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.4g}") if isinstance(value, float) and math.isfinite(value) else value
