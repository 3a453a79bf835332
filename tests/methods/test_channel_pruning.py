"""ChannelPruning in runs: budgets, masks that only lose channels, resume, times, and what is refused."""

import copy
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.channels import REMOVAL
from support.pruning import at_once, nested, pruning
from support.smcp import Residual, conv_net, method, mlp, normed
from torch import Tensor, nn

from sparse_callbacks import ChannelPruning, SparsityCallback, sparsify
from sparse_callbacks.channels import norms
from sparse_callbacks.channels.groups import channel_groups
from sparse_callbacks.channels.slim import slim
from sparse_callbacks.methods.channels import channel_pruning
from sparse_callbacks.methods.channels.budgeted import BudgetedChannels
from sparse_callbacks.methods.channels.criteria import CRITERIA, Criterion
from sparse_callbacks.methods.smcp import smcp
from sparse_callbacks.testing.comparison import assert_effective, differences, snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")

ALL = ["l1", "l2", "random", "taylor_fo", "bn_gain"]
RANKINGS = ["knapsack", "global", "layer"]


def normed_net(seed: int = 0) -> nn.Module:
    """A stem and a residual block whose channels all pass through norms."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), Residual(16), nn.Flatten(), nn.Linear(400, 4)
    )


def net_for(criterion: str, seed: int = 0) -> nn.Module:
    return normed_net(seed) if criterion == "bn_gain" else conv_net(seed)


# ---------------------------------------------------------------------- budgets and masks


@pytest.mark.combinations
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("criterion", ALL)
def test_the_budget_of_every_time_is_met_and_what_is_pruned_stays_pruned(criterion: str, ranking: str) -> None:
    callback, module = pruning(0.4, criterion=criterion, ranking=ranking), Classifier(net_for(criterion))
    masks: list[dict[str, Tensor]] = []
    kept: list[list[int]] = []

    def check(*_: Any) -> None:
        assert_effective(module, callback)
        masks.append({n: m.clone() for n, m in callback.masks.items()})
        kept.append(list(callback.kept))
        if last := callback.progress.done.get(0):
            assert callback.figures()["channels/cost"] <= callback.share_at(last) + 1e-9

    fit(module, callback, watch(check))
    assert callback.at_target
    assert callback.updates == 5
    assert nested(masks)
    assert kept[0] == [g.size for g in callback.groups]
    assert kept[-1] == callback.kept != kept[0]
    assert callback.outcome()["budget"].endswith("(at most 0.4)")
    small, proof = slim(module.eval(), callback.masks, torch.zeros(1, 2, 5, 5))
    assert proof.removed == sum(g.size for g in callback.groups) - sum(callback.kept)
    x = torch.randn(3, 2, 5, 5)
    assert torch.allclose(small(x), module(x), atol=1e-5)


def test_equal_shares_are_equal() -> None:
    callback = pruning(0.3, criterion="l1", ranking="layer", cost="parameters")
    fit(Classifier(conv_net()), callback)
    shares = {k / g.size for g, k in zip(callback.groups, callback.kept, strict=True)}
    assert max(shares) - min(shares) < 4 / 16  # as near as multiples of four come


def test_removing_channels_removes_their_norm_entries_and_the_inputs_of_the_next_layer() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 3), nn.Flatten(), nn.Linear(50, 3)
    )  # fmt: skip
    example = torch.zeros(1, 3, 9, 9)
    assert net[:4](example).shape == (1, 2, 5, 5)
    assert sum(p.numel() for p in net.parameters()) == REMOVAL["before"]
    with torch.no_grad():
        net[0].weight[REMOVAL["channels"]] *= 0.01

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.example_input_array = net, example

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return self(batch).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.0)

    module, callback = Module(), at_once(0.55, criterion="l1", ranking="global", exclude=["net.5.*"])
    fit(module, callback, loader=torch.utils.data.DataLoader(example, batch_size=1), max_steps=1)
    assert [(~live).nonzero().flatten().tolist() for live in callback.live] == [REMOVAL["channels"]]
    small, _ = slim(net, {n.removeprefix("net."): m for n, m in callback.masks.items()}, example)
    assert sum(p.numel() for p in small.parameters()) == REMOVAL["after"]
    second = next(g for g in channel_groups(net, example) if g.name == "3")
    (reader,) = second.consumers
    assert (reader.units == 0).nonzero().flatten().tolist() == list(REMOVAL["columns_of_channel_0"])


# ---------------------------------------------------------------------- one pruning


@pytest.mark.parametrize("criterion", [c for c in ALL if c != "taylor_fo"])
def test_channels_may_go_before_the_first_step(criterion: str) -> None:
    module, callback = Classifier(net_for(criterion)), at_once(0.4, criterion=criterion)
    before = copy.deepcopy(module.state_dict())
    at_start: list[Any] = []

    def look(trainer: pl.Trainer, module: pl.LightningModule) -> None:
        assert_effective(module, callback)
        at_start.append((callback.kept, {n: m.clone() for n, m in callback.masks.items()}, callback.at_target))
        weights = dict(module.named_parameters())
        for name, mask in callback.masks.items():
            assert torch.equal(weights[name], before[name] * mask)

    fit(module, callback, pl.callbacks.LambdaCallback(on_train_start=look))
    kept, masks, at_target = at_start[0]
    assert at_target
    assert callback.network.realised(kept) <= 0.4 * callback.network.dense < callback.network.dense
    assert differences(masks, dict(callback.masks)) == []
    assert (callback.updates, callback.progress.done) == (1, {0: 0})


def test_one_pruning_comes_at_its_step_and_takes_the_whole_budget() -> None:
    callback, seen = at_once(0.4, step=5, criterion="taylor_fo", round_to=4), []
    fit(Classifier(conv_net()), callback, watch(lambda *_: seen.append(list(callback.kept))))
    full = [g.size for g in callback.groups]
    assert seen[:4] == [full] * 4
    assert seen[4] == seen[-1] == callback.kept != full
    assert callback.updates == 1
    assert callback.figures()["channels/cost"] <= 0.4


def test_a_pruning_before_the_first_step_is_logged_and_not_announced_as_missing(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, capsys: pytest.CaptureFixture[str]
) -> None:
    callback, logger = at_once(0.4), pl.loggers.CSVLogger(tmp_path)
    fit(Classifier(conv_net()), callback, logger=logger, log_every_n_steps=1)
    text = (Path(logger.log_dir) / "metrics.csv").read_text()
    assert "channels/share" in text.splitlines()[0]
    said = "".join(str(w.message) for w in recwarn) + capsys.readouterr().err
    assert "will not move a mask" not in said
    assert "published interval" not in said


def test_a_second_fit_goes_on_with_the_masks_of_one_pruning() -> None:
    callback, module = at_once(0.4), Classifier(conv_net())
    fit(module, callback)
    masks = {n: m.clone() for n, m in callback.masks.items()}
    fit(module, callback)
    assert differences(masks, dict(callback.masks)) == []
    assert callback.updates == 1


def test_a_loop_prunes_before_its_first_step_too() -> None:
    net, callback = mlp(), at_once(0.4, ranking="layer")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    batches = [(x.double(), y) for x, y in Batches().all(1)]
    with sparsify(callback, net, optimizer, steps=8, data=batches, forward=lambda m, b: m(b[0])) as run:
        start = {n: m.clone() for n, m in run.masks.items()}
        assert sum(int((~m).sum()) for m in start.values()) > 0
        for x, y in batches:
            nn.functional.cross_entropy(net(x), y).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert differences(start, dict(run.masks)) == []


@pytest.mark.parametrize(
    ("make", "passes"),
    [
        (lambda: pruning(criterion="l1"), []),
        (lambda: pruning(criterion="taylor_fo"), ["norm behind"]),
        (lambda: method(), ["normalized"]),
        (lambda: method(importance="magnitude"), []),
        (lambda: method(norm_scaling="kept"), ["norm behind", "normalized"]),
    ],
    ids=["l1", "taylor_fo", "smcp", "smcp by magnitude", "smcp with norm_scaling"],
)
def test_norms_are_looked_for_by_those_that_ask_for_them(
    make: Callable[[], SparsityCallback], passes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []

    def noted(module: Any, name: str, word: str) -> None:
        usual = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *given: seen.append(word) or usual(*given))

    for module in (channel_pruning, norms):
        noted(module, "norm_behind", "norm behind")
    noted(smcp, "normalized_outputs", "normalized")
    fit(Classifier(conv_net()), make(), max_steps=1)
    assert seen == passes


# ---------------------------------------------------------------------- runs that go on


@pytest.mark.combinations
@pytest.mark.parametrize("after", [1, 6, 9, 15])
@pytest.mark.parametrize("criterion", ALL)
def test_resume_is_bitwise_in_the_middle_of_a_ramp(criterion: str, after: int, tmp_path: Path) -> None:
    ranking = RANKINGS[after % 3]
    one, other = (pruning(0.4, criterion=criterion, ranking=ranking) for _ in range(2))
    module, resumed = Classifier(net_for(criterion), "adamw"), Classifier(net_for(criterion, 7), "adamw")
    stops = Stops(tmp_path, (after,))
    expected = snapshot(fit(module, one, stops), module, one)
    assert differences(expected, snapshot(fit(resumed, other, ckpt_path=stops.path(after)), resumed, other)) == []
    torch.load(stops.path(after), weights_only=True)


def test_a_run_that_was_pruned_before_its_first_step_resumes_bitwise(tmp_path: Path) -> None:
    one, other = at_once(0.4, criterion="random"), at_once(0.4, criterion="random")
    module, resumed, stops = Classifier(conv_net()), Classifier(conv_net(7)), Stops(tmp_path, (3,))
    expected = snapshot(fit(module, one, stops), module, one)
    assert differences(expected, snapshot(fit(resumed, other, ckpt_path=stops.path(3)), resumed, other)) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda aux: aux.pop("steps.0/net.3.one.weight"), "it has no steps.0/net.3.one.weight"),
        (lambda aux: aux.pop("former.1/net.3.two.weight"), "it has no former.1/net.3.two.weight, which a run of Chan"),
        (lambda aux: aux.update({"former.1/net.3.two.weight": torch.zeros(3)}), r"should be \[16\]"),
        (lambda aux: aux["scores.0/net.3.one.weight"].fill_(-1.0), "values below 0"),
    ],
)
def test_a_state_without_its_scores_is_refused(damage: Any, message: str, tmp_path: Path) -> None:
    stops = Stops(tmp_path, (7,))
    fit(Classifier(conv_net()), pruning(0.4, criterion="taylor_fo"), stops)
    file = torch.load(stops.path(7), weights_only=True)
    (state,) = [s for s in file["callbacks"].values() if "aux" in s]
    damage(state["aux"])
    file.pop("sparse_callbacks", None)  # the inventory of the file, by which a loss would be found before
    torch.save(file, stops.path(7))
    with pytest.raises(ValueError, match=message):
        fit(Classifier(conv_net()), pruning(0.4, criterion="taylor_fo"), ckpt_path=stops.path(7))


# ---------------------------------------------------------------------- several optimizers, accumulation


class Two(Classifier):
    """Two optimizers, of which the second steps in every other batch."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__(conv_net(seed))
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        self.manual_backward(self.loss(batch))
        first.step()
        first.zero_grad()
        if batch_idx % 2:
            second.step()
            second.zero_grad()

    def configure_optimizers(self) -> Any:
        parts = [list(self.net[:4].parameters()), list(self.net[4:].parameters())]
        return [torch.optim.SGD(p, lr=0.05) for p in parts]


@pytest.mark.combinations
@pytest.mark.parametrize("ranking", RANKINGS)
@pytest.mark.parametrize("criterion", ["l1", "taylor_fo"])
def test_several_optimizers_share_one_budget(criterion: str, ranking: str, tmp_path: Path) -> None:
    def make() -> ChannelPruning:
        return pruning(0.5, criterion=criterion, ranking=ranking, stop=7, start=1, every=2)

    callback, module, stops = make(), Two(), Stops(tmp_path, (7,))
    masks: list[dict[str, Tensor]] = []

    def check(*_: Any) -> None:
        assert_effective(module, callback)
        masks.append({n: m.clone() for n, m in callback.masks.items()})

    expected = snapshot(fit(module, callback, watch(check), stops), module, callback)
    assert callback.at_target
    assert nested(masks)
    assert callback.network.realised(callback.kept) <= 0.5 * callback.network.dense * (1 + 1e-9)
    other, resumed = make(), Two(5)
    assert differences(expected, snapshot(fit(resumed, other, ckpt_path=stops.path(7)), resumed, other)) == []


def test_gates_are_squared_for_the_whole_batch_of_a_step() -> None:
    """Two micro-batches of a window give the score of one batch, and not the mean of their squares."""
    scores = []
    for window in (1, 2):
        callback, module = pruning(0.5, criterion="taylor_fo", start=14, every=None), Classifier(normed())
        module.net.eval()  # batch statistics would differ
        loader = Batches(4, 6) if window == 1 else Halves(4, 6)
        fit(module, callback, loader=loader, accumulate_grad_batches=window, max_epochs=1, precision="64-true")
        scores.append({k: t for k, t in callback.aux.items() if k.startswith(("scores", "steps"))})
    assert scores[0].keys() == scores[1].keys()
    for key, value in scores[0].items():
        assert torch.allclose(value, scores[1][key], rtol=1e-8)


class Halves(Batches):
    """The same batches in two halves each."""

    def __len__(self) -> int:
        return 2 * self.batches

    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield from zip(x.chunk(2), y.chunk(2), strict=True)


# ---------------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"criterion": "l3"}, r"criterion='l3' is not known\. Give 'bn_gain' or"),
        ({"ranking": "best"}, r"ranking='best' is not known\. Give 'knapsack' or 'global' or 'layer'"),
        ({"budget": 1.0}, r"budget=1\.0 is out of range"),
        ({"penalty": -1.0}, r"penalty=-1\.0 is out of range\. Give a number that is at least 0"),
        ({"batches": 0}, r"batches=0 is not a number of batches\. Give a whole number from 1 on"),
        ({"penalty": 0.1}, r"penalty=0\.1 says nothing to criterion='l1'.*or give criterion='bn_gain'\."),
        (
            {"batches": 4},
            r"batches=4 says nothing to criterion='l1'.*criterion='crop' or 'grasp' or 'ispasp' or 'sosp' or 'taylor_2017'\.",
        ),
        ({"criterion": "bn_gain", "batches": [torch.ones(2)]}, r"says nothing to criterion='bn_gain'"),
        ({"loss": len}, r"loss=.* says nothing to criterion='l1'"),
        (
            {"hysteresis": 0.5},
            r"hysteresis= is not an argument of ChannelPruning\. It takes budget=, cost=, criterion=",
        ),
        ({"distribution": "uniform"}, r"distribution= is not an argument of ChannelPruning: how many channels"),
        ({"curve": "cubic"}, r"curve='cubic' is not known"),
        ({"sparsity": 0.9}, r"sparsity= is not an argument of ChannelPruning"),
        ({"criterion": "taylor_fo", "start": 0, "stop": 0}, r"start=0, stop=0 there are none before the pruning"),
        (
            {"start": 5, "stop": 5, "every": 3},
            r"every=3 is an interval, and with start=5, stop=5 all channels go at once",
        ),
        (
            {"start": 0, "stop": 0, "every": 3},
            r"every=3 is an interval, and with start=0, stop=0 all channels go at once",
        ),
        ({"start": 3, "stop": 0}, r"stop=0 is the beginning of the run"),
        ({"start": False, "stop": False}, r"False"),
    ],
)
def test_arguments_that_cannot_work(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        ChannelPruning(**arguments)


@pytest.mark.parametrize(
    ("facts", "arguments", "message"),
    [
        ({"rankings": ("layer",)}, {"ranking": "global"}, r"ranking='global' cannot be used.*Give ranking='layer'\."),
        ({"one_shot": True}, {"start": 3}, r"criterion='mine' prunes once, and start=3 and stop=14 are a ramp"),
        ({"needs_steps": True}, {"start": 0, "stop": 0, "every": None}, "there are none before the pruning"),
        ({}, {}, r"Mine has no scores\(\): override it"),
    ],
)
def test_what_a_criterion_cannot_do_is_refused(
    facts: dict[str, Any], arguments: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(CRITERIA, "mine", type("Mine", (Criterion,), facts))
    with pytest.raises((ValueError, NotImplementedError), match=message):
        fit(Classifier(conv_net()), pruning(**({"criterion": "mine"} | arguments)))


def test_a_method_under_a_budget_says_how_it_chooses() -> None:
    class Mine(BudgetedChannels, SparsityCallback):
        """Chooses nothing."""

    with pytest.raises(NotImplementedError, match=r"Mine has no choose\(\): override it, and return a Choice"):
        fit(Classifier(conv_net()), Mine(0.5, start=1, stop=4, every=1, round_to=1, print_plan=False))


def test_a_budget_that_no_network_meets_is_refused_with_the_smallest_one() -> None:
    with pytest.raises(
        ValueError, match=r"budget=0\.01 of the FLOPs cannot be met.*Give budget=0\.\d+ or more"
    ) as error:
        fit(Classifier(conv_net()), pruning(0.01))
    feasible = float(re.search(r"Give budget=(\S+) ", str(error.value))[1])  # type: ignore[index]
    for ranking in RANKINGS:
        callback = pruning(feasible, ranking=ranking)
        fit(Classifier(conv_net()), callback)
        assert callback.kept == [4, 4, 4]


@pytest.mark.parametrize(
    ("arguments", "advice"),
    [
        ({"round_to": 1}, r"Give budget=\S+ or more\."),
        ({"round_to": 4}, r"a smaller round_to=\."),
        ({"round_to": 1, "chunk": 2}, r"a smaller chunk=\."),
        ({"round_to": 4, "chunk": 2}, r"a smaller round_to= or chunk=\."),
    ],
)
def test_a_budget_is_refused_with_advice_that_can_be_followed(arguments: dict[str, int], advice: str) -> None:
    with pytest.raises(ValueError, match=advice):
        fit(Classifier(conv_net()), pruning(0.001, **arguments))


def test_batches_that_the_loss_cannot_take_are_refused_in_words() -> None:
    with pytest.raises(ValueError, match=r"cannot be computed on batch 0 .*, a int \(TypeError.*Give batches= as the"):
        fit(Classifier(conv_net()), pruning(criterion="taylor_2017", batches=[1, 2]))


def test_the_plan_names_the_budget_and_the_run_what_it_has_missed() -> None:
    assert str(pruning(0.4, cost="parameters").plan(conv_net())).startswith("ChannelPruning: 0.4 of the parameters")
    with pytest.warns(
        UserWarning, match=r"ChannelPruning ended at 0\.\d+ of the dense FLOPs, before the solve for its budget"
    ):
        fit(Classifier(conv_net()), pruning(0.4), max_epochs=1)


def test_layers_that_are_thawed_later_stay_dense_with_the_reason() -> None:
    module = Classifier(conv_net())
    module.net[6].requires_grad_(False)
    callback = pruning(0.8)
    fit(module, callback)
    row = callback.plan()["net.6.weight"]
    assert "ChannelPruning forms its groups of channels" in row.reason
