"""A look at a model, or a pass over data, leaves nothing behind in it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks.core import data_pass
from sparse_callbacks.core.inspection import quiet
from sparse_callbacks.core.undisturbed import undisturbed


class Writer(nn.Module):
    """Its forward pass calls ``write`` with the module and the input."""

    def __init__(self, write: Callable[[Any, Tensor], object]) -> None:
        super().__init__()
        self.linear, self.write = nn.Linear(2, 2), write
        self.register_buffer("maximum", torch.tensor([1.0, 2.0]))
        self.register_buffer("other", torch.zeros(2, 3), persistent=False)
        self.register_buffer("empty", None)
        self.queue, self.sums, self.mean = [torch.ones(2)], {"all": torch.zeros(2)}, torch.zeros(2)
        self.generator = torch.Generator().manual_seed(4)

    def forward(self, x: Tensor) -> Tensor:
        self.write(self, x)
        return self.linear(x)


def state(module: Writer) -> list[Any]:
    named = list(module.named_buffers())
    plain = [*[t.tolist() for t in module.queue], list(module.sums)]
    sums = [t.tolist() for t in module.sums.values()]
    mean = getattr(module, "mean", None)
    plain.append(None if mean is None else mean.tolist())
    return [[n for n, _ in named], [(id(t), t.tolist(), t.dtype) for _, t in named], plain, sums]


def drawn(module: Any, x: Tensor) -> Tensor:
    return torch.rand(1, generator=module.generator)


WRITES: dict[str, Callable[[Any, Tensor], object]] = {
    "in place": lambda m, x: m.maximum.fill_(torch.nan),
    "through data": lambda m, x: m.maximum.data.mul_(2),
    "not persistent": lambda m, x: m.other.add_(1),
    "assigned": lambda m, x: setattr(m, "maximum", torch.zeros(2)),
    "other storage": lambda m, x: setattr(m.maximum, "data", torch.zeros(4)),
    "larger": lambda m, x: m.maximum.resize_(500).fill_(7),
    "smaller": lambda m, x: m.other.resize_(1).fill_(7),
    "added": lambda m, x: m.register_buffer("new", torch.zeros(1)),
    "removed": lambda m, x: delattr(m, "maximum"),
    "from nothing": lambda m, x: setattr(m, "empty", torch.zeros(1)),
    "converted": lambda m, x: m.half(),
    "emptied": lambda m, x: m.queue.clear(),
    "another list": lambda m, x: setattr(m, "queue", []),
    "another tensor": lambda m, x: setattr(m, "mean", m.mean + 1),
    "no tensor": lambda m, x: setattr(m, "mean", None),
    "no attribute": lambda m, x: delattr(m, "mean"),
    "appended": lambda m, x: m.queue.append(torch.zeros(2)),
    "in a list": lambda m, x: m.queue[0].zero_(),
    "in a dictionary": lambda m, x: m.sums["all"].add_(1),
    "added to a dictionary": lambda m, x: m.sums.update(more=torch.zeros(2)),
    "plain tensor": lambda m, x: m.mean.add_(1),
}


@pytest.mark.parametrize("case", WRITES)
def test_what_a_look_writes_is_put_back(case: str) -> None:
    module = Writer(WRITES[case])
    before, names = state(module), set(vars(module))
    with undisturbed(module):
        module.write(module, torch.zeros(1, 2))
        assert state(module) != before or set(module.state_dict()) != {"maximum", "linear.weight", "linear.bias"}
    assert state(module) == before
    assert set(vars(module)) == names
    assert list(module.state_dict()) == ["maximum", "linear.weight", "linear.bias"]


def test_a_look_puts_back_also_after_an_error() -> None:
    def fail(module: Any, x: Tensor) -> None:
        module.maximum.fill_(torch.nan)
        raise KeyError("mine")

    module = Writer(fail)
    with pytest.raises(KeyError), quiet(module):
        module(torch.zeros(1, 2))
    assert module.maximum.tolist() == [1, 2]


def test_an_own_generator_draws_as_if_nothing_had_been_looked_at() -> None:
    module = Writer(drawn)
    expected = torch.rand(1, generator=torch.Generator().manual_seed(4))
    with quiet(module):
        module(torch.zeros(1, 2))
    assert torch.equal(torch.rand(1, generator=module.generator), expected)


def test_what_a_forward_pass_keeps_of_its_input_goes() -> None:
    def keep(module: Any, x: Tensor) -> None:
        module.last, module.both, module.passes = x, (x, x), 1

    module = Writer(keep)
    with quiet(module):
        module(torch.zeros(1, 2))
    assert not hasattr(module, "last")
    assert not hasattr(module, "both")
    assert module.passes == 1


def test_tied_buffers_and_views_stay_tied() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2))
    module[1].running_mean = module[0].running_mean
    module[1].running_var = module[0].running_var.view(2)
    with undisturbed(module):
        module(torch.randn(4, 2))
    assert module[1].running_mean is module[0].running_mean
    assert module[1].running_var.data_ptr() == module[0].running_var.data_ptr()
    assert module[0].running_var.tolist() == [1, 1]
    assert int(module[0].num_batches_tracked) == 0


@pytest.mark.parametrize(
    "buffer",
    [
        torch.zeros(2, dtype=torch.float16),
        torch.zeros(2).to(torch.float8_e4m3fn),
        torch.zeros(2, dtype=torch.complex64),
        torch.zeros(2, dtype=torch.bool),
        torch.zeros(2, 2).to_sparse(),
        torch.zeros(2, device="meta"),
    ],
    ids=["half", "float8", "complex", "bool", "sparse", "meta"],
)
def test_buffers_of_any_kind_are_put_back(buffer: Tensor) -> None:
    module = nn.Module()
    module.register_buffer("buffer", buffer)
    ones = torch.ones(buffer.shape)
    with undisturbed(module):
        buffer.copy_(ones.to_sparse() if buffer.is_sparse else ones)
    assert module.buffer is buffer
    if not buffer.is_meta:
        assert not (buffer.to_dense() if buffer.is_sparse else buffer).to(torch.complex64).any()


@pytest.mark.filterwarnings("ignore")
def test_quantised_buffers_are_put_back() -> None:
    module = nn.Module()
    module.register_buffer("buffer", torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8))
    with undisturbed(module):
        module.buffer.copy_(torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8))
    assert module.buffer.dequantize().tolist() == [0, 0]


def test_buffers_that_were_made_in_inference_mode_are_put_back() -> None:
    module = nn.Module()
    with torch.inference_mode():
        module.register_buffer("buffer", torch.zeros(2))
    with undisturbed(module), torch.inference_mode():
        module.buffer.add_(1)
    assert module.buffer.tolist() == [0, 0]


def test_a_tensor_that_the_look_leaves_alone_is_not_written_to() -> None:
    """Autograd counts writes: a graph that holds the buffer must go on to work."""
    module = nn.BatchNorm1d(2).eval()
    loss = module(torch.randn(3, 2, requires_grad=True)).sum()
    with quiet(module):
        module(torch.randn(3, 2))
    loss.backward()


@pytest.mark.filterwarnings("ignore")
def test_scripted_and_compiled_parts_are_put_back() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scripted, self.compiled = torch.jit.script(nn.BatchNorm1d(2)), torch.compile(nn.BatchNorm1d(2))

    module = Net()
    with undisturbed(module), torch.compiler.set_stance("force_eager"):
        module.scripted(torch.randn(4, 2))
        module.compiled(torch.randn(4, 2))
    assert module.scripted.running_mean.tolist() == [0, 0]
    assert {n: t.tolist() for n, t in module.compiled.named_buffers() if "mean" in n} == {
        "_orig_mod.running_mean": [0, 0]
    }


def test_power_iterations_of_spectral_norm_are_put_back() -> None:
    old, new = nn.utils.spectral_norm(nn.Linear(3, 3)), nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3))
    module = nn.Sequential(old, new)
    before = {n: t.clone() for n, t in module.named_buffers()}
    with undisturbed(module):
        module(torch.randn(2, 3))
        assert any(not torch.equal(t, before[n]) for n, t in module.named_buffers())
    assert all(torch.equal(t, before[n]) for n, t in module.named_buffers())


@pytest.mark.filterwarnings("ignore")
def test_observers_of_quantisation_aware_training_keep_no_nan() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    net = nn.Sequential(quantization.QuantStub(), nn.Conv2d(1, 2, 3), nn.ReLU()).train()
    net.qconfig = quantization.get_default_qat_qconfig("x86")
    module = quantization.prepare_qat(net)
    module(torch.randn(2, 1, 4, 4))
    before = {n: t.clone() for n, t in module.named_buffers()}
    with quiet(module):
        module(torch.full((2, 1, 4, 4), torch.nan))
        assert any(t.isnan().any() for t in module.buffers())
    after = dict(module.named_buffers())
    assert after.keys() == before.keys()
    assert all(torch.equal(t, before[n]) for n, t in after.items())


def test_a_pass_over_data_leaves_counts_of_metrics_alone() -> None:
    torchmetrics = pytest.importorskip("torchmetrics")

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.mean = nn.Linear(2, 1), torchmetrics.MeanMetric()
            self.all = torchmetrics.CatMetric()

        def forward(self, x: Tensor) -> Tensor:
            out = self.linear(x)
            self.mean(out)
            self.all.update(out)
            return out

    module = Net()
    module(torch.ones(3, 2))
    before = float(module.mean.compute()), module.all.compute().shape
    loader = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=4)
    list(data_pass.outputs(module, lambda: (loader, None)))
    assert (float(module.mean.compute()), module.all.compute().shape) == before


def test_modules_that_a_pass_is_to_change_keep_what_they_have_become() -> None:
    module = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2))
    loader = DataLoader(TensorDataset(torch.randn(8, 2)), batch_size=4)
    list(data_pass.outputs(module, lambda: (loader, None), train=[module[2]]))
    assert [int(module[i].num_batches_tracked) for i in (0, 2)] == [0, 2]
    assert module[2].running_mean.abs().sum() > 0
