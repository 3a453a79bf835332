"""Pictures of masks: what became of each connection between the beginning and the end, and the inputs that are read."""

from typing import TYPE_CHECKING

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
    "kept": ("#0072B2", "active at the beginning and at the end"),
    "grown": ("#E69F00", "grown"),
    "dropped": ("#999999", "dropped"),
}
"""What became of a connection: the colour and the text of each state."""


def as_picture(mask: Tensor) -> Tensor:
    """A mask as a matrix: outputs down, inputs across; each kernel of a convolution is a tile of its own.

    Args:
        mask: of any shape.

    Returns:
        [rows, columns], a view or a copy.
    """
    if mask.ndim < 2:
        return mask.reshape(1, -1)
    kernel = mask.reshape(mask.shape[0], mask.shape[1], -1, mask.shape[-1] if mask.ndim > 3 else 1)
    outputs, inputs, height, width = kernel.shape
    return kernel.permute(0, 2, 1, 3).reshape(outputs * height, inputs * width)


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
    cover = shares.sum(-1, keepdim=True)
    # where several connections share a pixel: their mean colour, as opaque as there are many of them
    return torch.cat([shares @ shades / cover.clamp(min=1e-9), cover.clamp(max=1).sqrt()], dim=-1)


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
    with drawing() as figures:
        # as high as it is in truth, but neither a line nor a tower
        figure: Figure = figures.Figure(
            figsize=(3.5, 0.75 + 2.8 * min(1.1, max(0.12, rows / columns))), layout="constrained"
        )
        axes = figure.subplots()
        axes.imshow(
            mask_picture(first, last).numpy(), interpolation="none", extent=(0, columns, rows, 0),
            aspect="equal" if 0.12 <= rows / columns <= 1.1 else "auto",
        )  # fmt: skip
        axes.grid(False)
        axes.set_title(f"{name} ({readable.shape_text(layer.shape)})")
        axes.set_xlabel("inputs" if len(layer.shape) == 2 else "inputs, each a kernel wide")
        axes.set_ylabel("outputs")
        axes.locator_params(nbins=5, integer=True)
        axes.spines[["top", "right"]].set_visible(True)
    return arrange(figure)


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
        bar.outline.set_visible(False)  # type: ignore[operator]
    return arrange(figure)


def mask_label(run: RecordedRun, layer: LayerRecord) -> str:
    """What the picture of a mask shows, for readers who cannot see it: how many connections it has, and how many moved."""
    first, last = (run.masks[layer.name][key].bool() for key in ("first", "last"))
    grown, dropped = int((last & ~first).sum()), int((first & ~last).sum())
    return (
        f"Mask of {layer.name}: {int(last.sum()):,} of {layer.size:,} connections are active at the end "
        f"({readable.share(float(last.float().mean()))}); {grown:,} of them were not at the beginning, and {dropped:,} others were"
    )
