"""Where the masks of a sparse start come from, in loops: every method, every source, and what is refused."""

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import loops
from support.loops import net
from torch import Tensor, nn

from sparse_callbacks import CTRE, SET, SNFS, GaP, RigL, SparseRun, SparsityCallback, Static

STARTING_SPARSE = [Static, SET, RigL, SNFS, CTRE, GaP]
each_method = pytest.mark.parametrize("make", STARTING_SPARSE, ids=lambda m: m.__name__)


def begin(method: SparsityCallback, model: nn.Module, **options: Any) -> SparseRun:
    return loops.begin(method, model, loops.sgd(model), **options)


def trained(run: SparseRun, model: nn.Module, last: int, first: int = 0) -> None:
    loops.train(run, model, run.method.owners.optimizers[0], first, last)


def pruned(model: nn.Module, share: float = 0.5, seed: int = 0) -> dict[str, Tensor]:
    """Zeros at random in every matrix of ``model``; gives where weights are left."""
    source, masks = torch.Generator().manual_seed(seed), {}
    for name, p in model.named_parameters():
        if p.ndim > 1:
            masks[name] = torch.rand(p.shape, generator=source) >= share
            p.data *= masks[name]
    return masks


def assert_masks(run: Any, masks: dict[str, Tensor], method: Any) -> None:
    """Those of ``masks``, but for the partition that GaP trains dense at first."""
    dense = set(method.blocks()[0]) if isinstance(method, GaP) else set()
    assert masks.keys() == run.masks.keys()
    for name, mask in run.masks.items():
        assert torch.equal(mask, torch.ones_like(mask) if name in dense else masks[name]), name


@each_method
def test_magnitude_keeps_the_largest_weights_of_each_layer_in_the_planned_number(make: Any) -> None:
    model, method = net(), make(0.7, initial_mask="magnitude", print_plan=False)
    weights = {n: p.detach().clone() for n, p in model.named_parameters() if p.ndim > 1}
    zeros = {r.name: r.zeros for r in method.plan(model)}
    expected = {}
    for name, w in weights.items():
        order = w.abs().flatten().argsort(descending=True)
        mask = torch.zeros(w.numel(), dtype=torch.bool)
        mask[order[: w.numel() - zeros[name]]] = True
        expected[name] = mask.view(w.shape)
    assert_masks(begin(method, model), expected, method)


@each_method
def test_nonzero_goes_on_with_the_masks_of_a_pruned_model(make: Any) -> None:
    model = net()
    masks = pruned(model)
    method = make(initial_mask="nonzero", print_plan=False)
    announced = method.plan(model)
    assert {n: announced[n].zeros for n in masks} == {n: int((~m).sum()) for n, m in masks.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run = begin(method, model)
    assert_masks(run, masks, method)
    assert {n: run.plan()[n].zeros for n in masks} == {n: announced[n].zeros for n in masks}


@each_method
def test_the_counts_found_hold_through_the_run(make: Any) -> None:
    model = net()
    masks = pruned(model)
    method = make(initial_mask="nonzero", print_plan=False)
    run = begin(method, model)
    trained(run, model, loops.STEPS)
    assert run.updates or make is Static
    run.close()
    assert {n: int(m.sum()) for n, m in run.masks.items()} == {n: int(m.sum()) for n, m in masks.items()}


def test_a_count_that_no_decimal_gives_is_planned_exactly() -> None:
    model = nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7))
    model[0].weight.data[3, 3] = 0  # 1 / 49 * 49 is less than 1 in double arithmetic
    run = begin(SET(initial_mask="nonzero", print_plan=False), model)
    assert [run.plan()[f"{i}.weight"].zeros for i in (0, 1)] == [1, 0]


@each_method
@pytest.mark.parametrize("form", ["mapping", "path", "text", "beside other things"])
def test_masks_come_from_a_state_dict_and_weights_from_the_model(make: Any, form: str, tmp_path: Path) -> None:
    source, model = net(seed=5), net()
    masks, own = pruned(source), copy.deepcopy(model.state_dict())
    path = tmp_path / "pruned.pt"
    state = source.state_dict()
    torch.save({"model": state, "note": "mine"} if form == "beside other things" else state, path)
    given: Any = {"mapping": state, "path": path}.get(form, str(path))
    method = make(initial_mask=given, print_plan=False)
    run = begin(method, model)
    assert_masks(run, masks, method)
    for name, mask in run.masks.items():
        assert torch.equal(model.get_parameter(name), own[name] * mask)


def test_a_state_dict_of_torchs_pruning_gives_its_masks() -> None:
    source, model = net(), net(seed=1)
    for i in (0, 2, 4):
        nn.utils.prune.random_unstructured(source[i], "weight", 0.5)
    run = begin(RigL(initial_mask=source.state_dict(), print_plan=False), model)
    assert all(torch.equal(run.masks[f"{i}.weight"], source[i].weight_mask.bool()) for i in (0, 2, 4))


def test_masks_that_a_run_saved_go_before_the_zeros_of_its_weights(tmp_path: Path) -> None:
    model = net()
    run = begin(SET(0.6, every=4, drop_fraction="constant(0.5)", print_plan=False), model)
    trained(run, model, 5)
    assert any((m & (model.get_parameter(n) == 0)).any() for n, m in run.masks.items())  # grown in the last step
    torch.save({"net": model.state_dict(), "run": run.state_dict()}, tmp_path / "run.pt")
    run.close()
    other = net(seed=1)
    goes_on = begin(RigL(initial_mask=tmp_path / "run.pt", print_plan=False), other)
    assert all(torch.equal(m, run.masks[n]) for n, m in goes_on.masks.items())


@pytest.mark.parametrize("make", [SET, GaP, Static], ids=lambda m: m.__name__)
def test_a_run_that_goes_on_needs_neither_the_file_nor_the_zeros(make: Any, tmp_path: Path) -> None:
    model, path = net(), tmp_path / "pruned.pt"
    pruned(model)
    torch.save(model.state_dict(), path)
    method = make(initial_mask=path, print_plan=False)
    run = begin(method, model)
    plan = run.plan()
    trained(run, model, 9)
    state, weights, masks = run.state_dict(), copy.deepcopy(model.state_dict()), copy.deepcopy(run.masks)
    assert state["arguments"]["initial_mask"] == repr(path)
    run.__exit__(KeyboardInterrupt, None, None)
    path.unlink()
    other = net(seed=3)
    other.load_state_dict(weights)
    resumed = begin(make(initial_mask=tmp_path / "moved.pt", print_plan=False), other, state=state)
    assert all(torch.equal(m, masks[n]) for n, m in resumed.masks.items())
    assert [(r.name, r.zeros) for r in resumed.plan()] == [(r.name, r.zeros) for r in plan]
    assert f"sparsity {plan.total:g}" in resumed.plan().title


def test_a_checkpoint_is_continued_with_another_stop_and_the_same_masks(tmp_path: Path) -> None:
    model = net()
    first = begin(RigL(0.7, every=2, stop=8, print_plan=False), model)
    trained(first, model, 6)
    torch.save({"state_dict": model.state_dict(), "sparsity": first.state_dict()}, tmp_path / "last.ckpt")
    masks = copy.deepcopy(first.masks)
    first.__exit__(KeyboardInterrupt, None, None)
    other = net(seed=2)
    other.load_state_dict(torch.load(tmp_path / "last.ckpt")["state_dict"])
    with pytest.raises(ValueError, match=r"stop=8 there and stop=20 here"):
        begin(RigL(0.7, every=2, stop=20, print_plan=False), other, state=first.state_dict())
    second = begin(RigL(initial_mask=tmp_path / "last.ckpt", every=2, stop=20, print_plan=False), other)
    assert all(torch.equal(m, masks[n]) for n, m in second.masks.items())
    assert second.method.times.stop == 20


def test_a_layer_that_is_added_to_a_run_may_be_dense_or_of_another_shape() -> None:
    model, method = net(), SET(initial_mask="nonzero", print_plan=False)
    pruned(model)
    with begin(method, model) as run:
        masks = copy.deepcopy(run.masks)
    model.append(nn.Linear(4, 4))
    with begin(method, model) as run:
        assert all(torch.equal(run.masks[n], mask) for n, mask in masks.items())
        assert run.plan()["5.weight"].zeros == 0
    model[2] = nn.Linear(24, 30)
    model[2].weight.data[:15] = 0
    run = begin(method, model)
    assert all(torch.equal(run.masks[n], masks[n]) for n in ("0.weight", "4.weight"))
    assert [run.plan()[f"{i}.weight"].zeros for i in (2, 5)] == [15 * 24, 0]


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (
            Static,
            {"initial_mask": "nonzero", "from_checkpoint": "a.pt"},
            "initial_mask= and from_checkpoint= are both given",
        ),
        (GaP, {"initial_mask": "nonzero", "init": "magnitude"}, "initial_mask= and init= are both given"),
        (GaP, {"initial_mask": "magnitude", "init": "random"}, "initial_mask= and init= are both given"),
        (
            RigL,
            {"initial_mask": None},
            "initial_mask=None is not known. Give 'random', 'magnitude', 'nonzero', the path",
        ),
        (RigL, {"initial_mask": ""}, "initial_mask='' is not known"),
        (SET, {"initial_mask": {}}, "initial_mask={} is not known"),
        (SET, {"rescale": "unit"}, "rescale='unit' is not known. Give None or 'layer' or 'fan_in'"),
        (
            CTRE,
            {"initial_mask": "nonzero", "epsilon": 2},
            r"initial_mask='nonzero' and distribution='epsilon\(2\)' both say",
        ),
    ],
)
def test_arguments_that_no_run_can_use_are_refused(make: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make(**options)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (
            "nowhere.pt",
            r"initial_mask='nowhere\.pt' is not a file\. Give 'random', 'magnitude', 'nonzero', the path of a checkpoint",
        ),
        ("nonzero", r"initial_mask='nonzero' holds no zeros in the selected weights"),
        (
            {"0.weight": torch.zeros(3, 3)},
            r"initial_mask= does not fit the model: 0\.weight, 2\.weight, 4\.weight not found",
        ),
    ],
)
def test_masks_that_are_not_there_are_refused_and_nothing_changes(given: Any, message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        begin(RigL(initial_mask=given, print_plan=False), model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@each_method
def test_a_sparsity_that_is_not_that_of_the_masks_is_refused(make: Any) -> None:
    model = net()
    masks = pruned(model)
    share = sum(int((~m).sum()) for m in masks.values()) / sum(m.numel() for m in masks.values())
    for wrong in (0.9, share + 0.01, share - 0.01):
        with pytest.raises(
            ValueError, match=r"sparsity=.* and initial_mask='nonzero' differ: the masks there have .* zeros"
        ):
            begin(make(wrong, initial_mask="nonzero", print_plan=False), model)
    method = make(round(share, 3), initial_mask="nonzero", print_plan=False)
    assert_masks(begin(method, model), masks, method)


def test_a_saved_count_that_no_layer_can_have_is_refused() -> None:
    model = net()
    pruned(model)
    run = begin(SET(initial_mask="nonzero", print_plan=False), model)
    state = run.state_dict()
    run.close()
    for damaged, message in (
        (torch.tensor([10**6]), "other counts than layers can have"),
        (torch.tensor([3, 4]), "should be 1 whole numbers"),
        (torch.tensor([int(state["aux"]["planned/2.weight"]) + 1]), "its masks have .* zeros in 2.weight"),
    ):
        wrong = {**state, "aux": {**state["aux"], "planned/2.weight": damaged}}
        with pytest.raises(ValueError, match=message):
            begin(SET(initial_mask="nonzero", print_plan=False), model, state=wrong)


def test_a_run_is_not_resumed_from_another_kind_of_start() -> None:
    model = net()
    run = begin(SET(0.8, print_plan=False), model)
    state = run.state_dict()
    run.close()
    assert "initial_mask" not in state["arguments"]  # as version 0.1 saved it
    with pytest.raises(ValueError, match="initial_mask='random' there and initial_mask='magnitude' here"):
        begin(SET(0.8, initial_mask="magnitude", print_plan=False), model, state=state)
    with pytest.raises(ValueError, match="rescale=None there and rescale='layer' here"):
        begin(SET(0.8, rescale="layer", print_plan=False), model, state=state)


def test_every_method_of_the_loops_is_known_here() -> None:
    dense_at_first = {"gmp", "dpf", "nm", "nm soft", "smcp", "channels", "l0"}
    by_a_score_of_its_own = {"crop"}
    assert {
        m.__name__.lower() for m in STARTING_SPARSE
    } == loops.METHODS.keys() - dense_at_first - by_a_score_of_its_own
