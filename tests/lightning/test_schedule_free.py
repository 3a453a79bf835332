"""Schedule-free optimizers under a Trainer, whose modes the user's hooks switch."""

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import ModelCheckpoint
from support.data import loader
from support.loops import METHODS
from support.nets import Regression
from support.schedule_free import EVERY, STAND_IN, schedule_free
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks import DPF, GMP, GaP, ParallelGaP, SparsityCallback, saved_masks
from sparse_callbacks.testing.runs import trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

SGD = "stand-in/SGDScheduleFree"
# The three ways in which a module reaches its optimizer.
WAYS = {
    "raw": lambda module: module.optimizers().optimizer,
    "wrapped": lambda module: module.optimizers(),
    "trainer": lambda module: module.trainer.optimizers[0],
}


class Switches(Regression):
    """Evaluates the mean and trains the other point, as the package's documentation asks for."""

    def __init__(self, name: str = SGD, way: str = "raw", watched: SparsityCallback | None = None) -> None:
        super().__init__(configure=schedule_free(name))
        self.way, self.watched, self.looks = WAYS[way], watched, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_epoch_start(self) -> None:
        self.way(self).train()
        self.look()

    def on_validation_epoch_start(self) -> None:
        self.way(self).eval()
        self.look()

    def on_train_end(self) -> None:
        self.way(self).eval()
        self.look()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.look()

    def look(self) -> None:
        callback = self.watched
        if callback is not None and callback.masks and callback.attachment.in_training:
            self.looks += 1
            for name, mask in callback.masks.items():
                assert not self.get_parameter(name).detach()[~mask].any(), name


def fit(module: Switches, callback: SparsityCallback, folder: Path, *others: Any, **options: Any) -> pl.Trainer:
    ckpt = options.pop("ckpt_path", None)
    trainer = trainer_for([callback, *others], folder, **({"max_epochs": 3} | options))
    trainer.fit(module, loader(8), loader(2), ckpt_path=ckpt)
    return trainer


@pytest.mark.combinations
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("method", METHODS)
def test_pruned_weights_are_zero_in_both_modes(method: str, way: str, tmp_path: Path) -> None:
    callback = METHODS[method]()
    module = Switches(SGD, way, callback)
    trainer = fit(module, callback, tmp_path)
    assert module.looks > 10
    zeros = sum(int((module.get_parameter(n) == 0).sum()) for n in callback.masks)
    size = sum(m.numel() for m in callback.masks.values())
    assert zeros / size >= callback.measured_sparsity()["sparsity/total"] - 1e-6
    # after the fit, where no hook is
    callback.attachment.in_training = True
    for switch in (trainer.optimizers[0].train, trainer.optimizers[0].eval):
        switch()
        module.look()


@pytest.mark.parametrize("name", EVERY)
def test_all_optimizers_of_the_package_train_and_stay_sparse(name: str, tmp_path: Path) -> None:
    callback = DPF(0.8, every=4, print_plan=False)
    module = Switches(name, "wrapped", callback)
    before = [p.detach().clone() for p in module.parameters()]
    fit(module, callback, tmp_path)
    assert module.looks > 10
    assert all(not torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


class Recorded(pl.Callback):
    """Weights at the end of the run."""

    def __init__(self) -> None:
        self.weights: dict[str, Tensor] = {}

    def on_train_batch_end(self, trainer: pl.Trainer, module: Any, *_: Any) -> None:
        self.weights = {n: t.clone() for n, t in module.state_dict().items()}


@pytest.mark.parametrize("method", ["rigl", "gmp", "dpf", "smcp", "channels", "l0", "gap"])
def test_a_checkpoint_in_eval_mode_resumes_exactly(method: str, tmp_path: Path) -> None:
    whole, end, keeper = METHODS[method](), Recorded(), ModelCheckpoint(tmp_path, save_top_k=-1)
    fit(Switches(watched=whole), whole, tmp_path, end, keeper, enable_checkpointing=True)
    path = next(tmp_path.glob("epoch=1*.ckpt"))
    state = torch.load(path, weights_only=True)
    assert not state["optimizer_states"][0]["param_groups"][0]["train_mode"]
    callback, after = METHODS[method](), Recorded()
    assert all(not state["state_dict"][n][~m].any() for n, m in saved_masks(state).items())
    fit(Switches(watched=callback), callback, tmp_path, after, ckpt_path=path)
    assert all(torch.equal(t, after.weights[n]) for n, t in end.weights.items())
    assert all(torch.equal(m, callback.masks[n]) for n, m in whole.masks.items())


def test_gap_makes_new_optimizers_in_the_mode_of_the_old_ones(tmp_path: Path) -> None:
    """Each restart falls into an epoch, where no hook of the module would switch the new optimizer to training."""
    callback = GaP(0.8, partitions=2, every=5, print_plan=False)
    module = Switches(watched=callback)
    made: list[Optimizer] = []
    configure = module.configure
    module.configure = lambda parameters: made.append(configure(parameters)) or made[-1]  # type: ignore[func-returns-value]
    fit(module, callback, tmp_path)
    assert len(made) == 3
    assert callback.step == 24


class OnlyModes(torch.optim.SGD):
    def train(self) -> None: ...

    def eval(self) -> None: ...


def test_other_modes_are_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    module = Regression(configure=lambda parameters: OnlyModes(parameters, lr=0.1))
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"OnlyModes has train\(\) and eval\(\).*package schedulefree"):
        trainer_for(GMP(0.8, print_plan=False), tmp_path).fit(module, loader(4))
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


def test_networks_that_train_in_turn_are_refused(tmp_path: Path) -> None:
    callback = ParallelGaP(0.8, partitions=2, print_plan=False)
    with pytest.raises(ValueError, match=r"SGDScheduleFree has a point for training.*loads other networks"):
        fit(Switches(), callback, tmp_path)


class RawBackward(Switches):
    """Manual optimization whose backward pass Lightning does not see."""

    automatic_optimization = False

    def __init__(self, watched: SparsityCallback) -> None:
        super().__init__(watched=watched)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        nn.functional.mse_loss(self.net(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, mask in self.watched.masks.items() if not self.watched.weights.copied else ():
            assert not optimizer.state[self.get_parameter(name)]["z"][~mask].any(), name


@pytest.mark.parametrize("method", ["static", "gmp", "dpf"])
def test_a_backward_pass_past_lightning_leaves_the_mean_sparse(method: str, tmp_path: Path) -> None:
    callback = METHODS[method]()
    module = RawBackward(callback)
    fit(module, callback, tmp_path)
    assert module.looks > 10


def test_the_stand_in_refuses_to_step_in_eval_mode() -> None:
    """Or the tests above would not show that modes are right."""
    optimizer = STAND_IN.SGDScheduleFree(Regression().parameters())
    with pytest.raises(Exception, match="not in train mode"):
        optimizer.step()
