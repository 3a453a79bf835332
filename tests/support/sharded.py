"""Fits under FSDP2 in two processes on the CPU, and the same fits in one process; a program of its own."""

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import WeightAveraging
from pytorch_lightning.strategies import ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard

from sparse_callbacks import DPF, SET, Static, sparsify
from sparse_callbacks.testing.data import Batches
from sparse_callbacks.testing.networks import Classifier
from sparse_callbacks.testing.runs import Stops, trainer_for
from support.methods import method

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "static": ("static", {}),
    "set": ("set", {"every": 2, "stop": 14}),
    "set as published": ("set", {"every": 2, "stop": 14, "drop": "signed", "new_weights": "uniform"}),
    "rigl": ("rigl", {"every": 2, "stop": 14}),
    "rigl with candidates": ("rigl", {"every": 2, "stop": 14, "candidates": 0.5}),
    "gmp": ("gmp", {"every": 2, "stop": 12}),
    "dpf": ("dpf", {"every": 2, "stop": 12}),
    "dpf by layer": ("dpf", {"every": 2, "stop": 8, "distribution": "uniform", "finetune": 12}),
}
"""Methods and arguments that are exact on shards."""
STOP = 7


class Mixed(nn.Module):
    """Uneven rows (7 over two processes), stacked matrices, one row fewer than processes, and columns."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Linear(50, 7)
        self.attention = nn.MultiheadAttention(7, 1, batch_first=True)
        self.columns = nn.Linear(6, 6)
        self.single = nn.Linear(7, 1)
        self.last = nn.Linear(7, 4)
        self.double()

    def forward(self, x: Tensor) -> Any:
        hidden = torch.tanh(self.first(x.flatten(1)))[:, None]
        hidden = hidden + self.attention(hidden, hidden, hidden)[0]
        mixed = torch.tanh(self.columns(hidden[..., :6])) + self.single(hidden)
        return self.last((hidden + nn.functional.pad(mixed, (0, 1)))[:, 0])


class Sharded(Classifier):
    """Sharded where the strategy has a mesh: columns of one layer, rows of the others."""

    def __init__(self, optimizer: str = "sgd") -> None:
        super().__init__(Mixed(), optimizer)

    def configure_model(self) -> None:
        mesh: Any = getattr(self, "_device_mesh", None)
        if mesh is None or any(hasattr(p, "to_local") for p in self.parameters()):
            return
        columns = self.net.columns.weight
        fully_shard(
            self.net, mesh=mesh["data_parallel"], shard_placement_fn=lambda p: Shard(1) if p is columns else None
        )


# a state dict whose zeros are the masks
GIVEN = {n: (torch.arange(p.numel()) % 5 > 2).double().view(p.shape) for n, p in Sharded().named_parameters()}
RUNS["given"] = ("static", {"sparsity": None, "initial_mask": GIVEN})


def whole(tensor: Any) -> Tensor:
    """A tensor, or all of a sharded one."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def train(
    name: str,
    world: int,
    *listed: pl.Callback,
    more: Sequence[pl.Callback] = (),
    split: bool = False,
    validate: bool = False,
    folder: bool = True,
    ckpt_path: Any = None,
    **options: Any,
) -> dict[str, Any]:
    """The callback's state and the weights at the end, both whole."""
    base, arguments = RUNS[name]
    callback = method(base, **arguments)
    module = Sharded(options.pop("optimizer", "sgd"))
    strategy: Any = "auto"
    if world > 1:
        strategy = ModelParallelStrategy(world, 1, save_distributed_checkpoint=folder)
    rank = int(os.environ.get("LOCAL_RANK", "0"))
    loader = Batches(rank=rank, world=world) if split else Batches()
    trainer = trainer_for(
        [*more, callback, *listed], devices=world, strategy=strategy, use_distributed_sampler=False, **options
    )
    trainer.fit(module, loader, Batches() if validate else None, ckpt_path=ckpt_path)
    weights = {n: whole(p.detach()).clone() for n, p in module.named_parameters()}
    masks = {n: m.clone() for n, m in callback.masks.items()}
    counts = dict(callback.weights.active_counts)
    return {
        "state": callback.state_dict(),
        "weights": weights,
        "masks": masks,
        "counts": counts,
        "updates": callback.updates,
    }


class Unequal(pl.Callback):
    """An infinite gradient in the part that one rank holds, of the third batch."""

    def on_before_optimizer_step(self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: Any) -> None:
        if trainer.global_step == 2 and trainer.global_rank == trainer.world_size - 1:
            gradient: Any = module.net.first.weight.grad
            (gradient.to_local() if hasattr(gradient, "to_local") else gradient)[-1].fill_(torch.inf)


def refused(callback: Any, module: pl.LightningModule | None = None, **options: Any) -> str:
    """What a fit in two processes is refused with."""
    strategy = ModelParallelStrategy(*options.pop("sizes", (2, 1)))
    more = options.pop("more", [])
    trainer = trainer_for([callback, *more], devices=2, strategy=strategy, use_distributed_sampler=False, **options)
    try:
        trainer.fit(Sharded() if module is None else module, Batches())
    except ValueError as error:
        return str(error)
    return "nothing was refused"


class ByHandSharded(Sharded):
    automatic_optimization = False


class NotSharded(Sharded):
    """Leaves one layer out."""

    def configure_model(self) -> None:
        mesh: Any = self._device_mesh["data_parallel"]  # type: ignore[index]
        for layer in (self.net.first, self.net.last):
            fully_shard(layer, mesh=mesh)


class Frozen(Sharded):
    """One layer waits to be trained."""

    def configure_model(self) -> None:
        self.net.first.weight.requires_grad_(False)
        super().configure_model()


class OverTwoDimensions(Sharded):
    """Replicated along one dimension of the mesh."""

    def configure_model(self) -> None:
        fully_shard(self.net, mesh=self._device_mesh)


class Mixing(torch.optim.SGD):
    """May do anything."""


def refusals() -> dict[str, str]:
    """Each refusal by what is refused."""
    mixing = Sharded()
    mixing.configure_optimizers = lambda: Mixing(mixing.parameters(), lr=0.1)  # type: ignore[method-assign]
    static = {"print_plan": False}
    return {
        "method": refused(method("snfs")),
        "filters": refused(DPF(0.5, unit="filter", **static)),
        "tensor parallel": refused(Static(0.5, **static), sizes=(1, 2)),
        "by hand": refused(Static(0.5, **static), ByHandSharded()),
        "optimizer": refused(Static(0.5, **static), mixing),
        "not sharded": refused(Static(0.5, **static), NotSharded()),
        "two dimensions": refused(Static(0.5, **static), OverTwoDimensions()),
        "start": refused(Static(0.5, initial_mask="magnitude", **static)),
        "rescaled": refused(Static(0.5, rescale="layer", **static)),
        "neurons": refused(SET(0.5, neuron_importance=0.2, print_plan=False)),
        "pattern": refused(Static(0.5, pattern="fan_in/2", **static)),
        "towards": refused(DPF(pattern="1:2", print_plan=False)),
        "averages": refused(Static(0.5, **static), more=[WeightAveraging()]),
        "frozen": refused(Static(0.5, **static), Frozen()),
        "loop": in_a_loop(),
    }


def in_a_loop() -> str:
    model = nn.Linear(4, 4)
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    try:
        sparsify(Static(0.5), model, torch.optim.SGD(model.parameters(), lr=0.1), 4)
    except ValueError as error:
        return str(error)
    return "nothing was refused"


def run_all(folder: Path) -> dict[str, Any]:
    """What this rank finds: whole runs and resumed ones of each kind of checkpoint, and runs with a part of the data."""
    found: dict[str, Any] = {}
    for name in RUNS:
        stops = Stops(folder / f"{name} folder", (STOP,))
        found[name] = train(name, 2, stops)
        found[f"{name} resumed"] = train(name, 2, ckpt_path=stops.path(STOP))
    for name in ("rigl", "dpf"):
        stops = Stops(folder / f"{name} file", (STOP,))
        train(name, 2, stops, folder=False, max_steps=STOP)
        found[f"{name} from a file"] = train(name, 2, folder=False, ckpt_path=stops.path(STOP))
        found[f"{name} from one process"] = train(name, 2, ckpt_path=folder / f"{name} one" / f"{STOP}.ckpt")
    found["split"] = train("rigl", 2, split=True)
    for name, options in OTHERS.items():
        found[name] = train("set", 2, **options())
    stops = Stops(folder / "window", (STOP,))
    train("rigl", 2, stops, **WINDOW)
    found["window"] = train("rigl", 2, ckpt_path=stops.path(STOP), **WINDOW)
    found["refusals"] = refusals()
    return found


WINDOW: dict[str, Any] = {"accumulate_grad_batches": 2}
OTHERS: dict[str, Callable[[], dict[str, Any]]] = {
    "adamw": lambda: {"optimizer": "adamw"},
    "adagrad": lambda: {"optimizer": "adagrad"},
    "validated": lambda: {"validate": True},  # which leaves whole parameters in the module
    "not finite": lambda: {"more": [Unequal()]},
}
"""Options of further runs."""


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    torch.save(run_all(Path(sys.argv[2])), Path(sys.argv[2]) / f"{os.environ['LOCAL_RANK']}.pt")
