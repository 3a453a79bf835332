"""Constants in convolutions, products of matrices, and attention."""

import torch
from torch import Tensor

from sparse_callbacks.channels.constant_propagation.along import reduced
from sparse_callbacks.channels.constant_propagation.table import (
    Step,
    alike_along,
    broadcast,
    constant_rule,
    returned,
    varying,
)


@constant_rule("convolution", "_convolution", "mkldnn_convolution", "cudnn_convolution")
def _convolved(step: Step) -> list[Tensor]:
    name = "input" if "input" in step.named else "self"
    x, weight, groups = step.named[name], step.named["weight"], step.named["groups"]
    transposed = bool(step.named.get("transposed", False))
    padded = transposed or any(p != 0 for p in step.named["padding"])
    channels = x.ndim - weight.ndim + 1
    step.read(weight, 0 if transposed else 1, x, channels, padded)
    others = [d for d in range(x.ndim) if d != channels]
    zero = reduced(step.zero(name), others, keep=True)
    constant = zero if padded or not alike_along(step.constant(name), others) else step.constant(name)
    # a convolution gives a constant where each weight that is not always 0 reads one
    of_weight = step.known(weight)
    moves = ~of_weight.zero.expand(weight.shape).flatten(2).all(2) if weight.ndim > 2 else ~of_weight.zero
    sure = constant if of_weight.weight else zero
    reads = (~sure).flatten().expand(x.shape[channels]).view(groups, -1).float()
    if transposed:
        made = torch.einsum("gio,gi->go", moves.float().view(groups, -1, weight.shape[1]), reads)
    else:
        made = torch.einsum("goi,gi->go", moves.float().view(groups, -1, weight.shape[1]), reads)
    found = (made == 0).flatten()
    if isinstance(bias := step.named.get("bias"), Tensor):
        found = found & step.known(bias).constant
    return [found.view([-1 if d == channels else 1 for d in range(x.ndim)])]


def _product(step: Step, left: Tensor, right: Tensor) -> Tensor:
    """A product of matrices, or of batches of them. What is summed over is counted by the inputs where no whole weight takes
    part, and then only a sum of zeros is a constant."""
    a, b = step.known(left), step.known(right)
    if b.sources and not a.sources:
        step.read(right, right.ndim - 2, left, left.ndim - 1, False)
    if a.sources and not b.sources:
        step.read(left, left.ndim - 1, right, right.ndim - 2, False)
    size = left.shape[-1]

    def matrices(known: Tensor, rows: bool) -> Tensor:
        shape = [*known.shape]
        shape[-1 if rows else -2] = size
        return (~known).expand(shape).float()

    has_weight = bool(a.weight or b.weight)
    left_constant, right_constant = (k.constant if has_weight else k.zero for k in (a, b))
    # it varies where one factor does and the other one is not always 0
    varies = matrices(left_constant, True) @ matrices(b.zero, False)
    varies = varies + matrices(a.zero, True) @ matrices(right_constant, False)
    return varies == 0


@constant_rule("mm", "bmm")
def _multiplied(step: Step) -> list[Tensor]:
    left, right = step.tensors()[:2]
    return [_product(step, left, right)]


@constant_rule("addmm", "baddbmm", "_addmm_activation")
def _multiplied_and_added(step: Step) -> list[Tensor]:
    added, left, right = step.tensors()[:3]
    found = _product(step, left, right)
    return [found & broadcast([step.known(added).constant], step.output)[0]]


@constant_rule(
    *("_scaled_dot_product_flash_attention_for_cpu", "_scaled_dot_product_flash_attention"),
    *("_scaled_dot_product_cudnn_attention", "_scaled_dot_product_efficient_attention"),
    *("_scaled_dot_product_attention_math", "scaled_dot_product_attention"),
)
def _attended(step: Step) -> list[Tensor]:
    value, made = step.named["value"], returned(step)
    known = step.constant("value")
    # a mask may rule out everything, and then there is no mean
    masked = any(isinstance(step.named.get(n), Tensor) for n in ("attn_mask", "attn_bias"))
    if masked or not alike_along(known, [-2]):
        known = reduced(step.zero("value"), [value.ndim - 2], keep=True)
    heads = value.shape[:-2] == made[0].shape[:-2]
    return [known if heads else varying(made[0]), *(varying(t) for t in made[1:])]
