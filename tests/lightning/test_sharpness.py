"""Sharpness-aware minimization under a Trainer: manual and automatic optimization, a closure and two calls."""

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.data import loader
from support.loops import METHODS
from support.nets import Regression
from support.sam import ClosureTwice, DataReplaced, NoInner, NothingKnown, OtherNames, TwoCalls, sgd
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks import DPF, GaP, ParallelGaP, RigL, SparsityCallback, Static
from sparse_callbacks.core.saved_bits import with_truths
from sparse_callbacks.testing.runs import trainer_for

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Sharp(Regression):
    """The optimizer is of the class ``kind``; ``watched`` must be masked in every forward pass and after every batch."""

    kind: Callable[..., Optimizer] = TwoCalls

    def __init__(self, rho: float = 0.5, watched: SparsityCallback | None = None) -> None:
        super().__init__(configure=lambda parameters: self.kind(parameters, rho=rho))
        self.watched = watched

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)

    def on_train_batch_end(self, *_: Any) -> None:
        self.check()

    def check(self) -> None:
        for name, mask in self.watched.masks.items() if self.watched is not None else ():
            assert not self.get_parameter(name).detach()[~mask].any(), name

    def loss(self, batch: Any) -> Tensor:
        self.check()
        return nn.functional.mse_loss(self(batch[0]), batch[1])


class Manual(Sharp):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.automatic_optimization = False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()

        def backward() -> None:
            self.manual_backward(self.loss(batch))

        self.take_step(optimizer, backward)
        optimizer.zero_grad()


class ManualClosure(Manual):
    def take_step(self, optimizer: Any, backward: Callable[[], None]) -> None:
        backward()
        optimizer.step(closure=backward)


class ManualClosureTwice(Manual):
    kind = ClosureTwice

    def take_step(self, optimizer: Any, backward: Callable[[], None]) -> None:
        optimizer.step(closure=backward)


class ManualTwoCalls(Manual):
    def take_step(self, optimizer: Any, backward: Callable[[], None]) -> None:
        backward()
        optimizer.first_step(zero_grad=True)
        backward()
        optimizer.second_step(zero_grad=True)


class RawTwoCalls(ManualTwoCalls):
    def take_step(self, optimizer: Any, backward: Callable[[], None]) -> None:
        super().take_step(optimizer.optimizer, backward)


class Automatic(Sharp):
    kind = ClosureTwice

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)


class OwnOptimizerStep(Automatic):
    kind = TwoCalls

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.first_step(zero_grad=True)
        optimizer_closure()
        optimizer.second_step(zero_grad=True)


FORMS = [ManualClosure, ManualClosureTwice, ManualTwoCalls, RawTwoCalls, Automatic, OwnOptimizerStep]


class Plain(Sharp):
    def __init__(self, manual: bool) -> None:
        super().__init__()
        self.configure, self.automatic_optimization = sgd, not manual

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        if self.automatic_optimization:
            return self.loss(batch)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(self.loss(batch))
        return optimizer.step()


def fit(module: pl.LightningModule, callback: SparsityCallback, folder: Path, *others: Any, **options: Any) -> Any:
    path = options.pop("ckpt_path", None)
    trainer = trainer_for([callback, *others], folder, **({"max_epochs": 3} | options))
    trainer.fit(module, loader(8), ckpt_path=path)
    return trainer


def assert_same_runs(mine: SparsityCallback, theirs: SparsityCallback) -> None:
    assert (mine.step, mine.updates) == (theirs.step, theirs.updates)
    ours, others = with_truths(mine.state_dict()), with_truths(theirs.state_dict())
    for kind in ("masks", "dense", "aux"):
        for name, tensor in ours[kind].items():
            assert torch.equal(tensor, others[kind][name]), (kind, name)


def assert_same_weights(one: nn.Module, other: nn.Module) -> None:
    assert all(torch.equal(p, q) for p, q in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.combinations
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", METHODS)
def test_with_a_radius_of_0_every_method_trains_as_with_the_inner_optimizer(
    method: str, form: Any, tmp_path: Path
) -> None:
    callback, other = METHODS[method](), METHODS[method]()
    module = form(rho=0.0)
    plain = Plain(manual=not module.automatic_optimization)
    fit(module, callback, tmp_path)
    fit(plain, other, tmp_path)
    assert_same_weights(module, plain)
    assert_same_runs(callback, other)
    assert callback.step + (callback.updates if method == "rigl" else 0) == 24


@pytest.mark.combinations
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["static", "rigl", "snfs", "gmp", "dpf", "gap"])
def test_pruned_weights_are_zero_in_both_passes(method: str, form: Any, tmp_path: Path) -> None:
    callback = METHODS[method]()
    fit(form(watched=callback), callback, tmp_path)
    assert callback.step > 12


class Moves(pl.Callback):
    """How far a bias moves in batches that bring an update, and in the others; list it first."""

    def __init__(self, callback: SparsityCallback) -> None:
        self.callback, self.updates, self.bias = callback, 0, torch.zeros(())
        self.moved: dict[bool, list[float]] = {True: [], False: []}

    def on_train_batch_start(self, trainer: Any, module: Any, *_: Any) -> None:
        self.updates, self.bias = self.callback.updates, module.net[0].bias.detach().clone()

    def on_train_batch_end(self, trainer: Any, module: Any, *_: Any) -> None:
        moved = float((module.net[0].bias.detach() - self.bias).norm())
        self.moved[self.callback.updates > self.updates].append(moved)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_a_replaced_step_moves_nothing(form: Any, tmp_path: Path) -> None:
    callback = RigL(0.8, every=4, print_plan=False)
    moves = Moves(callback)
    fit(form(watched=callback), callback, tmp_path, moves)
    assert moves.moved[True]
    assert not any(moves.moved[True])
    assert all(moves.moved[False])


class Saves(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


@pytest.mark.combinations
@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("method", ["rigl", "dpf", "l0", "gap"])
def test_a_run_resumes_exactly(method: str, form: Any, tmp_path: Path) -> None:
    whole, callback, path = METHODS[method](), METHODS[method](), tmp_path / "first.ckpt"
    module, again = form(), form()
    fit(module, whole, tmp_path, Saves(path))
    fit(again, callback, tmp_path, ckpt_path=path)
    assert_same_weights(module, again)
    assert_same_runs(callback, whole)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.__name__)
def test_gap_restarts_optimizers_of_two_passes(form: Any, tmp_path: Path) -> None:
    callback, made = GaP(0.8, partitions=2, every=6, print_plan=False), []
    module = form(watched=callback)
    configure = module.configure
    module.configure = lambda parameters: made.append(configure(parameters)) or made[-1]
    fit(module, callback, tmp_path)
    assert len(made) == 3
    assert (callback.step, callback.updates) == (24, 2)


@pytest.mark.parametrize("form", [Automatic, OwnOptimizerStep, ManualTwoCalls], ids=lambda f: f.__name__)
def test_two_callbacks_share_an_optimizer_of_two_passes(form: Any, tmp_path: Path) -> None:
    first = RigL(0.8, every=4, include="net.0.*", print_plan=False)
    second = RigL(0.8, every=4, include="net.2.*", print_plan=False)
    module = form(watched=first)
    fit(module, first, tmp_path, second)
    module.watched = second
    module.check()
    assert first.updates == second.updates > 0
    assert first.step == second.step == 24 - first.updates


def test_clipping_in_automatic_optimization_sees_masked_gradients(tmp_path: Path) -> None:
    callback, norms = DPF("constant(0.8)", every=4, print_plan=False), []

    class Clipped(Automatic):
        def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
            for name, mask in callback.masks.items():
                assert not self.get_parameter(name).grad[~mask].any()
            norms.append(optimizer)

    module = Clipped(watched=callback)
    fit(module, callback, tmp_path, gradient_clip_val=0.1)
    assert len(norms) == 48
    dense = callback.state_dict()["dense"]
    assert any(bool(dense[n][~m].any()) for n, m in callback.masks.items())


# ---------------------------------------------------------------------- what is refused


def test_without_an_inner_optimizer_it_is_refused_and_nothing_is_changed(tmp_path: Path) -> None:
    module = ManualClosure()
    module.kind = NoInner
    before = [p.detach().clone() for p in module.parameters()]
    with pytest.raises(ValueError, match=r"NoInner moves the weights before it asks for gradients.*base_optimizer"):
        fit(module, Static(0.8, print_plan=False), tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(module.parameters(), before, strict=True))


class NoStep(TwoCalls):
    """Its two calls alone, as the one in docs/sharpness.md."""

    step = Optimizer.step


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        (NoStep, r"has no step\(\)"),
        (OtherNames, "fails where no gradient was"),
        (TwoCalls, "fails where no gradient was"),
    ],
)
def test_two_calls_are_refused_where_the_trainer_steps(kind: Any, why: str, tmp_path: Path) -> None:
    module = Automatic()
    module.kind = kind
    words = rf"{kind.__name__} cannot be stepped by step\(closure\) alone.*it {why}.*automatic_optimization = False"
    with pytest.raises(ValueError, match=words):
        fit(module, Static(0.8, print_plan=False), tmp_path)
    assert not module.batches


def test_an_optimizer_without_a_step_is_refused_where_the_trainer_steps(tmp_path: Path) -> None:
    class Bare(Optimizer):
        def __init__(self, parameters: Any, rho: float) -> None:
            super().__init__(parameters, {"rho": rho})

    module = Automatic()
    module.kind = Bare
    with pytest.raises(ValueError, match=r"Bare cannot be stepped by step\(closure\) alone.*it has no step"):
        fit(module, Static(0.8, print_plan=False), tmp_path)


def test_a_grad_scaler_is_refused(tmp_path: Path) -> None:
    plugin = pl.plugins.MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu"))
    with pytest.raises(ValueError, match=r"TwoCalls takes gradients twice.*bf16-mixed"):
        fit(ManualTwoCalls(), Static(0.8, print_plan=False), tmp_path, plugins=[plugin])


def test_networks_that_train_in_turn_are_refused(tmp_path: Path) -> None:
    callback = ParallelGaP(0.8, partitions=2, print_plan=False)
    with pytest.raises(ValueError, match=r"ClosureTwice holds the optimizer that takes its steps.*or GaP"):
        fit(Automatic(), callback, tmp_path)


@pytest.mark.parametrize("method", ["static", "rigl", "snfs", "dpf", "l0", "gap"])
def test_accumulation_keeps_pruned_weights_zero_in_both_passes(method: str, tmp_path: Path) -> None:
    callback = METHODS[method]()
    module = Automatic(watched=None if method == "l0" else callback)
    fit(module, callback, tmp_path, accumulate_grad_batches=2)
    assert callback.step + callback.updates >= 12


@pytest.mark.filterwarnings("default::UserWarning")
@pytest.mark.parametrize(("momentum", "warned"), [(0.9, 1), (0.0, 0)])
def test_a_state_that_no_checkpoint_holds_is_reported(momentum: float, warned: int, tmp_path: Path) -> None:
    module = ManualTwoCalls()
    module.configure = lambda parameters: DataReplaced(parameters, momentum=momentum)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, Static(0.8, print_plan=False), tmp_path)
    found = [w for w in caught if "DataReplaced.state_dict() leaves out the state of the SGD within" in str(w.message)]
    assert len(found) == warned


class Unseen(Manual):
    kind = NothingKnown

    def take_step(self, optimizer: Any, backward: Callable[[], None]) -> None:
        backward()
        optimizer.ascend()
        optimizer.zero_grad()
        backward()
        optimizer.descend()


class PastTheTrainer(Automatic):
    """Its step is that of the optimizer under Lightning's, which no hook of a callback announces."""

    def __init__(self) -> None:
        super().__init__()
        self.configure = sgd

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.optimizer.step()


class WithoutAnOptimizer(Manual):
    def take_step(self, optimizer: Any, backward: Callable[[], None]) -> None:
        backward()
        for p in self.parameters():
            p.data.sub_(p.grad, alpha=0.1)


UNSEEN = [Unseen, PastTheTrainer, WithoutAnOptimizer]
# RigL refuses the optimizer of the first before the first batch, as it cannot try out what a step of it does.
CASES = [(method, module) for method in ("rigl", "static", "dpf", "l0") for module in UNSEEN[method == "rigl" :]]


@pytest.mark.combinations
@pytest.mark.parametrize(("method", "module"), CASES, ids=lambda v: v if isinstance(v, str) else v.__name__)
@pytest.mark.parametrize("epoch", [8, 130])
def test_weights_that_change_without_a_step_are_an_error_soon(
    method: str, epoch: int, module: Any, tmp_path: Path
) -> None:
    made, callback = module(), METHODS[method]()
    trainer = trainer_for(callback, tmp_path, max_epochs=2)
    with pytest.raises(RuntimeError, match=rf"in the first {min(epoch, 100)} batches, and .* has seen no step of"):
        trainer.fit(made, loader(epoch))


class Accumulates(Manual):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.configure, self.seen = sgd, 0

    def take_step(self, optimizer: Any, backward: Callable[[], None]) -> None:
        backward()

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer: Any = self.optimizers()
        self.manual_backward(self.loss(batch))
        self.seen += 1
        if self.seen == 250:
            optimizer.step()


@pytest.mark.parametrize("method", ["rigl", "dpf", "l0"])
def test_accumulating_for_long_is_no_error(method: str, tmp_path: Path) -> None:
    callback = METHODS[method]()
    trainer_for(callback, tmp_path, max_epochs=2).fit(Accumulates(), loader(130))
    assert callback.step + callback.updates >= 1
