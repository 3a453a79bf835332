"""Schedule-free optimizers in a hand-written loop, and optimizers with other modes, which are refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.loops import METHODS, STEPS, assert_masked, assert_same, batches, begin, data, loss_of, net
from support.schedule_free import EVERY, STAND_IN, schedule_free
from torch import Tensor, nn
from torch.func import functional_call
from torch.optim import Optimizer

from sparse_callbacks import DPF, GMP, GaP, RigL, SparseRun, Static, sparsify
from sparse_callbacks.core.optimizer_modes import is_schedule_free

pytestmark = pytest.mark.filterwarnings("ignore:GaP ended:UserWarning", "ignore:.*ended at:UserWarning")


def train(
    run: SparseRun, model: nn.Module, optimizer: Any, first: int = 0, last: int = STEPS, look_every: int = 3
) -> None:
    """Train from one step to another, and evaluate in between."""
    for number, batch in enumerate(batches(data(), first, last), first):
        with run.batch():
            loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % look_every == look_every - 1:
            optimizer.eval()
            assert_masked(model, run)
            optimizer.train()
            assert_masked(model, run)


def masked_points(optimizer: Optimizer, model: nn.Module, run: SparseRun) -> None:
    """What the optimizer keeps of pruned weights is zero."""
    for name, mask in run.masks.items():
        state = optimizer.state[model.get_parameter(name)]
        assert state
        for point in "xyz":
            assert not state.get(point, torch.zeros_like(mask))[~mask].any(), (name, point)


@pytest.mark.combinations
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", EVERY)
def test_pruned_weights_are_zero_in_both_modes_in_and_after_the_run(name: str, method: str) -> None:
    model = net()
    optimizer = schedule_free(name)(model.parameters())
    optimizer.train()
    run = begin(method, model, optimizer)
    train(run, model, optimizer)
    if not run.method.weights.copied:
        masked_points(optimizer, model, run)
    run.close()
    for _ in range(2):
        optimizer.eval()
        assert_masked(model, run)
        optimizer.train()
        assert_masked(model, run)


@pytest.mark.parametrize("name", EVERY)
def test_static_is_the_dense_optimizer_on_a_masked_forward_pass(name: str) -> None:
    model = net()
    optimizer = schedule_free(name)(model.parameters())
    optimizer.train()
    run = begin(Static(0.8, print_plan=False), model, optimizer)
    oracle = copy.deepcopy(model)  # masked already: its optimizer is another one
    its_own = schedule_free(name)(oracle.parameters())
    its_own.train()
    for batch in batches(data(), 0, STEPS):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        masked = {n: p * run.masks[n] if n in run.masks else p for n, p in oracle.named_parameters()}
        nn.functional.cross_entropy(functional_call(oracle, masked, batch[0]), batch[1]).backward()
        its_own.step()
        its_own.zero_grad()
    assert_same(model, oracle)
    optimizer.eval()
    its_own.eval()
    assert_same(model, oracle)


def dense_gradients(model: nn.Module, values: dict[str, Tensor], batch: Any) -> dict[str, Tensor]:
    """Gradients by the weights that the forward pass sees, straight through the mask."""
    leaves = {n: v.detach().clone().requires_grad_() for n, v in values.items()}
    loss = nn.functional.cross_entropy(functional_call(model, leaves, batch[0]), batch[1])
    return dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))


@pytest.mark.parametrize("name", EVERY)
def test_dpf_holds_the_mask_times_the_dense_point_of_either_mode(name: str) -> None:
    """The oracle is the optimizer on dense weights, whose gradients are taken at the masked ones."""
    model = net()
    oracle = copy.deepcopy(model)
    optimizer, its_own = schedule_free(name)(model.parameters()), schedule_free(name)(oracle.parameters())
    run = begin(DPF("constant(0.8)", every=4, print_plan=False), model, optimizer)
    for number, batch in enumerate(batches(data(), 0, STEPS)):
        optimizer.train()
        its_own.train()
        masks = run.masks
        seen = {n: p * masks[n] if n in masks else p for n, p in oracle.named_parameters()}
        for n, gradient in dense_gradients(oracle, seen, batch).items():
            oracle.get_parameter(n).grad = gradient
        its_own.step()
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if number % 3 == 2:
            optimizer.eval()
            its_own.eval()
        dense = run.state_dict()["dense"]
        for n, p in oracle.named_parameters():
            expected = p.detach() * run.masks[n] if n in masks else p.detach()
            torch.testing.assert_close(model.get_parameter(n).detach(), expected, rtol=0, atol=1e-6)
            if n in masks:
                torch.testing.assert_close(dense[n], p.detach(), rtol=0, atol=1e-6)
    assert any(bool(dense[n][~m].any()) for n, m in run.masks.items())


def saved(run: SparseRun, model: nn.Module, optimizer: Optimizer) -> Any:
    return copy.deepcopy((run.state_dict(), model.state_dict(), optimizer.state_dict()))


@pytest.mark.combinations
@pytest.mark.parametrize("closed", [False, True], ids=["in_the_run", "after_it"])
@pytest.mark.parametrize("method", ["rigl", "gmp", "dpf", "smcp", "channels", "l0"])
def test_a_run_saved_in_eval_mode_resumes_exactly(method: str, closed: bool) -> None:
    make = schedule_free("stand-in/SGDScheduleFree")
    model = net()
    optimizer = make(model.parameters())
    optimizer.train()
    run = begin(method, model, optimizer)
    train(run, model, optimizer, 0, 10, look_every=100)
    if closed:
        twin = copy.deepcopy(model)
        other = make(twin.parameters())
        other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        unbroken = begin(method, twin, other, state=copy.deepcopy(run.state_dict()))
        run.close()
    else:
        unbroken, twin, other = run, model, optimizer
    optimizer.eval()
    state, weights, moments = saved(run, model, optimizer)
    if closed:
        other.eval()
    other.train()
    train(unbroken, twin, other, 10, STEPS)
    again = net(1)
    resumed = make(again.parameters())
    again.load_state_dict(weights)
    resumed.load_state_dict(moments)
    later = begin(method, again, resumed, state=state)
    assert_masked(again, later)
    resumed.train()
    train(later, again, resumed, 10, STEPS)
    assert_same(again, twin)
    assert all(torch.equal(m, later.masks[n]) for n, m in unbroken.masks.items())


def test_gap_restarts_the_optimizer_in_the_mode_that_it_had() -> None:
    model = net()
    optimizer: Any = schedule_free("stand-in/SGDScheduleFree")(model.parameters())
    modes = []
    method = GaP(0.8, partitions=2, every=6, print_plan=False)
    run = begin(method, model, optimizer, on_restart=lambda: modes.append(optimizer.param_groups[0]["train_mode"]))
    optimizer.train()  # after the run has noted what the groups were
    train(run, model, optimizer)
    assert modes == [True, True]


def test_a_replaced_step_is_not_in_the_mean() -> None:
    model = net()
    optimizer = schedule_free("stand-in/SGDScheduleFree")(model.parameters())
    optimizer.train()
    run = begin(RigL(0.8, every=4, drop_fraction="constant(0.3)", print_plan=False), model, optimizer)
    train(run, model, optimizer)
    assert run.updates > 0
    assert optimizer.param_groups[0]["k"] == run.step == STEPS - run.updates


def test_what_an_optimizer_kept_before_the_run_is_masked() -> None:
    model = net()
    optimizer = schedule_free("stand-in/SGDScheduleFree")(model.parameters())
    optimizer.train()
    for batch in batches(data(), 0, 3):
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    run = begin("static", model, optimizer)
    masked_points(optimizer, model, run)
    optimizer.eval()
    assert_masked(model, run)


# ---------------------------------------------------------------------- which optimizers, and what stays of a run


def test_the_optimizer_is_as_before_when_the_run_is_over_and_can_be_copied_in_it() -> None:
    model = net()
    optimizer = schedule_free("stand-in/SGDScheduleFree")(model.parameters())
    before = dict(vars(optimizer))
    run = begin("static", model, optimizer)
    assert "train" in vars(optimizer)
    assert "train" not in vars(copy.deepcopy(optimizer))
    assert optimizer.__getstate__().keys() == {"defaults", "state", "param_groups"}
    run.close()
    assert vars(optimizer).keys() == before.keys()


def test_dense_values_are_left_alone_once_somebody_else_writes_to_the_network() -> None:
    model = net()
    optimizer = schedule_free("stand-in/SGDScheduleFree")(model.parameters())
    optimizer.train()
    run = begin("dpf", model, optimizer)
    train(run, model, optimizer)
    run.close()
    model.load_state_dict(net(1).state_dict())
    expected = net(1)
    twin = schedule_free("stand-in/SGDScheduleFree")(expected.parameters())
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.eval()
    twin.eval()
    assert_same(model, expected)


class Initialised(STAND_IN.SGDScheduleFree):
    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.05)


class Evaluates(STAND_IN.SGDScheduleFree):
    def eval(self) -> None:
        super().eval()


class Modes(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


class NotOfTorch:
    def __init__(self, base: Optimizer) -> None:
        self.base, self.param_groups = base, base.param_groups

    train = eval = lambda self: None


def test_a_subclass_that_changes_neither_steps_nor_switches_is_supported() -> None:
    assert is_schedule_free(Initialised(net().parameters()))


@pytest.mark.parametrize(
    "make",
    [lambda p: Evaluates(p, lr=0.1), lambda p: Modes(p, lr=0.1), lambda p: NotOfTorch(torch.optim.SGD(p, lr=0.1))],
    ids=["overridden", "others", "not_of_torch"],
)
def test_other_modes_are_refused_and_nothing_is_changed(make: Callable[[Any], Any]) -> None:
    model = net()
    with pytest.raises(ValueError, match=r"has train\(\) and eval\(\), which write to the weights.*Use one of"):
        sparsify(GMP(0.8, print_plan=False), model, make(model.parameters()), STEPS)
    assert_same(model, net())


class Around(Optimizer):
    """Steps another optimizer, and then goes half of the way back: as Lookahead does."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__([p for g in optimizer.param_groups for p in g["params"]], {})
        self.optimizer = optimizer
        self.slow = {p: p.detach().clone() for g in self.param_groups for p in g["params"]}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        self.optimizer.step()
        for p, slow in self.slow.items():
            p.copy_(slow.lerp_(p, 0.5))


@pytest.mark.parametrize("method", ["static", "gmp", "dpf"])
def test_an_optimizer_that_writes_after_the_one_it_holds_is_masked_after_it(method: str) -> None:
    model = net()
    optimizer = Around(torch.optim.SGD(model.parameters(), lr=0.1))
    run = begin(method, model, optimizer)
    for batch in batches(data(), 0, STEPS):
        loss_of(model, batch).backward()
        optimizer.step()
        model.zero_grad()
        assert_masked(model, run)
