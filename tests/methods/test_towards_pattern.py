"""GMP and DPF towards N:M: exact counts on the way, at most N in each group at the end, and what is refused."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support import loops
from torch import Tensor, nn

from sparse_callbacks import DPF, GMP
from sparse_callbacks.core.fan_in import as_rows
from sparse_callbacks.core.nm_masks import NMPattern, in_groups, nm_mask
from sparse_callbacks.core.patterns import largest_columns
from sparse_callbacks.methods.towards_pattern import kept_by, with_others
from sparse_callbacks.testing.cases_resume import resumed_differently

each_method = pytest.mark.parametrize("make", [GMP, DPF], ids=lambda m: m.__name__)
each_pattern = pytest.mark.parametrize("pattern", ["2:4", "1:4", "3:4", "transposable 2:4"])


def method(make: Any, pattern: str = "2:4", **more: Any) -> Any:
    return make(**{"pattern": pattern, "every": 2, "start": 1, "stop": 11, "print_plan": False} | more)


def net() -> nn.Module:
    """Of every kind: grouped and transposed convolutions, matrices, and layers that do not divide."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),  # 2 inputs: it stays dense
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 5),  # of a transposable pattern its 5 outputs do not divide
    )


def trained(chosen: Any) -> Iterator[tuple[int, Any]]:
    """The run after each of its steps, and first before any."""
    model = net()
    optimizer = loops.sgd(model)
    run = loops.begin(chosen, model, optimizer)
    yield 0, run
    for step in range(14):
        loops.train(run, model, optimizer, step, step + 1, loops.data(2, 6, 6))
        yield step + 1, run
    run.close()


def inputs_last(name: str, mask: Tensor) -> Tensor:
    """A mask as rows of groups of four inputs, written apart from the package: (groups, 4)."""
    matrix = mask.transpose(0, 1) if name == "4.weight" else mask
    return torch.stack([matrix[:, i : i + 4].transpose(1, -1).reshape(-1, 4) for i in range(0, matrix.shape[1], 4)])


@each_method
@each_pattern
def test_curves_say_how_many_groups_changed_and_the_most_that_one_has(make: Any, pattern: str) -> None:
    before: dict[str, Tensor] = {}
    found: list[float] = []
    for _, run in trained(method(make, pattern)):
        masks = {name: inputs_last(name, mask.clone()) for name, mask in run.masks.items()}
        figures = run.figures()
        if any(bool((masks[n] != before.get(n, masks[n])).any()) for n in masks):
            changed = [(masks[n] != before[n]).any(-1).flatten() for n in masks]
            assert figures["update/groups_changed"] == pytest.approx(float(torch.cat(changed).float().mean()))
            most = max(int(mask.sum(-1).amax()) for mask in masks.values())
            found.append(figures[f"{make.__name__.lower()}/n"])
            assert found[-1] == most
        assert ("update/groups_changed" in figures) == (run.updates > 0)
        before = masks
    assert found[0] == 4
    assert found[-1] == int(pattern[-3])


@each_method
def test_without_a_pattern_no_curve_speaks_of_groups(make: Any) -> None:
    *_, (_, run) = trained(method(make, "unstructured"))
    assert run.updates
    assert not {"update/groups_changed", f"{make.__name__.lower()}/n"} & set(run.figures())


def groups_of(name: str, mask: Tensor, m: int, outputs: bool = False) -> Tensor:
    """The active weights of each group of inputs, or of outputs."""
    axis = (0 if name == "4.weight" else 1) ^ outputs
    return in_groups(mask, m, axis).sum(-1)


@each_method
@each_pattern
def test_zeros_on_the_way_are_exact_and_at_the_end_every_group_has_n(make: Any, pattern: str) -> None:
    chosen, counts = method(make, pattern), []
    kept = NMPattern(int(pattern[-3]), 4, pattern.startswith("t"))
    for step, run in trained(chosen):
        names = {"2.weight", "4.weight", "8.weight"} | ({"10.weight"} if not kept.transposable else set())
        assert set(run.masks) == names
        at = chosen.sparsity_at(0 if not step else chosen.progress.done.get(0, 0))
        for name, mask in run.masks.items():
            zeros, full = int((~mask).sum()), chosen.sparsity_at(step) == kept.sparsity
            assert zeros == int(at * mask.numel()) or (kept.transposable and full and zeros > at * mask.numel())
            if chosen.progress.done.get(0, 0) >= 11:
                inputs = groups_of(name, mask, 4)
                assert inputs.amax() <= kept.n
                assert kept.transposable or bool((inputs == kept.n).all())
                assert not kept.transposable or groups_of(name, mask, 4, outputs=True).amax() <= kept.n
        counts.append(sum(int((~m).sum()) for m in run.masks.values()))
    assert counts == sorted(counts)
    assert len(set(counts)) >= 5
    assert chosen.at_target
    assert kept.transposable or chosen.plan().zeros == counts[-1]


@each_method
@pytest.mark.parametrize("sparsity", [0.6, "linear(0.2, 0.75)"])
def test_zeros_on_the_way_to_a_fan_in_are_exact_and_at_the_end_rows_have_it(make: Any, sparsity: Any) -> None:
    chosen, counts = method(make, "fan_in", sparsity=sparsity, distribution="erdos_renyi"), []
    for step, run in trained(chosen):
        plan = run.plan()
        part = chosen.sparsity_at(0 if not step else chosen.progress.done.get(0, 0)) / chosen.target_sparsity
        for entry in (e for e in chosen.entries if not e.reason):
            rows = as_rows(run.masks[entry.name], entry)
            assert int((~rows).sum()) == int(part * (plan[entry.name].zeros / rows.numel()) * rows.numel() + 1e-9)
            least = rows.shape[1] - plan[entry.name].zeros // len(rows)
            assert int(rows.sum(1).amin()) >= least
            if chosen.progress.done.get(0, 0) >= 11:
                assert bool((rows.sum(1) == least).all())
        counts.append(sum(int((~m).sum()) for m in run.masks.values()))
    assert counts == sorted(counts)
    assert len(set(counts)) >= 5
    assert chosen.at_target
    assert plan.zeros == counts[-1]


@each_method
@pytest.mark.parametrize("sparsity", [0.6, "linear(0.2, 0.75)"])
def test_zeros_on_the_way_to_shared_inputs_are_exact_and_at_the_end_rows_share_them(make: Any, sparsity: Any) -> None:
    chosen, counts = method(make, "fan_in/4", sparsity=sparsity, distribution="erdos_renyi"), []
    for step, run in trained(chosen):
        plan = run.plan()
        assert set(run.masks) == {"8.weight"}  # of convolutions and of 5 rows it is none
        part = chosen.sparsity_at(0 if not step else chosen.progress.done.get(0, 0)) / chosen.target_sparsity
        mask, planned = run.masks["8.weight"], plan["8.weight"].zeros
        assert int((~mask).sum()) == int(part * (planned / mask.numel()) * mask.numel() + 1e-9)
        whole = mask.unflatten(0, (-1, 4)).all(1).sum(1)
        assert int(whole.amin()) >= 16 - planned // 12  # columns that stay, whatever the smallest weights are
        if chosen.progress.done.get(0, 0) >= 11:
            assert bool((mask.sum(1) == 16 - planned // 12).all())
            assert bool((whole == 16 - planned // 12).all())
        counts.append(int((~mask).sum()))
    assert counts == sorted(counts)
    assert len(set(counts)) >= 5
    assert chosen.at_target
    assert plan.zeros == counts[-1]


def test_columns_are_kept_by_the_sums_of_whole_ones() -> None:
    """Worked by hand: two rows that share inputs, of which the third column has the largest sum and is no longer whole."""
    weight = torch.tensor([[1.0, -4.0, 9.0, 2.0], [-3.0, 1.0, 9.0, 2.5]])  # sums 4, 5, 18, 4.5
    assert largest_columns(weight, 2, 2)[0].tolist() == [False, True, True, False]
    among = torch.ones(2, 4, dtype=torch.bool)
    among[0, 2] = False
    assert largest_columns(weight, 2, 2, among).tolist() == [[False, True, False, True]] * 2


@each_method
def test_the_weights_that_a_group_keeps_are_never_pruned(make: Any) -> None:
    """Every group has two active weights at any time, also where a whole layer's smallest are in it."""
    for _, run in trained(method(make)):
        for name, mask in run.masks.items():
            assert bool((groups_of(name, mask, 4) >= 2).all())


@pytest.mark.parametrize("m", [2, 4, 5, 8])
@pytest.mark.parametrize("axis", [0, 1])
def test_a_mask_on_the_way_is_that_of_plain_python(m: int, axis: int) -> None:
    source = torch.Generator().manual_seed(m)
    n, shape = m // 2, (2 * m, 3, 2) if axis == 0 else (3, 2 * m, 2)
    weight = (torch.randn(shape, generator=source) * 4).round() / 4  # with ties
    among = torch.rand(shape, generator=source) < 0.9
    for allowed in (None, among):
        kept = kept_by(NMPattern(n, m), weight, axis, allowed)
        assert torch.equal(kept, nm_mask(weight.abs(), n, m, axis, allowed))
        most = weight.numel() - int(kept.sum())
        least = 0 if allowed is None else int((~among).sum())
        for zeros in {least, (least + most) // 2, most - 1, most}:
            mask = with_others(kept, weight, zeros, allowed)
            assert int((~mask).sum()) == zeros
            assert bool((mask | ~kept).all())
            free = ~kept if allowed is None else among & ~kept
            others = sorted((-abs(float(v)), i) for i, v in enumerate(weight.flatten()) if free.flatten()[i])
            stay = {i for _, i in others[: most - zeros]}
            assert {i for i in range(weight.numel()) if (mask & ~kept).flatten()[i]} == stay


def test_fewer_weights_than_wanted_all_stay_and_the_pattern_comes_first() -> None:
    weight, kept = torch.tensor([4.0, 3.0, 2.0, 1.0]), torch.tensor([True, True, False, False])
    assert with_others(kept, weight, 3).tolist() == [True, True, False, False]
    assert with_others(kept, weight, 0, torch.tensor([True, True, True, False])).tolist() == [True, True, True, False]


@each_method
def test_transposable_masks_may_end_with_a_few_zeros_more_than_planned(make: Any) -> None:
    """Of 1 x 1 with 2:4 here one tile of three places in a row and a column is worth more than four elsewhere."""
    model = nn.Sequential(nn.Linear(4, 4, bias=False))
    with torch.no_grad():
        tile = [[9.0, 8.0, 1.0, 1.0], [8.0, 1.0, 9.0, 1.0], [1.0, 9.0, 8.0, 1.0], [0.1, 0.1, 0.1, 0.01]]
        model[0].weight.copy_(torch.tensor(tile))
    chosen = make(sparsity="constant(0.5)", pattern="transposable 2:4", every=1, stop=2, print_plan=False)
    run = loops.begin(chosen, model, loops.sgd(model))
    mask = run.masks["0.weight"]
    assert int(mask.sum()) == 7  # the last row has room for another weight, in the column where it is active
    assert run.plan()["0.weight"].zeros == 8
    assert max(mask.sum(0).max(), mask.sum(1).max()) == 2
    run.close()


# ---------------------------------------------------------------------- arguments and plan


@each_method
def test_the_pattern_fixes_the_sparsity(make: Any) -> None:
    for sparsity in (None, 0.5, "linear(0, 0.5)", "constant(0.5)"):
        assert method(make, sparsity=sparsity).target_sparsity == 0.5
    assert method(make, "1:3").target_sparsity == pytest.approx(2 / 3)
    assert make(pattern="unstructured").target_sparsity == make().target_sparsity == 0.9
    for sparsity in (0.9, 0.4, "linear(0, 0.8)"):
        with pytest.raises(ValueError, match=r"pattern='2:4' is a sparsity of 0\.5, and sparsity="):
            method(make, sparsity=sparsity)


@each_method
def test_a_distribution_beside_the_pattern_is_refused(make: Any) -> None:
    for distribution in ("erdos_renyi", "lamp", {"*": 0.5}):
        with pytest.raises(ValueError, match=r"pattern='2:4' gives every layer the same share of weights"):
            method(make, distribution=distribution)


@each_method
def test_a_fan_in_needs_a_target_for_each_layer(make: Any) -> None:
    for distribution in (*(["global"] if make is GMP else []), "lamp", {"0.*": "lamp", "*": "uniform"}):
        with pytest.raises(ValueError, match=r"pattern='fan_in' with distribution=.*: under one threshold over all"):
            make(0.5, pattern="fan_in", distribution=distribution)


@pytest.mark.parametrize("pattern", ["fan_in", "fan_in/2"])
def test_the_threshold_over_all_layers_gives_way_to_a_share_of_each(pattern: str) -> None:
    made = DPF(0.5, pattern=pattern)
    assert made.distribution == "uniform"
    assert f"pattern={pattern!r}" in repr(made)
    zeros = [row.zeros for row in made.plan(net()).rows]
    assert zeros == [row.zeros for row in GMP(0.5, pattern=pattern).plan(net()).rows]
    assert (DPF(0.5).distribution, DPF(pattern="2:4").distribution) == ("global", "global")


def test_whole_filters_have_no_pattern() -> None:
    with pytest.raises(ValueError, match=r"unit='filter' with pattern='2:4': whole output channels go, or single"):
        method(DPF, unit="filter")
    assert DPF(0.5, unit="filter", pattern="unstructured").unit == "filter"


@each_method
def test_the_plan_shows_the_pattern_and_why_layers_stay_dense(make: Any) -> None:
    plan = method(make, "2:4").plan(net())
    assert plan["0.weight"].reason == "not 2:4: 2 inputs do not divide into groups of 4"
    assert plan["8.weight"].remark == "2:4: 2 of every 4 inputs"
    assert {r.name: r.zeros for r in plan if r.zeros} == {
        "2.weight": 144,
        "4.weight": 144,
        "8.weight": 96,
        "10.weight": 30,
    }
    assert plan.total == 0.5


# ---------------------------------------------------------------------- resume


@each_method
@pytest.mark.parametrize("pattern", ["2:4", "transposable 2:4", "fan_in", "fan_in/4"])
def test_a_resumed_fit_is_bitwise_the_uninterrupted_one(make: Any, pattern: str, tmp_path: Path) -> None:
    after = (1, 4, 12)
    more = {"distribution": "uniform"} if pattern.startswith("fan_in") else {}
    found = resumed_differently(lambda: [method(make, pattern, **more)], tmp_path, after, "adamw")
    assert found == {b: [] for b in after}
