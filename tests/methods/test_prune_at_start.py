"""PruneAtStart, and first masks by a score in other methods: counts, rounds, runs, refusals."""

import copy
import math
import pickle
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.scores import LINEAR, SYNFLOW
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import CTRE, SET, GaP, PruneAtStart, RigL, Score, Static, methods, sparsify
from sparse_callbacks.core.ops import keep_largest_jointly
from sparse_callbacks.core.scored_masks import as_magnitudes
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Classifier, conv_net, loss_on
from sparse_callbacks.testing.runs import Stops, fit, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore:few inputs are left", "ignore:.*does not have many workers")
NAMES = ["snip", "grasp", "synflow", "crop", "fisher", "magnitude", "random"]
OF_LOSS = ["snip", "grasp", "crop", "fisher"]
ONE = {"max_steps": 1}


def entropy(module: nn.Module, batch: Any) -> Tensor:
    return functional.cross_entropy(module(batch[0]), batch[1])


def squares(module: nn.Module, batch: Any) -> Tensor:
    return 0.5 * (module(batch[0]) - batch[1]).square().sum(1).mean()


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.Tanh(), nn.Linear(20, 12), nn.Tanh(), nn.Linear(12, 3))


def samples(count: int = 12) -> list[Any]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(count, 6, generator=draw), torch.arange(count) % 3)]


def pruned(
    model: nn.Module, *arguments: Any, data: Any = None, method: Any = methods.PruneAtStart, **options: Any
) -> Any:
    """The run of a loop, with its first masks written."""
    run = sparsify(
        method(*arguments, print_plan=False, **options),
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        4,
        data=data if data is None or hasattr(data, "dataset") else data[0],
    )
    run.close()
    return run


def masks_of(run: Any) -> dict[str, Tensor]:
    return {name: mask.clone() for name, mask in run.masks.items()}


# ---------------------------------------------------------------------- tables


def linear() -> nn.Linear:
    layer = nn.Linear(2, 2, bias=False)
    layer.weight.data = torch.tensor(LINEAR["weight"])
    return layer


LINEAR_BATCH = [(torch.tensor(LINEAR["inputs"]), torch.tensor(LINEAR["targets"]))]


def named(value: Any) -> str:
    """The name of a case by its arguments, without addresses."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))


@pytest.mark.parametrize("score", ["snip", "grasp", "crop"])
def test_masks_of_a_linear_layer(score: str) -> None:
    found = pruned(linear(), 0.5, score=score, batches=LINEAR_BATCH, loss=squares).masks["weight"]
    assert found.int().tolist() == LINEAR[f"{score}_mask"]


@pytest.mark.parametrize("rounds", [4, 1])
def test_masks_of_synflow(rounds: int) -> None:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 2, bias=False))
    model[0].weight.data, model[1].weight.data = torch.tensor(SYNFLOW["first"]), torch.tensor(SYNFLOW["second"])
    found = pruned(model, SYNFLOW["sparsity"], score="synflow", rounds=rounds, data=[torch.zeros(1, 3)]).masks
    assert found["0.weight"].int().tolist() == SYNFLOW["first_mask"][rounds]
    assert found["1.weight"].int().tolist() == SYNFLOW["second_mask"][rounds]


# ---------------------------------------------------------------------- counts and rankings


@pytest.mark.parametrize("sparsity", [0.0, 0.37, 0.9, 0.985])
@pytest.mark.parametrize("score", NAMES)
def test_zeros_are_floor_of_all_weights(score: str, sparsity: float) -> None:
    given = {"batches": samples(), "loss": entropy} if score in OF_LOSS else {}
    rounds = {"rounds": 3} if score in (*OF_LOSS, "synflow") else {}
    method, size = (
        methods.PruneAtStart(sparsity, score=score, print_plan=False, **given, **rounds),
        6 * 20 + 20 * 12 + 12 * 3,
    )
    plan = method.plan(net())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of layers without any weight left
        run = pruned(net(), sparsity, score=score, data=samples()[0], **given, **rounds)
    assert plan.joint == plan.zeros == math.floor(sparsity * size)
    assert [row.zeros for row in plan if row.name in plan.selected] == [None] * 3
    assert sum(int((~m).sum()) for m in run.masks.values()) == plan.zeros
    assert run.method.plan().total == run.measured_sparsity()["sparsity/total"] == math.floor(sparsity * size) / size


@pytest.mark.parametrize("distribution", ["uniform", "erdos_renyi", {"0.*": 0.3, "*": "uniform"}], ids=str)
@pytest.mark.parametrize("score", ["snip", "synflow"])
def test_other_distributions_rank_in_each_layer(score: str, distribution: Any) -> None:
    given = {"batches": samples(), "loss": entropy} if score == "snip" else {"rounds": 5}
    model = net()
    run = pruned(model, 0.8, score=score, distribution=distribution, data=samples()[0], **given)
    plan = run.method.plan(net())
    assert plan.joint is None
    assert {n: int((~m).sum()) for n, m in run.masks.items()} == {n: plan[n].zeros for n in run.masks}
    # the same masks as of other methods that begin with this score, and of a hand-written ranking
    options = given if score == "snip" else {}
    start = Score(score, rounds=given.get("rounds"), **options)
    same = pruned(net(), 0.8, initial_mask=start, distribution=distribution, method=methods.Static, data=samples()[0])
    assert differences(masks_of(run), masks_of(same)) == []


def test_snip_keeps_the_largest_products_of_weight_and_gradient() -> None:
    model, batches = net(), samples()
    entropy(model, batches[0]).backward()
    found = {n: (p * p.grad).abs() for n, p in model.named_parameters() if p.ndim > 1}
    model.zero_grad()
    run = pruned(model, 0.8, batches=batches, loss=entropy)
    found = {n: f.detach() for n, f in found.items()}
    bound = min(float(found[n][m].min()) for n, m in run.masks.items())
    assert bound >= max(float(found[n][~m].max()) for n, m in run.masks.items())


def test_rounds_score_the_pruned_network_and_pruned_weights_stay_pruned() -> None:
    """Against rounds by hand, on a network whose weights are really set to zero."""
    by_hand, batches, size = net(), samples(), 396
    masks = {n: torch.ones_like(p, dtype=torch.bool) for n, p in by_hand.named_parameters() if p.ndim > 1}
    for number in (1, 2, 3):
        by_hand.zero_grad()
        entropy(by_hand, batches[0]).backward()
        found = [(p * p.grad).abs() for n, p in by_hand.named_parameters() if n in masks]
        left = size - math.floor(size * (1 - 0.1 ** (number / 3)) + (1e-9 if number == 3 else 0))
        kept = keep_largest_jointly(found, left, among=[*masks.values()])
        masks = dict(zip(masks, kept, strict=True))
        with torch.no_grad():
            for n, mask in masks.items():
                by_hand.get_parameter(n).mul_(mask)
    several = masks_of(pruned(net(), 0.9, batches=batches, loss=entropy, rounds=3))
    assert differences(several, masks) == []
    assert differences(several, masks_of(pruned(net(), 0.9, batches=batches, loss=entropy))) != []


def test_layers_keep_at_least_so_many_weights_and_it_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    model = net()
    with torch.no_grad():
        model[4].weight.mul_(1e-4)
    with pytest.warns(UserWarning, match=r"leaves no weight in 2\.weight, 4\.weight"):
        alone = masks_of(pruned(copy.deepcopy(model), 0.9, score="magnitude", batches=1))
    assert not alone["4.weight"].any()
    capsys.readouterr()
    found = masks_of(pruned(model, 0.9, score="magnitude", least=5))
    assert int(found["4.weight"].sum()) == 5
    assert sum(int((~m).sum()) for m in found.values()) == math.floor(0.9 * 396)
    assert (
        "least=5 keeps more weights than one ranking would: 2.weight 5 instead of 0, 4.weight 5 instead of 0."
        in capsys.readouterr().out
    )


@pytest.mark.parametrize("score", ["snip", "magnitude"])
def test_one_ranking_with_a_minimum_in_its_name_is_that_with_least(score: str) -> None:
    """Scores decide over all layers, and not the shares that magnitudes have under one threshold."""
    model, data = net(), {"batches": samples(), "loss": entropy} if score == "snip" else {}
    with torch.no_grad():
        model[4].weight.mul_(1e-4)
    first = PruneAtStart(0.9, score=score, distribution="global(5)", print_plan=False, **data)
    announced = first.plan(model)
    assert announced.joint == math.floor(0.9 * 396)
    named = masks_of(pruned(copy.deepcopy(model), 0.9, score=score, distribution="global(5)", **data))
    least = masks_of(pruned(model, 0.9, score=score, least=5, **data))
    assert differences(named, least) == []
    assert min(int(m.sum()) for m in named.values()) >= 5


@pytest.mark.filterwarnings("ignore:.*leaves no weight in", "ignore:doctor")
@pytest.mark.parametrize("when", ["start", 2])
def test_one_ranking_asks_no_magnitudes_for_shares(when: Any) -> None:
    """It may leave layers without a weight, where a threshold over magnitudes keeps one in each; and a plan needs no values."""
    model = nn.Sequential(*(nn.Linear(3, 3, bias=False) for _ in range(20)))
    method = methods.PruneAtStart(0.95, score="magnitude", when=when, print_plan=False)
    assert method.plan(model).zeros == 171
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    run = sparsify(method, model, optimizer, 4)
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.ones(2, 3)).sum().backward()
        optimizer.step()
    assert sum(int((~m).sum()) for m in run.masks.values()) == 171
    assert not [key for key in method.aux if key.startswith("allocated/")]
    with torch.device("meta"):
        bare = nn.Linear(30, 30)
    assert PruneAtStart(0.9, when=when).plan(bare).zeros == 810


def test_a_layer_without_any_weight_is_warned_of() -> None:
    model = net()
    with torch.no_grad():
        model[2].weight.mul_(1e-6)
    with pytest.warns(UserWarning, match=r"leaves no weight in 2\.weight: nothing passes .*least="):
        pruned(model, 0.9, score="magnitude")


def test_signed_numbers_rank_as_magnitudes() -> None:
    for dtype in (torch.float32, torch.float64):
        values = torch.tensor([-math.inf, -3.0, -1e-30, -0.0, 0.0, 1e-30, 2.5, 3e38, math.inf], dtype=dtype)
        found = as_magnitudes(values)
        assert bool((found >= 0).all())
        assert found[3] == found[4]
        assert torch.equal(found.unique(), found.index_select(0, torch.tensor([0, 1, 2, 3, 5, 6, 7, 8])))
    close = torch.tensor([1.0, 1.0]).nextafter(torch.tensor([2.0, 0.0]))
    assert bool(as_magnitudes(close)[0] > as_magnitudes(close)[1])


# ---------------------------------------------------------------------- runs


@pytest.mark.parametrize("score", ["grasp", "crop"])
def test_layers_of_different_precision_are_ranked_together(score: str) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(3)
            self.a, self.b = nn.Linear(6, 8).double(), nn.Linear(8, 3)

        def forward(self, inputs: Tensor) -> Tensor:
            return self.b(self.a(inputs.double()).tanh().to(self.b.weight.dtype))

    mixed = masks_of(pruned(Mixed(), 0.5, score=score, batches=samples(), loss=entropy))
    double = masks_of(pruned(Mixed().double(), 0.5, score=score, batches=samples(), loss=entropy))
    assert differences(mixed, double) == []
    assert all(bool(m.any()) for m in mixed.values())


@pytest.mark.parametrize("score", NAMES)
def test_a_trainer_and_a_loop_have_the_same_masks_and_masks_never_move(score: str) -> None:
    """The loop is given what the Trainer draws: all samples."""
    module = Classifier()
    every = {"batches": 99} if score in OF_LOSS else {}
    rounds = {"rounds": 2} if score == "synflow" else {}
    callback = PruneAtStart(0.8, score=score, print_plan=False, **every, **rounds)
    first: list[dict[str, Tensor]] = []
    begin = pl.callbacks.LambdaCallback(on_train_start=lambda *_: first.append(masks_of(callback)))
    fit(module, callback, begin)
    assert differences(first[0], masks_of(callback)) == []
    assert all(not bool(module.get_parameter(n)[~m].any()) for n, m in callback.masks.items())
    loop = Classifier()
    given = {"loss": loss_on} if score in OF_LOSS else {}
    run = sparsify(
        methods.PruneAtStart(0.8, score=score, print_plan=False, **every, **given, **rounds),
        loop,
        torch.optim.SGD(loop.parameters(), 0.1),
        4,
        data=Batches(),
    )
    assert differences(masks_of(run), first[0]) == []


def test_scores_are_of_eval_mode_and_leave_nothing_behind() -> None:
    module = Classifier()
    module.net.insert(3, nn.Dropout(0.5))
    before, states = copy.deepcopy(module.state_dict()), []
    callback = PruneAtStart(0.8, score="crop", batches=3, rounds=2, print_plan=False)

    class Look(pl.Callback):
        def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
            states.append((copy.deepcopy(module.state_dict()), module.training, [p.grad for p in module.parameters()]))

    torch.manual_seed(5)
    fit(module, callback, Look(), **ONE)
    (after, training, gradients) = states[0]
    assert training
    assert gradients == [None] * len(gradients)
    for key, value in before.items():
        mask = callback.masks.get(key)
        assert torch.equal(after[key], value if mask is None else value * mask), key


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(precision: str) -> None:
    callback = PruneAtStart(0.8, score="crop", print_plan=False)
    fit(Classifier(), callback, precision=precision, **ONE)
    assert callback.measured_sparsity()["sparsity/total"] == pytest.approx(0.8, abs=1e-3)


def test_mixed_precision_scores_without_autocast() -> None:
    plain, mixed = (PruneAtStart(0.8, score="grasp", batches=99, print_plan=False) for _ in range(2))
    fit(Classifier(), plain, **ONE)
    fit(Classifier(), mixed, precision="bf16-mixed", **ONE)
    assert differences(masks_of(plain), masks_of(mixed)) == []


class Counts(Classifier):
    """Counts calls of its loss."""

    calls = 0

    def loss(self, batch: Any) -> Tensor:
        self.calls += 1
        return super().loss(batch)


@pytest.mark.parametrize(("score", "calls"), [("snip", 3), ("fisher", 3), ("grasp", 6), ("crop", 6), ("magnitude", 0)])
def test_the_cost_in_forward_passes(score: str, calls: int) -> None:
    module = Counts()
    batches = {"batches": 3} if calls else {}
    fit(module, PruneAtStart(0.8, score=score, print_plan=False, **batches), **ONE)
    assert module.calls == calls + 1


def test_a_resumed_run_and_a_second_fit_score_nothing(tmp_path: Path) -> None:
    module, stops = Counts(), Stops(tmp_path, (5,))
    callback = PruneAtStart(0.8, print_plan=False)
    fit(module, callback, stops, max_epochs=1)
    assert module.calls == 9
    fit(module, callback, max_epochs=1)
    assert module.calls == 17
    again, resumed = Counts(conv_net(4)), PruneAtStart(0.8, print_plan=False)
    fit(again, resumed, ckpt_path=stops.path(5), max_epochs=1)
    assert again.calls == 3
    assert differences(masks_of(callback), masks_of(resumed)) == []
    with pytest.raises(ValueError, match=r"other arguments: score='snip' there and score='crop' here"):
        fit(Counts(), PruneAtStart(0.8, score="crop", print_plan=False), ckpt_path=stops.path(5))


def test_a_run_goes_on_where_batches_and_loss_are_other_objects(tmp_path: Path) -> None:
    """Their text holds no address in memory."""
    stops = Stops(tmp_path, (5,))

    def made() -> PruneAtStart:
        return PruneAtStart(
            0.8, batches=DataLoader(TensorDataset(*next(iter(Batches()))), 3), loss=loss_on, print_plan=False
        )

    first, again = made(), made()
    fit(Classifier(), first, stops)
    fit(Classifier(conv_net(3)), again, ckpt_path=stops.path(5))
    assert differences(masks_of(first), masks_of(again)) == []
    listed = PruneAtStart(0.8, batches=list(Batches()))
    assert len(repr(listed)) < 400
    assert pickle.loads(pickle.dumps(first)).arguments == first.arguments


def test_rescaling_comes_after_scoring() -> None:
    plain, rescaled = Classifier(), Classifier()
    callbacks = [PruneAtStart(0.8, batches=4, print_plan=False, rescale=r) for r in (None, "layer")]
    seen: list[dict[str, Tensor]] = []
    for module, callback in zip((plain, rescaled), callbacks, strict=True):
        look = pl.callbacks.LambdaCallback(
            on_train_start=lambda _, m: seen.append(copy.deepcopy(dict(m.named_parameters())))
        )
        fit(module, callback, look, **ONE)
    assert differences(*map(masks_of, callbacks)) == []
    for name, mask in callbacks[0].masks.items():
        factor = math.sqrt(mask.numel() / int(mask.sum()))
        assert torch.allclose(seen[1][name], seen[0][name] * factor, rtol=1e-6), name


def test_weights_are_made_anew_after_scoring() -> None:
    plain, fresh, other = (
        PruneAtStart(0.8, print_plan=False, reinit_after=on, seed=s) for on, s in ((False, 0), (True, 0), (True, 1))
    )
    begun: list[dict[str, Tensor]] = []
    for callback in (plain, fresh, other):
        module = Classifier()
        module.net[7].bias.requires_grad_(False)
        look = pl.callbacks.LambdaCallback(on_train_start=lambda _, m: begun.append(copy.deepcopy(m.state_dict())))
        torch.manual_seed(0)
        fit(module, callback, look, **ONE)
        begun[-1]["random"] = torch.get_rng_state()
    assert differences(masks_of(plain), masks_of(fresh)) == []
    for name in ("net.0.weight", "net.0.bias", "net.4.weight"):
        assert not torch.equal(begun[0][name], begun[1][name])
        assert not torch.equal(begun[2][name], begun[1][name])
    for name in ("net.1.weight", "net.1.running_mean", "net.7.bias", "random"):  # norms and what is frozen stay
        assert torch.equal(begun[0][name], begun[1][name]), name
    assert all(not bool(begun[1][n][~m].any()) for n, m in fresh.masks.items())


def test_a_refused_run_has_its_weights_again() -> None:
    class Refuses(pl.Callback):
        def on_train_start(self, *_: Any) -> None:
            raise ValueError("another callback refuses the fit before its first batch")

    module, callback = Classifier(), PruneAtStart(0.8, reinit_after=True, print_plan=False)
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match="another callback"):
        fit(module, callback, Refuses())
    assert differences(before, dict(module.state_dict())) == []
    assert not callback.masks


@pytest.mark.parametrize("make", [Static, SET, RigL, CTRE, GaP], ids=lambda m: m.__name__)
def test_methods_that_start_sparse_begin_with_scores(make: Any) -> None:
    times = {} if make is Static else {"every": 4}
    times |= {"stop": 14} if make in (SET, RigL, CTRE) else {}
    more = {"partitions": 2} if make is GaP else {}
    nets = [
        Classifier(
            nn.Sequential(nn.Flatten(), nn.Linear(50, 16), nn.Tanh(), nn.Linear(16, 12), nn.Tanh(), nn.Linear(12, 4))
        )
    ]
    nets.append(copy.deepcopy(nets[0]))
    callback = make(
        0.8, initial_mask=Score("snip", batches=99), print_plan=False, distribution="uniform", **times, **more
    )
    reference = PruneAtStart(0.8, distribution="uniform", batches=99, print_plan=False)
    begun: list[tuple[Any, Any]] = []
    begin = pl.callbacks.LambdaCallback(
        on_train_start=lambda *_: begun.append((masks_of(callback), {k: t.clone() for k, t in callback.aux.items()}))
    )
    fit(nets[0], reference, **ONE)
    fit(nets[1], callback, begin)
    masks, aux = begun[0]
    dense = callback.blocks()[0] if make is GaP else []
    for name, mask in reference.masks.items():
        expected = torch.ones_like(mask) if name in dense else mask
        assert torch.equal(masks[name], expected), name
        if callback.explores:
            assert torch.equal(aux[f"ever_active/{name}"], masks[name]), name


def test_a_loop_whose_ranks_share_nothing_needs_no_data_for_synflow() -> None:
    model = net()
    model.example_input_array = torch.zeros(1, 6)
    run = pruned(model, 0.9, score="synflow")
    assert sum(int((~m).sum()) for m in run.masks.values()) == math.floor(0.9 * 396)


class Tokens(nn.Module):
    """Inputs that are whole numbers, which stay."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.last = nn.Embedding(7, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.embed(x).mean(1))


def test_synflow_of_tokens() -> None:
    model = Tokens()
    run = pruned(model, 0.5, score="synflow", rounds=2, data=[(torch.tensor([[0, 3, 6]]),)])
    assert int((~run.masks["last.weight"]).sum()) == 6


def test_layers_without_a_score_keep_their_largest_weights() -> None:
    class Apart(Classifier):
        def __init__(self) -> None:
            super().__init__(nn.Sequential(nn.Flatten(), nn.Linear(50, 4)))
            self.beside = nn.Linear(50, 4)

        def loss(self, batch: Any) -> Tensor:
            logits = self.net(batch[0]) + (self.beside(batch[0].flatten(1)) if self.training else 0.0)
            return functional.cross_entropy(logits, batch[1])

    module, callback = Apart(), PruneAtStart(0.8, print_plan=False)
    weight = module.beside.weight.detach().clone()
    with pytest.warns(UserWarning, match=r"depends on beside\.weight, which keep their largest weights"):
        fit(module, callback, **ONE)
    mask = callback.masks["beside.weight"]
    assert int((~mask).sum()) == 160
    assert float(weight[mask].abs().min()) >= float(weight[~mask].abs().max())
    assert int((~callback.masks["net.1.weight"]).sum()) == math.floor(0.8 * 400) - 160


# ---------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"score": "taylor"}, r"score='taylor' is not known\. Give 'snip' or 'grasp'"),
        (
            {"initial_mask": "magnitude"},
            r"initial_mask='magnitude': PruneAtStart makes its masks by score=\. Leave initial_mask= out; Static",
        ),
        ({"batches": 0}, r"batches=0 is not a number of batches"),
        ({"batches": iter([])}, r"batches=list_iterator can be iterated once"),
        ({"rounds": 0}, r"rounds=0 is not a number of rounds of pruning"),
        ({"rounds": 2.5}, r"rounds=2\.5 is not a number of rounds of pruning"),
        ({"least": -1}, r"least=-1 is not a number of weights"),
        (
            {"least": 3, "distribution": "uniform"},
            r"least=3 is of one ranking over all layers, and distribution='uniform'",
        ),
        (
            {"least": 3, "distribution": "global(2)"},
            r"least=3 and distribution='global\(2\)' both say how many weights every layer keeps",
        ),
        (
            {"distribution": {"0.*": 0.5, "*": "global(2)"}},
            r"names 'global' in a mapping, and here 'global' is one ranking by score over all layers",
        ),
        ({"distribution": "global(x)"}, r"distribution='global\(x\)' is not known\. Give 'global\(2\)'"),
        ({"loss": 3}, r"loss=3 is not a function"),
        ({"reinit_after": "yes"}, r"reinit_after='yes' is neither True nor False"),
        ({"score": "synflow", "batches": 4}, r"batches= says nothing to score='synflow', which looks at no data"),
        ({"score": "random", "loss": entropy}, r"loss= says nothing to score='random'"),
        ({"score": "magnitude", "rounds": 2}, r"rounds=2: score='magnitude' is the same in every round"),
        ({"storage": "sparse"}, r"PruneAtStart scores every weight before it prunes"),
    ],
    ids=named,
)
def test_arguments_that_no_run_can_use_are_refused(options: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=why):
        methods.PruneAtStart(0.9, **options)


@pytest.mark.parametrize(
    ("start", "options", "why"),
    [
        (Score("magnitude"), {}, r"looks at each weight alone\. Give initial_mask='magnitude'"),
        (
            Score("snip", least=2),
            {},
            r"ranks the weights of each layer by themselves.*PruneAtStart\(distribution='global'\)",
        ),
        (
            "snip",
            {"storage": "sparse"},
            r"ranks single weights when training starts, and storage='sparse' decides before .* Leave storage= out, or give",
        ),
        ("crop", {"pattern": "fan_in/2"}, r"and pattern='fan_in/2' keeps them by rows\. Leave pattern= out"),
        ("snipp", {}, r"initial_mask='snipp' is not a file\. .*or a score: 'snip', 'grasp'"),
    ],
    ids=named,
)
def test_starts_that_cannot_be_are_refused(start: Any, options: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        methods.Static(initial_mask=start, **options).plan(net())


def test_a_loop_gives_loss_and_data() -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(
        ValueError, match=r"computes scores from the loss, which a loop of your own does not show\. Give loss="
    ):
        pruned(model, 0.9)
    with pytest.raises(ValueError, match=r"computes scores on batches of the training data\. Give sparsify"):
        pruned(model, 0.9, loss=entropy)
    with pytest.raises(ValueError, match=r"no example_input_array.*sparsify\(\.\.\., data=\)"):
        pruned(model, 0.9, score="synflow")
    assert differences(before, dict(model.state_dict())) == []


def test_first_masks_by_a_score_name_the_arguments_of_the_score() -> None:
    def begun(start: Any, data: Any = None) -> None:
        model = net()
        method = methods.Static(0.9, initial_mask=start, print_plan=False)
        sparsify(method, model, torch.optim.SGD(model.parameters(), 0.1), 4, data=data)

    with pytest.raises(
        ValueError,
        match=r"^initial_mask=Score\(name='snip'\): .*Give loss=.*initial_mask=Score\('snip', loss=\.\.\.\)\.$",
    ):
        begun("snip")
    with pytest.raises(
        ValueError, match=r"^initial_mask=Score\(name='grasp', .*Give sparsify.* batches= are arguments of Score"
    ):
        begun(Score("grasp", loss=entropy))
    begun(Score("snip", loss=entropy), data=samples())


def test_manual_optimization_gives_the_loss() -> None:
    module = ByHand()
    with pytest.raises(ValueError, match=r"ByHand is in manual optimization.*Give loss="):
        fit(module, PruneAtStart(0.8, print_plan=False))
    callback = PruneAtStart(0.8, loss=loss_on, print_plan=False)
    fit(module, callback, **ONE)
    assert callback.measured_sparsity()["sparsity/total"] == pytest.approx(0.8, abs=1e-3)


def test_scores_that_are_not_finite_are_refused() -> None:
    model = net()
    with pytest.raises(ValueError, match=r"score='snip' of 0\.weight is not finite"):
        pruned(model, 0.9, batches=samples(), loss=lambda m, b: entropy(m, b) * math.inf)


def test_more_than_is_left_cannot_be_kept_in_every_layer() -> None:
    with pytest.raises(ValueError, match=r"least=30 keeps 90 weights of all layers, and sparsity=0\.9 leaves 40"):
        pruned(net(), 0.9, score="magnitude", least=30)
    with pytest.raises(ValueError, match=r"least=30 keeps 90 weights of all layers"):  # not where it would be pruned
        methods.EarlyCroP(0.9, distribution="global(30)").plan(net())


def test_modules_that_cannot_be_made_anew_are_refused_before_scoring() -> None:
    class Own(nn.Linear):
        reset_parameters = None

    model = nn.Sequential(nn.Linear(6, 4), nn.Tanh())
    model.append(Own.__new__(Own))
    nn.Module.__init__(model[2])
    model[2].in_features, model[2].out_features, model[2].bias = 4, 3, None
    model[2].weight = nn.Parameter(torch.randn(3, 4))
    with pytest.raises(ValueError, match=re.escape("reset_parameters(), which 2 (Own) lacks")):
        pruned(model, 0.5, reinit_after=True, batches=samples(), loss=entropy)


def test_a_plan_without_data() -> None:
    for method in (Static(0.8, initial_mask="snip"), PruneAtStart(0.8), RigL(initial_mask=Score("synflow"))):
        assert method.plan(net()).total == pytest.approx(0.8 if "0.8" in repr(method) else 0.9, abs=0.01)


def test_a_trial_run_of_the_trainer_changes_nothing() -> None:
    callback = PruneAtStart(0.8, print_plan=False)
    trainer = trainer_for([callback], fast_dev_run=True)
    trainer.fit(Classifier(), Batches())
    assert callback.measured_sparsity()["sparsity/total"] == pytest.approx(0.8, abs=1e-3)
