"""Optimizers and wrapped models in a hand-written loop: several, shared, restarted, failing, moved."""

import warnings
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from support.loops import (
    METHODS,
    STEPS,
    adamw,
    assert_masked,
    assert_same,
    batches,
    begin,
    data,
    loss_of,
    net,
    sgd,
    train,
)
from torch import nn
from torch.nn.utils import clip_grad_norm_

from sparse_callbacks import DPF, SET, GaP, RigL, SparseRun, Static, sparsify

# ---------------------------------------------------------------------- GaP starts its optimizers anew


def test_gap_clears_the_state_puts_values_back_and_renews_the_schedule() -> None:
    model = net()
    optimizer = sgd(model)
    schedule: Any = None
    lives: list[Any] = []

    def renew() -> None:
        nonlocal schedule
        lives.append((run.step, len(optimizer.state), optimizer.param_groups[0]["lr"], run.method.horizon))
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)

    run = sparsify(GaP(0.8, partitions=2, every=6, print_plan=False), model, optimizer, STEPS, on_restart=renew)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for batch in batches(data(), 0, STEPS):
            loss_of(model, batch).backward()
            optimizer.step()
            rates.append(optimizer.param_groups[0]["lr"])
            schedule.step()
            optimizer.zero_grad()
    assert lives == [(6, 0, 0.1, 6), (12, 0, 0.1, 12)]
    assert rates == [
        0.1 * 0.5 ** (step if step < 6 else (step - 6) % 6 if step < 12 else step - 12) for step in range(24)
    ]


def test_gap_restarts_two_optimizers_together_and_once_a_phase() -> None:
    """The first has ended the phase, and the second has its last step of the phase to take with the state it has."""
    model, calls = net(), []
    optimizers = [sgd([*model[:2].parameters()]), sgd([*model[2:].parameters()])]
    method = GaP(0.8, partitions=2, every=6, print_plan=False)
    run = sparsify(
        method, model, optimizers, STEPS, on_restart=lambda: calls.append([len(o.state) for o in optimizers])
    )
    full = []
    for batch in batches(data(), 0, STEPS):
        loss_of(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
        full.append(len(optimizers[1].state))
        for optimizer in optimizers:
            optimizer.zero_grad()
    assert calls == [[0, 0], [0, 0]]
    assert full == [4] * STEPS
    assert run.step == STEPS


# ---------------------------------------------------------------------- two methods


def two(model: nn.Module, optimizers: Any, **options: Any) -> tuple[SparseRun, SparseRun]:
    first, second = optimizers if isinstance(optimizers, list) else (optimizers, optimizers)
    return (
        sparsify(
            RigL(0.8, distribution="uniform", every=4, drop_fraction="constant(0.3)", include="0.*", print_plan=False),
            model,
            first,
            STEPS,
            **options,
        ),
        sparsify(
            RigL(
                0.6, distribution="uniform", every=4, drop_fraction="constant(0.3)", include="[24].*", print_plan=False
            ),
            model,
            second,
            STEPS,
            **options,
        ),
    )


def test_two_methods_on_different_layers_and_optimizers() -> None:
    model = net()
    optimizers = [sgd([*model[:2].parameters()]), sgd([*model[2:].parameters()])]
    runs = two(model, optimizers)
    for batch in batches(data(), 0, STEPS):
        loss_of(model, batch).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for run in runs:
            assert_masked(model, run)
    assert runs[0].masks.keys() == {"0.weight"}
    assert runs[1].masks.keys() == {"2.weight", "4.weight"}
    assert [run.step + run.updates for run in runs] == [STEPS, STEPS]
    assert runs[0].updates == runs[1].updates > 0


def test_two_methods_share_an_optimizer_and_replace_the_same_steps() -> None:
    """Together they are one method with a sparsity for each layer."""
    model, whole = net(), net()
    optimizer, other = adamw(model), adamw(whole)
    runs = two(model, optimizer)
    shares = {"0.*": 0.8, "*": 0.6}
    one = sparsify(
        RigL(0.7, distribution=shares, every=4, drop_fraction="constant(0.3)", print_plan=False), whole, other, STEPS
    )
    train(runs[0], model, optimizer)
    train(one, whole, other)
    assert [run.step for run in runs] == [one.step] * 2
    assert [run.updates for run in runs] == [one.updates] * 2
    assert one.step == STEPS - one.updates < STEPS
    assert_same(model, whole)
    for run in runs:
        assert_masked(model, run)


@pytest.mark.parametrize("given", [(0,), (1,), (0, 1)], ids=str)
def test_runs_that_share_an_optimizer_clip_once_and_what_all_have_masked(given: tuple[int, ...]) -> None:
    model, calls = net(), []
    optimizer = sgd(model)

    def clip(parameters: list[nn.Parameter]) -> None:
        for run in runs:
            for name, mask in run.masks.items():
                assert not model.get_parameter(name).grad[~mask].any(), name
        calls.append(clip_grad_norm_(parameters, 0.05))

    runs = [
        sparsify(
            SET(0.8, every=4, include="0.*", print_plan=False),
            model,
            optimizer,
            STEPS,
            clip=clip if 0 in given else None,
        ),
        sparsify(
            SET(0.6, every=4, include="[24].*", print_plan=False),
            model,
            optimizer,
            STEPS,
            clip=clip if 1 in given else None,
        ),
    ]
    train(runs[0], model, optimizer)
    assert len(calls) == STEPS
    assert [run.step for run in runs] == [STEPS, STEPS]


def test_two_methods_may_not_claim_the_same_layer() -> None:
    model = net()
    optimizer = sgd(model)
    run = sparsify(Static(0.8, include="[02].*", print_plan=False), model, optimizer, STEPS)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    with pytest.raises(
        ValueError, match=r"Static and RigL both claim 2\.weight\. Give each its own layers with include="
    ):
        sparsify(RigL(0.8, include="[24].*", print_plan=False), model, optimizer, STEPS)
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())
    run.close()
    sparsify(RigL(0.8, include="[24].*", print_plan=False), model, optimizer, STEPS)


# ---------------------------------------------------------------------- wrappers


class _FabricModule(nn.Module):
    """Named as Fabric's."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Any) -> Any:
        return self.module(x)


class Net(nn.Module):
    """A user's own, with a child that is called `module`."""

    def __init__(self) -> None:
        super().__init__()
        self.module, self.head = net(), nn.Linear(4, 4)

    def forward(self, x: Any) -> Any:
        return self.head(self.module(x))


@pytest.mark.combinations
@pytest.mark.parametrize(
    "wrap",
    [
        _FabricModule,
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: _FabricModule(torch.compile(model, backend="eager")),
        lambda model: torch.compile(_FabricModule(model), backend="eager"),
    ],
    ids=["fabric", "data parallel", "compiled", "compiled inside", "compiled outside"],
)
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_a_wrapped_model_trains_as_the_plain_one(method: str, before: bool, wrap: Any) -> None:
    plain, model = net(), net()
    wrapped = wrap(model)
    optimizer, other = sgd(plain), sgd(model)
    run = begin(method, plain, optimizer)
    same = begin(method, model if before else wrapped, other)
    assert same.masks.keys() == run.masks.keys()
    train(run, plain, optimizer)
    for batch in batches(data(), 0, STEPS):
        with same.batch():
            loss_of(wrapped, batch).backward()
        other.step()
        other.zero_grad()
    assert_same(plain, model)


def test_a_child_that_is_called_module_is_no_reason_to_unwrap() -> None:
    model = Net()
    run = begin("static", model, sgd(model))
    assert run.masks.keys() == {"module.0.weight", "module.2.weight", "module.4.weight", "head.weight"}


def test_shards_are_refused() -> None:
    class FullyShardedDataParallel(_FabricModule):
        pass

    model = net()
    with pytest.raises(
        ValueError, match="FullyShardedDataParallel shards parameters, and masks are made for whole ones"
    ):
        begin("static", FullyShardedDataParallel(model), sgd(model))


def test_a_wrapped_optimizer_is_stepped_through_its_wrapper() -> None:
    model = net()
    optimizer = sgd(model)
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))  # two wrappers
    with pytest.raises(TypeError, match=r"SimpleNamespace is not a torch optimizer\. Give the optimizer, or a list"):
        begin("static", model, SimpleNamespace(optimizer="sgd"))
    with pytest.raises(TypeError, match="SimpleNamespace is not a torch optimizer"):
        begin("static", model, wrapped)  # an optimizer is found only through wrappers of optimizers
    run = begin("set", model, [SimpleNamespace(optimizer=optimizer)], clip=lambda p: clip_grad_norm_(p, 0.1))
    train(run, model, optimizer, last=2)
    loss_of(model, next(batches(data(), 0, 1))).backward()
    run.before_clipping(SimpleNamespace(optimizer=optimizer))
    optimizer.step()
    assert run.step == 3


# ---------------------------------------------------------------------- what goes wrong, and what moves


class Failing(torch.optim.SGD):
    """Its step fails where it is told to, before or after the parameters have moved."""

    fails = ""

    def step(self, closure: Any = None) -> Any:
        if self.fails == "before":
            raise MemoryError
        loss = super().step(closure)
        if self.fails == "after":
            raise MemoryError
        return loss


@pytest.mark.combinations
@pytest.mark.parametrize("clip", [None, lambda parameters: clip_grad_norm_(parameters, 0.1)])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", METHODS)
def test_training_goes_on_after_a_step_that_failed(method: str, when: str, clip: Any) -> None:
    model = net()
    optimizer = Failing(model.parameters(), lr=0.1, momentum=0.9)
    run = begin(method, model, optimizer, clip=clip)
    failed = (4, 5, 9)
    for number, batch in enumerate(batches(data(), 0, STEPS)):
        optimizer.fails = when if number in failed else ""
        with run.batch() if method == "l0" else nullcontext():
            loss_of(model, batch).backward()
        assert_masked(model, run)
        if number in failed:
            with pytest.raises(MemoryError):
                optimizer.step()
        else:
            optimizer.step()
            assert_masked(model, run)
        optimizer.zero_grad()
    replaced = run.updates if method == "rigl" else 0
    assert STEPS - 3 <= run.step + replaced <= STEPS
    dense = run.method.weights
    for name in dense.copied:
        found = dense.dense_values(name)
        assert found.data_ptr() != model.get_parameter(name).data_ptr()
        assert bool(found.isfinite().all())
    run.close()
    assert_masked(model, run)


def test_a_failed_step_can_be_tried_again() -> None:
    found = []
    for tries in (1, 2):
        model = net()
        optimizer = Failing(model.parameters(), lr=0.1, momentum=0.9)
        run = begin(DPF(0.8, every=4, print_plan=False), model, optimizer)
        for batch in batches(data(), 0, STEPS):
            loss_of(model, batch).backward()
            if tries > 1:
                optimizer.fails = "before"
                with pytest.raises(MemoryError):
                    optimizer.step()
                optimizer.fails = ""
            optimizer.step()
            optimizer.zero_grad()
        assert run.step == STEPS
        found.append(model)
    assert_same(*found)


@pytest.mark.combinations
@pytest.mark.parametrize("clip", [None, lambda parameters: clip_grad_norm_(parameters, 0.1)])
@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_is_converted_after_the_call_trains_as_one_converted_before(method: str, clip: Any) -> None:
    """`fabric.setup` moves the model, or converts it (precision="64-true")."""
    found, counts = [], []
    loader = [(x.double(), y) for x, y in data()]
    for late in (True, False):
        model = net() if late else net().double()
        optimizer = sgd(model)
        run = begin(
            method,
            model,
            optimizer,
            clip=clip,
            data=loader,
            forward=lambda module, batch: module(batch[0].to(module[0].weight.dtype)),
        )
        if late:
            model.double()
        train(run, model, optimizer, loader=loader)  # type: ignore[arg-type]
        found.append(model)
        counts.append((run.step, run.updates, run.method.weights.copied))
        for name in run.masks:
            assert run.method.weights.dense_values(name).dtype == torch.float64
    assert counts[0] == counts[1]
    if method not in ("l0", "smcp", "dpf", "nm", "nm soft"):  # these had float32 values to begin with
        assert_same(*found)
    for one, other in zip(found[0].parameters(), found[1].parameters(), strict=True):
        assert torch.allclose(one, other, atol=1e-5)


def test_a_model_that_moves_keeps_masks_of_a_method_with_fresh_start(capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    optimizer = sgd(model)
    run = begin(SET(0.8, every=4, fresh_start=True), model, optimizer)
    train(run, model, optimizer, last=10)
    masks, updates = run.masks, run.updates
    printed = capsys.readouterr().out
    model.double()
    loader = [(x.double(), y) for x, y in data()]
    train(run, model, optimizer, first=10, last=11, loader=loader)  # type: ignore[arg-type]
    assert printed
    assert not capsys.readouterr().out  # the plan is not printed again
    assert (run.step, run.updates) == (11, updates)
    assert all(torch.equal(run.masks[n], m) for n, m in masks.items())
    assert all(p.dtype == torch.float64 for p in model.parameters())
