"""Products of matrices, and attention."""

from torch import Tensor

from sparse_callbacks.channels.axes import AnyAxis, MisfitError, Run, factored
from sparse_callbacks.channels.operations.table import Axes, outputs, rule, unknown
from sparse_callbacks.channels.recorded_call import Call

MULTIPLIED = "what is multiplied with other activations is never cut singly (attention)"
SHARED = "query heads that share a key and value go together alone"


def _either(call: Call, one: AnyAxis, other: AnyAxis) -> AnyAxis:
    """Two axes that meet entry by entry, or one of them and a single entry."""
    return call.join(one, other) if one.size == other.size else max(one, other, key=lambda axis: axis.size)


def _product(call: Call, left: Tensor, right: Tensor, added: Tensor | None = None) -> list[Axes]:
    """A product of matrices, or of batches of them."""
    a, b = call.axes_of(left), call.axes_of(right)
    # a vector has no rows, or no columns
    columns = b[-1:] if right.ndim > 1 else []
    rows = a[-2:-1] if left.ndim > 1 else []
    of_right = b[-2] if right.ndim > 1 else b[-1]
    over = call.join(a[-1], of_right)
    batch = [_either(call, *axes) for axes in zip(a[:-2], b[:-2], strict=True)]
    by_weight = call.is_weight(right), call.is_weight(left)
    if by_weight[0] and not by_weight[1]:
        call.note_product(right, [of_right], columns)
    elif by_weight[1] and not by_weight[0]:
        call.note_product(left, [a[-1]], rows)
    elif not any(by_weight):
        call.block([over, *rows, *columns], MULTIPLIED)
    made = [*batch, *rows, *columns]
    if added is not None:
        for axis, other in zip(made[::-1], call.axes_of(added)[::-1], strict=False):
            if axis.size == other.size != 1:
                call.join(axis, other)
    return [made]


@rule("mm", "bmm", "mv", "dot", "matmul")
def _multiplied(call: Call) -> list[Axes]:
    left, right = call.tensors()[:2]
    if call.name == "aten.matmul" and left.ndim != right.ndim:
        return unknown(call)
    return _product(call, left, right)


@rule("addmm", "addmv", "baddbmm", "addbmm", "_addmm_activation")
def _multiplied_and_added(call: Call) -> list[Axes]:
    added, left, right = call.tensors()[:3]
    if call.name == "aten.addbmm":
        return unknown(call)
    return _product(call, left, right, added)


@rule("_trilinear")
def _bilinear(call: Call) -> list[Axes]:
    """``nn.Bilinear``: the sum of w[o, i, j] x[..., i] y[..., j], with the sizes of x, w and y that it calls this with."""
    given = tuple([*call.named[n]] for n in ("expand1", "expand2", "expand3", "sumdim"))
    left, weight, right = (call.axes_of(call.named[n]) for n in ("i1", "i2", "i3"))
    if given != ([1, 3], [0], [1, 2], [2, 3]) or not call.is_weight(call.named["i2"]):
        return unknown(call)
    call.join(left[1], weight[1])
    call.join(right[1], weight[2])
    call.note_product(call.named["i2"], weight[1:], weight[:1])
    return [[call.join(left[0], right[0]), weight[0]]]


def _heads(call: Call, query: AnyAxis, key: AnyAxis, value: AnyAxis) -> AnyAxis:
    """The heads of attention, or a batch: one key and value may serve several queries, which go with it alone, or all of them,
    or one query all keys."""
    if query.size == 1:
        return _either(call, key, value)
    for other in (key, value):
        if other.size == query.size:
            call.join(query, other)
        elif other.size > 1:
            try:
                shared, queries = factored(query, other.size)
                call.join(shared, other)
                call.block([queries], SHARED)
            except MisfitError:
                call.block([query, other])
    return query


_ATTENTIONS = """
_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _scaled_dot_product_cudnn_attention
_scaled_dot_product_efficient_attention _scaled_dot_product_attention_math scaled_dot_product_attention
"""


@rule(_ATTENTIONS)
def _attended(call: Call) -> list[Axes]:
    query, key, value = (call.axes_of(call.named[n]) for n in ("query", "key", "value"))
    call.block([*query[-2:], *key[-2:], *value[-2:]], MULTIPLIED)
    batch = [_heads(call, *axes) for axes in zip(query[:-2], key[:-2], value[:-2], strict=True)]
    mask = call.named.get("attn_mask", call.named.get("attn_bias"))
    if isinstance(mask, Tensor):
        call.block(call.axes_of(mask)[-2:], MULTIPLIED)
        for axis, other in zip(batch[::-1], call.axes_of(mask)[-3::-1], strict=False):
            if axis.size == other.size != 1:
                call.join(axis, other)
    made: list[Axes] = []
    for number, tensor in enumerate(outputs(call)):
        sizes, count = tensor.shape, len(batch)
        if number == 0:
            made.append([*batch, query[-2], value[-1]])
        else:  # sums or scores of each head, and numbers of a random generator
            ahead = batch if [*sizes[:count]] == [a.size for a in batch] else [Run(s) for s in sizes[:count]]
            made.append([*ahead, *(Run(s) for s in sizes[count:])])
    return made
