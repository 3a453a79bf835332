"""Networks with a frozen backbone, and callbacks that thaw it, as transfer learning has them."""

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import BaseFinetuning, Callback
from torch import Tensor, nn

from sparse_callbacks import (
    CTRE,
    DPF,
    GMP,
    NM,
    SET,
    SNFS,
    GaP,
    PruneAtStart,
    RigL,
    SparsityCallback,
    Static,
)
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.runs import trainer_for

EPOCH = 4
BACKBONE = ("backbone.1.weight", "backbone.4.weight")
HEAD = "head.weight"
SIZES = {BACKBONE[0]: 50 * 16, BACKBONE[1]: 16 * 10, HEAD: 10 * 4}


def step_loss(module: Any, batch: Any) -> Tensor:
    """The loss that a :class:`Transfer` trains with, for loops that show none."""
    return module.training_step(batch, 0)


# every method whose layers may join a run, in a run of four epochs of four steps
JOINING: dict[str, Callable[..., SparsityCallback]] = {
    "static": lambda **more: Static(0.8, print_plan=False, **more),
    "snip": lambda **more: PruneAtStart(0.8, loss=step_loss, print_plan=False, **more),
    "set": lambda **more: SET(0.8, every=2, stop=14, print_plan=False, **more),
    "rigl": lambda **more: RigL(0.8, every=2, stop=14, print_plan=False, **more),
    "snfs": lambda **more: SNFS(0.8, every=2, stop=14, print_plan=False, **more),
    "ctre": lambda **more: CTRE(0.8, every=2, stop=14, print_plan=False, **more),
    "gmp": lambda **more: GMP(0.8, every=2, stop=12, print_plan=False, **more),
    "dpf": lambda **more: DPF(0.8, every=2, stop=12, print_plan=False, **more),
    "dpf by layer": lambda **more: DPF(0.8, every=2, stop=12, distribution="uniform", print_plan=False, **more),
    "nm": lambda **more: NM("1:2", every=2, ramp=12, print_plan=False, **more),
    "nm soft": lambda **more: NM("1:2", projection="soft", print_plan=False, **more),
    "gap": lambda **more: GaP(0.8, partitions=2, every=3, restart=False, print_plan=False, **more),
}


class Transfer(pl.LightningModule):
    """A backbone of two layers and a head; its optimizer begins with what requires a gradient."""

    def __init__(self, make: Callable[..., Any] | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        first, second = nn.Linear(50, 16), nn.Linear(16, 10)
        self.backbone = nn.Sequential(nn.Flatten(), first, nn.BatchNorm1d(16), nn.Tanh(), second, nn.Tanh())
        self.head = nn.Linear(10, 4)
        self.make = make or (lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.backbone(x))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])

    def configure_optimizers(self) -> Any:
        return self.make([p for p in self.parameters() if p.requires_grad])

    def train_dataloader(self) -> Any:
        return Batches(EPOCH)


class Thaws(BaseFinetuning):
    """Freezes the backbone and trains it from epoch ``at`` on, in a group of its own.

    Unlike ``BackboneFinetuning`` it also trains it in a resumed run, in which Lightning does not announce an epoch that has
    begun.
    """

    def __init__(self, at: int = 1) -> None:
        super().__init__()
        self.at = at

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.backbone)

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
        if epoch < self.at:
            return
        self.make_trainable(pl_module.backbone)
        if len(optimizer.param_groups) == 1:
            known = {id(p) for p in optimizer.param_groups[0]["params"]}
            late = [p for p in pl_module.backbone.parameters() if id(p) not in known]
            optimizer.add_param_group({"params": late, "lr": 0.02})

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.on_train_epoch_start(trainer, pl_module)


class Records(Callback):
    """Notes ``of(callback)`` after each batch."""

    def __init__(self, callback: SparsityCallback, of: Callable[[Any], Any]) -> None:
        self.callback, self.of, self.seen = callback, of, list[Any]()

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append(self.of(self.callback))


def assert_masked(module: nn.Module, callback: Any) -> None:
    """Pruned weights are zero."""
    parameters = dict(module.named_parameters())
    assert callback.masks
    for name, mask in callback.masks.items():
        assert not bool(parameters[name].detach()[~mask].any()), name


def planned(callback: Any, module: nn.Module) -> dict[str, int | None]:
    """Zeros that a fresh callback of the same arguments plans for the whole network, all of it trained."""
    state = [p.requires_grad for p in module.parameters()]
    for p in module.parameters():
        p.requires_grad_(True)
    rows = {r.name: r.zeros for r in callback.plan(module) if r.name in callback.plan(module).selected}
    for p, needed in zip(module.parameters(), state, strict=True):
        p.requires_grad_(needed)
    return rows


def zeros(callback: Any) -> dict[str, int]:
    """Zeros of each mask."""
    return {name: int((~mask).sum()) for name, mask in callback.masks.items()}


def run_thawed(folder: Path) -> None:
    """One of two processes whose backbone is thawed between two fits: masks after each batch of the second; and the error
    where it is thawed within one."""
    rank, results = int(os.environ["LOCAL_RANK"]), {}

    def fit(module: Transfer, callbacks: list[Any], epochs: int) -> None:
        module.train_dataloader = lambda: Batches(EPOCH, rank=rank, world=2)  # type: ignore[method-assign]
        trainer_for(
            callbacks,
            max_epochs=epochs,
            devices=2,
            strategy="ddp_find_unused_parameters_true",
            use_distributed_sampler=False,
        ).fit(module)

    for name in ("rigl", "gmp", "dpf"):
        callback, module = JOINING[name](), Transfer()
        module.backbone.requires_grad_(False)
        seen = Records(callback, lambda c: {n: m.clone() for n, m in c.masks.items()})
        fit(module, [callback, seen], 1)
        module.backbone.requires_grad_(True)
        fit(module, [callback, seen], 3)
        results[name] = {"masks": seen.seen, "weights": {n: p.detach() for n, p in module.named_parameters()}}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            fit(Transfer(), [JOINING["rigl"](), Thaws(1)], 2)
        except RuntimeError as error:
            results["within one fit"] = str(error)
    results["warned"] = [str(w.message) for w in caught]
    torch.save(results, folder / f"{rank}.pt")
