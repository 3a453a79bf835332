"""Which storage each layer gets, why one stays masked, and what the plan says of it."""

import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from support import loops
from torch import Tensor, nn

import sparse_callbacks.core.storages.auto_storage as auto_storage
from sparse_callbacks import SparseLinear, exchange_layers, methods
from sparse_callbacks.core.storages.exchange import exchange
from sparse_callbacks.methods import SET, RigL, Static

KINDS = {
    "SNFS": "momentum of the gradient of every weight",
    "GMP": "starts dense",
    "DPF": "trains the pruned weights on",
    "GaP": "makes layers dense in turn",
    "ParallelGaP": "makes layers dense in turn",
    "ConstrainedL0": "a gate for every weight",
    "SMCP": "a gate for every channel",
    "ChannelPruning": "starts dense and removes whole channels",
    "CTRE": "similarity of its neurons",
    "EarlyCroP": "scores every weight before it prunes",
    "PruneAtStart": "scores every weight before it prunes",
}


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def storages(method: Any, model: nn.Module) -> dict[str, str]:
    return {row.name: row.storage for row in method.plan(model) if row.sparsity}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("storage", ["sparse", "grouped", {"0*": "sparse", "*": "auto"}, "csr", None, {}])
def test_methods_that_keep_something_for_pruned_weights_say_what(name: str, storage: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} .*{KINDS[name]}.*storage='masked'"):
        getattr(methods, name)(storage=storage)
    made = getattr(methods, name)(storage="masked")
    assert "storage" not in made.arguments
    assert "masked" not in str(made.plan(net()))


@pytest.mark.parametrize("name", sorted(KINDS))
@pytest.mark.parametrize("storage", ["auto", {"0*": "masked", "*": "auto"}])
def test_methods_with_masks_alone_take_auto_and_the_plan_says_why_it_is_masked(name: str, storage: Any) -> None:
    made = getattr(methods, name)(storage=storage, print_plan=False)
    assert "storage" not in made.arguments
    assert re.search(f"is masked: {name} .*{KINDS[name]}", str(made.plan(net())))
    copied = pickle.loads(pickle.dumps(made))
    assert str(copied.plan(net())) == str(made.plan(net()))


def test_a_subclass_that_hands_its_arguments_on_may_have_storage_where_its_base_may() -> None:
    class Mine(SET):
        def __init__(self, *args: Any, extra: int = 1, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.extra = extra

    class Dense(methods.GMP):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)

    assert storages(Mine(0.5, storage="sparse", distribution="uniform"), net()) == dict.fromkeys(
        ("0.weight", "2.weight", "4.weight"), "sparse"
    )
    with pytest.raises(ValueError, match="Dense starts dense"):
        Dense(0.5, storage="sparse")


class Scores(SET):
    def grow_scores(self, step: Any, name: str) -> Tensor:
        return torch.rand_like(self.params[name])


def test_a_rule_that_scores_every_weight_is_refused() -> None:
    with pytest.raises(ValueError, match="Scores chooses what to grow by a score of every weight"):
        Scores(0.5, storage="sparse")
    plan = Scores(0.5, storage="auto", distribution="uniform").plan(net())
    assert {row.storage for row in plan} == {"masked"}
    assert plan["0.weight"].remark.startswith("Scores chooses what to grow by a score of every weight")


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"storage": "csr"}, "storage='csr' is not known. Give 'masked', 'sparse', 'grouped', 'auto'"),
        ({"storage": {"*": "csr"}}, "is not known"),
        ({"storage": {}}, "is not known"),
        ({"storage": None}, "is not known"),
        ({"storage": "grouped", "group": 0}, "group=0 is not a number of output rows"),
        ({"storage": "grouped", "group": True}, "group=True is not"),
        ({"storage": "auto", "rows": 0}, "rows=0 is not the number of rows"),
        ({"storage": "auto", "rows": {"*": -1}}, "is not the number of rows"),
        ({"storage": "sparse", "pattern": "fan_in/8"}, "pattern='fan_in/8' .*storage='grouped'"),
        ({"storage": "grouped", "group": 4, "pattern": "fan_in/8"}, "pattern='fan_in/8' .*group=4"),
    ],
)
def test_arguments_that_no_run_can_use_are_refused(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        RigL(0.5, **arguments)


def test_globs_choose_and_the_first_that_matches_counts() -> None:
    storage = {"0*": "grouped", "*.weight": "sparse"}
    assert storages(RigL(0.5, storage=storage, group=8, distribution="uniform"), net()) == {
        "0.weight": "grouped",
        "2.weight": "sparse",
        "4.weight": "sparse",
    }
    assert storages(RigL(0.5, storage={"2.weight": "sparse"}), net())["0.weight"] == "masked"
    with pytest.raises(ValueError, match=r"storage= has a value for '9\*', which matches no parameter"):
        RigL(0.5, storage={"9*": "sparse"}).plan(net())


def tied() -> nn.Module:
    model = net()
    model[2].weight = nn.Parameter(torch.randn(24, 24))
    model.append(nn.Linear(24, 24))
    model[5].weight = model[2].weight
    return model


def registered_twice() -> nn.Module:
    model = net()
    model.again = model[2]
    return model


def replaced(change: Callable[[nn.Linear], object]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        model = net()
        change(model[2])
        return model

    return made


class Mine(nn.Linear):
    pass


def of_a_subclass() -> nn.Module:
    model = net()
    model[2] = Mine(24, 24)
    return model


def weight_on_its_own(layer: nn.Linear) -> None:
    layer.weight = type("Special", (nn.Parameter,), {})(layer.weight.detach())


NOT_EXCHANGED = {
    "tied": (tied, "are one tensor, and a tied weight has no sparse storage"),
    "registered twice": (registered_twice, "2.weight and again.weight are one tensor"),
    "parametrised": (replaced(lambda m: nn.utils.parametrizations.weight_norm(m)), "parametrised"),
    "old weight_norm": (replaced(lambda m: nn.utils.weight_norm(m)), "parametrised"),
    "spectral_norm": (replaced(lambda m: nn.utils.parametrizations.spectral_norm(m)), "parametrised"),
    "pruned": (replaced(lambda m: nn.utils.prune.l1_unstructured(m, "weight", 0.5)), "parametrised"),
    "bias parametrised": (
        replaced(lambda m: nn.utils.parametrize.register_parametrization(m, "bias", nn.ReLU())),
        "parametr",
    ),
    "frozen": (replaced(lambda m: m.requires_grad_(False)), "frozen"),
    "subclass": (of_a_subclass, "a Mine, which may compute otherwise"),
    "forward": (replaced(lambda m: setattr(m, "forward", lambda x: x)), "forward is replaced"),
    "compiled": (replaced(lambda m: m.compile()), "compiled by itself"),
    "hidden": (replaced(lambda m: setattr(m, "keys", 1)), "its attribute 'keys'"),
    "bfloat16": (replaced(lambda m: m.to(torch.bfloat16)), "float32 and float64, and the layer is of bfloat16"),
    "hook of the weight": (replaced(lambda m: m.weight.register_hook(lambda g: g)), "a hook, which expects the dense"),
    "its own class of weight": (replaced(weight_on_its_own), "its weight is a Special"),
}


@pytest.mark.filterwarnings("ignore:.*weight_norm:FutureWarning")
@pytest.mark.parametrize("kind", NOT_EXCHANGED)
def test_what_is_no_plain_linear_layer_is_not_exchanged(kind: str) -> None:
    make, why = NOT_EXCHANGED[kind]
    model = make()
    held = model[2]
    with pytest.raises(ValueError, match=why):
        exchange_layers(RigL(0.5, storage="sparse"), model)
    assert model[2] is held
    assert not [m for m in model.modules() if isinstance(m, SparseLinear)]
    # others are exchanged where the storage is not one for all
    method = RigL(0.5, storage={"*": "sparse"})
    method.plan(model)
    exchange_layers(method, model)
    assert model[2] is held
    assert isinstance(model[0], SparseLinear)
    # and where the user has left the layer out
    again = make()
    left_out = ["2.*", *(["again.*", "5.*"] if "tied" in kind or "twice" in kind else [])]
    exchange_layers(RigL(0.5, storage="sparse", exclude=left_out[0]), again)
    assert isinstance(again[0], SparseLinear)


@pytest.mark.parametrize("left_out", [{"exclude": "2.*"}, {"include": "0.*"}, {"distribution": {"2.*": 0.0, "*": 0.5}}])
def test_what_is_left_out_or_dense_by_the_distribution_stays_and_refuses_nothing(left_out: dict[str, Any]) -> None:
    model = tied()
    layers = exchange_layers(RigL(0.5, storage="sparse", **left_out), model)
    assert "0.weight" in layers
    assert isinstance(model[2], nn.Linear)


def test_other_kinds_of_layers_stay_masked_with_a_reason_under_any_storage() -> None:
    model = loops.conv_net()
    method = RigL(0.5, storage="sparse", distribution="uniform")
    plan = method.plan(model)
    assert plan["0.weight"].storage == "masked"
    assert plan["0.weight"].remark == "only linear layers have another storage"
    assert list(exchange_layers(method, model)) == ["6.weight"]


def test_an_attention_keeps_its_weights_masked() -> None:
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    method = SET(0.5, storage="sparse")
    plan = method.plan(model)
    assert plan["self_attn.out_proj.weight"].remark == "the attention reads this weight itself"
    assert list(exchange_layers(method, model)) == ["linear1.weight", "linear2.weight"]


def test_a_group_that_does_not_divide_the_rows_leaves_the_layer_masked_with_that_reason() -> None:
    method, model = RigL(0.5, storage="grouped", group=8, distribution="uniform"), net()
    plan = method.plan(model)
    assert [plan[f"{i}.weight"].storage for i in (0, 2, 4)] == ["grouped", "grouped", "masked"]
    assert plan["4.weight"].remark == "groups of 8 do not divide its 4 rows"
    assert list(exchange_layers(method, model)) == ["0.weight", "2.weight"]


def test_the_plan_of_groups_shows_what_whole_columns_reach() -> None:
    method, model = RigL(0.9, storage="grouped", group=8, distribution="uniform", exclude="4*"), net()
    plan = method.plan(model)
    assert plan["0.weight"].zeros == 24 * (12 - 1)  # round(0.1 * 12) of 12 inputs
    assert plan["2.weight"].zeros == 24 * (24 - 2)
    assert math.isclose(plan.total, (24 * 11 + 24 * 22) / (24 * 12 + 24 * 24))
    exchange_layers(method, model)
    assert model[0].live == 24 * 1
    assert str(method.plan(model)) == str(plan)


def test_a_plan_has_a_column_of_storages_only_where_some_layer_is_not_masked() -> None:
    assert "storage" not in str(RigL(0.5).plan(net()))
    lines = str(RigL(0.5, storage="sparse", keep_dense="last").plan(net())).splitlines()
    assert "storage" in lines[1]
    assert [line.count("sparse") for line in lines[3:9]] == [1, 0, 1, 0, 0, 0]


def test_another_device_is_refused_and_auto_stays_masked_there() -> None:
    cuda = torch.device("cuda")
    for storage in ("sparse", {"*": "sparse"}):
        with pytest.raises(ValueError, match=r"runs on the CPU.*trained on cuda"):
            exchange(RigL(0.5, storage=storage), net(), device=cuda)
    method = RigL(0.5, storage="auto", rows=8)
    assert not exchange(method, net(), device=cuda).layers
    assert "runs on the CPU" in method.attachment.choices["0.weight"].note
    assert exchange(RigL(0.5, storage="grouped", group=4), net(), device=cuda).layers


def test_a_head_that_shares_its_weight_with_an_embedding_is_dense_and_refuses_nothing() -> None:
    model = nn.ModuleDict(
        {"embedding": nn.Embedding(8, 16), "body": nn.Linear(16, 16), "head": nn.Linear(16, 8, bias=False)}
    )
    model["head"].weight = model["embedding"].weight
    assert list(exchange_layers(SET(0.5, storage="sparse"), model)) == ["body.weight"]
    with pytest.raises(ValueError, match=r"embedding.weight and head.weight are one tensor"):
        exchange_layers(SET(0.5, storage="sparse", include=["head.weight", "body*"]), model)


def test_a_lazy_layer_that_has_its_shape_is_exchanged() -> None:
    model = nn.Sequential(nn.LazyLinear(16), nn.LazyLinear(8, bias=False))
    with pytest.raises(ValueError, match="no shape yet"):
        exchange_layers(SET(0.5, storage="sparse"), model)
    model(torch.zeros(1, 4))
    assert list(exchange_layers(SET(0.5, storage="sparse"), model)) == ["0.weight", "1.weight"]
    assert model[1].bias is None


# ---------------------------------------------------------------------- auto


def timed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def times_of(shape: tuple[int, int], rows: int, density: float, dtype: torch.dtype) -> dict[str, float]:
        asked.append((shape, rows, round(density, 6), dtype))
        return {"masked": 2.0, "sparse": 1.0 if shape[0] == 24 else 3.0}

    monkeypatch.setattr(auto_storage, "times_of", times_of)
    return asked


def test_a_glob_of_rows_that_matches_no_layer_is_refused_by_the_plan() -> None:
    with pytest.raises(ValueError, match=r"rows= has a value for '9\*', which matches no parameter"):
        RigL(0.5, storage="auto", rows={"9*": 8}).plan(net())


def test_auto_takes_what_is_faster_and_the_plan_shows_the_times(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch)
    method, model = RigL(0.5, storage="auto", rows={"0*": 7, "*": 9}, distribution="uniform"), net()
    before = method.plan(model)
    assert before["0.weight"].storage == "decided at fit"
    assert list(exchange_layers(method, model)) == ["0.weight", "2.weight"]
    assert asked == [
        ((24, 12), 7, 0.5, torch.float32),
        ((24, 24), 9, 0.5, torch.float32),
        ((4, 24), 9, 0.5, torch.float32),
    ]
    after = method.plan(model)
    assert [after[f"{i}.weight"].storage for i in (0, 2, 4)] == ["sparse", "sparse", "masked"]
    assert "masked 2" in after["0.weight"].remark
    assert "sparse 3" in after["4.weight"].remark
    assert [r.zeros for r in before] == [r.zeros for r in after]


def test_auto_without_rows_stays_masked_and_says_what_to_give(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = timed(monkeypatch)
    method, model = Static(0.5, storage="auto"), net()
    assert not exchange_layers(method, model)
    assert not asked
    assert "give rows=" in method.plan(model)["0.weight"].remark
    given = exchange(method, model, rows={"0": 8})  # by the name of a layer, as a look at a batch gives them
    assert list(given.layers) == ["0.weight"]
    assert "0.weight: storage 'sparse'" in given.report
