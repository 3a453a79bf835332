"""`SlimAttention` takes the place of ``nn.MultiheadAttention``, and is put back."""

from torch import nn

from sparse_callbacks.channels.slim_attention import SlimAttention

_SIZES = ("num_heads", "embed_dim", "kdim", "vdim")
"""Attributes of ``nn.MultiheadAttention`` in whose place a `SlimAttention` has properties."""


def become_slim(attention: nn.MultiheadAttention) -> None:
    """Let an ``nn.MultiheadAttention`` be a `SlimAttention` from here on: the same object, with the same Parameters."""
    # as torch does for parametrizations and lazy modules: a new object would lose what others hold of the old one
    attention.__class__ = SlimAttention


def put_slim_attention(model: nn.Module) -> None:
    """Let every ``nn.MultiheadAttention`` in ``model`` be a `SlimAttention` from here on; subclasses stay as they are.

    The modules stay the same objects with the same hooks, names and Parameters, and compute the same.
    """
    for module in model.modules():
        if type(module) is nn.MultiheadAttention:
            become_slim(module)


def put_back_attention(model: nn.Module) -> None:
    """Undo :func:`put_slim_attention`, in the model or a copy of it, where an attention has the sizes that it had."""
    for module in model.modules():
        if isinstance(module, SlimAttention):
            # the properties hide the attributes of before, and one that was made as a SlimAttention has none
            before = {name: vars(module).get(name) for name in _SIZES}
            if before == {name: getattr(module, name) for name in _SIZES}:
                module.__class__ = nn.MultiheadAttention  # type: ignore[assignment]
