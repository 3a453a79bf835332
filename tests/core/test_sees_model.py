"""Distributions that look at the model: asked once, kept with the run, and refused where they say nothing of use."""

import io
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from support.loops import METHODS, begin, net, sgd, train
from support.nets import Regression
from support.rig import fit_steps
from support.shares import BySize
from torch import nn

from sparse_callbacks import GMP, RigL, Static, sparsify
from sparse_callbacks.core.checkpoint import SavedRun
from sparse_callbacks.core.distributions import decides_total, resolve
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.restored import take_saved
from sparse_callbacks.core.selection import Entry

STOP = 9


class Fixed:
    """The given result, whatever the model."""

    def __init__(self, result: Any) -> None:
        self.result = result

    def shares(self, model: nn.Module, entries: Sequence[Entry]) -> Any:
        return self.result


def test_a_class_in_place_of_its_object_is_refused_when_the_method_is_made() -> None:
    assert callable(Fixed)  # a class can be called, and has the function of its objects
    with pytest.raises(ValueError, match=r"distribution=Fixed is a class, .*\. Give Fixed\(\)\."):
        RigL(distribution=Fixed)  # type: ignore[arg-type]


def method_named(name: str, distribution: Any) -> Any:
    # made with 0.8, which would be refused beside an object that decides the total
    kind = type(METHODS[name]())
    times = {} if name in ("static", "gap") else {"every": 4}
    more = {"partitions": 2} if name == "gap" else {}
    return kind(distribution=distribution, print_plan=False, **times, **more)


PLANNED = ["static", "set", "rigl", "snfs", "gmp", "dpf", "ctre", "gap"]


@pytest.mark.parametrize("name", PLANNED)
def test_a_run_keeps_the_shares_that_it_began_with(name: str) -> None:
    distribution = BySize()
    method, model = method_named(name, distribution), net()
    announced = method.plan(model)
    assert 0.4 < announced.total < 0.9
    with torch.no_grad():  # the plan of a model was made for that model alone
        model[0].weight.mul_(2)
    again = method.plan(model)
    assert again["0.weight"].zeros > announced["0.weight"].zeros  # type: ignore[operator]
    optimizer = sgd(model)
    run = begin(method, model, optimizer)
    assert method.plan() == again
    asked = distribution.asked
    train(run, model, optimizer)
    assert method.plan() == method.plan(model) == again  # and not what the trained weights would give
    assert distribution.asked == asked


@pytest.mark.parametrize("name", PLANNED)
def test_a_resumed_run_has_the_same_targets_and_does_not_look_again(name: str) -> None:
    first, model = method_named(name, BySize()), net()
    optimizer = sgd(model)
    run = begin(first, model, optimizer)
    train(run, model, optimizer, last=STOP)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict(), "run": run.state_dict()}, file)
    train(run, model, optimizer, first=STOP)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    distribution, other = BySize(), net(seed=1)
    second, stepper = method_named(name, distribution), sgd(other)
    other.load_state_dict(saved["model"])
    stepper.load_state_dict(saved["optimizer"])
    resumed = begin(second, other, stepper, state=saved["run"])
    assert second.targets == first.targets
    train(resumed, other, stepper, first=STOP)
    assert distribution.asked == 0
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values(), strict=True))


def test_a_second_fit_of_a_model_goes_on_with_its_shares(tmp_path: Any) -> None:
    distribution, module = BySize(), Regression()
    callback = RigL(distribution=distribution, every=2, stop=8, print_plan=False)
    fit_steps(tmp_path, callback, module, 8)
    targets, asked = dict(callback.targets), distribution.asked
    fit_steps(tmp_path, callback, module, 16)
    assert callback.targets == targets
    assert distribution.asked == asked
    fit_steps(tmp_path, callback, Regression(), 8)  # another model is looked at
    assert distribution.asked == asked + 1


def test_exchanged_layers_have_the_shares_of_their_first_weights() -> None:
    shares, plans = [], []
    for storage in ("masked", "sparse"):
        model = net()
        method = Static(distribution=BySize(), storage={"0.weight": storage}, print_plan=False)
        sparsify(method, model, sgd(model), 8)
        shares.append(method.targets)
        plans.append([row.zeros for row in method.plan()])
    assert shares[0] == shares[1]
    assert plans[0] == plans[1]


def test_what_was_saved_describes_a_model_without_a_look_at_it() -> None:
    model = net()
    method = method_named("rigl", BySize())
    state = sparsify(method, model, sgd(model), 8).state_dict()
    distribution = BySize()
    other = method_named("rigl", distribution)
    take_saved(other, model, SavedRun.of(state, "here"))
    assert other.targets == method.targets
    assert distribution.asked == 0


@pytest.mark.parametrize(
    "broken",
    [torch.tensor([3.0]), torch.tensor([3, 4]), torch.tensor([-1]), torch.tensor([10**6])],
    ids=["not whole", "too many", "negative", "too large"],
)
def test_shares_that_no_run_can_have_kept_are_refused(broken: torch.Tensor) -> None:
    model = net()
    state = sparsify(method_named("rigl", BySize()), model, sgd(model), 8).state_dict()
    state["aux"]["allocated/0.weight"] = broken
    with pytest.raises(ValueError, match=r"its allocated/0.weight is a tensor .* should be 1 whole numbers up to 288"):
        take_saved(method_named("rigl", BySize()), model, SavedRun.of(state, "here"))


def test_a_sparsity_beside_an_object_that_decides_the_total_is_refused() -> None:
    assert decides_total(BySize())
    RigL(0.9, distribution=BySize())  # the default says nothing
    for make in (lambda: RigL(0.8, distribution=BySize()), lambda: GMP("linear(0, 0.8)", distribution=BySize())):
        with pytest.raises(ValueError, match=r"sparsity=0.8 and distribution=BySize\(0.4\) both say how many weights"):
            make()
    with pytest.raises(ValueError, match=r"initial_mask='nonzero' and distribution=BySize\(0.4\) both say how many"):
        Static(initial_mask="nonzero", distribution=BySize())


@pytest.mark.parametrize(
    ("result", "message"),
    [
        (None, "Fixed.shares returned None. It must return a dict"),
        ({"0.weight": 0.5}, r"Fixed.shares's result does not fit the layers: missing \['2.weight', '4.weight'\]"),
        (
            {"0.weight": 0.5, "2.weight": 1.0, "4.weight": 0},
            r"Fixed.shares's sparsity 1.0 of 2.weight is not in \[0, 1\)",
        ),
    ],
    ids=["nothing", "missing layers", "out of range"],
)
def test_what_it_returns_is_checked_before_a_run(result: Any, message: str) -> None:
    method, model = Static(distribution=Fixed(result)), net()
    for ask in (lambda: method.plan(model), lambda: sparsify(method, model, sgd(model), 8)):
        with pytest.raises(ValueError, match=message):
            ask()


def test_shapes_alone_are_not_enough() -> None:
    with pytest.raises(ValueError, match=r"distribution=BySize\(0.4\) looks at a model, and here are shapes alone"):
        resolve(BySize(), {"a": (2, 2)}, 0.5)
    method: Method = RigL(distribution=BySize())
    with pytest.raises(ValueError, match=r"distribution=BySize\(0.4\) looks at a model, and has seen none"):
        method.share_out([Entry("a", 4, (2, 2), (2, 2))])


def test_a_checkpoint_knows_it_by_its_text() -> None:
    assert RigL(distribution=BySize()).arguments["distribution"] == "BySize(0.4)"
    assert RigL(distribution=Fixed({})).arguments["distribution"] == "Fixed"  # never an address in memory
    model = net()
    state = sparsify(RigL(distribution=BySize(), every=4), model, sgd(model), 8).state_dict()
    with pytest.raises(ValueError, match=r"distribution=BySize\(0.4\) there and distribution=Fixed here"):
        sparsify(RigL(distribution=Fixed({}), every=4), model, sgd(model), 8, state=state)
