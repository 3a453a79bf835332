"""Other code around a callback: gradient clipping, hooks that read gradients, tuners, compiled modules."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pytorch_lightning import Callback
from pytorch_lightning import callbacks as lightning_callbacks
from support.data import loader
from support.inside import parameters_of, planted_hooks
from support.nets import Regression, mlp, sgd
from support.rig import fit_steps, short_callback
from torch import nn

from sparse_callbacks import GMP, SET, SNFS, RigL, Static
from sparse_callbacks.testing.runs import trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


METHODS = [RigL, SET, SNFS, GMP, Static]


class ReadsGradients(Regression):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.norms = [p.grad.norm() for p in self.parameters()]

    def configure_gradient_clipping(self, optimizer: Any, **options: Any) -> None:
        assert all(p.grad is not None for p in self.parameters())
        self.clip_gradients(optimizer, **options)


class Reads(Callback):
    def on_before_optimizer_step(self, trainer: Any, module: Any, optimizer: Any) -> None:
        assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize("algorithm", ["norm", "value"])
def test_an_update_leaves_gradients_to_whoever_reads_them(algorithm: str, tmp_path: Path) -> None:
    callback, plain = short_callback(RigL), short_callback(RigL)
    module = ReadsGradients()
    fit_steps(tmp_path, [callback, Reads()], module, 8, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    other = Regression()
    fit_steps(tmp_path, plain, other, 8, gradient_clip_val=0.5, gradient_clip_algorithm=algorithm)
    assert callback.updates == plain.updates > 1
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))
    assert "configure_gradient_clipping" not in vars(module)


def test_a_hook_that_raises_at_an_update_leaves_nothing_in_the_module(tmp_path: Path) -> None:
    class Raises(Regression):
        def on_before_optimizer_step(self, optimizer: Any) -> None:
            raise RuntimeError("theirs")

    callback, module = short_callback(RigL), Raises()
    with pytest.raises(RuntimeError, match="theirs"):
        fit_steps(tmp_path, callback, module, 4)
    assert "configure_gradient_clipping" not in vars(module)
    assert not planted_hooks(callback)


@pytest.mark.combinations
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("make", METHODS, ids=lambda m: m.__name__)
def test_an_inf_at_a_pruned_weight_harms_nobody(make: Any, clip: float | None, tmp_path: Path) -> None:
    callback = short_callback(make)

    class Poison(Callback):
        def on_after_backward(self, trainer: Any, module: Any) -> None:
            if trainer.global_step == 3:
                for name, mask in callback.masks.items():
                    parameters_of(callback)[name].grad[~mask] = torch.inf

    module = Regression()
    fit_steps(tmp_path, [callback, Poison()], module, 6, gradient_clip_val=clip)
    for name, p in module.named_parameters():
        assert p.isfinite().all(), name
    assert all((parameters_of(callback)[n][~m] == 0).all() for n, m in callback.masks.items())


def test_the_learning_rate_finder_runs_beside_a_callback(tmp_path: Path) -> None:
    class Rated(Regression):
        lr = 0.01

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=self.lr)

    for callback in (short_callback(RigL), short_callback(Static)):
        finder = lightning_callbacks.LearningRateFinder(num_training_steps=6)
        trainer_for([callback, finder], tmp_path, max_epochs=2).fit(Rated(), loader(8))
        assert all((parameters_of(callback)[n][~m] == 0).all() for n, m in callback.masks.items())


def test_sparse_embedding_gradients_are_refused(tmp_path: Path) -> None:
    class Words(Regression):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(5, 4, sparse=True)

    with pytest.raises(
        ValueError, match=r"words is an embedding with sparse=True.*Use sparse=False, or leave it out of include="
    ):
        fit_steps(tmp_path, short_callback(Static, include=["words.weight"]), Words(), 2)


@pytest.mark.parametrize("glob", ["attention.in_proj_weight", "*in_proj_weight", "attention.in_proj*"])
def test_a_distribution_names_stacked_weights_like_others(glob: str) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention, self.head = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

    plan = Static(0.75, distribution={glob: 0.5}).plan(Net())
    assert plan["attention.in_proj_weight"].sparsity == 0.5
    assert plan["head.weight"].sparsity == 0.75
    one = Static(0.75, distribution={"attention.in_proj_weight[0]": 0.5}).plan(Net())
    assert one["attention.in_proj_weight"].zeros == 32 + 48 + 48


def test_a_compiled_module_has_the_plan_of_the_plain_one() -> None:
    module = mlp(4, 8, 2)
    assert str(Static(0.5).plan(torch.compile(module))) == str(Static(0.5).plan(module))


def test_clearing_gradients_in_place_between_backwards_is_no_accumulation(tmp_path: Path) -> None:
    """A GAN whose other loss leaks into these parameters: what zero_grad clears must not come back at an update."""

    class Leaks(Regression):
        def __init__(self, set_to_none: bool) -> None:
            super().__init__(configure=sgd)
            self.automatic_optimization, self.set_to_none = False, set_to_none

        def training_step(self, batch: Any, batch_idx: int) -> None:
            optimizer = self.optimizers()
            self.manual_backward(3 * super().training_step(batch, batch_idx))
            optimizer.zero_grad(set_to_none=self.set_to_none)
            self.manual_backward(super().training_step(batch, batch_idx))
            optimizer.step()
            optimizer.zero_grad(set_to_none=self.set_to_none)

    found = []
    for set_to_none in (True, False):
        callback = short_callback(RigL)
        fit_steps(tmp_path, callback, Leaks(set_to_none), 8)
        found.append(callback.masks)
    assert all(torch.equal(m, found[1][n]) for n, m in found[0].items())
