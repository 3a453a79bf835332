"""`sparsify` in a loop written by hand gives the weights and masks of the Trainer's run, bit for bit."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from pytorch_lightning.plugins.precision import MixedPrecision
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import (
    CTRE,
    DPF,
    GMP,
    SET,
    SMCP,
    SNFS,
    ChannelPruning,
    ConstrainedL0,
    GaP,
    PruneAtStart,
    RigL,
    SparsityCallback,
    Static,
    SupTickets,
)
from sparse_callbacks.core.loop import sparsify

EPOCHS, BATCHES = 4, 12


def loss_of(module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
    return nn.functional.cross_entropy(module(batch[0]), batch[1])


METHODS: dict[str, Callable[[], SparsityCallback]] = {
    "static": lambda: Static(0.8, print_plan=False),
    "set": lambda: SET(0.8, every=4, print_plan=False),
    "rigl": lambda: RigL(0.8, every=4, print_plan=False),
    "snip": lambda: PruneAtStart(0.8, batches=99, loss=loss_of, print_plan=False),
    "snfs": lambda: SNFS(0.8, every=4, print_plan=False),
    "sup_tickets": lambda: SupTickets(RigL(0.8, every=4, print_plan=False), share=0.5, cycles=2),
    "gmp": lambda: GMP(0.8, every=4, print_plan=False),
    "dpf": lambda: DPF(0.8, every=4, print_plan=False),
    "smcp": lambda: SMCP(budget=0.5, every=4, print_plan=False),
    "channels": lambda: ChannelPruning(budget=0.5, criterion="taylor_fo", every=4, print_plan=False),
    "ctre": lambda: CTRE(0.8, every=4, print_plan=False),
    "l0": lambda: ConstrainedL0(density=0.3, gate_lr=0.1, dual_lr=0.1, print_plan=False),
    "gap": lambda: GaP(0.8, partitions=2, restart=False, print_plan=False),
}

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.0),
}


@dataclass(frozen=True)
class Case:
    """One way to train; ``inf_at`` are micro-batches whose loss is infinite, under a GradScaler."""

    norm: bool = True
    clip: float | None = None
    window: int = 1
    inf_at: tuple[int, ...] = ()
    half: bool = False


CASES = {
    "plain": Case(),
    "clipped": Case(clip=0.5),
    "accumulated": Case(clip=0.5, window=5),
    "half, two steps skipped": Case(norm=False, inf_at=(7, 9), half=True),
    "half, clipped, two steps skipped": Case(norm=False, clip=0.5, inf_at=(7, 12), half=True),
}


def data() -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(8 * BATCHES, 12, generator=generator), torch.randint(0, 4, (8 * BATCHES,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


class Net(pl.LightningModule):
    def __init__(self, make: Callable[[Any], torch.optim.Optimizer], case: Case) -> None:
        super().__init__()
        torch.manual_seed(0)
        norm = [nn.BatchNorm1d(24)] if case.norm else []
        self.body = nn.Sequential(nn.Linear(12, 24), *norm, nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
        self.head = nn.Linear(24, 4)
        self.make, self.case, self.seen = make, case, 0

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(x))

    def training_step(self, batch: Sequence[Tensor], _: int) -> Tensor:
        self.seen += 1
        loss = nn.functional.cross_entropy(self(batch[0]).float(), batch[1])
        return loss * (math.inf if self.seen in self.case.inf_at else 1.0)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.make(self.parameters())


def scaler() -> Any:
    return torch.amp.GradScaler("cpu", init_scale=256.0)


def half() -> Any:
    return torch.autocast("cpu", dtype=torch.float16)


def by_trainer(method: SparsityCallback, make: Callable[[Any], torch.optim.Optimizer], case: Case) -> Net:
    net = Net(make, case)
    pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[method],
        gradient_clip_val=case.clip,
        accumulate_grad_batches=case.window,
        plugins=[MixedPrecision("16-mixed", "cpu", scaler=scaler())] if case.half else None,
    ).fit(net, data())
    return net


def by_hand(method: SparsityCallback, make: Callable[[Any], torch.optim.Optimizer], case: Case) -> Net:
    net, loader = Net(make, case), data()
    optimizer, steps = make(net.parameters()), math.ceil(BATCHES / case.window)
    clip = None if case.clip is None else lambda parameters: clip_grad_norm_(parameters, case.clip)
    scale = scaler() if case.half else None

    def forward(module: nn.Module, batch: Sequence[Tensor]) -> Tensor:
        with half() if case.half else nullcontext():
            return module(batch[0])

    run = sparsify(method, net, optimizer, EPOCHS * steps, epoch=steps, data=loader, forward=forward, clip=clip)
    with run:
        for _ in range(EPOCHS):
            for number, batch in enumerate(loader, 1):
                with run.batch():
                    with half() if case.half else nullcontext():
                        loss = net.training_step(batch, number) / case.window
                    (loss if scale is None else scale.scale(loss)).backward()
                if number % case.window == 0 or number == BATCHES:
                    step(optimizer, scale)
            run.epoch_end()
    return net


def step(optimizer: torch.optim.Optimizer, scale: Any | None) -> None:
    if scale is None:
        optimizer.step()
    else:
        scale.step(optimizer)
        scale.update()
    optimizer.zero_grad()


def same(one: nn.Module, other: nn.Module) -> None:
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


@pytest.mark.combinations
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", METHODS)
def test_a_loop_by_hand_trains_as_the_trainer_does(method: str, case: str, optimizer: str) -> None:
    hosted, plain = METHODS[method](), METHODS[method]()
    trained = by_trainer(hosted, OPTIMIZERS[optimizer], CASES[case])
    same(trained, by_hand(plain, OPTIMIZERS[optimizer], CASES[case]))
    assert hosted.masks.keys() == plain.masks.keys()
    assert all(torch.equal(hosted.masks[name], mask) for name, mask in plain.masks.items())
    assert (hosted.step, hosted.updates) == (plain.step, plain.updates)
    if method not in ("static", "snip", "l0"):
        assert plain.updates  # a run without updates would compare little


class TwoOptimizers(Net):
    """Body and head have an optimizer each; both step for every batch."""

    automatic_optimization = False

    def training_step(self, batch: Sequence[Tensor], number: int) -> None:  # type: ignore[override]
        self.manual_backward(super().training_step(batch, number))
        for optimizer in self.optimizers():
            optimizer.step()
            optimizer.zero_grad()

    def configure_optimizers(self) -> Any:
        return [self.make(self.body.parameters()), self.make(self.head.parameters())]


@pytest.mark.parametrize("method", [n for n in METHODS if n != "sup_tickets"])  # which refuses them
def test_with_two_optimizers_too(method: str) -> None:
    make, case = OPTIMIZERS["sgd"], Case()
    hosted, plain = METHODS[method](), METHODS[method]()
    trained = TwoOptimizers(make, case)
    trained.automatic_optimization = False
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[hosted],
    )
    trainer.fit(trained, data())
    net, loader = Net(make, case), data()
    optimizers = [make(net.body.parameters()), make(net.head.parameters())]
    # the Trainer's run length counts the steps of every optimizer
    with sparsify(plain, net, optimizers, hosted_steps(trainer), epoch=BATCHES, data=loader) as run:
        for _ in range(EPOCHS):
            for number, batch in enumerate(loader):
                with run.batch():
                    net.training_step(batch, number).backward()
                for optimizer in optimizers:
                    optimizer.step()
                    optimizer.zero_grad()
            run.epoch_end()
    same(trained, net)
    assert all(torch.equal(hosted.masks[name], mask) for name, mask in plain.masks.items())


def hosted_steps(trainer: pl.Trainer) -> int:
    return int(trainer.estimated_stepping_batches)


class Scheduled(Net):
    """With a learning rate that falls in every step."""

    def configure_optimizers(self) -> Any:
        optimizer = self.make(self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, falling)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def falling(step: int) -> float:
    return 0.9**step


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizers_and_schedules_of_gap_start_anew_alike(name: str) -> None:
    hosted, plain = (GaP(0.8, partitions=2, rounds=2, every=6, print_plan=False) for _ in range(2))
    trained, net, loader = (*(Scheduled(OPTIMIZERS[name], Case()) for _ in range(2)), data())
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[hosted], **quiet).fit(trained, data())  # type: ignore[arg-type]
    optimizer = OPTIMIZERS[name](net.parameters())
    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, falling)]

    def renew() -> None:
        schedules.append(torch.optim.lr_scheduler.LambdaLR(optimizer, falling))

    with sparsify(plain, net, optimizer, EPOCHS * BATCHES, on_restart=renew):
        for _ in range(EPOCHS):
            for number, batch in enumerate(loader):
                net.training_step(batch, number).backward()
                optimizer.step()
                optimizer.zero_grad()
                schedules[-1].step()
    assert len(schedules) == 1 + 4  # two rounds of two partitions, each of which ends in a restart
    same(trained, net)
    assert all(torch.equal(hosted.masks[n], mask) for n, mask in plain.masks.items())
