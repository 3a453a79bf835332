"""ChannelPruning with when=: one pruning at the start, at a time, or where weights have settled."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.smcp import conv_net
from torch.utils.data import DataLoader

from sparse_callbacks import ChannelPruning, sparsify
from sparse_callbacks.testing.comparison import assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, fit, watch

EPOCH, EPOCHS = 3, 8


class Slowing(Classifier):
    """A learning rate that falls with every epoch, so that weights settle."""

    def __init__(self, seed: int = 0, factor: float = 0.8, rate: float = 0.01) -> None:
        super().__init__(conv_net(seed))
        self.factor, self.rate = factor, rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.rate, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, self.factor)]


def early(budget: float = 0.5, **options: Any) -> ChannelPruning:
    usual: dict[str, Any] = {"criterion": "l1", "round_to": 1, "prune_stem": True, "print_plan": False}
    return ChannelPruning(budget, when="distance", **(usual | options))


def run(callback: ChannelPruning, module: pl.LightningModule, *others: pl.Callback, **options: Any) -> pl.Trainer:
    return fit(module, callback, *others, loader=Batches(batches=EPOCH), max_epochs=EPOCHS, **options)


def expected_epoch(module: Slowing, share: float) -> int | None:
    """By a run of the dense network: the first epoch whose increment is small."""
    initial = torch.cat([p.detach().flatten().clone() for p in module.parameters() if p.ndim > 1])
    ends: list[float] = []

    def note(trainer: pl.Trainer, module: pl.LightningModule, number: int) -> None:
        if number % EPOCH == EPOCH - 1:
            now = torch.cat([p.detach().flatten() for p in module.parameters() if p.ndim > 1])
            ends.append(float((now - initial).double().norm() / initial.double().norm()))

    fit(module, watch(note), loader=Batches(batches=EPOCH), max_epochs=EPOCHS)
    return next((t for t in range(2, EPOCHS + 1) if abs(ends[t - 1] - ends[t - 2]) < share * ends[0]), None)


@pytest.mark.parametrize("budget", [0.3, 0.7])
def test_channels_go_at_the_end_of_the_epoch_in_which_weights_settle(budget: float) -> None:
    epoch = expected_epoch(Slowing(), budget - 0.1)
    assert epoch in (3, 5)
    callback, module, seen = early(budget, stop=1.0), Slowing(), []

    def look(*_: Any) -> None:
        assert_effective(module, callback)
        seen.append((callback.at_target, callback.measured_sparsity()["sparsity/total"] > 0, len(callback.aux)))

    run(callback, module, watch(look))
    steps = epoch * EPOCH
    assert [done for done, *_ in seen] == [n >= steps for n in range(1, EPOCH * EPOCHS + 1)]
    assert [pruned for _, pruned, _ in seen] == [done for done, *_ in seen]
    assert callback.network.realised(callback.kept) <= budget * callback.network.dense
    assert callback.progress.done == {0: steps}
    assert callback.updates == 1
    figures = callback.figures()
    assert figures["channels/fired"] == 1.0
    assert figures["channels/threshold"] == pytest.approx((budget - 0.1) * callback.aux["trigger/distances"][0].item())
    assert not [key for key in callback.aux if key.startswith("initial/")]  # as large as the network


def test_distances_of_the_run_can_be_told_apart() -> None:
    """The two budgets of the test above fire at different times, so that the tolerance matters."""
    assert expected_epoch(Slowing(), 0.2) != expected_epoch(Slowing(), 0.6)


def test_what_has_not_settled_by_stop_is_pruned_then_with_a_warning() -> None:
    callback, module = early(0.5, stop=10), Slowing(factor=3.0, rate=0.005)
    with pytest.warns(UserWarning, match=r"ChannelPruning prunes at step 10, its stop=.* last increment was .* below"):
        run(callback, module)
    assert callback.progress.done == {0: 10}
    assert callback.figures()["channels/fired"] == 1.0
    assert len(callback.aux["trigger/distances"]) == 3  # nothing was measured within an epoch


def test_a_stop_before_the_second_epoch_says_why_the_distance_cannot_decide() -> None:
    callback = early(0.5, stop=2)
    with pytest.warns(UserWarning, match=r"prunes at step 2, .*it takes the ends of two epochs, and there were 0"):
        run(callback, Slowing())
    assert callback.progress.done == {0: 2}


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("criterion", ["l1", "crop", "taylor_fo"])
def test_a_resume_at_any_point_is_bitwise(criterion: str, tmp_path: Path) -> None:
    """Within the first epochs, at and between looks, right at the pruning, and after it."""

    def make() -> ChannelPruning:
        return early(0.5, criterion=criterion, **({"batches": 1} if criterion == "crop" else {}))

    after = (2, 6, 8, 9, 10)
    callback, module, stops = make(), Slowing(), Stops(tmp_path, after)
    expected = snapshot(run(callback, module, stops), module, callback)
    fired = int(callback.aux["trigger/pruned"])
    assert fired == 9
    for batch in after:
        other, resumed = make(), Slowing(7)
        found = snapshot(run(other, resumed, ckpt_path=stops.path(batch)), resumed, other)
        assert differences(expected, found) == [], batch
        waits = torch.load(stops.path(batch), weights_only=True)["callbacks"][other.state_key]["aux"]
        assert any(key.startswith("initial/") for key in waits) == (batch < fired)


def test_a_damaged_state_without_initial_values_is_refused(tmp_path: Path) -> None:
    stops = Stops(tmp_path, (4,))
    run(early(), Slowing(), stops)
    saved = torch.load(stops.path(4), weights_only=True)
    (state,) = (s for key, s in saved["callbacks"].items() if key.startswith("ChannelPruning"))
    assert any(key.startswith("initial/") for key in state["aux"])
    del state["aux"][next(key for key in state["aux"] if key.startswith("initial/"))]
    torch.save(saved, tmp_path / "damaged.ckpt")
    with pytest.raises(ValueError, match=r"has 'initial/net\..* in 'aux' no more"):
        run(early(), Slowing(), ckpt_path=tmp_path / "damaged.ckpt")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_loop_prunes_at_the_same_step_as_a_trainer() -> None:
    callback, module = early(0.5), Slowing()
    run(callback, module)
    net, loader = conv_net(), Batches(batches=EPOCH)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.5)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.8)
    method = early(0.5)
    run_of = sparsify(method, net, optimizer, EPOCH * EPOCHS, epoch=EPOCH, data=DataLoader(loader.x, batch_size=6))
    for epoch in range(EPOCHS):
        loader.set_epoch(epoch)
        for x, y in loader:
            torch.nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        scheduler.step()
    run_of.close()
    assert method.progress.done == callback.progress.done
    assert differences(dict(method.masks), {n.removeprefix("net."): m for n, m in callback.masks.items()}) == []


# ---------------------------------------------------------------------- start, and times


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("when", "alias"),
    [
        ("start", {"start": 0, "stop": 0}),
        (5, {"start": 5, "stop": 5}),
        (0.25, {"start": 0.25, "stop": 0.25}),
        (0.001, {"start": 1, "stop": 1}),  # rounds to no step, and there is none before the first one
    ],
    ids=["start", "steps", "fraction", "less than a step"],
)
def test_one_word_for_the_times_of_one_pruning(when: Any, alias: dict[str, Any]) -> None:
    usual: dict[str, Any] = {"criterion": "l1", "round_to": 1, "prune_stem": True, "print_plan": False}
    one, other = ChannelPruning(0.5, when=when, **usual), ChannelPruning(0.5, **alias, **usual)
    first, second = Slowing(), Slowing()
    run(one, first)
    run(other, second)
    assert one.progress.done == other.progress.done
    assert one.times == other.times
    assert differences(dict(one.masks), dict(other.masks)) == []
    assert differences(first.state_dict(), second.state_dict()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"when": "later"}, r"when='later' is not known\. Give 'start', 'distance', a time"),
        ({"when": 0}, r"when=0 is before the first step\. Give when='start'"),
        ({"when": True}, r"when=True is not a time"),
        ({"when": 1.5}, r"when=1\.5 is outside \[0, 1\]"),
        ({"when": 5, "stop": 9}, r"stop= beside when=5, which says already when channels go\. Leave it out"),
        ({"when": "distance", "every": 3, "start": 2}, r"every= and start= beside when='distance'"),
        (
            {"when": "start", "criterion": "taylor_fo"},
            r"criterion='taylor_fo' scores channels by the gradients of training",
        ),
        ({"when": "distance", "budget": 0.1}, r"can never prune 0\.9 of a network by channels"),
    ],
    ids=["word", "zero", "bool", "fraction", "stop", "every", "needs steps", "never"],
)
def test_times_that_cannot_be_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ChannelPruning(**options)
