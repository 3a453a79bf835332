"""Sharpness-aware minimization in a hand-written loop, in all its forms."""

import copy
from typing import Any

import pytest
import torch
from lightning_fabric import Fabric
from support.loops import METHODS, STEPS, assert_masked, assert_same, batches, begin, data, loss_of, net
from support.sam import (
    FORMS,
    DataReplaced,
    NoInner,
    NoInnerNoStep,
    NothingKnown,
    TwoCalls,
    sgd,
    with_a_closure,
    with_other_names,
)
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer

from sparse_callbacks import DPF, SNFS, ConstrainedL0, GaP, RigL, SparseRun, Static, sparsify
from sparse_callbacks.core.gradients import DenseGradients
from sparse_callbacks.core.step import Step
from sparse_callbacks.core.two_pass import stepping
from sparse_callbacks.testing.comparison import differences

pytestmark = pytest.mark.filterwarnings(
    "ignore:DataReplaced.*:UserWarning", "ignore:.*ended at:UserWarning", "ignore:.*ended after:UserWarning"
)


def train(
    form: str, run: SparseRun, model: nn.Module, optimizer: Any, first: int = 0, last: int = STEPS, check: bool = True
) -> None:
    """Steps of two passes; in both, and after each step, pruned weights are zero."""
    take_step = FORMS[form][1]
    for batch in batches(data(), first, last):

        def backward(batch: Any = batch) -> Tensor:
            if check:
                assert_masked(model, run)
            loss = loss_of(model, batch)
            loss.backward()
            return loss

        with run.batch():
            take_step(optimizer, backward)
        if check:
            assert_masked(model, run)


def train_plain(run: SparseRun, model: nn.Module, optimizer: Optimizer) -> None:
    for batch in batches(data(), 0, STEPS):
        with run.batch():
            loss_of(model, batch).backward()
            optimizer.step()
        optimizer.zero_grad()


@pytest.mark.combinations
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_with_a_radius_of_0_every_method_trains_as_with_the_inner_optimizer(method: str, form: str) -> None:
    model, plain = net(), net()
    optimizer, inner = FORMS[form][0](model.parameters(), rho=0.0), sgd(plain.parameters())
    run, other = begin(method, model, optimizer), begin(method, plain, inner)
    train(form, run, model, optimizer, check=method != "l0")
    train_plain(other, plain, inner)
    assert_same(model, plain)
    assert (run.step, run.updates) == (other.step, other.updates)
    assert run._engine.skipped == 0  # the first pass is not a step that a GradScaler skipped
    mine, theirs = run.state_dict(), other.state_dict()
    for kind in ("masks", "dense", "aux"):
        assert differences(mine[kind], theirs[kind]) == [], kind


@pytest.mark.parametrize("form", FORMS)
def test_static_is_the_dense_optimizer_on_a_masked_forward_pass(form: str) -> None:
    model = net()
    optimizer = FORMS[form][0](model.parameters(), rho=0.5)
    run = begin("static", model, optimizer)
    oracle = copy.deepcopy(model)
    its_own = FORMS[form][0](oracle.parameters(), rho=0.5)
    train(form, run, model, optimizer)
    for batch in batches(data(), 0, STEPS):

        def backward(batch: Any = batch) -> Tensor:
            masked = {n: p * run.masks[n] if n in run.masks else p for n, p in oracle.named_parameters()}
            loss = nn.functional.cross_entropy(functional_call(oracle, masked, batch[0]), batch[1])
            loss.backward()
            return loss

        FORMS[form][1](its_own, backward)
    assert_same(model, oracle)


def gradients(model: nn.Module, values: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    leaves = {n: v.detach().clone().requires_grad_() for n, v in values.items()}
    loss = nn.functional.cross_entropy(functional_call(model, leaves, batch[0]), batch[1])
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


def second_gradients(
    model: nn.Module, seen: dict[str, Tensor], masks: Any, batch: Any, rho: float
) -> dict[str, Tensor]:
    """Dense gradients where the active weights of ``seen`` are perturbed."""
    first = {n: g * masks[n] if n in masks else g for n, g in gradients(model, seen, batch).items()}
    scale = float(rho / (torch.stack([g.norm() for g in first.values()]).norm() + 1e-12))
    return gradients(model, {n: p + first[n] * scale for n, p in seen.items()}, batch)


@pytest.mark.parametrize("form", FORMS)
def test_dpf_steps_dense_weights_by_gradients_at_perturbed_active_ones(form: str) -> None:
    model = net()
    oracle = copy.deepcopy(model)
    optimizer, its_own = FORMS[form][0](model.parameters(), rho=0.5), sgd(oracle.parameters())
    run = begin(DPF("constant(0.8)", every=4, print_plan=False), model, optimizer)
    for number, batch in enumerate(batches(data(), 0, STEPS)):
        masks = run.masks
        seen = {n: p.detach() * masks[n] if n in masks else p.detach() for n, p in oracle.named_parameters()}
        for n, gradient in second_gradients(oracle, seen, masks, batch, 0.5).items():
            oracle.get_parameter(n).grad = gradient
        its_own.step()
        train(form, run, model, optimizer, number, number + 1)
        for n, dense in run.state_dict()["dense"].items():
            torch.testing.assert_close(dense, oracle.get_parameter(n).detach(), rtol=0, atol=1e-5)


@pytest.mark.combinations
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("make", [RigL, SNFS], ids=["rigl", "snfs"])
def test_growing_looks_at_the_dense_gradient_of_the_second_pass_alone(make: Any, form: str) -> None:
    model, found = net(), []

    class Recorded(make):  # type: ignore[misc]
        def before_step(self, step: Step) -> None:
            found.append({n: step.gradient(n).clone() for n in step.names})
            super().before_step(step)

    optimizer = FORMS[form][0](model.parameters(), rho=0.5)
    method = Recorded(0.8, every=2, drop_fraction="constant(0.3)", print_plan=False)
    run = begin(method, model, optimizer)
    for number, batch in enumerate(batches(data(), 0, 8)):
        masks, seen = run.masks, {n: p.detach().clone() for n, p in model.named_parameters()}
        dense = make is SNFS or bool(run.step % 2 == 0)
        expected = second_gradients(model, seen, masks, batch, 0.5)
        train(form, run, model, optimizer, number, number + 1)
        for n, gradient in found[-1].items():
            shown = expected[n] if dense else expected[n] * masks[n]
            torch.testing.assert_close(gradient, shown, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_a_replaced_step_moves_nothing(form: str) -> None:
    model = net()
    optimizer = FORMS[form][0](model.parameters(), rho=0.5)
    run = begin(RigL(0.8, every=4, drop_fraction="constant(0.3)", print_plan=False), model, optimizer)
    replaced = 0
    for number in range(STEPS):
        before, updates = {n: p.detach().clone() for n, p in model.named_parameters()}, run.updates
        masks = run.masks
        train(form, run, model, optimizer, number, number + 1)
        moved = {n: p.detach() != before[n] for n, p in model.named_parameters()}
        if run.updates > updates:
            replaced += 1
            assert all(not (m & run.masks[n] & masks[n]).any() if n in masks else not m.any() for n, m in moved.items())
        else:
            assert moved["0.bias"].any()
    assert replaced == run.updates > 3


@pytest.mark.combinations
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", ["rigl", "dpf", "l0", "gap"])
def test_a_run_resumes_exactly(method: str, form: str) -> None:
    if form == "data_replaced":
        pytest.skip("its state_dict() leaves the state of the inner optimizer out")
    model = net()
    optimizer = FORMS[form][0](model.parameters(), rho=0.5)
    run = begin(method, model, optimizer)
    train(form, run, model, optimizer, 0, 10, check=False)
    state, weights, moments = copy.deepcopy((run.state_dict(), model.state_dict(), optimizer.state_dict()))
    train(form, run, model, optimizer, 10, check=False)
    again = net(1)
    resumed = FORMS[form][0](again.parameters(), rho=0.5)
    again.load_state_dict(weights)
    resumed.load_state_dict(moments)
    later = begin(method, again, resumed, state=state)
    train(form, later, again, resumed, 10, check=False)
    assert_same(model, again)
    assert all(torch.equal(m, later.masks[n]) for n, m in run.masks.items())


@pytest.mark.parametrize("form", FORMS)
def test_gap_starts_the_inner_optimizer_anew(form: str) -> None:
    model = net()
    optimizer = FORMS[form][0](model.parameters(), rho=0.5)
    moments = []
    run = begin(
        GaP(0.8, partitions=2, every=6, print_plan=False),
        model,
        optimizer,
        on_restart=lambda: moments.append(sum("momentum_buffer" in s for s in optimizer.base_optimizer.state.values())),
    )
    train(form, run, model, optimizer)
    assert moments == [0, 0]
    assert run.step == STEPS


def test_clipping_sees_the_gradients_of_the_second_pass() -> None:
    model, plain, seen = net(), net(), []

    def clip(parameters: list[nn.Parameter]) -> None:
        seen.append(float(clip_grad_norm_(parameters, 0.1)))

    optimizer, inner = TwoCalls(model.parameters(), rho=0.0), sgd(plain.parameters())
    run = begin("dpf", model, optimizer, clip=clip)
    train("two_calls", run, model, optimizer)
    mine, seen[:] = list(seen), []
    train_plain(begin("dpf", plain, inner, clip=clip), plain, inner)
    assert mine == seen
    assert len(mine) == STEPS
    assert_same(model, plain)


def test_dense_gradients_come_back_clipped_as_the_active_ones_were() -> None:
    """A clip between the passes and the step sees active weights alone; its factor is taken for the rest too."""
    model = net()
    run = begin(DPF("constant(0.8)", print_plan=False), model, TwoCalls(model.parameters()))
    weights, name = run.method.weights, "0.weight"
    p, kept = model.get_parameter(name), DenseGradients(dict(weights.params))
    dense = torch.randn_like(p)
    for factor in (1.0, 0.25):
        p.grad = dense.clone()
        kept.keep_and_mask([name], weights, 1.0, reduced=True)
        kept.keep_and_mask([name], weights, 1.0, reduced=True)  # with no backward pass in between
        assert not p.grad[~run.masks[name]].any()
        if factor != 1.0:
            p.grad.mul_(factor)
        kept.give_back(name, weights)
        torch.testing.assert_close(p.grad, dense * factor, rtol=1e-5 if factor != 1.0 else 0, atol=0)


def test_both_passes_have_one_sample_of_the_gates_or_are_refused() -> None:
    model = net()
    optimizer = TwoCalls(model.parameters())
    run = begin(ConstrainedL0(density=0.3, gate_lr=0.1, dual_lr=0.1, print_plan=False), model, optimizer)
    with pytest.raises(RuntimeError, match="Take the whole step within it"), run.batch():
        loss_of(model, next(iter(data()))).backward()
    run.close()


# ---------------------------------------------------------------------- what is refused, and what is not of this kind


@pytest.mark.parametrize("make", [NoInner, NoInnerNoStep])
def test_without_an_inner_optimizer_it_is_refused_and_nothing_is_changed(make: Any) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"moves the weights before it asks for gradients.*base_optimizer"):
        begin("static", model, make(model.parameters()))
    assert_same(model, net())


class Twice(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        closure()
        return super().step(closure)


def test_two_gradients_at_the_same_weights_are_refused_before_the_first_batch() -> None:
    with pytest.raises(ValueError, match="Twice calls its closure several times"):
        begin("static", net(), Twice(net().parameters(), lr=0.1))


@pytest.mark.parametrize("batches_of_epoch", [4, 200])
def test_weights_that_change_without_a_step_are_an_error_soon(batches_of_epoch: int) -> None:
    """By the hundredth backward pass, two of them in each batch, or by the end of the first epoch."""
    model, taken = net(), []
    optimizer = NothingKnown(model.parameters())
    run = begin("static", model, optimizer)

    def epoch() -> None:
        for batch in batches(data(), 0, batches_of_epoch):
            with_other_names(optimizer, lambda batch=batch: loss_of(model, batch).backward())
            taken.append(batch)
        run.epoch_end()

    with pytest.raises(RuntimeError, match=r"0\.weight.*Static has seen no step of NothingKnown.*base_optimizer"):
        epoch()
    assert len(taken) == min(batches_of_epoch, 49)


def test_accumulating_for_long_is_no_error() -> None:
    model = net()
    optimizer = sgd(model.parameters())
    run = begin("rigl", model, optimizer)
    for batch in batches(data(), 0, 250):
        loss_of(model, batch).backward()
    run.epoch_end()
    optimizer.step()
    assert run.step + run.updates == 1


def test_a_state_that_no_checkpoint_holds_is_reported() -> None:
    model = net()
    with pytest.warns(UserWarning, match=r"DataReplaced.state_dict\(\) leaves out the state of the SGD within"):
        begin("static", model, DataReplaced(model.parameters()))


@pytest.mark.parametrize(("form", "before"), [("two_calls", False), ("closure", False), ("closure", True)], ids=str)
def test_fabric_passes_the_calls_on(form: str, before: bool) -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = net()
    wrapped: Any = TwoCalls(model.parameters(), rho=0.5)
    if before:
        run = begin("dpf", model, wrapped)
    forward, wrapped = fabric.setup(model, wrapped)
    if not before:
        run = begin("dpf", forward, wrapped)
    for batch in batches(data(), 0, STEPS):

        def backward(batch: Any = batch) -> None:
            assert_masked(model, run)
            fabric.backward(loss_of(forward, batch))

        backward()
        if form == "closure":
            wrapped.step(backward)
        else:
            wrapped.first_step(zero_grad=True)
            backward()
            wrapped.second_step()
        wrapped.zero_grad()
        assert_masked(model, run)
    assert run.step == STEPS


def test_a_wrapper_that_the_run_does_not_know_is_an_error_before_the_first_step() -> None:
    fabric = Fabric(accelerator="cpu", devices=1)
    model = net()
    wrapped: Any = TwoCalls(model.parameters(), rho=0.5)
    run = begin("dpf", model, wrapped)
    before = copy.deepcopy(model.state_dict())
    forward, wrapped = fabric.setup(model, wrapped)
    batch = next(iter(data()))
    fabric.backward(loss_of(forward, batch))
    wrapped.first_step(zero_grad=True)
    fabric.backward(loss_of(forward, batch))
    with pytest.raises(RuntimeError, match=r"was called past the run.*after fabric.setup\(\), its wrapper"):
        wrapped.second_step()
    assert run.step == 0
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


class HalfWay(Optimizer):
    """Goes half of the way back every fifth step, from weights that it keeps in its state: as Lookahead does."""

    def __init__(self, inner: Optimizer) -> None:
        super().__init__([p for g in inner.param_groups for p in g["params"]], {})
        self.optimizer, self.count = inner, 0
        for p in self.param_groups[0]["params"]:
            self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)
        self.count += 1
        for p in self.param_groups[0]["params"] if self.count % 5 == 0 else ():
            p.copy_(self.state[p]["slow"].lerp_(p, 0.5))


class Failing(HalfWay):
    def step(self, closure: Any = None) -> None:
        self.optimizer.step(closure)
        raise RuntimeError("only on its device")


@pytest.mark.parametrize("make", [HalfWay, Failing])
def test_an_optimizer_that_writes_after_the_inner_step_is_masked_by_its_own_hooks(make: Any) -> None:
    optimizer = make(torch.optim.SGD(net().parameters(), lr=0.1))
    assert stepping(optimizer) is optimizer


@pytest.mark.parametrize("form", FORMS)
def test_a_trial_changes_nothing(form: str) -> None:
    model = net()
    optimizer = FORMS[form][0](model.parameters(), rho=0.5)
    for scheduled in (optimizer, optimizer.base_optimizer):  # a schedule hides step by an attribute of the instance
        torch.optim.lr_scheduler.StepLR(scheduled, 1)
    before, drawn = copy.deepcopy(optimizer.state_dict()), torch.get_rng_state()
    attributes = dict(vars(optimizer))
    assert stepping(optimizer) is optimizer.base_optimizer
    assert_same(model, net())
    assert str(optimizer.state_dict()) == str(before)
    assert vars(optimizer) == attributes
    assert torch.equal(torch.get_rng_state(), drawn)


def test_the_optimizer_is_as_before_when_the_run_is_over() -> None:
    model = net()
    optimizer = TwoCalls(model.parameters())
    before = set(vars(optimizer))
    run = sparsify(Static(0.8, print_plan=False), model, optimizer, STEPS)
    assert "first_step" in vars(optimizer)
    assert "first_step" not in vars(copy.deepcopy(optimizer))
    run.close()
    assert set(vars(optimizer)) == before
    batch = next(iter(data()))
    with_a_closure(optimizer, lambda: loss_of(model, batch).backward())
    assert any(bool(model.get_parameter(n).detach()[~m].any()) for n, m in run.masks.items())
