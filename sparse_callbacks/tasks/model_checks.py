"""Settings of networks that are refused whatever the data is."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from sparse_callbacks.tasks.library_models import refuse_timm, refuse_torchvision


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


REFUSED_EARLY: Mapping[str, Callable[..., Any]] = {
    "sparse_callbacks.tasks.models.mlp": refuse_mlp,
    "sparse_callbacks.tasks.models.timm_classifier": refuse_timm,
    "sparse_callbacks.tasks.models.torchvision_classifier": refuse_torchvision,
}
"""By the `_target_` of a model the function that refuses values of its group, each an argument of it."""
LIBRARY_MODELS = (
    "sparse_callbacks.tasks.models.timm_classifier",
    "sparse_callbacks.tasks.models.torchvision_classifier",
)
"""The `_target_` of models that may begin with trained weights."""


def without_weights(cfg: DictConfig) -> dict[str, Any]:
    """The argument that keeps the network of a configuration from reading trained weights; nothing where it cannot have any."""
    return {"read": False} if str(cfg.model.get("_target_")) in LIBRARY_MODELS else {}


def of_resumed(cfg: DictConfig) -> dict[str, Any]:
    """`without_weights` for a run that goes on, as its checkpoint holds the weights; nothing for a run that begins."""
    return {} if cfg.ckpt_path is None else without_weights(cfg)
