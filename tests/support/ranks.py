"""Runs of two and of four processes over every method: equal masks, shares of the data, collective operations, and ranks
that differ."""

import os
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import SET, Static, methods, sparsify
from sparse_callbacks.testing.comparison import assert_effective
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, conv_net
from sparse_callbacks.testing.runs import fit, watch
from support.methods import STEADY, method, same_batches
from support.processes import matrices

LAST = 5
"""Samples of the last batch of an epoch: not as many on every rank."""


class Uneven(Batches):
    """Batches of twelve samples of which the last has five, each sample weighted so that the mean over ranks is that of
    the whole batch."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(batches=6, size=12, rank=rank, world=world)

    def __iter__(self) -> Any:
        order = self.order(self.epoch)
        for start in range(0, len(order), self.size):
            chosen = order[start : start + self.size]
            if start + self.size >= len(order):
                chosen = chosen[:LAST]
            mine = chosen[self.rank :: self.world]
            yield self.x[mine], self.y[mine], self.world / len(chosen)


class Weighted(Classifier):
    """The sum of losses by the weight of a sample."""

    def loss(self, batch: Any) -> Tensor:
        x, y, weight = batch
        return nn.functional.cross_entropy(self.net(x.double()), y, reduction="sum") * weight


def collectives() -> Counter[str]:
    """Counts the collective operations that this package asks for, from here on."""
    counted: Counter[str] = Counter()

    def counting(name: str) -> Callable[..., Any]:
        usual = getattr(dist, name)

        def called(*args: Any, **named: Any) -> Any:
            if "sparse_callbacks" in sys._getframe(1).f_globals.get("__name__", ""):
                counted["collectives"] += 1
            return usual(*args, **named)

        return called

    for name in ("all_reduce", "broadcast", "all_gather", "gather_object", "all_gather_object", "barrier"):
        setattr(dist, name, counting(name))
    return counted


COUNTED = collectives() if __name__ == "__main__" else Counter()


def train(name: str, rank: int, world: int) -> dict[str, Any]:
    """Masks after every batch, collective operations and updates in each, and the weights at the end."""
    module = Weighted(matrices(rank))
    callback = method(name, every=3, stop=8, restart=False, **same_batches(name, Uneven(0, 1)))
    masks: list[dict[str, Tensor]] = []
    calls: list[tuple[int, int]] = []
    before = Counter(COUNTED)
    updates = 0

    def begun(*_: Any) -> None:
        before.update(COUNTED - before)

    def see(*_: Any) -> None:
        nonlocal updates
        assert_effective(module, callback)
        masks.append({n: m.clone() for n, m in callback.masks.items()})
        calls.append((COUNTED["collectives"] - before["collectives"], callback.updates - updates))
        before.update(COUNTED - before)
        updates = callback.updates

    start = pl.callbacks.LambdaCallback(on_train_start=begun)
    strategy = "ddp" if world > 1 else "auto"
    loader = Uneven(rank, world)
    fit(module, callback, start, watch(see), loader=loader, devices=world, strategy=strategy, gradient_clip_val=0.5)
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    return {"masks": masks, "calls": calls, "weights": weights}


# ---------------------------------------------------------------------- passes over data

SAMPLES = 49


def pass_over_data(name: str, rank: int, world: int) -> dict[str, Any]:
    """Masks of a run whose passes over data have shares of unequal length: 49 samples in batches of four, which are 7 and 6
    on two ranks, and 4, 3, 3 and 3 on four."""
    source = torch.Generator().manual_seed(0)
    x, y = torch.randn(SAMPLES, 2, 5, 5, generator=source), torch.randint(0, 4, (SAMPLES,), generator=source)
    module, callback = Classifier(conv_net(rank)), method(name, every=2, stop=8, restart=False)
    masks: list[dict[str, Tensor]] = []
    see = watch(lambda *_: masks.append({n: m.clone() for n, m in callback.masks.items()}))
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    strategy = "ddp" if world > 1 else "auto"
    fit(module, callback, see, loader=loader, devices=world, strategy=strategy, max_epochs=3)
    return {"masks": masks}


# ---------------------------------------------------------------------- ranks that differ


class Differs(pl.Callback):
    """One rank changes a weight by itself, after this many batches."""

    def __init__(self, rank: int, batch: int, change: Callable[[Tensor], Any]) -> None:
        self.rank, self.batch, self.change = rank, batch, change

    def on_train_batch_start(self, trainer: pl.Trainer, module: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == self.rank and trainer.global_step == self.batch:
            with torch.no_grad():
                self.change(module.net[3].weight)


def words_of(run: Callable[[], Any]) -> str:
    """What a run is refused with; empty where it is not."""
    try:
        run()
    except (RuntimeError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


def ranks_that_differ(rank: int, world: int) -> dict[str, str]:
    """What is said on this rank of each way in which ranks may differ."""

    def trained(name: str, change: Callable[[Tensor], Any], dtype: torch.dtype = torch.float32) -> str:
        module = Classifier(matrices(rank, dtype))
        callbacks = [Differs(world - 1, 5, change), method(name, every=4, stop=14)]
        return words_of(lambda: fit(module, *callbacks, devices=world, strategy="ddp"))

    def run(callback: Any, loader: Any = None) -> str:
        module = Classifier(matrices(0))
        return words_of(lambda: fit(module, callback, loader=loader, devices=world, strategy="ddp"))

    found = {f"weights of {name}": trained(name, lambda w: w.mul_(1.01)) for name in STEADY}
    found["rounding"] = trained("rigl", lambda w: w.mul_(1 + 2e-7))
    found["seeds"] = run(method("rigl", seed=rank))
    loaders = [object() for _ in range(rank)], DataLoader(TensorDataset(Batches().x), batch_size=6)
    found["addresses"] = run(method("ctre", every=3, stop=8, statistics_dataloader=loaders[1]))
    found["scores"] = run(OwnScores(0.8, every=2, stop=14, print_plan=False))
    found["lengths"] = run(method("set", stop=0.75), Batches(batches=8 - rank))
    found["lengths without times"] = run(Static(0.5, print_plan=False), Batches(batches=8 - rank))
    found["a loop"] = words_of(lambda: loop_that_differs(rank, world))
    return found


class OwnScores(SET):
    """Scores differ between ranks, as sums over data that nobody adds up do."""

    def grow_scores(self, *arguments: Any) -> Any:
        found = super().grow_scores(*arguments)
        return found + torch.rand(found.shape, generator=torch.Generator().manual_seed(dist.get_rank()))


def loop_that_differs(rank: int, world: int) -> None:
    """A loop by hand, in which the last rank takes steps of its own."""
    model = matrices(0, torch.float32)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    run = sparsify(methods.RigL(0.5, every=2, stop=8, print_plan=False), model, optimizer, 10)
    ddp = DistributedDataParallel(model)
    for x, y in list(Batches(rank=rank, world=world))[:5]:
        with ddp.no_sync():
            nn.functional.cross_entropy(ddp(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
    run.close()


def run_all(rank: int, world: int) -> dict[str, Any]:
    """What every method trains, and what its passes over data find."""
    return {name: {"trained": train(name, rank, world), "passes": pass_over_data(name, rank, world)} for name in STEADY}


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    here, number = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    program = run_all if sys.argv[1] == "all" else ranks_that_differ
    torch.save(program(here, number), Path(sys.argv[2]) / f"{here}.pt")
