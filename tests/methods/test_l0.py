"""Constrained L0: one step by the book, what the weights hold when, the constraint, channels that are really gone, refusals."""

import copy
import math
import pickle
import warnings
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.l0 import LAYERS_TARGET, LENET_ALL, LENET_SIZES, MLP_DENSITIES, MLP_DENSITY, STEP
from pytorch_lightning.plugins.precision import MixedPrecision
from support.data import Batches, Thirds
from support.inside import dense_values, parameters_of
from support.l0 import (
    at_start,
    close_some,
    constraints_of,
    expected_densities,
    l0,
    median_gates,
    pulls_on_gates,
    sampled_factor,
    sampled_gates,
    shares_of_parameters,
    tied_kernels,
)
from support.nets import ByHand, Classifier, Rivals, conv_net, double_mlp
from support.rig import Stops, assert_effective, differences, fit, snapshot, watch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_callbacks.core import optimizers
from sparse_callbacks.core.weights import MaskStore
from sparse_callbacks.methods.l0.l0 import LEAST, ConstrainedL0, gates
from sparse_callbacks.tasks.models import lenet5_caffe, lenet_300_100

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
    callback, module = ConstrainedL0(
        STEP["target"], gate_lr=STEP["lr_gate"], dual_lr=STEP["lr_dual"], gate_optimizer="sgd", l2=STEP["weight_decay"], print_plan=False
    ), Squares()  # fmt: skip
    callback.noise = lambda kernel: torch.tensor([STEP["u"]], dtype=torch.float64)  # type: ignore[method-assign]

    def set_up() -> None:
        callback.aux[f"log_alpha/{name}"].copy_(torch.tensor([STEP["log_alpha_per_input"]]))
        callback.aux[f"multiplier/{name}"].fill_(STEP["lambda"])
        assert dense_values(callback, name).tolist() == STEP["weight_out_in"]

    seen: dict[str, Any] = {}

    def in_batch() -> None:
        dense = dense_values(callback, name)
        seen["z"] = (module.layer.weight.detach() / dense.where(dense != 0, torch.ones_like(dense)))[0].tolist()
        seen["l2"] = STEP["weight_decay"] * float(gates.expected_l2(dense, callback.aux[f"log_alpha/{name}"]))

    begin = pl.callbacks.LambdaCallback(on_train_start=lambda *_: set_up(), on_train_batch_start=lambda *_: in_batch())
    module.log = lambda *_, **__: None  # type: ignore[method-assign]
    see = pl.callbacks.LambdaCallback(on_train_batch_end=lambda t, m, outputs, *_: seen.update(loss=float(outputs["loss"])))
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
    assert torch.equal(module.layer.weight, gates.median(callback.aux[f"log_alpha/{name}"]) * dense_values(callback, name))


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
        on_train_batch_start=lambda *_: noise.append({n: callback.noise(n) for n in ("net.1.weight", "net.3.weight")}),
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
        defects = {g: sum(share * opened[n].mean() for n, share in shares.items()) - 0.4 for g, shares in groups.items()}
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


class Flat(Classifier):
    """A loss that no weight changes."""

    def loss(self, batch: Any) -> Tensor:
        return 0 * super().loss(batch)


@pytest.mark.parametrize("constraint", ["model", "layer"])
@pytest.mark.parametrize("gate_optimizer", ["sgd", "adam"])
def test_density_comes_down_to_the_target_and_the_multiplier_goes_back_to_zero(constraint: str, gate_optimizer: str) -> None:
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
    assert active == ({"net.1.weight": 24, "net.3.weight": 4} if unit == "channel" else {"net.1.weight": 1, "net.3.weight": 1})
    for name, mask in callback.masks.items():
        log_alpha = callback.aux[f"log_alpha/{name}"]
        value = (module.get_parameter(name) / dense_values(callback, name))[mask]
        assert torch.allclose(value, gates.p_open(log_alpha.max()), rtol=1e-6)
        assert 0 < float(value[0]) <= 0.5
        assert float(log_alpha.min()) == pytest.approx(-gates.LIMIT)


# ---------------------------------------------------------------------- what the weights hold, and when


@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_samples_in_a_batch_and_medians_at_any_other_time(unit: str) -> None:
    """Also at a validation inside an accumulation window; one sample through the window, another in the next."""
    callback = l0(unit=unit, constraint="layer")
    during: list[dict[str, Tensor]] = []
    between: list[bool] = []

    def medians() -> bool:
        found = {n: median_gates(callback, n) * dense_values(callback, n) for n in parameters_of(callback)}
        for kernel in tied_kernels(callback):
            assert torch.equal(median_gates(callback, kernel), gates.median(callback.aux[f"log_alpha/{kernel}"]))
        return all(torch.equal(module.get_parameter(n), v) for n, v in found.items())

    class Watched(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            during.append({n: self.get_parameter(n).detach().clone() for n in parameters_of(callback)})
            return super().training_step(batch, batch_idx)

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            between.append(medians())

    module = Watched()
    begin = pl.callbacks.LambdaCallback(
        on_train_start=lambda *_: close_some(callback)
    )
    trainer = pl.Trainer(
        max_epochs=2, accumulate_grad_batches=4, val_check_interval=2, logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, num_sanity_val_steps=0, accelerator="cpu",
        callbacks=[callback, begin, watch(lambda *_: between.append(medians()))],
    )  # fmt: skip
    trainer.fit(module, Batches(), Batches(batches=1))
    assert len(during) == 16
    assert between == [True] * (16 + 8)
    for index, values in enumerate(during):
        alike = differences(values, during[max(0, index - 1)]) == []
        assert alike == (index % 4 != 0) or index == 0
    closed = sum(int((v == 0).sum()) for v in during[0].values())
    assert closed > sum(v.numel() for v in during[0].values()) / 5


def test_noise_derives_from_seed_step_and_name() -> None:
    def drawn(seed: int, steps: int) -> dict[str, Tensor]:
        callback = l0(seed=seed)
        found: dict[str, Tensor] = {}

        def take(*_: Any) -> None:
            found.update({n: callback.noise(n) for n in tied_kernels(callback)})

        see = pl.callbacks.LambdaCallback(on_train_batch_start=take)
        fit(Classifier(double_mlp()), callback, see, max_steps=steps)
        return found

    first, again, later, other = drawn(0, 1), drawn(0, 1), drawn(0, 2), drawn(1, 1)
    assert differences(first, again) == []
    assert len(differences(first, later)) == len(differences(first, other)) == 2
    assert not torch.equal(first["net.1.weight"][0, :24], first["net.3.weight"][0])


def test_what_the_user_writes_into_the_weights_is_kept() -> None:
    class Clamps(Classifier):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                for p in self.net.parameters():
                    p.clamp_(-0.02, 0.02)

    callback, module = l0(gate_lr=0.0), Clamps(double_mlp())
    fit(module, callback)
    for name in callback.masks:
        assert float((median_gates(callback, name) * dense_values(callback, name)).abs().max()) < 0.1
        assert float(module.get_parameter(name).abs().max()) <= 0.02


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_before_optimizer_step"])
@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_a_write_in_a_batch_is_taken_by_the_sample_in_force(unit: str, hook: str) -> None:
    """One that changes no value leaves the dense weights as they are, also where the sample is closed and the median is open."""

    class Clamps(Classifier):
        def clamp(self, *_: Any) -> None:
            with torch.no_grad():
                for p in self.net.parameters():
                    p.clamp_(-100, 100)

    runs = []
    for writes in (False, True):
        callback, module = l0(unit=unit), Clamps(double_mlp())
        if writes:
            setattr(module, hook, module.clamp)
        fit(module, callback)
        runs.append((callback.state_dict(), dict(module.state_dict())))
    assert differences(*runs, bitwise=False) == []


@pytest.mark.parametrize("window", [1, 2])
def test_a_write_in_a_batch_becomes_the_value_over_the_sample(window: int) -> None:
    class Writes(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 2:
                with torch.no_grad():
                    self.net[1].weight[1] = 0.25
            return super().training_step(batch, batch_idx)

    callback, module = l0(gate_lr=0.0), Writes(double_mlp())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.0)  # type: ignore[method-assign]
    held, samples = [], []
    see = pl.callbacks.LambdaCallback(
        on_train_batch_start=lambda *_: samples.append(sampled_gates(callback, "net.1.weight").flatten().clone()),
        on_train_batch_end=lambda *_: held.append(dense_values(callback, "net.1.weight").clone()),
    )
    fit(module, callback, see, max_epochs=1, limit_train_batches=4, accumulate_grad_batches=window)
    before, after, z = held[1], held[2], samples[2]
    assert torch.equal(before[[0, *range(2, 24)]], after[[0, *range(2, 24)]])
    assert torch.equal(after[1], torch.where(z == 0, before[1], 0.25 / z))
    assert bool((z == 0).any())


def test_an_exception_in_a_batch_leaves_medians() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise KeyError("data")
            return super().training_step(batch, batch_idx)

    callback, module = l0(), Fails(double_mlp())
    with pytest.raises(KeyError, match="data"):
        fit(module, callback)
    for name in callback.masks:
        assert torch.equal(module.get_parameter(name), median_gates(callback, name) * dense_values(callback, name))


@pytest.mark.parametrize("constraint", ["model", "layer"])
def test_the_host_reads_a_constant_number_of_times_in_a_step(constraint: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU each read waits for the device: as many for eight layers as for two."""

    class Reads(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            Reads.count += func is torch.ops.aten._local_scalar_dense.default
            return func(*args, **(kwargs or {}))

    to_list = Tensor.tolist

    def tolist(tensor: Tensor) -> Any:
        Reads.count += 1
        return to_list(tensor)

    def all_finite(gradients: Any) -> Tensor:
        """As on a GPU."""
        return torch.stack([g.abs().amax() for g in gradients]).isfinite().all()

    monkeypatch.setattr(Tensor, "tolist", tolist)
    monkeypatch.setattr(optimizers, "all_finite", all_finite)
    found = []
    for layers in (2, 8):
        torch.manual_seed(0)
        hidden = [m for _ in range(layers) for m in (nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3))]
        net = nn.Sequential(nn.Conv2d(2, 3, 1), *hidden, nn.Flatten(), nn.Linear(75, 4))
        callback, module, mode, counts = l0(0.05, gate_lr=0.5, constraint=constraint), Classifier(net), Reads(), []
        begin = at_start(lambda mode=mode: mode.__enter__())
        try:
            fit(module, callback, begin, watch(lambda *_, to=counts: to.append(Reads.count)), max_epochs=1)
        finally:
            mode.__exit__(None, None, None)
        assert len(tied_kernels(callback)) == layers + 2
        found.append([after - before for before, after in pairwise(counts)])
    assert found[0] == found[1]
    assert 0 < max(found[0]) <= 4


def test_what_is_active_behind_gates_is_counted_when_somebody_asks() -> None:
    layer = nn.Linear(3, 2)
    params = dict(layer.named_parameters())
    store = MaskStore(params, {}, {n: torch.ones_like(p) for n, p in params.items()})
    store.gate("weight", torch.tensor([[0.0, 0.5, 1.0]]))
    store.gate("bias", torch.tensor([0.0, 0.1]))
    store.scale("bias", torch.zeros(2))  # a sample changes nothing
    assert store.active == {"weight": 4, "bias": 1}
    store.gate("weight", torch.tensor([[0.0, 0.0, 1.0]]))
    assert store.active == {"weight": 2, "bias": 1}
    store.gate("bias", torch.zeros(2))
    assert store.active == {"weight": 2, "bias": 0}


# ---------------------------------------------------------------------- channels that are really gone


class Convolutions(nn.Sequential):
    """Two convolutions with norms and a classifier, in float64."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        super().__init__(
            nn.Conv2d(2, 12, 3), nn.BatchNorm2d(12), nn.ReLU(), nn.Conv2d(12, 9, 2, padding=1), nn.BatchNorm2d(9), nn.ReLU(), nn.Flatten(),
            nn.Linear(144, 4),
        )  # fmt: skip
        self.double()
        for norm in (self[1], self[4]):
            nn.init.normal_(norm.bias, 0.5)


def purged(net: Convolutions) -> nn.Module:
    """The same network without channels and inputs that are zero, made smaller by hand."""
    first, second = (net[i].weight.detach().flatten(1).abs().sum(1) > 0 for i in (0, 3))
    small = nn.Sequential(
        nn.Conv2d(2, int(first.sum()), 3), nn.BatchNorm2d(int(first.sum())), nn.ReLU(),
        nn.Conv2d(int(first.sum()), int(second.sum()), 2, padding=1), nn.BatchNorm2d(int(second.sum())), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * int(second.sum()), 4),
    ).double()  # fmt: skip
    state = net.state_dict()
    kept = {"0": first, "1": first, "3": second, "4": second}
    for key, value in state.items():
        value = value[kept[key[0]]] if key[0] in kept and value.ndim else value
        value = value[:, first] if key == "3.weight" else value
        state[key] = value[:, second.repeat_interleave(16)] if key == "7.weight" else value
    small.load_state_dict(state)
    return small.eval()


def test_the_purged_network_equals_the_gated_one() -> None:
    callback, module = l0(0.9, gate_lr=0.0), Classifier(Convolutions())
    begin = at_start(lambda: close_some(callback))
    fit(module, callback, begin)
    net = module.net.eval()
    small = purged(net)
    assert [m.weight.shape[0] for m in (small[0], small[3])] == [8, 6]
    x = Batches().x.double()
    with torch.no_grad():
        assert torch.allclose(small(x), net(x), rtol=0, atol=1e-10)
        assert float(net(x).std()) > 0.01
        between = net[1](net[0](x))
    assert not between[:, ::3].any()
    assert between[:, 1].any()
    assert not module.net[0].bias[::3].any()


def test_a_closed_channel_is_zero_behind_its_norm_in_training_too_and_tells_it_nothing() -> None:
    callback = l0(gate_lr=0.0)
    closed: list[Tensor] = []
    held: list[Tensor] = []

    class Watched(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            x = batch[0].double()
            gate = sampled_gates(callback, "net.0.weight").flatten()
            held.append(self.net[1].running_var.clone())
            closed.append(gate == 0)
            conv, norm = copy.deepcopy((self.net[0], self.net[1]))
            outputs = norm(conv(x))
            assert torch.equal(outputs.abs().amax((0, 2, 3)) == 0, gate == 0)
            return super().training_step(batch, batch_idx)

    module = Watched(Convolutions())
    begin = at_start(lambda: close_some(callback, -1.7))
    fit(module, callback, begin)
    assert any(bool(c.any()) for c in closed)
    for which, before, after in zip(closed, held, [*held[1:], module.net[1].running_var], strict=True):
        assert torch.equal(before[which], after[which])
        assert (before[~which] != after[~which]).all()


def test_an_exception_in_a_batch_leaves_norms_with_what_they_knew_of_closed_channels() -> None:
    class Fails(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            held.append(self.net[1].running_var.clone())
            loss = super().training_step(batch, batch_idx)
            if batch_idx == 2:
                closed.append(sampled_gates(callback, "net.0.weight").flatten() == 0)
                raise KeyError("data")
            return loss

    held: list[Tensor] = []
    closed: list[Tensor] = []
    callback, module = l0(gate_lr=0.0), Fails(Convolutions())
    with pytest.raises(KeyError, match="data"):
        fit(module, callback, at_start(lambda: close_some(callback, -1.7)))
    after = module.net[1].running_var
    assert bool(closed[0].any())
    assert torch.equal(after[closed[0]], held[-1][closed[0]])
    assert (after != held[-1])[~closed[0]].all()


class Stream:
    """Batches without an order."""

    def __iter__(self) -> Any:
        return iter(Batches().in_order())

    def __len__(self) -> int:
        return 8


class Late(nn.Module):
    """Both norms registered behind both convolutions."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(2, 8, 3), nn.Conv2d(8, 8, 3)
        self.bn1, self.bn2 = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.bn1(self.conv1(x)))
        return self.fc(torch.relu(self.bn2(self.conv2(x))).flatten(1))


def test_a_norm_of_another_convolution_is_refused_before_anything_is_written() -> None:
    callback, module = l0(include="*conv2.weight"), Classifier(Late())
    before = copy.deepcopy(module.state_dict())
    stands = r"net\.bn1 is registered right behind the convolution of net\.conv2\.weight.*takes the output of net\.conv1\..*exclude="
    with pytest.raises(ValueError, match=stands):
        fit(module, callback)
    assert differences(before, dict(module.state_dict())) == []
    module.example_input_array = torch.zeros(2, 2, 5, 5)
    with pytest.raises(ValueError, match=stands):  # it is found by this too, where the data has no order
        fit(module, l0(), loader=Stream())
    fit(module, l0(unit="weight"), max_steps=1)  # which closes no channels


def test_a_norm_that_is_not_tied_is_told() -> None:
    net = nn.Sequential(nn.Conv2d(2, 8, 3), nn.ReLU(), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(72, 4))
    text = r"net\.0\.weight has gates, and its output goes into net\.2, which is not registered right behind.*shifted.*slim\(\) may keep"
    with pytest.warns(UserWarning, match=text):
        fit(Classifier(net), l0(), max_steps=1)
    for quiet, callback in ((Classifier(), l0()), (Classifier(net), l0(unit="weight")), (Classifier(net), l0(exclude="net.0.weight"))):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            fit(quiet, callback, max_steps=1)
        assert not [w for w in said if "has gates" in str(w.message)]


def test_where_the_model_cannot_be_run_norms_go_unchecked_and_that_is_said() -> None:
    class Unusual(Classifier):
        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            raise AssertionError("is called by nobody")

    callback, module = l0(), Unusual()
    with pytest.warns(UserWarning, match=r"closed with the convolutions .* Set example_input_array"):
        assert fit(module, callback, loader=Stream()).global_step == 16
    with pytest.warns(UserWarning, match=r"Set example_input_array"):
        assert fit(Unusual(), l0()).global_step == 16
    assert tied_kernels(callback)["net.0.weight"].norms == ("net.1",)


def test_matrices_need_no_example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ConstrainedL0, "data_pass", lambda *_: pytest.fail("was asked for data"), raising=False)
    fit(Classifier(double_mlp()), l0(), max_steps=1)


def test_kernel_and_bias_pull_on_a_gate_and_the_norm_does_not() -> None:
    callback, module = l0(), Classifier(Convolutions())
    gradients: dict[str, Tensor] = {}
    compared: list[bool] = []
    names = ("net.0.weight", "net.0.bias", "net.1.weight", "net.1.bias")

    def before(*_: Any) -> None:
        gradients.update({n: module.get_parameter(n).grad.clone() for n in names})

    def after(*_: Any) -> None:
        z = sampled_gates(callback, names[0])
        kernel, bias = (gates.pull(gradients[n], dense_values(callback, n), z) for n in names[:2])
        compared.append(torch.allclose(pulls_on_gates(callback)[names[0]], kernel + bias, rtol=0, atol=1e-12) and bool(bias.any()))
        for name in names:
            factor = (z != 0).flatten() if name in names[2:] else z if name == names[0] else z.flatten()
            compared.append(torch.equal(module.get_parameter(name).grad, gradients[name] * factor))

    original = copy.deepcopy(module.state_dict())
    dense: dict[str, Tensor] = {}
    begin = at_start(lambda: dense.update({n: dense_values(callback, n).clone() for n in parameters_of(callback)}))
    first, last = (pl.callbacks.LambdaCallback(on_before_optimizer_step=act) for act in (before, after))
    fit(module, first, callback, last, begin)
    assert compared == [True] * 5 * 16
    assert pulls_on_gates(callback) == {}  # they are as large as the gates
    for name, value in dense.items():
        grown = 1 if name.startswith(("net.1", "net.4")) else 2
        assert torch.equal(value, original[name] * grown), name


def test_single_weights_leave_biases_and_norms_alone() -> None:
    callback, module = l0(unit="weight"), Classifier(Convolutions())
    fit(module, callback, max_steps=1)
    assert set(parameters_of(callback)) == {"net.0.weight", "net.3.weight", "net.7.weight"}


def test_the_plan_lists_what_goes_with_channels() -> None:
    callback, module = l0(0.25), Classifier(Convolutions())
    announced = callback.plan(module)
    assert announced.selected == {
        f"net.{n}" for n in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias", "7.weight")
    }
    assert all(row.zeros is None and not row.reason for row in announced if row.name in announced.selected)
    assert announced["net.7.bias"].reason == "bias"
    assert "expected density 0.25 of the model" in str(announced)
    table = {line.split()[0]: line.split() for line in str(announced).splitlines()[1:]}
    assert [table[n][3:] for n in ("net.3.weight", "net.4.bias")] == [["gates"], ["gates"]]  # no zeros, nor why it would be dense
    assert table["sparsity/total"][2:] == table["sparsity/model"][2:] == ["gates"]
    fit(module, callback, max_steps=1)
    assert callback.plan() == announced
    (constraint,) = constraints_of(callback)
    sizes = [12 * 18 + 12, 9 * 48 + 9, 576]  # norms do not count
    assert list(constraint.shares.values()) == pytest.approx([size / sum(sizes) for size in sizes])


# ---------------------------------------------------------------------- steps that are not what they seem


@pytest.mark.parametrize("unit", ["channel", "weight"])
@pytest.mark.parametrize("clip", [None, 0.3])
def test_micro_batches_equal_one_large_batch(unit: str, clip: float | None) -> None:
    runs = []
    for window, loader in ((1, Batches()), (3, Thirds())):
        callback, module = l0(unit=unit), Classifier(double_mlp())
        fit(module, callback, loader=loader, accumulate_grad_batches=window, gradient_clip_val=clip)
        runs.append((callback, module))
    (large, whole), (small, parts) = runs
    for key, value in large.aux.items():
        assert torch.allclose(value, small.aux[key], rtol=1e-7, atol=1e-9), key  # sums of three parts round otherwise
    assert all(torch.allclose(a, b, rtol=1e-7, atol=1e-10) for a, b in zip(whole.parameters(), parts.parameters(), strict=True))


@pytest.mark.parametrize("gate_optimizer", ["sgd", "adam"])
def test_a_skipped_fp16_step_moves_nothing(gate_optimizer: str) -> None:
    class Overflows(Classifier):
        def training_step(self, batch: Any, batch_idx: int) -> Tensor:
            return self.loss(batch) * (float("inf") if batch_idx % 2 == 0 else 1.0)

    callback, module = l0(gate_optimizer=gate_optimizer), Overflows(optimizer="adamw")
    states: list[Any] = []

    def keep(*_: Any) -> None:
        weights = {n: p.detach() for n, p in module.named_parameters()}
        states.append(copy.deepcopy((callback.state_dict(), weights)))

    begin = pl.callbacks.LambdaCallback(on_train_start=keep)
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    fit(module, callback, begin, watch(keep), plugins=[precision])
    assert callback.step == 8
    for index, (before, after) in enumerate(pairwise(states)):
        skipped = index % 2 == 0
        assert (differences(before, after) == []) == skipped
        for kind in ("log_alpha", "multiplier"):
            moved = [not torch.equal(v, after[0]["aux"][k]) for k, v in before[0]["aux"].items() if k.startswith(kind)]
            assert all(moved) != skipped
            assert any(moved) != skipped


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_a_gradient_that_is_not_finite_moves_no_gate(bad: float) -> None:
    class Breaks(Classifier):
        def on_after_backward(self) -> None:
            if self.trainer.global_step == 3:
                self.net[3].weight.grad[0, 0] = bad

    callback, module = l0(), Breaks(double_mlp())
    states: list[Any] = []
    keep = watch(lambda *_: states.append(copy.deepcopy((callback.aux, callback.masks, callback.step))))
    fit(module, callback, keep, limit_train_batches=4, max_epochs=1)
    assert differences(states[1], states[2]) != []
    assert differences(states[2], states[3]) == []


def test_the_same_under_manual_optimization() -> None:
    automatic, manual = l0(), l0()
    usual, by_hand = Classifier(double_mlp()), ByHand(double_mlp(), window=2)
    first = fit(usual, automatic, accumulate_grad_batches=2)
    second = fit(by_hand, manual)
    assert differences(automatic.state_dict(), manual.state_dict(), bitwise=False) == []
    assert differences(dict(usual.state_dict()), dict(by_hand.state_dict()), bitwise=False) == []
    assert first.global_step == second.global_step == 8


@pytest.mark.parametrize("steps", [1, 3])
def test_every_forward_pass_of_a_batch_by_hand_sees_a_sample_of_its_own(steps: int) -> None:
    class Several(Classifier):
        automatic_optimization = False

        def __init__(self) -> None:
            super().__init__(Convolutions())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            for _ in range(steps):
                see()
                self.step(batch)
            see()

        def step(self, batch: Any) -> None:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.loss(batch))
            optimizer.step()

        def on_train_batch_end(self, *_: Any) -> None:
            found = {n: median_gates(callback, n) * dense_values(callback, n) for n in parameters_of(callback)}
            medians.append(all(torch.equal(self.get_parameter(n), v) for n, v in found.items()))

        def on_train_epoch_end(self) -> None:
            self.step(Batches().in_order()[0])
            self.on_train_batch_end()

    def see() -> None:
        for name in parameters_of(callback):  # what the network computes with is the sample
            kernel = next(k for k, t in tied_kernels(callback).items() if name in (k, *t.members))
            factor = sampled_factor(callback, kernel, name)
            assert torch.equal(module.get_parameter(name), factor * dense_values(callback, name))
        seen.append(torch.cat([sampled_gates(callback, k).flatten() for k in tied_kernels(callback)]).clone())

    seen: list[Tensor] = []
    medians: list[bool] = []
    callback, module = l0(0.9, gate_lr=1e-6), Several()
    fit(module, callback, max_epochs=1)
    assert medians == [True] * 9  # also after a step between two batches
    drawn = [z for i, z in enumerate(seen) if i % (steps + 1) < steps]
    assert all(not torch.equal(a, b) for a, b in pairwise(drawn))
    assert float(torch.stack(drawn).std(0).mean()) > 0.2
    last = [z for i, z in enumerate(seen) if i % (steps + 1) == steps]
    assert all(torch.equal(a, b) for a, b in zip(last, drawn[steps::steps], strict=False))  # the next batch begins with it


def test_several_steps_in_a_batch_by_hand_tell_norms_nothing_of_closed_channels() -> None:
    class Several(Classifier):
        def __init__(self) -> None:
            super().__init__(Convolutions())
            self.automatic_optimization = False

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            for _ in range(2):
                closed = sampled_gates(callback, "net.0.weight").flatten() == 0
                before = norm.running_var.clone()
                optimizer.zero_grad()
                self.manual_backward(self.loss(batch))
                optimizer.step()
                passes.append((closed, before, norm.running_var.clone()))

    passes: list[tuple[Tensor, Tensor, Tensor]] = []
    callback, module = l0(0.9, gate_lr=1e-6), Several()
    norm = module.net[1]
    fit(module, callback, at_start(lambda: close_some(callback, -1.7)), max_epochs=1)
    assert any(bool(closed.any()) for closed, _, _ in passes)
    for closed, before, after in passes:
        assert torch.equal(before[closed], after[closed])
        assert (before[~closed] != after[~closed]).all()


def test_each_optimizer_has_its_own_constraint() -> None:
    callback, module = l0(), Rivals()
    fit(module, callback)
    assert [{n.split(".")[0] for n in c.names} for c in constraints_of(callback)] == [{"maker"}, {"critic"}]
    assert sum(k.startswith("multiplier/") for k in callback.aux) == 2
    assert {"l0/multiplier/total", "l0/multiplier/total_1"} <= set(callback.figures())
    assert callback.outcome()["expected density"].splitlines()[1].startswith("total_1 ")
    steps = [float(callback.aux[f"gate_steps/{c.names[0]}"]) for c in constraints_of(callback)]
    assert steps == [16, 32]


# ---------------------------------------------------------------------- checkpoints and later runs


def resumed(make: Any, folder: Path, after: tuple[int, ...], net: Any = conv_net, **options: Any) -> dict[int, list[str]]:
    module, callback, stops = Classifier(net()), make(), Stops(folder, after)
    expected = snapshot(fit(module, callback, stops, **options), module, callback)
    found = {}
    for batch in after:
        module, callback = Classifier(net(seed=100 + batch)), make()
        torch.manual_seed(batch)
        trainer = fit(module, callback, ckpt_path=stops.path(batch), **options)
        found[batch] = differences(expected, snapshot(trainer, module, callback))
    return found


@pytest.mark.parametrize("gate_optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_resume_is_bitwise(gate_optimizer: str, unit: str, tmp_path: Path) -> None:
    after = (1, 3, 8, 13)
    assert resumed(lambda: l0(gate_optimizer=gate_optimizer, unit=unit), tmp_path, after) == {b: [] for b in after}


@pytest.mark.parametrize("unit", ["channel", "weight"])
@pytest.mark.parametrize("precision", ["bf16-true", "16-true"])
def test_resume_is_bitwise_in_low_precision(precision: str, unit: str, tmp_path: Path) -> None:
    after, make = (1, 3, 8), lambda: l0(unit=unit)
    assert resumed(make, tmp_path, after, net=lambda seed=0: double_mlp(seed).float(), precision=precision) == {b: [] for b in after}


def test_a_second_fit_in_low_precision_goes_on_from_the_same_dense_weights() -> None:
    callback, module = l0(), Classifier(double_mlp().bfloat16())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)  # type: ignore[method-assign]
    fit(module, callback, max_epochs=1)
    before = {n: dense_values(callback, n).clone() for n in parameters_of(callback)}
    again: dict[str, Tensor] = {}
    look = at_start(lambda: again.update({n: dense_values(callback, n).clone() for n in parameters_of(callback)}))
    fit(module, callback, look, max_epochs=1)
    assert differences(before, again) == []


def test_resume_inside_a_window_is_bitwise(tmp_path: Path) -> None:
    after = (1, 2, 4, 5)
    options: dict[str, Any] = {"accumulate_grad_batches": 3, "loader": Batches(batches=12)}
    assert resumed(l0, tmp_path, after, **options) == {b: [] for b in after}


def test_a_checkpoint_holds_the_network_with_median_gates(tmp_path: Path) -> None:
    callback, module = l0(), Classifier(Convolutions())
    begin = at_start(lambda: close_some(callback))
    fit(module, callback, begin).save_checkpoint(tmp_path / "run.ckpt")
    saved = torch.load(tmp_path / "run.ckpt", weights_only=True)
    state = saved["callbacks"][callback.state_key]
    for name, weight in saved["state_dict"].items():
        if name in callback.masks:
            assert torch.equal(weight, median_gates(callback, name) * state["dense"][name])
            assert torch.equal(weight != 0, state["masks"][name])
    assert 0.1 < callback.measured_sparsity()["sparsity/net.0.weight"] < 0.5


def test_a_second_fit_goes_on_from_the_same_dense_weights_and_gates() -> None:
    callback, module = l0(), Classifier(Convolutions())
    fit(module, callback, at_start(lambda: close_some(callback)), max_epochs=1)
    before = copy.deepcopy(callback.state_dict())
    again: dict[str, Any] = {}
    fit(module, callback, at_start(lambda: again.update(copy.deepcopy(callback.state_dict()))), max_epochs=1)
    assert differences(before, again) == []
    fresh, other = Classifier(conv_net(3)), Classifier(conv_net(3))
    new = l0()
    assert differences(snapshot(fit(fresh, callback), fresh, callback), snapshot(fit(other, new), other, new)) == []


@pytest.mark.parametrize("unit", ["channel", "weight"])
def test_low_precision_weights_have_gates_in_float32(unit: str) -> None:
    callback, module = l0(unit=unit, l2=0.01), Classifier(double_mlp().bfloat16())
    module.configure_optimizers = lambda: torch.optim.SGD(module.parameters(), lr=0.05)  # type: ignore[method-assign]
    fit(module, callback)
    for name in callback.masks:
        assert callback.aux[f"log_alpha/{name}"].dtype == torch.float32
        assert dense_values(callback, name).dtype == module.get_parameter(name).dtype == torch.bfloat16
        assert torch.equal(module.get_parameter(name), (median_gates(callback, name) * dense_values(callback, name)).bfloat16())


def test_copies_and_pickles() -> None:
    callback, module = l0(), Classifier(double_mlp())
    fit(module, callback, max_steps=3)
    for twin in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        assert differences(callback.state_dict(), twin.state_dict()) == []
        assert twin.figures() == callback.figures()


# ---------------------------------------------------------------------- words and figures


def test_curves(tmp_path: Path) -> None:
    callback, module = l0(constraint="layer"), Classifier()
    logger = pl.loggers.CSVLogger(tmp_path)
    fit(module, callback, logger=logger, log_every_n_steps=50, max_epochs=13)
    rows = (Path(logger.log_dir) / "metrics.csv").read_text().splitlines()
    table = [dict(zip(rows[0].split(","), r.split(","), strict=True)) for r in rows[1:]]
    steps = [int(r["step"]) for r in table if r["l0/expected/total"]]
    assert steps == [50, 100, 104]  # and the end
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
        callback.forget()
        assert callback.figures() == callback.outcome() == {}
        assert not callback.at_target


def test_a_run_that_ends_above_its_target_says_so() -> None:
    callback = l0(0.1, gate_lr=1e-6)
    with pytest.warns(UserWarning, match=r"ended at an expected density of 0\.83\d+ in the model, above its target of 0\.1000.*dual_lr="):
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
        ({"sparsity": 0.9}, r"sparsity= is no argument of ConstrainedL0.*Give density="),
        ({"density": 0.0}, r"density=0\.0: 0\.0 is out of range\. Give a number that is at least 0\.04713 and at most 1: log_alpha is"),
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
        ({"gate_lr": math.inf}, r"gate_lr=inf: inf is out of range.*at least 0\.$"),
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
    with pytest.raises(ValueError, match=r"l2=0\.001 already decays gated parameters.*weight_decay=0\.01 for net\.1\.weight"):
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
    assert text.startswith("ConstrainedL0(density={'net.1.*': 0.3, '*': 0.7}, constraint='layer', unit='channel', droprate=0.5,")
