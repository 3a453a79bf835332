"""Axes: what is joined, split and reshaped, and which entries are one channel afterwards."""

import pytest

from sparse_callbacks.channels.axes import (
    AnyAxis,
    Concatenation,
    MisfitError,
    Product,
    Run,
    block,
    factored,
    join,
    parted,
    resolved,
    runs_in,
)
from sparse_callbacks.channels.met_axes import reshaped, units


def labels(*axes: AnyAxis) -> list[list[tuple[tuple[int, int], ...]]]:
    """For each entry of each axis the channels that it belongs to: numbers of runs, and places in them."""
    numbers: dict[int, int] = {}
    found = []
    for axis in axes:
        runs = list({id(r): r for r in runs_in(axis)}.values())
        for run in runs:
            numbers.setdefault(id(run), len(numbers))
        places = [(numbers[id(r)], units(axis, r)) for r in runs]
        found.append([tuple(sorted((n, u[i]) for n, u in places if u[i] >= 0)) for i in range(axis.size)])
    return found


def test_runs_that_meet_are_one() -> None:
    a, b, c = Run(4), Run(4), Run(4)
    join(a, b)
    join(c, b)
    assert {id(next(runs_in(r))) for r in (a, b, c)} == {id(a.leader())}
    b.stay("a reason", 3)
    c.stay("a later one", 7)
    assert a.leader().reason == "a reason"
    c.stay("an earlier one", 1)
    assert a.leader().reason == "an earlier one"


def test_a_flattened_image_holds_a_channel_in_each_of_its_places() -> None:
    channels, height, width = Run(2), Run(2), Run(3)
    (flat,) = reshaped([channels, height, width], [12])
    weight = Run(12)
    join(weight, flat)
    assert units(weight, channels.leader()) == [0] * 6 + [1] * 6
    assert units(weight, height.leader()) == ([0] * 3 + [1] * 3) * 2
    back = reshaped([weight], [2, 2, 3])
    assert [resolved(a) for a in back] == [channels.leader(), height.leader(), width.leader()]


def test_heads_come_out_of_a_view_and_the_weights_of_three_parts_share_them() -> None:
    weight = Run(24)
    three, heads, size = reshaped([weight], [3, 2, 4])
    query = product_of(heads, size)
    other = Run(8)
    join(other, query)
    assert units(weight, next(runs_in(heads))) == [h for _ in range(3) for h in (0, 1) for _ in range(4)]
    assert units(other, next(runs_in(heads))) == [0] * 4 + [1] * 4
    assert three.size == 3
    assert size.size == 4


def product_of(*axes: AnyAxis) -> AnyAxis:
    return Product([*axes])


def test_a_rotation_ties_the_halves_of_an_axis_and_ends() -> None:
    x = Run(8)
    first, second = parted(x, 4)
    join(x, Concatenation([second, first]))
    (run,) = {id(r): r for r in runs_in(x)}.values()
    assert run.size == 4
    assert units(x, run) == [0, 1, 2, 3] * 2


def test_parts_of_other_sizes_that_meet_themselves_end_in_their_common_measure() -> None:
    x = Run(8)
    first, second = parted(x, 3)
    join(x, Concatenation([second, first]))
    (run,) = {id(r): r for r in runs_in(x)}.values()
    assert run.size == 1  # a rotation by 3 of 8 reaches every entry
    y = Run(8)
    first, second = parted(y, 2)
    join(y, Concatenation([second, first]))
    assert {r.size for r in runs_in(y)} == {2}


def test_branches_meet_the_groups_of_a_convolution() -> None:
    a, b, c = Run(2), Run(4), Run(6)
    outer, inner = factored(Concatenation([a, b, c]), 2)
    assert outer.size == 2
    assert labels(a, b, c) == [
        [((0, 0),), ((0, 1),)],
        [((1, i),) for i in range(4)],
        [((0, 0),), ((0, 1),), *(((1, i),) for i in range(4))],
    ]
    assert [u for u in units(inner, a.leader()) if u >= 0] == [0, 1]


def test_a_shuffle_turns_the_factors_round() -> None:
    x = Run(6)
    outer, inner = factored(x, 2)
    shuffled = Product([inner, outer])
    first, second = parted(shuffled, 2)  # the first of three places, from both blocks
    assert labels(x, shuffled)[0] != labels(x, shuffled)[1]
    assert sorted(labels(x, shuffled)[0]) == sorted(labels(x, shuffled)[1])
    assert (first.size, second.size) == (2, 4)


@pytest.mark.parametrize(
    "take", [lambda: parted(Product([Run(2), Run(3)]), 2), lambda: factored(Run(6), 4), lambda: join(Run(2), Run(3))]
)
def test_what_does_not_fit_is_said(take: object) -> None:
    with pytest.raises(MisfitError):
        take()  # type: ignore[operator]


def test_a_reason_holds_for_all_parts_taken_out_before_and_after() -> None:
    x = Run(6)
    first, _ = parted(x, 2)
    block(x, "stays", 1)
    assert {r.reason for r in runs_in(first)} == {"stays"}
    later, _ = parted(Concatenation([first, Run(2)]), 1)
    assert {r.reason for r in runs_in(later)} == {"stays"}
    whole = Run(6)
    whole.stay("stays", 1)
    assert {r.reason for a in factored(whole, 2) for r in runs_in(a)} == {"stays"}
    met = Run(6)
    join(met, Product([Run(2), Run(3)]))
    met.stay("late", 2)
    assert {r.reason for r in runs_in(met)} == {"late"}


def test_thousands_of_slices_and_branches_are_followed_without_recursion() -> None:
    whole, rest = Run(4000), Run(4000)
    join(whole, rest)
    tail: AnyAxis = rest
    for _ in range(2000):  # each one is cut off what the last one has left
        _, tail = parted(tail, 2)
    assert len([*runs_in(whole)]) == 2000
    grown: AnyAxis = Run(2)
    for _ in range(1999):  # each one is put behind what was joined before
        grown = Concatenation([grown, Run(2)])
    branches = Concatenation([Run(1) for _ in range(4000)])
    join(grown, whole)
    join(branches, whole)
    assert [r.size for r in runs_in(grown)] == [1] * 4000
    assert [id(r) for r in runs_in(whole)] == [id(r) for r in runs_in(branches)]
    assert units(whole, [*runs_in(grown)][-1]) == [-1] * 3999 + [0]


def test_what_an_axis_was_resolved_to_is_not_kept_beyond_a_later_part() -> None:
    run = Run(8)
    parted(run, 4)
    assert [r.size for r in runs_in(run)] == [4, 4]
    parted(run, 2)
    first, _ = parted(run, 1)
    assert [r.size for r in runs_in(run)] == [1, 1, 2, 4]
    join(first, Run(1, reason="stays", since=1))
    assert next(runs_in(run)).reason == "stays"
