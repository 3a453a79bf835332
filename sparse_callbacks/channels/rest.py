"""What a forward pass costs beside its convolutions and linear layers."""

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_callbacks.channels.costs import Layer, flops
from sparse_callbacks.channels.forward_flops import forward_flops
from sparse_callbacks.core.inspection import quiet, tensors_in


@dataclass(frozen=True)
class Rest:
    """What a forward pass needs beside its convolutions and linear layers: weights (of two and more dimensions) of attention, recurrent
    layers, embeddings and modules of other kinds, and multiply-adds of one sample."""

    parameters: float
    flops: float


def rest(model: nn.Module, example_input: Any, found: Mapping[str, Layer]) -> Rest:
    """What ``found``, the :func:`layers` of the model, leaves out, by what :func:`forward_flops` counts."""
    called: dict[str, nn.Module] = {}
    samples = tensors_in(example_input)[0].shape[0]

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            called[name] = module

        return hook

    with ExitStack() as hooks, quiet(model):
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(note(name)))
        total = forward_flops(model, example_input) / 2 / samples
    inside = [c for m in called.values() if isinstance(m, nn.MultiheadAttention) for c in m.modules()]  # whose layer is never called
    counted = {id(p) for n in found for p in model.get_submodule(n).parameters(recurse=False)}
    others = {id(p): p for m in (*called.values(), *inside) for p in m.parameters(recurse=False) if p.ndim > 1 and id(p) not in counted}
    in_layers = sum(flops(layer, layer.inputs, layer.outputs) for layer in found.values())
    return Rest(float(sum(p.numel() for p in others.values())), max(0.0, total - in_layers))
