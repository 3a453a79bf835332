"""Optimizers under which weights cannot grow or steps cannot be replaced are refused before the first batch."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.data import loader
from support.loops import begin, loss_of, net
from support.loops import data as loop_data
from support.nets import Regression, mlp
from support.optimizers import (
    AnchorsElsewhere,
    BackWithGradients,
    ClipsToItsPast,
    Coded,
    DecaysAlways,
    ForgetsAlways,
    Halved,
    MovingZero,
    Opaque,
    RandomStart,
    Whole,
    WholeNan,
)

from sparse_callbacks import DPF, GMP, SET, SNFS, GaP, RigL, SparsityCallback, Static, Step, Update, sparsify
from sparse_callbacks.core.shadow_optimizer import Shadow
from sparse_callbacks.methods import RigL as PlainRigL
from sparse_callbacks.testing.runs import trainer_for


def made(method: Any, **more: Any) -> Any:
    times = {} if method is Static else {"every": 2, "stop": 6}
    return method(0.5, print_plan=False, **times, **more)


class GrowsFromOutside(SparsityCallback):
    """A method that says nothing about itself, and moves its masks."""

    def after_step(self, step: Step) -> Update | None:
        return Update({n: self.weights.masks[n].roll(1) for n in step.names}) if step.number % 2 == 0 else None


class ReplacesUnannounced(GrowsFromOutside):
    """Replaces steps, and does not say so."""

    def before_step(self, step: Step) -> None:
        if step.number == 2:
            step.replace()
        super().before_step(step)

    def after_step(self, step: Step) -> Update | None:
        return None


def fit(callback: Any, configure: Any, folder: Path) -> Regression:
    module = Regression(configure=configure)
    trainer_for(callback, folder, max_steps=6).fit(module, loader(6))
    return module


def refused(callback: Any, configure: Any, message: str, folder: Path) -> None:
    module = Regression(configure=configure)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        trainer_for(callback, folder, max_steps=6).fit(module, loader(6))
    assert module.batches == 0
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


# ---------------------------------------------------------------------- weights that grow


@pytest.mark.parametrize("optimizer", [MovingZero, Opaque, RandomStart], ids=lambda o: o.__name__)
@pytest.mark.parametrize("method", [RigL, SET, SNFS, GrowsFromOutside], ids=lambda m: m.__name__)
def test_state_that_cannot_be_learnt_is_refused_where_weights_grow(method: Any, optimizer: Any, tmp_path: Path) -> None:
    callback = method(0.5, print_plan=False) if method is GrowsFromOutside else made(method)
    message = (
        rf"{method.__name__} grows weights.*With {optimizer.__name__} that is not possible: it is not known what its state "
        r"'.*' is for a fresh weight: .*Use another optimizer, such as torch\.optim\.AdamW, or a method that does not grow weights"
    )
    refused(callback, optimizer, message, tmp_path)


@pytest.mark.parametrize(
    ("optimizer", "what"),
    [
        (AnchorsElsewhere, r"the first step of a new weight is \d+ times as large as those of the others"),
        (ClipsToItsPast, r"new weights do not move: it takes no step from fresh state"),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_a_growth_is_rehearsed(optimizer: Any, what: str, tmp_path: Path) -> None:
    refused(
        made(SET), optimizer, rf"SET grows weights.*With {optimizer.__name__} that .*: {what}\. Use another", tmp_path
    )
    fit(made(Static), optimizer, tmp_path)


@pytest.mark.parametrize("method", [Static, GMP, DPF, lambda s, **_: GaP(s, partitions=2, every=2, print_plan=False)])
def test_the_same_optimizer_trains_where_none_grow_or_it_starts_anew(method: Any, tmp_path: Path) -> None:
    callback = made(method)
    module = fit(callback, MovingZero, tmp_path)
    assert module.batches >= 6
    parameters = dict(module.named_parameters())
    assert all(not parameters[n].detach()[~m].any() for n, m in callback.masks.items())


def test_a_loop_refuses_the_same_and_stays_as_it_was() -> None:
    model = net()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"SET grows weights.*With MovingZero .* what its state 'code'"):
        begin("set", model, MovingZero(model.parameters()))
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    run = begin("set", model, Coded(model.parameters()))
    run.close()


@pytest.mark.parametrize("optimizer", [Coded, Halved], ids=lambda o: o.__name__)
@pytest.mark.parametrize("method", ["rigl", "set", "snfs", "ctre"])
def test_the_first_step_of_a_grown_weight_is_like_that_of_the_others(method: str, optimizer: Any) -> None:
    model = net()
    stepped = optimizer(model.parameters())
    run = begin(method, model, stepped)
    before = None
    seen = 0
    for number in range(24):
        batch = list(loop_data())[number % 12]
        masks, old = dict(run.masks), {n: p.detach().clone() for n, p in model.named_parameters()}
        with run.batch():
            loss_of(model, batch).backward()
        stepped.step()
        stepped.zero_grad()
        for name, mask in run.masks.items():
            if before is not None and name != "0.weight":
                grown, active = mask & masks[name] & ~before[name], mask & masks[name]
                moved = (model.get_parameter(name).detach() - old[name]).abs()
                if grown.any():
                    seen += 1
                    assert moved[grown].max() <= 5 * moved[active & ~grown].max(), (name, number)
        before = masks
    assert seen > 2


def test_an_optimizer_of_another_kind_at_a_restart_is_refused_then(tmp_path: Path) -> None:
    """GaP configures the optimizers of all methods anew."""
    made_before: list[Any] = []

    class Changes(Regression):
        def __init__(self) -> None:
            super().__init__(mlp(12, 20, 20, 6))

        def configure_optimizers(self) -> Any:
            made_before.append(1)
            return (Coded if len(made_before) == 1 else MovingZero)(self.parameters())

    gap = GaP(0.5, partitions=2, every=2, include="net.[02]*", print_plan=False)
    other = SET(0.5, every=2, stop=6, include="net.4*", print_plan=False)
    with pytest.raises(ValueError, match=r"SET grows weights.*MovingZero"):
        trainer_for([gap, other], tmp_path, max_steps=12).fit(Changes(), loader(12))
    assert len(made_before) == 2


# ---------------------------------------------------------------------- steps that are replaced


@pytest.mark.parametrize(
    ("optimizer", "what"),
    [
        (Whole, r"fails without gradients: RuntimeError: .*"),
        (WholeNan, r"makes its number 'norm' NaN or infinite without gradients"),
        (BackWithGradients, r"changes weights \(parameter 0\) without gradients"),
        (DecaysAlways, r"changes weights \(parameter 0\) without gradients"),
        (ForgetsAlways, r"changes its state 'momentum' \(parameter 0\) without gradients"),
    ],
    ids=lambda v: v.__name__ if isinstance(v, type) else "",
)
def test_what_moves_or_breaks_without_gradients_is_refused_where_steps_are_replaced(
    optimizer: Any, what: str, tmp_path: Path
) -> None:
    message = (
        rf"an update of RigL takes the place of a step: .*{optimizer.__name__} {what}\. Use another optimizer, such as "
        r"torch\.optim\.AdamW, or a method whose updates follow a step, such as SET or SNFS"
    )
    refused(made(RigL), optimizer, message, tmp_path)
    model = net()
    with pytest.raises(ValueError, match=message):
        sparsify(PlainRigL(0.5, every=2, print_plan=False), model, optimizer(model.parameters()), 6)
    fit(made(SET), optimizer, tmp_path)


def test_a_method_that_does_not_say_that_it_replaces_steps_is_refused_at_the_first(tmp_path: Path) -> None:
    module = Regression(configure=DecaysAlways)
    callback = ReplacesUnannounced(0.5, print_plan=False)
    with pytest.raises(
        ValueError, match=r"an update of ReplacesUnannounced takes the place.*DecaysAlways changes weights"
    ):
        trainer_for(callback, tmp_path, max_steps=6).fit(module, loader(6))
    assert module.batches == 3
    fit(ReplacesUnannounced(0.5, print_plan=False), Coded, tmp_path)


def test_a_step_that_insists_on_a_closure_is_probed_with_one(tmp_path: Path) -> None:
    class Insists(torch.optim.SGD):
        def step(self, closure: Any) -> Any:
            loss = closure()
            assert loss is not None
            return super().step()

    fit(made(RigL), lambda p: Insists(p, lr=0.1, momentum=0.9), tmp_path)


class Derived(torch.optim.SGD):
    """May do anything in its step."""


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, Derived], ids=lambda o: o.__name__)
def test_of_optimizers_of_torch_a_first_step_is_tried_and_no_more(
    optimizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[Shadow] = []
    step = Shadow.step

    def counted(self: Shadow, *within: Any) -> None:
        taken.append(self)
        step(self, *within)

    monkeypatch.setattr(Shadow, "step", counted)
    steps = []
    for method in (made(Static), made(RigL)):
        taken.clear()
        model = net()
        sparsify(method, model, optimizer(model.parameters(), lr=0.1), 6).close()
        steps.append(len(taken))
    # each of the four shadows that fresh state is learnt from
    assert steps[0] == 0
    assert (steps[1] == 4) == (optimizer is not Derived)
