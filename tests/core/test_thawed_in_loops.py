"""Layers that a hand-written loop begins to train become sparse, at the next step or batch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.thawing import BACKBONE, EPOCH, HEAD, JOINING, SIZES, Transfer, assert_masked, planned, zeros
from torch import Tensor, nn

from sparse_callbacks import DPF, GMP, GaP, RigL, SparseRun, Static, sparsify
from sparse_callbacks.core.awaited import AWAITED, why_never
from sparse_callbacks.core.method import Method
from sparse_callbacks.methods import SMCP, ConstrainedL0
from sparse_callbacks.methods import Static as PlainStatic

STEPS = 16
every_joining_method = pytest.mark.parametrize("name", JOINING)


def frozen() -> tuple[Transfer, torch.optim.Optimizer]:
    """A network whose backbone is frozen, and an optimizer of its head."""
    module = Transfer()
    module.backbone.requires_grad_(False)
    return module, torch.optim.SGD(module.head.parameters(), lr=0.05, momentum=0.9)


def thaw(module: Transfer, optimizer: torch.optim.Optimizer) -> None:
    module.backbone.requires_grad_(True)
    optimizer.add_param_group({"params": list(module.backbone.parameters()), "lr": 0.02})


def begin(name: str, module: nn.Module, optimizer: Any, **more: Any) -> SparseRun:
    data = Transfer().train_dataloader()
    return sparsify(JOINING[name](), module, optimizer, steps=STEPS, epoch=EPOCH, data=data, **more)


def train(run: SparseRun, module: Any, optimizer: torch.optim.Optimizer, first: int, last: int, block: bool) -> None:
    for batch in Transfer().train_dataloader().all(4)[first:last]:
        if block:
            with run.batch():
                module.training_step(batch, 0).backward()
        else:
            module.training_step(batch, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert_masked(module, run)


@pytest.mark.combinations
@every_joining_method
@pytest.mark.parametrize("block", [True, False])
def test_a_loop_ends_as_sparse_as_planned_everywhere(name: str, block: bool) -> None:
    module, optimizer = frozen()
    run = begin(name, module, optimizer)
    train(run, module, optimizer, 0, 5, block)
    assert set(run.masks) == {HEAD}
    assert run.plan()[BACKBONE[0]].reason == AWAITED[0]
    thaw(module, optimizer)
    train(run, module, optimizer, 5, 6, block)
    assert list(run.masks) == [*BACKBONE, HEAD]
    train(run, module, optimizer, 6, STEPS, block)
    run.close()
    if name in ("dpf", "snip"):
        assert sum(zeros(run).values()) == int(0.8 * sum(SIZES.values()))
    else:
        assert zeros(run) == planned(JOINING[name](), module)


@pytest.mark.combinations
@every_joining_method
@pytest.mark.parametrize("stop", [3, 9])
def test_a_loop_resumes_bitwise_from_before_and_after(name: str, stop: int) -> None:
    module, optimizer = frozen()
    run = begin(name, module, optimizer)
    for step in range(STEPS):
        if step == 5:
            thaw(module, optimizer)
        if step == stop:
            saved = copy.deepcopy((module.state_dict(), optimizer.state_dict(), run.state_dict()))
        train(run, module, optimizer, step, step + 1, block=False)
    again, other = frozen()
    if stop > 5:
        thaw(again, other)
    again.load_state_dict(saved[0])
    other.load_state_dict(saved[1])
    resumed = begin(name, again, other, state=saved[2])
    for step in range(stop, STEPS):
        if step == 5:
            thaw(again, other)
        train(resumed, again, other, step, step + 1, block=False)
    for key, value in module.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key
    assert list(run.masks) == list(resumed.masks)
    assert all(torch.equal(m, resumed.masks[n]) for n, m in run.masks.items())
    assert run.state_dict().keys() == resumed.state_dict().keys()
    assert run.state_dict()["aux"].keys() == resumed.state_dict()["aux"].keys()


def test_counts_are_those_of_the_plan_that_the_state_was_saved_with() -> None:
    """Before layers could join, a target was shared out without those that wait."""
    module, optimizer = frozen()
    saved = begin("rigl", module, optimizer).state_dict()
    mask = torch.arange(40).reshape(4, 10) < 8
    assert saved["zeros"] != {HEAD: 32}  # erdos_renyi_kernel leaves more to the smallest of three layers
    state = {**saved, "masks": {HEAD: mask}, "zeros": {HEAD: 32}, "aux": {f"ever_active/{HEAD}": mask}}
    for awaited in (True, False):
        again, other = frozen()
        again.head.weight.detach().mul_(mask)
        given = {k: v for k, v in state.items() if awaited or k != "awaited"}
        if awaited:
            with pytest.raises(ValueError, match=r"its masks have 32 zeros in head\.weight"):
                begin("rigl", again, other, state=given)
            continue
        run = begin("rigl", again, other, state=given)
        thaw(again, other)
        train(run, again, other, 0, 4, block=False)
        assert int(run.masks[HEAD].sum()) == 8
        assert set(run.masks) == {*BACKBONE, HEAD}


def test_a_target_is_shared_out_once_over_all_that_can_become_sparse() -> None:
    """No layer's count changes when another one joins."""
    for distribution in ("uniform", "erdos_renyi", "erdos_renyi_kernel", {"backbone*": 0.9, "*": 0.5}):
        module, optimizer = frozen()
        method = PlainStatic(0.8, distribution=distribution, print_plan=False)
        run = sparsify(method, module, optimizer, steps=STEPS)
        first = zeros(run)
        thaw(module, optimizer)
        train(run, module, optimizer, 0, 2, block=False)
        assert zeros(run)[HEAD] == first[HEAD]
        assert zeros(run) == planned(PlainStatic(0.8, distribution=distribution), module)
        run.close()


def test_a_second_optimizer_that_had_nothing_sparse_joins_at_the_step_of_the_first() -> None:
    module = Transfer()
    module.backbone.requires_grad_(False)
    head, backbone = (torch.optim.SGD(m.parameters(), lr=0.05, momentum=0.9) for m in (module.head, module.backbone))
    run = sparsify(GMP(0.8, every=2, stop=12, print_plan=False), module, [head, backbone], steps=STEPS)

    def steps(first: int, last: int, optimizers: list[Any]) -> None:
        for batch in module.train_dataloader().all(4)[first:last]:
            module.training_step(batch, 0).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()

    steps(0, 7, [head, backbone])
    module.backbone.requires_grad_(True)
    steps(7, 8, [head, backbone])
    sparsity = run.method.sparsity_at(7)  # type: ignore[attr-defined]
    assert 0.3 < sparsity < 0.8
    assert zeros(run)[BACKBONE[0]] >= int(sparsity * SIZES[BACKBONE[0]])
    steps(8, STEPS, [head, backbone])
    run.close()
    assert zeros(run) == {n: int(0.8 * size) for n, size in SIZES.items()}
    state = run.state_dict()  # what it has counted contradicts nothing
    assert state["updates"] >= len(state["done"]) == 2


def test_an_optimizer_of_joined_layers_that_has_not_stepped_yet_is_watched_from_then_on() -> None:
    module = Transfer()
    module.backbone.requires_grad_(False)
    head, backbone = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (module.head, module.backbone))
    run = sparsify(Static(0.8, print_plan=False), module, [head, backbone], steps=STEPS)
    batch = next(iter(module.train_dataloader()))
    module.training_step(batch, 0).backward()
    module.backbone.requires_grad_(True)
    head.step()
    assert set(run.masks) == {*BACKBONE, HEAD}
    run.epoch_end()  # nothing has moved the new layers
    with torch.no_grad():
        module.backbone[1].weight.mul_(2.0)
    with pytest.raises(RuntimeError, match=r"backbone.1.weight changed .* has seen no step of SGD"):
        run.epoch_end()


def test_layers_that_join_in_dpfs_fine_tuning_learn_on_no_more() -> None:
    module, optimizer = frozen()
    method = DPF(0.8, every=2, stop=6, finetune=8, print_plan=False)
    run = sparsify(method, module, optimizer, steps=STEPS)
    train(run, module, optimizer, 0, 10, block=False)
    thaw(module, optimizer)
    train(run, module, optimizer, 10, 12, block=False)
    assert set(run.masks) == {*BACKBONE, HEAD}
    assert method.weights.copied == []
    assert sum(zeros(run).values()) == int(0.8 * SIZES[HEAD]) + int(0.8 * (SIZES[BACKBONE[0]] + SIZES[BACKBONE[1]]))


def test_pruned_weights_of_a_joined_layer_learn_on_from_their_own_values() -> None:
    module, optimizer = frozen()
    method = DPF(0.8, every=2, stop=12, print_plan=False)
    run = sparsify(method, module, optimizer, steps=STEPS)
    train(run, module, optimizer, 0, 8, block=False)
    before = module.backbone[1].weight.detach().clone()
    thaw(module, optimizer)
    for group in optimizer.param_groups[1:]:
        group["lr"] = 0.0
    train(run, module, optimizer, 8, 9, block=False)
    assert not torch.equal(module.backbone[1].weight, before)
    assert torch.equal(method.weights.dense_values(BACKBONE[0]), before)


def test_the_dense_partition_of_gap_joins_dense() -> None:
    module, optimizer = frozen()
    method = GaP(0.8, partitions="1", every=4, restart=True, print_plan=False)  # the first layer, then the others
    run = sparsify(method, module, optimizer, steps=STEPS, on_restart=lambda: None)
    assert [list(block) for block in method.blocks()] == [[BACKBONE[0]], [BACKBONE[1], HEAD]]
    train(run, module, optimizer, 0, 6, block=False)  # the second phase
    thaw(module, optimizer)
    train(run, module, optimizer, 6, 7, block=False)
    assert zeros(run) == {BACKBONE[0]: 640, BACKBONE[1]: 0, HEAD: 0}
    train(run, module, optimizer, 7, STEPS, block=False)
    assert zeros(run) == {n: int(0.8 * size) for n, size in SIZES.items()}
    assert optimizer.param_groups[1]["lr"] == 0.02  # the restart of the phase kept the group that was added


def test_tied_weights_join_once() -> None:
    module = Transfer()
    tied = nn.Linear(50, 16)
    tied.weight = module.backbone[1].weight
    module.tied = tied
    module.backbone.requires_grad_(False)
    optimizer = torch.optim.SGD([*module.head.parameters(), *module.tied.parameters()], lr=0.05)
    run = sparsify(Static(0.8, distribution="uniform", print_plan=False), module, optimizer, steps=STEPS)
    module.backbone[1].weight.requires_grad_(True)
    train(run, module, optimizer, 0, 2, block=False)
    assert set(run.masks) == {BACKBONE[0], HEAD}
    assert zeros(run)[BACKBONE[0]] == 640


def test_a_layer_of_another_run_does_not_join() -> None:
    module = Transfer()
    head, backbone = (torch.optim.SGD(m.parameters(), lr=0.05) for m in (module.head, module.backbone))
    first = sparsify(Static(0.5, print_plan=False), module, head, steps=STEPS)
    second = sparsify(Static(0.5, print_plan=False), module, backbone, steps=STEPS)
    backbone_parameters = list(module.backbone.parameters())
    head.add_param_group({"params": backbone_parameters})
    train(first, module, head, 0, 2, block=False)
    assert set(first.masks) == {HEAD}
    assert set(second.masks) == set(BACKBONE)


def test_an_optimizer_of_adams_kind_starts_a_joined_layer_from_fresh_state() -> None:
    module = Transfer()
    module.backbone.requires_grad_(False)
    optimizer = torch.optim.AdamW(module.head.parameters(), lr=0.01)
    method = RigL(0.8, every=2, stop=14, print_plan=False)
    run = sparsify(method, module, optimizer, steps=STEPS)
    train(run, module, optimizer, 0, 5, block=False)
    thaw(module, optimizer)
    train(run, module, optimizer, 5, STEPS, block=False)
    state = optimizer.state[module.backbone[1].weight]
    assert state["step"] <= STEPS - 5
    assert run.updates >= 5


class Grows(Method):
    """A method from outside that knows nothing of layers that join."""

    def __init__(self) -> None:
        super().__init__(0.5, print_plan=False)


def test_a_method_from_outside_gets_masks_by_magnitude() -> None:
    module, optimizer = frozen()
    before = {n: module.get_parameter(n).detach().abs().clone() for n in BACKBONE}
    run = sparsify(Grows(), module, optimizer, steps=STEPS)
    thaw(module, optimizer)
    train(run, module, optimizer, 0, 1, block=False)
    for name, weights in before.items():
        mask: Tensor = run.masks[name]
        assert int(mask.sum()) == SIZES[name] // 2
        assert weights[mask].min() >= weights[~mask].max()


@pytest.mark.parametrize("make", [ConstrainedL0, SMCP])
def test_methods_without_joining_layers_say_why(make: Callable[[], Any]) -> None:
    assert make.__name__ in why_never(make())  # type: ignore[attr-defined]
    assert why_never(Grows()) == ""
