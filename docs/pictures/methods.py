"""Draws how the topology of each method moves: one picture for each class of ``sparse_callbacks.methods``, light and dark.

    python docs/pictures/methods.py                       # all, into docs/images/methods
    python docs/pictures/methods.py --only RigL SET       # some of them

Every picture is of one run of the same network on scikit-learn's handwritten digits, which need no download: 64 pixels, 256 and
128 hidden units, ten classes, 40 epochs of 21 steps. Above: the first layer at five times (of methods that decide about whole units:
its units over time). Below: the share of zeros, and the weights that each epoch has grown and dropped. What each picture shows is
also written in words, to pictures.json beside them, for the ``alt`` of a page.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from looks import IMAGES, SCHEMES, Scheme, scheme_drawing, write_svg
from recorded_digits import EPOCHS, Recorded, recorded_run

from sparse_callbacks import methods
from sparse_callbacks.reporting.mask_pictures import STATES

SIZE = (7.3, 4.3)
"""Inches: 700 pixels wide in a browser."""
GROWN, DROPPED = STATES["grown"][0], STATES["dropped"][0]
CORNER = 16
"""Units and inputs of an N:M mask that are drawn."""


def times(epochs: int) -> list[int]:
    """The five times of the small pictures; masks move most at the beginning."""
    return [0, *(max(1, round(epochs * share)) for share in (1 / 8, 1 / 4, 3 / 8)), epochs]


def kind_of(run: Recorded) -> str:
    """What the upper row shows: ``"units"``, ``"groups"`` of N:M, or connections by ``"pixels"``."""
    last, readers = run.layer(run.epochs), run.masks[run.epochs]["net.2.weight"]
    of_unit = torch.stack([last.float().mean(1), readers.float().mean(0)])
    if bool(((of_unit == 0) | (of_unit == 1)).all()) and not bool(run.units(run.epochs).all()):
        return "units"
    in_groups = last.view(len(last), -1, 4).sum(-1)
    return "groups" if bool((in_groups == 2).all()) else "pixels"


def units_over_time(run: Recorded) -> torch.Tensor:
    """Whether each unit of the first hidden layer is active: bool [units, times], those that are active for longest above."""
    alive = torch.stack([run.units(epoch) for epoch in range(run.epochs + 1)], dim=1)
    return alive[alive.sum(1).argsort(descending=True, stable=True)]


def alt_text(run: Recorded) -> str:
    """The picture in words."""
    share, (grown, dropped) = run.sparsity(), run.changes()
    kind, moved = kind_of(run), [g + d for g, d in zip(grown, dropped, strict=True)]
    layer = [run.layer(epoch) for epoch in (0, run.epochs)]
    if kind == "units":
        units = run.units(run.epochs)
        seen = f"of {len(units)} units of the first hidden layer {int(units.sum())} are active at the end"
    elif kind == "groups":
        seen = "two of every four inputs of a unit are active in the first layer"
    else:
        first, last = (mask.sum(0) for mask in layer)
        seen = (
            f"pixels have {int(first.min())} to {int(first.max())} connections to the first layer at the start, and "
            f"{int(last.min())} to {int(last.max())} at the end"
        )
    changed = (
        f"an epoch changes up to {100 * max(moved):.2g} % of the weights"
        if any(moved)
        else "no connection ever changes"
    )
    zeros = f"sparsity is {100 * share[0]:.1f} % at the start and {100 * share[-1]:.1f} % at the end"
    return f"{run.method} over {run.epochs} epochs on handwritten digits: {seen}; {zeros}; {changed}."


# ---------------------------------------------------------------------- drawing


def method_figure(run: Recorded, scheme: Scheme) -> Any:
    """The picture of a run."""
    with scheme_drawing(scheme) as figures:
        figure = figures.Figure(figsize=SIZE, layout="constrained")
        above, below = figure.subfigures(2, 1, height_ratios=(1.0, 1.05))
        {"units": draw_units, "groups": draw_groups, "pixels": draw_pixels}[kind_of(run)](above, run, scheme)
        left, right = below.subplots(1, 2)
        draw_sparsity(left, run, scheme)
        draw_changes(right, run, scheme)
        figure.draw_without_rendering()
        return figure


def draw_pixels(part: Any, run: Recorded, scheme: Scheme) -> None:
    """Connections of each input pixel, at five times, in one scale."""
    import matplotlib as mpl

    counts = [run.layer(epoch).sum(0).view(8, 8).numpy() for epoch in times(run.epochs)]
    # by square roots: a network that begins dense has four times as many connections of a pixel as it ever has afterwards
    scale = mpl.colors.PowerNorm(0.5, 0, max(count.max() for count in counts))
    heading(part, f"{run.method}: connections of each of the 8 x 8 input pixels to the first layer")
    axes = part.subplots(1, 5)
    for epoch, frame, count in zip(times(run.epochs), axes, counts, strict=True):
        image = frame.imshow(enlarged(count), cmap="viridis", norm=scale)
        bare(frame, epoch, scheme)
    bar = part.colorbar(image, ax=axes, pad=0.01, aspect=14, shrink=0.85)
    bar.ax.yaxis.set_major_locator(mpl.ticker.MaxNLocator(4, integer=True))
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def draw_groups(part: Any, run: Recorded, scheme: Scheme) -> None:
    """A corner of the first layer's mask, at five times, with lines around the groups of four inputs."""
    import matplotlib as mpl

    heading(part, f"{run.method}: {CORNER} units (rows) by {CORNER} inputs of the first layer, in groups of four")
    colours = mpl.colors.ListedColormap([scheme.grid, scheme.accent])
    axes = part.subplots(1, 5)
    # from rows and columns where digits have ink
    for epoch, frame in zip(times(run.epochs), axes, strict=True):
        corner = run.layer(epoch)[:CORNER, 24 : 24 + CORNER]
        frame.imshow(enlarged(corner.numpy().astype(float)), cmap=colours, vmin=0, vmax=1)
        for place in range(4, CORNER, 4):
            frame.axvline(place * 8 - 0.5, color=scheme.page, linewidth=2)
        bare(frame, epoch, scheme)


def draw_units(part: Any, run: Recorded, scheme: Scheme) -> None:
    """Which units of the first layer are active, over time."""
    import matplotlib as mpl

    alive = units_over_time(run)
    heading(part, f"{run.method}: units of the first hidden layer over time")
    frame = part.subplots()
    frame.imshow(
        alive.numpy().astype(float), cmap=mpl.colors.ListedColormap([scheme.grid, scheme.accent]), vmin=0, vmax=1, aspect="auto",
        extent=(-0.5, run.epochs + 0.5, len(alive), 0),
    )  # fmt: skip
    frame.grid(False)
    frame.set(xlabel="epoch", ylabel="units")
    names = {"active": scheme.accent, "pruned": scheme.grid}
    handles = [mpl.patches.Patch(color=shade, label=name) for name, shade in names.items()]
    part.legend(handles=handles, loc="outside right center")


def draw_sparsity(frame: Any, run: Recorded, scheme: Scheme) -> None:
    """The share of zeros over time."""
    frame.plot(range(run.epochs + 1), [100 * share for share in run.sparsity()], color=scheme.accent)
    frame.set(title="Sparsity of all layers (%)", xlabel="epoch", ylim=(0, 103), xlim=(0, run.epochs))


def draw_changes(frame: Any, run: Recorded, scheme: Scheme) -> None:
    """Weights that each epoch has grown, upwards, and dropped, downwards."""
    import matplotlib as mpl

    grown, dropped = run.changes()
    places = np.arange(1, run.epochs + 1) - 0.5
    frame.bar(places, [100 * g for g in grown], width=0.8, color=GROWN, label="grown")
    frame.bar(places, [-100 * d for d in dropped], width=0.8, color=DROPPED, label="dropped")
    frame.axhline(0, color=scheme.ink, linewidth=0.8)
    frame.set(title="Weights changed in each epoch (%)", xlabel="epoch", xlim=(0, run.epochs))
    reach = 100 * max(*grown, *dropped)
    if reach:
        # bars that fill the frame leave no room for the legend
        room = 0.6 * reach if sum(grown) > 0.8 * len(grown) * max(grown) > 0 else 0.0
        place = {"loc": "upper left", "ncols": 2} if room else {"loc": "best"}
        frame.set_ylim(-1.1 * 100 * max(dropped) - 0.05 * reach, 1.1 * 100 * max(grown) + 0.05 * reach + room)
        frame.legend(**place, handlelength=1)
    else:
        frame.set_ylim(-1, 1)
        frame.text(run.epochs / 2, 0.12, "no connection ever changes", ha="center", va="bottom")
    frame.yaxis.set_major_locator(mpl.ticker.MaxNLocator(5))
    frame.yaxis.set_major_formatter(lambda value, _: f"{abs(value):g}")


def heading(part: Any, text: str) -> None:
    """The title of the picture."""
    part.suptitle(text, x=0.01, ha="left", fontsize=10.5, fontweight="bold")


def bare(frame: Any, epoch: int, scheme: Scheme) -> None:
    """An image without an axis, under its time."""
    frame.grid(False)
    frame.set_xticks([])
    frame.set_yticks([])
    for spine in frame.spines.values():
        spine.set(visible=True, color=scheme.grid)
    frame.set_title(f"epoch {epoch}" if epoch else "start", fontweight="normal", loc="center")


def enlarged(picture: np.ndarray) -> np.ndarray:
    """Every pixel as 8 x 8, so that a viewer that smooths images leaves squares."""
    return np.kron(picture, np.ones((8, 8)))


# ---------------------------------------------------------------------- command


def write(names: Sequence[str], folder: Path, epochs: int) -> None:
    """Write the pictures of the methods, and what they show in words."""
    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "pictures.json"
    texts = json.loads(words.read_text()) if words.is_file() else {}
    for name in names:
        run = recorded_run(name, epochs)
        texts[name] = alt_text(run)
        for scheme in SCHEMES:
            with scheme_drawing(scheme):
                write_svg(method_figure(run, scheme), folder / f"{name.lower()}_{scheme.name}.svg", texts[name])
        print(texts[name], flush=True)
    words.write_text(json.dumps(dict(sorted(texts.items())), indent=2) + "\n")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write what the command line names."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=methods.__all__, default=methods.__all__, metavar="METHOD")
    parser.add_argument("--out", type=Path, default=IMAGES / "methods", help="the folder that pictures are written to")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    given = parser.parse_args(arguments)
    write(given.only, given.out, given.epochs)


if __name__ == "__main__":
    main()
