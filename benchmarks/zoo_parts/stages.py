"""What is measured of one model, side by side: ``ours``, and ``peer`` for torch-pruning."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from zoo_parts import peer
from zoo_parts.entries import Entry
from zoo_parts.memory import forget_peak, peak
from zoo_parts.slimming import slimmed

Row = dict[str, Any]
SIDES = ("ours", "peer")


def measured(make: Callable[[], Entry], sides: Sequence[str]) -> Iterator[tuple[str, Row]]:
    """Each of ``sides`` with its row, which says under ``failed`` what was raised.

    A small network goes first, so that what is imported on the way counts in no time and no memory.

    Args:
        make: makes the model.
        sides: of :data:`SIDES`.
    """
    for side in sides:
        one_side(side, small_entry(), 0)
    forget_peak()
    imports = peak()
    entry = make()
    for side in sides:
        yield side, one_side(side, entry, imports)


def one_side(side: str, entry: Entry, imports: int) -> Row:
    """The row of one side; ``imports`` are the bytes that the process held before it made the model."""
    begun = time.perf_counter()
    try:
        row = slimmed(entry, imports) if side == "ours" else peer.pruned(entry)
    except Exception as error:  # of a model that this side cannot take
        row = {"failed": f"{type(error).__name__}: {str(error)[:300]}"}
    return row | {"wall": time.perf_counter() - begun}


def small_entry() -> Entry:
    """A network that is slimmed in no time."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    return Entry(net, lambda generator, batch: torch.randn(batch, 3, 8, 8, generator=generator), ("3",))
