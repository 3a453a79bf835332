"""What a forward pass costs beside its convolutions and linear layers."""

import math
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sparse_callbacks.channels.costs import Layer, flops
from sparse_callbacks.core.inspection import products_shown, quiet, run, tensors_in


@dataclass(frozen=True)
class Rest:
    """What a forward pass needs beside its convolutions and linear layers: weights (of two and more dimensions) of attention, recurrent
    layers, embeddings and modules of other kinds, and multiply-adds of one sample."""

    parameters: float
    flops: float


def rest(model: nn.Module, example_input: Any, found: Mapping[str, Layer]) -> Rest:
    """What ``found``, the :func:`layers` of the model, leaves out.

    Multiply-adds are what torch counts of matrix products and convolutions, and of recurrent layers that it does not count their weights
    at each step.
    """
    called: dict[str, nn.Module] = {}
    steps: dict[str, int] = {}
    samples = tensors_in(example_input)[0].shape[0]

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            called[name] = module
            if isinstance(module, nn.RNNBase):
                steps[name] = steps.get(name, 0) + math.prod(tensors_in(output)[0].shape[:-1])

        return hook

    with ExitStack() as hooks, quiet(model), products_shown(), FlopCounterMode(display=False) as counter:
        for name, module in model.named_modules():
            hooks.enter_context(module.register_forward_hook(note(name)))
        run(model, example_input)
    inside = [c for m in called.values() if isinstance(m, nn.MultiheadAttention) for c in m.modules()]  # whose layer is never called
    counted = {id(p) for n in found for p in model.get_submodule(n).parameters(recurse=False)}
    others = {id(p): p for m in (*called.values(), *inside) for p in m.parameters(recurse=False) if p.ndim > 1 and id(p) not in counted}
    by_module, root = counter.get_flop_counts(), type(model).__name__
    unseen = [n for n in steps if not sum(by_module.get(f"{root}.{n}" if n else root, {}).values())]
    recurrent = sum(steps[n] * sum(p.numel() for p in called[n].parameters() if p.ndim > 1) for n in unseen)
    total = (counter.get_total_flops() / 2 + recurrent) / samples
    in_layers = sum(flops(layer, layer.inputs, layer.outputs) for layer in found.values())
    return Rest(float(sum(p.numel() for p in others.values())), max(0.0, total - in_layers))
