"""Shared fan-in under masks: Static, SET, RigL and SNFS with ``pattern="fan_in/G"``, in a Trainer and in loops."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import fan_in
from pytorch_lightning import Callback
from support import loops
from support.inside import around_updates, parameters_of, start_from
from support.nets import FixedGradient, Regression, mlp, sgd
from support.rig import copied_masks, fit_steps
from torch import Tensor, nn

from sparse_callbacks import SET, SNFS, RigL, SparseLinear, SparsityCallback, Static
from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.testing.cases_resume import resumed_differently
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit

GROUP, NAMES = 2, ["net.0.weight", "net.2.weight"]
METHODS = [Static, SET, RigL, SNFS]
each_method = pytest.mark.parametrize("make", METHODS, ids=lambda m: m.__name__)


def method(make: Any, **more: Any) -> SparsityCallback:
    """The method with its pattern, and where it moves masks an update in every second step."""
    times = {} if make is Static else {"every": 2, "stop": 40, "drop_fraction": "constant(0.5)"}
    return make(
        **(
            {"sparsity": 0.6, "distribution": "uniform", "pattern": f"fan_in/{GROUP}", "print_plan": False}
            | times
            | more
        )
    )


def columns(mask: Tensor) -> list[list[int]]:
    """The active columns of each block, where every row of it has the same."""
    blocks = mask.unflatten(0, (-1, GROUP))
    assert bool((blocks == blocks[:, :1]).all())
    return [row.nonzero().flatten().tolist() for row in blocks[:, 0]]


def module() -> Regression:
    return Regression(mlp(12, 20, 6))


# ---------------------------------------------------------------------- first masks


@each_method
def test_first_masks_are_the_documented_draw_of_whole_columns(make: Any, tmp_path: Path) -> None:
    callback, seen = method(make, seed=5), dict[str, Tensor]()
    watch = Callback()
    watch.on_train_batch_start = lambda *_: seen.update(copied_masks(callback)) if not seen else None
    fit_steps(tmp_path, [callback, watch], module(), 1)
    for name, blocks, inputs in ((NAMES[0], 10, 12), (NAMES[1], 3, 20)):
        numbers = torch.rand(blocks, inputs, dtype=torch.float64, generator=callback.generator(name, 0))
        count = round(0.4 * inputs)
        assert columns(seen[name]) == [fan_in.best(row.tolist(), count, range(inputs)) for row in numbers]
    assert callback.plan().total == callback.measured_sparsity()["sparsity/total"] == 212 / 360


@each_method
def test_magnitude_keeps_the_columns_of_the_largest_sums(make: Any) -> None:
    model = loops.net()
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1}
    run = loops.begin(method(make, initial_mask="magnitude", rescale="layer"), model, loops.sgd(model))
    for name, mask in run.masks.items():
        sums = weights[name].abs().unflatten(0, (-1, GROUP)).sum(1)
        count = round(0.4 * sums.shape[1])
        assert columns(mask) == [fan_in.best(row.tolist(), count, range(len(row))) for row in sums]
        factor = (mask.numel() / int(mask.sum())) ** 0.5
        assert torch.allclose(model.get_parameter(name), weights[name] * mask * factor)


def patterned(model: nn.Module) -> dict[str, Tensor]:
    """Zeros of the pattern in every matrix of ``model``; gives the masks."""
    run = loops.begin(method(Static, seed=8), model, loops.sgd(model))
    masks = {n: m.clone() for n, m in run.masks.items()}
    run.close()
    return masks


@each_method
@pytest.mark.parametrize("sparsity", [None, 0.6])
def test_given_masks_of_the_pattern_go_on_and_keep_it(make: Any, sparsity: float | None, tmp_path: Path) -> None:
    model = loops.net()
    masks = patterned(model)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    for given in ("nonzero", tmp_path / "net.pt"):
        mine, chosen = copy.deepcopy(model), method(make, sparsity=sparsity, initial_mask=given)
        optimizer = loops.sgd(mine)
        run = loops.begin(chosen, mine, optimizer)
        assert all(torch.equal(run.masks[n], masks[n]) for n in masks)
        loops.train(run, mine, optimizer)
        assert [len(c) for n in masks for c in columns(run.masks[n])] == [
            len(c) for n in masks for c in columns(masks[n])
        ]


@each_method
def test_given_masks_of_another_pattern_are_refused_and_change_nothing(make: Any, tmp_path: Path) -> None:
    model = loops.net()
    patterned(model)
    with torch.no_grad():
        row = model[2].weight[GROUP + 1]
        model[2].weight[GROUP + 1] = row.roll(1)
    before = copy.deepcopy(model.state_dict())
    torch.save(before, tmp_path / "net.pt")
    for given in ("nonzero", str(tmp_path / "net.pt"), before):
        with pytest.raises(
            ValueError, match=r"holds masks that are not of pattern='fan_in/2': 2\.weight has groups of 2 rows"
        ):
            loops.begin(method(make, sparsity=None, initial_mask=given), model, loops.sgd(model))
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    loops.begin(method(make, sparsity=None, initial_mask="nonzero", pattern=None), model, loops.sgd(model)).close()


def test_a_layer_that_joins_a_run_keeps_its_columns_of_the_largest_sums() -> None:
    model = loops.net()
    model[2].requires_grad_(False)
    optimizer = loops.sgd([p for p in model.parameters() if p.requires_grad])
    run = loops.begin(method(Static), model, optimizer)
    loops.train(run, model, optimizer, 0, 3)
    model[2].requires_grad_(True)
    optimizer.add_param_group({"params": model[2].parameters()})
    sums = model[2].weight.detach().abs().unflatten(0, (-1, GROUP)).sum(1)
    loops.train(run, model, optimizer, 3, 4)
    assert columns(run.masks["2.weight"]) == [fan_in.best(row.tolist(), 10, range(24)) for row in sums]
    assert run.plan()["2.weight"].zeros == 24 * 14


@each_method
def test_a_pattern_that_no_layer_can_have_is_refused_and_one_that_some_layer_can_have_is_not(make: Any) -> None:
    model = loops.net()
    with pytest.raises(
        ValueError,
        match=r"pattern='fan_in/5' fits no layer, so nothing would be sparse: 0\.weight \(not fan_in/5: 24 rows do not divide into "
        r"groups of 5\), 2\.weight",
    ):
        loops.begin(method(make, pattern="fan_in/5"), model, loops.sgd(model))
    loops.begin(method(make, pattern="fan_in/24"), model, loops.sgd(model)).close()


@each_method
def test_a_layer_that_does_not_divide_trains_dense(make: Any) -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
    optimizer = loops.sgd(model)
    run = loops.begin(method(make, pattern="fan_in/4"), model, optimizer)
    loops.train(run, model, optimizer)
    assert set(run.masks) == {"0.weight"}
    assert (model[2].weight != 0).all()
    assert run.plan()["2.weight"].reason == "not fan_in/4: 6 rows do not divide into groups of 4"


def test_a_layer_that_is_not_trained_yet_counts_among_those_that_fit() -> None:
    """As in transfer learning: the head alone, which does not fit, is trained at first."""
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
    model[0].requires_grad_(False)
    optimizer = loops.sgd([p for p in model.parameters() if p.requires_grad])
    run = loops.begin(method(Static, pattern="fan_in/4"), model, optimizer)
    assert not run.masks
    for number, batch in enumerate(loops.batches(loops.data(), 0, 4)):
        if number == 2:
            model[0].requires_grad_(True)
            optimizer.add_param_group({"params": model[0].parameters()})
        loops.loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert set(run.masks) == {"0.weight"}


def test_a_state_with_a_mask_for_a_layer_that_stays_dense_here_is_refused_with_the_reason() -> None:
    model = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 6))
    run = loops.begin(method(Static), model, loops.sgd(model))
    state = run.state_dict()
    run.close()
    state["arguments"]["pattern"] = repr("fan_in/4")
    with pytest.raises(
        ValueError,
        match=r"2\.weight differ in name or shape\. 2\.weight has a mask there, and stays dense here \(not fan_in/4: 6 rows do not "
        r"divide into groups of 4\)\. Resume",
    ):
        loops.begin(method(Static, pattern="fan_in/4"), model, loops.sgd(model), state=state)


@pytest.mark.parametrize(("pattern", "why"), [("fan_in/4", "6 rows do not"), ("2:4", "9 inputs")])
def test_zeros_of_a_layer_that_the_pattern_leaves_dense_are_warned_of(pattern: str, why: str) -> None:
    model = nn.Sequential(nn.Linear(12, 9 if ":" in pattern else 8), nn.ReLU())
    model.append(nn.Linear(model[0].out_features, 6))
    make = Static(pattern=pattern, print_plan=False) if ":" in pattern else method(Static, pattern=pattern)
    for zeros in (False, True):
        with torch.no_grad():
            model[2].weight[:, 3:] *= not zeros
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            held = copy.deepcopy(model)
            loops.begin(copy.deepcopy(make), held, loops.sgd(held)).close()
        texts = [str(w.message) for w in caught if "leaves dense have zeros" in str(w.message)]
        assert bool(texts) == zeros
        assert all(why in text and "2.weight" in text for text in texts)


def test_a_layer_given_as_live_weights_alone_has_the_pattern_only_if_its_rows_share_inputs() -> None:
    for layer, fits in (
        (SparseLinear.random(12, 8, fan_in=5), False),
        (SparseLinear.random(12, 8, fan_in=5, storage="grouped", group=2), False),
        (SparseLinear.random(12, 8, fan_in=5, storage="grouped", group=4), True),
        (SparseLinear.random(12, 8, fan_in=5, storage="grouped", group=8), True),
    ):
        plan = method(RigL, pattern="fan_in/4").plan(nn.Sequential(layer, nn.ReLU(), nn.Linear(8, 4)))
        reasons = [row.reason for row in plan if row.name.startswith("0.") and row.shape and len(row.shape) > 1]
        assert [not reason for reason in reasons] == [fits], (layer, reasons)


# ---------------------------------------------------------------------- updates


def table(key: str) -> Tensor:
    return torch.tensor(fan_in.UPDATE[key], dtype=torch.float32)


@pytest.mark.parametrize("clip", [None, 1e-12])
def test_one_update_of_the_table_with_its_momentum(clip: float | None, tmp_path: Path) -> None:
    callback = RigL(0.5, distribution="uniform", pattern="fan_in/2", every=1, stop=5, drop_fraction="constant(0.5)")
    start_from(callback, {"net.weight": table("mask").bool()})
    trained = FixedGradient(table("weights"), [table("dense_gradient")])

    def configure(parameters: Any) -> Any:
        optimizer = sgd(parameters)
        optimizer.state[trained.net.weight]["momentum_buffer"] = table("momentum")
        return optimizer

    trained.configure = configure
    made = fit_steps(tmp_path, callback, trained, 1, gradient_clip_val=clip)
    assert callback.updates == 1
    assert torch.equal(callback.masks["net.weight"], table("mask_after").bool())
    assert torch.equal(trained.net.weight, table("effective_weights_after"))
    buffer = made.optimizers[0].state[trained.net.weight]["momentum_buffer"]
    assert torch.equal(buffer, table("momentum_after"))


@pytest.mark.parametrize("make", [SET, RigL], ids=lambda m: m.__name__)
def test_every_update_of_a_run_is_that_of_plain_python(make: Any, tmp_path: Path) -> None:
    callback, trained = method(make), module()
    found: list[Any] = []

    def before(moment: Any) -> None:
        weights = {n: p.detach().clone() for n, p in parameters_of(callback).items()}
        found.append((moment.step, copied_masks(callback), weights, dict(gradients)))

    gradients: dict[str, Tensor] = {}
    trained.on_before_optimizer_step = lambda _: gradients.update(  # type: ignore[method-assign]
        {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
    )
    around_updates(callback, before, lambda _: found.append(copied_masks(callback)))
    fit_steps(tmp_path, callback, trained, 12)
    assert len(found) >= 8
    for (step, masks, weights, dense), after in zip(found[::2], found[1::2], strict=True):
        for name, mask in masks.items():
            numbers = torch.rand(
                len(mask) // GROUP, mask.shape[1], dtype=torch.float64, generator=callback.generator(name, step)
            )
            gradient = dense[name] if make is RigL else None
            assert torch.equal(after[name], fan_in.update(mask, weights[name], 0.5, GROUP, gradient, numbers)), name
            assert not torch.equal(after[name], mask)


def test_an_update_that_moves_no_column_costs_no_gradient_step(tmp_path: Path) -> None:
    """Of 3 columns a fraction of 0.3 moves none, though it moves many of their weights."""
    callback = method(RigL, sparsity=1 - 3 / 12, drop_fraction="constant(0.3)", include="net.0.weight")
    fit_steps(tmp_path, callback, module(), 6)
    assert (callback.step, callback.updates) == (6, 0)
    callback = method(RigL, sparsity=1 - 4 / 12, drop_fraction="constant(0.3)", include="net.0.weight")
    fit_steps(tmp_path, callback, module(), 6)
    assert callback.updates == 6 - callback.step > 0


def test_convolutions_stay_dense_beside_layers_that_move_columns() -> None:
    model = loops.conv_net()
    optimizer = loops.sgd(model)
    run = loops.begin(method(SET), model, optimizer)
    loops.train(run, model, optimizer, 0, 6, loops.data(2, 6, 6))
    assert set(run.masks) == {"6.weight"}
    assert [len(c) for c in columns(run.masks["6.weight"])] == [13, 13]
    assert run.updates == 3


# ---------------------------------------------------------------------- resume


@each_method
def test_a_resumed_fit_is_bitwise_the_uninterrupted_one(make: Any, tmp_path: Path) -> None:
    """Of a convolution and two matrices, before, in and after updates."""
    after = (1, 3, 4, 9)
    assert resumed_differently(lambda: [method(make)], tmp_path, after, "adamw") == {b: [] for b in after}
    for other in (None, "fan_in/1"):
        with pytest.raises(ValueError, match=rf"pattern='fan_in/2' there and pattern={other!r} here"):
            fit(Classifier(), method(make, pattern=other), ckpt_path=tmp_path / "3.ckpt")


@each_method
def test_a_saved_mask_that_is_not_of_the_pattern_is_refused(make: Any) -> None:
    model = loops.net()
    optimizer = loops.sgd(model)
    run = loops.begin(method(make), model, optimizer)
    loops.train(run, model, optimizer, 0, 3)
    state = with_truths(run.state_dict())
    run.close()
    mask = state["masks"]["0.weight"]
    mask[1] = mask[1].roll(1)  # as many zeros as before
    with pytest.raises(
        ValueError, match=r"its mask of 0\.weight has groups of 2 rows that do not read the same inputs"
    ):
        loops.begin(method(make), model, loops.sgd(model), state=state)


def test_states_from_before_patterns_resume_without_one() -> None:
    model = loops.net()
    optimizer = loops.sgd(model)
    run = loops.begin(method(RigL, pattern=None), model, optimizer)
    loops.train(run, model, optimizer, 0, 3)
    state = run.state_dict()
    run.close()
    assert not {"pattern", "candidates"} & state["arguments"].keys()
    loops.begin(method(RigL, pattern=None), model, optimizer, state=state).close()
    with pytest.raises(ValueError, match=r"pattern=None there and pattern='fan_in/2' here"):
        loops.begin(method(RigL), model, optimizer, state=state)
