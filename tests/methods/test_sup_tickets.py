"""Sup-tickets: cycles, their rates, and networks that are merged."""

import copy
import math
import pickle
import warnings
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.loops import data
from torch import Tensor, nn

from sparse_callbacks import (
    CTRE,
    GMP,
    SET,
    SNFS,
    DropAndGrow,
    PruneAtStart,
    RigL,
    Static,
    SupTickets,
    methods,
    sparsify,
)
from sparse_callbacks.core.passing_rates import why_no_rate
from sparse_callbacks.methods.sup_tickets import phase
from sparse_callbacks.methods.sup_tickets.around import refuse_optimizers
from sparse_callbacks.methods.sup_tickets.cycles import lay_out, merge, rates_of_groups, triangle, within_budget
from sparse_callbacks.methods.sup_tickets.tickets import merged_masks, take_ticket
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, conv_net
from sparse_callbacks.testing.runs import Stops, fit, trainer_for

STEPS = 24
BOUNDS = [12, 18, 24]
BASES: dict[str, type[DropAndGrow]] = {"rigl": RigL, "set": SET, "snfs": SNFS}


def tickets(base: type[DropAndGrow] = RigL, **options: Any) -> Any:
    given = {"share": 0.5, "cycles": 2, "low_lr": 0.01, "high_lr": 0.05, **options}
    return SupTickets(base(0.8, every=4, print_plan=False), **given)


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 4))


def rates_by_movement(
    method: Any, optimizer: torch.optim.SGD, module: nn.Module, step: Any = lambda: None
) -> list[Any]:
    """The rates of steps without momentum, by how far a weight of each group has moved; None where none has."""
    module.double()
    biases, used = [group["params"][-1] for group in optimizer.param_groups], list[Any]()
    with sparsify(
        method, module, optimizer, STEPS, data=data(), forward=lambda module, batch: module(batch[0].double())
    ):
        for x, y in list(data()) * 2:
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x.double()), y).backward()
            before = [(b.detach().clone(), b.grad) for b in biases]
            optimizer.step()
            ways = [(p - b.detach()).norm() / g.norm() for b, (p, g) in zip(biases, before, strict=True)]
            used.append([float(way) for way in ways])
            step()
    return used


def loop(
    method: Any,
    steps: int = STEPS,
    *,
    state: Mapping[str, Any] | None = None,
    save: Callable[[int, dict[str, Any]], object] = lambda *_: None,
    until: int | None = None,
    seen: Callable[[int, nn.Module], object] = lambda *_: None,
) -> tuple[nn.Module, torch.optim.SGD]:
    """Trains for two epochs of twelve steps; ``save`` gets all that a resume needs, after each step."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    begin = 0
    if state is not None:
        torch.manual_seed(99)
        module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        begin = state["step"]
    batches = list(data()) * 2
    with sparsify(method, module, optimizer, steps, data=data(), state=state and state["run"]) as run:
        for number in range(begin, steps if until is None else until):
            x, y = batches[number]
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            schedule.step()
            seen(number + 1, module)
            parts = {"model": module, "optimizer": optimizer, "schedule": schedule, "run": run}
            save(number + 1, copy.deepcopy({k: v.state_dict() for k, v in parts.items()} | {"step": number + 1}))
    return module, optimizer


# ---------------------------------------------------------------------- tables


TICKETS = [
    [1.0, 0.0, 0.4, -2.0, 0.0, 0.3],
    [0.8, 0.7, 0.0, -1.0, 0.0, 0.0],
    [1.2, 0.0, 0.5, -1.5, 0.4, 0.0],
]


def test_the_cumulative_average_is_pruned_after_each_merge() -> None:
    first, second, third = torch.tensor(TICKETS, dtype=torch.float64)
    average = merge(first, second, 1 / 2)
    assert average.tolist() == pytest.approx([0.9, 0.35, 0.2, -1.5, 0.0, 0.15])
    pruned = average * within_budget([average], 3)[0]
    assert pruned.tolist() == pytest.approx([0.9, 0.35, 0.0, -1.5, 0.0, 0.0])
    average = merge(pruned, third, 1 / 3)
    assert average.tolist() == pytest.approx([1.0, 0.2333333333, 0.1666666667, -1.5, 0.1333333333, 0.0])
    assert (average * within_budget([average], 3)[0]).tolist() == pytest.approx([1, 0.2333333333, 0, -1.5, 0, 0])
    # which is not the mean of all, pruned once
    mean = torch.tensor(TICKETS, dtype=torch.float64).mean(0)
    assert (mean * within_budget([mean], 3)[0]).tolist() == pytest.approx([1.0, 0.0, 0.3, -1.5, 0.0, 0.0])


@pytest.mark.parametrize(
    ("way", "rate"), [(0.0, 0.001), (0.25, 0.003), (0.5, 0.005), (0.75, 0.003), (1.0, 0.001)], ids=str
)
def test_the_rate_of_a_cycle_is_a_triangle(way: float, rate: float) -> None:
    assert triangle(way, 0.001, 0.005) == pytest.approx(rate, rel=1e-12)


@pytest.mark.parametrize(
    ("given", "rates"),
    [
        (([0.1, 0.05], 0.5, 0.001, 0.004, 0.1), [0.004, 0.002]),
        (([0.2, 0.1], 0.0, None, None, 0.4), [0.004, 0.002]),
        (([0.2, 0.1], 0.5, None, None, 0.4), [0.02, 0.01]),
        (([0.2], 0.0, None, 0.001, 0.4), [0.001]),  # the low rate is never the higher one
        (([0.2], 0.5, 0.01, None, 0.4), [0.05]),
        (([0.0, 0.0], 0.5, 0.01, 0.02, 0.4), [0.02, 0.02]),
    ],
    ids=str,
)
def test_groups_keep_their_ratio(given: Any, rates: list[float]) -> None:
    assert rates_of_groups(*given) == pytest.approx(rates)


@pytest.mark.parametrize(
    ("run", "bounds"),
    [((100, 0.1, 3), [90, 93, 96, 100]), ((24, 0.5, 2), BOUNDS), ((16, 0.5, 1), [8, 16]), ((10, 0.3, 1), [7, 10])],
    ids=str,
)
def test_cycles_share_the_last_part_of_the_run(run: Any, bounds: list[int]) -> None:
    assert lay_out(*run) == bounds


@pytest.mark.parametrize(
    ("run", "words"),
    [
        ((20, 0.1, 3), r"share=0.1 of a run of 20 optimizer steps is 2, and cycles=3 need at least 3 steps each \(9\)"),
        ((3, 0.99, 1), "of a run of 3 optimizer steps is 3, and cycles=1 need"),
        ((math.inf, 0.1, 3), "share=0.1 is a share of the run, and this run has no known length"),
    ],
    ids=str,
)
def test_cycles_without_room_are_refused(run: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        lay_out(*run)


# ---------------------------------------------------------------------- the whole procedure, by hand


def moved(mask: Tensor, weight: Tensor, gradient: Tensor, fraction: float) -> Tensor:
    """RigL's rule in plain torch."""
    active = int(mask.sum())
    count = int(fraction * active)
    kept = torch.zeros(mask.numel(), dtype=torch.bool)
    kept[weight.abs().flatten().masked_fill(~mask.flatten(), -1).topk(active - count).indices] = True
    kept[gradient.abs().flatten().masked_fill(kept, -1).topk(count).indices] = True
    return kept.view_as(mask)


def by_hand(masks: dict[str, Tensor], average: str) -> nn.Module:
    """Training, cycles and merges of :func:`tickets` and :func:`loop`, without this package."""
    module = net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    params, batches = dict(module.named_parameters()), list(data()) * 2
    budget = sum(int(m.sum()) for m in masks.values())
    with torch.no_grad():
        for name, mask in masks.items():
            params[name].mul_(mask)
    taken, count, merged = 0, 0, dict[str, Tensor]()
    last_update = None
    for position, (x, y) in enumerate(batches):
        optimizer.zero_grad()
        nn.functional.cross_entropy(module(x), y).backward()
        fraction = None
        if position < BOUNDS[0]:  # stop=0.75 of twelve steps; an update replaces its step and comes once at a number
            if taken % 4 == 0 and taken <= 9 and last_update != taken:
                fraction, last_update = 0.3 / 2 * (1 + math.cos(math.pi * taken / 9)), taken
                if not any(int(fraction * int(m.sum())) for m in masks.values()):
                    fraction = None  # an update that would move nothing is a step
        elif position in BOUNDS:
            fraction = 0.5
        if fraction is not None:
            for name, mask in masks.items():
                new = moved(mask, params[name].detach(), params[name].grad, fraction)
                state = optimizer.state[params[name]]
                if "momentum_buffer" in state:
                    state["momentum_buffer"][new & ~mask] = 0
                with torch.no_grad():
                    params[name].mul_(new)
                masks[name] = new
        else:
            cycle = sum(b <= position for b in BOUNDS) - 1
            own = optimizer.param_groups[0]["lr"]
            if cycle >= 0:
                up = 1 - abs(2 * (position - BOUNDS[cycle]) / 5 - 1)
                optimizer.param_groups[0]["lr"] = (1 - up) * 0.01 + up * 0.05
            optimizer.step()
            optimizer.param_groups[0]["lr"] = own
            taken += 1
            with torch.no_grad():
                for name, mask in masks.items():
                    params[name].mul_(mask)
        schedule.step()
        if position + 1 in BOUNDS:
            factor = 1.0 if not count else 0.5 if average == "moving" else 1 / (count + 1)
            ticket = {n: p.detach().clone() for n, p in params.items()}
            merged = {n: (1 - factor) * merged[n] + factor * t if count else t for n, t in ticket.items()}
            if count:
                sizes = [merged[n].abs().flatten() for n in masks]
                kept = torch.zeros(sum(map(len, sizes)), dtype=torch.bool)
                kept[torch.cat(sizes).topk(budget).indices] = True
                for name, part in zip(masks, kept.split(list(map(len, sizes))), strict=True):
                    merged[name] = merged[name] * part.view_as(merged[name])
            count += 1
    with torch.no_grad():
        for name, value in merged.items():
            params[name].copy_(value)
        module[1].reset_running_stats()
        module[1].momentum = None
        for x, _ in data():
            module(x)
    return module


@pytest.mark.parametrize("average", ["cumulative", "moving"])
def test_a_run_equals_one_by_hand_bit_by_bit(average: str) -> None:
    method = tickets(average=average)
    alone, module = RigL(0.8, every=4, print_plan=False), net()
    with sparsify(alone, module, torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9), 24):
        first = {n: m.clone() for n, m in alone.masks.items()}
    trained, _ = loop(method)
    expected = by_hand(first, average)
    for (name, one), other in zip(trained.state_dict().items(), expected.state_dict().values(), strict=True):
        assert torch.equal(one + 0, other + 0), name  # +0: a zero that was masked may be negative
    assert method.is_merged
    assert method.tickets == 3
    assert trained[1].momentum == 0.1


@pytest.mark.parametrize("name", BASES)
def test_the_first_part_is_the_run_of_the_base(name: str) -> None:
    """Its times count within the part: 12 of 24 steps, of which stop=0.75 is step 9."""
    method, found = tickets(BASES[name]), {}
    loop(method, seen=lambda number, module: found.update({number: copy.deepcopy(module.state_dict())}))
    alone, module = BASES[name](0.8, every=4, print_plan=False), net()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    with sparsify(alone, module, optimizer, 12):
        for number, (x, y) in enumerate(data(), 1):
            optimizer.zero_grad()
            nn.functional.cross_entropy(module(x), y).backward()
            optimizer.step()
            schedule.step()
            assert differences(found[number], dict(module.state_dict())) == [], number
    assert method.times.times() == alone.times.times() == [4, 0, 9]


@pytest.mark.parametrize("name", BASES)
def test_a_cycle_begins_with_one_update_and_the_masks_stay(name: str) -> None:
    method = tickets(BASES[name])
    masks: list[dict[str, Tensor]] = []
    kept: list[int] = []
    loop(
        method,
        seen=lambda *_: (masks.append({n: m.clone() for n, m in method.masks.items()}), kept.append(method.updates)),
    )
    changes = [i for i in range(13, 24) if any(not torch.equal(m, masks[i - 2][n]) for n, m in masks[i - 1].items())]
    assert changes == [13, 19]
    assert kept[18] - kept[11] == 2
    counts = [{n: int(m.sum()) for n, m in each.items()} for each in masks]
    assert all(each == counts[0] for each in counts[:23])  # those of the base, until the merged ticket is there
    assert sum(counts[-1].values()) == sum(counts[0].values())
    dropped = sum(int((masks[11][n] & ~masks[12][n]).sum()) for n in masks[0])
    assert 0 < dropped <= sum(int(0.5 * c) for c in counts[0].values())


# ---------------------------------------------------------------------- rates


WAYS = [0.0, 0.4, 0.8, 0.8, 0.4, 0.0]


@pytest.mark.parametrize("base", [RigL, SET], ids=["rigl", "set"])
def test_rates_are_set_for_the_step_and_the_schedule_goes_on(base: type[DropAndGrow]) -> None:
    module, method = net(), tickets(base)
    groups = [
        {"params": [*module[0].parameters(), *module[1].parameters()]},
        {"params": module[3].parameters(), "lr": 0.05},
    ]
    optimizer = torch.optim.SGD(groups, lr=0.1)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    outside: list[float] = []

    def step() -> None:
        schedule.step()
        outside.append(optimizer.param_groups[0]["lr"])

    used = rates_by_movement(method, optimizer, module, step)
    assert outside == pytest.approx([0.1 * 0.9**n for n in range(1, 25)], rel=1e-12)
    expected = [0.1 * 0.9**n for n in range(12)] + [0.01 + 0.04 * w for w in WAYS] * 2
    replaced = {0, 5, 12, 18} if base is RigL else set()
    for number, (found, rate) in enumerate(
        zip(used[:-1], expected, strict=False)
    ):  # the last step ends in the merged ticket
        wanted = [0.0, 0.0] if number in replaced else [rate, rate / 2]
        assert found == pytest.approx(wanted, rel=1e-9, abs=1e-15), number


def test_without_rates_they_follow_that_of_the_run() -> None:
    module, method = net(), tickets(SET, low_lr=None, high_lr=None)
    optimizer = torch.optim.SGD(module.parameters(), lr=torch.tensor(0.1))  # a schedule would write into it
    rate = optimizer.param_groups[0]["lr"]
    used = [rates[0] for rates in rates_by_movement(method, optimizer, module)]
    assert optimizer.param_groups[0]["lr"] is rate
    assert float(rate) == pytest.approx(0.1)
    assert used[:-1] == pytest.approx(([0.1] * 12 + [0.001 + 0.004 * w for w in WAYS] * 2)[:-1], rel=1e-4)


def test_rates_that_a_loop_sets_by_hand_do_not_fall_below_those_of_its_beginning() -> None:
    module, method = net(), tickets(SET, low_lr=None, high_lr=None)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)

    def step() -> None:
        optimizer.param_groups[0]["lr"] *= 0.5

    used = [rates[0] for rates in rates_by_movement(method, optimizer, module, step)]
    assert used[12:-1] == pytest.approx(([0.001 + 0.004 * w for w in WAYS] * 2)[:-1], rel=1e-4)
    assert float(method.aux["phase/peak"]) == 0.1


@pytest.mark.parametrize(
    ("schedule", "rate"),
    [
        (lambda o: torch.optim.lr_scheduler.ExponentialLR(o, 0.5), 0.1),
        (lambda o: torch.optim.lr_scheduler.OneCycleLR(o, max_lr=0.4, total_steps=30, cycle_momentum=False), 0.4),
    ],
    ids=["falls from 0.1", "peaks at 0.4"],
)
def test_the_rate_of_the_run_is_that_which_its_schedule_begins_or_peaks_with(schedule: Any, rate: float) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = schedule(optimizer)
    for _ in range(20):
        optimizer.step()
        scheduler.step()
    aux = {"phase/steps": torch.tensor(10), "phase/bounds": torch.tensor([10, 15])}
    assert phase.rates_now(aux, optimizer, 0, None, None) == pytest.approx([rate / 100])


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize("name", ["rigl", "snfs"])
def test_resume_is_bitwise_from_every_step(name: str) -> None:
    saved: dict[int, dict[str, Any]] = {}
    method = tickets(BASES[name])
    module, optimizer = loop(method, save=lambda number, state: saved.update({number: state}))
    for number, state in saved.items():
        again = tickets(BASES[name])
        other, stepped = loop(again, state=state)
        assert differences(dict(module.state_dict()), dict(other.state_dict())) == [], number
        assert differences(optimizer.state_dict(), stepped.state_dict()) == [], number
        assert differences(method.masks, again.masks) == [], number
        assert differences(method.aux, again.aux) == [], number


@pytest.mark.parametrize("base", [RigL, SET], ids=["rigl", "set"])
def test_a_trainer_resumes_bitwise_around_each_bound(base: type[DropAndGrow], tmp_path: Path) -> None:
    after = (11, 12, 13, 15, 17, 18, 19, 23)  # the cycles begin after 12 and 18 of 24 steps

    def run(seed: int, *more: Any, **options: Any) -> tuple[Any, ...]:
        module, method = Classifier(conv_net(seed)), tickets(base)
        trainer = fit(module, method, *more, max_epochs=3, **options)
        return module, method, trainer

    stops = Stops(tmp_path, after)
    module, method, trainer = run(0, stops)
    assert method.bounds == BOUNDS
    for batch in after:
        other, again, resumed = run(7, ckpt_path=stops.path(batch))
        assert differences(dict(module.state_dict()), dict(other.state_dict())) == [], batch
        assert differences(method.state_dict(), again.state_dict()) == [], batch
        assert differences(trainer.optimizers[0].state_dict(), resumed.optimizers[0].state_dict()) == [], batch


# ---------------------------------------------------------------------- the merged ticket


def test_the_last_validation_and_checkpoint_see_the_merged_ticket(tmp_path: Path) -> None:
    module, method = Classifier(), tickets(SET, cycles=1)
    seen: list[tuple[bool, dict[str, Tensor]]] = []
    watch = pl.callbacks.LambdaCallback(
        on_validation_start=lambda trainer, module: seen.append((method.is_merged, copy.deepcopy(module.state_dict())))
    )
    keep = pl.callbacks.ModelCheckpoint(tmp_path, save_last=True)
    trainer = trainer_for([watch, keep, method], enable_checkpointing=True, num_sanity_val_steps=0)
    trainer.fit(module, Batches(), Batches(batches=2, seed=1))
    assert [merged for merged, _ in seen] == [False, True]
    assert differences(seen[-1][1], dict(module.state_dict())) == []
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    assert differences(saved, dict(module.state_dict())) == []
    assert all(torch.equal(m, module.get_parameter(n) != 0) for n, m in method.masks.items())


def test_plan_and_figures_are_those_of_the_base_until_the_first_merge() -> None:
    method, alone = tickets(SET), SET(0.8, every=4, print_plan=False)
    plan = alone.plan(net())
    told: dict[int, Any] = {}
    loop(method, seen=lambda number, _: told.update({number: (method.plan(), sorted(method.figures()))}))
    assert list(told[17][0].rows) == list(plan.rows)
    assert told[17][0].joint is None
    assert told[17][1] == []
    for number in (18, 24):
        assert told[number][0].joint == plan.zeros
        assert told[number][0].total == plan.total
        assert told[number][1] == ["tickets/merged"]
    assert sum(int((~m).sum()) for m in method.masks.values()) == plan.zeros
    assert method.outcome() == {"merged tickets": "3"}
    assert method.own_figures(x=1) == {"set/x": 1}


def test_layers_without_zeros_stay_dense() -> None:
    base = SET(0.8, every=4, distribution={"3.*": 0.0, "*": 0.8}, print_plan=False)
    method = SupTickets(base, share=0.5, cycles=2)
    loop(method)
    assert bool(method.masks["3.weight"].all())
    assert int((~method.masks["0.weight"]).sum()) == int(0.8 * 288)


@pytest.mark.parametrize(("rule", "least"), [("global(7)", 7), ("global(0)", 0), ("global", 1), ("uniform", 1)])
def test_the_merged_network_keeps_the_minimum_of_the_distribution(rule: str, least: int) -> None:
    method, module = SET(0.8, distribution=rule, print_plan=False), net()
    with sparsify(method, module, torch.optim.SGD(module.parameters(), lr=0.1), 4):
        merged = {"0.weight": torch.ones(24, 12), "3.weight": torch.full((4, 24), 0.001)}
        kept = {name: int(mask.sum()) for name, mask in merged_masks(method, merged).items()}
    active = 24 * 12 + 4 * 24 - int(0.8 * 24 * 12) - int(0.8 * 4 * 24) if rule == "uniform" else 384 - int(0.8 * 384)
    assert kept == {"0.weight": active - least, "3.weight": least}


def test_layers_are_emptied_where_the_minimum_is_more_than_the_budget() -> None:
    layers = [torch.tensor([3.0, 2.0]), torch.tensor([1.0, 0.5])]
    assert [int(m.sum()) for m in within_budget(layers, 2, least=1)] == [1, 1]
    assert [int(m.sum()) for m in within_budget(layers, 2, least=2)] == [2, 0]
    assert [int(m.sum()) for m in within_budget([*layers, torch.tensor([0.1])], 5, least=2)] == [2, 2, 1]


def test_networks_of_half_precision_are_merged_in_float32() -> None:
    method = SET(0.5, print_plan=False)
    module = net().bfloat16()
    name, tickets_of_bias = "3.bias", [1.0, 1.0078125, 1.0078125]  # the second is the next number after 1
    with sparsify(method, module, torch.optim.SGD(module.parameters(), lr=0.1), 4):
        for number, value in enumerate(tickets_of_bias, 1):
            with torch.no_grad():
                module[3].bias.fill_(value)
            take_ticket(method, 1 / number)
    merged = method.aux[f"merged/{name}"]
    assert merged.dtype == torch.float32
    assert merged.tolist() == pytest.approx([sum(tickets_of_bias) / 3] * 4, rel=1e-6)


def test_a_run_that_ends_within_a_cycle_keeps_what_was_merged() -> None:
    method, state = tickets(SET), {}
    with pytest.warns(
        UserWarning, match=r"ended after 20 of 24 optimizer steps, with 2 of 3 tickets: those merged so far"
    ):
        module, _ = loop(method, until=20, save=lambda number, found: state.update({number: found["run"]["aux"]}))
    assert method.is_merged
    assert torch.equal(module[0].weight, state[18]["merged/0.weight"])
    assert torch.equal(module[0].bias, state[18]["merged/0.bias"])
    early = tickets(SET)
    with pytest.warns(
        UserWarning, match=r"ended after 15 of 24 .* with 1 of 3 tickets: the network is the one that was trained"
    ):
        loop(early, until=15)
    assert not early.is_merged


def test_a_second_run_of_the_same_model_has_cycles_of_its_own() -> None:
    method, module = tickets(SET), net()
    idle = pytest.warns(UserWarning, match="SupTickets, before its cycles, will not move a mask in this run: 24 steps")
    for told in (nullcontext(), idle):
        optimizer, before = torch.optim.SGD(module.parameters(), lr=0.1), method.updates
        with told, sparsify(method, module, optimizer, STEPS, data=data()):
            assert (method.position, method.tickets, method.is_merged) == (0, 0, False)
            for x, y in list(data()) * 2:
                optimizer.zero_grad()
                nn.functional.cross_entropy(module(x), y).backward()
                optimizer.step()
        assert (method.position, method.tickets, method.is_merged) == (24, 3, True)
        assert method.updates - before == (5 if not before else 2)
        assert not [key for key in method.aux if key.startswith("merged/")]


# ---------------------------------------------------------------------- what it is, and what it refuses


def test_it_is_of_the_kind_of_its_base_also_as_a_copy() -> None:
    for outer in (SupTickets, methods.SupTickets):
        method: Any = outer(RigL(0.7, seed=3), cycles=2)
        assert isinstance(method, RigL)
        assert type(method).__name__ == "SupTickets"
        assert (method.target_sparsity, method.seed) == (0.7, 3)
        for copied in (copy.deepcopy(method), pickle.loads(pickle.dumps(method))):
            assert type(copied) is type(method)
            assert repr(copied) == repr(method)
    assert not isinstance(SupTickets(SET(0.7)), RigL)
    names = SupTickets(SET(0.7, drop_fraction=0.2)).arguments
    assert (names["base"], names["base.drop_fraction"], names["drop_fraction"]) == ("SET", "0.2", "0.5")


def trained() -> RigL:
    base, module = RigL(0.8, every=4, print_plan=False), net()
    with sparsify(base, module, torch.optim.SGD(module.parameters(), lr=0.1), 24):
        pass
    return base


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: SupTickets(GMP(0.8)), "base=GMP is not a method that drops weights and grows as many elsewhere"),
        (lambda: SupTickets(0.8), r"base=0\.8 is not a method that drops weights"),  # type: ignore[arg-type]
        (lambda: SupTickets(Static(0.8)), "base=Static is not a method that drops weights"),
        (lambda: SupTickets(SupTickets(SET(0.8))), "base=SupTickets is not a method that drops weights"),
        (lambda: SupTickets(CTRE(0.8)), "base=CTRE looks at the data"),
        (lambda: SupTickets(SET(0.8, pattern="fan_in/4")), r"base=SET\(pattern='fan_in/4'\) keeps masks of a pattern"),
        (lambda: SupTickets(SET(0.8, storage="sparse")), "storage='sparse': SupTickets merges networks whose layers"),
        (
            lambda: SupTickets(SET(0.8), initial_mask="snip"),
            r"begins with the masks of base=, as in SupTickets\(RigL\(",
        ),  # type: ignore[call-arg]
        (lambda: SupTickets(trained()), "base=RigL has trained a model already"),
        (lambda: SupTickets(SET(0.8), share=1.0), "share=1.0 is not a share of the run"),
        (lambda: SupTickets(SET(0.8), cycles=0), "cycles=0 is not a number of cycles"),
        (lambda: SupTickets(SET(0.8), drop_fraction=1.5), "drop_fraction=1.5 leaves"),
        (lambda: SupTickets(SET(0.8), low_lr=-1.0), "low_lr=-1.0 is out of range"),
        (lambda: SupTickets(SET(0.8), high_lr=0.0), "high_lr=0.0 trains nothing in the cycles"),
        (lambda: SupTickets(SET(0.8), low_lr=0.2, high_lr=0.1), "low_lr=0.2 is above high_lr=0.1"),
        (lambda: SupTickets(SET(0.8), average="mean"), "average='mean' is not known. Give 'cumulative' or 'moving'"),
    ],
)
def test_arguments_that_no_run_can_use(make: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def refused(method: Any, words: str, *, optimizer: Any = None, steps: float = STEPS, **options: Any) -> None:
    module = net()
    before = copy.deepcopy(module.state_dict())
    parameters = list(module.parameters())
    made = torch.optim.SGD(parameters, lr=0.1) if optimizer is None else optimizer(parameters)
    with pytest.raises(ValueError, match=words):
        sparsify(method, module, made, steps, **{"data": data(), **options})
    assert differences(before, dict(module.state_dict())) == []


def test_runs_that_cannot_have_cycles_are_refused_before_they_begin() -> None:
    refused(tickets(), "share=0.5 of a run of 10 optimizer steps is 5, and cycles=2 need", steps=10)
    refused(
        tickets(),
        "2 optimizers step this model",
        optimizer=lambda p: [torch.optim.SGD(p[:2], lr=0.1), torch.optim.SGD(p[2:], lr=0.1)],
    )
    refused(tickets(), "SupTickets runs the network on training data", data=None)


def of_others() -> list[Any]:
    """Methods for other layers, and those among them whose masks stay."""
    layers: dict[str, Any] = {"include": "3.*", "print_plan": False}
    early = methods.EarlyCroP(0.7, when=5, score="magnitude", rounds=1, **layers)
    return [
        methods.GMP(0.7, **layers),
        SET(0.7, **layers),
        methods.DPF(0.7, **layers),
        early,
        tickets_of(SET(0.7, **layers)),
    ]


def tickets_of(base: DropAndGrow) -> SupTickets:
    return SupTickets(base, share=0.5, cycles=2)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("other", of_others(), ids=lambda other: type(other).__name__)
def test_other_methods_whose_masks_move_are_refused_beside_it(other: Any, order: str) -> None:
    mine, other, module = tickets_of(SET(0.8, include="0.*", print_plan=False)), copy.deepcopy(other), net()
    weights = copy.deepcopy(module.state_dict())
    first, second = (other, mine) if order == "before" else (mine, other)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    settings: Any = {"data": data(), "forward": lambda module, batch: module(batch[0])}
    with sparsify(first, module, optimizer, STEPS, **settings):
        begun = copy.deepcopy(module.state_dict())
        with pytest.raises(
            ValueError, match=r"SupTickets merges the weights of the whole model .* has masks that move"
        ):
            sparsify(second, module, optimizer, STEPS, **settings)
        assert differences(begun, dict(module.state_dict())) == []
    assert set(weights) == set(begun)


def test_a_trainer_refuses_other_methods_beside_it_and_takes_masks_that_stay() -> None:
    def both(other: Any) -> tuple[Any, Any]:
        module, mine = Classifier(), SupTickets(SET(0.8, include="net.0*", print_plan=False), share=0.5, cycles=2)
        fit(module, mine, other, max_epochs=2, loader=Batches(batches=12))
        return module, other

    layers: dict[str, Any] = {"exclude": "net.0*", "print_plan": False}
    with pytest.raises(ValueError, match=r"and GMP has masks that move"):
        both(GMP(0.7, **layers))
    with pytest.raises(ValueError, match=r"and Static has layers that hold their active weights alone"):
        both(Static(0.7, storage="sparse", **layers))
    for stays in (Static(0.7, **layers), PruneAtStart(0.7, score="magnitude", **layers)):
        module, other = both(stays)
        assert all(not module.get_parameter(n)[~m].any() for n, m in other.masks.items())
        assert other.measured_sparsity()["sparsity/total"] == pytest.approx(0.7, abs=0.01)


class Thaws(pl.Callback):
    """Lets a parameter be trained at the begin of an epoch, in a group of its own where the optimizer does not have it."""

    def __init__(self, name: str, epoch: int) -> None:
        self.name, self.epoch = name, epoch

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            parameter = pl_module.get_parameter(self.name).requires_grad_()
            (optimizer,) = trainer.optimizers
            if not any(parameter is p for group in optimizer.param_groups for p in group["params"]):
                optimizer.add_param_group({"params": [parameter], "lr": optimizer.param_groups[0]["lr"] / 10})


class Frozen(Classifier):
    """Of which one parameter is not trained at first; it is in the optimizer, or not."""

    def __init__(self, name: str, held: bool) -> None:
        super().__init__()
        self.held = held
        self.get_parameter(name).requires_grad_(False)

    def configure_optimizers(self) -> Any:
        given = [p for p in self.parameters() if self.held or p.requires_grad]
        return torch.optim.SGD(given, lr=0.1, momentum=0.9)


@pytest.mark.parametrize("held", [True, False], ids=["in a group", "in a new group"])
@pytest.mark.parametrize("kind", ["weight", "bias"])
def test_what_is_trained_from_a_cycle_on_is_merged_from_its_next_ticket(kind: str, held: bool, tmp_path: Path) -> None:
    name = next(n for n, _ in Classifier().named_parameters() if n.endswith(kind))

    def run(*others: Any, **options: Any) -> tuple[Any, Any]:
        module, method = Frozen(name, held), tickets(SET, cycles=2)
        if "ckpt_path" in options:
            module.get_parameter(name).requires_grad_(True)  # modes of training are not saved
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            fit(module, method, Thaws(name, 4), *others, max_epochs=6, loader=Batches(batches=4), **options)
        return module, method

    stops = Stops(tmp_path, [17, 21])
    module, method = run(stops)
    assert method.bounds == BOUNDS
    assert method.is_merged
    assert not torch.equal(module.get_parameter(name), Classifier().get_parameter(name))
    for batch in (17, 21) if held else ():  # torch takes no state of more groups
        again, resumed = run(ckpt_path=stops.path(batch))
        assert differences(dict(module.state_dict()), dict(again.state_dict())) == [], batch
        assert differences(method.state_dict(), resumed.state_dict()) == [], batch


def test_a_last_batch_of_one_sample_does_not_end_the_run() -> None:
    x, y = next(iter(data()))
    samples = torch.utils.data.TensorDataset(x.repeat(9, 1)[:33], y.repeat(9)[:33])
    loader = torch.utils.data.DataLoader(samples, batch_size=8, drop_last=True)
    of_norms = torch.utils.data.DataLoader(samples, batch_size=8)  # used as it is
    module, method = Classifier(net()), tickets(SET, share=0.6, statistics_dataloader=of_norms)
    with pytest.warns(UserWarning, match=r"batches of one sample were left out of the statistics"):
        fit(module, method, loader=loader, max_epochs=4)
    assert method.is_merged
    norm = next(m for m in module.modules() if isinstance(m, nn.BatchNorm1d))
    assert int(norm.num_batches_tracked) == 4


def test_without_a_batch_of_two_samples_statistics_stay_as_they_were() -> None:
    x, y = next(iter(data()))
    samples = torch.utils.data.TensorDataset(x.repeat(4, 1), y.repeat(4))
    singles = torch.utils.data.DataLoader(samples, batch_size=1)
    module, method = Classifier(net()), tickets(SET, share=0.6, statistics_dataloader=singles)
    with pytest.warns(UserWarning, match=r"the statistics of batch norms stay those of the weights that were trained"):
        fit(module, method, loader=torch.utils.data.DataLoader(samples, batch_size=8), max_epochs=4)
    assert method.is_merged
    norm = module.net[1]
    assert int(norm.num_batches_tracked) == 16  # of training
    assert bool(norm.running_mean.any())
    assert norm.momentum == 0.1


def test_a_new_group_has_its_rate_in_proportion() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    aux = {"phase/bounds": torch.tensor([10, 15, 20]), "phase/steps": torch.tensor(10)}
    assert phase.rates_now(aux, optimizer, 0, 0.02, 0.08) == [0.02]
    optimizer.param_groups[0]["lr"] = 0.05  # by the schedule; the group that comes has a fifth of that
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2))], "lr": 0.01})
    aux["phase/steps"] = torch.tensor(12)
    for _ in range(2):
        assert phase.rates_now(aux, optimizer, 0, 0.02, 0.08) == pytest.approx([0.08, 0.016])


def test_a_run_that_goes_on_for_longer_than_its_cycles_is_warned_of() -> None:
    states: dict[int, dict[str, Any]] = {}
    loop(tickets(SET), save=lambda number, found: states.update({number: found}))
    words = r"the cycles of this run were laid out up to step 24, and it goes on to step 30: after step 24 the merged"
    for number in (15, 24):
        with pytest.warns(UserWarning, match=words):
            loop(tickets(SET), 30, state=states[number], until=number)


def test_after_a_merge_the_plan_counts_the_neurons_that_are_gone() -> None:
    base = SET(
        0.7,
        every=2,
        distribution="uniform",
        neuron_importance=0.2,
        importance_start=2,
        importance_every=2,
        print_plan=False,
    )
    method = SupTickets(base, share=0.5, cycles=2)
    module, _ = loop(method)
    zeros = sum(int((module.get_parameter(n) == 0).sum()) for n in method.masks)
    planned = int(0.7 * 288) + int(0.7 * 96)
    assert method.plan().zeros == zeros > planned


def test_an_endless_run_is_refused() -> None:
    with pytest.raises(ValueError, match="this run has no known length"):
        fit(Classifier(), SupTickets(SET(0.8, every=2, stop=8, print_plan=False)), max_epochs=-1)


def test_an_update_after_the_first_part_is_warned_of() -> None:
    method = SupTickets(SET(0.8, every=4, stop=20, print_plan=False), share=0.5, cycles=2)
    with pytest.warns(
        UserWarning, match="stop=20 lies behind the first part of the run, which ends with step 12 of 24"
    ):
        loop(method)
    assert method.is_merged


def test_callbacks_that_average_weights_are_refused() -> None:
    with pytest.raises(
        ValueError, match="StochasticWeightAveraging would write its average over the weights that SupTickets"
    ):
        fit(Classifier(), tickets(SET), pl.callbacks.StochasticWeightAveraging(swa_lrs=0.01), max_epochs=3)


def test_an_optimizer_without_a_rate_is_refused() -> None:
    assert why_no_rate(torch.optim.SGD(net().parameters(), lr=0.1)) == ""
    with pytest.raises(
        ValueError, match="Relative has no learning rate that a cycle could set: group 0 of its parameters has lr=None"
    ):
        refuse_optimizers("SupTickets", [Relative(net().parameters())])


class Relative(torch.optim.SGD):
    """Has rates of its own, as some optimizers that take none."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, lr=0.1)
        self.param_groups[0]["lr"] = None
