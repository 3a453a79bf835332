"""EarlyCroP: when it prunes, its rounds, new optimizers after it, and runs that are resumed at any point."""

import copy
import math
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.early_crop import ROUNDS
from torch import Tensor, nn
from torch.nn import functional

from sparse_callbacks import EarlyCroP, PruneAtStart, horizon, methods, sparsify
from sparse_callbacks.core.scored_start import ranked_masks
from sparse_callbacks.methods.prune_at_start.early_crop import early_sparsity
from sparse_callbacks.methods.prune_at_start.prune_at_start import sparsity_in_rounds
from sparse_callbacks.testing.comparison import assert_counts, assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, conv_net, loss_on
from sparse_callbacks.testing.runs import Stops, fit, watch

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers", "ignore:You defined a `validation_step`")
EPOCH, EPOCHS = 3, 8


class Slowing(Classifier):
    """A learning rate that falls with every epoch, so that weights settle."""

    def __init__(self, seed: int = 0, factor: float = 0.6, rate: float = 0.02) -> None:
        super().__init__(conv_net(seed))
        self.factor, self.rate = factor, rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.factor)]


class Restarted(Slowing):
    """Adam, and a schedule as long as its optimizer lives."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(seed)
        self.lives: list[float] = []

    def configure_optimizers(self) -> Any:
        life = horizon(self.trainer)
        self.lives.append(life)
        optimizer = torch.optim.Adam(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=0.01, total_steps=max(2, int(life)))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def early(sparsity: float = 0.8, **options: Any) -> EarlyCroP:
    return EarlyCroP(sparsity, **({"batches": 2, "rounds": 4, "print_plan": False} | options))


def run(callback: pl.Callback, module: pl.LightningModule, *others: pl.Callback, **options: Any) -> pl.Trainer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(module, callback, *others, loader=Batches(batches=EPOCH), max_epochs=EPOCHS, **options)


# ---------------------------------------------------------------------- rounds


def zeros_of_rounds(sparsity: float, **options: Any) -> list[int]:
    """The zeros that each round of a pruning leaves, of 1,003 weights."""
    net = nn.Linear(59, 17, bias=False)
    loss: Any = lambda module, batch: module(batch).square().mean()  # noqa: E731
    zeros: list[int] = []

    class Seen(methods.EarlyCroP):
        pass

    @ranked_masks.register
    def _(method: Seen, scores: Any, masks: Any, way: float) -> dict[str, Tensor]:
        made = ranked_masks.dispatch(methods.EarlyCroP)(method, scores, masks, way)
        zeros.append(int((~made["weight"]).sum()))
        return made

    torch.manual_seed(0)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
    seen = Seen(sparsity, when=1, batches=[torch.randn(4, 59)], loss=loss, print_plan=False, **options)
    with sparsify(seen, net, optimizer, 2):
        loss(net, torch.randn(4, 59)).backward()
        optimizer.step()
    return zeros


def test_the_sparsities_of_the_table() -> None:
    number = ROUNDS["rounds"]
    found = [early_sparsity(ROUNDS["limit"], i, number) for i in range(number)]
    assert found == pytest.approx(ROUNDS["sparsities"], abs=1e-12)
    method = methods.EarlyCroP(ROUNDS["limit"], rounds=number)
    assert [sparsity_in_rounds(method, ROUNDS["limit"], k / number) for k in range(1, number + 1)] == found
    assert zeros_of_rounds(0.9) == ROUNDS["zeros"]


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_up_to_a_half_one_round_prunes_all_that_there_is_to_prune(sparsity: float) -> None:
    assert zeros_of_rounds(sparsity, rounds=4) == [int(sparsity * 1003)]
    assert methods.EarlyCroP(sparsity, rounds=4).rounds == 4
    # shares of layers may be above the half
    assert len(zeros_of_rounds(sparsity, rounds=4, distribution={"*": 0.6})) == 4


@pytest.mark.parametrize("sparsity", [0.2, 0.5])
def test_no_round_prunes_more_than_the_target(sparsity: float) -> None:
    assert [early_sparsity(sparsity, i, 5) for i in range(5)] == [sparsity] * 5


@pytest.mark.parametrize("distribution", ["global", "uniform", "lamp", {"net.0*": 0.5, "*": "lamp"}], ids=str)
def test_one_round_is_the_mask_of_prune_at_start_on_these_weights(distribution: Any) -> None:
    callback, module = early(when=5, rounds=1, distribution=distribution), Slowing()
    dense = Slowing()
    stops: list[dict[str, Tensor]] = []
    fit(
        dense,
        watch(lambda trainer, module, n: stops.append(copy.deepcopy(module.state_dict()))),
        max_epochs=2,
        loader=Batches(batches=3),
    )
    run(callback, module)
    other, again = PruneAtStart(0.8, score="crop", batches=2, distribution=distribution, print_plan=False), Slowing()
    again.load_state_dict(stops[4])
    run(other, again)
    assert differences(dict(callback.masks), dict(other.masks)) == []
    assert_counts(callback)


def test_rounds_are_scored_anew() -> None:
    once, often = early(when=5, rounds=1), early(when=5, rounds=6)
    run(once, Slowing())
    run(often, Slowing())
    assert sum(int((~m).sum()) for m in once.masks.values()) == sum(int((~m).sum()) for m in often.masks.values())
    assert differences(dict(once.masks), dict(often.masks)) != []


# ---------------------------------------------------------------------- times


def expected_epoch(module: Slowing, sparsity: float) -> int | None:
    """By a run of the dense network."""
    initial = torch.cat([p.detach().flatten().clone() for p in module.parameters() if p.ndim > 1]).double()
    ends: list[float] = []

    def note(trainer: pl.Trainer, module: pl.LightningModule, number: int) -> None:
        if number % EPOCH == EPOCH - 1:
            now = torch.cat([p.detach().flatten() for p in module.parameters() if p.ndim > 1]).double()
            ends.append(float((now - initial).norm() / initial.norm()))

    fit(module, watch(note), loader=Batches(batches=EPOCH), max_epochs=EPOCHS)
    return next((t for t in range(2, EPOCHS + 1) if abs(ends[t - 1] - ends[t - 2]) < (1 - sparsity) * ends[0]), None)


@pytest.mark.parametrize("sparsity", [0.6, 0.9])
def test_it_is_dense_until_weights_settle_and_static_from_then_on(sparsity: float) -> None:
    epoch = expected_epoch(Slowing(), sparsity)
    assert epoch == {0.6: 3, 0.9: 6}[sparsity]
    callback, module, seen = early(sparsity, stop=1.0), Slowing(), []
    before = callback.plan(module)

    def look(*_: Any) -> None:
        assert_effective(module, callback)
        seen.append({n: m.clone() for n, m in callback.masks.items()})

    run(callback, module, watch(look))
    steps = epoch * EPOCH
    assert all(m.all() for masks in seen[: steps - 1] for m in masks.values())
    assert all(differences(masks, seen[steps - 1]) == [] for masks in seen[steps - 1 :])
    assert_counts(callback)
    assert callback.plan().zeros == before.zeros == math.floor(sparsity * before.weights)
    assert callback.figures()["early_crop/fired"] == 1.0
    assert (callback.updates, callback.progress.done, callback.at_target) == (1, {0: steps}, True)
    assert not [key for key in callback.aux if key.startswith("initial/")]


class SixTenths:
    """A distribution that sees the model."""

    def shares(self, model: nn.Module, entries: Any) -> dict[str, float]:
        return {layer: 0.6 for entry in entries if not entry.reason for layer in entry.layers}


@pytest.mark.parametrize(
    "distribution",
    [{"*": 0.6}, lambda shapes, _: dict.fromkeys(shapes, 0.6), SixTenths()],
    ids=["by layer", "function", "of the model"],
)
def test_the_distance_goes_by_what_the_distribution_plans(distribution: Any) -> None:
    # sparsity= is at its default of 0.9, which nobody reads
    callback, module = EarlyCroP(distribution=distribution, stop=1.0, print_plan=False), Slowing()
    assert callback.plan(module).total == pytest.approx(0.6, abs=0.01)
    run(callback, module)
    assert int(callback.aux["trigger/pruned"]) == 3 * EPOCH == EPOCH * (expected_epoch(Slowing(), 0.6) or 0)


def test_a_distance_that_never_settles_prunes_at_stop_with_a_warning() -> None:
    callback, module = early(0.8, stop=10), Slowing(factor=3.0, rate=0.003)
    with pytest.warns(
        UserWarning, match=r"EarlyCroP prunes at step 10, its stop=, as the distance .* last increment was"
    ):
        fit(module, callback, loader=Batches(batches=EPOCH), max_epochs=EPOCHS)
    assert callback.progress.done == {0: 10}
    assert_counts(callback)


def test_a_run_that_ends_before_the_pruning_says_so() -> None:
    callback = early(0.8, when=30)
    with pytest.warns(
        UserWarning,
        match=r"EarlyCroP ended at sparsity 0\.0000, .* due at step 30\. Train longer, or give an earlier when=",
    ):
        fit(Slowing(), callback, loader=Batches(batches=EPOCH), max_epochs=2)
    assert not callback.at_target


def test_weights_that_are_all_zero_have_no_distance() -> None:
    module = Slowing()
    with torch.no_grad():
        for p in module.parameters():
            p.zero_()
    with pytest.raises(ValueError, match=r"relative to their initial values, and these are all zero"):
        run(early(score="magnitude", rounds=1, batches=1), module)


# ---------------------------------------------------------------------- resume


@pytest.mark.parametrize(
    "options",
    [{}, {"distribution": "lamp"}, {"lr_after": "restart"}, {"when": 8, "lr_after": "restart"}],
    ids=["on", "lamp", "restart", "time"],
)
def test_a_resume_at_any_point_is_bitwise(options: dict[str, Any], tmp_path: Path) -> None:
    def module_of(seed: int) -> Slowing:
        return Restarted(seed) if "lr_after" in options else Slowing(seed)

    after = (2, 6, 8, 9, 10, 13)
    callback, module, stops = early(0.6, **options), module_of(0), Stops(tmp_path, after)
    expected = snapshot(run(callback, module, stops), module, callback)
    pruned = int(callback.aux["trigger/pruned"])
    assert 5 < pruned <= 12
    for batch in after:
        other, resumed = early(0.6, **options), module_of(7)
        found = snapshot(run(other, resumed, ckpt_path=stops.path(batch)), resumed, other)
        assert differences(expected, found) == [], batch
        aux = torch.load(stops.path(batch), weights_only=True)["callbacks"][other.state_key]["aux"]
        assert any(key.startswith("initial/") for key in aux) == (batch < pruned and "when" not in options)


class Two(pl.LightningModule):
    """Two optimizers, of which the second steps after the first."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.automatic_optimization = False
        self.one, self.two = nn.Linear(50, 12), nn.Linear(12, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.one(x.flatten(1)).tanh())

    def training_step(self, batch: Any, batch_idx: int) -> None:
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(functional.cross_entropy(self(batch[0]), batch[1]))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        return [torch.optim.SGD(m.parameters(), lr=0.01, momentum=0.5) for m in (self.one, self.two)]


def loss_of_two(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def test_one_ranking_over_several_optimizers(tmp_path: Path) -> None:
    """Each takes its masks with a step of its own, and a resume in between goes on with the same ones."""
    callback, module, stops = early(0.8, when=4, loss=loss_of_two), Two(), Stops(tmp_path, (3, 4, 5))
    expected = snapshot(run(callback, module, stops), module, callback)
    assert_counts(callback)
    assert callback.at_target
    assert callback.plan().joint is not None
    for batch in (3, 4, 5):
        other, resumed = early(0.8, when=4, loss=loss_of_two), Two(5)
        found = snapshot(run(other, resumed, ckpt_path=stops.path(batch)), resumed, other)
        assert differences(expected, found) == [], batch
    saved = torch.load(stops.path(4), weights_only=True)["callbacks"][callback.state_key]
    waiting = [key for key in saved["aux"] if key.startswith("pending/")]
    assert waiting in ([], ["pending/one.weight"])


# ---------------------------------------------------------------------- new optimizers


def test_optimizers_and_schedules_begin_anew_after_the_pruning() -> None:
    callback, module, rates = early(0.6, when=8, lr_after="restart"), Restarted(), []
    run(callback, module, watch(lambda trainer, *_: rates.append(trainer.optimizers[0].param_groups[0]["lr"])))
    assert module.lives == [8, EPOCH * EPOCHS - 8]
    assert callback.progress.done == {0: 8}
    (optimizer,) = [o for o in [module.optimizers()] if o is not None]
    steps = {int(s["step"]) for s in optimizer.state.values()}
    assert steps == {EPOCH * EPOCHS - 8}
    assert rates[7] < rates[0] * 2  # the first cycle has come to its end,
    assert max(rates[8:]) > 10 * rates[7]  # and another one begins


def test_they_go_on_otherwise() -> None:
    callback, module = early(0.6, when=8), Restarted()
    run(callback, module)
    assert module.lives == [EPOCH * EPOCHS]


def test_a_schedule_that_the_pruning_would_cut_off_is_refused() -> None:
    class Long(Slowing):
        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, EPOCH * EPOCHS)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    with pytest.raises(
        ValueError, match=r'T_max=24\) is longer than the phase of 12 .*or keep one schedule .* lr_after="continue"'
    ):
        run(early(lr_after="restart"), Long())
    run(early(), Long())


# ---------------------------------------------------------------------- loops and refusals


def looped(method: methods.EarlyCroP, restarts: list[int] | None = None) -> Any:
    net, loader = conv_net(), Batches(batches=EPOCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.6)
    again = None if restarts is None else lambda: restarts.append(method.step)
    found = sparsify(method, net, optimizer, EPOCH * EPOCHS, epoch=EPOCH, on_restart=again)
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for x, y in loader:
            functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    found.close()
    return found


def test_a_loop_prunes_as_a_trainer_does() -> None:
    batches = list(Batches(batches=2))
    callback, module = early(0.8, batches=batches, loss=loss_on), Slowing()
    run(callback, module)
    method = methods.EarlyCroP(0.8, batches=batches, rounds=4, loss=loss_on, print_plan=False)
    looped(method)
    assert method.progress.done == callback.progress.done
    assert differences({f"net.{n}": m for n, m in method.masks.items()}, dict(callback.masks)) == []


def test_a_loop_starts_its_optimizers_anew() -> None:
    restarts: list[int] = []
    method = methods.EarlyCroP(
        0.8, when=8, lr_after="restart", batches=list(Batches(batches=2)), loss=loss_on, print_plan=False
    )
    looped(method, restarts)
    assert restarts == [8]
    with pytest.raises(ValueError, match=r'lr_after="restart"\) starts the optimizers anew .* or lr_after="continue"'):
        looped(copy.deepcopy(method))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "soon"}, r"when='soon' is not known\. Give 'start' or 'distance', or a time in optimizer steps"),
        ({"when": 0}, r"when=0 is before the first step\. Give when='start'"),
        ({"when": 1.5}, r"when=1\.5 is outside \[0, 1\]"),
        ({"when": True}, r"when=True is not a time"),
        ({"when": -1}, r"when=-1 lies before the run"),
        ({"when": "start", "lr_after": "restart"}, r"lr_after='restart' starts optimizers anew after the pruning"),
        ({"lr_after": "again"}, r"lr_after='again'"),
        ({"stop": 2.0}, r"stop=2\.0 is outside \[0, 1\]"),
        ({"stop": 0}, r"stop=0 is before the first step\. Give when='start'"),
        ({"score": "magnitude", "batches": 1}, r"rounds=7: score='magnitude' is the same in every round"),
    ],
    ids=["word", "zero", "fraction", "bool", "negative", "restart", "after", "late", "no stop", "rounds"],
)
def test_arguments_that_no_run_can_use_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EarlyCroP(0.9, **options)


@pytest.mark.parametrize("method", [PruneAtStart, EarlyCroP], ids=lambda m: m.__name__)
def test_a_share_of_a_short_run_is_a_step_of_it(method: Any) -> None:
    net = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    callback = method(0.5, when=0.01, score="magnitude", rounds=1, print_plan=False)
    with sparsify(callback, net, optimizer, 10) as pruned:  # a hundredth of ten steps rounds to none
        net(torch.ones(1, 4)).sum().backward()
        optimizer.step()
        assert int((~pruned.masks["weight"]).sum()) == 8


def test_an_endless_run_asks_for_a_time_in_steps_by_its_own_name() -> None:
    net = nn.Linear(4, 4)
    with pytest.raises(
        ValueError, match=r"when=0\.5 is a fraction of a run whose length is not known.* e\.g\. when=1000"
    ):
        sparsify(
            methods.PruneAtStart(0.5, when=0.5, score="magnitude"),
            net,
            torch.optim.SGD(net.parameters(), 0.1),
            math.inf,
        )


@pytest.mark.parametrize(("score", "rounds"), [("synflow", 7), ("magnitude", 1), ("random", 1)])
def test_scores_without_data_need_no_word_about_batches(score: str, rounds: int) -> None:
    method = EarlyCroP(0.8, score=score, rounds=rounds)
    assert method.arguments["batches"] == "5"  # as it stands in the signature
    with pytest.raises(ValueError, match="batches= says nothing to score="):
        EarlyCroP(0.8, score=score, rounds=rounds, batches=4)


@pytest.mark.parametrize(("argument", "value"), [("reinit_after", True), ("rescale", "layer")])
def test_what_fresh_weights_have_is_refused_of_trained_ones(argument: str, value: Any) -> None:
    with pytest.raises(
        ValueError, match=rf"{argument}={value!r} is of fresh weights, and with when=5 they are trained"
    ):
        PruneAtStart(0.9, when=5, **{argument: value})


def test_a_loss_that_is_missing_is_refused_before_the_first_batch() -> None:
    net = conv_net()
    with pytest.raises(ValueError, match=r"loss="):
        sparsify(methods.EarlyCroP(0.8, print_plan=False), net, torch.optim.SGD(net.parameters(), lr=0.1), 10, epoch=2)
