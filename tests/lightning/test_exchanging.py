"""Layers that a Trainer's fit exchanges for sparse ones: when, which, and what a fit that is refused gives back."""

import copy
import warnings
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.exchanged import fit, layers_of, mlp, patterns_of, random_numbers, sparse
from support.processes import matrices
from support.refusing import RefusedError, refuse
from torch import nn

from sparse_callbacks.core.storages import offloading
from sparse_callbacks.testing.comparison import assert_counts, differences, structure
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import trainer_for, watch

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

LAYERS = {"net.1", "net.3", "net.5"}


class MadeInConfigureModel(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.calls = 0

    def configure_model(self) -> None:
        self.calls += 1
        if isinstance(self.net, nn.Identity):
            self.net = matrices(0)


class MadeInSetup(Classifier):
    def __init__(self) -> None:
        super().__init__(nn.Identity())

    def setup(self, stage: str) -> None:
        if isinstance(self.net, nn.Identity):
            self.net = matrices(0)


@pytest.mark.combinations
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("make", [mlp, MadeInConfigureModel, MadeInSetup])
def test_layers_are_exchanged_before_optimizers_are_made_wherever_they_are_made(make: Any, storage: str) -> None:
    module, plain = make(), mlp()
    seen: list[set[str]] = []
    usual = module.configure_optimizers
    module.configure_optimizers = lambda: (seen.append(set(layers_of(module))), usual())[1]
    callback = sparse("set", storage)
    trainer, _ = fit(callback, module)
    assert seen == [LAYERS]
    assert [n for n, _ in module.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert list(module.state_dict()) == list(plain.state_dict())
    held = {id(p) for o in trainer.optimizers for group in o.param_groups for p in group["params"]}
    assert held == {id(p) for p in module.parameters()}
    assert callback.updates > 0
    assert_counts(callback)
    plain.load_state_dict(module.state_dict())
    x = Batches().x
    assert torch.allclose(plain(x), module(x), rtol=1e-12)


def test_the_module_and_the_strategy_keep_nothing_of_the_exchange() -> None:
    module, callback = mlp(), sparse()
    before = set(vars(module))
    trainer, _ = fit(callback, module)
    fit(sparse(storage="masked"), plain := mlp())  # Lightning's own
    assert set(vars(module)) - before == set(vars(plain)) - before
    assert not {"setup", "load_checkpoint"} & set(vars(trainer.strategy))
    copy.deepcopy(module)


def test_a_second_fit_goes_on_with_the_layers_and_their_places() -> None:
    module, callback = MadeInConfigureModel(), sparse("set", stop=30)
    fit(callback, module)
    layers, places = layers_of(module), patterns_of(module)
    begun: list[Any] = []
    look = watch(lambda *_: begun.append(patterns_of(module)))
    fit(callback, module, look)
    assert module.calls == 2
    assert all(layers_of(module)[name] is layer for name, layer in layers.items())
    assert differences(places, begun[0]) == []
    assert differences(places, begun[-1]) != []


def test_masked_and_sparse_storage_train_the_same_network() -> None:
    masked, exchanged = mlp("adamw"), mlp("adamw")
    callbacks = sparse("rigl", "masked"), sparse("rigl")
    fit(callbacks[0], masked, gradient_clip_val=0.1)
    fit(callbacks[1], exchanged, gradient_clip_val=0.1)
    assert differences(callbacks[0].masks, callbacks[1].masks) == []
    for name, value in masked.state_dict().items():
        assert torch.allclose(value, exchanged.state_dict()[name], rtol=0, atol=1e-10), name


def test_lightnings_other_package_exchanges_too() -> None:
    other = pytest.importorskip("lightning.pytorch")

    class Module(other.LightningModule):  # type: ignore[name-defined,misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = matrices(0, torch.float32)

        def training_step(self, batch: Any, index: int) -> Any:
            return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module, callback = Module(), sparse("set")
    options = {"logger": False, "enable_progress_bar": False, "enable_checkpointing": False, "max_epochs": 2}
    other.Trainer(accelerator="cpu", devices=1, callbacks=[callback], **options).fit(module, Batches())
    assert set(layers_of(module)) == LAYERS
    assert callback.updates > 0


def test_a_compiled_module_is_exchanged_and_compiled_with_its_sparse_layers() -> None:
    eager, compiled = mlp(), mlp()
    fit(sparse("set"), eager)
    callback = sparse("set")
    trainer_for(callback).fit(torch.compile(compiled, backend="eager"), Batches())
    assert set(layers_of(compiled)) == LAYERS
    for name, value in eager.state_dict().items():
        assert torch.allclose(value, compiled.state_dict()[name], rtol=0, atol=1e-12), name


# ---------------------------------------------------------------------- fits that are refused


def hooks_before_the_first_batch() -> list[str]:
    seen: list[str] = []
    names = [n for n in vars(pl.Callback) if n.startswith("on_") or n == "setup"]
    notes = {n: (lambda name: lambda *_, **__: seen.append(name))(n) for n in names}
    trainer = trainer_for([sparse(), pl.callbacks.LambdaCallback(**notes)])
    trainer.fit(mlp(), Batches(), Batches(1))
    return list(dict.fromkeys(seen[: seen.index("on_train_batch_start")]))


@pytest.mark.combinations
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("hook", hooks_before_the_first_batch())
def test_a_fit_that_is_refused_leaves_the_dense_layers_that_were_there(
    hook: str, storage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(offloading, "SMALLEST", 1)  # as large layers, whose dense values lie in files
    module, callback = mlp(), sparse("rigl", storage)
    before, objects = structure(module), list(module.modules())
    values = copy.deepcopy(module.state_dict())
    torch.manual_seed(5)
    trainer = trainer_for([callback, pl.callbacks.LambdaCallback(**{hook: refuse})])
    with pytest.raises(RefusedError):
        trainer.fit(module, Batches(), Batches(1))
    after = random_numbers()
    module.train()
    assert [id(m) for m in module.modules()] == [id(m) for m in objects]
    assert differences(before, structure(module)) == []
    assert differences(values, module.state_dict()) == []
    assert not {"setup", "load_checkpoint", "configure_model"} & (set(vars(trainer.strategy)) | set(vars(module)))
    assert not callback.masks
    plain = mlp()
    torch.manual_seed(5)
    with pytest.raises(RefusedError):
        trainer_for([pl.callbacks.LambdaCallback(**{hook: refuse})]).fit(plain, Batches(), Batches(1))
    assert after == random_numbers()


def test_a_fit_without_a_batch_leaves_the_dense_layers_that_were_there() -> None:
    module, callback = mlp(), sparse()
    objects = list(module.modules())
    fit(callback, module, limit_train_batches=0)
    assert [id(m) for m in module.modules()] == [id(m) for m in objects]


def test_an_error_in_training_leaves_sparse_layers_that_compute_what_the_callback_describes() -> None:
    module, callback = mlp(), sparse("set")

    def fail(trainer: Any, _: Any, batches: int) -> None:
        if batches == 5:
            raise RefusedError

    with pytest.raises(RefusedError):
        fit(callback, module, watch(fail))
    assert set(layers_of(module)) == LAYERS
    assert_counts(callback)
    callback.measured_sparsity()


def test_a_refused_second_fit_leaves_the_layers_and_values_of_the_first() -> None:
    module, callback = mlp(), sparse("set")
    fit(callback, module)
    layers, values, places = layers_of(module), copy.deepcopy(module.state_dict()), patterns_of(module)
    with pytest.raises(RefusedError):
        fit(callback, module, pl.callbacks.LambdaCallback(on_train_epoch_start=refuse))
    assert all(layers_of(module)[name] is layer for name, layer in layers.items())
    assert differences([values, places], [module.state_dict(), patterns_of(module)]) == []


# ---------------------------------------------------------------------- what is refused


class MadeEarly(Classifier):
    """Makes its optimizer too early."""

    def __init__(self) -> None:
        super().__init__(matrices(0))
        self.made = torch.optim.AdamW(self.parameters(), lr=0.01)

    def configure_optimizers(self) -> Any:
        return self.made


def test_an_optimizer_of_dense_parameters_is_refused_with_the_name_of_the_layer() -> None:
    module = MadeEarly()
    with pytest.raises(ValueError, match=r"AdamW holds net\.1\.weight.*configure_optimizers"):
        fit(sparse(), module)
    assert not layers_of(module)


def test_an_optimizer_of_dense_parameters_is_refused_in_a_second_fit_too() -> None:
    module, callback = mlp(), sparse("set")
    early = torch.optim.SGD(module.parameters(), lr=0.1)
    fit(callback, module)
    module.configure_optimizers = lambda: early
    with pytest.raises(ValueError, match=r"SGD holds net\.1\.weight"):
        fit(callback, module)


def test_a_layer_that_no_optimizer_trains_is_refused_before_it_loses_its_weights() -> None:
    module = mlp()
    before = copy.deepcopy(module.state_dict())
    module.configure_optimizers = lambda: torch.optim.SGD(module.net[5].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"net\.1\.weight, net\.3\.weight.*in no optimizer.*exclude="):
        fit(sparse(), module)
    assert differences(before, module.state_dict()) == []


@pytest.mark.parametrize("kind", ["EMAWeightAveraging", "WeightAveraging", "StochasticWeightAveraging"])
def test_averages_of_weights_are_refused_with_sparse_storage(kind: str) -> None:
    make = getattr(pl.callbacks, kind)
    average = make(0.01) if kind.startswith("Stochastic") else make()
    module = mlp()
    with pytest.raises(ValueError, match=rf"{kind}.*storage='masked'"):
        fit([sparse("set"), average], module)
    assert not layers_of(module)


def test_averages_of_weights_leave_layers_masked_where_storage_is_chosen() -> None:
    module, callback = mlp(), sparse("set", "auto", rows=64)
    fit([callback, pl.callbacks.WeightAveraging()], module)
    assert not layers_of(module)
    assert "WeightAveraging" in str(callback.plan())


# ---------------------------------------------------------------------- how the first batch uses them


class ReadsTheWeight(Classifier):
    """Has a layer that nobody calls, and one whose dense weight is read."""

    def __init__(self) -> None:
        super().__init__(matrices(0))
        self.unused = nn.Linear(8, 8).double()

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx) + self.net[3].weight.square().sum()


def warned(module: Any, *more: Any) -> list[str]:
    """Warnings of a fit that name a layer."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(sparse("set"), module, *more)
    return [text for w in caught if "net." in (text := str(w.message)) or "unused" in text]


def test_one_warning_names_layers_that_the_first_batch_does_not_call_or_reads() -> None:
    (text,) = [t for t in warned(ReadsTheWeight()) if "first batch" in t]
    assert "did not call layers with sparse storage (unused.weight)" in text
    assert "reads net.3.weight" in text
    assert [t for t in warned(mlp()) if "first batch" in t] == []


def test_a_first_batch_that_fails_leaves_no_hook() -> None:
    module = mlp()
    module.training_step = refuse
    with pytest.raises(RefusedError):
        fit(sparse("set"), module)
    layers = layers_of(module).values()
    assert len(layers) == 3
    assert not any(layer._forward_pre_hooks or layer.values._post_accumulate_grad_hooks for layer in layers)
