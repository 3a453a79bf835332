"""Pictures of masks: what became of each connection, and which inputs are read."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_callbacks.core.inspection import extra
from sparse_callbacks.core.record.record_file import LayerRecord, RecordedRun
from sparse_callbacks.reporting import readable
from sparse_callbacks.reporting.style import arrange, drawing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 256
"""Pixels of a mask's picture in each direction; larger masks are averaged."""
MOST = 12
"""Pictures of masks in a report at most."""
STATES = {
    "kept": ("#0072B2", 1.0, "active at the beginning and at the end"),
    "grown": ("#E69F00", 1.0, "grown"),
    "dropped": ("#999999", 0.45, "dropped"),
}
"""What became of a connection: the colour, its opacity and the text of each state."""


def as_picture(mask: Tensor) -> Tensor:
    """A mask as a matrix: outputs down, inputs across.

    Each kernel of a convolution is a tile. Outputs with few inputs stand side by side, where they would make a tower.

    Args:
        mask: bool, of any shape.

    Returns:
        bool [rows, columns].
    """
    if mask.ndim < 3:
        return mask.reshape(-1, mask.shape[-1] if mask.ndim else 1)
    kernels = mask.reshape(*mask.shape[:2], -1, mask.shape[-1])
    outputs, inputs, height, width = kernels.shape
    down, across = outputs * height, inputs * width
    beside = round((down / across) ** 0.5) if down > 2 * across else 1
    # places without an output are those of connections that were never active
    filled = torch.cat([kernels, kernels.new_zeros(-outputs % beside, inputs, height, width)])
    tiles = filled.reshape(-1, beside, inputs, height, width)
    return tiles.permute(0, 3, 1, 2, 4).reshape(-1, beside * across)


def mask_picture(first: Tensor, last: Tensor) -> Tensor:
    """What became of each connection, as colours: float [rows, columns, 4], at most :data:`SIDE` in each direction.

    Args:
        first: bool, the mask at the beginning.
        last: bool, the same shape: the mask at the end.
    """
    before, after = as_picture(first.bool()), as_picture(last.bool())
    parts = {"kept": before & after, "grown": ~before & after, "dropped": before & ~after}
    shares = torch.stack([_averaged(part) for part in parts.values()], dim=-1)
    shades = torch.tensor([[int(STATES[p][0][i : i + 2], 16) / 255 for i in (1, 3, 5)] for p in parts])
    opacity = shares * torch.tensor([STATES[p][1] for p in parts])
    cover = opacity.sum(-1, keepdim=True)
    # where several connections share a pixel: their mean colour, more opaque than they are many, or few would not be seen
    return torch.cat([opacity @ shades / cover.clamp(min=1e-9), (cover * _strength(shares)).clamp(max=1)], dim=-1)


def _strength(shares: Tensor) -> Tensor:
    """The factor that makes the opacity of a pixel with a share ``s`` of connections that of ``sqrt(s)``."""
    return shares.sum(-1, keepdim=True).clamp(min=1e-9).rsqrt()


def _averaged(part: Tensor) -> Tensor:
    """Shares of a bool matrix in blocks, so that no side is longer than :data:`SIDE`; an edge block may be smaller."""
    rows, columns = (-(-side // SIDE) for side in part.shape)
    values = part.float()[None, None]
    return torch.nn.functional.avg_pool2d(values, (rows, columns), ceil_mode=True)[0, 0]


def input_picture(layer: LayerRecord, mask: Tensor) -> Tensor | None:
    """Active connections of each input of a linear layer that reads square images; None for another layer.

    Returns:
        float [side, side], added over all colours; images of 8 to 256 pixels a side.
    """
    if mask.ndim != 2:
        return None
    for colours in (1, 3):
        side = round((layer.shape[1] / colours) ** 0.5)
        if colours * side * side == layer.shape[1] and 8 <= side <= SIDE:
            return mask.float().sum(0).reshape(colours, side, side).sum(0)
    return None


def pictured(run: RecordedRun) -> list[LayerRecord]:
    """The layers whose masks the record holds, whole and as large as their weights, at most :data:`MOST` of them."""
    found = []
    for layer in run.run.layers:
        pair = run.masks.get(layer.name, {})
        if layer.size and all(key in pair and tuple(pair[key].shape) == layer.shape for key in ("first", "last")):
            found.append(layer)
    return found[:MOST]


def mask_figure(run: RecordedRun, layer: LayerRecord, name: str) -> "Figure":
    """The drawing of a layer's mask.

    Args:
        run: the recorded run.
        layer: one of :func:`pictured`.
        name: the layer's name in the title.
    """
    first, last = (run.masks[layer.name][key] for key in ("first", "last"))
    rows, columns = as_picture(last).shape
    # as high as it is in truth, but neither a line nor a tower
    height = min(1.1, max(0.3, rows / columns))
    with drawing() as figures:
        figure: Figure = figures.Figure(figsize=(3.5, 0.75 + 2.8 * height), layout="constrained")
        axes = figure.subplots()
        axes.imshow(
            mask_picture(first, last).numpy(), interpolation="none", extent=(0, columns, rows, 0),
            aspect="equal" if height == rows / columns else "auto",
        )  # fmt: skip
        # drawn to its edges, whatever the ticks
        axes.set(xlim=(0, columns), ylim=(rows, 0), autoscale_on=False)
        axes.grid(False)
        axes.set_title(f"{name} ({readable.shape_text(layer.shape)})")
        axes.spines[["top", "right"]].set_visible(True)
        if last.ndim < 3:
            axes.set_xlabel("inputs")
            axes.set_ylabel("outputs")
            axes.locator_params(axis="x", nbins=5, integer=True)
            axes.locator_params(axis="y", nbins=5 if height > 0.5 else 2, integer=True)
        else:
            axes.set_xlabel("kernels, each a tile")
            _mark_tiles(axes, rows, columns, last)
        return arrange(figure)


def _mark_tiles(axes: Any, rows: int, columns: int, mask: Tensor) -> None:
    """Lines between the kernels of a convolution, where they are wide enough to be told apart."""
    width = mask.shape[-1]
    height = mask[0, 0].numel() // width
    axes.set_xticks([])
    axes.set_yticks([])
    if max(rows, columns) <= 100 and height * width > 1:
        axes.set_xticks(range(width, columns, width), minor=True)
        axes.set_yticks(range(height, rows, height), minor=True)
        axes.grid(which="minor", linewidth=0.5)
        axes.tick_params(which="minor", length=0)


def input_figure(run: RecordedRun) -> "Figure | None":
    """How many connections each pixel keeps where the first layer reads square images; None elsewhere."""
    first = (run.run.chain or [layer.name for layer in run.run.layers if layer.sparse])[:1]
    layer = next((layer for layer in pictured(run) if [layer.name] == list(first)), None)
    seen = None if layer is None else input_picture(layer, run.masks[layer.name]["last"])
    if seen is None:
        return None
    with drawing() as figures:
        figure: Figure = figures.Figure(figsize=(3.5, 2.9), layout="constrained")
        axes = figure.subplots()
        image = axes.imshow(seen.numpy(), cmap="viridis", interpolation="none", vmin=0)
        axes.grid(False)
        axes.set_title("Connections of each input pixel")
        axes.locator_params(nbins=5, integer=True)
        bar = figure.colorbar(
            image, ax=axes, pad=0.02, ticks=extra("matplotlib.ticker", "report").MaxNLocator(5, integer=True)
        )
        bar.outline.set_visible(False)
    return arrange(figure)


def mask_label(run: RecordedRun, layer: LayerRecord) -> str:
    """What the picture of a mask shows, for readers who cannot see it: how many connections it has, and how many moved."""
    first, last = (run.masks[layer.name][key].bool() for key in ("first", "last"))
    grown, dropped = int((last & ~first).sum()), int((first & ~last).sum())
    return (
        f"Mask of {layer.name}: {int(last.sum()):,} of {layer.size:,} connections are active at the end "
        f"({readable.share(float(last.float().mean()))}); {grown:,} of them were not at the beginning, and {dropped:,} others were"
    )
