"""Fits in processes that the Trainer starts from the main one, and what the main process has of them then.

A program of its own, as a test that forks would copy the threads of pytest.
"""

import copy
import gc
import os
import pickle
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import nn

from sparse_callbacks import GMP, RigL, SparsityCallback
from sparse_callbacks.testing.comparison import assert_effective, lasting
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import trainer_for
from support.methods import METHODS, method


def run(folder: Path, *programs: str) -> dict[str, Any]:
    """What each of these functions of this module found, one after the other in one process."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path, "TMPDIR": str(folder)}
    command = [sys.executable, __file__, ",".join(programs), str(folder)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    found: dict[str, Any] = torch.load(folder / "found.pt", weights_only=False)
    return found


def left_in(folder: Path) -> list[str]:
    """Files of callbacks that wait in the folder of temporary files."""
    return sorted(p.name for p in folder.glob("*sparse_callbacks-*"))


def described(callback: SparsityCallback) -> dict[str, Any]:
    """What a user reads of a callback whose fit is over."""
    found = {"masks": callback.masks, "state": lasting(callback.state_dict()), "plan": str(callback.plan())}
    read = (
        callback.step,
        callback.updates,
        callback.measured_sparsity(),
        callback.times.stop if callback.calendar else 0,
    )
    return {**found, "read": read}


class Tells(pl.Callback):
    """Writes what the first process has at the end of its fit; listed after the sparsity callbacks."""

    def __init__(self, path: Path, *callbacks: SparsityCallback) -> None:
        self.path, self.callbacks = path, callbacks

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        if trainer.is_global_zero and stage == "fit":
            torch.save([described(c) for c in self.callbacks], self.path)


class Begins(pl.Callback):
    """Writes the masks and weights that training begins with; listed after the sparsity callback."""

    def __init__(self, path: Path, callback: SparsityCallback) -> None:
        self.path, self.callback = path, callback

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        weights = {n: p.detach().clone() for n, p in module.named_parameters()}
        torch.save({"masks": self.callback.masks, "weights": weights}, self.path)


class Fails(pl.Callback):
    """Raises where a fit is over, when masks were written and weights do not come back."""

    def teardown(self, trainer: pl.Trainer, module: pl.LightningModule, stage: str) -> None:
        raise RuntimeError("the disk is full, say")


class Evaluated(Classifier):
    """May be tested."""

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch[0])


def launched(
    module: pl.LightningModule, *callbacks: Any, strategy: str = "ddp_fork", devices: int = 1, **options: Any
) -> pl.Trainer:
    """Fit in processes that this one starts."""
    trainer = trainer_for(callbacks, strategy=strategy, devices=devices, **options)
    trainer.fit(module, Batches())
    return trainer


def every_method(folder: Path) -> dict[str, Any]:
    """For each method: what the launched process had at its end, and what this one has; then a fit in this process."""
    found = {}
    for name in METHODS:
        callback, module = method(name), Classifier()
        launched(module, callback, Tells(folder / name, callback), use_distributed_sampler=False)
        files = left_in(folder)
        [there] = torch.load(folder / name, weights_only=True)
        here = described(callback)
        words = "" if callback.at_target else callback.shortfall()
        assert_effective(module, callback)
        weights = {n: p.detach().clone() for n, p in module.named_parameters()}
        begun: dict[str, Any] = {}

        def begin(*_: Any, callback: Any = callback, module: Any = module, begun: Any = begun) -> None:
            masks = {n: m.clone() for n, m in callback.masks.items()}
            dense = {n: t.clone() for n, t in callback.state_dict()["dense"].items()}
            begun.update(
                masks=masks, dense=dense, weights={n: p.detach().clone() for n, p in module.named_parameters()}
            )

        trainer_for([callback, pl.callbacks.LambdaCallback(on_train_start=begin)]).fit(module, Batches())
        assert_effective(module, callback)
        went_on = {"masks": here["masks"], "dense": there["state"]["dense"], "weights": weights}
        found[name] = {"there": there, "here": here, "files": files, "end": (went_on, begun), "left": left_in(folder)}
        found[name]["words"] = (words, callback.outcome())
    return found


def several_fits(folder: Path) -> dict[str, Any]:
    """Two callbacks in two processes: a fit, a test, a fit that fails and another fit, all in processes."""
    times = {"every": 2, "stop": 14, "print_plan": False}
    one, other = RigL(0.5, include="net.4*", **times), GMP(0.8, include="net.7*", **times)
    module, found = Evaluated(), {}
    twin = copy.deepcopy(one)
    trainer = launched(module, one, other, Tells(folder / "first", one, other), devices=2)
    found["files"] = left_in(folder)
    trainer.test(module, Batches(), verbose=False)
    found["first"] = (torch.load(folder / "first", weights_only=True), [described(one), described(other)])
    found["twin"] = dict(twin.masks)
    assert_effective(module, one, other)
    try:
        launched(module, one, other, Fails())
    except torch.multiprocessing.ProcessRaisedException as error:
        found["error"] = str(error)
    found["left by the failure"] = left_in(folder)
    found["after the failure"] = (found["first"][1], [described(one), described(other)])
    steps = one.step
    launched(module, one, other, Tells(folder / "second", one, other), devices=2)
    found["second"] = (torch.load(folder / "second", weights_only=True), [described(one), described(other)])
    found["steps"] = (steps, one.step)
    gates, gated = method("l0"), Evaluated()
    for _ in range(2):  # the masks of its first fit are those of gates, which lie in memory otherwise
        launched(gated, gates, devices=2)
    found["gates"] = gates.step
    assert_effective(module, one, other)
    found["left"] = left_in(folder)
    return found


def nobody_looks(folder: Path) -> dict[str, Any]:
    """Files of callbacks that are gone, that are left to the end of the process, and of copies."""
    callback = GMP(0.5, every=2, stop=6, print_plan=False)
    launched(Classifier(), callback)
    found = {"waits": len(left_in(folder))}
    copied = pickle.loads(pickle.dumps(callback))
    found["copied"] = ({n: m.clone() for n, m in copied.masks.items()}, dict(callback.masks))
    launched(Classifier(), callback, max_steps=3)  # another model: new masks, in a forked process too
    found["begun anew"] = callback.step
    launched(Classifier(), callback, max_steps=1)
    del callback
    gc.collect()
    found["gone with its callback"] = left_in(folder)
    kept = GMP(0.5, every=2, stop=6, print_plan=False)
    launched(Classifier(), kept, max_steps=1)
    found["waits until the end"] = len(left_in(folder))
    globals()["KEPT"] = kept
    return found


def other_weights(folder: Path) -> dict[str, Any]:
    """Other weights are loaded after a fit in a launched process: the next fit of each kind."""
    callback, module = RigL(0.5, every=2, stop=6, print_plan=False), Classifier()
    early = copy.deepcopy(module.state_dict())
    launched(module, callback)
    masks = {n: m.clone() for n, m in callback.masks.items()}
    module.load_state_dict(early)
    found: dict[str, Any] = {}
    try:
        trainer_for(callback).fit(module, Batches())
    except ValueError as error:
        found["error"] = str(error)
    found["masks"] = (masks, dict(callback.masks))
    found["untouched"] = (early, module.state_dict())
    small = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(50, 4)))
    trainer_for(callback).fit(small, Batches())
    found["another model"] = list(callback.masks)
    return found


def spawned(folder: Path) -> dict[str, Any]:
    """A fit in this process, and one of the same module in a process that is spawned, whose copies know no model."""
    callback, module = RigL(0.5, every=2, stop=30, print_plan=False), Classifier()
    trainer_for(callback).fit(module, Batches())
    steps, updates = callback.step, callback.updates
    weights = {n: p.detach().clone() for n, p in module.named_parameters()}
    masks = {n: m.clone() for n, m in callback.masks.items()}
    begins = Begins(folder / "begun", callback)
    launched(module, callback, begins, Tells(folder / "end", callback), strategy="ddp_spawn")
    begun = torch.load(folder / "begun", weights_only=True)
    there, here = torch.load(folder / "end", weights_only=True)[0], described(callback)
    assert_effective(module, callback)
    return {
        "begun": ({"masks": masks, "weights": weights}, begun),
        "end": (there, here),
        "counts": (steps, callback.step, updates, callback.updates),
        "left": left_in(folder),
    }


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    asked, folder = sys.argv[1].split(","), Path(sys.argv[2])
    programs = {p.__name__: p for p in (every_method, several_fits, nobody_looks, other_weights, spawned)}
    torch.save({name: programs[name](folder) for name in asked}, folder / "found.pt")
