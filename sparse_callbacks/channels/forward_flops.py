"""FLOPs of one forward pass, the same for every version and every kernel of torch."""

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.module_tracker import ModuleTracker

from sparse_callbacks.core.inspection import attention_in_steps, run, tensors_in
from sparse_callbacks.core.storages.exchange import dense_twin

ATTENTION = (
    "_scaled_dot_product_attention_math_for_mps",
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)
"""Operations of torch that compute attention as a whole. Without them it computes two matrix products."""


def forward_flops(model: nn.Module, example_input: Any) -> int:
    """FLOPs of the matrix products, convolutions, attention and recurrent layers of one pass; a multiply-add is two.

    Exchanged layers count as dense ones. Attention
    counts in full under any mask, and with every head of the queries where they share keys and values. Some
    kernels for GPUs in half precision pad the width of heads to a multiple of 8; the padding counts.

    Args:
        model: the model; it runs once, in the mode that it is in.
        example_input: a tensor, a tuple of positional arguments or a mapping of named arguments.
    """
    model = dense_twin(model)
    # torch's own formulas leave out the kernel for CPUs, and some versions refuse heads that share keys and values
    formulas = {getattr(torch.ops.aten, name): attention for name in ATTENTION if hasattr(torch.ops.aten, name)}
    before: dict[nn.Module, int] = {}
    recurrent: list[int] = []
    with ExitStack() as stack:
        stack.enter_context(attention_in_steps())
        counter = FlopCounterMode(display=False, custom_mapping=formulas)
        counter.mod_tracker = _Anywhere()
        stack.enter_context(counter)

        def start(module: nn.Module, inputs: Any) -> None:
            before[module] = counter.get_total_flops()

        def end(module: nn.Module, inputs: Any, output: Any) -> None:
            # some recurrent layers run as one operation that the counter does not know, others as products that it has
            # counted by now; the first kind multiplies each of its weights once at each step
            if counter.get_total_flops() == before.pop(module):
                steps = math.prod(tensors_in(output)[0].shape[:-1])
                recurrent.append(2 * steps * sum(p.numel() for p in module.parameters() if p.ndim > 1))

        for module in model.modules():
            if isinstance(module, nn.RNNBase):
                stack.enter_context(module.register_forward_pre_hook(start))
                stack.enter_context(module.register_forward_hook(end))
        run(model, example_input)
    total: int = counter.get_total_flops()
    return total + sum(recurrent)


class _Anywhere(ModuleTracker):
    """Follows no modules: the total alone is asked for, and following them takes longer than the pass."""

    def __enter__(self) -> "_Anywhere":
        return self

    def __exit__(self, *_: Any) -> None:
        pass


def attention(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    """FLOPs of the two products of attention: queries with keys, and the softmax of that with values.

    Args:
        query, key, value: shapes [..., heads, length, width] of the three tensors; keys and values may have fewer
            heads. Further arguments of the operation do not change the count.

    >>> attention((1, 2, 5, 4), (1, 2, 3, 4), (1, 2, 3, 6))
    600
    """
    scores = math.prod(query[:-1]) * key[-2]
    return 2 * scores * (query[-1] + value[-1])
