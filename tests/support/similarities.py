"""Similarities of a network's layers, as the package measures them and as they are by definition."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks.methods.ctre.activations import measure_similarity
from sparse_callbacks.methods.ctre.similarity import add_batch, cosine_similarity, empty_sums


def weights(net: nn.Module) -> dict[str, nn.Parameter]:
    return {n: p for n, p in net.named_parameters() if n.endswith("weight") and p.dim() > 1}


def passes(net: nn.Module, *batches: Any) -> Iterator[Any]:
    with torch.no_grad():
        for batch in batches:
            yield net(batch)


def similarities(net: nn.Module, *batches: Any) -> dict[str, Tensor]:
    sums = measure_similarity(net.eval(), weights(net), passes(net, *batches))
    return {name: cosine_similarity(s) for name, s in sums.items()}


def direct(x: Tensor, a: Tensor) -> Tensor:
    """|cosine| of the columns of a [n, out] and x [n, in], as [out, in]; 0 where a column is zero."""
    x, a = x.double().reshape(-1, x.shape[-1]), a.double().reshape(-1, a.shape[-1])
    dots = (a.T @ x).abs()
    norms = a.norm(dim=0)[:, None] * x.norm(dim=0)[None]
    return torch.where(norms > 0, dots / norms.clamp(min=1e-30), 0.0)


def close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.double(), expected.double(), atol=3e-6)  # sums in float32


def kernel_similarity(layer: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    sums = empty_sums(layer, layer.weight)
    add_batch(sums, layer, x, a)
    return cosine_similarity(sums)
