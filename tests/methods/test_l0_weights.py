"""Constrained L0: what the weights hold, and when."""

from itertools import pairwise
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.inside import dense_values, parameters_of
from support.l0 import at_start, close_some, l0, median_gates, noise_of, sampled_gates, tied_kernels
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sparse_callbacks.core import optimizers
from sparse_callbacks.methods.l0.l0 import gates
from sparse_callbacks.testing.comparison import differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, double_mlp
from sparse_callbacks.testing.runs import fit, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")


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
    begin = pl.callbacks.LambdaCallback(on_train_start=lambda *_: close_some(callback))
    trainer = pl.Trainer(
        max_epochs=2,
        accumulate_grad_batches=4,
        val_check_interval=2,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        num_sanity_val_steps=0,
        accelerator="cpu",
        callbacks=[callback, begin, watch(lambda *_: between.append(medians()))],
    )
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
            found.update({n: noise_of(callback, n) for n in tied_kernels(callback)})

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
    """One that changes no value leaves the dense weights as they are, also where the sample is closed and the median is
    open."""

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
    *within, last = found[0]
    assert 0 < max(within) <= 4
    assert last <= max(within) + 2  # the counts and the expected share that the progress bar shows
