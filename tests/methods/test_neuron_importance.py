"""Neurons that lose their incoming weights: which, when, and what the rest of the run makes of it."""

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from support import loops
from support.inside import around_updates, parameters_of
from support.nets import mlp
from support.rig import copied_masks
from torch import Tensor, nn

from sparse_callbacks import SET, exchange_layers, sparsify
from sparse_callbacks.core.calendar import Calendar, RunLength
from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.methods.neuron_importance import (
    ImportanceTimes,
    hidden_layers,
    resolve_importance_times,
    unimportant_neurons,
)
from sparse_callbacks.testing.cases_resume import resumed_differently
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit

TABLE: dict[str, Any] = {
    "weights_in_out": [[0.1, 0.8, -0.3, 0.0, 0.05], [0.2, -0.7, 0.1, 0.4, 0.0]],
    "share": 0.2,
    "importance": [0.3, 1.5, 0.4, 0.4, 0.05],
    "threshold": 0.25,
    "removed": [4],
}


def removing(**more: Any) -> SET:
    """Updates after steps 1, 3, 5, ...; neurons go at those of steps 5, 9, 13, ..."""
    times = {"every": 2, "stop": 20, "importance_start": 4, "importance_every": 4}
    given = {"sparsity": 0.7, "distribution": "uniform", "drop_fraction": "constant(0.3)", "print_plan": False}
    return SET(**(given | times | {"neuron_importance": 0.2} | more))


def slow(weight: Tensor, mask: Tensor, share: float) -> list[int]:
    """Live rows at or below the quantile, in plain Python."""
    sums = {
        i: sum(abs(w) for w, m in zip(row, keep, strict=True) if m)
        for i, (row, keep) in enumerate(zip(weight.double().tolist(), mask.tolist(), strict=True))
        if any(keep)
    }
    ordered = sorted(sums.values())
    place = share * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    threshold = ordered[low] + (place - low) * (ordered[high] - ordered[low])
    found = [i for i, s in sums.items() if s <= threshold + 1e-12]
    return found if len(found) < len(sums) else []


# ---------------------------------------------------------------------- which neurons


def test_the_table() -> None:
    weight = torch.tensor(TABLE["weights_in_out"]).T
    assert weight.abs().sum(1).tolist() == pytest.approx(TABLE["importance"])
    assert float(weight.abs().sum(1).quantile(TABLE["share"])) == pytest.approx(TABLE["threshold"])
    found = unimportant_neurons(weight, weight != 0, TABLE["share"])
    assert found.nonzero().flatten().tolist() == TABLE["removed"]


@pytest.mark.parametrize("share", [0.05, 0.2, 0.5, 0.95])
def test_they_are_those_of_plain_python(share: float) -> None:
    for seed in range(30):
        source = torch.Generator().manual_seed(seed)
        mask = torch.rand(12, 9, generator=source) < 0.15  # some rows have none
        weight = torch.randint(-3, 4, (12, 9), generator=source).float()  # weights outside of the mask do not count
        found = unimportant_neurons(weight, mask, share)
        assert found.nonzero().flatten().tolist() == slow(weight, mask, share)


def test_dead_neurons_do_not_define_the_percentile() -> None:
    weight = torch.tensor([[0.0], [0.0], [1.0], [2.0], [3.0]])
    mask = weight != 0
    assert unimportant_neurons(weight, mask, 0.2).nonzero().flatten().tolist() == [2]
    # with them, as in the released code, the percentile is 0, and no live neuron is at or below it
    assert float(weight.abs().sum(1).quantile(0.2)) == 0.0


@pytest.mark.parametrize(
    "weight", [torch.ones(4, 3), torch.zeros(4, 3), torch.ones(1, 3), torch.full((4, 3), float("nan"))], ids=range(4)
)
def test_never_all_of_a_layer(weight: Tensor) -> None:
    assert not unimportant_neurons(weight, torch.ones_like(weight, dtype=torch.bool), 0.2).any()
    assert not unimportant_neurons(weight, torch.zeros_like(weight, dtype=torch.bool), 0.2).any()


def test_the_layers_of_hidden_neurons() -> None:
    def layers(model: nn.Module, **options: Any) -> list[str]:
        return hidden_layers(SET(0.5, **options).attachment and _entries(model, **options))

    assert layers(mlp(8, 8, 8, 4)) == ["0.weight", "2.weight"]
    assert layers(mlp(8, 8, 8, 4), exclude="0.weight") == ["2.weight"]
    assert layers(mlp(8, 8, 8, 4), keep_dense="last") == ["0.weight", "2.weight"]  # the last one of the network
    convolutions = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 4))
    assert layers(convolutions) == ["2.weight"]


def _entries(model: nn.Module, **options: Any) -> Any:
    from sparse_callbacks.core.selection import patterns, select

    exclude = patterns(options.get("exclude"), "exclude")
    return select(model, None, exclude, options.get("keep_dense"))


class HeadFirst(nn.Module):
    """Whose output layer is registered first."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.first, self.second = nn.Linear(8, 3), nn.Linear(12, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def first_input(module: nn.Module, batch: Any) -> Any:
    return module(batch[0])


@pytest.mark.parametrize(
    ("model", "options", "settings", "warns"),
    [
        (HeadFirst, {}, {"data": loops.data(), "forward": first_input}, True),
        (HeadFirst, {"exclude": "head*"}, {"data": loops.data(), "forward": first_input}, False),
        (HeadFirst, {"neuron_importance": None}, {"data": loops.data(), "forward": first_input}, False),
        (HeadFirst, {}, {}, False),
        (loops.net, {}, {"data": loops.data(), "forward": first_input}, False),
    ],
    ids=["registered first", "excluded", "not asked for", "no data", "registered last"],
)
def test_an_output_that_is_taken_for_hidden_is_warned_of(model: Any, options: Any, settings: Any, warns: bool) -> None:
    made = model()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        sparsify(removing(**options), made, loops.sgd(made, 0.05), 20, **settings)
    found = [str(w.message) for w in said if "for the output" in str(w.message)]
    assert len(found) == warns
    hooks = [hook for module in made.modules() for hook in module._forward_hooks.values()]
    assert not [hook for hook in hooks if "neuron_importance" in str(getattr(hook, "__module__", ""))]
    if warns:
        assert "registered last, second.weight, for the output, and head.weight is called last" in found[0]
        assert "Give exclude='head.weight'" in found[0]


# ---------------------------------------------------------------------- when


def test_times_in_steps_and_in_shares_of_the_run() -> None:
    run = RunLength(total=lambda: 500, epoch=lambda: 50)
    assert resolve_importance_times(0.4, 0.02, Calendar(5, 0, 400), run) == ImportanceTimes(200, 10)
    assert resolve_importance_times(7, 3, Calendar(5, 0, 400), run) == ImportanceTimes(7, 3)
    assert resolve_importance_times(0.1, 1e-5, Calendar(5, 0, 400), run) == ImportanceTimes(50, 1)
    with pytest.raises(
        ValueError, match=r"importance_start=0\.9 \(450 steps\) lies after the last update, at step 400"
    ):
        resolve_importance_times(0.9, 0.02, Calendar(5, 0, 400), run)


def updates_of(run: Any, model: nn.Module, optimizer: Any, steps: int) -> list[dict[str, Any]]:
    """Masks and weights around each update of a run."""
    found: list[dict[str, Any]] = []
    listed = list(loops.data())
    for number in range(steps):
        loops.loss_of(model, listed[number % len(listed)]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


class Watched:
    """Masks and weights before each update of a loop, masks and figures after it."""

    def __init__(self, callback: SET, steps: int = 20) -> None:
        self.callback, self.updates = callback, list[dict[str, Any]]()
        model = loops.net()
        optimizer = loops.sgd(model, 0.05)
        self.run = loops.begin(callback, model, optimizer)
        around_updates(_WithEngine(self.run), self.before, self.after)
        updates_of(self.run, model, optimizer, steps)

    def before(self, moment: Any) -> None:
        method = self.run.method
        weights = {n: p.detach().clone() for n, p in parameters_of(method).items()}
        self.updates.append({"step": moment.step, "masks": copied_masks(method), "weights": weights})

    def after(self, moment: Any) -> None:
        self.updates[-1] |= {"after": copied_masks(self.run.method), "figures": dict(self.run.figures())}


class _WithEngine:
    def __init__(self, run: Any) -> None:
        self.engine = run._engine


HIDDEN = ("0.weight", "2.weight")


def test_updates_remove_neurons_at_their_times_and_counts_only_fall() -> None:
    watched = Watched(removing(seed=3))
    assert [u["step"] for u in watched.updates] == list(range(1, 21, 2))
    for update in watched.updates:
        falls = update["step"] in (5, 9, 13, 17)
        neurons = 0
        for name, mask in update["masks"].items():
            gone = slow(update["weights"][name], mask, 0.2) if falls and name in HIDDEN else []
            neurons += len(gone)
            left = mask.clone()
            left[gone] = False
            weight, after = update["weights"][name], update["after"][name]
            count = int(left.sum())
            assert int(after.sum()) == count
            moved = int(torch.tensor(count).float() * torch.tensor(0.3).float())
            kept = sorted(left.flatten().nonzero().flatten().tolist(), key=lambda i: (-abs(weight.flatten()[i]), i))
            assert after.flatten()[kept[: count - moved]].all()
        assert update["figures"]["update/removed_neurons"] == neurons
        assert bool(neurons) == falls
    before, after = watched.updates[0]["masks"], watched.updates[-1]["after"]
    assert all(int(after[n].sum()) < int(before[n].sum()) for n in HIDDEN)
    assert int(after["4.weight"].sum()) == int(before["4.weight"].sum())


def test_growth_reaches_removed_neurons_too() -> None:
    watched = Watched(removing(drop_fraction="constant(0.5)"))
    update = next(u for u in watched.updates if u["step"] == 5)
    gone = slow(update["weights"]["2.weight"], update["masks"]["2.weight"], 0.2)
    later = watched.updates[-1]["after"]["2.weight"]
    assert gone
    assert later[gone].any()


def test_neurons_leave_by_sign_too() -> None:
    watched = Watched(removing(drop="signed", new_weights="uniform"))
    counts = [int(u["after"]["0.weight"].sum()) for u in watched.updates]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0]


def test_figures_of_sparsity_are_those_of_the_masks() -> None:
    watched = Watched(removing())
    masks = watched.run.method.masks
    zeros, size = sum(int((~m).sum()) for m in masks.values()), sum(m.numel() for m in masks.values())
    figures = watched.run.method.measured_sparsity()
    assert figures["sparsity/total"] == zeros / size > watched.run.method.plan().total
    assert watched.run.method.at_target


def test_the_plan_says_that_counts_fall() -> None:
    plan = removing().plan(mlp(8, 8, 8, 4))
    remarks = {row.name: row.remark for row in plan if row.name.endswith("weight")}
    assert remarks == {"0.weight": "loses neurons", "2.weight": "loses neurons", "4.weight": ""}
    assert "these are the zeros of the beginning" in str(plan)
    assert "from importance_start=4 on" in str(plan)
    assert "loses neurons" not in str(SET(0.5).plan(mlp(8, 8, 4)))


# ---------------------------------------------------------------------- resume and refusals


def test_a_resumed_fit_is_bitwise_the_uninterrupted_one(tmp_path: Path) -> None:
    def made(**more: Any) -> SET:
        published = {"drop": "signed", "new_weights": "uniform"}
        return removing(stop=16, **{"importance_start": 3, "importance_every": 3} | published | more)

    after = (2, 3, 5, 8, 11)
    assert resumed_differently(lambda: [made()], tmp_path, after, "adamw") == {b: [] for b in after}
    with pytest.raises(ValueError, match=r"neuron_importance=0\.2 there and neuron_importance=None here"):
        fit(Classifier(), made(neuron_importance=None), ckpt_path=tmp_path / "3.ckpt")


def test_a_state_may_have_more_zeros_than_planned_and_not_fewer() -> None:
    def begun(method: SET, state: Any = None) -> Any:
        model = loops.net()
        return sparsify(method, model, loops.sgd(model), loops.STEPS, state=state)

    run = begun(removing())
    state = with_truths(run.state_dict())
    run.close()
    del state["zeros"]  # a state of a Trainer has no such checksum
    ever = {k: t | True for k, t in state["aux"].items()}
    name, mask = "2.weight", state["masks"]["2.weight"].clone()
    fewer, emptied = mask.clone(), mask & False
    fewer.view(-1)[int(mask.view(-1).int().argmin())] = True
    more = mask.clone()
    more[:3] = False
    begun(removing(), {**state, "aux": ever, "masks": {**state["masks"], name: more}}).close()
    for wrong in (fewer, emptied):
        with pytest.raises(
            ValueError, match=rf"its masks have \d+ zeros in {name}, and a run of SET has \d+ to \d+ there"
        ):
            begun(removing(), {**state, "aux": ever, "masks": {**state["masks"], name: wrong}})
    plain = {**state["arguments"], "neuron_importance": "None"}
    other = {**state, "arguments": plain, "aux": ever, "masks": {**state["masks"], name: more}}
    with pytest.raises(ValueError, match=rf"its masks have \d+ zeros in {name}, and a run of SET has \d+ there"):
        begun(removing(neuron_importance=None), other)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"neuron_importance": 0.0}, r"neuron_importance=0\.0 is not a share of the hidden neurons between 0 and 1"),
        ({"neuron_importance": 1}, r"neuron_importance=1 is not a share of the hidden neurons"),
        ({"neuron_importance": True}, r"neuron_importance=True is not a share of the hidden neurons"),
        ({"neuron_importance": "0.2"}, r"neuron_importance='0\.2' is not a share of the hidden neurons"),
        ({"importance_start": -1}, "importance_start=-1 lies before the run"),
        ({"importance_every": 2.0}, r"importance_every=2\.0 is outside"),
        ({"importance_every": 0}, "importance_every=0 is not an interval between removals of neurons"),
        ({"storage": "sparse"}, r"neuron_importance=0\.2 with storage='sparse': the number of active weights falls"),
        ({"storage": "grouped"}, r"neuron_importance=0\.2 with storage='grouped': the number of active weights falls"),
        ({"storage": {"a": "sparse"}}, r"neuron_importance=0\.2 with storage={'a': 'sparse'}"),
        ({"pattern": "fan_in/1"}, r"neuron_importance=0\.2 with pattern='fan_in/1': the number of active weights"),
    ],
    ids=lambda value: "" if isinstance(value, str) else "-".join(map(str, next(iter(value.items())))),
)
def test_what_cannot_be_is_refused(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        removing(**arguments)


def test_without_hidden_neurons_it_is_refused_before_the_first_batch() -> None:
    convolutions = nn.Sequential(nn.Conv2d(2, 8, 3), nn.Flatten(), nn.Linear(32, 4))
    words = "no sparse linear layer has hidden neurons. The last linear layer is taken for the output"
    with pytest.raises(ValueError, match=words):
        removing().plan(convolutions)
    kept = [p.detach().clone() for p in convolutions.parameters()]
    with pytest.raises(ValueError, match=words):
        loops.begin(removing(), convolutions, loops.sgd(convolutions))
    assert all(torch.equal(a, b) for a, b in zip(kept, convolutions.parameters(), strict=True))


def test_layers_that_came_with_live_weights_alone_are_refused() -> None:
    model = mlp(12, 24, 24, 4)
    exchange_layers(SET(0.5, storage="sparse", distribution="uniform"), model)
    with pytest.raises(ValueError, match=r"have sparse storage, and SET removes neurons, so that the number of active"):
        loops.begin(removing(), model, loops.sgd(model))


def test_under_auto_layers_stay_masked_and_the_plan_says_why() -> None:
    plan = removing(storage="auto").plan(mlp(12, 24, 24, 4))
    assert {row.storage for row in plan} == {"masked"}
    assert "SET removes neurons, so that the number of active weights falls" in str(plan)
    assert "loses neurons" in str(plan)
