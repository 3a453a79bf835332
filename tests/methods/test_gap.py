"""GaP: partitions in turn, exact pruning, new optimizers for each phase, and a resume from any step."""

import math
from pathlib import Path
from typing import Any

import oracles.gap as oracle
import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.loggers import CSVLogger
from support.data import Batches
from support.inside import Moment, around_updates, parameters_of, when_attached
from support.nets import OPTIMIZERS, Classifier, FixedGradient, Regression, double_mlp, mlp
from support.rig import assert_effective, copied_masks, differences, fit, fit_steps, snapshot, watch
from torch import Tensor, nn

from sparse_callbacks.lightning.optimizer_lives import horizon
from sparse_callbacks.methods.gap.gap import GaP

WIDTHS = (12, 10, 8, 6, 4, 5)


def deep(layers: int) -> nn.Sequential:
    return mlp(*WIDTHS[: layers], 6)


def gap(partitions: Any = 3, **options: Any) -> GaP:
    return GaP(**({"sparsity": 0.7, "partitions": partitions, "print_plan": False} | options))


class Restarting(Classifier):
    """A cosine over each phase, told its length in ``configure_optimizers`` or later in the function of a LambdaLR."""

    def __init__(self, net: nn.Module | None = None, optimizer: str = "sgd", lazy: bool = False) -> None:
        super().__init__(net, optimizer)
        self.lazy, self.horizons = lazy, []

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        if self.lazy:
            schedule: Any = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / (2 * horizon(self.trainer)) if step else 1)
        else:
            self.horizons.append(horizon(self.trainer))
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.horizons[-1], eta_min=0.01)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


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
        return [m.int().tolist()[0] for m in callback.masks.values()], [row.weight.detach()[0].clone() for row in module.rows]

    around_updates(callback, before=lambda _: seen.append(state()))
    fit_steps(tmp_path, callback, module, 3)
    seen.append(state())
    assert [masks for masks, _ in seen] == [masks for masks, _ in oracle.CYCLE_STEPS]
    for (_, weights), (_, expected) in zip(seen, oracle.CYCLE_STEPS, strict=True):
        assert torch.allclose(torch.stack(weights), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)  # sums of decimals


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
        phases.append({"masks": copied_masks(callback), "weights": {n: p.detach().clone() for n, p in parameters_of(callback).items()}})

    def look(trainer: Any, module: Any, done: int) -> None:
        assert_effective(module, callback)

    class Look(pl.Callback):
        def on_before_optimizer_step(self, *_: Any) -> None:
            seen.append([i for i, m in enumerate(callback.masks.values()) if m.all()])
            active, total = sum(int(m.sum()) for m in callback.masks.values()), sum(m.numel() for m in callback.masks.values())
            dense = [m for m in callback.masks.values() if m.all()]
            others = [m for m in callback.masks.values() if not m.all()]
            assert active == sum(m.numel() for m in dense) + sum(m.numel() - math.floor(0.7 * m.numel()) for m in others)
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
            assert not before["weights"][names[index]][~before["masks"][names[index]]].any()  # what grows starts at zero


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
    """Written anew in plain torch: phases with their own optimizer and cosine, masks after each step, pruning by sorting."""
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
            masks[ended] = torch.zeros(weights[ended].numel(), dtype=torch.bool).index_fill_(0, order[:keep], True).view_as(masks[ended])
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


# ---------------------------------------------------------------------- optimizers


@pytest.mark.parametrize("restart", [True, False])
def test_optimizers_and_rates_start_anew_or_go_on(restart: bool, tmp_path: Path) -> None:
    module, callback = Restarting(double_mlp()), gap(2, every=3, restart=restart)
    found: list[tuple[int, float, bool]] = []

    class Look(pl.Callback):
        def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
            found.append((id(optimizer), optimizer.param_groups[0]["lr"], bool(optimizer.state)))
            assert optimizer is trainer.optimizers[0]
            assert optimizer is trainer.lr_scheduler_configs[0].scheduler.optimizer
            if not restart and callback.step == 3:
                second = module.net[3].weight
                momentum = optimizer.state[second]["momentum_buffer"]
                assert not momentum[~(second.detach() != 0)].any()  # what was just grown
                assert momentum.any()

    fit(module, callback, Look(), watch(lambda t, m, _: assert_effective(m, callback)), max_epochs=1)
    fresh = [i for i, (_, _, has_state) in enumerate(found) if not has_state]
    assert fresh == ([0, 3, 6] if restart else [0])
    assert [i for i, (_, rate, _) in enumerate(found) if rate == 0.05] == fresh
    assert module.horizons == ([3, 3, 2] if restart else [8])
    assert callback.restart_wanted is False


def test_the_horizon_is_the_phase_s_at_any_time(tmp_path: Path) -> None:
    module, callback, told = Restarting(double_mlp(), lazy=True), gap(2, every=3), []
    fit(module, callback, watch(lambda t, *_: told.append(horizon(t))), max_epochs=1)
    assert told == [3, 3, 3, 3, 3, 3, 2, 2]  # those at a boundary speak of the optimizers at hand
    assert all(isinstance(x, int) for x in told)


def test_two_callbacks_on_their_own_layers_share_the_restarts(tmp_path: Path) -> None:
    module = Restarting(nn.Sequential(nn.Flatten(), *mlp(50, 12, 10, 8, 4)).double())
    both = [gap(2, every=3, include=["net.1.*", "net.3.*"]), gap(2, every=2, include=["net.5.*", "net.7.*"])]
    fit(module, *both, watch(lambda t, m, _: assert_effective(m, *both)), max_epochs=1)
    assert module.horizons == [2, 1, 1, 2, 2]  # until the next boundary of either: steps 2, 3, 4, 6 and the end
    assert all(c.at_target for c in both)


class Pair(Restarting):
    """Manual optimization: one optimizer for each matrix, both stepped every batch."""

    def __init__(self) -> None:
        super().__init__(double_mlp())
        self.automatic_optimization = False
        self.between: Any = lambda: None

    def training_step(self, batch: Any, batch_idx: int) -> None:
        loss = self.loss(batch)
        for optimizer in self.optimizers():
            optimizer.zero_grad()
        self.manual_backward(loss)
        for optimizer in self.optimizers():
            optimizer.step()
            self.between()

    def configure_optimizers(self) -> Any:
        self.horizons.append(horizon(self.trainer))
        return [OPTIMIZERS["sgd"](self.net[1].parameters()), OPTIMIZERS["adamw"](self.net[3].parameters())]


def test_several_optimizers_restart_together(tmp_path: Path) -> None:
    module, callback, stateless = Pair(), gap(2, every=3), []

    class Look(pl.Callback):
        def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
            assert_effective(module, callback)
            stateless.append([len(o.state) == 0 for o in trainer.optimizers])

        def on_before_backward(self, trainer: Any, *_: Any) -> None:
            stateless[-1:] = [*stateless[-1:], [len(o.state) == 0 for o in trainer.optimizers]]

    fit(module, Look(), callback, max_epochs=1)
    assert [all(x) for x in stateless[0::2]] == [step in (0, 3, 6) for step in range(8)]
    assert module.horizons == [3, 3, 2]
    assert callback.at_target


def test_each_optimizer_moves_the_masks_of_its_own_parameters() -> None:
    module, callback, dense = Pair(), gap(2, every=3), []
    module.between = lambda: dense.append([bool(m.all()) for m in callback.masks.values()])
    fit(module, callback, max_epochs=1)
    assert dense[0:4] == [[True, False]] * 4
    assert dense[4:6] == [[False, False], [False, True]]  # the first optimizer has taken its third step, then the second one
    assert dense[10:12] == [[False, True], [False, False]]


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize(("optimizer", "lazy", "window"), [("sgd", False, 1), ("adamw", True, 1), ("sgd", True, 2)])
def test_a_run_resumes_bitwise_from_every_batch(optimizer: str, lazy: bool, window: int, tmp_path: Path) -> None:
    """Phases of three steps: some of these batches lie between a boundary and the restart at the next batch."""

    def run(path: Path | None = None, save: bool = False) -> Any:
        torch.manual_seed(5 if path else 0)
        module, callback = Restarting(double_mlp(seed=3 if path else 0), optimizer, lazy), gap(2, every=3, rounds=2 // window)
        keep = watch(lambda t, m, done: t.save_checkpoint(tmp_path / f"{done}.ckpt") if save else None)
        options = {"max_epochs": 2, "accumulate_grad_batches": window, "ckpt_path": path}
        trainer = fit(module, callback, keep, **options)
        return snapshot(trainer, module, callback) | {"horizon": horizon(trainer)}

    whole = run(save=True)
    for done in range(15):
        if done == 7:  # the epoch's last batch: Lightning would leave out what follows it
            continue
        assert not differences(whole, run(tmp_path / f"{done}.ckpt")), done


def test_a_resumed_run_does_not_make_its_loader_early(tmp_path: Path) -> None:
    class Order(Batches):
        made: list[int] = []

        def __iter__(self) -> Any:
            Order.made.append(0)
            return super().__iter__()

    path = tmp_path / "mid.ckpt"
    module, callback = Restarting(double_mlp()), gap(2, every=3)
    fit(module, callback, watch(lambda t, m, done: t.save_checkpoint(path) if done == 4 else None), max_epochs=1)
    loader, again, resumed = Batches(), Restarting(double_mlp()), gap(2, every=3)
    begun = []
    again.on_fit_start = lambda: begun.append(getattr(again.trainer.fit_loop, "_combined_loader", None))
    fit(again, resumed, loader=loader, max_epochs=1, ckpt_path=path)
    assert begun == [None]
    assert again.horizons == [3, 2]  # the phase that it was saved in, and fine-tuning
    assert resumed.step == 8


def test_a_fresh_start_does_not_ask_the_checkpoint(tmp_path: Path) -> None:
    class Asks(Classifier):
        def configure_optimizers(self) -> Any:
            told.append(horizon(self.trainer))
            return OPTIMIZERS["sgd"](self.parameters())

    told: list[float] = []
    path = tmp_path / "end.ckpt"
    fit(Asks(double_mlp()), gap(2, every=3), watch(lambda t, m, d: t.save_checkpoint(path) if d == 6 else None))
    assert told == [3, 3, 10]
    told.clear()
    fit(Asks(double_mlp()), gap(2, every=3, fresh_start=True), ckpt_path=path)
    assert told[:2] == [3, 3]


def test_a_longer_run_gives_the_resumed_fine_tuning_its_steps(tmp_path: Path) -> None:
    path = tmp_path / "end.ckpt"
    fit(Restarting(double_mlp()), gap(2, every=3), watch(lambda t, m, d: t.save_checkpoint(path) if d == 2 else None), max_epochs=1)
    again = Restarting(double_mlp())
    fit(again, gap(2, every=3), max_epochs=3, ckpt_path=path)
    assert again.horizons == [3, 3, 18]


def test_a_second_fit_goes_on_where_the_first_one_ended(tmp_path: Path) -> None:
    module, callback = Restarting(double_mlp()), gap(2, every=4)
    trainer = fit(module, callback, max_steps=10, max_epochs=-1)
    assert module.horizons == [4, 4, 2]
    del trainer
    fit(module, callback, max_epochs=1)
    assert module.horizons == [4, 4, 2, 8]  # fine-tuning, a whole run long
    assert callback.step == 18


# ---------------------------------------------------------------------- times


def times(steps: int, **options: Any) -> list[int]:
    callback, window = gap(**({"partitions": 2} | options.pop("method", {}))), options.pop("window", 1)
    fit(Classifier(double_mlp()), callback, max_epochs=-1, max_steps=steps, accumulate_grad_batches=window, **options)
    return callback.times.times()


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ({}, [12, 0, 24]),  # three quarters of 32 steps in two phases
        ({"rounds": 3}, [4, 0, 24]),
        ({"rounds": 5}, [2, 0, 20]),  # rounded down to whole steps
        ({"finetune": 21}, [10, 0, 20]),
        ({"finetune": 1.0}, [16, 0, 32]),
        ({"every": 0.25}, [8, 0, 16]),
        ({"every": 16}, [16, 0, 32]),
        ({"epochs": 1}, [8, 0, 16]),
        ({"epochs": 0.5, "rounds": 2}, [4, 0, 16]),
    ],
)
def test_phases_are_given_in_epochs_steps_or_shares(method: dict[str, Any], expected: list[int]) -> None:
    assert times(32, method=method) == expected


def test_epochs_count_optimizer_steps() -> None:
    assert times(12, method={"epochs": 1}, window=2) == [4, 0, 8]


def test_an_endless_run_takes_phases_in_steps_and_fine_tunes_forever() -> None:
    module, callback, told = Restarting(double_mlp(), lazy=True), gap(2, every=3), []

    def stop(trainer: Any, module: Any, done: int) -> None:
        told.append(horizon(trainer))
        trainer.should_stop = done >= 8

    fit(module, callback, watch(stop), max_epochs=-1, max_steps=-1, min_steps=1)
    assert callback.at_target
    assert told[-1] == math.inf
    with pytest.raises(ValueError, match="fraction of a run whose length is not known"):
        fit(Classifier(double_mlp()), gap(2), max_epochs=-1, max_steps=-1)


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ({"every": 17}, r"2 phases \(rounds= times partitions=\) of 17 optimizer steps each do not fit a run of 32 steps, with every=17"),
        ({"epochs": 3}, "2 phases .* of 24 optimizer steps each do not fit a run of 32 steps, with epochs=3"),
        ({"rounds": 20}, "40 phases .* of 0 optimizer steps each do not fit a run of 32 steps, with finetune=0.75"),
        ({"finetune": 40}, "do not fit a run of 32 steps, with finetune=40"),
        ({"finetune": 33}, "2 phases .* of 16 optimizer steps each do not fit a run of 32 steps, with finetune=33"),
    ],
)
def test_a_calendar_longer_than_the_run_is_refused(method: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        times(32, method=method)


def test_epochs_of_unknown_length_are_refused() -> None:
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self) -> Any:
            return iter([(x, y) for x, y in Batches().all(1)])

    stream = torch.utils.data.DataLoader(Stream(), batch_size=None)
    with pytest.raises(ValueError, match=r"epochs=1 cannot be counted in steps: the train loader has no length\. .* every=1000"):
        fit(Classifier(double_mlp()), gap(2, epochs=1), loader=stream, max_epochs=-1, max_steps=20)
    callback = gap(2, every=2)
    fit(Restarting(double_mlp()), callback, loader=stream, max_epochs=-1, max_steps=6)
    assert callback.at_target


def test_a_trial_run_cuts_instead_of_refusing() -> None:
    for method in ({"every": 100}, {"epochs": 30}, {"rounds": 9}, {}):
        callback = gap(2, **method)
        fit(Restarting(double_mlp()), callback, fast_dev_run=True)
        assert callback.step == 1


def test_a_run_that_ends_in_a_phase_says_so() -> None:
    callback = gap(2, every=8)
    with pytest.warns(UserWarning, match=r"GaP ended after 5 steps, in phase 0 of 2 .* with partition 0 still dense"):
        fit(Classifier(double_mlp()), callback, watch(lambda t, m, d: setattr(t, "should_stop", d >= 4)))
    assert not callback.at_target


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
    assert moved == [[1, 0, 0, 0], [2, 1, 1, 0], [4, 2, 0, 1], [6, 3, 1, 1], [8, 4, -1, 2]]
    assert [row[4] for row in table if row[1] == row[1]][1:] == [1.0] * 4


def test_the_plan_tells_the_partitions() -> None:
    plan = gap(2).plan(deep(3))
    lines = str(plan).splitlines()
    assert lines[:3] == [
        "GaP: sparsity 0.7",
        "partition 0: 0.weight (120 weights)",
        "partition 1: 2.weight, 4.weight (128 weights)",
    ]
    with pytest.raises(ValueError, match=r"asks for 4 partitions, and the sparse layers are only 3: 0\.weight, 2\.weight, 4\.weight"):
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
        ({"rounds": 0}, "rounds=0 is no number of rounds"),
        ({"rounds": 1.5}, r"rounds=1\.5 is no number of rounds"),
        ({"rounds": True}, "rounds=True is no number of rounds"),
        ({"partitions": 1, "rounds": 2}, "rounds=2 of one partition would grow at once what was just pruned"),
        ({"partitions": 0}, "partitions=0 does not say which layers belong together"),
        ({"init": "zero"}, "init='zero' is not known"),
        ({"epochs": 0}, "epochs=0 is no length of time above 0"),
        ({"epochs": True}, "epochs=True is no length of time above 0"),
        ({"epochs": "3"}, "epochs='3' is no length of time above 0"),
        ({"epochs": math.inf}, "epochs=inf is no length of time above 0"),
        ({"every": -2}, "every=-2 is no length of time above 0"),
        ({"every": 1.5}, r"every=1\.5 is outside \[0, 1\]"),
        ({"finetune": 0}, "finetune=0 is no length of time above 0"),
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
    with pytest.raises(ValueError, match=r"CosineAnnealingLR\(T_max=16\) is longer than the phase of 3 .*\.horizon\(self\.trainer"):
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
    assert shown.startswith("GaP(sparsity=0.7, partitions=[['a*'], ['b*']], rounds=1, epochs=None, every=0.1, finetune=None")


# ---------------------------------------------------------------------- runs of another length, and steps that are skipped


class Saves(pl.Callback):
    def __init__(self, path: Path, after: int) -> None:
        self.path, self.after = path, after

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == self.after:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("epochs", [5, 8, 16])
def test_phases_that_have_begun_keep_their_length_in_a_run_of_another(epochs: int, tmp_path: Path) -> None:
    """Saved in phase 1 of three (every 12 steps, by fractions of 6 epochs), resumed with fewer or more epochs."""
    one, other = gap(3), gap(3)
    fit(Classifier(), one, Saves(tmp_path / "run.ckpt", 15), max_epochs=6)
    assert one.times.every == 12
    fit(Classifier(), other, max_epochs=epochs, ckpt_path=tmp_path / "run.ckpt")
    assert other.times.every == 12
    assert other.at_target
    assert other.updates == 3


def test_a_run_that_ends_before_its_phases_do_is_refused(tmp_path: Path) -> None:
    fit(Classifier(), gap(3), Saves(tmp_path / "run.ckpt", 15), max_epochs=6)
    with pytest.raises(ValueError, match=r"laid out up to step 36, and it ends at step 32"):
        fit(Classifier(), gap(3), max_epochs=4, ckpt_path=tmp_path / "run.ckpt")


def test_what_is_finished_stays_in_fine_tuning_in_a_longer_fit() -> None:
    callback, module = gap(2), Classifier(double_mlp())
    fit(module, callback, max_epochs=2)
    masks = {n: m.clone() for n, m in callback.masks.items()}
    fit(module, callback, max_epochs=6)
    assert callback.dense_partition is None
    assert callback.at_target
    assert differences(masks, callback.masks) == []


def test_skipped_steps_do_not_leave_a_partition_dense() -> None:
    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if self.trainer.global_step in (0, 3, 9) else 1.0)

    precision = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    callback, module = gap(2, epochs=1), Overflows()
    fit(module, callback, plugins=[precision])
    assert callback.step == 13
    assert callback.skipped == 3
    assert callback.at_target
    assert_effective(module, callback)


def test_a_run_that_is_stopped_early_is_not_pruned_for_it() -> None:
    class Stops(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.should_stop = trainer.global_step == 10

    callback = gap(2, epochs=1)
    with pytest.warns(UserWarning, match="with partition 1 still dense"):
        fit(Classifier(), callback, Stops(), min_epochs=0)
    assert not callback.at_target


class Fixed(Classifier):
    """A cosine of a fixed length."""

    def __init__(self, length: int) -> None:
        super().__init__(double_mlp())
        self.length = length

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.length)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_a_fixed_schedule_that_fine_tuning_is_too_short_for_is_refused_before_the_first_batch() -> None:
    """Two phases of 7 steps and 2 of fine-tuning."""
    module = Fixed(7)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"CosineAnnealingLR\(T_max=7\) is longer than the phase of 2"):
        fit(module, gap(2, every=7))
    assert differences(before, dict(module.state_dict())) == []
    fit(Fixed(2), gap(2, every=7))


def test_a_schedule_that_a_restart_makes_too_long_is_told_and_the_run_goes_on() -> None:
    class Grows(Fixed):
        def configure_optimizers(self) -> Any:
            horizon(self.trainer)
            self.length = self.length + 2
            return super().configure_optimizers()

    callback = gap(2, every=7)
    with pytest.warns(UserWarning, match=r"T_max=9\) is longer than the phase of 7"):
        fit(Grows(5), callback)
    assert callback.at_target
