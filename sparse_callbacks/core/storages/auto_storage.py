"""What ``storage="auto"`` comes to by the times of a layer's steps, the same on every rank."""

from collections.abc import Callable, Mapping
from fnmatch import fnmatchcase
from typing import Any

import torch
import torch.distributed as dist

from sparse_callbacks.core import distributed
from sparse_callbacks.core.attachment import Choice
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.storages.storage import Rows
from sparse_callbacks.core.storages.storage_choice import Layer
from sparse_callbacks.core.storages.storage_timing import faster, times_of, times_text

RowsSeen = Rows | Callable[[], Mapping[str, int]] | None
"""Rows that layers see in a step: a number, numbers by a layer's name or a glob, or a function that finds these out."""
_NO_ROWS = (
    "'auto' needs the rows that the layer sees in a step: give rows=, such as the size of a batch, or example_input_array, or "
    "data= where sparsify() is called"
)


def decided(
    method: Method,
    layers: Mapping[str, Layer],
    choices: Mapping[str, Choice],
    zeros: Mapping[str, int],
    rows: RowsSeen,
    why_masked: str = "",
) -> tuple[dict[str, Choice], str]:
    """Choices in which times have taken the place of ``"auto"``.

    Args:
        method: the method of the run; its ``rows=`` go before ``rows``.
        layers: linear layers by the name of their weight.
        choices: the storages by the same names.
        zeros: planned zeros of the parameters.
        rows: the rows that each layer sees in a step.
        why_masked: the reason of the host why all of them stay masked; empty where it has none.

    Returns:
        The choices, and a report for the log, a line for each layer that was timed; empty without one.
    """
    open_names = [name for name, choice in choices.items() if choice.storage == "auto"]
    if not open_names:
        return dict(choices), ""
    if why_masked:
        return {n: Choice("masked", why_masked) if n in open_names else c for n, c in choices.items()}, ""
    given = getattr(method, "rows", None)
    known = given if given is not None else rows() if callable(rows) else rows
    found = {}
    # ranks may be of different speed, and must hold the same layers
    for name in open_names if distributed.rank() == 0 else ():
        found[name] = _timed(name, layers[name], zeros[name], _rows_of(name, known))
    found = _of_first_rank(found)
    report = "\n".join(f"{name}: storage {c.storage!r} ({c.note})" for name, c in found.items())
    return {**choices, **found}, report


def _timed(name: str, layer: Layer, zeros: int, rows: int | None) -> Choice:
    if rows is None:
        return Choice("masked", _NO_ROWS)
    weight: Any = layer.module._parameters["weight"]
    with torch.device("cpu"):
        times = times_of(tuple(weight.shape), rows, 1 - zeros / weight.numel(), weight.dtype)
    storage = faster(times)
    return Choice(storage, times_text(times, storage))


def _rows_of(name: str, rows: Rows | None) -> int | None:
    """The rows of a layer whose weight has this name; None where nobody knows."""
    if not isinstance(rows, Mapping):
        return rows
    names = (name, name.removesuffix(".weight"))
    return next((n for glob, n in rows.items() if any(fnmatchcase(one, glob) for one in names)), None)


def _of_first_rank(found: dict[str, Choice]) -> dict[str, Choice]:
    if distributed.world_size() == 1:
        return found
    box: list[Any] = [{name: (c.storage, c.note) for name, c in found.items()}]
    dist.broadcast_object_list(box, src=0)
    return {name: Choice(*pair) for name, pair in box[0].items()}
