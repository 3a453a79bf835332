"""The picture of docs/real_speed.md, and the blocks of that page which hold measured figures."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from real_speed_parts import accuracy, layers, memory, steps, updates
from real_speed_parts.networks import NETWORKS
from real_speed_parts.report import Figures

DOCS = Path(__file__).parents[2] / "docs"
PAGE, PICTURE = DOCS / "real_speed.md", DOCS / "real_speed.svg"
# Okabe and Ito's colours, which most readers can tell apart
STYLES = {"masked": ("#555555", "s"), "sparse": ("#0072B2", "o"), "grouped": ("#D55E00", "^")}
LABELS = {"masked": "masked", "sparse": "sparse", "grouped": "grouped, 64"}
Row = dict[str, Any]


def picture(rows: list[Row], file: Path) -> None:
    """Time over density, time over width, and memory over density, one line for each storage."""
    import matplotlib as mpl

    mpl.use("Agg")
    # text stays text and nothing is random or dated, so that the file changes only with its figures
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "real_speed", "font.size": 9})
    from matplotlib import pyplot as plt

    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.5), layout="constrained", facecolor="white")
    for storage, (colour, marker) in STYLES.items():
        look = {"color": colour, "marker": marker, "markersize": 4, "label": LABELS[storage]}
        of = [row for row in rows if row["storage"] == storage]
        by_density = sorted((r for r in of if r["width"] == layers.AT_WIDTH), key=lambda r: r["density"])
        by_width = sorted((r for r in of if r["density"] == layers.AT_DENSITY), key=lambda r: r["width"])
        left.plot([r["density"] for r in by_density], [r["ratio"] for r in by_density], **look)
        middle.plot([r["width"] for r in by_width], [r["ratio"] for r in by_width], **look)
        right.plot([r["density"] for r in by_density], [r["bytes"] for r in by_density], **look)
    for axes in (left, middle):
        axes.axhline(1, color="#999999", linewidth=1, linestyle="--")
        axes.set(ylabel="time of a step, over dense", yscale="log")
        axes.set_yticks([0.05, 0.1, 0.2, 0.5, 1, 2], ["0.05", "0.1", "0.2", "0.5", "1", "2"])
        axes.minorticks_off()
    dense = next(r["bytes"] for r in rows if r["storage"] == "dense" and r["width"] == layers.AT_WIDTH)
    right.axhline(dense, color="#999999", linewidth=1, linestyle="--")
    right.set(ylabel="bytes for each weight of the dense matrix", ylim=(0, None))
    for axes in (left, right):
        axes.set(xlabel=f"density (width {layers.AT_WIDTH})", xscale="log")
        ticks = sorted(layers.DENSITIES)
        axes.set_xticks(ticks, [f"{100 * tick:g} %" for tick in ticks])
        axes.minorticks_off()
    middle.set(xlabel=f"width (density {layers.AT_DENSITY:.0%})", xscale="log")
    middle.set_xticks(layers.WIDTHS, [str(width) for width in layers.WIDTHS])
    middle.minorticks_off()
    left.set_title("time over density")
    middle.set_title("time over width")
    right.set_title("memory over density")
    left.legend(loc="lower right", frameon=False)
    figure.savefig(file, metadata={"Date": None}, dpi=130)
    plt.close(figure)


# ---------------------------------------------------------------------- blocks of the page


def source(figures: Figures, part: str) -> str:
    """The commands of a part's figures, and behind those of one machine that machine and the versions, once."""
    by_machine: dict[str, list[str]] = {}
    for each in figures[part]["sources"]:
        command, _, machine = each.partition("; ")
        by_machine.setdefault(machine, []).append(command)
    return "; ".join(f"{', '.join(commands)}; {machine}" for machine, commands in by_machine.items()) + "."


def steps_block(figures: Figures) -> str:
    """The mean over optimizers of each network, sparsity and storage, over dense."""
    cells = steps.keyed(figures["steps"]["rows"])
    storages = [s for s in ("masked", "sparse", "grouped", "auto") if any(s in by for by in cells.values())]
    lines = [f"| a whole step, over dense | sparsity | {' | '.join(storages)} |", "|" + " --- |" * (2 + len(storages))]
    networks = list(dict.fromkeys(n for n, _, _ in cells))
    # figures that were measured later stand last in the file
    for network, sparsity in sorted({(n, s) for n, _, s in cells}, key=lambda cell: (networks.index(cell[0]), cell[1])):
        of = [by for (n, _, s), by in cells.items() if (n, s) == (network, sparsity)]
        found = [f"{sum(by[storage]['ratio'][1] for by in of) / len(of):.2f}" for storage in storages]
        lines.append(f"| {NETWORKS[network].title} | {sparsity:g} | {' | '.join(found)} |")
    missing = steps.not_measured(figures["steps"]["rows"])
    words = " ".join(filter(None, ["Means over SGD and AdamW.", missing, source(figures, "steps")]))
    return "\n".join([*lines, "", words])


def updates_block(figures: Figures) -> str:
    """Updates in steps of the layer, for each layer, storage and method."""
    found: dict[tuple[int, float], dict[tuple[str, str], float]] = {}
    for row in figures["updates"]["rows"]:
        cell = found.setdefault((row["width"], row["sparsity"]), {})
        cell[row["storage"], row["method"]] = updates.in_steps(row)
    kinds = [(storage, method) for storage in updates.STORAGES for method in updates.METHODS]
    head = ["an update, in steps of the layer", *(f"{method}, {storage}" for storage, method in kinds)]
    lines = [f"| {' | '.join(head)} |", "|" + " --- |" * len(head)]
    for (width, sparsity), by in found.items():
        lines.append(f"| {width} x {width} at {sparsity:g} | {' | '.join(f'{by[kind]:.1f}' for kind in kinds)} |")
    return "\n".join([*lines, "", source(figures, "updates")])


def picture_block(figures: Figures) -> str:
    return f"![Time and memory of a layer over density and width, for each storage](real_speed.svg)\n\n{source(figures, 'layers')}"


def table_block(part: str, table: Callable[[list[Row]], str]) -> Callable[[Figures], str]:
    return lambda figures: f"{table(figures[part]['rows'])}\n\n{source(figures, part)}"


BLOCKS: dict[str, Callable[[Figures], str]] = {
    "steps": steps_block,
    "layers": picture_block,
    "updates": updates_block,
    "accuracy": table_block("accuracy", accuracy.table),
    "memory": table_block("memory", memory.table),
    "largest": table_block("largest", memory.largest_table),
}


def with_blocks(page: str, figures: Figures) -> str:
    """The page with its blocks written anew from the figures; a block without figures says so."""
    for part, block in BLOCKS.items():
        text = block(figures) if part in figures else "Not measured yet."
        pattern = rf"(<!-- figures: {part} -->\n).*?(\n<!-- end -->)"
        page = re.sub(pattern, lambda found, text=text: f"{found[1]}{text}{found[2]}", page, flags=re.DOTALL)
    return page


def write(figures: Figures) -> None:
    """Write the picture and the blocks."""
    if "layers" in figures:
        picture(figures["layers"]["rows"], PICTURE)
    PAGE.write_text(with_blocks(PAGE.read_text(), figures))
