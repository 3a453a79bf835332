"""Sparse parameters that no gradient reaches are named once, with what to do."""

import copy
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from support.loops import METHODS, batches, data, loss_of, net, sgd
from torch import Tensor, nn

from sparse_callbacks import GaP, RigL, SparsityCallback, Static, sparsify
from sparse_callbacks.core.first_gradients import FirstGradients, globs_for
from sparse_callbacks.testing.runs import Stops, trainer_for


class WithTeacher(nn.Module):
    """A network, and a copy of it that follows its average."""

    def __init__(self) -> None:
        super().__init__()
        self.student = net()
        self.teacher = copy.deepcopy(self.student)

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


class Module(pl.LightningModule):
    def __init__(self, model: nn.Module | None = None) -> None:
        super().__init__()
        self.model = WithTeacher() if model is None else model

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return loss_of(self.model, batch)

    def configure_optimizers(self) -> Any:
        return sgd(self)


NAMED = "makes {0}teacher.0.weight, {0}teacher.2.weight, {0}teacher.4.weight sparse, and they had no gradient in any of"


def told(caught: list[warnings.WarningMessage]) -> list[str]:
    return [str(w.message) for w in caught if "had no gradient" in str(w.message)]


def fitted(
    callback: SparsityCallback, module: pl.LightningModule | None = None, *more: pl.Callback, **options: Any
) -> list[str]:
    path, count = options.pop("ckpt_path", None), options.pop("batches", 12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer = trainer_for([callback, *more], **options)
        trainer.fit(Module() if module is None else module, data(batches=count), ckpt_path=path)
    return told(caught)


def looped(method: Any, model: nn.Module, steps: int, epochs: int = 0, **options: Any) -> list[str]:
    optimizer = sgd(model)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with sparsify(method, model, optimizer, steps=steps, **options) as run:
            for number, batch in enumerate(batches(data(), 0, steps), 1):
                optimizer.zero_grad()
                with run.batch():
                    loss_of(model, batch).backward()
                optimizer.step()
                if epochs and number % epochs == 0:
                    run.epoch_end()
    return told(caught)


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("smcp", "channels", "ctre", "crop")])
def test_a_teacher_among_the_trained_parameters_is_named_once_under_a_trainer(method: str) -> None:
    (text,) = fitted(METHODS[method](), max_epochs=3)
    assert NAMED.format("model.") in text
    assert "the first 12 steps" in text
    assert "exclude=['model.teacher.*']" in text


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("smcp", "channels", "ctre")])
def test_a_teacher_among_the_trained_parameters_is_named_once_in_a_loop(method: str) -> None:
    (text,) = looped(METHODS[method](), WithTeacher(), 24, epoch=12, on_restart=lambda: None)
    assert NAMED.format("") in text
    assert "the first 12 steps" in text
    assert "exclude=['teacher.*']" in text


def test_with_the_advice_nothing_is_said_and_the_teacher_stays_dense() -> None:
    model = WithTeacher()
    assert looped(RigL(0.8, every=4, exclude=["teacher.*"], print_plan=False), model, 24, epoch=12) == []
    assert bool(model.teacher[0].weight.all())


def test_a_hundred_steps_are_looked_at_at_most() -> None:
    (text,) = fitted(Static(0.8, print_plan=False), batches=130, max_epochs=1)
    assert "the first 100 steps" in text
    (text,) = looped(Static(0.8, print_plan=False), WithTeacher(), 110)
    assert "the first 100 steps" in text
    assert looped(Static(0.8, print_plan=False), WithTeacher(), 99) == []  # nobody knows the epoch
    (text,) = looped(Static(0.8, print_plan=False), WithTeacher(), 20, epochs=7)
    assert "the first 7 steps" in text


class Heads(nn.Module):
    """One head is used all the time, one in every fifth batch, one without effect and one never."""

    def __init__(self, every: int = 5) -> None:
        super().__init__()
        self.body, self.every, self.batches = nn.Linear(12, 8), every, 0
        self.always, self.sometimes, self.zero, self.never = (nn.Linear(8, 4) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        self.batches += 1
        out = self.always(x) + 0.0 * self.zero(x)
        return out + self.sometimes(x) if self.batches % self.every == 0 else out


def test_one_gradient_is_enough_and_a_gradient_of_zeros_is_one() -> None:
    (text,) = looped(Static(0.5, print_plan=False), Heads(), 12, epoch=6)
    assert "Static makes never.weight sparse" in text
    (text,) = fitted(Static(0.5, print_plan=False), Module(Heads()), max_epochs=2)
    assert "Static makes model.never.weight sparse" in text
    (text,) = looped(Static(0.5, print_plan=False), Heads(every=9), 12, epoch=6)
    assert "Static makes sometimes.weight, never.weight sparse" in text


def test_dense_partitions_and_replaced_steps_have_gradients() -> None:
    assert looped(GaP(0.5, partitions=2, restart=False, print_plan=False), net(), 24, epoch=6) == []
    assert looped(RigL(0.5, every=1, stop=20, print_plan=False), net(), 24, epoch=6) == []


class Adversaries(pl.LightningModule):
    """Two networks with an optimizer each, of which the second steps in every fourth batch, from ``begin`` on."""

    def __init__(self, begin: int = 0, teacher: bool = False) -> None:
        super().__init__()
        self.one, self.two = net(), net(1)
        self.teacher = copy.deepcopy(self.two) if teacher else None
        self.begin, self.automatic_optimization = begin, False

    def training_step(self, batch: Any, batch_idx: int) -> None:
        first, second = self.optimizers()
        used = [(first, self.one)]
        if batch_idx % 4 == 0 and self.current_epoch >= self.begin:
            used.append((second, self.two))
        for optimizer, model in used:
            optimizer.zero_grad()
            self.manual_backward(loss_of(model, batch))
            optimizer.step()

    def configure_optimizers(self) -> Any:
        second = [*self.two.parameters(), *(self.teacher.parameters() if self.teacher else [])]
        return sgd(self.one), sgd(second)


@pytest.mark.filterwarnings("ignore")
def test_optimizers_that_take_turns_are_no_reason_to_warn() -> None:
    assert fitted(Static(0.5, print_plan=False), Adversaries(), max_epochs=2) == []
    assert fitted(Static(0.5, print_plan=False), Adversaries(begin=1), max_epochs=3) == []
    (text,) = fitted(Static(0.5, print_plan=False), Adversaries(teacher=True), batches=120, max_epochs=2)
    assert "makes teacher.0.weight, teacher.2.weight, teacher.4.weight sparse" in text
    (text,) = fitted(Static(0.5, print_plan=False), Adversaries(begin=1, teacher=True), max_epochs=3)
    assert "makes teacher.0.weight, teacher.2.weight, teacher.4.weight sparse" in text


def test_an_optimizer_with_few_steps_is_waited_for() -> None:
    looks = FirstGradients(3, steps=4)
    gradients = {"a": True, "b": False, "c": False}

    def look(index: int, names: list[str]) -> list[str]:
        step: Any = SimpleNamespace(
            index=index, names=names, gradient=lambda n: torch.ones(1) if gradients[n] else None
        )
        return looks.look(step)

    assert look(1, ["c"]) == []
    assert [look(0, ["a", "b"]) for _ in range(6)] == [[]] * 6
    gradients["c"] = True
    assert look(1, ["c"]) == ["b"]
    assert looks.looks_at == {2}  # which has not begun
    assert looks.end() == []


@pytest.mark.parametrize(("batch", "again"), [(6, True), (12, False), (18, False)])
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_says_it_only_where_the_first_has_not(batch: int, again: bool, tmp_path: Path) -> None:
    stops = Stops(tmp_path, (batch,))
    assert len(fitted(RigL(0.5, every=4, print_plan=False), None, stops, max_epochs=2)) == 1
    words = fitted(RigL(0.5, every=4, print_plan=False), max_epochs=3, ckpt_path=stops.path(batch))
    assert len(words) == again


def test_a_trial_run_and_a_second_fit() -> None:
    callback, module = Static(0.5, print_plan=False), Module()
    assert fitted(callback, module, fast_dev_run=True) == []
    assert len(fitted(callback, module, max_epochs=1)) == 1
    assert len(fitted(callback, module, max_epochs=1)) == 1


@pytest.mark.parametrize(
    ("chosen", "names", "globs"),
    [
        (["teacher.0.weight", "teacher.1.weight"], ["net.0.weight"], ["teacher.*"]),
        (["net.ema.0.weight", "net.ema.1.weight"], ["net.a.weight"], ["net.ema.*"]),
        (["net.ema.weight"], ["net.emas.weight"], ["net.ema.*"]),
        (["weight_b"], ["weight_a"], ["weight_b"]),
        (["net.weight"], ["net.0.weight"], ["net.weight"]),
    ],
)
def test_globs_match_what_is_named_and_nothing_else(chosen: list[str], names: list[str], globs: list[str]) -> None:
    assert globs_for(chosen, [*names, *chosen]) == globs


def test_a_callback_is_copied_in_the_middle_of_its_look() -> None:
    model = WithTeacher()
    method = Static(0.8, print_plan=False)
    optimizer = sgd(model)
    with sparsify(method, model, optimizer, steps=30):
        loss_of(model, next(iter(data()))).backward()
        optimizer.step()
        copied = copy.deepcopy(method)
    assert len(looped(copied, WithTeacher(), 24, epoch=12)) == 1
    assert torch.equal(copied.masks["teacher.0.weight"], method.masks["teacher.0.weight"])
