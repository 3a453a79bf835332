"""Settings of networks that are refused whatever the data is."""

import difflib
from collections.abc import Callable, Mapping, Sequence
from typing import Any


def refuse_mlp(hidden: Sequence[int], activation: str, dropout: float, init: str | None) -> None:
    """Refuse settings of `models.mlp`.

    Raises:
        ValueError: a layer without neurons, an unknown activation or init, or a rate out of range.
    """
    if any(width < 1 for width in hidden):
        raise ValueError(
            f"model.hidden={list(hidden)} has a layer without neurons. Give widths, e.g. model.hidden=[300,100]."
        )
    if activation not in ("relu", "all_relu"):
        raise ValueError(f"model.activation={activation!r} is not known. Use model.activation=relu, or all_relu.")
    if isinstance(dropout, bool) or not isinstance(dropout, int | float) or not 0.0 <= dropout < 1.0:
        raise ValueError(
            f"model.dropout={dropout!r} is not a rate from 0 to 1 (without 1). Use for example model.dropout=0.3."
        )
    if init not in (None, "xavier_uniform", "he_uniform"):
        raise ValueError(
            f"model.init={init!r} is not known. Use model.init=xavier_uniform, he_uniform, or null for torch's own."
        )


def refuse_unknown_network(name: str) -> None:
    """Refuse a name that torchvision does not have a classifier of.

    Raises:
        ValueError: the name is not known.
    """
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        nearest = difflib.get_close_matches(name, known, n=5, cutoff=0.4) or known[:5]
        raise ValueError(
            f"model.name={name!r} is not a torchvision classifier. Did you mean {', '.join(nearest)}? "
            "torchvision.models.list_models(module=torchvision.models) lists all."
        )


REFUSED_EARLY: Mapping[str, Callable[..., Any]] = {
    "sparse_callbacks.tasks.models.mlp": refuse_mlp,
    "sparse_callbacks.tasks.models.torchvision_classifier": refuse_unknown_network,
}
"""By the `_target_` of a model the function that refuses values of its group, each an argument of it."""
