"""Training runs that advance round by round, so that several of them can take turns in one process and be compared.

Every run is a generator; each item holds the times of the steps of one round.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from rigl_torch.RigL import RigLScheduler
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparse_callbacks import SparsityCallback

SPARSITY = 0.9

Step = tuple[float, bool]  # seconds, and whether a topology update fell in
Run = Iterator[list[Step]]


def clock() -> float:
    """Seconds: CPU time of the process with one thread, wall time with several (a waiting thread spins)."""
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


@dataclass(frozen=True)
class Workload:
    """One table: a network, its batch shape, its optimizer, and how many steps a round has (times ``--steps`` / 20)."""

    title: str
    network: Callable[[], nn.Module]
    batch: tuple[int, ...]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    clip: float | None = None
    peers: bool = False
    gates: bool = False
    share: float = 1.0

    def data(self) -> list[tuple[Tensor, Tensor]]:
        """Batches that are made beforehand, so that no loader is measured."""
        generator = torch.Generator().manual_seed(0)
        labels = [torch.randint(10, self.batch[:1], generator=generator) for _ in range(16)]
        return [(torch.randn(self.batch, generator=generator), y) for y in labels]


@dataclass
class Pace(pl.Callback):
    """Holds a Trainer, in its thread, at the start of a batch until another round is asked for, and times every step."""

    rounds: Sequence[int]
    updates: Callable[[], int]
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    steps: list[Step] = field(default_factory=list)
    error: Exception | None = None
    begun: float = 0.0
    seen: int = 0

    def __hash__(self) -> int:
        return id(self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.left = list(self.rounds)
        self._rest()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.global_step == 0:
            self.begun = clock()  # what came before is set-up
            return
        self._step_ended()
        if len(self.steps) == self.left[0]:
            self.left.pop(0)
            self._rest()
            self.steps = []
        self.begun = clock()

    def on_train_end(self, *_: Any) -> None:
        self._step_ended()

    def _step_ended(self) -> None:
        self.steps.append((clock() - self.begun, self.updates() != self.seen))
        self.seen = self.updates()

    def _rest(self) -> None:
        self.done.release()
        self.go.acquire()


class Net(pl.LightningModule):
    """An ordinary module that knows nothing of sparsity."""

    def __init__(self, workload: Workload) -> None:
        super().__init__()
        self.workload = workload
        self.net = workload.network()
        self.example_input_array = workload.data()[0][0][:1]

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: tuple[Tensor, Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return self.workload.optimizer(self.parameters())


class PeerNet(Net):
    """rigl-torch under Lightning: its wrapped ``step`` takes no closure, so the closure is called by hand."""

    def __init__(self, workload: Workload, every: int) -> None:
        super().__init__(workload)
        self.every = every

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        self.scheduler = rigl_torch_scheduler(self.net, optimizer, self.every)
        return optimizer

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        if self.scheduler():
            optimizer.optimizer.step()


class Cycled:
    """``total`` batches that repeat the given ones, as one epoch."""

    def __init__(self, batches: Sequence[Any], total: int) -> None:
        self.batches, self.total = batches, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i % len(self.batches)] for i in range(self.total))


def rigl_torch_scheduler(net: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> RigLScheduler:
    return RigLScheduler(net, optimizer, dense_allocation=1 - SPARSITY, T_end=10**9, delta=every, alpha=0.3, ignore_linear_layers=False)


def lightning_run(workload: Workload, rounds: Sequence[int], module: Net, callback: SparsityCallback | None = None) -> Run:
    """A Trainer that makes the given numbers of steps, one number at a time."""
    peer = module if isinstance(module, PeerNet) else None
    pace = Pace(rounds, lambda: callback.updates if callback else peer.scheduler.rigl_steps if peer else 0)
    quiet: dict[str, Any] = {f"enable_{x}": False for x in ("progress_bar", "model_summary", "checkpointing")}
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        gradient_clip_val=workload.clip,
        callbacks=[pace, *([callback] if callback else [])],
        **quiet,
    )
    threads = torch.get_num_threads()

    def fit() -> None:
        torch.set_num_threads(threads)
        try:
            trainer.fit(module, Cycled(workload.data(), sum(rounds)))
        except Exception as error:
            pace.error = error
        pace.done.release()

    threading.Thread(target=fit, daemon=True).start()
    pace.done.acquire()
    for _ in rounds:
        pace.go.release()
        pace.done.acquire()
        if pace.error is not None:
            raise pace.error
        yield pace.steps


def raw_run(workload: Workload, rounds: Sequence[int], peer_every: int | None = None) -> Run:
    """The same training as a hand-written loop, with rigl-torch (and an update in so many steps) or without."""
    net = workload.network()
    optimizer = workload.optimizer(net.parameters())
    scheduler = None if peer_every is None else rigl_torch_scheduler(net, optimizer, peer_every)
    batches = iter(Cycled(workload.data(), sum(rounds)))
    for length in rounds:
        steps = []
        for _ in range(length):
            begun = clock()
            images, labels = next(batches)
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images), labels).backward()
            took_step = scheduler is None or scheduler()
            if took_step:
                optimizer.step()
            steps.append((clock() - begun, not took_step))
        yield steps


class Masked(nn.Module):
    """The parametrization ``w * mask`` with a float mask."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand_like(weight) >= SPARSITY).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Gated(nn.Module):
    """Hard-concrete gates as everybody writes them, left to autograd: one for each weight, or for each of its units."""

    def __init__(self, weight: Tensor, units: bool) -> None:
        super().__init__()
        shape = weight.shape if not units else (1, weight.shape[1]) if weight.ndim == 2 else (len(weight), 1, 1, 1)
        self.log_alpha = nn.Parameter(torch.zeros(shape))

    def forward(self, weight: Tensor) -> Tensor:
        u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + self.log_alpha) * 1.5)
        return weight * (s * 1.2 - 0.1).clamp(0, 1)


def gated(module: Net, units: bool) -> Net:
    for layer in [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        parametrize.register_parametrization(layer, "weight", Gated(layer.weight.detach(), units))
    return module


def parametrized(module: Net) -> Net:
    for layer in [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        parametrize.register_parametrization(layer, "weight", Masked(layer.weight.detach()))
    return module


def pruned(module: Net) -> Net:
    for layer in [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv2d)]:
        prune.random_unstructured(layer, "weight", SPARSITY)
    return module
