"""Rows about several processes: each row is one launch, in which every method trains.

A program of its own, as a test that forks would copy the threads of pytest.
"""

import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
import torch.distributed as dist
from pytorch_lightning.strategies import ModelParallelStrategy
from support.methods import METHODS, method, moves, promises
from support.processes import run_processes
from torch import nn
from torch.distributed.fsdp import fully_shard

from compatibility.cells import NotApplicable, Outcome, Trained, launched_feature, outcome_of
from sparse_callbacks.core.host import TrainsInTurns
from sparse_callbacks.testing.comparison import assert_counts, assert_effective, differences
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier, conv_net
from sparse_callbacks.testing.runs import trainer_for


class Agrees(pl.Callback):
    """Masks and weights are the same on every rank after every step."""

    def __init__(self, callback: Any) -> None:
        self.callback = callback

    def on_train_batch_end(self, trainer: pl.Trainer, module: pl.LightningModule, *_: Any) -> None:
        if dist.is_initialized() and dist.get_world_size() > 1 and not isinstance(self.callback, TrainsInTurns):
            mine = {n: (m, module.get_parameter(n).detach()) for n, m in self.callback.masks.items()}
            everybody: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(everybody, mine)
            assert differences(everybody[0], mine) == []


def share(name: str) -> dict[str, Any]:
    """A loader that gives each rank its share; networks of their own see all the data."""
    alone = not promises(name, "one network")
    return {"use_distributed_sampler": False} if alone else {}


def trained(name: str, folder: Path, rank: int, world: int, **options: Any) -> None:
    """A run in processes that are there already, or that the Trainer starts."""
    callback, module = method(name), Classifier(conv_net(rank))
    whole = world == 1 or not promises(name, "one network")
    loader = Batches() if whole else Batches(rank=rank, world=world)
    callbacks = [callback, Trained(callback), Agrees(callback)]
    trainer_for(callbacks, folder, **(share(name) | options)).fit(module, loader)
    assert_effective(module, callback)
    if promises(name, "planned counts") and callback.at_target:
        assert_counts(callback)
    if moves(name):
        assert callback.updates > 0


# ---------------------------------------------------------------------- FSDP2


class Sharded(Classifier):
    """Each process holds a part of every weight."""

    def __init__(self) -> None:
        super().__init__(nn.Identity())
        self.net = None

    def configure_model(self) -> None:
        if self.net is None:
            torch.manual_seed(0)
            net = nn.Sequential(nn.Flatten(), nn.Linear(50, 24), nn.Tanh(), nn.Linear(24, 4))
            self.net = fully_shard(net, mesh=self.device_mesh["data_parallel"])  # type: ignore[index]


def sharded(name: str, folder: Path, rank: int, world: int) -> None:
    """After every step each process's part of a weight is zero outside of its part of the mask."""
    callback, module = method(name), Sharded()

    def look(trainer: pl.Trainer, *_: Any) -> None:
        for key, mask in callback.masks.items():
            local, here = (getattr(t, "to_local", lambda t=t: t)() for t in (module.get_parameter(key).detach(), mask))
            assert local.shape == here.shape, key
            assert not local[~here].any(), key

    see = pl.callbacks.LambdaCallback(on_train_batch_end=lambda trainer, *_: look(trainer))
    strategy = ModelParallelStrategy(data_parallel_size=world, tensor_parallel_size=1)
    trainer_for([callback, see], folder, devices=world, strategy=strategy).fit(module, Batches(rank=rank, world=world))
    look(module.trainer)
    zeros = torch.tensor([sum(int((~m).sum()) for m in (_local(m) for m in callback.masks.values()))])
    dist.all_reduce(zeros)
    if promises(name, "planned counts"):
        assert int(zeros) == callback.plan().zeros


def _local(mask: Any) -> Any:
    return mask.to_local() if hasattr(mask, "to_local") else mask


# ---------------------------------------------------------------------- the launches


def _all(run: Callable[[str], None]) -> dict[str, Outcome]:
    return {name: outcome_of(lambda name=name: run(name)) for name in METHODS}


def in_processes(folder: Path) -> dict[str, Outcome]:
    """DDP in processes that a cluster has started."""
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    return _all(lambda name: trained(name, folder, rank, world, devices=world, strategy="ddp"))


def unequal(folder: Path) -> dict[str, Outcome]:
    """DDP where one rank has a batch less than the other, for which it would wait for ever."""
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])

    def run(name: str) -> None:
        if not promises(name, "one network"):
            raise NotApplicable("Each worker sees all the data.")
        loader = Batches(batches=8 - rank, rank=rank, world=world)
        trainer_for([method(name)], folder, devices=world, strategy="ddp").fit(Classifier(), loader)

    return _all(run)


def by_script(folder: Path) -> dict[str, Outcome]:
    """DDP where the Trainer starts the script a second time."""
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    return _all(lambda name: trained(name, folder, rank, 2, devices=2, strategy="ddp"))


def forked(folder: Path) -> dict[str, Outcome]:
    """A process that the Trainer forks; masks come back to this one."""
    return _all(lambda name: trained(name, folder, 0, 1, devices=1, strategy="ddp_fork"))


def spawned(folder: Path) -> dict[str, Outcome]:
    """A process that the Trainer spawns; masks come back to this one."""
    return _all(lambda name: trained(name, folder, 0, 1, devices=1, strategy="ddp_spawn"))


def in_shards(folder: Path) -> dict[str, Outcome]:
    """FSDP2 on two processes."""
    rank, world = int(os.environ["LOCAL_RANK"]), int(os.environ["WORLD_SIZE"])
    return _all(lambda name: sharded(name, folder, rank, world))


PROGRAMS = {p.__name__: p for p in (in_processes, unequal, by_script, forked, spawned, in_shards)}


def agreed(found: list[dict[str, Outcome]]) -> dict[str, Outcome]:
    """The outcomes of all ranks, which must be the same."""
    assert all({n: o.word for n, o in rank.items()} == {n: o.word for n, o in found[0].items()} for rank in found)
    return found[0]


def run_command(program: str, folder: Path, *launcher: str) -> dict[str, Outcome]:
    """Run this module by a command, which starts the other processes itself."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    environment = {k: v for k, v in os.environ.items() if k not in ("LOCAL_RANK", "WORLD_SIZE")}
    environment |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    command = [sys.executable, *launcher, __file__, program, str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-5000:]
    found: dict[str, Outcome] = torch.load(folder / "0.pt", weights_only=False)
    return found


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")

launched_feature("processes", "DDP, 2 processes", lambda f: agreed(run_processes("in_processes", f, 2, __file__)))
launched_feature("processes", "DDP, 4 processes", lambda f: agreed(run_processes("in_processes", f, 4, __file__)))
UNEQUAL = "DDP, unequal numbers of training batches"
launched_feature("processes", UNEQUAL, lambda f: agreed(run_processes("unequal", f, 2, __file__)))
launched_feature("processes", "FSDP2, 2 processes", lambda f: agreed(run_processes("in_shards", f, 2, __file__)))
launched_feature("launchers", "torchrun", lambda f: run_command("in_processes", f, *TORCHRUN))
launched_feature("launchers", "the script again (strategy=ddp)", lambda f: run_command("by_script", f))
launched_feature("launchers", "fork", lambda f: run_command("forked", f))
launched_feature("launchers", "spawn", lambda f: run_command("spawned", f))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = PROGRAMS[sys.argv[1]](Path(sys.argv[2]))
    torch.save(results, Path(sys.argv[2]) / f"{os.environ.get('LOCAL_RANK', '0')}.pt")
