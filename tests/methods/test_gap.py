"""GaP: exact pruning, partitions that become dense in turn, and what a user sees."""

import math
from pathlib import Path
from typing import Any

import oracles.gap as oracle
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from support.gap import Restarting, deep, gap
from support.inside import Moment, around_updates, parameters_of, when_attached
from support.nets import FixedGradient, Regression
from support.rig import copied_masks, fit_steps
from torch import Tensor, nn

from sparse_callbacks import GaP
from sparse_callbacks.testing.comparison import assert_effective, differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import OPTIMIZERS, Classifier, double_mlp
from sparse_callbacks.testing.runs import fit, watch

# ---------------------------------------------------------------------- pruning


def held(weights: list[float]) -> FixedGradient:
    """One row of weights that no step moves."""
    module = FixedGradient(torch.tensor([weights], dtype=torch.float64), [torch.zeros(1, len(weights))])
    module.double()
    module.net.weight.data.copy_(torch.tensor([weights], dtype=torch.float64))
    module.configure = lambda p: torch.optim.SGD(p, lr=0.0)
    return module


@pytest.mark.parametrize(("weights", "sparsity", "threshold", "released", "exact"), oracle.PERCENTILE)
def test_exactly_the_planned_number_is_pruned(
    weights: list[float], sparsity: float, threshold: float, released: list[int], exact: list[int], tmp_path: Path
) -> None:
    callback = gap(1, sparsity=sparsity, every=1)
    fit_steps(tmp_path, callback, held(weights), 2)
    assert callback.masks["net.weight"].tolist() == [[bool(x) for x in exact]]
    values = torch.tensor(weights, dtype=torch.float64).abs()
    assert float(torch.quantile(values, sparsity)) == pytest.approx(threshold, abs=1e-12)
    assert (values > threshold + 1e-12).int().tolist() == released


def test_the_numeric_cycle(tmp_path: Path) -> None:
    class Rows(pl.LightningModule):
        """Three rows of weights; a step adds the increment."""

        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.ModuleList(nn.Linear(4, 1, bias=False) for _ in range(3)).double()
            for row, values in zip(self.rows, oracle.CYCLE_START, strict=True):
                row.weight.data.copy_(torch.tensor([values], dtype=torch.float64))

        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            increments = torch.tensor(oracle.CYCLE_INCREMENT, dtype=torch.float64)
            return -sum((row.weight * increment).sum() for row, increment in zip(self.rows, increments, strict=True))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=1.0)

    callback, module = gap(3, sparsity=oracle.CYCLE_SPARSITY, every=1, init="magnitude"), Rows()
    seen: list[tuple[list[Any], list[Any]]] = []

    def state() -> tuple[list[Any], list[Any]]:
        return [m.int().tolist()[0] for m in callback.masks.values()], [
            row.weight.detach()[0].clone() for row in module.rows
        ]

    around_updates(callback, before=lambda _: seen.append(state()))
    fit_steps(tmp_path, callback, module, 3)
    seen.append(state())
    assert [masks for masks, _ in seen] == [masks for masks, _ in oracle.CYCLE_STEPS]
    for (_, weights), (_, expected) in zip(seen, oracle.CYCLE_STEPS, strict=True):
        assert torch.allclose(
            torch.stack(weights), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12
        )  # sums of decimals


def first_masks(path: Path, **options: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Masks and weights before the first step."""
    module, callback, found = Regression(deep(3)), gap(**options), {}
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    when_attached(callback, lambda: found.update(copied_masks(callback)))
    fit_steps(path, callback, module, 8)
    return found, weights


def test_the_first_masks_are_by_magnitude_or_at_random(tmp_path: Path) -> None:
    by_magnitude, weights = first_masks(tmp_path, init="magnitude")
    at_random, _ = first_masks(tmp_path)
    for masks in (by_magnitude, at_random):
        first, *others = masks
        assert masks[first].all()
        assert [int((~masks[n]).sum()) for n in others] == [math.floor(0.7 * weights[n].numel()) for n in others]
    for name in list(weights.keys() & by_magnitude.keys() - {"net.0.weight"}):
        kept, lost = weights[name][by_magnitude[name]].abs(), weights[name][~by_magnitude[name]].abs()
        assert kept.min() >= lost.max()
    assert not differences(at_random, first_masks(tmp_path)[0])
    assert differences(at_random, first_masks(tmp_path, seed=1)[0])
    assert differences(at_random, by_magnitude)


# ---------------------------------------------------------------------- the cycle


@pytest.mark.parametrize(("shape", "expected"), oracle.CYCLES.items(), ids=str)
def test_partitions_become_dense_in_turn(shape: tuple[int, int], expected: list[Any], tmp_path: Path) -> None:
    count, rounds = shape
    callback, every = gap(count, rounds=rounds, every=3), 3
    phases: list[dict[str, Any]] = [{"masks": None, "weights": None}]
    seen: list[list[int]] = []

    def keep(_: Moment) -> None:
        phases.append(
            {
                "masks": copied_masks(callback),
                "weights": {n: p.detach().clone() for n, p in parameters_of(callback).items()},
            }
        )

    def look(trainer: Any, module: Any, done: int) -> None:
        assert_effective(module, callback)

    class Look(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            seen.append([i for i, m in enumerate(callback.masks.values()) if m.all()])
            active, total = (
                sum(int(m.sum()) for m in callback.masks.values()),
                sum(m.numel() for m in callback.masks.values()),
            )
            dense = [m for m in callback.masks.values() if m.all()]
            others = [m for m in callback.masks.values() if not m.all()]
            assert active == sum(m.numel() for m in dense) + sum(
                m.numel() - math.floor(0.7 * m.numel()) for m in others
            )
            assert active < total
            assert callback.at_target is (not dense)

    around_updates(callback, before=keep)
    steps = every * (len(expected) - 1) + 2
    fit_steps(tmp_path, [callback, Look(), watch(look)], Regression(deep(count)), steps)
    assert seen == [expected[min(step // every, len(expected) - 1)][2] for step in range(steps)]
    assert callback.step == steps
    assert callback.updates == len(phases) - 1 == len(expected) - 1
    names = list(callback.masks)
    for phase, (turn, pruned, dense, sparse) in list(enumerate(expected))[1:]:
        assert turn is None or turn == phase // count
        assert sorted(dense + sparse) == list(range(count))
        before, after = phases[phase], phases[phase + 1]["masks"] if phase + 1 < len(phases) else copied_masks(callback)
        for index in set(range(count)) - set(dense):
            name = names[index]
            if index in pruned:
                weight = before["weights"][name].abs()
                assert before["masks"][name].all()
                assert int((~after[name]).sum()) == math.floor(0.7 * weight.numel())
                assert weight[after[name]].min() >= weight[~after[name]].max()
            else:
                assert torch.equal(after[name], before["masks"][name])
        for index in dense:
            assert not before["weights"][names[index]][
                ~before["masks"][names[index]]
            ].any()  # what grows starts at zero


def test_the_released_scripts_train_the_first_partition_once_more(tmp_path: Path) -> None:
    callback, seen = gap(3, rounds=3, every=1), []
    fit_steps(tmp_path, [callback, watch(lambda *_: seen.append(callback.dense_partition))], Regression(deep(3)), 9)
    ours = [0, *seen]
    assert ours[: len(oracle.RELEASED)] == oracle.RELEASED
    assert len(oracle.RELEASED) == 3 * 2 + 1  # two rounds here are the first six of these phases
    assert ours[-1] is None


def test_every_weight_is_active_once_in_each_round(tmp_path: Path) -> None:
    callback = gap([["net.[04].*"], ["net.2.*"]], rounds=2, every=2, sparsity=0.9)
    active: list[dict[str, Tensor]] = []
    fit_steps(tmp_path, [callback, watch(lambda *_: active.append(copied_masks(callback)))], Regression(deep(3)), 10)
    for begin in (0, 4):
        during = [callback.masks, *active][begin + 1 : begin + 4]
        ever = {n: sum(m[n] for m in during[:-1]).bool() | during[-1][n] for n in callback.masks}
        assert sum(int(e.all()) for e in ever.values()) >= 1
    assert all(callback.aux[f"ever_active/{n}"].all() for n in callback.masks)
    assert not any(m.all() for m in callback.masks.values())


def test_each_step_is_that_of_a_plain_loop(tmp_path: Path) -> None:
    """Written anew in plain torch: phases with their own optimizer and cosine, masks after each step, pruning by
    sorting."""
    every, steps, data = 4, 14, Batches(batches=14)
    module, callback = Restarting(double_mlp()), gap(2, every=every, rounds=1)
    net = double_mlp()
    for mine, theirs in zip(net.parameters(), module.net.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    start: dict[str, Tensor] = {}
    when_attached(callback, lambda: start.update(copied_masks(callback)))
    fit(module, callback, loader=data, max_epochs=1)
    masks = {n.removeprefix("net."): m.clone() for n, m in start.items()}
    weights = dict(net.named_parameters())
    with torch.no_grad():
        for name, mask in masks.items():
            weights[name].mul_(mask)
    batches = data.all(1)
    assert len(batches) == steps
    for begin_at, length in ((0, every), (every, every), (2 * every, steps - 2 * every)):
        if begin_at:
            ended = list(masks)[begin_at // every - 1]
            order = weights[ended].detach().abs().flatten().argsort(descending=True, stable=True)
            keep = weights[ended].numel() - math.floor(0.7 * weights[ended].numel())
            masks[ended] = (
                torch.zeros(weights[ended].numel(), dtype=torch.bool)
                .index_fill_(0, order[:keep], True)
                .view_as(masks[ended])
            )
            if begin_at == every:
                masks[list(masks)[1]].fill_(True)
            with torch.no_grad():
                weights[ended].mul_(masks[ended])
        optimizer = OPTIMIZERS["sgd"](net.parameters())
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, length, eta_min=0.01)
        for x, y in batches[begin_at : begin_at + length]:
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x.double()), y).backward()
            for name, mask in masks.items():
                weights[name].grad.mul_(mask)
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                for name, mask in masks.items():
                    weights[name].mul_(mask)
    assert module.horizons == [4, 4, 6]
    assert not differences(dict(net.state_dict()), dict(module.net.state_dict()), bitwise=False)
    assert not differences(masks, {n.removeprefix("net."): m for n, m in callback.masks.items()})


# ---------------------------------------------------------------------- what a user sees


def test_curves_of_phase_partition_and_round(tmp_path: Path) -> None:
    callback = gap(2, every=2, rounds=2)
    logger = CSVLogger(tmp_path)
    fit(Classifier(double_mlp()), callback, max_epochs=2, logger=logger, log_every_n_steps=1)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    header = rows[0].split(",")
    keys = ("step", "gap/phase", "gap/dense_partition", "gap/round", "update/ever_active")
    table = [[float(r.split(",")[header.index(k)] or "nan") for k in keys] for r in rows[1:]]
    moved = [[int(x) for x in row[:4]] for row in table if row[1] == row[1]]
    assert moved == [[0, 0, 0, 0], [1, 1, 1, 0], [3, 2, 0, 1], [5, 3, 1, 1], [7, 4, -1, 2]]
    assert [row[4] for row in table if row[1] == row[1]][1:] == [1.0] * 4


def test_the_plan_tells_the_partitions() -> None:
    plan = gap(2).plan(deep(3))
    lines = str(plan).splitlines()
    assert lines[:3] == [
        "GaP: sparsity 0.7",
        "partition 0: 0.weight (120 weights)",
        "partition 1: 2.weight, 4.weight (128 weights)",
    ]
    with pytest.raises(
        ValueError, match=r"asks for 4 partitions, and the sparse layers are only 3: 0\.weight, 2\.weight, 4\.weight"
    ):
        gap(4).plan(deep(3))


def test_fewer_layers_than_partitions_are_refused_at_the_start(tmp_path: Path) -> None:
    module = Regression(deep(3))
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(ValueError, match="asks for 4 partitions"):
        fit_steps(tmp_path, gap(4), module, 20)
    assert not differences(weights, {n: p.detach() for n, p in module.named_parameters()})


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"rounds": 0}, "rounds=0 is not a number of rounds"),
        ({"rounds": 1.5}, r"rounds=1\.5 is not a number of rounds"),
        ({"rounds": True}, "rounds=True is not a number of rounds"),
        ({"partitions": 1, "rounds": 2}, "rounds=2 of one partition would grow at once what was just pruned"),
        ({"partitions": 0}, "partitions=0 does not say which layers belong together"),
        ({"init": "zero"}, "init='zero' is not known"),
        ({"epochs": 0}, "epochs=0 is not a length of time above 0"),
        ({"epochs": True}, "epochs=True is not a length of time above 0"),
        ({"epochs": "3"}, "epochs='3' is not a length of time above 0"),
        ({"epochs": math.inf}, "epochs=inf is not a length of time above 0"),
        ({"every": -2}, "every=-2 is not a length of time above 0"),
        ({"every": 1.5}, r"every=1\.5 is outside \[0, 1\]"),
        ({"finetune": 0}, "finetune=0 is not a length of time above 0"),
        ({"every": 3, "epochs": 1}, "epochs= and every= are given together"),
        ({"every": 3, "finetune": 0.5}, "every= and finetune= are given together"),
        ({"restart": 1}, "restart=1 is neither True nor False"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        GaP(**arguments)


def test_a_schedule_longer_than_a_phase_is_refused() -> None:
    class Long(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = OPTIMIZERS["sgd"](self.parameters())
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 16)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    module = Long(double_mlp())
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    with pytest.raises(
        ValueError, match=r"CosineAnnealingLR\(T_max=16\) is longer than the phase of 3 .*\.horizon\(self\.trainer"
    ):
        fit(module, gap(2, every=3))
    assert not differences(weights, {n: p.detach() for n, p in module.named_parameters()})
    fit(module, gap(2, every=3, restart=False))


def test_the_length_of_fine_tuning_counts_there() -> None:
    class Fixed(Classifier):
        def configure_optimizers(self) -> Any:
            optimizer = OPTIMIZERS["sgd"](self.parameters())
            schedule = torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=6)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with pytest.raises(ValueError, match=r"LinearLR\(total_iters=6\) is longer than the phase of 4 optimizer steps"):
        fit(Fixed(double_mlp()), gap(2, every=6))
    fit(Fixed(double_mlp()), gap(2, every=6), max_epochs=3)


def test_the_card_shows_its_arguments() -> None:
    shown = repr(gap([["a*"], ["b*"]], every=0.1))
    assert shown.startswith(
        "GaP(sparsity=0.7, partitions=[['a*'], ['b*']], rounds=1, epochs=None, every=0.1, finetune=None"
    )
