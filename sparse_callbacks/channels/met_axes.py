"""What becomes of axes in a forward pass: they meet, are reshaped, and hold channels of runs."""

from collections.abc import Iterator, Sequence
from math import prod

from sparse_callbacks.channels.axes import (
    AnyAxis,
    Concatenation,
    MisfitError,
    Product,
    Run,
    block,
    factored,
    join,
    product,
    resolved,
)


def joined(axes: Sequence[AnyAxis], since: int, mixes: str) -> AnyAxis:
    """Axes that meet entry by entry, as one. Where they do not fit together all of them stay.

    Args:
        axes: one or more axes of one size.
        since: the place in the forward pass.
        mixes: the reason where they do not fit.
    """
    for other in axes[1:]:
        try:
            join(axes[0], other)
        except MisfitError:
            block(axes[0], mixes, since)
            block(other, mixes, since)
    return axes[0]


def reshaped(axes: Sequence[AnyAxis], shape: Sequence[int]) -> list[AnyAxis]:
    """The axes of a tensor in another shape.

    Raises:
        MisfitError: they cannot be taken apart that way.
    """
    found: list[AnyAxis] = []
    rest: AnyAxis = product([resolved(a) for a in axes])
    for size in shape:
        outer, rest = factored(rest, size)
        found.append(outer)
    return found


def units(axis: AnyAxis, run: Run) -> list[int]:
    """The channel of ``run`` that each entry of an axis belongs to, -1 for none.

    Raises:
        MisfitError: an entry belongs to two of them.
    """
    now = resolved(axis)
    if isinstance(now, Run):
        return [*range(now.size)] if now is run else [-1] * now.size
    if isinstance(now, Concatenation):
        return [u for p in now.parts for u in units(p, run)]
    found = [units(f, run) for f in now.factors]
    with_run = [number for number, u in enumerate(found) if max(u) >= 0]
    if len(with_run) > 1:
        raise MisfitError(f"a channel of {run.size} meets itself in a product")
    if not with_run:
        return [-1] * now.size
    number = with_run[0]
    outside = prod(f.size for f in now.factors[:number])
    inside = prod(f.size for f in now.factors[number + 1 :])
    return [u for u in found[number] for _ in range(inside)] * outside


def leaves(axis: AnyAxis) -> Iterator[Run]:
    """The runs that an axis itself was made of or taken apart into, whatever they were joined with."""
    left = [axis]
    while left:
        now = left.pop()
        if isinstance(now, Product):
            left += reversed(now.factors)
        elif isinstance(now, Concatenation):
            left += reversed(now.parts)
        else:
            yield now
            if now.taken_apart is not None:
                left.append(now.taken_apart)
