"""Constant fan-in in runs: Static, SET, RigL and SNFS with ``pattern="fan_in"``, with and without ablation."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import srigl
from support import loops
from support.inside import around_updates, parameters_of, start_from
from support.nets import FixedGradient, Regression, mlp, sgd
from support.rig import copied_masks, fit_steps
from torch import Tensor, nn

from sparse_callbacks import DPF, GMP, SET, SNFS, GaP, RigL, SparsityCallback, Static
from sparse_callbacks.core.fan_in import as_rows, fan_in_for
from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.core.selection import entries
from sparse_callbacks.testing.cases_resume import resumed_differently

MOVING = [SET, RigL, SNFS]
each_method = pytest.mark.parametrize("make", [Static, *MOVING], ids=lambda m: m.__name__)
each_moving = pytest.mark.parametrize("make", MOVING, ids=lambda m: m.__name__)


def method(make: Any, **more: Any) -> SparsityCallback:
    """The method with its pattern, and where it moves masks an update in every second step."""
    times = {} if make is Static else {"every": 2, "stop": 40, "drop_fraction": "constant(0.5)"}
    return make(
        **({"sparsity": 0.6, "distribution": "uniform", "pattern": "fan_in", "print_plan": False} | times | more)
    )


def conv_net() -> nn.Module:
    """Of every kind: grouped and transposed convolutions, and matrices."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1, groups=2),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3, groups=2),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(2),
        nn.Flatten(),
        nn.Linear(16, 12),
        nn.ReLU(),
        nn.Linear(12, 4),
    )


def rows_of(model: nn.Module, masks: Any) -> dict[str, Tensor]:
    """The masks as rows, an output in each."""
    return {e.name: as_rows(masks[e.name], e) for e in entries(model) if e.name in masks}


# ---------------------------------------------------------------------- first masks


@each_method
@pytest.mark.parametrize("start", ["random", "magnitude"])
def test_first_masks_have_the_planned_fan_in_in_every_row(make: Any, start: str) -> None:
    model = conv_net()
    weights = rows_of(model, {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1})
    run = loops.begin(method(make, initial_mask=start), model, loops.sgd(model))
    for name, rows in rows_of(model, run.masks).items():
        count = fan_in_for(0.4, rows.shape[1])
        assert srigl.fan_ins(rows) == [count] * len(rows)
        assert run.plan()[name].zeros == rows.numel() - count * len(rows)
        assert run.plan()[name].remark == f"fan_in: {count} of {rows.shape[1]} inputs"
        if start == "magnitude":
            threshold = weights[name].abs().masked_fill(~rows, math.inf).amin(1, keepdim=True)
            assert bool((weights[name].abs().masked_fill(rows, 0) <= threshold).all())
    assert run.plan().total == run.measured_sparsity()["sparsity/total"]
    run.close()


def test_first_masks_differ_by_row_and_by_seed() -> None:
    found = []
    for seed in (1, 2):
        model = conv_net()
        run = loops.begin(method(Static, seed=seed), model, loops.sgd(model))
        found.append(run.masks["8.weight"].clone())
        run.close()
    assert not torch.equal(*found)
    assert len({tuple(row.tolist()) for row in found[0]}) > 6


def test_matrices_stacked_in_one_weight_have_rows_of_their_own() -> None:
    model = nn.MultiheadAttention(8, 2)
    plan = method(Static, sparsity=0.5).plan(model)
    assert plan["in_proj_weight"].zeros == 24 * 4
    assert plan["in_proj_weight"].remark == "fan_in: 4 of 8 inputs"


# ---------------------------------------------------------------------- updates


@pytest.mark.parametrize("name", srigl.TABLES)
def test_one_update_of_the_tables_in_a_run(name: str, tmp_path: Path) -> None:
    table = {k: torch.tensor(v) if isinstance(v, list) else v for k, v in srigl.TABLES[name].items()}
    mask = table["mask"].bool()
    callback = RigL(
        1 - int(mask[0].sum()) / mask.shape[1],
        distribution="uniform",
        pattern="fan_in",
        ablation=table["ablation"],
        every=1,
        stop=5,
        drop_fraction=f"constant({table['drop_fraction']})",
    )
    start_from(callback, {"net.weight": mask})
    trained = FixedGradient(table["weights"], [table["dense_gradient"]])
    trained.configure = sgd
    fit_steps(tmp_path, callback, trained, 1)
    assert callback.updates == 1
    assert torch.equal(callback.masks["net.weight"], table["mask_after"].bool())
    assert torch.equal(trained.net.weight, table["effective_weights_after"])
    gone = table["ablated_rows"].tolist()
    remark = f"fan_in: {int(mask[0].sum())} of 8 inputs"
    remark += (
        ""
        if table["ablation"] is None
        else f"; {len(gone)} of 6 units ablated, and {table['fan_in']} of 8 inputs in others"
    )
    assert callback.plan()["net.weight"].remark == remark


@each_moving
@pytest.mark.parametrize("ablation", [None, 0.4])
def test_every_update_of_a_run_is_that_of_plain_python(make: Any, ablation: float | None, tmp_path: Path) -> None:
    callback, trained = method(make, ablation=ablation), Regression(mlp(12, 20, 6))
    found: list[Any] = []
    gradients: dict[str, Tensor] = {}

    def before(moment: Any) -> None:
        weights = {n: p.detach().clone() for n, p in parameters_of(callback).items()}
        scores = dict(gradients)
        if make is SNFS:
            scores = {n: callback.aux[f"smoothed/{n}"].clone() for n in weights}
        if make is SET:
            draws = {n: callback.generator(n, moment.step) for n in weights}
            scores = {n: torch.rand(w.shape, dtype=torch.float64, generator=draws[n]) for n, w in weights.items()}
        found.append((copied_masks(callback), weights, scores))

    trained.on_before_optimizer_step = lambda _: gradients.update(  # type: ignore[method-assign]
        {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
    )
    around_updates(callback, before, lambda _: found.append(copied_masks(callback)))
    fit_steps(tmp_path, callback, trained, 12)
    assert len(found) >= 8
    for (masks, weights, scores), after in zip(found[::2], found[1::2], strict=True):
        for name, mask in masks.items():
            planned = len(mask) * fan_in_for(0.4, mask.shape[1])
            expected, _ = srigl.update(mask, weights[name], scores[name], planned, 0.5, ablation)
            assert torch.equal(after[name], expected), name
            assert not torch.equal(after[name], mask)


@each_moving
@pytest.mark.parametrize("ablation", [None, 0.3, 0.95])
def test_every_row_that_is_left_has_the_same_fan_in_after_every_update(make: Any, ablation: float | None) -> None:
    model = conv_net()
    optimizer = loops.sgd(model)
    run = loops.begin(method(make, ablation=ablation), model, optimizer)
    gone, moved, before = 0, 0, {n: m.clone() for n, m in run.masks.items()}
    for step in range(12):
        loops.train(run, model, optimizer, step, step + 1, loops.data(2, 6, 6))
        for rows in rows_of(model, run.masks).values():
            planned = len(rows) * fan_in_for(0.4, rows.shape[1])
            counts = [n for n in srigl.fan_ins(rows) if n]
            assert set(counts) == {min(rows.shape[1], planned // len(counts))}
            assert ablation is not None or len(counts) == len(rows)
            gone += len(rows) - len(counts)
        moved += any(not torch.equal(before[n], m) for n, m in run.masks.items())
        before = {n: m.clone() for n, m in run.masks.items()}
    assert moved >= 4
    assert (gone > 0) == (ablation is not None)
    run.close()


def test_the_number_of_ablated_units_is_a_figure_of_each_update() -> None:
    for ablation in (0.95, None):
        model, chosen, figures = conv_net(), method(SET, ablation=ablation), []
        optimizer, new_masks = loops.sgd(model), chosen.new_masks

        def noted(step: Any, new_masks: Any = new_masks, figures: Any = figures) -> Any:
            update = new_masks(step)
            figures.append((update.figures, update.masks))
            return update

        chosen.new_masks = noted  # type: ignore[method-assign]
        run = loops.begin(chosen, model, optimizer)
        loops.train(run, model, optimizer, 0, 8, loops.data(2, 6, 6))
        run.close()
        assert len(figures) == 4
        for found, masks in figures:
            gone = sum(int((~rows.any(1)).sum()) for rows in rows_of(model, masks).values())
            assert found.get("update/ablated_units", 0) == gone
        assert (gone > 0) == (ablation is not None) == ("update/ablated_units" in found)


# ---------------------------------------------------------------------- resume and given masks


@each_method
def test_a_resumed_fit_is_bitwise_the_uninterrupted_one(make: Any, tmp_path: Path) -> None:
    after = (1, 4, 9)
    assert resumed_differently(lambda: [method(make)], tmp_path, after, "adamw") == {b: [] for b in after}


@each_moving
def test_a_fit_resumed_with_ablated_units_is_bitwise_the_uninterrupted_one(make: Any, tmp_path: Path) -> None:
    after, made = (4, 9), []

    def again() -> list[Any]:
        made.append(method(make, ablation=0.95))
        return [made[-1]]

    assert resumed_differently(again, tmp_path, after, "adamw") == {b: [] for b in after}
    left = {n: m.flatten(1).any(1) for n, m in made[0].masks.items()}
    assert any(not bool(rows.all()) for rows in left.values())


@each_method
def test_given_masks_of_constant_fan_in_go_on_and_others_are_refused(make: Any) -> None:
    model = conv_net()
    run = loops.begin(method(Static, seed=8), model, loops.sgd(model))
    masks = {n: m.clone() for n, m in run.masks.items()}
    run.close()
    mine, chosen = copy.deepcopy(model), method(make, sparsity=None, initial_mask="nonzero")
    optimizer = loops.sgd(mine)
    run = loops.begin(chosen, mine, optimizer)
    assert all(torch.equal(run.masks[n], masks[n]) for n in masks)
    loops.train(run, mine, optimizer, 0, 5, loops.data(2, 6, 6))
    for name, rows in rows_of(mine, run.masks).items():
        assert srigl.fan_ins(rows) == srigl.fan_ins(rows_of(mine, masks)[name])
    run.close()
    with torch.no_grad():
        model[8].weight[3, masks["8.weight"][3].nonzero()[0]] = 0.0
    with pytest.raises(
        ValueError, match=r"not of pattern='fan_in': 8\.weight has output units of 5 to 6 active weights"
    ):
        loops.begin(method(make, sparsity=None, initial_mask="nonzero"), model, loops.sgd(model))


@pytest.mark.parametrize("ablation", [None, 0.3])
def test_a_saved_mask_that_is_not_of_the_pattern_is_refused(ablation: float | None) -> None:
    model = loops.net()
    optimizer = loops.sgd(model)
    run = loops.begin(method(RigL, ablation=ablation), model, optimizer)
    loops.train(run, model, optimizer, 0, 3)
    state = with_truths(run.state_dict())
    run.close()
    mask = state["masks"]["2.weight"]
    first, second = mask[0].nonzero()[0], (~mask[1]).nonzero()[0]
    mask[0, first], mask[1, second] = False, True  # as many zeros as before
    with pytest.raises(ValueError, match=r"its mask of 2\.weight has output units of \d+ to \d+ active weights"):
        loops.begin(method(RigL, ablation=ablation), model, loops.sgd(model), state=state)


# ---------------------------------------------------------------------- what is refused


@each_moving
def test_ablation_of_another_pattern_is_refused(make: Any) -> None:
    for pattern in (None, "fan_in/4"):
        with pytest.raises(ValueError, match=r"ablation=0\.3 with pattern=.*: output units go where the others"):
            method(make, pattern=pattern, ablation=0.3)
    with pytest.raises(ValueError, match=r"ablation=2 is not in \(0, 1\]"):
        method(make, ablation=2)


@pytest.mark.parametrize("make", [Static, GMP, DPF, GaP])
def test_methods_that_take_no_units_away_refuse_ablation_in_words(make: Any) -> None:
    with pytest.raises(ValueError, match=rf"ablation=0\.3: {make.__name__} takes no units away .* Leave it out"):
        make(0.8, ablation=0.3)
    make(0.8, ablation=None)


def test_candidates_have_no_constant_fan_in() -> None:
    with pytest.raises(
        ValueError, match=r"candidates=2\.0 draws .* under pattern='fan_in' each group of inputs, or each row"
    ):
        method(RigL, candidates=2.0)


@each_method
def test_other_storage_is_refused(make: Any) -> None:
    for more in ({"storage": "sparse"}, {"storage": "grouped"}, {"storage": {"*": "grouped"}, "group": 4}):
        with pytest.raises(ValueError, match=r"pattern='fan_in' is one of masked storage|SNFS keeps a momentum"):
            method(make, **more)


@pytest.mark.parametrize("make", [SET, RigL], ids=lambda m: m.__name__)
def test_other_storage_has_no_ablation(make: Any) -> None:
    with pytest.raises(ValueError, match=r"ablation=0\.3 with storage='grouped': units lose all of their weights"):
        method(make, ablation=0.3, storage="grouped", group=1)
