"""K-FAC blocks: a table worked by hand, and blocks formed whole from Jacobians, layer by layer."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

TABLE: Any = {
    "A": [[2.0, 0.5], [0.5, 1.0]],
    "G": [[1.0, -0.2], [-0.2, 0.6]],
    "lambda_max_A": 2.2071067812,
    "lambda_max_G": 1.0828427125,
    "spectral_radius_A_kron_G": 2.3899494937,
}


def radii(
    layers: Mapping[str, Sequence[nn.Module]], loss: Callable[[], Tensor], samples: int, factor: float | None = None
) -> dict[str, float]:
    """The largest eigenvalue of each layer's Kronecker product of factors, all of them formed.

    Args:
        layers: layers by name, several where they share a weight.
        loss: one forward pass of the network up to the loss.
        samples: samples of the batch.
        factor: what gradients of the loss are multiplied by to be those of a sample's own; None: ``samples``.
    """
    calls: dict[str, list[tuple[nn.Module, Tensor, Tensor]]] = {name: [] for name in layers}
    handles = []
    for name, some in layers.items():
        for layer in some:

            def keep(module: nn.Module, args: Any, output: Tensor, name: str = name) -> Tensor:
                calls[name].append((module, args[0].detach().clone(), output))
                return 1 * output  # what is written in place afterwards is this one

            handles.append(layer.register_forward_hook(keep))
    value = loss()
    for handle in handles:
        handle.remove()
    found = {}
    for name, some in calls.items():
        gradients = [torch.autograd.grad(value, output, retain_graph=True)[0] for _, _, output in some]
        pairs = [rows_of(layer, x, g) for (layer, x, _), g in zip(some, gradients, strict=True)]
        blocks = []
        for by_group in zip(*pairs, strict=True):
            a = torch.cat([a for a, _ in by_group]).double()
            g = torch.cat([g for _, g in by_group]).double() * (samples if factor is None else factor)
            block = torch.kron(a.T @ a / len(a), g.T @ g / samples)
            blocks.append(float(torch.linalg.eigvalsh(block)[-1]))
        found[name] = max(blocks)
    return found


def rows_of(layer: Any, x: Tensor, gradients: Tensor) -> list[tuple[Tensor, Tensor]]:
    """For each group of a layer what its weights multiply ``[rows, inputs]`` and gradients ``[rows, outputs]``, a row for
    each position of each sample."""
    axis = -1 if isinstance(layer, nn.Linear) else 1
    groups = getattr(layer, "groups", 1)
    outputs = gradients.shape[axis] // groups
    constants = {"bias": torch.zeros_like(layer.bias)} if layer.bias is not None else {}
    weight = layer.weight.detach()
    # what an output is multiplied by: its derivative by the weights, as it is linear in them
    jacobian = torch.autograd.functional.jacobian(
        lambda w: functional_call(layer, {"weight": w, **constants}, (x,)).movedim(axis, 0).flatten(1), weight
    )
    found = []
    for group in range(groups):
        first = group * outputs
        if getattr(layer, "transposed", False):
            inputs = layer.in_channels // groups
            a = jacobian[first][:, group * inputs : (group + 1) * inputs, 0].flatten(1)
        else:
            a = jacobian[first][:, first].flatten(1)
        if layer.bias is not None and layer.bias.requires_grad:
            a = torch.cat([a, torch.ones_like(a[:, :1])], 1)
        found.append((a, gradients.movedim(axis, 0).flatten(1)[first : first + outputs].T))
    return found
