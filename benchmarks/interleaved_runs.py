"""Training runs that advance round by round, so that several runs take turns in one process.

Whatever slows the machine down for a while then slows all of them down, and their times can be compared. Every run is a
generator; each item holds the times of the steps of one round.
"""

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytorch_lightning as pl
import torch
from rigl_torch.RigL import RigLScheduler
from torch import Tensor, nn
from torch.nn.utils import parametrize, prune

from sparse_callbacks import SparsityCallback

SPARSITY = 0.9

StepTime = tuple[float, bool]  # seconds, and whether the step had a topology update
Run = Iterator[list[StepTime]]


def clock() -> float:
    """The current time in seconds: CPU time of the process with one thread, wall time with several.

    CPU time does not depend on other jobs, but threads of torch that wait for each other consume it too.
    """
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def in_turns(runs: Mapping[str, Run], count: int) -> Iterator[tuple[str, list[StepTime]]]:
    """The rounds of runs that take turns, each with the label of its run; another one begins each time.

    Args:
        runs: runs by label; the first round of each warms up, and is left out.
        count: the number of rounds of each run after it.
    """
    for run in runs.values():
        next(run)
    labels = list(runs)
    for turn in range(count):
        first = turn % len(labels)
        for label in labels[first:] + labels[:first]:
            yield label, next(runs[label])


@dataclass(frozen=True)
class Workload:
    """What is trained for one table.

    Args:
        title: the heading of the table.
        network: makes the network.
        batch: the shape of the inputs of a batch.
        optimizer: makes the optimizer of some parameters.
        clip: the norm that gradients are clipped to; None for no clipping.
        peers: whether other packages are measured too.
        gates: whether methods with gates, and SMCP, are measured too.
        share: the number of steps in a round as a share of ``--steps``.
    """

    title: str
    network: Callable[[], nn.Module]
    batch: tuple[int, ...]
    optimizer: Callable[[Any], torch.optim.Optimizer]
    clip: float | None = None
    peers: bool = False
    gates: bool = False
    share: float = 1.0

    def data(self) -> list[tuple[Tensor, Tensor]]:
        """Batches of random data, made before the clock starts, so that no loader is measured."""
        generator = torch.Generator().manual_seed(0)
        labels = [torch.randint(10, self.batch[:1], generator=generator) for _ in range(16)]
        return [(torch.randn(self.batch, generator=generator), y) for y in labels]


@dataclass
class RoundByRound(pl.Callback):
    """Stops a Trainer, in its thread, at the end of each round until the next round is asked for, and times every step.

    Args:
        rounds: the number of steps of each round.
        updates: gives the number of topology updates so far.
    """

    rounds: Sequence[int]
    updates: Callable[[], int]
    go: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    done: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(0))
    steps: list[StepTime] = field(default_factory=list)
    error: Exception | None = None
    step_began: float = 0.0
    updates_seen: int = 0

    def __hash__(self) -> int:
        # a dataclass that compares its fields has no hash, and Lightning keeps callbacks in sets
        return id(self)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.rounds_left = list(self.rounds)
        self._wait_for_next_round()

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        # a step lasts from the start of its batch to the start of the next one, so that all hooks belong to it;
        # what comes before the first batch is set-up
        if trainer.global_step > 0:
            self._step_ended()
            if len(self.steps) == self.rounds_left[0]:
                self.rounds_left.pop(0)
                self._wait_for_next_round()
                self.steps = []
        self.step_began = clock()

    def on_train_end(self, *_: Any) -> None:
        self._step_ended()

    def _step_ended(self) -> None:
        self.steps.append((clock() - self.step_began, self.updates() != self.updates_seen))
        self.updates_seen = self.updates()

    def _wait_for_next_round(self) -> None:
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
    """rigl-torch under Lightning."""

    def __init__(self, workload: Workload, every: int) -> None:
        super().__init__(workload)
        self.every = every

    def configure_optimizers(self) -> torch.optim.Optimizer:
        optimizer = super().configure_optimizers()
        self.scheduler = rigl_torch_scheduler(self.net, optimizer, self.every)
        return optimizer

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        # rigl-torch wraps the optimizer's `step` in a function without a closure, so the closure is called by hand
        optimizer_closure()
        if self.scheduler():
            optimizer.optimizer.step()


class Cycled:
    """One epoch of ``total`` batches, which are the given ones over and over."""

    def __init__(self, batches: Sequence[Any], total: int) -> None:
        self.batches, self.total = batches, total

    def __len__(self) -> int:
        return self.total

    def __iter__(self) -> Iterator[Any]:
        return (self.batches[i % len(self.batches)] for i in range(self.total))


def rigl_torch_scheduler(net: nn.Module, optimizer: torch.optim.Optimizer, every: int) -> RigLScheduler:
    """RigL of rigl-torch with an update every ``every`` steps; the drop fraction practically does not fall."""
    return RigLScheduler(
        net, optimizer, dense_allocation=1 - SPARSITY, T_end=10**9, delta=every, alpha=0.3, ignore_linear_layers=False
    )


def lightning_run(
    workload: Workload,
    rounds: Sequence[int],
    module: Net,
    callback: SparsityCallback | None = None,
    further: Sequence[pl.Callback] = (),
) -> Run:
    """A Trainer in a thread of its own that makes the steps of one round at a time.

    Args:
        workload: the network, its data and its optimizer.
        rounds: the number of steps of each round.
        module: the module that is trained.
        callback: the sparsity callback; None for none.
        further: other callbacks.
    """

    def updates() -> int:
        if callback is not None:
            return callback.updates
        return module.scheduler.rigl_steps if isinstance(module, PeerNet) else 0

    turns = RoundByRound(rounds, updates)
    trainer = pl.Trainer(
        accelerator="cpu",
        logger=False,
        max_epochs=1,
        gradient_clip_val=workload.clip,
        callbacks=[turns, *([] if callback is None else [callback]), *further],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    threads = torch.get_num_threads()

    def fit() -> None:
        # the number of threads is a setting of each Python thread
        torch.set_num_threads(threads)
        try:
            trainer.fit(module, Cycled(workload.data(), sum(rounds)))
        except Exception as error:
            # raised again in the thread that waits for the round
            turns.error = error
        turns.done.release()

    threading.Thread(target=fit, daemon=True).start()
    turns.done.acquire()
    for _ in rounds:
        turns.go.release()
        turns.done.acquire()
        if turns.error is not None:
            raise turns.error
        yield turns.steps


class RawLoop:
    """The same training as a hand-written loop, step by step.

    Args:
        workload: the network, its data and its optimizer.
        count: the number of steps that there are data for.
    """

    def __init__(self, workload: Workload, count: int) -> None:
        self.net = workload.network()
        self.optimizer = workload.optimizer(self.net.parameters())
        self._batches = iter(Cycled(workload.data(), count))

    def backward(self) -> None:
        """Leave the gradients of the next batch on the parameters."""
        images, labels = next(self._batches)
        self.optimizer.zero_grad()
        nn.functional.cross_entropy(self.net(images), labels).backward()


def raw_run(workload: Workload, rounds: Sequence[int], peer_every: int | None = None) -> Run:
    """Times the steps of a hand-written loop.

    Args:
        workload: the network, its data and its optimizer.
        rounds: the number of steps of each round.
        peer_every: the number of steps between updates of rigl-torch; None for dense training.
    """
    loop = RawLoop(workload, sum(rounds))
    scheduler = None if peer_every is None else rigl_torch_scheduler(loop.net, loop.optimizer, peer_every)
    for length in rounds:
        steps = []
        for _ in range(length):
            began = clock()
            loop.backward()
            took_step = scheduler is None or scheduler()
            if took_step:
                loop.optimizer.step()
            # an update of rigl-torch replaces the step
            steps.append((clock() - began, not took_step))
        yield steps


class Masked(nn.Module):
    """The parametrization ``w * mask`` with a float mask."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("mask", (torch.rand_like(weight) >= SPARSITY).float())

    def forward(self, weight: Tensor) -> Tensor:
        return weight * self.mask


class Gated(nn.Module):
    """Hard-concrete gates as they are usually written, differentiated by autograd.

    Args:
        weight: the weight that is gated.
        units: whether inputs of a linear layer, or output channels of a convolution, have one gate each; else each
            weight has a gate.
    """

    def __init__(self, weight: Tensor, units: bool) -> None:
        super().__init__()
        shape: Sequence[int] = weight.shape
        if units:
            shape = (1, weight.shape[1]) if weight.ndim == 2 else (len(weight), 1, 1, 1)
        self.log_alpha = nn.Parameter(torch.zeros(shape))

    def forward(self, weight: Tensor) -> Tensor:
        u = torch.rand_like(self.log_alpha).clamp(1e-6, 1 - 1e-6)
        s = torch.sigmoid((torch.log(u) - torch.log(1 - u) + self.log_alpha) * 1.5)
        return weight * (s * 1.2 - 0.1).clamp(0, 1)


def layers(module: Net) -> list[nn.Linear | nn.Conv2d]:
    """All linear and convolutional layers; a list, as parametrizations add modules while it is walked through."""
    return [layer for layer in module.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]


def gated(module: Net, units: bool) -> Net:
    """The module with gates on all its layers."""
    for layer in layers(module):
        parametrize.register_parametrization(layer, "weight", Gated(layer.weight.detach(), units))
    return module


def parametrized(module: Net) -> Net:
    """The module with the parametrization ``w * mask`` on all its layers."""
    for layer in layers(module):
        parametrize.register_parametrization(layer, "weight", Masked(layer.weight.detach()))
    return module


def pruned(module: Net) -> Net:
    """The module with all its layers pruned at random by ``torch.nn.utils.prune``."""
    for layer in layers(module):
        prune.random_unstructured(layer, "weight", SPARSITY)
    return module
