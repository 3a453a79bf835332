"""Windows of scores: each group's sum over the steps since the last solve, and their number.

Both are in ``aux``, under ``scores.<window>`` and ``steps.<window>``: a run that is resumed between two solves must not
lose the steps before. Of several optimizers the means of the last solve are there too, under ``latest.<window>``; methods
whose scores have momentum keep those of the last solve under ``former.<window>``.
"""

from collections.abc import Iterable, Mapping, MutableMapping

import torch
from torch import Tensor

from sparse_callbacks.channels.groups import Group
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.state_layout import damaged, shown_short

_Aux = MutableMapping[str, Tensor]


def key_parameter(group: Group) -> str:
    """Name of a parameter on whose device the group's scores are."""
    return group.consumers[0].parameter


def window_of(index: int, group: Group) -> str:
    """Name of the window of the group with this ``index``."""
    # the name of a parameter on the window's device comes last, as in every key of aux: a resume needs the device
    return f"{index}/{key_parameter(group)}"


def begin_window(aux: _Aux, window: str, size: int, device: torch.device) -> None:
    """Make an empty window for a group of ``size`` units, unless there is one already."""
    aux.setdefault(f"scores.{window}", torch.zeros(size, device=device))
    aux.setdefault(f"steps.{window}", torch.zeros((), dtype=torch.int64, device=device))


def refuse_lost_windows(saved: SavedRun, method: str, sizes: Mapping[str, int]) -> None:
    """Refuse a saved run without the scores of a group since the last solve: it would solve by other means.

    Args:
        saved: the saved run.
        method: name of the method, for the error.
        sizes: the number of units of each window's group, by the window's name.

    Raises:
        ValueError: a sum or a number of steps is missing, or has another shape.
    """
    for window, size in sizes.items():
        for key in (f"scores.{window}", f"steps.{window}"):
            if key not in saved.aux:
                raise damaged(f"it has no {key}, which a run of {method} saves", saved.path)
        shapes = {"scores": (size,), "steps": (), "latest": (size,), "former": (size,)}
        for key, shape in ((f"{kind}.{window}", shape) for kind, shape in shapes.items()):
            if key in saved.aux and tuple(saved.aux[key].shape) != shape:
                raise damaged(f"its {key} is {shown_short(saved.aux[key])}, and should be {list(shape)}", saved.path)


def add_to_window(aux: _Aux, window: str, scores: Tensor, finite: Tensor | bool) -> None:
    """Add the scores of a step to a window; a step with an inf counts for nothing."""
    # torch.where and not an if: whether a step is finite is known on the device, and need not be waited for
    counts = torch.as_tensor(finite, device=scores.device)
    aux[f"scores.{window}"] = aux[f"scores.{window}"] + torch.where(counts, scores, 0)
    aux[f"steps.{window}"] = aux[f"steps.{window}"] + counts


def mean_of_window(aux: _Aux, window: str) -> Tensor:
    """Mean score of each unit over the steps of a window; in an empty one that of the window before, as far as it was
    kept, or else 0."""
    steps = aux[f"steps.{window}"]
    mean = aux[f"scores.{window}"] / steps.clamp(min=1)
    latest = aux.get(f"latest.{window}")
    return mean if latest is None else torch.where(steps > 0, mean, latest)


def reset_windows(aux: _Aux, windows: Iterable[str], keep_means: bool) -> None:
    """Make those of ``windows`` empty that there are.

    Args:
        aux: the method's saved tensors by key.
        windows: names of windows.
        keep_means: whether the means so far stay, for a solve in the step of another optimizer that finds them empty.
    """
    for window in windows:
        if keep_means and f"scores.{window}" in aux:
            aux[f"latest.{window}"] = mean_of_window(aux, window)
        for key in (f"scores.{window}", f"steps.{window}"):
            if key in aux:
                aux[key] = torch.zeros_like(aux[key])
