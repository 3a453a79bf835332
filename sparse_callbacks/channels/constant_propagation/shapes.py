"""Constants in operations that give tensors other shapes, join them and take them apart."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sparse_callbacks.channels.constant_propagation.along import reduced
from sparse_callbacks.channels.constant_propagation.table import Step, alike_along, constant_rule, returned, varying


def _in_shape(known: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """What is known of a tensor in another shape, dimension by dimension as far as the sizes agree."""
    if 0 in old or not known.any():
        return torch.zeros([1] * len(new), dtype=torch.bool, device=known.device)
    shape: list[int] = []  # of what is known, in the new dimensions
    full: list[int] = []  # the sizes that it has in the old ones
    i = 0
    while len(shape) < len(new) or i < len(old):
        j, last, left, right = len(shape), i, 1, 1
        end = j
        if end < len(new):
            right, end = new[end], end + 1
        while left != right or last == i < len(old):
            if left < right or last == i:
                left, last = left * old[last], last + 1
            else:
                right, end = right * new[end], end + 1
        while end == len(new) and last < len(old):
            last += 1  # sizes of 1 at the end
        told_apart = any(known.shape[d] != 1 for d in range(i, last))
        full += [old[d] if told_apart else 1 for d in range(i, last)]
        shape += new[j:end] if told_apart else [1] * (end - j)
        i = last
    return known.expand(full).reshape(shape)


@constant_rule(
    "view", "_unsafe_view", "reshape", "_reshape_alias", "_reshape_copy", "view_copy", "unsqueeze", "squeeze"
)
def _viewed(step: Step) -> list[Tensor]:
    if step.named.get("dtype") is not None:  # other numbers out of the same bytes
        return [varying(step.output)]
    return [_in_shape(step.constant(), step.named["self"].shape, step.output.shape)]


@constant_rule("permute")
def _permuted(step: Step) -> list[Tensor]:
    return [step.constant().permute(step.named["dims"])]


@constant_rule("transpose")
def _transposed(step: Step) -> list[Tensor]:
    return [step.constant().transpose(step.named["dim0"], step.named["dim1"])]


@constant_rule("t", "numpy_T")
def _turned(step: Step) -> list[Tensor]:
    return [step.constant().t()]


@constant_rule("flip", "roll")
def _moved(step: Step) -> list[Tensor]:
    known, dims = step.constant(), step.named["dims"]
    return [known if dims and alike_along(known, dims) else varying(step.output)]


@constant_rule("expand")
def _expanded(step: Step) -> list[Tensor]:
    known = step.constant()
    return [known.view([1] * (step.output.ndim - known.ndim) + [*known.shape])]


@constant_rule("repeat")
def _repeated(step: Step) -> list[Tensor]:
    known, times = step.constant(), step.named["repeats"]
    known = known.view([1] * (len(times) - known.ndim) + [*known.shape])
    return [known.repeat([count if size > 1 else 1 for count, size in zip(times, known.shape, strict=True)])]


def _one_behind_the_other(parts: Sequence[Tensor], sizes: Sequence[int], dim: int) -> Tensor:
    """What is known of parts, put together along ``dim``, along which each has a size."""
    shape = [max(p.shape[d] for p in parts) for d in range(parts[0].ndim)]
    expanded = [
        p.expand([size if d == dim else s for d, s in enumerate(shape)]) for p, size in zip(parts, sizes, strict=True)
    ]
    return torch.cat(expanded, dim)


@constant_rule("cat")
def _joined_up(step: Step) -> list[Tensor]:
    tensors = [t for t in step.named["tensors"] if t.shape != (0,)]
    dim = step.named["dim"] % step.output.ndim
    parts = [step.known(t).constant for t in tensors]
    if all(bool(step.known(t).zero.all()) for t in tensors):
        return [~varying(step.output)]
    return [_one_behind_the_other(parts, [t.shape[dim] for t in tensors], dim)]


@constant_rule("stack")
def _stacked(step: Step) -> list[Tensor]:
    dim = step.named["dim"] % step.output.ndim
    parts = [step.known(t).constant.unsqueeze(dim) for t in step.named["tensors"]]
    return [_one_behind_the_other(parts, [1] * len(parts), dim)]


def _part(step: Step, dim: int, begin: int, size: int) -> Tensor:
    """What is known of ``size`` entries of ``self`` along ``dim``."""
    known = step.constant()
    if known.shape[dim] == 1:
        return known
    # a single entry would look like a dimension along which all are alike
    part = known.narrow(dim, begin, size)
    return part if size > 1 else torch.zeros_like(part)


@constant_rule("slice")
def _sliced(step: Step) -> list[Tensor]:
    x = step.named["self"]
    dim = step.named["dim"] % x.ndim
    known, step_size = step.constant(), step.named["step"]
    if known.shape[dim] == 1:
        return [known]
    cut = known[(slice(None),) * dim + (slice(step.named["start"], step.named["end"], step_size),)]
    return [cut if cut.shape[dim] > 1 else varying(step.output)]


@constant_rule("split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes", "chunk")
def _split(step: Step) -> list[Tensor]:
    dim = step.named["dim"] % step.named["self"].ndim
    found, begin = [], 0
    for part in returned(step):
        found.append(_part(step, dim, begin, part.shape[dim]))
        begin += part.shape[dim]
    return found


@constant_rule("select")
def _selected(step: Step) -> list[Tensor]:
    x, known = step.named["self"], step.constant()
    dim = step.named["dim"] % x.ndim
    if known.shape[dim] == 1:
        return [known.squeeze(dim)]
    # which row of a weight, such as of an embedding of places, may go by the size
    return [varying(step.output) if step.known(x).sources else known.select(dim, step.named["index"])]


@constant_rule("unbind")
def _unbound(step: Step) -> list[Tensor]:
    known, dim = step.constant(), step.named["dim"] % step.named["self"].ndim
    if known.shape[dim] == 1:
        return [known.squeeze(dim) for _ in returned(step)]
    if step.known(step.named["self"]).sources:
        return [varying(t) for t in returned(step)]
    return [known.select(dim, place) for place in range(known.shape[dim])]


@constant_rule("index")
def _indexed(step: Step) -> list[Tensor]:
    known, indices = step.constant(), step.named["indices"]
    given = [(d, i) for d, i in enumerate(indices) if i is not None]
    if len(given) != 1 or given[0][1].dtype in (torch.bool, torch.uint8) or known.shape[given[0][0]] != 1:
        return [varying(step.output)]
    [(dim, index)] = given
    return [known.reshape([*known.shape[:dim], *[1] * index.ndim, *known.shape[dim + 1 :]])]


@constant_rule("index_select")
def _picked(step: Step) -> list[Tensor]:
    known, dim = step.constant(), step.named["dim"]
    return [known if known.ndim and known.shape[dim] == 1 else varying(step.output)]


@constant_rule("index_add", "scatter_add")
def _added_at(step: Step) -> list[Tensor]:
    source = step.named.get("source", step.named.get("src"))
    zero, added, dim = step.zero(), step.known(source).zero, step.named["dim"]
    if zero.ndim != added.ndim or not (alike_along(zero, [dim]) and alike_along(added, [dim])):
        return [varying(step.output)]
    return [zero & added]


@constant_rule("embedding")
def _embedded(step: Step) -> list[Tensor]:
    zero, indices = step.zero("weight"), step.named["indices"]
    return [reduced(zero, [0], keep=False).view([1] * indices.ndim + [-1])]


@constant_rule("glu")
def _gated(step: Step) -> list[Tensor]:
    dim, known, zero = step.named["dim"] % step.output.ndim, step.constant(), step.zero()
    if known.shape[dim] == 1:
        return [known]
    (first, second), (no_first, _) = known.chunk(2, dim), zero.chunk(2, dim)
    return [(first & second) | no_first]
