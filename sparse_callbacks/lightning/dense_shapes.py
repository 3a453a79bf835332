"""Shapes of a model's parameters as a ``state_dict`` has them."""

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from sparse_callbacks.core.live.live_masks import exchanged_layers


def dense_shapes(model: nn.Module) -> dict[str, torch.Size]:
    """Shape of each parameter by name, of live values that of their whole matrix; lazy ones, which have none yet, are
    left out."""
    found = {n: p.shape for n, p in model.named_parameters() if not is_lazy(p)}
    matrices = exchanged_layers(model)
    return found | {n: torch.Size((layer.out_features, layer.in_features)) for n, layer in matrices.items()}
