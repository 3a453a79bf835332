"""Constrained L0: channels whose gate is closed are really gone."""

import copy
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.inside import dense_values, parameters_of
from support.l0 import (
    Convolutions,
    at_start,
    close_some,
    constraints_of,
    l0,
    pulls_on_gates,
    purged,
    sampled_gates,
    tied_kernels,
)
from torch import Tensor, nn

from sparse_callbacks import ConstrainedL0
from sparse_callbacks.methods.l0 import gates
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, double_mlp
from sparse_callbacks.testing.runs import fit

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


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
    for quiet, callback in (
        (Classifier(), l0()),
        (Classifier(net), l0(unit="weight")),
        (Classifier(net), l0(exclude="net.0.weight")),
    ):
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
        kernel, bias = (gates.log_alpha_gradient(gradients[n], dense_values(callback, n), z) for n in names[:2])
        compared.append(
            torch.allclose(pulls_on_gates(callback)[names[0]], kernel + bias, rtol=0, atol=1e-12) and bool(bias.any())
        )
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
        f"net.{n}"
        for n in ("0.weight", "0.bias", "1.weight", "1.bias", "3.weight", "3.bias", "4.weight", "4.bias", "7.weight")
    }
    assert all(row.zeros is None and not row.reason for row in announced if row.name in announced.selected)
    assert announced["net.7.bias"].reason == "bias"
    assert "expected density 0.25 of the model" in str(announced)
    table = {line.split()[0]: line.split() for line in str(announced).splitlines()[1:]}
    assert [table[n][3:] for n in ("net.3.weight", "net.4.bias")] == [
        ["gates"],
        ["gates"],
    ]  # no zeros, nor why it would be dense
    assert table["sparsity/total"][2:] == table["sparsity/model"][2:] == ["gates"]
    fit(module, callback, max_steps=1)
    assert callback.plan() == announced
    (constraint,) = constraints_of(callback)
    sizes = [12 * 18 + 12, 9 * 48 + 9, 576]  # norms do not count
    assert list(constraint.shares.values()) == pytest.approx([size / sum(sizes) for size in sizes])
