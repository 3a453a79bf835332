"""Runs of two processes: equal replicas under DDP, and the workers of parallel grow-and-prune."""

import math
import os
import socket
import sys
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightning_fabric import Fabric
from torch import nn

from sparse_callbacks import ParallelGaP, SparseRun, sparsify
from sparse_callbacks.testing.comparison import snapshot
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import ByHand, Classifier
from sparse_callbacks.testing.runs import Stops, fit, watch
from support.averaging import AVERAGING, average_of
from support.forked import run_together
from support.methods import STEADY, method, same_batches
from support.thawing import run_thawed


def run_processes(program: str, folder: Path, world: int = 2, script: str = __file__) -> list[dict[str, Any]]:
    """Run a script as the ranks of one run, each of which writes FOLDER/<rank>.pt; gives what they have written.

    ``program`` of this module is one of ``programs`` below.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "NODE_RANK": "0",
        "WORLD_SIZE": str(world),
        "OMP_NUM_THREADS": "1",
    }
    run_together(script, [program, str(folder)], [shared | {"LOCAL_RANK": str(rank)} for rank in range(world)], folder)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]


# ---------------------------------------------------------------------- equal replicas, for every method

REPLICA_WINDOW = 2
REPLICA_STOP = 7  # inside a window


def matrices(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """Three matrices."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 24), nn.Tanh(), nn.Linear(24, 12), nn.Tanh(), nn.Linear(12, 4)).to(
        dtype
    )


class Noise(pl.Callback):
    """Makes the reduced gradients of one rank differ in their last digits, as other hardware may."""

    def __init__(self, scale: float) -> None:
        self.scale = scale

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        for p in module.parameters():
            if p.grad is not None:
                p.grad.mul_(1 + self.scale * torch.rand_like(p.grad))


def train_replica(
    name: str,
    rank: int,
    world: int,
    *more: pl.Callback,
    ckpt_path: Path | None = None,
    noise: float = 0.0,
    dtype: torch.dtype = torch.float64,
    net: nn.Module | None = None,
    **changes: Any,
) -> dict[str, Any]:
    """Masks after every batch and all state at the end; ``rank`` and ``world`` say which part of the data is this
    process's."""
    torch.manual_seed(rank)
    net = matrices(rank, dtype) if net is None else net
    scored = same_batches(name, Batches())
    module, callback = Classifier(net), method(name, every=2, stop=8, **scored, **changes)
    masks: list[dict[str, torch.Tensor]] = []
    see = watch(lambda *_: masks.append({n: m.clone() for n, m in callback.masks.items()}))
    trainer = fit(
        module,
        Noise(noise),
        callback,
        see,
        *more,
        loader=Batches(rank=rank, world=world),
        ckpt_path=ckpt_path,
        accumulate_grad_batches=REPLICA_WINDOW,
        gradient_clip_val=0.5,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
    )
    return {"masks": masks, "end": snapshot(trainer, module, callback)}


def train_in_fabric(name: str, rank: int, world: int, set_up_first: bool) -> dict[str, Any]:
    """What :func:`train_replica` trains, in a loop of Fabric's with ``sparsify`` before or after ``fabric.setup``."""
    torch.manual_seed(rank)
    strategy = "ddp" if world > 1 else "auto"
    fabric = Fabric(accelerator="cpu", devices=world, strategy=strategy)
    fabric.launch()
    # float32, which Fabric rounds the outputs of a module to
    module = Classifier(matrices(rank, torch.float32))
    callback = method(name, every=2, stop=8, restart=False, **same_batches(name, Batches()))
    loader = Batches(rank=rank, world=world)
    configured = module.configure_optimizers()
    optimizer, schedule = configured["optimizer"], configured["lr_scheduler"]
    epoch = math.ceil(len(loader) / REPLICA_WINDOW)
    model: Any = module

    def sparsified() -> SparseRun:
        def clip(_: Any) -> None:
            fabric.clip_gradients(model, optimizer, max_norm=0.5)

        options = {"epoch": epoch, "data": loader, "clip": clip}
        return sparsify(callback, model, optimizer, 2 * epoch, **options)

    if set_up_first:
        model, optimizer = fabric.setup(module, optimizer)
    run = sparsified()
    if not set_up_first:
        model, optimizer = fabric.setup(module, optimizer)
    with run:
        for number in range(2):
            loader.set_epoch(number)
            for batch, (x, y) in enumerate(loader, 1):
                last = batch % REPLICA_WINDOW == 0 or batch == len(loader)
                with run.batch(), fabric.no_backward_sync(model, enabled=not last):
                    fabric.backward(nn.functional.cross_entropy(model(x), y) / REPLICA_WINDOW)
                if last:
                    optimizer.step()
                    optimizer.zero_grad()
                    schedule["scheduler"].step()
            run.epoch_end()
    return {"masks": run.masks, "weights": module.state_dict(), "updates": run.updates}


def run_replicas(folder: Path) -> None:
    rank, world = int(os.environ["LOCAL_RANK"]), 2
    results = {}
    for name in STEADY:
        stops = Stops(folder / name, (REPLICA_STOP,))
        whole = train_replica(name, rank, world, stops)
        torch.distributed.barrier()
        results[name] = {
            "whole": whole,
            "resumed": train_replica(name, rank, world, ckpt_path=stops.path(REPLICA_STOP)),
            "noisy": train_replica(name, rank, world, noise=1e-14 * rank),
            "single": train_replica(name, rank, world, dtype=torch.float32, restart=False),
            "fabric": [train_in_fabric(name, rank, world, first) for first in (True, False)],
        }
    torch.save(results, folder / f"{rank}.pt")


PATTERNED = [(name, p) for name in ("static", "set", "rigl", "snfs") for p in ("2:4", "transposable 2:4")]


def train_patterned(name: str, pattern: str, rank: int, world: int, **options: Any) -> dict[str, Any]:
    """What :func:`train_replica` trains, with masks of N:M."""
    return train_replica(name, rank, world, pattern=pattern, sparsity=None, **options)


def run_patterns(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    found = {(name, p): train_patterned(name, p, rank, 2, noise=1e-14 * rank) for name, p in PATTERNED}
    torch.save(found, folder / f"{rank}.pt")


# ---------------------------------------------------------------------- windows of manual optimization

OPEN_STOP = 5  # the second batch of the second window


class InWindows(ByHand):
    """Three micro-batches a step; on several ranks only the gradients of the last one are reduced."""

    def __init__(self, rank: int) -> None:
        super().__init__(matrices(rank), window=3)

    def training_step(self, batch: Any, batch_idx: int) -> None:
        model: Any = self.trainer.strategy.model
        last = (batch_idx + 1) % self.window == 0
        with nullcontext() if last or not hasattr(model, "no_sync") else model.no_sync():
            super().training_step(batch, batch_idx)


def train_in_windows(
    name: str, rank: int, world: int, *more: pl.Callback, ckpt_path: Path | None = None
) -> dict[str, Any]:
    """Masks after every batch and all state at the end of a run in manual optimization."""
    module, callback = InWindows(rank), method(name, every=1, stop=6, **same_batches(name, Batches()))
    masks: list[dict[str, torch.Tensor]] = []
    see = watch(lambda *_: masks.append({n: m.clone() for n, m in callback.masks.items()}))
    trainer = fit(
        module,
        callback,
        see,
        *more,
        loader=Batches(batches=12, rank=rank, world=world),
        ckpt_path=ckpt_path,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
    )
    return {"masks": masks, "end": snapshot(trainer, module, callback)}


def strided(seed: int) -> nn.Module:
    """Kernels in channels_last and a transposed matrix."""
    torch.manual_seed(seed)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3),
        nn.Tanh(),
        nn.Conv2d(8, 8, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(72, 16),
        nn.Tanh(),
        nn.Linear(16, 4),
    )
    net[5].weight = nn.Parameter(torch.randn(72, 16).t() / 8)
    net = net.to(torch.float64, memory_format=torch.channels_last)
    assert not any(net[i].weight.is_contiguous() for i in (0, 2, 5))
    return net


STRIDED: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in STEADY},
    "dpf filters": ("dpf", {"unit": "filter", "keep_dense": "last"}),
    "dpf filters by layer": ("dpf", {"unit": "filter", "keep_dense": "last", "distribution": "uniform"}),
    "l0 weights": ("l0", {"unit": "weight"}),
}
"""Methods and arguments whose masks differ in how they lie in memory."""


def train_strided(
    name: str, rank: int, world: int, *more: pl.Callback, ckpt_path: Path | None = None
) -> dict[str, Any]:
    """What :func:`train_replica` finds, over a model whose weights are not contiguous."""
    base, changes = STRIDED[name]
    return train_replica(base, rank, world, *more, ckpt_path=ckpt_path, net=strided(rank), **changes)


def run_strided(folder: Path) -> None:
    rank, world = int(os.environ["LOCAL_RANK"]), 2
    results = {}
    for name in STRIDED:
        stops = Stops(folder / name, (REPLICA_STOP,))
        whole = train_strided(name, rank, world, stops)
        torch.distributed.barrier()
        resumed = train_strided(name, rank, world, ckpt_path=stops.path(REPLICA_STOP))
        results[name] = {"whole": whole, "resumed": resumed}
    torch.save(results, folder / f"{rank}.pt")


def run_windows(folder: Path) -> None:
    rank, world = int(os.environ["LOCAL_RANK"]), 2
    results = {}
    for name in STEADY:
        stops = Stops(folder / name, (OPEN_STOP,))
        whole = train_in_windows(name, rank, world, stops)
        torch.distributed.barrier()
        resumed = train_in_windows(name, rank, world, ckpt_path=stops.path(OPEN_STOP))
        results[name] = {"whole": whole, "resumed": resumed}
    torch.save(results, folder / f"{rank}.pt")


# ---------------------------------------------------------------------- averages

AVERAGED = [(name, kind) for name in ("set", "dpf", "l0") for kind in ("third", "swa")]


def train_averaged(
    name: str, kind: str, rank: int, world: int, *more: pl.Callback, ckpt_path: Path | None = None
) -> dict[str, Any]:
    """What :func:`train_replica` finds, and the averages that a callback of Lightning's has taken."""
    averager = AVERAGING[kind]()
    found = train_replica(name, rank, world, averager, *more, ckpt_path=ckpt_path)
    return found | {"average": {n: p.detach().clone() for n, p in average_of(averager).items()}}


def run_averages(folder: Path) -> None:
    rank, world = int(os.environ["LOCAL_RANK"]), 2
    results = {}
    for name, kind in AVERAGED:
        stops = Stops(folder / name / kind, (REPLICA_STOP,))
        whole = train_averaged(name, kind, rank, world, stops)
        torch.distributed.barrier()
        resumed = train_averaged(name, kind, rank, world, ckpt_path=stops.path(REPLICA_STOP))
        results[name, kind] = {"whole": whole, "resumed": resumed}
    torch.save(results, folder / f"{rank}.pt")


# ---------------------------------------------------------------------- workers of parallel grow-and-prune

ROUNDS, EPOCHS, FINETUNE, WINDOW = 2, 2, 2, 3
STOPS = (3, 10, 16, 17, 30, 34)  # batches: inside a window, in each epoch of a round, at its end, in fine-tuning


def network(seed: int = 0) -> nn.Module:
    """With dropout and batch norms, in float64."""
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(54, 12),
        nn.BatchNorm1d(12),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Linear(12, 4),
    ).double()


def train_worker(world: int, *more: pl.Callback, seed: int = 0, ckpt_path: Path | None = None) -> dict[str, Any]:
    """All state at the end, and weights and masks after each batch."""
    callback = ParallelGaP(0.8, partitions=2, rounds=ROUNDS, epochs=EPOCHS, print_plan=False)
    module = Classifier(network(seed), optimizer="adamw")
    seen: list[Any] = []
    see = watch(
        lambda *_: seen.append({n: (p.detach().clone(), callback.masks.get(n)) for n, p in module.named_parameters()})
    )
    epochs = ROUNDS * EPOCHS * (1 if world > 1 else 2) + FINETUNE
    trainer = fit(
        module,
        callback,
        see,
        *more,
        loader=Batches(),
        max_epochs=epochs,
        accumulate_grad_batches=WINDOW,
        ckpt_path=ckpt_path,
        devices=world,
        strategy="ddp" if world > 1 else "auto",
        use_distributed_sampler=False,
    )
    return {"seen": seen, "end": snapshot(trainer, module, callback)}


class RandomStates(pl.Callback):
    """Random states of every rank, which Lightning does not save."""

    def state_dict(self) -> dict[str, Any]:
        states: list[Any] = [None, None]
        torch.distributed.all_gather_object(states, torch.get_rng_state())
        return {"states": states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.states = state["states"]

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.ckpt_path:
            torch.set_rng_state(self.states[trainer.global_rank])


def run_workers(folder: Path) -> None:
    rank = int(os.environ["LOCAL_RANK"])
    results = {"whole": train_worker(2, Stops(folder, STOPS), RandomStates(), seed=rank)}
    torch.distributed.barrier()
    for stop in STOPS:
        results[f"resumed {stop}"] = train_worker(2, RandomStates(), seed=7 + rank, ckpt_path=folder / f"{stop}.ckpt")
    torch.save(results, folder / f"{rank}.pt")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    programs = {
        "replicas": run_replicas,
        "patterns": run_patterns,
        "workers": run_workers,
        "windows": run_windows,
        "strided": run_strided,
        "thawed": run_thawed,
        "averages": run_averages,
    }
    programs[sys.argv[1]](Path(sys.argv[2]))
