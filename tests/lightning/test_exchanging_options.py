"""Sparse storage under a Trainer's options: precision, clipping, manual optimization, and the rows that are found out."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins import MixedPrecision
from support.exchanged import fit, layers_of, left, mlp, patterns_of, random_numbers, sparse
from support.processes import matrices
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import SET
from sparse_callbacks.core.storages import auto_storage
from sparse_callbacks.lightning.exchanging import refuse_unfit_trainer
from sparse_callbacks.lightning.seen_rows import seen_rows
from sparse_callbacks.testing.comparison import assert_counts, differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Classifier
from sparse_callbacks.testing.runs import trainer_for, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

# ---------------------------------------------------------------------- gradients


class Clipped(Classifier):
    """Keeps the norm of the gradients that each step gets."""

    def __init__(self) -> None:
        super().__init__(matrices(0))
        self.norms: list[tuple[float, float]] = []

    def norm(self) -> float:
        return float(torch.stack([p.grad.norm() for p in self.parameters()]).norm())

    def configure_gradient_clipping(self, *arguments: Any, **options: Any) -> None:
        before = self.norm()
        super().configure_gradient_clipping(*arguments, **options)
        self.norms.append((before, self.norm()))


@pytest.mark.parametrize("how", ["norm", "value"])
def test_gradients_are_clipped_as_under_masked_storage(how: str) -> None:
    masked, exchanged = Clipped(), Clipped()
    for module, storage in ((masked, "masked"), (exchanged, "sparse")):
        fit(sparse("set", storage), module, gradient_clip_val=0.02, gradient_clip_algorithm=how)
    assert len(masked.norms) == 16
    assert all(before > after for before, after in exchanged.norms)
    assert torch.allclose(torch.tensor(masked.norms), torch.tensor(exchanged.norms), rtol=1e-6)
    for name, value in masked.state_dict().items():
        assert torch.allclose(value, exchanged.state_dict()[name], rtol=0, atol=1e-10), name


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_manual_optimization_trains_the_network_of_masked_storage(name: str) -> None:
    modules = [ByHand(matrices(0), window=2, clip=0.1) for _ in range(2)]
    callbacks = [sparse(name, storage) for storage in ("masked", "sparse")]
    for callback, module in zip(callbacks, modules, strict=True):
        fit(callback, module)
    assert differences(callbacks[0].masks, callbacks[1].masks) == []
    for key, value in modules[0].state_dict().items():
        assert torch.allclose(value, modules[1].state_dict()[key], rtol=0, atol=1e-10), key


# ---------------------------------------------------------------------- precision


@pytest.mark.parametrize(
    ("storage", "precision"),
    [*((s, p) for s in ("sparse", "grouped") for p in ("32-true", "64-true", "bf16-mixed")), ("grouped", "bf16-true")],
)
def test_a_fit_in_each_precision_moves_places_and_learns(storage: str, precision: str) -> None:
    module, callback = mlp(dtype=torch.float32), sparse("rigl", storage)
    first = patterns_of(module)
    fit(callback, module, precision=precision)
    assert len(layers_of(module)) == 3
    expected = {"64-true": torch.float64, "bf16-true": torch.bfloat16}.get(precision, torch.float32)
    assert {layer.values.dtype for layer in layers_of(module).values()} == {expected}
    assert all(bool(p.isfinite().all()) for p in module.parameters())
    assert callback.updates > 0
    assert_counts(callback)
    assert first == {}


@pytest.mark.parametrize("precision", ["16-true", "bf16-true"])
def test_weights_of_16_bits_are_refused_and_leave_layers_masked_where_storage_is_chosen(precision: str) -> None:
    with pytest.raises(ValueError, match=rf"precision='{precision}' converts weights.*storage='grouped'"):
        fit(sparse("set"), module := mlp(dtype=torch.float32), precision=precision)
    fit(callback := sparse("set", "auto", rows=64), module, precision=precision)
    assert not layers_of(module)
    assert "converts weights to 16 bits" in str(callback.plan())


def test_places_do_not_depend_on_the_precision_that_is_set_up_later() -> None:
    found = {}
    for precision in ("32-true", "64-true"):
        module = mlp(dtype=torch.float32)
        fit(sparse("static"), module, precision=precision)
        found[precision] = patterns_of(module)
    assert differences(found["32-true"], found["64-true"]) == []


@pytest.mark.parametrize("name", ["set", "rigl"])
def test_steps_that_a_grad_scaler_skips_move_nothing(name: str) -> None:
    precision = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=256.0))
    module, callback = mlp(dtype=torch.float32), sparse(name)
    usual, seen = module.training_step, []

    def step(batch: Any, batch_idx: int) -> Any:
        loss = usual(batch, batch_idx)
        return loss * float("inf") if module.trainer.global_step in (4, 5) else loss

    module.training_step = step
    look = watch(lambda *_: seen.append((patterns_of(module), {n: p.clone() for n, p in module.named_parameters()})))
    fit(callback, module, look, plugins=[precision])
    assert differences(seen[3], seen[5]) == []
    assert callback.updates > 0
    assert all(bool(p.isfinite().all()) for p in module.parameters())


# ---------------------------------------------------------------------- rows that layers see


def found_rows(module: Any, loader: Any = None, datamodule: Any = None) -> Any:
    """What is known of the rows when the fit exchanges layers."""
    rows: list[Any] = []

    class Looks(pl.Callback):
        def setup(self, trainer: Any, module: Any, stage: str) -> None:
            before = random_numbers()
            rows.append(seen_rows(trainer, module))
            assert before == random_numbers()

    trainer = trainer_for([Looks()], max_epochs=1)
    trainer.fit(module, loader, datamodule=datamodule)
    return rows[0]


def shuffled(size: int = 12, **options: Any) -> Any:
    data = Batches(size=size)
    return DataLoader(TensorDataset(data.x, data.y), batch_size=size, shuffle=True, **options)


def test_rows_are_those_of_a_batch_of_the_loader() -> None:
    module = mlp()
    module.example_input_array = torch.zeros(1, 2, 5, 5)
    found = found_rows(module, shuffled())
    assert set(found.values()) == {12}
    assert len(found) == 3


def test_rows_are_those_of_the_example_where_the_loader_can_be_read_once() -> None:
    read: list[int] = []

    def once() -> Iterator[Any]:
        for batch in Batches():
            read.append(1)
            yield batch

    module = mlp()
    module.example_input_array = torch.zeros(7, 2, 5, 5)
    batches = once()
    assert set(found_rows(module, batches).values()) == {7}
    assert len(read) == 8  # all of them by the fit


def test_rows_are_not_known_without_a_loader_that_can_be_read_twice() -> None:
    assert found_rows(mlp(), iter(list(Batches()))) == {}


class Data(pl.LightningDataModule):
    def setup(self, stage: str) -> None:
        self.data = Batches(size=10)

    def train_dataloader(self) -> Any:
        return DataLoader(TensorDataset(self.data.x, self.data.y), batch_size=10, shuffle=True)


def test_rows_are_found_with_a_datamodule_whose_setup_makes_the_data() -> None:
    assert set(found_rows(mlp(), datamodule=Data()).values()) == {10}


def test_a_look_at_the_rows_changes_no_batch_of_the_fit() -> None:
    modules = [mlp(), mlp()]
    for module, storage, more in zip(modules, ("masked", "auto"), ({}, {"rows": None}), strict=True):
        torch.manual_seed(4)
        fit(sparse("set", storage, **more), module, loader=shuffled(generator=torch.Generator().manual_seed(1)))
    for key, value in modules[0].state_dict().items():
        assert torch.allclose(value, modules[1].state_dict()[key], rtol=0, atol=1e-10), key


# ---------------------------------------------------------------------- storage="auto"


def times(shape: tuple[int, int], *_: Any, **__: Any) -> dict[str, float]:
    """Two layers of three are faster sparse."""
    return {"masked": 1.0, "sparse": 0.5 if shape[0] > 4 else 2.0}


def not_timed(*_: Any, **__: Any) -> dict[str, float]:
    raise AssertionError("timed again")


def test_what_times_decide_is_logged_and_taken_from_the_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(auto_storage, "times_of", times)
    callback = sparse("set", "auto")
    with caplog.at_level("INFO"):
        expected = left(*fit(callback, mlp(), loader=shuffled(), folder=tmp_path, stops=(8,)), callback)
    assert "net.3.weight: storage 'sparse' (0.5 ms, masked 1" in caplog.text
    assert "0.5 ms, masked 1" in str(callback.plan())
    monkeypatch.setattr(auto_storage, "times_of", not_timed)
    callback, module = sparse("set", "auto"), mlp()
    found = left(*fit(callback, module, loader=shuffled(), ckpt_path=tmp_path / "8.ckpt"), callback)
    assert set(layers_of(module)) == {"net.1", "net.3"}
    assert differences(expected["patterns"].keys(), found["patterns"].keys()) == []


def test_without_a_batch_or_an_example_layers_stay_masked_and_the_plan_says_what_to_give() -> None:
    module, callback = mlp(), sparse("set", "auto")
    fit(callback, module, loader=iter(list(Batches())), max_epochs=1)
    assert not layers_of(module)
    assert "give rows=" in str(callback.plan())


# ---------------------------------------------------------------------- strategies


class ModelParallelStrategy:
    """Is known by its name, as the two packages of Lightning have a class each."""

    launcher = None


def test_sharded_parameters_are_refused_with_sparse_storage() -> None:
    trainer = SimpleNamespace(callbacks=[], strategy=ModelParallelStrategy(), precision="32-true")
    refuse_unfit_trainer(sparse("set", "auto"), trainer, mlp())  # whose layers stay masked there
    with pytest.raises(
        ValueError, match=r"storage='grouped': ModelParallelStrategy shards parameters.*storage='masked'"
    ):
        refuse_unfit_trainer(sparse("set", "grouped"), trainer, mlp())
    fit(sparse("set"), module := mlp())
    with pytest.raises(ValueError, match=r"a SparseLinear \(net\.1\.weight\).*to_dense\(module\)"):
        refuse_unfit_trainer(sparse("set", "masked"), trainer, module)


# ---------------------------------------------------------------------- several callbacks


def test_two_callbacks_share_a_model_between_two_storages() -> None:
    module = mlp()
    first = sparse("static", "sparse", include="net.1.*")
    second = SET(0.5, include="net.3.*", print_plan=False)
    fit([first, second], module)
    assert set(layers_of(module)) == {"net.1"}
    assert_counts(first)
    assert_counts(second)
