"""Attention heads and sizes of splits in a compact checkpoint, and how a model takes them."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from sparse_callbacks.channels.attention_exchange import become_slim
from sparse_callbacks.channels.attention_heads import head_sizes, update_heads
from sparse_callbacks.channels.slim_attention import SlimAttention
from sparse_callbacks.channels.split_sizes import split_sizes, update_splits
from sparse_callbacks.core.state_layout import shown_short


def described_heads(module: nn.Module) -> dict[str, dict[str, Any]]:
    """What a checkpoint says of the heads of an attention, under ``heads``, and of sizes that channels are split by, under
    ``splits``; nothing of other modules."""
    if isinstance(module, SlimAttention):
        return {"heads": {"num_heads": module.num_heads, "head_dim": module.head_dim}}
    stated = {"heads": head_sizes(module), "splits": split_sizes(module)}
    return {kind: found for kind, found in stated.items() if found}


def becomes_slim(module: nn.Module, class_there: str) -> bool:
    """Whether ``module`` is an ``nn.MultiheadAttention`` that slimming has made a `SlimAttention` of."""
    return type(module) is nn.MultiheadAttention and class_there == SlimAttention.__name__


def why_other_heads(model: nn.Module, tensors: Mapping[str, Tensor], layers: Mapping[str, Mapping[str, Any]]) -> str:
    """A module whose weights in the checkpoint are not those of the heads or splits that it states; empty if none.

    Args:
        model: the model that would take the tensors.
        tensors: the tensors of the checkpoint.
        layers: the description of each module.
    """
    for name, module in model.named_modules():
        stated = {kind: layers[name][kind] for kind in ("heads", "splits") if kind in layers[name]}
        inside = f"{name}." if name else ""
        shapes = {local: t.shape for local, t in tensors.items() if stated and local.startswith(inside)}
        shapes = {local.removeprefix(inside): shape for local, shape in shapes.items()}
        for kind, values in stated.items():
            if not isinstance(values, dict):  # the description is a text file
                return f"{kind} of {name!r} is {shown_short(values)} there"
            for attribute, value in _meant(kind, module, layers[name]["class"], shapes).items():
                # which attributes a module has may differ between releases of its package
                if values.get(attribute, value) != value:
                    return f"{attribute} of {name!r} is {shown_short(values[attribute])} there, where its weights mean {value}"
    return ""


def _meant(kind: str, module: nn.Module, class_there: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What weights of these ``shapes`` mean for the ``heads`` or ``splits`` of a module, by attribute."""
    if kind == "splits":
        return split_sizes(module, shapes.get)
    if becomes_slim(module, class_there) or isinstance(module, SlimAttention):
        return _of_slim(module, shapes)
    return head_sizes(module, shapes.get)


def _of_slim(attention: nn.Module, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """What the weights of a `SlimAttention` mean for its attributes; text where they contradict each other."""
    size = attention.head_dim
    assert isinstance(size, int)
    inner = shapes["out_proj.weight"][1]
    # the dimension along which each has entries for all heads, and how many times
    places = {"in_proj_weight": (0, 3), "in_proj_bias": (0, 3), "bias_k": (2, 1), "bias_v": (2, 1)}
    places |= {f"{part}_proj_weight": (0, 1) for part in "qkv"}
    widths = {shapes[name][dim] / times for name, (dim, times) in places.items() if name in shapes} | {inner}
    whole = len(widths) == 1 and inner % size == 0
    return {"head_dim": size, "num_heads": inner // size if whole else "not one number"}


def put_slim(model: nn.Module, layers: Mapping[str, Mapping[str, Any]]) -> None:
    """Let attentions be a `SlimAttention` where they are described as one."""
    for name, module in list(model.named_modules()):
        if becomes_slim(module, layers[name]["class"]):
            assert isinstance(module, nn.MultiheadAttention)
            become_slim(module)


def state_heads(model: nn.Module) -> None:
    """Let every attention state the number of heads that its weights have, and every module the sizes that it splits by."""
    for module in model.modules():
        update_heads(module)
        update_splits(module)
