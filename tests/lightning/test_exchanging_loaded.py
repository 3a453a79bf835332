"""Checkpoints of fits with sparse storage that are tested, validated, predicted with, and loaded by hand."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.tuner import Tuner
from support.exchanged import Hooked, fit, layers_of, mlp, patterns_of, sparse
from support.processes import matrices
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import SparseLinear
from sparse_callbacks.lightning.loaded_places import take_places
from sparse_callbacks.testing.comparison import assert_counts, differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

STOP = 5
FUNCTIONS = ["test", "validate", "predict"]


def outputs_of(path: Path) -> Tensor:
    """What a plain module with the weights of the checkpoint gives."""
    module = mlp()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    return module(Batches().x).detach()


def evaluate(function: str, callback: Any, module: Any, path: Any, trainer: Any = None) -> None:
    trainer = trainer_for(callback) if trainer is None else trainer
    quiet = {} if function == "predict" else {"verbose": False}
    getattr(trainer, function)(module, Batches(), ckpt_path=path, **quiet)


@pytest.mark.combinations
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_an_earlier_pattern_is_taken_with_the_weights(function: str, storage: str, tmp_path: Path) -> None:
    callback = sparse("set", storage)
    _, module = fit(callback, folder=tmp_path, stops=(STOP,))
    path = tmp_path / f"{STOP}.ckpt"
    last = patterns_of(module)
    evaluate(function, callback, module, path)
    assert torch.allclose(module(Batches().x), outputs_of(path), rtol=1e-12)
    assert differences(last, patterns_of(module)) != []
    (state,) = torch.load(path, weights_only=True)["callbacks"].values()
    assert callback.updates == state["updates"]
    assert_counts(callback)
    callback.measured_sparsity()
    # and a later fit goes on from there
    begun: list[Any] = []
    taken = patterns_of(module)
    look = pl.callbacks.LambdaCallback(on_train_start=lambda *_: begun.append(patterns_of(module)))
    fit(callback, module, look)
    assert differences(taken, begun[0]) == []


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_best_of_several_checkpoints_is_evaluated(function: str, tmp_path: Path) -> None:
    module, callback = mlp(), sparse("set")
    keeps = pl.callbacks.ModelCheckpoint(tmp_path, monitor="val_loss", save_top_k=3, every_n_train_steps=None)
    trainer = trainer_for([callback, keeps], tmp_path, max_epochs=3, enable_checkpointing=True)
    trainer.fit(module, Batches(), Batches(2, seed=1))
    assert len(keeps.best_k_models) == 3
    evaluate(function, callback, None, "best", trainer)
    assert torch.allclose(module(Batches().x), outputs_of(Path(keeps.best_model_path)), rtol=1e-12)


@pytest.mark.combinations
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_dense_module_is_evaluated_as_it_is(function: str, storage: str, tmp_path: Path) -> None:
    trained = sparse("set", storage)
    fit(trained, folder=tmp_path, stops=(16,))
    module, callback = mlp(seed=3), sparse("set", storage)
    evaluate(function, callback, module, tmp_path / "16.ckpt")
    assert not layers_of(module)
    assert torch.allclose(module(Batches().x), outputs_of(tmp_path / "16.ckpt"), rtol=1e-12)
    assert differences(trained.masks, callback.masks) == []
    assert trained.measured_sparsity() == callback.measured_sparsity()
    # a later fit exchanges its layers, with the places of the checkpoint
    begun: list[Any] = []
    look = pl.callbacks.LambdaCallback(
        on_train_start=lambda *_: begun.append({n: m.clone() for n, m in callback.masks.items()})
    )
    fit(callback, module, look)
    assert len(layers_of(module)) == 3
    assert differences(trained.masks, begun[0]) == []


def test_a_checkpoint_of_weights_alone_is_evaluated_with_the_places_of_its_weights(tmp_path: Path) -> None:
    module, callback = mlp(), sparse("set")

    class SavesWeights(Stops):
        def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
            self.batches += 1
            if self.batches in self.after:
                trainer.save_checkpoint(self.path(self.batches), weights_only=True)

    fit(callback, module, SavesWeights(tmp_path, (STOP, 6)))
    for stop in (STOP, 6):  # after the sixth step weights are live and zero
        path = tmp_path / f"{stop}.ckpt"
        evaluate("test", callback, module, path)
        assert torch.allclose(module(Batches().x), outputs_of(path), rtol=1e-12)
        assert_counts(callback)


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("exchanged", [False, True])
def test_a_compact_checkpoint_is_evaluated_by_dense_and_by_sparse_layers(
    exchanged: bool, storage: str, tmp_path: Path
) -> None:
    def make_compact(trainer: Any, module: Any) -> None:
        for layer in layers_of(module).values():
            layer.compact_state = True

    trained = sparse("set", storage)
    _, module = fit(trained, None, Hooked("on_train_start", make_compact), Stops(tmp_path, (16,)))
    other, callback = mlp(seed=3), sparse("set", storage)
    if exchanged:
        fit(sparse("set", storage, seed=8), other, max_epochs=1)
    evaluate("test", callback, other, tmp_path / "16.ckpt")
    assert bool(layers_of(other)) == exchanged
    assert torch.allclose(module(Batches().x), other(Batches().x), rtol=1e-12)
    assert differences({**trained.masks}, {**callback.masks}) == []


def test_a_checkpoint_of_a_dense_network_is_refused_with_the_name_of_the_layer(tmp_path: Path) -> None:
    module, callback, dense = mlp(), sparse("set"), mlp()
    trainer = trainer_for([Stops(tmp_path, (STOP,))])
    trainer.fit(dense, Batches())
    fit(callback, module)
    with pytest.raises(RuntimeError, match=r"net\.1: its weight has .* non-zeros outside"):
        evaluate("test", callback, module, tmp_path / f"{STOP}.ckpt")


def test_nothing_of_an_evaluation_stays_with_the_trainer(tmp_path: Path) -> None:
    callback = sparse("set")
    trainer, module = fit(callback, folder=tmp_path, stops=(STOP,))
    trainer.test(module, Batches(), verbose=False)
    assert "load_checkpoint" not in vars(trainer.strategy)
    with pytest.raises(FileNotFoundError):
        trainer.test(module, Batches(), ckpt_path=tmp_path / "none.ckpt", verbose=False)
    assert "load_checkpoint" not in vars(trainer.strategy)


def test_weights_that_are_loaded_by_hand_have_the_pattern_or_are_refused_with_the_layers_name(tmp_path: Path) -> None:
    callback = sparse("set")
    _, module = fit(callback, folder=tmp_path, stops=(STOP, 16))
    states = {stop: torch.load(tmp_path / f"{stop}.ckpt", weights_only=True)["state_dict"] for stop in (STOP, 16)}
    module.load_state_dict(states[16])
    callback.measured_sparsity()
    with pytest.raises(RuntimeError, match=r"net\.1: its weight has .* non-zeros outside"):
        module.load_state_dict(states[STOP])


# ---------------------------------------------------------------------- Lightning's tuner


class Tuned(Classifier):
    """Has a learning rate and a batch size that a tuner can change."""

    def __init__(self) -> None:
        super().__init__(matrices(0))
        self.lr, self.batch_size = 0.05, 2

    def train_dataloader(self) -> Any:
        data = Batches()
        return DataLoader(TensorDataset(data.x, data.y), batch_size=self.batch_size)

    def val_dataloader(self) -> Any:
        return []


TUNERS: dict[str, Any] = {
    "lr": lambda tuner, module: tuner.lr_find(module, num_training=8, update_attr=False),
    "batch size": lambda tuner, module: tuner.scale_batch_size(module, steps_per_trial=4, max_trials=2),
}


@pytest.mark.combinations
@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("what", list(TUNERS))
def test_a_fit_after_a_tuner_is_the_one_without_it(what: str, storage: str, tmp_path: Path) -> None:
    tuned, callback = Tuned(), sparse("set", storage)
    trainer = trainer_for(callback, tmp_path)
    TUNERS[what](Tuner(trainer), tuned)
    assert not layers_of(tuned)  # no batch of the fit itself has come
    trainer.fit(tuned)
    alone = Tuned()
    alone.batch_size = tuned.batch_size
    trainer_for(sparse("set", storage), tmp_path).fit(alone)
    assert len(layers_of(tuned)) == 3
    assert differences(alone.state_dict(), tuned.state_dict()) == []
    assert differences(patterns_of(alone), patterns_of(tuned)) == []


def test_a_learning_rate_finder_within_a_fit_leaves_no_trace() -> None:
    finder = pl.callbacks.LearningRateFinder(num_training_steps=8, update_attr=False)
    alone, tuned = Tuned(), Tuned()
    trainer_for(sparse("set")).fit(alone)
    trainer_for([sparse("set"), finder]).fit(tuned)
    assert differences(alone.state_dict(), tuned.state_dict()) == []
    assert differences(patterns_of(alone), patterns_of(tuned)) == []


@pytest.mark.parametrize("storage", ["sparse", "grouped"])
@pytest.mark.parametrize("fault", ["another model", "too few values"])
def test_compact_weights_that_do_not_fit_are_refused_with_the_name_of_their_layer(storage: Any, fault: str) -> None:
    saved = nn.Sequential(SparseLinear.random(8, 8, 2, storage=storage, group=4))
    saved[0].compact_state = True
    weights = dict(saved.state_dict())
    if fault == "too few values":
        weights["0.weight.values"] = weights["0.weight.values"].flatten()[:3]
    model = nn.Sequential(nn.Linear(6, 6) if fault == "another model" else nn.Linear(8, 8))
    take_places(model, {"state_dict": weights})
    with pytest.raises(RuntimeError, match=r'Unexpected key\(s\) in state_dict: "0.weight.values"'):
        model.load_state_dict(weights)
