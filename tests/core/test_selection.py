"""Which parameters become sparse, of which shape, and why the others stay dense."""

import math
from typing import Any

import pytest
import torch
from support.nets import Regression
from support.rig import fit_steps
from torch import nn

from sparse_callbacks import RigL, Static
from sparse_callbacks.core.selection import Entry, entries, patterns, select


def chosen(model: nn.Module, **options: Any) -> dict[str, Entry]:
    return {e.name: e for e in select(model, **options) if not e.reason}


def reasons(model: nn.Module, **options: Any) -> dict[str, str]:
    return {e.name: e.reason for e in select(model, **options)}


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(5, 3), (3, 5)),
        (nn.Conv1d(6, 4, 3), (4, 6, 3)),
        (nn.Conv2d(6, 4, (3, 5)), (4, 6, 3, 5)),
        (nn.Conv2d(6, 4, 3, groups=2), (4, 3, 3, 3)),
        (nn.Conv3d(2, 4, (1, 2, 3)), (4, 2, 1, 2, 3)),
        (nn.ConvTranspose1d(6, 4, 3), (4, 6, 3)),
        (nn.ConvTranspose2d(6, 4, (3, 5)), (4, 6, 3, 5)),
        (nn.ConvTranspose2d(6, 4, 3, groups=2), (4, 3, 3, 3)),
        (nn.ConvTranspose3d(2, 4, (1, 2, 3), groups=2), (4, 1, 1, 2, 3)),
        (nn.Bilinear(3, 4, 2), None),
    ],
    ids=str,
)
def test_a_weight_is_one_layer_of_outputs_inputs_kernel(module: nn.Module, shape: tuple[int, ...] | None) -> None:
    found = {e.name: e for e in entries(nn.ModuleDict({"layer": module}))}
    entry = found["layer.weight"]
    assert found["layer.bias"].reason == "bias"
    assert entry.full_shape == tuple(module.weight.shape)
    if shape is None:
        assert entry.reason == "not a weight of a supported layer (Bilinear)"
    else:
        assert (entry.shape, entry.parts, entry.reason) == (shape, 1, "")
        assert math.prod(shape) == entry.size == module.weight.numel()


def test_the_fan_in_of_a_transposed_convolution_decides_its_erdos_renyi_density() -> None:
    # as stored, (in, out / groups, *kernel), the sum of dimensions would be 64 + 2 + 3 + 3
    model = nn.ModuleDict({"up": nn.ConvTranspose2d(64, 8, 3, groups=4), "head": nn.Linear(40, 40)})
    twin = nn.ModuleDict({"up": nn.Conv2d(64, 8, 3, groups=4), "head": nn.Linear(40, 40)})
    plans = [RigL(sparsity=0.8).plan(m) for m in (model, twin)]
    assert plans[0]["up.weight"].zeros == plans[1]["up.weight"].zeros > 0


def test_attention_is_three_matrices_with_counts_of_their_own() -> None:
    attention = nn.MultiheadAttention(8, 2)
    found = chosen(nn.ModuleDict({"attention": attention}))
    fused = found["attention.in_proj_weight"]
    assert (fused.parts, fused.shape, fused.full_shape) == (3, (8, 8), (24, 8))
    assert fused.layers == [f"attention.in_proj_weight[{i}]" for i in range(3)]
    assert [tuple(p.shape) for p in fused.split(attention.in_proj_weight)] == [(8, 8)] * 3
    assert set(found) == {"attention.in_proj_weight", "attention.out_proj.weight"}
    split = chosen(nn.MultiheadAttention(8, 2, kdim=5, vdim=6, bias=False, add_bias_kv=True))
    assert {n: (e.parts, e.shape) for n, e in split.items()} == {
        "q_proj_weight": (1, (8, 8)),
        "k_proj_weight": (1, (8, 5)),
        "v_proj_weight": (1, (8, 6)),
        "out_proj.weight": (1, (8, 8)),
    }
    assert reasons(nn.MultiheadAttention(8, 2, add_bias_kv=True))["bias_k"] == "bias"


class Attend(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.head = nn.Linear(12, 6)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.attention(x[:, None], x[:, None], x[:, None])[0][:, 0])


def test_each_stacked_matrix_holds_its_count_before_and_after_updates(tmp_path: Any) -> None:
    callback = RigL(
        0.7, distribution={"*in_proj_weight[[]1]": 0.5, "*": "uniform"}, every=1, stop=10, drop_fraction="constant(0.5)"
    )
    module = Regression(Attend())
    fit_steps(tmp_path, callback, module, 8)
    assert callback.updates == 8 - callback.step >= 3
    parts = callback.masks["net.attention.in_proj_weight"].chunk(3)
    assert [int((~p).sum()) for p in parts] == [100, 72, 100]
    assert callback.plan()["net.attention.in_proj_weight"].zeros == 272


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.LSTM(5, 7), {"weight_ih_l0": (4, (7, 5)), "weight_hh_l0": (4, (7, 7))}),
        (
            nn.GRU(5, 7, bidirectional=True),
            {f"weight_{k}_l0{r}": (3, (7, i)) for r in ("", "_reverse") for k, i in (("ih", 5), ("hh", 7))},
        ),
        (
            nn.LSTM(5, 7, proj_size=3, num_layers=2),
            {
                "weight_ih_l0": (4, (7, 5)),
                "weight_hh_l0": (4, (7, 3)),
                "weight_hr_l0": (1, (3, 7)),
                "weight_ih_l1": (4, (7, 3)),
                "weight_hh_l1": (4, (7, 3)),
                "weight_hr_l1": (1, (3, 7)),
            },
        ),
        (nn.RNN(5, 7, bias=False), {"weight_ih_l0": (1, (7, 5)), "weight_hh_l0": (1, (7, 7))}),
        (nn.LSTMCell(5, 7), {"weight_ih": (4, (7, 5)), "weight_hh": (4, (7, 7))}),
        (nn.GRUCell(5, 7), {"weight_ih": (3, (7, 5)), "weight_hh": (3, (7, 7))}),
        (nn.RNNCell(5, 7), {"weight_ih": (1, (7, 5)), "weight_hh": (1, (7, 7))}),
    ],
    ids=str,
)
def test_recurrent_weights_are_one_layer_for_each_gate(
    module: nn.Module, expected: dict[str, tuple[int, tuple[int, ...]]]
) -> None:
    found = chosen(module)
    assert {n: (e.parts, e.shape) for n, e in found.items()} == expected
    assert {r for n, r in reasons(module).items() if n not in expected} <= {"bias"}
    for entry in found.values():
        assert sum(p.numel() for p in entry.split(module.get_parameter(entry.name))) == entry.size


def test_a_subclass_counts_as_its_base() -> None:
    class Own(nn.LSTM):
        pass

    class Fancy(nn.Conv2d):
        pass

    assert chosen(Own(3, 4))["weight_hh_l0"].parts == 4
    assert chosen(Fancy(3, 4, 2))["weight"].shape == (4, 3, 2, 2)


NORMS = nn.ModuleDict(
    {
        "batch": nn.BatchNorm2d(4),
        "layer": nn.LayerNorm([4, 4]),
        "group": nn.GroupNorm(2, 4),
        "rms": nn.RMSNorm([4, 4]),
        "instance": nn.InstanceNorm2d(4, affine=True),
        "prelu": nn.PReLU(4),
        "linear": nn.Linear(3, 3),
    }
)


@pytest.mark.parametrize("include", [None, "*", "*weight"])
def test_biases_and_norms_are_never_sparse(include: str | None) -> None:
    found = reasons(NORMS, include=patterns(include, "include"))
    assert [n for n, r in found.items() if not r] == ["linear.weight"]
    for norm in ("batch", "layer", "group", "rms", "instance"):
        assert found[f"{norm}.weight"] == "norm"
    assert found["linear.bias"] == "bias"
    assert found["prelu.weight"] == "not a weight of a supported layer (PReLU)"


@pytest.mark.parametrize("glob", ["linear.bias", "batch.weight", "prelu*"])
def test_naming_a_bias_or_a_norm_does_not_make_it_sparse(glob: str) -> None:
    with pytest.raises(
        ValueError, match=r"matches no parameter that can be sparse\. Candidates: linear\.weight\. Use include=\['\*'\]"
    ):
        select(NORMS, include=(glob,))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_is_sparse_only_when_named(kind: Any) -> None:
    model = nn.ModuleDict({"table": kind(10, 4), "head": nn.Linear(4, 10)})
    why = "embedding: sparse only where include= names it"
    assert reasons(model)["table.weight"] == why
    assert reasons(model, include=("*",))["table.weight"] == why
    assert set(chosen(model, include=("table*",))) == {"table.weight"}
    assert set(chosen(model, include=("*", "table.weight"))) == {"head.weight", "table.weight"}
    assert set(chosen(model, include=("*", "table.weight"), exclude=("table*",))) == {"head.weight"}
    with pytest.raises(ValueError, match=r"no parameter is left .* table\.weight \(embedding"):
        select(nn.ModuleDict({"table": kind(10, 4)}))


@pytest.mark.parametrize("order", ["embedding first", "linear first"])
def test_a_matrix_shared_with_an_embedding_counts_as_an_embedding(order: str) -> None:
    table, head, other = nn.Embedding(10, 4), nn.Linear(4, 10, bias=False), nn.Linear(4, 4)
    head.weight = table.weight
    members = {"table": table, "head": head} if order == "embedding first" else {"head": head, "table": table}
    model = nn.ModuleDict(members | {"other": other})
    assert set(chosen(model)) == {"other.weight"}
    assert set(chosen(model, include=("*",))) == {"other.weight"}
    name = "table.weight" if order == "embedding first" else "head.weight"
    for either in ("table.weight", "head.weight"):
        assert set(chosen(model, include=(either,))) == {name}
    assert chosen(model, include=("table.weight",))[name].shape == (10, 4)


def test_two_layers_that_share_a_matrix_have_one_mask(tmp_path: Any) -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.head = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 6)
            self.second.weight = self.first.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.head(self.second(self.first(x).relu()))

    net = Tied()
    assert set(chosen(net)) == {"first.weight", "head.weight"}
    assert set(chosen(net, include=("second*",))) == {"first.weight"}
    assert set(chosen(net, exclude=("second*",))) == {"head.weight"}
    callback = RigL(0.5, distribution="uniform", every=2, stop=6)
    fit_steps(tmp_path, callback, Regression(net), 8)
    assert set(callback.masks) == {"net.first.weight", "net.head.weight"}
    assert callback.updates == 3
    assert torch.equal(net.second.weight, net.second.weight * callback.masks["net.first.weight"])
    assert sum(r.size for r in callback.plan()) == sum(p.numel() for p in net.parameters())


def test_a_frozen_weight_stays_dense_with_a_word(tmp_path: Any) -> None:
    module = Regression()
    module.net[0].weight.requires_grad_(False)
    callback = Static(0.5)
    fit_steps(tmp_path, callback, module, 2)
    assert callback.plan()["net.0.weight"].reason == "dense until it is trained: frozen (requires_grad=False)"
    assert set(callback.masks) == {"net.2.weight"}
    assert module.net[0].weight.count_nonzero() == module.net[0].weight.numel()


def test_a_weight_that_no_optimizer_steps_stays_dense_with_a_word(tmp_path: Any) -> None:
    module = Regression()
    module.configure = lambda _: torch.optim.SGD(module.net[2].parameters(), lr=0.1)
    callback = Static(0.5)
    fit_steps(tmp_path, callback, module, 2)
    assert callback.plan()["net.0.weight"].reason == "dense until it is trained: in no optimizer"
    assert set(callback.masks) == {"net.2.weight"}


@pytest.mark.parametrize(
    ("which", "dense"),
    [
        ("first", {"0.weight": "first layer, kept dense on request"}),
        ("last", {"4.weight": "last layer, kept dense on request"}),
        (
            "both",
            {"0.weight": "first layer, kept dense on request", "4.weight": "last layer, kept dense on request"},
        ),
    ],
)
def test_first_and_last_layer_stay_dense_on_request(which: Any, dense: dict[str, str]) -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 5), nn.Embedding(4, 4), nn.Linear(5, 6))
    found = reasons(model, keep_dense=which)
    assert {n: r for n, r in found.items() if "request" in r} == dense
    assert found["2.weight"] == ""


def test_keep_dense_both_of_one_layer_leaves_nothing() -> None:
    with pytest.raises(
        ValueError, match=r"0\.weight \(first layer, kept dense on request\)\. Change include=, exclude= or keep_dense="
    ):
        select(nn.Sequential(nn.Linear(3, 4)), keep_dense="both")


GLOBS = nn.ModuleDict({"conv1": nn.Conv2d(1, 2, 3), "conv2": nn.Conv2d(2, 2, 3), "fc": nn.Linear(4, 4)})


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        (None, None, {"conv1", "conv2", "fc"}),
        ("conv*", None, {"conv1", "conv2"}),
        (["conv1.weight", "f?.weight"], None, {"conv1", "fc"}),
        (None, "conv[1]*", {"conv2", "fc"}),
        ("conv*", ["*2.weight"], {"conv1"}),
        ("*", ("fc*",), {"conv1", "conv2"}),
        (None, "*.bias", {"conv1", "conv2", "fc"}),
    ],
)
def test_include_and_exclude_are_globs_on_names(include: Any, exclude: Any, expected: set[str]) -> None:
    found = chosen(GLOBS, include=patterns(include, "include"), exclude=patterns(exclude, "exclude"))
    assert set(found) == {f"{n}.weight" for n in expected}


def test_the_reasons_of_globs() -> None:
    found = reasons(GLOBS, include=("conv*",), exclude=("conv2*",))
    assert found["fc.weight"] == "not matched by include="
    assert found["conv2.weight"] == "matched by exclude="
    assert found["conv1.bias"] == "bias"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"include": ("foo*",)},
            r"include=\['foo\*'\] matches no parameter that can be sparse\. Candidates: conv1\.weight, conv2\.weight, fc\.weight\. "
            r"Use include=\['\*'\] for every matrix and kernel",
        ),
        ({"include": ("conv1*", "Conv2*")}, r"include=\['Conv2\*'\] matches no parameter"),
        (
            {"exclude": ("foo*",)},
            r"exclude=\['foo\*'\] matches no parameter.*Candidates: conv1\.weight, conv2\.weight, fc\.weight\. Drop it from exclude=",
        ),
        (
            {"exclude": ("*",)},
            r"no parameter is left.*conv1\.weight \(matched by exclude=\).*Change include=, exclude= or keep_dense=",
        ),
        (
            {"include": ("fc*",), "exclude": ("fc*",)},
            r"conv1\.weight \(not matched by include=\).*fc\.weight \(matched by exclude=\)",
        ),
        ({"trained": set()}, r"no parameter is left.*fc\.weight \(in no optimizer\)"),
    ],
)
def test_zero_matches_are_refused_with_the_candidates(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        select(GLOBS, **options)


def test_a_model_without_a_supported_layer_is_refused() -> None:
    for options in ({}, {"include": ("*",)}):
        with pytest.raises(ValueError, match=r"none: the model has no supported layer"):
            select(nn.Sequential(nn.BatchNorm1d(3)), **options)


@pytest.mark.parametrize(
    ("argument", "value"), [("include", []), ("include", ()), ("include", [""]), ("include", [3]), ("exclude", "")]
)
def test_what_is_no_glob_is_refused(argument: str, value: Any) -> None:
    with pytest.raises(
        ValueError,
        match=rf"{argument}=.* is neither a glob nor a list of globs\. Give for example {argument}=\['conv\*'",
    ):
        Static(0.5, **{argument: value})


def test_lazy_modules_are_refused_until_they_have_a_shape() -> None:
    model = nn.Sequential(nn.LazyLinear(4))
    with pytest.raises(
        ValueError,
        match=r"0\.weight has no shape yet \(a lazy module\).*Run one batch through the model.*configure_model",
    ):
        select(model)
    model(torch.zeros(2, 3))
    assert chosen(model)["0.weight"].shape == (4, 3)


def test_a_reparametrised_weight_is_left_out_with_a_word() -> None:
    model = nn.Sequential(torch.nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), nn.Linear(3, 3))
    found = reasons(model)
    assert [n for n, r in found.items() if not r] == ["1.weight"]
    assert all(r == "reparametrised: not a plain weight" for n, r in found.items() if "original" in n)


def test_an_empty_weight_is_left_out() -> None:
    assert set(chosen(nn.Sequential(nn.Linear(0, 3), nn.Linear(3, 3)))) == {"1.weight"}


def test_every_parameter_is_listed_once_in_the_models_order() -> None:
    model = nn.Sequential(
        nn.Embedding(3, 4), nn.LSTM(4, 5), nn.LayerNorm(5), nn.MultiheadAttention(4, 2), nn.Linear(4, 3)
    )
    model[4].weight = model[0].weight
    assert [e.name for e in entries(model)] == [n for n, _ in model.named_parameters()]
    assert [e.size for e in entries(model)] == [p.numel() for p in model.parameters()]


def test_resnet18() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = models.resnet18()
    found = chosen(net)
    assert set(found) == {n for n, p in net.named_parameters() if p.ndim in (2, 4)}
    assert len(found) == 21
    assert found["layer2.0.downsample.0.weight"].shape == (128, 64, 1, 1)
    assert {r for r in reasons(net).values() if r} == {"norm", "bias"}


def test_vit_b_16() -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        net = models.vit_b_16()
    found = chosen(net)
    layers = [layer for e in found.values() for layer in e.layers]
    assert len(layers) == 12 * 6 + 2  # q, k, v, out and two of the MLP in each block, the stem and the head
    dense = reasons(net)
    assert dense["class_token"] == "not a weight of a supported layer (VisionTransformer)"
    assert {r for r in dense.values() if not r.startswith("not a weight of")} == {"", "norm", "bias"}
    assert sum(e.size for e in found.values()) > 0.99 * sum(p.numel() for p in net.parameters())
