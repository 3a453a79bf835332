"""Gradients of exchanged layers that do not come from their calls alone: RigL grows what it grows under masked storage."""

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.exchanged_loops import HEAD, MOVING, batches, both, exchange, first_masks, loss_of, net
from torch import Tensor, nn

from sparse_callbacks import RigL, SparseRun, sparsify

FAN_IN = {"pattern": "fan_in/4"}
PENALTIES: dict[str, Callable[[Tensor], Tensor]] = {
    "L1": Tensor.abs,
    "L2": Tensor.square,
    "log": lambda p: p.abs().log1p(),
}


def masks_of(group: int) -> dict[str, Tensor]:
    """First masks in which so many rows read the same inputs."""
    found = {}
    for name, mask in first_masks(net()).items():
        order = torch.rand(len(mask) // group, mask.shape[1], generator=torch.Generator().manual_seed(3)).argsort(1)
        found[name] = (order < mask.shape[1] // 5).repeat_interleave(group, 0)
    return found


def arguments(kind: str) -> dict[str, Any]:
    """Arguments of `both` for a storage, or for growth among candidates."""
    grouped = {"masks": masks_of(4), "grouped": {"storage": "grouped", "group": 4}, **FAN_IN}
    return {"sparse": {}, "grouped": grouped, "candidates": {"candidates": 2.0}, "both": grouped | {"candidates": 2.0}}[
        kind
    ]


def looped(loss: Callable[[nn.Module, tuple[Tensor, Tensor]], Tensor], steps: int = 8) -> Any:
    """A loop that takes steps along the gradient of a loss, two backward passes each."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        data = batches()
        for _ in range(steps):
            for _ in range(2):
                loss(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad()

    return loop


@pytest.mark.combinations
@pytest.mark.parametrize("kind", ["sparse", "grouped", "candidates", "both"])
@pytest.mark.parametrize("penalty", PENALTIES)
def test_a_penalty_on_parameters_counts_among_what_was_just_dropped(penalty: str, kind: str) -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        return loss_of(model, batch) + 2e-3 * sum(PENALTIES[penalty](p).sum() for p in model.parameters())

    both(looped(loss), **arguments(kind))


def test_a_penalty_on_parameters_in_a_pass_of_its_own_counts_too() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        data = batches()
        for _ in range(8):
            (2e-3 * sum(p.abs().sum() for p in model.parameters())).backward()
            loss_of(model, next(data)).backward()
            optimizer.step()
            optimizer.zero_grad()

    both(loop)


class Functional(nn.Module):
    """Uses the weights of its layers by functions of torch."""

    def __init__(self) -> None:
        super().__init__()
        self.net = net()

    def forward(self, x: Tensor) -> Tensor:
        first, act, second, _, head = self.net
        x = act(nn.functional.linear(x, first.weight, first.bias))
        return head(act(x @ second.weight.t() + second(x)))  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["sparse", "grouped", "candidates", "both"])
def test_a_dense_weight_that_the_pass_reads_has_its_gradient_recorded(kind: str) -> None:
    given = arguments(kind)
    masks = {f"net.{n}": m for n, m in (given.pop("masks", None) or first_masks(net())).items()}
    both(looped(loss_of), Functional, masks, exclude=f"net.{HEAD}", **given)


def test_a_penalty_on_the_dense_weight_reaches_pruned_weights() -> None:
    def loss(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
        weight = model[2].weight  # type: ignore[index]
        apart = (weight @ weight.t() - torch.eye(32, dtype=torch.float64)).square().sum()
        return loss_of(model, batch) + 0.05 * apart

    both(looped(loss))


@pytest.mark.parametrize("thawed_by", ["forward", "backward"])
def test_a_layer_that_is_thawed_within_the_window_is_recorded(thawed_by: str) -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        data, layer = batches(), model[2]  # type: ignore[index]
        for number in range(12):
            layer.requires_grad_(True)
            if thawed_by == "forward":
                layer.requires_grad_(number % 4 < 2)
            loss_of(model, next(data)).backward()
            layer.requires_grad_(False)
            optimizer.step()
            optimizer.zero_grad()

    both(loop)


def test_gradients_of_weights_that_nobody_steps_with_do_not_count() -> None:
    """As those that are measured for a statistic."""

    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        data = batches()
        for _ in range(6):
            loss_of(model, next(data)).backward()
            torch.autograd.grad(100 * loss_of(model, next(data)), list(model.parameters()))
            optimizer.step()
            optimizer.zero_grad()

    both(loop)


def test_a_gradient_that_the_loop_sets_itself_has_the_records_of_its_pass() -> None:
    def loop(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> None:
        data, parameters = batches(), list(model.parameters())
        for _ in range(6):
            penalty = 2e-3 * sum(p.abs().sum() for p in parameters)
            found = torch.autograd.grad(loss_of(model, next(data)) + penalty, parameters)
            torch.autograd.grad(100 * loss_of(model, next(data)), parameters)
            for parameter, gradient in zip(parameters, found, strict=True):
                parameter.grad = gradient
            optimizer.step()
            optimizer.zero_grad()

    both(loop)


def test_a_gradient_of_no_known_pass_moves_nothing_and_is_named() -> None:
    model: Any = exchange(net(), first_masks(net()))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sparsify(RigL(0.8, **MOVING), model, optimizer, steps=100)
    before = {name: mask.clone() for name, mask in run.masks.items()}
    others = [p for p in model.parameters() if p is not model[0].values]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for number, batch in zip(range(7), batches(), strict=False):
            loss_of(model, batch).backward(inputs=others)
            # zeros are those of a layer that the pass has not used
            model[0].values.grad = torch.full_like(model[0].values, 0.0 if number > 3 else 0.01)
            optimizer.step()
            optimizer.zero_grad()
    assert run.updates == 3
    assert torch.equal(run.masks["0.weight"], before["0.weight"])
    assert not torch.equal(run.masks["2.weight"], before["2.weight"])
    said = [str(w.message) for w in caught if "has left the places of" in str(w.message)]
    assert len(said) == 2
    assert all("of 0.weight as they are" in text for text in said)


def penalised(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return loss_of(model, batch) + 5e-3 * sum(p.abs().sum() for p in model.parameters())


def test_a_window_that_goes_on_elsewhere_keeps_the_gradient_of_its_penalty() -> None:
    def begin(model: nn.Module, state: Any = None) -> tuple[torch.optim.Optimizer, SparseRun]:
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        run = sparsify(RigL(0.8, storage="sparse", **MOVING), model, optimizer, steps=100, state=state)
        return optimizer, run

    def rest(model: nn.Module, optimizer: torch.optim.Optimizer, run: SparseRun) -> dict[str, Tensor]:
        loss_of(model, next(batches(1))).backward()
        updates = run.updates
        optimizer.step()
        assert run.updates == updates + 1
        return {name: mask.clone() for name, mask in run.masks.items()}

    model = net()
    optimizer, run = begin(model)
    penalised(model, next(batches())).backward()
    state, weights = copy.deepcopy(run.state_dict()), copy.deepcopy(model.state_dict())
    gradients = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
    expected = rest(model, optimizer, run)
    run.close()

    assert [len(tensors) for tensors in state["records"]["2.weight"]] == [3]
    other = net(seed=1)
    other.load_state_dict(weights)
    optimizer, run = begin(other, copy.deepcopy(state))
    for parameter, gradient in zip(other.parameters(), gradients, strict=True):
        parameter.grad = gradient
    found = rest(other, optimizer, run)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    run.close()

    state["records"]["2.weight"][0][2] = torch.zeros(1, 7)
    with pytest.raises(ValueError, match=r"records of 2\.weight are not of a layer"):
        begin(net(), state)
