"""N:M under masks: Static, SET, RigL and SNFS with ``pattern="2:4"`` and ``"transposable 2:4"``, in a Trainer and in loops."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import nm
from support import loops
from support.inside import around_updates, parameters_of, start_from
from support.nets import FixedGradient, sgd
from support.rig import copied_masks, fit_steps
from torch import Tensor, nn

from sparse_callbacks import SET, SNFS, RigL, Score, SparsityCallback, Static
from sparse_callbacks.core.nm_masks import NMPattern, in_groups
from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.core.tiles import full_tiles
from sparse_callbacks.core.transposable import in_tiles
from sparse_callbacks.testing.cases_resume import resumed_differently
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit

METHODS = [Static, SET, RigL, SNFS]
PATTERNS = ["2:4", "transposable 2:4"]
each_method = pytest.mark.parametrize("make", METHODS, ids=lambda m: m.__name__)
each_pattern = pytest.mark.parametrize("pattern", PATTERNS)
TRANSPOSABLE = NMPattern(2, 4, transposable=True)


def method(make: Any, **more: Any) -> SparsityCallback:
    """The method with its pattern, and where it moves masks an update in every second step."""
    times = {} if make is Static else {"every": 2, "stop": 40, "drop_fraction": "constant(0.5)"}
    made: SparsityCallback = make(**({"pattern": "2:4", "print_plan": False} | times | more))
    return made


def assert_groups(mask: Tensor, pattern: str, axis: int = 1) -> None:
    """Every group has exactly two of four; of a transposable pattern every row and column of a tile has."""
    assert bool((in_groups(mask, 4, axis).sum(-1) == 2).all())
    if pattern.startswith("transposable"):
        assert bool((in_groups(mask, 4, 1 - axis).sum(-1) == 2).all())


class Kinds(nn.Module):
    """Layers of many kinds on the way from 8 numbers to 4 classes: grouped and transposed convolutions, attention, a GRU."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Conv1d(1, 8, 3, padding=1)
        self.grouped, self.up = nn.Conv1d(8, 16, 3, groups=2), nn.ConvTranspose1d(16, 8, 3, groups=2)
        self.attention, self.rnn = nn.MultiheadAttention(8, 2, batch_first=True), nn.GRU(8, 4, batch_first=True)
        self.head = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.up(torch.relu(self.grouped(torch.relu(self.first(x[:, None]))))).mT
        x = self.attention(x, x, x, need_weights=False)[0]
        out: Tensor = self.head(self.rnn(x)[0].mean(1))
        return out


KINDS = ["grouped.weight", "up.weight", "attention.in_proj_weight", "attention.out_proj.weight", "rnn.weight_ih_l0"]
KINDS += ["rnn.weight_hh_l0", "head.weight"]


# ---------------------------------------------------------------------- runs


@each_method
@each_pattern
def test_every_group_of_every_kind_of_layer_keeps_its_count(make: Any, pattern: str) -> None:
    model = Kinds()
    optimizer = loops.adamw(model)
    run = loops.begin(method(make, pattern=pattern, rescale="fan_in", seed=4), model, optimizer)
    assert set(run.masks) == set(KINDS)
    first = {n: m.clone() for n, m in run.masks.items()}
    for step in range(9):
        for name, mask in run.masks.items():
            assert_groups(mask, pattern, axis=0 if name == "up.weight" else 1)
            assert not bool(model.get_parameter(name)[~mask].any())
        loops.train(run, model, optimizer, step, step + 1, loops.data(8))
    assert all(row.zeros in (0, row.size // 2) for row in run.plan())
    changed = {n for n in KINDS if not torch.equal(first[n], run.masks[n])}
    assert changed == (set() if make is Static else set(KINDS))
    assert (run.updates == 0) if make is Static else (run.updates >= 3)


@each_method
@pytest.mark.parametrize("pattern", [*PATTERNS, "fan_in"])
def test_a_curve_says_how_many_groups_an_update_changed(make: Any, pattern: str) -> None:
    model = Kinds()
    optimizer = loops.adamw(model)
    run = loops.begin(method(make, pattern=pattern), model, optimizer)
    shares: set[float] = set()
    for step in range(9):
        before, updates = {n: m.clone() for n, m in run.masks.items()}, run.updates
        loops.train(run, model, optimizer, step, step + 1, loops.data(8))
        if run.updates == updates:
            continue
        changed = groups = 0
        for name, mask in run.masks.items():
            moved = (mask != before[name]).numpy()
            # groups of four inputs, counted one by one
            places = moved.swapaxes(0, 1) if name == "up.weight" else moved
            for output in places:
                kernel = output.reshape(output.shape[0], -1).T
                for position in kernel:
                    groups += len(position) // 4
                    changed += sum(bool(position[i : i + 4].any()) for i in range(0, len(position), 4))
        figure = run.figures().get("update/groups_changed")
        shares.add(changed / groups)
        assert figure == (None if pattern == "fan_in" else pytest.approx(changed / groups))
    assert bool(shares) == (make is not Static)
    assert make is not Static or "update/groups_changed" not in run.figures()


@pytest.mark.parametrize("make", [SET, RigL, SNFS], ids=lambda m: m.__name__)
def test_every_update_of_a_run_is_that_of_plain_python(make: Any, tmp_path: Path) -> None:
    callback, trained = method(make), Classifier()
    found: list[Any] = []
    gradients: dict[str, Tensor] = {}

    def before(moment: Any) -> None:
        weights = {n: p.detach().clone() for n, p in parameters_of(callback).items()}
        smoothed = {n: callback.aux[f"smoothed/{n}"].clone() for n in weights} if make is SNFS else {}
        found.append((moment.step, copied_masks(callback), weights, dict(gradients) | smoothed))

    trained.on_before_optimizer_step = lambda _: gradients.update(  # type: ignore[method-assign]
        {n: p.grad.clone() for n, p in trained.named_parameters() if p.grad is not None}
    )
    around_updates(callback, before, lambda _: found.append(copied_masks(callback)))
    fit(trained, callback)
    assert len(found) >= 8
    for (step, masks, weights, scores), after in zip(found[::2], found[1::2], strict=True):
        for name, mask in masks.items():
            grow = scores[name]
            if make is SET:
                grow = torch.rand(mask.shape, dtype=torch.float64, generator=callback.generator(name, step))
            assert torch.equal(after[name], nm.update(mask, weights[name], grow, 0.5, 4)), name


def table(key: str) -> Tensor:
    return torch.tensor(nm.UPDATE[key], dtype=torch.float32)


def test_one_update_of_the_table_leaves_grown_weights_at_zero(tmp_path: Path) -> None:
    callback = method(RigL, every=1, stop=5)
    start_from(callback, {"net.weight": table("2:4").bool()})
    trained = FixedGradient(table("weights"), [table("dense_gradient")])
    trained.configure = sgd
    fit_steps(tmp_path, callback, trained, 1)
    assert callback.updates == 1
    after = table("mask_after").bool()
    assert torch.equal(callback.masks["net.weight"], after)
    assert torch.equal(trained.net.weight, table("weights") * after)


# ---------------------------------------------------------------------- first masks


@each_method
def test_magnitude_keeps_the_largest_of_each_group(make: Any) -> None:
    for pattern in PATTERNS:
        model = loops.net()
        weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1}
        run = loops.begin(
            method(make, pattern=pattern, initial_mask="magnitude", rescale="layer"), model, loops.sgd(model)
        )
        for name, mask in run.masks.items():
            best = (
                nm.largest(weights[name].abs(), 2, 4)
                if pattern == "2:4"
                else full_tiles(weights[name].abs(), TRANSPOSABLE)
            )
            assert torch.equal(mask, best)
            assert torch.allclose(model.get_parameter(name), weights[name] * mask * 2**0.5)


def test_first_masks_are_the_documented_draw_of_each_group() -> None:
    model = loops.net()
    run = loops.begin(method(Static, seed=5), model, loops.sgd(model))
    for name, mask in run.masks.items():
        numbers = torch.rand(mask.shape, dtype=torch.float64, generator=run.method.generator(name, 0))
        assert torch.equal(mask, nm.largest(numbers, 2, 4))


@each_pattern
@pytest.mark.parametrize("score", ["snip", "synflow"])
def test_a_score_chooses_within_groups(score: str, pattern: str) -> None:
    model = loops.net()
    given = Score(
        score, rounds=4, **({"loss": loops.loss_of, "batches": list(loops.data(batches=2))} if score == "snip" else {})
    )
    run = loops.begin(method(RigL, pattern=pattern, initial_mask=given), model, loops.sgd(model))
    for mask in run.masks.values():
        assert_groups(mask, pattern)
    plain = loops.net()
    random = loops.begin(method(RigL, pattern=pattern, initial_mask="magnitude"), plain, loops.sgd(plain))
    assert any(not torch.equal(run.masks[n], random.masks[n]) for n in run.masks)


def test_a_score_of_one_round_keeps_the_largest_of_each_group() -> None:
    model, batches = loops.net(), list(loops.data(batches=2))
    expected = {}
    losses = [loops.loss_of(model, b) for b in batches]
    names = [n for n, p in model.named_parameters() if p.ndim > 1]
    grads = torch.autograd.grad(sum(losses) / len(losses), [model.get_parameter(n) for n in names])
    for name, gradient in zip(names, grads, strict=True):
        expected[name] = nm.largest((gradient * model.get_parameter(name)).abs().detach(), 2, 4)
    given = Score("snip", loss=loops.loss_of, batches=batches)
    run = loops.begin(method(Static, initial_mask=given), model, loops.sgd(model))
    assert all(torch.equal(run.masks[n], expected[n]) for n in names)


# ---------------------------------------------------------------------- given masks


def patterned(model: nn.Module, pattern: str = "2:4") -> dict[str, Tensor]:
    """Zeros of the pattern in every matrix of ``model``; gives the masks."""
    run = loops.begin(method(Static, seed=8, pattern=pattern), model, loops.sgd(model))
    masks = {n: m.clone() for n, m in run.masks.items()}
    run.close()
    return masks


@each_method
@each_pattern
@pytest.mark.parametrize("sparsity", [None, 0.5])
def test_given_masks_of_the_pattern_go_on_and_keep_it(
    make: Any, pattern: str, sparsity: float | None, tmp_path: Path
) -> None:
    model = loops.net()
    masks = patterned(model, pattern)
    torch.save(model.state_dict(), tmp_path / "net.pt")
    for given in ("nonzero", tmp_path / "net.pt"):
        mine, chosen = copy.deepcopy(model), method(make, sparsity=sparsity, initial_mask=given, pattern=pattern)
        optimizer = loops.sgd(mine)
        run = loops.begin(chosen, mine, optimizer)
        assert all(torch.equal(run.masks[n], masks[n]) for n in masks)
        loops.train(run, mine, optimizer, 0, 7)
        for mask in run.masks.values():
            assert_groups(mask, pattern)


@pytest.mark.parametrize("make", [SET, RigL, SNFS], ids=lambda m: m.__name__)
@each_pattern
def test_groups_of_given_masks_keep_fewer_where_they_had_fewer(make: Any, pattern: str) -> None:
    model = loops.net()
    patterned(model, pattern)
    with torch.no_grad():
        model[2].weight[:, :8] = 0
        model[2].weight[5] = 0
    optimizer = loops.sgd(model)
    run = loops.begin(method(make, sparsity=None, initial_mask="nonzero", pattern=pattern), model, optimizer)
    before = run.masks["2.weight"].clone()
    assert run.plan()["2.weight"].zeros == int((~before).sum()) > 288
    loops.train(run, model, optimizer, 0, 9)
    after = run.masks["2.weight"]
    assert not torch.equal(before, after)
    parts = in_groups if pattern == "2:4" else in_tiles
    counts = [parts(m, 4).flatten(0, 0 if pattern != "2:4" else 1).flatten(1).sum(1) for m in (before, after)]
    assert torch.equal(*counts)
    assert int(in_groups(after, 4).sum(-1).amax()) == 2


@each_method
def test_given_masks_of_another_pattern_are_refused_and_change_nothing(make: Any, tmp_path: Path) -> None:
    model = loops.net()
    patterned(model)
    with torch.no_grad():
        model[2].weight[3, :4] = 1.0
    before = copy.deepcopy(model.state_dict())
    torch.save(before, tmp_path / "net.pt")
    message = r"holds masks that are not of pattern='2:4': 2\.weight has 4 active weights in a group of 4 inputs, and 2:4 allows 2"
    for given in ("nonzero", str(tmp_path / "net.pt"), before):
        with pytest.raises(ValueError, match=message):
            loops.begin(method(make, initial_mask=given), model, loops.sgd(model))
        assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


def test_layers_that_do_not_fit_need_no_mask_of_the_pattern() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4))
    patterned(model)
    assert bool((model[0].weight != 0).all())
    run = loops.begin(method(RigL, initial_mask="nonzero"), model, loops.sgd(model))
    assert set(run.masks) == {"2.weight"}
    assert RigL(pattern="2:4", initial_mask="nonzero").plan(model)["0.weight"].reason.startswith("not 2:4: 6 inputs")


# ---------------------------------------------------------------------- layers that join


@each_pattern
def test_a_layer_that_joins_a_run_keeps_the_largest_of_each_group(pattern: str) -> None:
    model = nn.Sequential(*loops.net(), nn.Linear(4, 6), nn.Linear(6, 4))
    for layer in (model[2], model[6]):
        layer.requires_grad_(False)
    optimizer = loops.sgd([p for p in model.parameters() if p.requires_grad])
    run = loops.begin(method(Static, pattern=pattern), model, optimizer)
    assert run.plan()["6.weight"].reason.startswith(f"not {pattern}: 6 inputs")
    loops.train(run, model, optimizer, 0, 3)
    for layer in (model[2], model[6]):
        layer.requires_grad_(True)
        optimizer.add_param_group({"params": layer.parameters()})
    weight = model[2].weight.detach().abs().clone()
    loops.train(run, model, optimizer, 3, 4)
    assert torch.equal(
        run.masks["2.weight"], nm.largest(weight, 2, 4) if pattern == "2:4" else full_tiles(weight, TRANSPOSABLE)
    )
    assert "6.weight" not in run.masks


# ---------------------------------------------------------------------- resume


@each_method
@each_pattern
def test_a_resumed_fit_is_bitwise_the_uninterrupted_one(make: Any, pattern: str, tmp_path: Path) -> None:
    after = (1, 3, 4, 9)
    assert resumed_differently(lambda: [method(make, pattern=pattern)], tmp_path, after, "adamw") == {
        b: [] for b in after
    }
    other = "1:2" if pattern == "2:4" else "2:4"
    with pytest.raises(ValueError, match=rf"pattern='{pattern}' there and pattern='{other}' here"):
        fit(Classifier(), method(make, pattern=other), ckpt_path=tmp_path / "3.ckpt")


@each_method
def test_a_saved_mask_that_is_not_of_the_pattern_is_refused(make: Any) -> None:
    model = loops.net()
    optimizer = loops.sgd(model)
    run = loops.begin(method(make), model, optimizer)
    loops.train(run, model, optimizer, 0, 3)
    state = with_truths(run.state_dict())
    run.close()
    row = state["masks"]["0.weight"][1]
    row[:8] = torch.tensor([1, 1, 1, 0, 1, 0, 0, 0]).bool()  # as many zeros as before
    with pytest.raises(ValueError, match=r"its mask of 0\.weight has 3 active weights in a group of 4 inputs"):
        loops.begin(method(make), model, loops.sgd(model), state=state)


def test_unstructured_is_the_default_under_another_word() -> None:
    model = loops.net()
    optimizer = loops.sgd(model)
    run = loops.begin(method(RigL, pattern="unstructured"), model, optimizer)
    loops.train(run, model, optimizer, 0, 3)
    state = run.state_dict()
    run.close()
    loops.begin(method(RigL, pattern=None), model, optimizer, state=state).close()
    with pytest.raises(ValueError, match=r"pattern=None there and pattern='2:4' here"):
        loops.begin(method(RigL), model, optimizer, state=state)
