"""The axes of tensors: which entries of which axes are one channel after a forward pass.

An axis is a run of channels, a product of axes (two that were flattened into one, the first one outermost), or a
concatenation of axes. Runs are joined where two of them meet entry by entry, and taken apart where an operation needs their
parts: the heads of attention come out of a ``view``, the branches of a network out of a ``cat``. Everything that is said of a
run holds for all runs that are joined with it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod


class MisfitError(Exception):
    """An axis cannot be taken apart as an operation wants it."""


@dataclass(eq=False)
class Run:
    """Channels that lie one after the other.

    Attributes:
        size: how many.
        reason: why none of them can be removed; empty where they can.
        since: a number that grows in the order of the forward pass: when the reason was found.
        same: a run that it was joined with, which stands for it.
        taken_apart: what it turned out to be made of.
        known: that, as it was resolved the last time.
        copies: whether it counts copies of what an operation has expanded.
    """

    size: int
    reason: str = ""
    since: int = 0
    same: "Run | None" = field(default=None, repr=False)
    taken_apart: "Product | Concatenation | None" = field(default=None, repr=False)
    known: "Run | Product | Concatenation | None" = field(default=None, repr=False)
    copies: bool = field(default=False, repr=False)

    def leader(self) -> "Run":
        """The run that stands for all that are joined."""
        run = self
        while run.same is not None:
            if run.same.same is not None:
                run.same = run.same.same  # a shorter way for the next search
            run = run.same
        return run

    def stay(self, reason: str, since: int) -> None:
        """Say why its channels must stay, unless something said so before."""
        first = self.leader()
        if first.taken_apart is not None:
            for run in runs_in(first):
                run.stay(reason, since)
        elif not first.reason or since < first.since:
            first.reason, first.since = reason, since


@dataclass(eq=False)
class Product:
    """Axes that were flattened into one, the outermost first."""

    factors: "list[Run | Product | Concatenation]"

    @property
    def size(self) -> int:
        return prod(f.size for f in self.factors)


@dataclass(eq=False)
class Concatenation:
    """Axes that lie one behind the other."""

    parts: "list[Run | Product | Concatenation]"

    @property
    def size(self) -> int:
        return sum(p.size for p in self.parts)


AnyAxis = Run | Product | Concatenation


def resolved(axis: AnyAxis) -> AnyAxis:
    """An axis as it is known now: its runs are leaders that were not taken apart, and nothing is nested without need."""
    # with a list of what is left to do: an axis of which thousands of slices were taken, one from what the last one left, is
    # nested deeper than Python calls
    done: list[AnyAxis] = []
    left: list[tuple[AnyAxis | None, _Nest]] = [(axis, _Nest(None, 0))]
    while left:
        now, around = left.pop()
        if now is None:
            around.close(done)
            continue
        run = now.leader() if isinstance(now, Run) else None
        if run is not None:
            now = run.known or run.taken_apart or run
        if isinstance(now, Run):
            done.append(now)
            continue
        if type(now) is not around.kind:
            around = _Nest(type(now), len(done), run)
            left.append((None, around))
        left += [(part, around) for part in reversed(now.factors if isinstance(now, Product) else now.parts)]
    return done[0]


@dataclass
class _Nest:
    """A product or concatenation that is being resolved; one that lies in another one of its kind is a part of that."""

    kind: "type[Product | Concatenation] | None"
    begin: int
    run: Run | None = None

    def close(self, done: list[AnyAxis]) -> None:
        """Put it in the place of its resolved parts, which are ``done`` from ``begin`` on."""
        inner = done[self.begin :]
        found = product(inner) if self.kind is Product else concatenation(inner)
        done[self.begin :] = [found]
        if self.run is not None:
            # of 2,000 slices each one would go through those before it again
            self.run.known = found


def product(factors: Sequence[AnyAxis]) -> AnyAxis:
    """Resolved axes flattened into one."""
    flat = [g for f in factors for g in (f.factors if isinstance(f, Product) else [f]) if g.size != 1]
    return flat[0] if len(flat) == 1 else Product(flat) if flat else Run(1)


def concatenation(parts: Sequence[AnyAxis]) -> AnyAxis:
    """Resolved axes one behind the other."""
    flat = [q for p in parts for q in (p.parts if isinstance(p, Concatenation) else [p]) if q.size]
    return flat[0] if len(flat) == 1 else Concatenation(flat) if flat else Run(0)


def runs_in(axis: AnyAxis) -> Iterator[Run]:
    """The runs that an axis is made of now."""
    left = [resolved(axis)]
    while left:
        now = left.pop()
        if isinstance(now, Run):
            yield now
        else:
            left += reversed(now.factors if isinstance(now, Product) else now.parts)


def block(axis: AnyAxis, reason: str, since: int) -> None:
    """All channels of an axis must stay."""
    for run in [*runs_in(axis)]:
        run.stay(reason, since)


# ---------------------------------------------------------------------- taken apart


def parted(axis: AnyAxis, place: int) -> tuple[AnyAxis, AnyAxis]:
    """The first ``place`` entries of an axis, and the others.

    Raises:
        MisfitError: the place lies inside a product.
    """
    now = resolved(axis)
    if place in (0, now.size):
        return (Run(0), now) if not place else (now, Run(0))
    if isinstance(now, Run):
        parts: list[AnyAxis] = [Run(place), Run(now.size - place)]
        _take_apart(now, Concatenation(parts))
        return parts[0], parts[1]
    if isinstance(now, Concatenation):
        for number, part in enumerate(now.parts):
            if place < part.size:
                first, second = parted(part, place)
                return concatenation([*now.parts[:number], first]), concatenation([second, *now.parts[number + 1 :]])
            place -= part.size
    assert isinstance(now, Product)
    outer, inner = now.factors[0], now.factors[1:]
    width = prod(f.size for f in inner)
    if place % width:
        raise MisfitError(f"{place} entries of {now.size} end within a block of {width}")
    first, second = parted(outer, place // width)
    return product([first, *inner]), product([second, *inner])


def factored(axis: AnyAxis, count: int) -> tuple[AnyAxis, AnyAxis]:
    """An axis as a product of two, the outer one of ``count`` entries.

    Raises:
        MisfitError: it has no such factors.
    """
    now = resolved(axis)
    if count in (1, now.size):
        return (Run(1), now) if count == 1 else (now, Run(1))
    width, rest = divmod(now.size, count)
    if rest:
        raise MisfitError(f"{now.size} entries are no product of {count}")
    if isinstance(now, Run):
        outer, inner = Run(count), Run(width)
        _take_apart(now, Product([outer, inner]))
        return outer, inner
    if isinstance(now, Product):
        return _factored_product(now, count)
    return _factored_concatenation(now, width)


def _factored_product(now: Product, count: int) -> tuple[AnyAxis, AnyAxis]:
    outer: list[AnyAxis] = []
    for number, factor in enumerate(now.factors):
        if count % factor.size == 0:
            outer, count = [*outer, factor], count // factor.size
            continue
        if factor.size % count:
            raise MisfitError(f"a factor of {factor.size} entries is no product of {count}")
        first, second = factored(factor, count)
        return product([*outer, first]), product([second, *now.factors[number + 1 :]])
    raise MisfitError(f"{now.size} entries, a product, have no factors of {count} entries")


def _factored_concatenation(now: Concatenation, width: int) -> tuple[AnyAxis, AnyAxis]:
    """Blocks of ``width`` entries, all of which are joined: what goes at one place goes at that place of every block."""
    outers: list[AnyAxis] = []
    blocks: list[AnyAxis] = []
    rest: AnyAxis = now
    while rest.size:
        rest = resolved(rest)
        head = rest.parts[0] if isinstance(rest, Concatenation) else rest
        # whole blocks of a part at once, or one block that reaches over several parts
        taken = max(width, head.size // width * width)
        first, rest = parted(rest, taken)
        outer, inner = factored(first, taken // width) if taken > width else (Run(1), first)
        outers, blocks = [*outers, outer], [*blocks, inner]
    for other in blocks[1:]:
        join(blocks[0], other)
    return concatenation(outers), resolved(blocks[0])


def _take_apart(run: Run, into: "Product | Concatenation") -> None:
    for part in into.factors if isinstance(into, Product) else into.parts:
        if isinstance(part, Run) and run.reason:
            part.stay(run.reason, run.since)
    run.taken_apart = into


# ---------------------------------------------------------------------- joined


def join(one: AnyAxis, other: AnyAxis) -> None:
    """Two axes of the same size meet entry by entry.

    Raises:
        MisfitError: they are made of parts that do not fit together.
    """
    a, b = resolved(one), resolved(other)
    if a is b:
        return
    if a.size != b.size:
        raise MisfitError(f"an axis of {a.size} entries meets one of {b.size}")
    if isinstance(a, Run) and isinstance(b, Run):
        if b.reason:
            a.stay(b.reason, b.since)
        b.same, a.copies = a, a.copies or b.copies
    elif isinstance(a, Run) or isinstance(b, Run):
        run, made = (a, b) if isinstance(a, Run) else (b, a)
        assert isinstance(run, Run)
        assert not isinstance(made, Run)
        if any(run is part for part in runs_in(made)):
            raise MisfitError(f"an axis of {run.size} entries meets a part of itself")
        if run.reason:
            block(made, run.reason, run.since)
        run.taken_apart = made
    elif isinstance(a, Product) and isinstance(b, Product):
        count = min(a.factors[0].size, b.factors[0].size)
        (outer_a, inner_a), (outer_b, inner_b) = factored(a, count), factored(b, count)
        join(outer_a, outer_b)
        join(inner_a, inner_b)
    elif isinstance(a, Concatenation) and isinstance(b, Concatenation):
        _join_concatenations(a, b)
    else:
        parts, factors = (a, b) if isinstance(a, Concatenation) else (b, a)
        assert isinstance(parts, Concatenation)
        assert isinstance(factors, Product)
        _join_parts(parts, factors)


def _join_concatenations(one: Concatenation, other: Concatenation) -> None:
    left, right = deque(one.parts), deque(other.parts)
    while left and right:
        # what was joined before may have taken them apart
        a, b = resolved(left.popleft()), resolved(right.popleft())
        if isinstance(a, Concatenation) or isinstance(b, Concatenation):
            left.extendleft(reversed(a.parts if isinstance(a, Concatenation) else [a]))
            right.extendleft(reversed(b.parts if isinstance(b, Concatenation) else [b]))
            continue
        count = min(a.size, b.size)
        (first_a, rest_a), (first_b, rest_b) = parted(a, count), parted(b, count)
        left.extendleft([rest_a] if rest_a.size else [])
        right.extendleft([rest_b] if rest_b.size else [])
        join(first_a, first_b)


def _join_parts(parts: Concatenation, factors: Product) -> None:
    width = prod(f.size for f in factors.factors[1:])
    if all(p.size % width == 0 for p in parts.parts):
        rest: AnyAxis = factors
        for part in parts.parts:
            first, rest = parted(rest, part.size)
            join(part, first)
    else:
        outer, inner = factored(parts, factors.factors[0].size)
        join(outer, factors.factors[0])
        join(inner, product(factors.factors[1:]))
