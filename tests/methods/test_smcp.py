"""SMCP: soft masks, importance over steps, budgets met by real networks, channels that return, resume, refusals."""

import re
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.smcp import NORM_SCALING, PRUNED_DECAY, SCHEDULES, SOFT_MASK
from support.data import Batches
from support.inside import (
    Moment,
    around_updates,
    copied_names,
    count_kept_channels,
    dense_values,
    give_calendar,
    owners_of_groups,
    parameters_of,
    set_mask,
)
from support.nets import Classifier, Layers
from support.rig import assert_effective, differences, fit, snapshot, watch
from torch import Tensor, nn

from sparse_callbacks.channels import costs, norms
from sparse_callbacks.channels.groups import Group, Member
from sparse_callbacks.channels.latency.table import Grid, Table, signature
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.methods.smcp import SMCP, allocation
from sparse_callbacks.methods.smcp.scores import group_scores, reader_scores

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


class Residual(nn.Module):
    """Two convolutions around a sum."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.one, self.two = (nn.Conv2d(channels, channels, 3, padding=1, bias=False) for _ in range(2))
        self.norms = nn.ModuleList(nn.BatchNorm2d(channels) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.norms[1](self.two(self.norms[0](self.one(x)).relu()))).relu()


def conv_net(seed: int = 0) -> nn.Module:
    """Stem, residual block, depthwise convolution and flattening, for inputs [n, 2, 5, 5] and 4 classes."""
    torch.manual_seed(seed)
    return Layers(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Residual(16), nn.Conv2d(16, 16, 3, groups=16), nn.ReLU(),
        nn.Conv2d(16, 24, 1), nn.BatchNorm2d(24), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4),
    )  # fmt: skip


def mlp(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4)).double()


def method(budget: float = 0.5, **options: Any) -> SMCP:
    """With several solves in a run of 16 steps."""
    short = {"every": 3, "start": 2, "stop": 14, "round_to": 4, "prune_stem": True, "print_plan": False}
    return SMCP(budget, **(short | options))


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


def mask_by_hand(callback: SMCP, name: str, keep: list[int]) -> pl.Callback:
    """Before the first batch the inputs of ``name`` are masked."""

    def cut(*_: Any) -> None:
        mask = torch.tensor(keep).bool().expand(parameters_of(callback)[name].shape).contiguous()
        set_mask(callback, name, mask)

    return pl.callbacks.LambdaCallback(on_train_start=cut)


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
    assert module.last.weight[0].tolist() == pytest.approx([e * m for e, m in zip(expected, mask, strict=True)], abs=1e-6)


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
@pytest.mark.parametrize(("cost", "budget"), [("parameters", 0.6), ("parameters", 0.3), ("flops", 0.5), ("flops", 0.25)])
def test_the_slimmed_network_meets_the_budget_and_equals_the_masked_one(cost: str, budget: float, importance: str) -> None:
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
    assert sum(each(layer, layer.inputs, layer.outputs) for layer in found.values()) == callback.network.realised(callback.kept)


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
        cells = [[1.0 + costs.flops(layer, i, o) / 1e3 for o in outs] for i in ins]
        grids[signature(layer, layer.maps[0])] = Grid(ins, outs, [[c[-1]] for c in cells] if layer.depthwise else cells)
    about = {"model": "net", "input": [2, 5, 5], "torch": "1.0"}
    Table(about, grids, constant=3.0, factor=2.0).save(tmp_path / "t.json")
    callback = method(0.6, cost=str(tmp_path / "t.json"), print_plan=True)
    with pytest.warns(UserWarning, match=r"the latency table of net was measured with torch 1\.0, and here it is"):
        fit(Classifier(net), callback)
    assert 0.4 < callback.network.realised(callback.kept) / callback.network.dense <= 0.6
    alone = sum(1.0 + costs.flops(layer, layer.inputs, layer.outputs) / 1e3 for layer in callback.network.layers.values())
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

    seen: list[Tensor] = []
    scores = callback.scores
    callback.scores = lambda: seen.extend(scores()) or seen  # type: ignore[method-assign, func-returns-value]
    fit(module, pl.callbacks.LambdaCallback(on_before_optimizer_step=look), callback, max_steps=6)
    assert torch.allclose(seen[0], torch.stack(by_hand).mean(0))
    assert all(not t.any() for t in callback.aux.values())  # the next window begins


class Joined(nn.Module):
    """Two layers, of 8 channels and so many, that one layer reads side by side."""

    def __init__(self, second: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Linear(50, 8), nn.Linear(50, second), nn.Linear(8 + second, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.flatten(1)
        return self.c(torch.cat([self.a(x).tanh(), self.b(x).tanh()], 1))


@pytest.mark.parametrize("second", [8, 12])
@pytest.mark.parametrize("importance", ["taylor", "magnitude"])
def test_groups_that_one_layer_reads_have_scores_of_their_own(second: int, importance: str) -> None:
    callback, module = method(start=6, stop=12, every=6, round_to=1, importance=importance), Classifier(Joined(second).double())
    by_hand: list[Tensor] = []

    def look(*_: Any) -> None:
        dense = dense_values(callback, "net.c.weight")
        by_hand.append((-dense * module.net.c.weight.grad).sum(0).abs())

    seen: list[Tensor] = []
    scores = callback.scores
    callback.scores = lambda: seen.extend(scores()) or seen[-2:]  # type: ignore[method-assign, func-returns-value]
    fit(module, pl.callbacks.LambdaCallback(on_before_optimizer_step=look), callback, max_steps=6)
    expected = torch.stack(by_hand).mean(0) if importance == "taylor" else dense_values(callback, "net.c.weight").abs().sum(0)
    assert [g.name for g in callback.groups] == ["net.a", "net.b"]
    torch.testing.assert_close(seen, [expected[:8], expected[8:]])


def test_outputs_that_are_pruned_do_not_count() -> None:
    callback, module = method(start=50, stop=60, round_to=1, importance="magnitude"), Classifier(mlp())
    fit(module, callback, mask_by_hand(callback, "net.5.weight", [1] * 6 + [0] * 6), max_steps=1)
    count_kept_channels(callback)
    first = [g.name for g in callback.groups].index("net.1")
    assert torch.allclose(callback.scores()[first], dense_values(callback, "net.3.weight")[:6].abs().sum(0))


def test_the_absolute_value_comes_after_the_sum_over_a_groups_layers() -> None:
    readers = tuple(Member(n, f"{n}.weight", 1, "in", torch.arange(3)) for n in "ab")
    group = Group("p", 3, (), readers, ())
    weights = {"a.weight": torch.ones(2, 3), "b.weight": torch.ones(2, 3)}
    gradients = {"a.weight": torch.tensor([[1.0, 2.0, 3.0], [0.0, 0.0, 0.0]]), "b.weight": torch.tensor([[-1.0, 0.0, 0.0], [0, 0, 5]])}
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
    assert {k: int(t) for k, t in callback.aux.items() if k.startswith("steps")} == {"steps.0/net.3.weight": 4, "steps.1/net.5.weight": 4}
    assert all(bool(t.isfinite().all()) for t in callback.aux.values())


# ---------------------------------------------------------------------- norms


def normed() -> nn.Module:
    """Channels that are read by a convolution with a batch norm behind it; in between two others that must not be taken for it."""
    torch.manual_seed(0)
    net = Layers(
        nn.Conv2d(2, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.BatchNorm2d(12),
        nn.Flatten(), nn.Linear(108, 4),
    ).double()  # fmt: skip
    for index in (1, 4, 6):
        nn.init.uniform_(net[index].weight, 0.5, 1.5)
    return net


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
    assert norms.norms_behind(net, torch.zeros(1, 2, 5, 5)) == {"0": "1", "3.one": "3.norms.0", "3.two": "3.norms.1", "6": "7"}
    assert norms.norms_behind(normed(), torch.zeros(1, 2, 5, 5).double()) == {"0": "1", "3": "4"}
    assert all(not m._forward_hooks for m in net.modules())


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize(("after", "scaling"), [(1, None), (6, None), (8, "kept"), (14, "importance"), (15, None)])
def test_resume_is_bitwise(after: int, scaling: str | None, tmp_path: Path) -> None:
    class Save(pl.Callback):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            if trainer.global_step == after:
                trainer.save_checkpoint(tmp_path / "run.ckpt")

    one, other = method(0.4, norm_scaling=scaling), method(0.4, norm_scaling=scaling)
    module, resumed = Classifier(conv_net(), "adamw"), Classifier(conv_net(7), "adamw")
    expected = snapshot(fit(module, one, Save()), module, one)
    assert differences(expected, snapshot(fit(resumed, other, ckpt_path=tmp_path / "run.ckpt"), resumed, other)) == []
    torch.load(tmp_path / "run.ckpt", weights_only=True)


def test_several_optimizers_share_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    solves: list[list[int]] = []
    allocate = allocation.allocate

    def record(network: Any, options: Any, *rest: Any) -> Any:
        solves.append([len(o) for o in options])
        return allocate(network, options, *rest)

    monkeypatch.setattr(allocation, "allocate", record)

    class Two(Classifier):
        def __init__(self) -> None:
            super().__init__(conv_net())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            loss = self.loss(batch)
            for optimizer in self.optimizers():
                optimizer.zero_grad()
            self.manual_backward(loss)
            for optimizer in self.optimizers():
                optimizer.step()

        def configure_optimizers(self) -> Any:
            parts = [list(self.net[:4].parameters()), list(self.net[4:].parameters())]
            return [torch.optim.SGD(p, lr=0.05) for p in parts]

    callback, module = method(0.4), Two()
    fit(module, callback, watch(lambda *_: assert_effective(module, callback)))
    assert callback.at_target
    assert owners_of_groups(callback) == [0, 1]  # the first group is read by layers of both
    assert callback.left_out["net.0"] == "net.3.one.weight, net.6.weight are in several optimizers"
    assert callback.network.realised(callback.kept) <= 0.4 * callback.network.dense
    assert solves[0] == solves[-2] == [4, 6]
    assert solves[-1] == [1, 6]  # the first has had its last solve, and its channels are settled


def test_a_second_fit_goes_on_with_the_masks() -> None:
    callback, module = method(0.4), Classifier(conv_net())
    fit(module, callback)
    masks = callback.masks
    fit(module, callback)
    assert differences(masks, callback.masks) == []


def test_the_figures_of_a_solve(tmp_path: Path) -> None:
    callback = method(0.4)
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(Classifier(conv_net()), callback, logger=logger, log_every_n_steps=1000)
    rows = [r for r in (Path(logger.log_dir) / "metrics.csv").read_text().splitlines() if r]
    *_, final, end = [dict(zip(rows[0].split(","), r.split(","), strict=True)) for r in rows[1:]]
    assert (final["step"], end["step"], end["smcp/gap"]) == ("14", "16", "")
    assert end["smcp/cost"] == final["smcp/cost"]
    assert float(final["smcp/cost"]) == pytest.approx(callback.network.realised(callback.kept) / callback.network.dense)
    assert float(final["smcp/share"]) == 0.4
    assert float(final["smcp/gap"]) == 0.0
    assert [float(final[f"smcp/kept/{g.name}"]) for g in callback.groups] == callback.kept


def test_the_example_comes_from_the_module_or_from_its_data() -> None:
    module = Classifier(conv_net())
    module.example_input_array = torch.zeros(3, 2, 5, 5)
    ours, given = method(), method()
    fit(module, given)
    fit(Classifier(conv_net()), ours)
    assert differences(ours.masks, given.masks) == []


def test_an_example_of_another_precision_is_converted() -> None:
    module, callback = Classifier(conv_net()), method(0.5)
    module.example_input_array = torch.zeros(2, 2, 5, 5)
    fit(module, callback, precision="64-true", loader=None, enable_model_summary=False)
    assert module.net[0].weight.dtype == torch.float64
    assert callback.at_target


@pytest.mark.parametrize("compiled", ["module", "net"])
def test_compiled_modules_are_looked_at_too(compiled: str) -> None:
    module, callback = Classifier(conv_net()), method(0.5)
    if compiled == "net":
        module.net.compile(backend="eager")
        fit(module, callback)
    else:
        fit(torch.compile(module, backend="eager"), callback)
    assert {g.name for g in callback.groups} == {"net.0", "net.3.one", "net.6"}
    small, proof = slim(module, callback.masks, torch.randn(3, 2, 5, 5))
    assert proof.removed == sum(g.size for g in callback.groups) - sum(callback.kept)
    assert small(torch.randn(3, 2, 5, 5)).shape == (3, 4)


def test_a_run_that_ends_before_its_last_solve_says_so() -> None:
    callback = method(0.4)
    with pytest.warns(UserWarning, match=r"SMCP ended at 0\.\d+ of the dense flops, before the solve for its budget of 0\.4: 8 steps"):
        fit(Classifier(conv_net()), callback, max_epochs=1)
    assert not callback.at_target


def test_the_plan_names_the_budget() -> None:
    plan = method(0.4, cost="parameters").plan(conv_net())
    assert str(plan).startswith("SMCP: 0.4 of the parameters")
    assert {r.zeros for r in plan if r.name in plan.selected} == {None}


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 0.0}, r"budget=0\.0 is out of range\. Give a number above 0 and below 1"), ({"budget": 1.0}, "budget=1.0 is out of"),
        ({"budget": True}, "budget=True is out of"), ({"budget": "half"}, "budget='half' is out of"),
        ({"decay": -1.0}, r"decay=-1\.0 is out of range"), ({"decay": float("nan")}, "decay=nan is out of range"),
        ({"round_to": 0}, r"round_to=0 is no number of channels\. Give a whole"), ({"chunk": 1.5}, "chunk=1.5 is no number of channels"),
        ({"importance": "l2"}, r"importance='l2' is not known\. Give 'taylor' or 'magnitude'"),
        ({"curve": "cubic"}, r"curve='cubic' is not known\. Give 'exp' or 'linear' or 'exp2'"),
        ({"cost": "latency"}, r"cost='latency' is not known\. Give 'parameters', 'flops' or the path of a latency table"),
        ({"sparsity": 0.9}, r"sparsity= is no argument of SMCP.*Give budget="),
    ],
)  # fmt: skip
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SMCP(**arguments)


def test_a_budget_that_no_network_meets_is_refused_with_the_smallest_one() -> None:
    module = Classifier(conv_net())
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with pytest.raises(ValueError, match=r"budget=0\.01 of the flops cannot be met.*Give budget=0\.\d+ or more, or a small") as error:
        fit(module, method(0.01))
    assert differences(before, dict(module.state_dict())) == []
    feasible = float(str(error.value).split("Give budget=")[1].split(" ")[0])
    callback = method(feasible)
    fit(module, callback)
    assert callback.kept == [4, 4, 4]


def test_a_chunk_that_divides_no_group_is_refused() -> None:
    with pytest.raises(ValueError, match=r"chunk=3 does not divide the units of net.1 \(16\)\. Give a chunk that divides all of them"):
        fit(Classifier(mlp()), method(chunk=3))


def test_what_can_go_and_why_the_rest_stays_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    fit(Classifier(conv_net()), method(0.8, prune_stem=False, print_plan=True), max_steps=1)
    shown = " ".join(capsys.readouterr().out.split())
    assert "net.3.one 16 4, 8, ... 16 net.6 24 4, 8, ... 24 net.10 stay these are outputs of the network" in shown
    assert "net.0 stay net.0 is the stem" in shown
    assert re.search(r"With the fewest channels 0\.\d{4} of the flops are left\.", shown)
    assert "net.0.weight 16x2x3x3 288 budget" in shown


def test_a_model_without_channels_to_remove_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no channels can be removed from this model: outputs of net\.1: .* or use a method that prunes"):
        fit(Classifier(nn.Sequential(nn.Flatten(), nn.Linear(50, 4))), method())


def test_a_table_of_another_model_is_refused(tmp_path: Path) -> None:
    Table({"model": "other", "input": [2, 5, 5]}, {}).save(tmp_path / "t.json")
    with pytest.raises(ValueError, match=r"the latency table of other \(input \[2, 5, 5\]\) does not cover net\.0"):
        fit(Classifier(conv_net()), method(cost=str(tmp_path / "t.json")))


def test_a_table_of_another_network_of_the_same_layers_is_refused(tmp_path: Path) -> None:
    net = mlp()
    grids = {"linear map 1": Grid([1, 12, 16, 50], [1, 12, 16, 50], [[1.0 + i for _ in range(4)] for i in range(4)])}
    for layer_sum, fits in ((6.0, False), (4.0 + 3.0 + 2.0, True)):  # of inputs 50, 16 and 12
        Table({"model": "m:net", "model_ms_by_table": layer_sum}, grids).save(tmp_path / "t.json")
        callback = method(0.8, cost=str(tmp_path / "t.json"), round_to=1)
        if fits:
            fit(Classifier(net), callback)
        else:
            with pytest.raises(ValueError, match=r"is the table of another model: m:net comes to 6 ms by it, and this one to 9 ms"):
                fit(Classifier(net), callback)


def test_data_that_gives_no_example_is_refused() -> None:
    class Stream(torch.utils.data.IterableDataset[Any]):
        def __iter__(self) -> Any:
            return iter(Batches().all(1))

    with pytest.raises(ValueError, match=r"with one sample.*this is a DataLoader over an IterableDataset\. Set example_input_array"):
        fit(Classifier(conv_net()), method(), loader=torch.utils.data.DataLoader(Stream(), batch_size=None))
