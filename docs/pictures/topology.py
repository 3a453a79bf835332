"""Draws the picture of the README: connections that RigL moves to where digits have strokes, as an animation.

    python docs/pictures/topology.py --data mnist --root FOLDER      # the committed one; FOLDER as torchvision's MNIST(root=FOLDER)
    python docs/pictures/topology.py                                 # of scikit-learn's digits, which need no download

A network of 300 and 100 hidden units trains with most of its weights at zero, from the first step to the last. Left: how many
units of the first layer read each pixel. Right: test accuracy, beside that of the same network trained dense; the share of weights that are
zero; and the share of the pixels' connections that read the middle of the image, a quarter of its area. Writes topology_light.gif,
topology_dark.gif and topology.json, which has the figures and the picture in words. One run, of one seed.
"""

import argparse
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from looks import IMAGES, SCHEMES, Scheme, scheme_drawing
from sklearn.datasets import load_digits
from torch import Tensor, nn

from sparse_callbacks import sparsify
from sparse_callbacks.methods import RigL
from sparse_callbacks.reporting.style import PALETTE

INCHES, DPI = (8.0, 4.0), 100
FRAME_MS, LAST_MS = 120, 4000
BATCH = 100
ZEROS, MIDDLE = PALETTE[1], PALETTE[2]
"""Colours of the two curves of shares."""


@dataclass(frozen=True)
class Setting:
    """What is trained.

    Attributes:
        label: the name of the data in the picture.
        side: pixels of an image's side.
        sparsity: the share of zeros in the first two layers; the last one is dense.
        steps: optimizer steps.
        every: steps between updates.
        decay: weight decay, which lets connections that are never used become the smallest.
    """

    label: str
    side: int
    sparsity: float
    steps: int
    every: int
    decay: float


SETTINGS = {
    "mnist": Setting("MNIST", 28, 0.95, 6000, 50, 1e-3),
    "digits": Setting("scikit-learn's digits", 8, 0.95, 1500, 15, 1e-3),
}


@dataclass
class History:
    """What the picture shows, at each frame."""

    steps: list[int] = field(default_factory=list)
    connections: list[np.ndarray] = field(default_factory=list)
    accuracy: list[float] = field(default_factory=list)
    zeros: list[float] = field(default_factory=list)

    def in_the_middle(self) -> list[float]:
        """Percent of the connections that read the middle of the image, a quarter of its area."""
        inner = slice(len(self.connections[0]) // 4, -(len(self.connections[0]) // 4))
        return [100 * float(counts[inner, inner].sum() / counts.sum()) for counts in self.connections]


Split = tuple[Tensor, Tensor, Tensor, Tensor]


def loaded(data: str, root: Path | None) -> Split:
    """Training images and labels, test images and labels; values from 0 to 1, so that paper is 0."""
    if data == "mnist":
        from torchvision.datasets import MNIST

        parts = [MNIST(str(root), train=train) for train in (True, False)]
        (x, y), (test_x, test_y) = ((part.data.float().flatten(1) / 255, part.targets) for part in parts)
        return x, y, test_x, test_y
    images, labels = load_digits(return_X_y=True)
    x, y = torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)
    return x[:1347], y[:1347], x[1347:], y[1347:]


def train(setting: Setting, split: Split, steps: int, frames: int, sparse: bool) -> History:
    """Train the network, sparse or dense, and look at it ``frames`` times."""
    torch.manual_seed(0)
    x, y, test_x, test_y = split
    net = nn.Sequential(nn.Linear(setting.side**2, 300), nn.ReLU(), nn.Linear(300, 100), nn.ReLU(), nn.Linear(100, 10))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=setting.decay)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    method = RigL(
        setting.sparsity, distribution="uniform", keep_dense="last", every=min(setting.every, max(1, steps // 4)), stop=0.85,
        drop_fraction=0.3, rescale="layer", print_plan=False,
    )  # fmt: skip
    run = sparsify(method, net, optimizer, steps=steps) if sparse else None
    history, looks = History(), {round(steps * i / (frames - 1)) for i in range(frames)}
    order = iter(batches(len(x)))
    for step in range(steps + 1):
        if step in looks:
            history.steps.append(step)
            with torch.no_grad():
                history.accuracy.append(100 * (net(test_x).argmax(1) == test_y).float().mean().item())
            if run is not None:
                history.zeros.append(100 * run.measured_sparsity()["sparsity/total"])
                history.connections.append(run.masks["0.weight"].sum(0).view(setting.side, setting.side).numpy().copy())
        if step < steps:
            chosen = next(order)
            nn.functional.cross_entropy(net(x[chosen]), y[chosen]).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    if run is not None:
        run.close()
    return history


def batches(size: int) -> Iterator[Tensor]:
    """Indices of batches, shuffled anew for each pass over the data; without an end."""
    while True:
        order = torch.randperm(size)
        yield from (order[i : i + BATCH] for i in range(0, size - BATCH + 1, BATCH))


# ---------------------------------------------------------------------- drawing


def animated(history: History, dense: float, setting: Setting, scheme: Scheme, path: Path) -> None:
    """Write the animation."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from PIL import Image

    with scheme_drawing(scheme) as figures:
        figure = figures.Figure(figsize=INCHES, dpi=DPI, layout="constrained", facecolor=scheme.page)
        canvas = FigureCanvasAgg(figure)
        moving = Moving(figure, history, dense, setting, scheme)
        canvas.draw()
        figure.set_layout_engine(None)  # nothing may jump between frames
        drawn = []
        for number in range(len(history.steps)):
            moving.show(number)
            canvas.draw()
            drawn.append(Image.fromarray(np.asarray(canvas.buffer_rgba())[:, :, :3].copy()))
    palette = Image.new("P", (1, 1))
    palette.putpalette([part for shade in palette_of(scheme) for part in shade])
    small = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in drawn]
    path.parent.mkdir(parents=True, exist_ok=True)
    small[0].save(
        path, save_all=True, append_images=small[1:], loop=0, duration=[FRAME_MS] * (len(small) - 1) + [LAST_MS],
        optimize=True,
    )  # fmt: skip


def palette_of(scheme: Scheme) -> list[tuple[int, int, int]]:
    """The colours of an animation: those of the map, and each other one in steps from the background, as edges of text are."""
    import matplotlib as mpl

    page = np.array(mpl.colors.to_rgb(scheme.page))
    steps = {scheme.ink: 24, scheme.accent: 10, ZEROS: 10, MIDDLE: 10, scheme.grid: 4}
    found = [mpl.colormaps["viridis"](place)[:3] for place in np.linspace(0, 1, 64)]
    for shade, number in steps.items():
        found += [page + share * (np.array(mpl.colors.to_rgb(shade)) - page) for share in np.linspace(0, 1, number)]
    red, green, blue = (np.round(255 * np.array(found)).astype(int).T).tolist()
    return list(zip(red, green, blue, strict=True))


class Moving:
    """The figure, and what changes in it from frame to frame."""

    def __init__(self, figure: Any, history: History, dense: float, setting: Setting, scheme: Scheme) -> None:
        self.history = history
        figure.suptitle(
            f"RigL trains a network with {history.zeros[-1]:.0f} % of its weights at zero", x=0.012, ha="left", fontsize=14,
            fontweight="bold",
        )  # fmt: skip
        left, right = figure.subfigures(1, 2, width_ratios=(1.08, 1))
        frame = left.subplots()
        top = int(np.quantile(history.connections[-1], 0.999))
        self.image = frame.imshow(history.connections[0], cmap="viridis", vmin=0, vmax=top)
        frame.grid(False)
        frame.set_xticks([])
        frame.set_yticks([])
        frame.spines[:].set_visible(False)
        frame.set_title("Connections of each input pixel", fontsize=11.5, loc="left")
        bar = left.colorbar(self.image, ax=frame, pad=0.02, aspect=24, shrink=0.9, extend="max")
        bar.outline.set_visible(False)
        bar.ax.tick_params(labelsize=10)
        above, below = right.subplots(2, 1, sharex=True, height_ratios=(1.25, 1))
        low = 5 * np.floor((min(dense, *history.accuracy[len(history.accuracy) // 6 :]) - 4) / 5)
        above.axhline(dense, color=scheme.ink, linestyle="--", linewidth=1.2)
        said = {"transform": above.transAxes, "ha": "right"}
        above.text(0.98, 0.3, f"dense (dashed): {dense:.1f} %", fontsize=10.5, **said)
        (self.accuracy,) = above.plot([], [], color=scheme.accent, linewidth=2.4)
        self.reached = above.text(0.98, 0.1, "", fontsize=12, fontweight="bold", color=scheme.accent, **said)
        above.set_title(f"Test accuracy on {setting.label} (%)", fontsize=11.5)
        above.set(ylim=(low, 100.5), xlim=(0, history.steps[-1]))
        (zeros,) = below.plot([], [], color=ZEROS, linewidth=2.4, label="weights at zero")
        (middle,) = below.plot([], [], color=MIDDLE, linewidth=2.4, label="connections in the middle quarter")
        self.shares = [(zeros, history.zeros), (middle, history.in_the_middle())]
        below.set_title("Shares (%)", fontsize=11.5)
        below.set(ylim=(0, 105), xlabel="optimizer steps", xlim=(0, history.steps[-1]))
        below.legend(loc="center left", bbox_to_anchor=(-0.02, 0.66), fontsize=9.5, handlelength=1.2, labelspacing=0.2)
        for axes in (above, below):
            axes.tick_params(labelsize=10)
            axes.xaxis.label.set_size(10.5)
            axes.locator_params(axis="x", nbins=5)
            axes.locator_params(axis="y", nbins=4)
            axes.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")

    def show(self, number: int) -> None:
        """Put the figure into the state of a frame."""
        history, steps = self.history, self.history.steps[: number + 1]
        self.image.set_data(history.connections[number])
        self.accuracy.set_data(steps, history.accuracy[: number + 1])
        self.reached.set_text(f"sparse: {history.accuracy[number]:.1f} %")
        for line, values in self.shares:
            line.set_data(steps, values[: number + 1])


def figures_of(history: History, dense: float, setting: Setting, data: str) -> dict[str, Any]:
    """What a text beside the picture may quote."""
    place = " --root FOLDER" if data == "mnist" else ""
    middle = history.in_the_middle()
    alt = (
        f"Animation: a network that RigL trains on {setting.label} with {history.zeros[-1]:.1f} % of its weights at zero. The "
        f"connections of the input pixels are spread evenly at first and gather where digits have strokes: the middle "
        f"quarter of the image has {middle[0]:.0f} % of them at the start and {middle[-1]:.0f} % at the end. Test accuracy reaches "
        f"{history.accuracy[-1]:.1f} %; the same network trained dense has {dense:.1f} %."
    )
    return {
        "command": f"python docs/pictures/topology.py --data {data}{place}",
        "alt": alt,
        "steps": history.steps[-1],
        "sparsity_percent": round(history.zeros[-1], 2),
        "accuracy_percent": round(history.accuracy[-1], 2),
        "dense_accuracy_percent": round(dense, 2),
        "middle_quarter_percent": [round(middle[0], 1), round(middle[-1], 1)],
    }


# ---------------------------------------------------------------------- command


def main(arguments: Sequence[str] | None = None) -> None:
    """Train, draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=SETTINGS, default="digits")
    parser.add_argument("--root", type=Path, help="the folder of MNIST's files, in torchvision's layout")
    parser.add_argument("--out", type=Path, default=IMAGES, help="the folder that the pictures are written to")
    parser.add_argument("--steps", type=int, help="optimizer steps")
    parser.add_argument("--frames", type=int, default=56)
    given = parser.parse_args(arguments)
    if given.data == "mnist" and given.root is None:
        parser.error("--data mnist needs --root FOLDER, where torchvision has stored MNIST")
    torch.set_num_threads(1)
    setting, split = SETTINGS[given.data], loaded(given.data, given.root)
    steps = given.steps or setting.steps
    dense = train(setting, split, steps, 2, sparse=False).accuracy[-1]
    history = train(setting, split, steps, min(given.frames, steps + 1), sparse=True)
    found = figures_of(history, dense, setting, given.data)
    for scheme in SCHEMES:
        animated(history, dense, setting, scheme, given.out / f"topology_{scheme.name}.gif")
    (given.out / "topology.json").write_text(json.dumps(found, indent=2) + "\n")
    print(found["alt"])


if __name__ == "__main__":
    main()
