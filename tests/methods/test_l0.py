"""Constrained L0: one step by the book, the constraint, words and figures."""

import copy
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.l0 import LAYERS_TARGET, LENET_ALL, LENET_SIZES, MLP_DENSITIES, MLP_DENSITY, STEP
from support.hard_concrete import expected_l2
from support.inside import dense_values, parameters_of
from support.l0 import Flat, at_start, constraints_of, expected_densities, l0, noise_of, shares_of_parameters
from torch import Tensor, nn

from sparse_callbacks import ConstrainedL0
from sparse_callbacks.methods.l0 import gates
from sparse_callbacks.methods.l0.arguments import LEAST
from sparse_callbacks.tasks.models import lenet5_caffe, lenet_300_100
from sparse_callbacks.testing.comparison import assert_effective, differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, double_mlp
from sparse_callbacks.testing.runs import fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


# ---------------------------------------------------------------------- one step by the book


class Squares(pl.LightningModule):
    """0.5 * ||W x - y||^2 in float64."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2, bias=False).double()
        self.layer.weight.data.copy_(torch.tensor(STEP["weight_out_in"]) * 0.5)  # new gates of droprate 0.5 double it
        self.losses: list[float] = []

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        error = self.layer(torch.tensor(STEP["x"]).double()) - torch.tensor(STEP["y"])
        return 0.5 * error.square().sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=STEP["lr_weight"])


def test_one_step_of_the_whole_game() -> None:
    name = "layer.weight"
    callback, module = (
        ConstrainedL0(
            STEP["target"],
            gate_lr=STEP["lr_gate"],
            dual_lr=STEP["lr_dual"],
            gate_optimizer="sgd",
            l2=STEP["weight_decay"],
            print_plan=False,
        ),
        Squares(),
    )
    callback.noise = lambda kernel: torch.tensor([STEP["u"]], dtype=torch.float64)  # type: ignore[method-assign]

    def set_up() -> None:
        callback.aux[f"log_alpha/{name}"].copy_(torch.tensor([STEP["log_alpha_per_input"]]))
        callback.aux[f"multiplier/{name}"].fill_(STEP["lambda"])
        assert dense_values(callback, name).tolist() == STEP["weight_out_in"]

    seen: dict[str, Any] = {}

    def in_batch() -> None:
        dense = dense_values(callback, name)
        seen["z"] = (module.layer.weight.detach() / dense.where(dense != 0, torch.ones_like(dense)))[0].tolist()
        seen["l2"] = STEP["weight_decay"] * float(expected_l2(dense, callback.aux[f"log_alpha/{name}"]))

    begin = pl.callbacks.LambdaCallback(on_train_start=lambda *_: set_up(), on_train_batch_start=lambda *_: in_batch())
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    see = pl.callbacks.LambdaCallback(
        on_train_batch_end=lambda t, m, outputs, *_: seen.update(loss=float(outputs["loss"]))
    )
    fit(module, callback, begin, see, max_steps=1)
    close = {"abs": 1e-9}
    assert seen["z"] == pytest.approx(STEP["z"], **close)
    total = seen["loss"] + seen["l2"] + STEP["lambda"] * STEP["defect"]
    assert seen["l2"] / STEP["weight_decay"] == pytest.approx(STEP["expected_l2"], **close)
    assert STEP["loss"] in (pytest.approx(seen["loss"], **close), pytest.approx(total, **close))
    for row, expected in zip(dense_values(callback, name).tolist(), STEP["weight_after"], strict=True):
        assert row == pytest.approx(expected, **close)
    assert callback.aux[f"log_alpha/{name}"][0].tolist() == pytest.approx(STEP["log_alpha_after"], **close)
    assert float(callback.aux[f"multiplier/{name}"]) == pytest.approx(STEP["lambda_after"], **close)
    assert torch.equal(
        module.layer.weight, gates.median(callback.aux[f"log_alpha/{name}"]) * dense_values(callback, name)
    )


@pytest.mark.parametrize("gate_optimizer", ["sgd", "adam"])
@pytest.mark.parametrize(
    ("unit", "l2", "constraint"),
    [("channel", 0.0, "layer"), ("channel", 0.01, "model"), ("weight", 0.01, "layer"), ("weight", 0.0, "model")],
)
def test_training_equals_a_loop_with_autograd(gate_optimizer: str, unit: str, l2: float, constraint: str) -> None:
    """Gates as parameters of a graph that holds the whole Lagrangian, each descended by a torch optimizer."""
    options = {"gate_optimizer": gate_optimizer, "unit": unit, "l2": l2, "constraint": constraint}
    callback, module = l0(0.4, **options), Classifier(double_mlp())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05, momentum=0.9)  # type: ignore[method-assign]
    start: dict[str, Tensor] = {}
    noise: list[dict[str, Tensor]] = []
    begin = pl.callbacks.LambdaCallback(
        on_train_start=lambda *_: start.update({k: v.clone() for k, v in callback.aux.items()}),
        on_train_batch_start=lambda *_: noise.append(
            {n: noise_of(callback, n) for n in ("net.1.weight", "net.3.weight")}
        ),
    )
    fit(module, callback, begin)

    net = double_mlp()
    names = {"net.1.weight": net[1], "net.3.weight": net[3]}
    log_alpha = {n: start[f"log_alpha/{n}"].clone().requires_grad_() for n in names}
    groups = (
        {n: {n: 1.0} for n in names}
        if constraint == "layer"
        else {"net.1.weight": {"net.1.weight": 1200 / 1296, "net.3.weight": 96 / 1296}}
    )
    multiplier = dict.fromkeys(groups, 0.0)
    with torch.no_grad():
        for layer in names.values():
            layer.weight /= 0.5
    weights = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    kind = torch.optim.SGD if gate_optimizer == "sgd" else torch.optim.Adam
    descent = kind(list(log_alpha.values()), lr=0.1)
    for (x, y), u in zip(Batches().all(2), noise, strict=True):
        gated, penalty = [], torch.zeros((), dtype=torch.float64)
        opened = {n: torch.sigmoid(a + gates.SHIFT) for n, a in log_alpha.items()}
        defects = {
            g: sum(share * opened[n].mean() for n, share in shares.items()) - 0.4 for g, shares in groups.items()
        }
        for n, layer in names.items():
            s = torch.sigmoid((torch.logit(u[n]) + log_alpha[n]) * 1.5)
            gated.append((s * 1.2 - 0.1).clamp(0, 1) * layer.weight)
            penalty = penalty + l2 * 0.5 * (opened[n].detach() * layer.weight.square()).sum()
        penalty = penalty + sum(multiplier[g] * defect for g, defect in defects.items())
        hidden = torch.tanh(nn.functional.linear(x.double().flatten(1), gated[0], net[1].bias))
        loss = nn.functional.cross_entropy(nn.functional.linear(hidden, gated[1], net[3].bias), y) + penalty
        weights.zero_grad(), descent.zero_grad()
        loss.backward()
        weights.step(), descent.step()
        for value in log_alpha.values():
            value.data.clamp_(-gates.LIMIT, gates.LIMIT)
        multiplier = {g: max(0.0, multiplier[g] + 0.1 * float(d)) if float(d) >= 0 else 0.0 for g, d in defects.items()}
    for n, layer in names.items():
        assert torch.allclose(callback.aux[f"log_alpha/{n}"], log_alpha[n].detach(), rtol=0, atol=1e-8)
        assert torch.allclose(dense_values(callback, n), layer.weight.detach(), rtol=0, atol=1e-8)
        assert not torch.allclose(callback.aux[f"log_alpha/{n}"], start[f"log_alpha/{n}"], atol=1e-4)
    assert {k: float(v) for k, v in callback.aux.items() if k.startswith("multiplier/")} == {
        f"multiplier/{g}": pytest.approx(m, abs=1e-9) for g, m in multiplier.items()
    }


# ---------------------------------------------------------------------- the constraint


@pytest.mark.parametrize("constraint", ["model", "layer"])
@pytest.mark.parametrize("gate_optimizer", ["sgd", "adam"])
def test_density_comes_down_to_the_target_and_the_multiplier_goes_back_to_zero(
    constraint: str, gate_optimizer: str
) -> None:
    rates = {"gate_lr": 10.0, "dual_lr": 0.1} if gate_optimizer == "sgd" else {"gate_lr": 0.02, "dual_lr": 0.01}
    callback, module = l0(0.5, constraint=constraint, gate_optimizer=gate_optimizer, **rates), Flat(double_mlp())
    density: list[list[float]] = []
    multipliers: list[list[float]] = []

    def see(*_: Any) -> None:
        density.append([found for _, found in expected_densities(callback)])
        multipliers.append([float(v) for k, v in callback.aux.items() if k.startswith("multiplier/")])

    fit(module, callback, watch(see), max_epochs=60)
    assert len(density[0]) == len(multipliers[0]) == (1 if constraint == "model" else 2)
    for column, force in zip(zip(*density, strict=True), zip(*multipliers, strict=True), strict=True):
        met = next(i for i, d in enumerate(column) if d < 0.5)
        assert column[0] > 0.8
        assert all(a >= b for a, b in pairwise(column[: met + 1]))
        assert all(a <= b for a, b in pairwise(force[: met + 1]))
        assert force[met] > 0.1 * max(force)
        assert force[met + 1] == force[-1] == 0  # one step later, as the multiplier sees the density before the step
        assert 0.4 < column[-1] < 0.5
    assert callback.at_target
    assert callback.target_sparsity == 0.5


def test_a_constraint_for_each_layer_with_its_own_target() -> None:
    targets = {"net.1.*": 0.3, "*": 0.7}
    callback = l0(targets, constraint="layer", gate_lr=0.02, dual_lr=0.01, gate_optimizer="adam")
    fit(Flat(double_mlp()), callback, max_epochs=60)
    figures = callback.figures()
    assert figures["l0/expected/net.1.weight"] == pytest.approx(0.3, abs=0.1)
    assert figures["l0/expected/net.3.weight"] == pytest.approx(0.7, abs=0.1)
    assert callback.target_sparsity == pytest.approx(1 - (0.3 * 1200 + 0.7 * 96) / 1296)
    assert l0(targets, constraint="layer").target_sparsity == pytest.approx(0.3)  # the layers are not known yet


def test_the_published_network_at_its_start() -> None:
    class Images(Classifier):
        def __init__(self) -> None:
            super().__init__(lenet_300_100((1, 28, 28), 10))

        def loss(self, batch: Any) -> Tensor:
            return self.net(torch.zeros(2, 1, 28, 28)).square().mean()

    first = next(n for n, p in Images().named_parameters() if p.shape == (300, 784))
    callback, module = l0(droprate={first: 0.2, "*": 0.5}), Images()
    before = copy.deepcopy(module.state_dict())
    figures: dict[str, float] = {}
    begin = at_start(lambda: figures.update(callback.figures()))
    dense: dict[str, Tensor] = {}
    keep = at_start(lambda: dense.update({n: dense_values(callback, n).clone() for n in parameters_of(callback)}))
    fit(module, callback, begin, keep, max_steps=1)
    expected = [v for k, v in figures.items() if k.startswith("l0/expected/") and not k.endswith("total")]
    assert expected == pytest.approx(MLP_DENSITIES, abs=2e-3)  # log_alpha starts with a spread of 0.01
    assert figures["l0/expected/total"] == pytest.approx(MLP_DENSITY, abs=2e-3)
    for name, value in dense.items():
        assert torch.allclose(value, before[name] / (0.8 if name == first else 0.5))


def test_parameters_behind_gates_are_those_of_kernels_with_their_biases_and_of_matrices_alone() -> None:
    net = lenet5_caffe((1, 28, 28), 10)
    callback = l0()

    class Images(Classifier):
        def loss(self, batch: Any) -> Tensor:
            return self.net(torch.zeros(2, 1, 28, 28)).square().mean()

    fit(Images(net), callback, max_steps=1)
    (constraint,) = constraints_of(callback)
    names, total = constraint.names, sum(LENET_SIZES)
    assert [round(s * total) for s in constraint.shares.values()] == LENET_SIZES
    assert sum(p.numel() for p in net.parameters()) == LENET_ALL
    assert len(parameters_of(callback)) == 6
    shapes = [tuple(callback.aux[f"log_alpha/{n}"].shape) for n in names]
    assert shapes == [(20, 1, 1, 1), (50, 1, 1, 1), (1, 800), (1, 500)]


@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_a_layer_keeps_its_likeliest_gate(unit: str) -> None:
    callback, module = l0(LEAST, unit=unit, gate_lr=0.5, dual_lr=10.0), Flat(double_mlp())
    fit(module, callback, watch(lambda *_: assert_effective(module, callback)), max_epochs=20)
    active = {n: int(m.sum()) for n, m in callback.masks.items()}
    assert active == (
        {"net.1.weight": 24, "net.3.weight": 4} if unit == "channel" else {"net.1.weight": 1, "net.3.weight": 1}
    )
    for name, mask in callback.masks.items():
        log_alpha = callback.aux[f"log_alpha/{name}"]
        value = (module.get_parameter(name) / dense_values(callback, name))[mask]
        assert torch.allclose(value, gates.p_open(log_alpha.max()), rtol=1e-6)
        assert 0 < float(value[0]) <= 0.5
        assert float(log_alpha.min()) == pytest.approx(-gates.LIMIT)


# ---------------------------------------------------------------------- words and figures


def test_curves(tmp_path: Path) -> None:
    callback, module = l0(constraint="layer"), Classifier()
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(module, callback, logger=logger, log_every_n_steps=50, max_epochs=13)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    table = [dict(zip(rows[0].split(","), r.split(","), strict=True)) for r in rows[1:]]
    steps = [int(r["step"]) for r in table if r["l0/expected/total"]]
    assert steps == [49, 99, 103]  # and the end
    kernels = ("net.0.weight", "net.4.weight", "net.7.weight")
    assert {f"l0/{kind}/{n}" for kind in ("multiplier", "expected", "purged") for n in kernels} <= set(table[0])
    figures = callback.figures()
    shares = shares_of_parameters(callback, kernels)
    for kind in ("expected", "purged"):
        assert figures[f"l0/{kind}/total"] == pytest.approx(sum(shares[n] * figures[f"l0/{kind}/{n}"] for n in kernels))
    measured = callback.measured_sparsity()
    assert all(figures[f"l0/purged/{n}"] == pytest.approx(1 - measured[f"sparsity/{n}"]) for n in kernels)


def test_before_fit_there_are_no_figures() -> None:
    for callback in (l0(), l0(constraint="layer")):
        assert callback.figures() == callback.outcome() == {}
        fit(Classifier(double_mlp()), callback, max_steps=1)
        assert callback.figures()
        assert callback.outcome()
        callback.engine.forget()
        assert callback.figures() == callback.outcome() == {}
        assert not callback.at_target


def test_a_run_that_ends_above_its_target_says_so() -> None:
    callback = l0(0.1, gate_lr=1e-6)
    with pytest.warns(
        UserWarning,
        match=r"ended at an expected density of 0\.83\d+ in the model, above its target of 0\.1000.*dual_lr=",
    ):
        fit(Classifier(double_mlp()), callback, max_steps=2)
    assert not callback.at_target
    other = l0({"net.1.*": 0.9, "*": 0.2}, constraint="layer", gate_lr=1e-6)
    with pytest.warns(UserWarning, match=r"0\.83\d+ in net\.3\.weight, above its target of 0\.2000"):
        fit(Classifier(double_mlp()), other, max_steps=2)
    assert not l0().at_target
    for density, near in ((0.81, True), (0.8, False)):  # three points are near enough
        still = l0(density, gate_lr=0.0)
        fit(Classifier(double_mlp()), still, max_steps=1)
        assert still.at_target == near


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ({"sparsity": 0.9}, r"sparsity= is not an argument of ConstrainedL0.*Give density="),
        ({"distribution": "uniform"}, r"distribution= is not an argument of ConstrainedL0.*give density= a mapping"),
        (
            {"density": 0.0},
            r"density=0\.0 is out of range\. Give a number that is at least 0\.04713 and at most 1: log_alpha is",
        ),
        ({"density": 0.04}, r"density=0\.04.*at least 0\.04713"),
        ({"density": 1.1}, r"density=1\.1.*at most 1"),
        ({"density": True}, r"density=True.*out of range"),
        ({"density": "0.5"}, r"density='0\.5'.*out of range"),
        ({"density": {"*": 0.5}}, r"has a target for each layer\. Use constraint='layer', or one number"),
        ({"density": {"*": 2}, "constraint": "layer"}, r"2 is out of range"),
        ({"constraint": "net"}, r"constraint='net' is not known\. Give 'model' or 'layer'\."),
        ({"unit": "filter"}, r"unit='filter' is not known\. Give 'channel' or 'weight'\."),
        ({"gate_optimizer": "lbfgs"}, r"gate_optimizer='lbfgs' is not known\. Give 'sgd' or 'adam'\."),
        ({"droprate": 0.0}, r"droprate=0\.0.*at least 0\.01 and at most 0\.99"),
        ({"droprate": {"*": 1}}, r"1 is out of range.*at most 0\.99"),
        ({"gate_lr": -1}, r"gate_lr=-1.*at least 0\.$"),
        ({"gate_lr": math.inf}, r"gate_lr=inf is out of range.*at least 0\.$"),
        ({"dual_lr": math.inf}, r"dual_lr=inf.*out of range"),
        ({"l2": math.inf}, r"l2=inf.*out of range"),
        ({"dual_lr": math.nan}, r"dual_lr=nan.*out of range"),
        ({"l2": -0.1}, r"l2=-0\.1.*out of range"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be(arguments: dict[str, Any], error: str) -> None:
    with pytest.raises(ValueError, match=error):
        ConstrainedL0(**arguments)


def test_models_and_optimizers_that_do_not_fit() -> None:
    with pytest.raises(
        ValueError, match=r"l2=0\.001 already decays gated parameters.*weight_decay=0\.01 for net\.1\.weight"
    ):
        fit(Classifier(double_mlp()), l0(l2=0.001))
    with pytest.raises(ValueError, match=r"density= has no value for net\.3\.weight"):
        fit(Classifier(double_mlp()), l0({"net.1.*": 0.5}, constraint="layer"))
    net = double_mlp()
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=r"droprate= has a value for 'conv\*'"):
        fit(Classifier(net), l0(droprate={"conv*": 0.5, "*": 0.2}))
    assert differences(before, dict(net.state_dict())) == []


def test_other_arguments_do_not_resume(tmp_path: Path) -> None:
    fit(Classifier(double_mlp()), l0(0.5), max_steps=2).save_checkpoint(tmp_path / "run.ckpt")
    with pytest.raises(ValueError, match=r"density=0\.5 there and density=0\.4 here"):
        fit(Classifier(double_mlp()), l0(0.4), ckpt_path=tmp_path / "run.ckpt")


def test_the_target_of_the_tables() -> None:
    assert l0(LAYERS_TARGET).target_sparsity == 0.5
    text = repr(ConstrainedL0({"net.1.*": 0.3, "*": 0.7}, constraint="layer", print_plan=False))
    assert text.startswith(
        "ConstrainedL0(density={'net.1.*': 0.3, '*': 0.7}, constraint='layer', unit='channel', droprate=0.5,"
    )
