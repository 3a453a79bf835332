"""Products of matrices, and attention."""

from torch import Tensor

from sparse_callbacks.channels.axes import AnyAxis, MisfitError, Run, factored
from sparse_callbacks.channels.operations.table import Axes, outputs, rule, unknown
from sparse_callbacks.channels.recorded_call import Call

SUMMED = "is summed over in a product of activations, so no channel of it goes alone"
WHOLE = "attention loses whole heads, and no single channel of its queries, keys and values"
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
    if all(by_weight):  # of a table that layers compute, such as one of positions, only the layer's own is the weight
        by_weight = call.is_own(right), call.is_own(left)
    if by_weight[0] and not by_weight[1]:
        call.note_product(right, [of_right], columns)
    elif by_weight[1] and not by_weight[0]:
        call.note_product(left, [a[-1]], rows)
    elif not (call.is_weight(right) and call.is_weight(left)):
        _of_activations(call, left, right, over, [*rows], [*columns])
    made = [*batch, *rows, *columns]
    if added is not None:
        for axis, other in zip(made[::-1], call.axes_of(added)[::-1], strict=False):
            if axis.size == other.size != 1:
                call.join(axis, other)
    return [made]


def _of_activations(call: Call, left: Tensor, right: Tensor, over: AnyAxis, rows: Axes, columns: Axes) -> None:
    """A product in which neither matrix is a weight: rows and columns are mixed with nothing.

    But the values that the scores of attention are multiplied with are channels of a head.
    """
    call.block([over], SUMMED)
    for axes, other in ((rows, right), (columns, left)):
        if call.is_score(other):
            call.block(axes, WHOLE)
        for axis in axes:
            call.note_heads(axis, WHOLE, call.since)
    call.note_scores()


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
    call.block([*query[-2:], *key[-2:], *value[-2:]], WHOLE)
    batch = [_heads(call, *axes) for axes in zip(query[:-2], key[:-2], value[:-2], strict=True)]
    mask = call.named.get("attn_mask", call.named.get("attn_bias"))
    if isinstance(mask, Tensor):
        call.block(call.axes_of(mask)[-2:], WHOLE)
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
