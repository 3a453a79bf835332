"""SMCP: the soft mask, budgets, importance, and gains of norms."""

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.smcp import NORM_SCALING, PRUNED_DECAY, SCHEDULES, SOFT_MASK
from support.inside import (
    Moment,
    around_updates,
    copied_names,
    count_kept_channels,
    dense_values,
    give_calendar,
    record_scores,
    scores_of,
)
from support.smcp import Joined, conv_net, mask_by_hand, method, mlp, normed
from torch import Tensor, nn

from sparse_callbacks import SMCP
from sparse_callbacks.channels import costs, norms
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.latency.table import Grid, Table, signature
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.methods.smcp import smcp
from sparse_callbacks.methods.smcp.scores import group_scores, reader_scores
from sparse_callbacks.testing.comparison import assert_effective, differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# ---------------------------------------------------------------------- the soft mask


class Product(pl.LightningModule):
    """2 * w x behind an identity whose outputs are the channels."""

    def __init__(self) -> None:
        super().__init__()
        weight, _, x, _, _ = SOFT_MASK
        self.first, self.last = nn.Linear(3, 3, bias=False), nn.Linear(3, 1, bias=False)
        self.first.weight = nn.Parameter(torch.eye(3), requires_grad=False)
        self.last.weight.data.copy_(torch.tensor([weight]))
        self.example_input_array = torch.tensor([x]).float()
        self.losses: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = 2 * self(self.example_input_array).sum()
        self.losses.append(float(loss))
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.last.parameters(), lr=1.0)


@pytest.mark.parametrize("decay", [0.0, PRUNED_DECAY[2]])
def test_the_gradient_passes_the_mask_and_pruned_weights_decay(decay: float) -> None:
    weight, mask, _, forward, gradient = SOFT_MASK
    assert PRUNED_DECAY[:2] == (weight, mask)
    added = PRUNED_DECAY[3] if decay else [0.0] * 3
    callback, module = method(decay=decay, round_to=1, start=50, stop=60), Product()
    fit(module, callback, mask_by_hand(callback, "last.weight", mask), max_steps=1)
    assert module.losses == [forward]
    expected = [w - g - a for w, g, a in zip(weight, gradient, added, strict=True)]
    assert dense_values(callback, "last.weight")[0].tolist() == pytest.approx(expected, abs=1e-6)
    assert module.last.weight[0].tolist() == pytest.approx(
        [e * m for e, m in zip(expected, mask, strict=True)], abs=1e-6
    )


def test_weights_are_effective_after_every_batch_and_pruned_ones_learn() -> None:
    callback, module, moved = method(0.4), Classifier(conv_net()), [0]
    last: dict[str, Tensor] = {}

    def check(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        assert_effective(module, callback)
        assert bool(copied_names(callback)) == (index < 13)
        for name in copied_names(callback):
            dense = dense_values(callback, name)
            assert torch.equal(dense[callback.masks[name]], module.get_parameter(name)[callback.masks[name]])
            if name in last:
                moved[0] += int((dense != last[name])[~callback.masks[name]].sum())
            last[name] = dense.clone()

    fit(module, callback, watch(check))
    assert moved[0] > 1000


# ---------------------------------------------------------------------- budgets


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
@pytest.mark.parametrize(
    ("cost", "budget"), [("parameters", 0.6), ("parameters", 0.3), ("flops", 0.5), ("flops", 0.25)]
)
def test_the_slimmed_network_meets_the_budget_and_equals_the_masked_one(
    cost: str, budget: float, importance: str
) -> None:
    callback, module = method(budget, cost=cost, importance=importance), Classifier(conv_net())
    fit(module, callback)
    assert callback.at_target
    share = callback.network.realised(callback.kept) / callback.network.dense
    assert 0.5 * budget < share <= budget
    assert all(k % 4 == 0 for k in callback.kept)
    x = torch.randn(6, 2, 5, 5)
    small, proof = slim(module.net, {n.removeprefix("net."): m for n, m in callback.masks.items()}, x)
    module.eval()
    small.eval()
    assert torch.allclose(small(x), module(x), atol=1e-5)
    assert proof.removed == sum(g.size for g in callback.groups) - sum(callback.kept)
    found = costs.layers(small, x)
    each = {"parameters": costs.parameters, "flops": costs.flops}[cost]
    assert sum(each(layer, layer.inputs, layer.outputs) for layer in found.values()) == callback.network.realised(
        callback.kept
    )


def test_the_stems_inputs_and_the_classifiers_outputs_stay() -> None:
    callback, module = method(0.3), Classifier(conv_net())
    fit(module, callback)
    assert {g.name for g in callback.groups} == {"net.0", "net.3.one", "net.6"}
    assert "outputs of the network" in callback.left_out["net.10"]
    assert callback.masks["net.0.weight"].all()
    assert callback.masks["net.10.weight"].any(1).all()
    for group in callback.groups:  # whole channels, the same in all layers
        for reader in group.consumers:
            mask = callback.masks[reader.parameter]
            mask = mask.view(4, 24, 9) if reader.module == "net.10" else mask.flatten(2)
            assert torch.equal(mask, mask[:1, :, :1].expand(mask.shape))
            assert int(mask[0, :, 0].sum()) == callback.kept[callback.groups.index(group)]


def test_layers_that_exclude_names_keep_their_channels() -> None:
    callback = method(0.8, exclude="net.0.weight")
    fit(Classifier(conv_net()), callback)
    assert "net.0" in callback.left_out
    assert {g.name for g in callback.groups} == {"net.3.one", "net.6"}
    assert all(callback.masks[n].all() for n in ("net.3.one.weight", "net.6.weight"))
    for ends, stay in (("first", {"net.0"}), ("last", {"net.6"}), ("both", {"net.0", "net.6"})):
        kept = method(0.9, keep_dense=ends, include=None)
        fit(Classifier(conv_net()), kept)
        assert stay | {"net.10"} == kept.left_out.keys()
    part = method(0.9, include=["net.0*", "net.3*", "net.6*"])
    fit(Classifier(conv_net()), part)
    assert part.left_out["net.6"] == "net.10.weight stay dense (see plan())"


def test_the_stem_stays_unless_it_is_named() -> None:
    callback, module = method(0.6, prune_stem=False), Classifier(conv_net())
    fit(module, callback)
    assert callback.left_out["net.0"] == "net.0 is the stem"
    assert {g.name for g in callback.groups} == {"net.3.one", "net.6"}
    assert all(callback.masks[n].all() for n in ("net.0.weight", "net.3.one.weight", "net.6.weight"))
    no_stem = method(0.6, prune_stem=False)  # hidden units of a perceptron are channels like any others
    fit(Classifier(mlp()), no_stem)
    assert {g.name for g in no_stem.groups} == {"net.1", "net.3"}


def test_the_last_solve_has_the_full_budget_and_masks_stay_afterwards() -> None:
    callback, module = method(0.5, every=5, start=1, stop=13), Classifier(conv_net())
    masks: list[dict[str, Tensor]] = []
    shares: dict[int, float] = {}

    def record(_: Moment) -> None:
        shares[callback.step] = callback.share_at(callback.step)
        assert callback.network.realised(callback.kept) <= shares[callback.step] * callback.network.dense

    around_updates(callback, after=record)
    fit(module, callback, watch(lambda *_: masks.append(callback.masks)))
    assert list(shares) == [1, 6, 11, 13]
    assert shares[13] == 0.5
    assert list(shares.values()) == sorted(shares.values(), reverse=True)
    assert shares[1] < 1
    assert all(differences(masks[12], m) == [] for m in masks[13:])


@pytest.mark.parametrize("case", [c for c in SCHEDULES if c[0] == "exp"], ids=str)
def test_solves_at_the_published_times_have_the_published_budgets(case: tuple[str, float, int, int, int]) -> None:
    """A step for an epoch; the published rate of 0.05 an epoch belongs to a ramp of 55."""
    curve, final, epochs, warmup, full = case
    callback = SMCP(1 - final, curve=curve)
    give_calendar(callback, 1, warmup, epochs - full)
    for epoch, expected in SCHEDULES[case].items():
        if epoch >= warmup and (epochs == 90 or epoch >= epochs - full):
            assert 1 - callback.share_at(epoch) == pytest.approx(expected, abs=6e-7)


def test_a_latency_budget_is_met_by_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    net = conv_net()
    grids = {}
    for layer in costs.layers(net, torch.zeros(1, 2, 5, 5)).values():
        ins, outs = [1, layer.inputs], [1, layer.outputs]
        cells = [[1.0 + costs.multiply_adds(layer, i, o) / 1e3 for o in outs] for i in ins]
        grids[signature(layer, layer.maps[0])] = Grid(ins, outs, [[c[-1]] for c in cells] if layer.depthwise else cells)
    about = {"model": "net", "input": [2, 5, 5], "torch": "1.0"}
    Table(about, grids, constant=3.0, factor=2.0).save(tmp_path / "t.json")
    callback = method(0.6, cost=str(tmp_path / "t.json"), print_plan=True)
    with pytest.warns(UserWarning, match=r"the latency table of net was measured with torch 1\.0, and here it is"):
        fit(Classifier(net), callback)
    assert 0.4 < callback.network.realised(callback.kept) / callback.network.dense <= 0.6
    alone = sum(
        1.0 + costs.multiply_adds(layer, layer.inputs, layer.outputs) / 1e3
        for layer in callback.network.layers.values()
    )
    assert callback.network.dense == pytest.approx(3 + 2 * alone)
    told = r"of \d+ sizes of layers looked up in the latency table: \d+ measured, \d+ rounded up, \d+ interpolated\."
    assert re.search(told, capsys.readouterr().out)


def test_chunks_of_channels_stay_together() -> None:
    callback = method(0.4, chunk=2, round_to=2)
    fit(Classifier(conv_net()), callback)
    pairs = callback.masks["net.6.weight"][0, :, 0, 0].view(-1, 2)
    assert bool((pairs[:, 0] == pairs[:, 1]).all())
    assert not pairs.all()


# ---------------------------------------------------------------------- importance


def test_scores_are_the_mean_over_the_window_of_what_each_step_says() -> None:
    """Recomputed by hand from gradients and dense weights of every step."""
    callback, module = method(start=6, stop=12, every=6, round_to=1), Classifier(mlp())
    by_hand: list[Tensor] = []

    def look(*_: Any) -> None:
        if len(by_hand) < 6:
            name = "net.3.weight"
            by_hand.append((-dense_values(callback, name) * module.get_parameter(name).grad).sum(0).abs())

    seen = record_scores(callback)
    fit(module, pl.callbacks.LambdaCallback(on_before_optimizer_step=look), callback, max_steps=6)
    assert torch.allclose(seen[0], torch.stack(by_hand).mean(0))
    kept = [t for key, t in callback.aux.items() if key.startswith(("scores.", "steps."))]
    assert len(kept) == 4
    assert all(not t.any() for t in kept)  # the next window begins


@pytest.mark.parametrize("second", [8, 12])
@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_groups_that_one_layer_reads_have_scores_of_their_own(second: int, importance: str) -> None:
    callback, module = (
        method(start=6, stop=12, every=6, round_to=1, importance=importance),
        Classifier(Joined(second).double()),
    )
    by_hand: list[Tensor] = []

    def look(*_: Any) -> None:
        dense = dense_values(callback, "net.c.weight")
        by_hand.append((-dense * module.net.c.weight.grad).sum(0).abs())

    seen = record_scores(callback)
    fit(module, pl.callbacks.LambdaCallback(on_before_optimizer_step=look), callback, max_steps=6)
    expected = (
        torch.stack(by_hand).mean(0) if importance == "taylor" else dense_values(callback, "net.c.weight").abs().sum(0)
    )
    assert [g.name for g in callback.groups] == ["net.a", "net.b"]
    torch.testing.assert_close(seen, [expected[:8], expected[8:]])


def test_outputs_that_are_pruned_do_not_count() -> None:
    callback, module = method(start=50, stop=60, round_to=1, importance="magnitude"), Classifier(mlp())
    fit(module, callback, mask_by_hand(callback, "net.5.weight", [1] * 6 + [0] * 6), max_steps=1)
    count_kept_channels(callback)
    first = [g.name for g in callback.groups].index("net.1")
    assert torch.allclose(scores_of(callback)[first], dense_values(callback, "net.3.weight")[:6].abs().sum(0))


def test_the_absolute_value_comes_after_the_sum_over_a_groups_layers() -> None:
    readers = tuple(Member(n, f"{n}.weight", 1, "in", torch.arange(3)) for n in "ab")
    group = Group("p", 3, (), readers, ())
    weights = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(2, 3)}
    gradients = {
        "a.weight": torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]),
        "b.weight": torch.tensor([[-1.0, 0.0, 0.0], [0, 0, 5]]),
    }
    found = group_scores(group, reader_scores([group], weights, gradients, {}))
    assert found is not None
    assert found.tolist() == [0.0, 2.0, 8.0]
    assert group_scores(group, reader_scores([group], weights, {}, {})) is None


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_a_pruned_channel_whose_importance_is_raised_returns_at_the_next_solve(importance: str) -> None:
    callback, module = method(0.3, importance=importance, every=4, start=2, stop=14, round_to=1), Classifier(mlp())
    name, found = "net.3.weight", []

    def raise_one(trainer: pl.Trainer, module: Classifier, index: int) -> None:
        mask = callback.masks[name].any(0)
        if index == 9:  # ten steps taken, a solve has just been
            pruned = int((~mask).nonzero()[0])
            dense_values(callback, name)[:, pruned] = 1e3
            found.append(pruned)
        if index == 12:
            assert not mask[found[0]]
        if index == 13:
            assert mask[found[0]]
            found.append(-1)

    fit(module, callback, watch(raise_one))
    assert found[1:] == [-1]


@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_scores_of_pruned_channels_count_less_at_a_solve(importance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    callback = method(0.3, importance=importance, hysteresis=0.25, round_to=1)
    scores, weighed, kept = record_scores(callback), list[Tensor](), list[Tensor]()
    choose = smcp.by_knapsack

    def record(offer: Any, given: Any) -> Any:
        weighed.extend(given)
        kept.extend(callback.live)
        return choose(offer, given)

    monkeypatch.setattr(smcp, "by_knapsack", record)
    fit(Classifier(mlp()), callback)
    assert len(scores) == 2 * callback.updates == 10
    for found, given, live in zip(scores, weighed, kept, strict=True):
        assert torch.equal(given[live], found[live])
        assert torch.equal(given[~live], 0.25 * found[~live])
    assert sum(int((~live).sum()) for live in kept) > 20


def test_hysteresis_keeps_pruned_channels_from_coming_back() -> None:
    def returned(hysteresis: float) -> int:
        callback, count, before = method(0.3, hysteresis=hysteresis, round_to=1), [0], list[Tensor]()

        def look(*_: Any) -> None:
            count[0] += sum(int((now & ~then).sum()) for now, then in zip(callback.live, before, strict=False))
            before[:] = callback.live

        fit(Classifier(mlp()), callback, watch(look))
        return count[0]

    # a few come back all the same: the knapsack may give a group more room
    assert 2 * returned(1e-9) < returned(1.0)


def test_accumulated_micro_batches_are_one_batch() -> None:
    """Without batch statistics, in float64: the same scores and masks from windows of two half batches."""

    class Halves(Batches):
        def __len__(self) -> int:
            return 2 * self.batches

        def __iter__(self) -> Any:
            for x, y in super().__iter__():
                yield from zip(x.chunk(2), y.chunk(2), strict=True)

    whole, halves = method(0.4, round_to=1), method(0.4, round_to=1)
    fit(Classifier(mlp()), whole)
    fit(Classifier(mlp()), halves, loader=Halves(), accumulate_grad_batches=2)
    assert (whole.step, whole.updates) == (halves.step, halves.updates) == (16, 5)
    assert differences(whole.masks, halves.masks) == []
    assert not all(bool(m.all()) for m in whole.masks.values())


def test_a_step_with_an_inf_counts_for_nothing() -> None:
    class Breaks(Classifier):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 2:
                self.net[3].weight.grad[0, 0] = float("inf")
                self.net[5].weight.grad[0, 0] = float("nan")

        def on_before_optimizer_step(self, optimizer: Any) -> None:  # after the callbacks: the weights stay finite
            for p in self.parameters():
                p.grad.nan_to_num_(0, 0, 0)

    callback = method(start=50, stop=60)
    fit(Breaks(mlp()), callback, max_steps=5)
    assert {k: int(t) for k, t in callback.aux.items() if k.startswith("steps")} == {
        "steps.0/net.3.weight": 4,
        "steps.1/net.5.weight": 4,
    }
    assert all(bool(t.isfinite().all()) for t in callback.aux.values())


# ---------------------------------------------------------------------- norms


@pytest.mark.parametrize("scaling", ["kept", "importance"])
def test_gains_take_the_steps_of_the_papers_gradient_rule(scaling: str) -> None:
    """Beside the run the paper's form of it: v with the gain s * v, whose gradient is that of the gain over s."""
    gamma, factors, upstream, effective, gradient = NORM_SCALING
    assert [g * s for g, s in zip(gamma, factors, strict=True)] == effective
    assert [u / s if s else 0.0 for u, s in zip(upstream, factors, strict=True)] == gradient
    net, rate, friction, decay = normed(), 0.1, 0.9, 0.01
    v, momentum, s = net[4].weight.detach().clone(), torch.zeros(12, dtype=torch.float64), 1.0
    seen: list[float] = []

    class Beside(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
            nonlocal v, momentum, s
            momentum = friction * momentum + module.net[4].weight.grad / s + decay * v
            v = v - rate * momentum
            s = float(callback.aux.get("norm/net.3.weight", 1.0))
            seen.append(s)
            torch.testing.assert_close(module.net[4].weight.detach(), s * v, rtol=1e-10, atol=0)

    callback = method(0.5, norm_scaling=scaling, round_to=1)
    module = Classifier(net)
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), rate, friction, weight_decay=decay)
    fit(module, callback, Beside())
    assert len(set(seen)) > 3
    kept = float(callback.masks["net.3.weight"].double().mean())
    assert seen[0] == 1.0 > seen[-1]
    assert seen[-1] == pytest.approx(kept) if scaling == "kept" else seen[-1] > kept  # the important ones are kept


def test_norms_behind_layers_are_found_by_what_flows() -> None:
    net = conv_net()
    assert norms.with_gains(net, norms.norm_behind(net, torch.zeros(1, 2, 5, 5))) == {
        "0": "1",
        "3.one": "3.norms.0",
        "3.two": "3.norms.1",
        "6": "7",
    }
    double = normed()
    assert norms.with_gains(double, norms.norm_behind(double, torch.zeros(1, 2, 5, 5).double())) == {"0": "1", "3": "4"}
    assert all(not m._forward_hooks for m in net.modules())
