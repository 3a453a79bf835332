"""What the contract stands on: the methods found by their yaml, tiny models, a loader that resumes, exact comparison."""

import copy
import itertools
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from hydra.utils import get_class, instantiate
from omegaconf import OmegaConf
from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_callbacks import SparsityCallback

_FOUND = {path.stem: OmegaConf.load(path) for path in Path(__file__).parents[2].glob("conf/method/*.yaml")}
CONFIGS: dict[str, dict[str, Any]] = {
    name: OmegaConf.to_container(config) for name, config in sorted(_FOUND.items()) if "_target_" in config
}
METHODS = list(CONFIGS)

# several updates in 16 steps, which move enough weights for some to come straight back
SHORT = {"sparsity": 0.8, "every": 3, "stop": 14, "drop_fraction": 0.5, "partitions": 2, "rounds": 2, "print_plan": False}
STEPS = 16


def method(name: str, **changes: Any) -> SparsityCallback:
    """The callback of ``conf/method/<name>.yaml`` for a short run; ``changes`` that this method does not take are left out."""
    config = CONFIGS[name]
    short = SHORT | ({"rounds": 1} if class_of(name).takes_turns else {})  # its phases are whole epochs, and there are two
    if "budget" in config:  # the networks here have few channels
        short |= {"budget": 0.6, "round_to": 1, "start": 1, "prune_stem": True}
    return instantiate(config | {k: v for k, v in (short | changes).items() if k in config}, _convert_="all")


def class_of(name: str) -> type[SparsityCallback]:
    """The class of the method."""
    return get_class(CONFIGS[name]["_target_"])


# methods that train one network from the first step to the last
STEADY = [name for name in METHODS if not class_of(name).takes_turns]
# of these, methods with as many zeros as planned; in the others gates or a budget decide
MASKED = [name for name in STEADY if class_of(name).plans_counts]


def moves(name: str) -> bool:
    """The method has several updates in a short run: its yaml says how often."""
    return "every" in CONFIGS[name]


def draws_new_weights(name: str) -> bool:
    """Grown weights start from values of their own."""
    return class_of(name).new_weights is not SparsityCallback.new_weights


def looks_at_activations(name: str) -> bool:
    """The method passes over data for the activations of linear layers and convolutions: its yaml says over how much."""
    return "data_fraction" in CONFIGS[name]


def explores(name: str) -> bool:
    """The method grows connections."""
    return class_of(name).explores


# ---------------------------------------------------------------------- models

Configure = Callable[[Iterable[nn.Parameter]], Any]

OPTIMIZERS: dict[str, Configure] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=1e-2),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-2),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, weight_decay=0.1),
    "amsgrad": lambda p: torch.optim.Adam(p, lr=1e-2, weight_decay=1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=3e-3, momentum=0.9, centered=True, weight_decay=1e-2),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=3e-2, lr_decay=1e-2, weight_decay=1e-2),
}


class Layers(nn.Sequential):
    """torch 2.8 compiles no frame of torch's own code, so the outermost forward must be ours."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def conv_net(seed: int = 0) -> nn.Module:
    """Convolution, batch norm and two matrices, for inputs [n, 2, 5, 5] and 4 classes."""
    torch.manual_seed(seed)
    return Layers(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(72, 16), nn.LayerNorm(16), nn.ReLU(), nn.Linear(16, 4)
    )  # fmt: skip


def mlp(seed: int = 0) -> nn.Module:
    """Two matrices in float64 and no batch statistics, for the same inputs."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(50, 24), nn.Tanh(), nn.Linear(24, 4)).double()


class Classifier(pl.LightningModule):
    """Cross entropy of ``net``, with a learning rate that changes every step."""

    def __init__(self, net: nn.Module | None = None, optimizer: str = "sgd") -> None:
        super().__init__()
        self.net = conv_net() if net is None else net
        self.optimizer = optimizer

    def loss(self, batch: Any) -> Tensor:
        x, y = batch
        return nn.functional.cross_entropy(self.net(x.to(next(self.parameters()).dtype)), y)

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x.to(next(self.parameters()).dtype))

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.loss(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val_loss", self.loss(batch))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.log("test_loss", self.loss(batch))

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.net(batch[0].to(next(self.parameters()).dtype))

    def configure_optimizers(self) -> Any:
        optimizer = OPTIMIZERS[self.optimizer](self.parameters())
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.97**step)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class ByHand(Classifier):
    """The same training under manual optimization: ``window`` micro-batches a step, and the user's own clipping."""

    def __init__(self, net: nn.Module | None = None, optimizer: str = "sgd", window: int = 1, clip: float | None = None) -> None:
        super().__init__(net, optimizer)
        self.automatic_optimization = False
        self.window, self.clip = window, clip

    def training_step(self, batch: Any, batch_idx: int) -> None:
        optimizer = self.optimizers()
        self.manual_backward(self.loss(batch) / self.window)
        if (batch_idx + 1) % self.window == 0:
            if self.clip is not None:
                nn.utils.clip_grad_norm_(self.parameters(), self.clip)
            optimizer.step()
            optimizer.zero_grad()
            self.lr_schedulers().step()


class Rivals(pl.LightningModule):
    """A critic that steps twice and a maker that steps once a batch, as in a GAN; the maker's loss runs through the critic."""

    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False
        torch.manual_seed(0)
        self.maker = nn.Sequential(nn.Flatten(), nn.Linear(50, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh())
        self.critic = nn.Sequential(nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, 4))
        self.before_clip: Callable[[int], None] = lambda index: None
        self.after_step: Callable[[int], None] = lambda index: None

    def forward(self, x: Tensor) -> Tensor:
        return self.critic(self.maker(x))

    def training_step(self, batch: Any, batch_idx: int) -> None:
        x, y = batch
        maker, critic = self.optimizers()
        for _ in range(2):
            self.step_with(1, critic, self.critic, nn.functional.cross_entropy(self.critic(self.maker(x).detach()), y))
        self.step_with(0, maker, self.maker, nn.functional.cross_entropy(self.critic(self.maker(x)), y))

    def step_with(self, index: int, optimizer: Any, net: nn.Module, loss: Tensor) -> None:
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.before_clip(index)
        nn.utils.clip_grad_norm_(net.parameters(), 0.1)
        optimizer.step()
        self.after_step(index)

    def configure_optimizers(self) -> list[Optimizer]:
        return [OPTIMIZERS["sgd"](self.maker.parameters()), OPTIMIZERS["adamw"](self.critic.parameters())]


# ---------------------------------------------------------------------- data


class Batches:
    """Random images [size, 2, 5, 5] and labels; the order derives from (seed, epoch, index), so the position is all its state.

    Rank r of ``world`` gets every ``world``-th sample of each batch.
    """

    batch_sampler = None  # Lightning asks every loader with a sampler for it

    def __init__(self, batches: int = 8, size: int = 6, seed: int = 0, rank: int = 0, world: int = 1) -> None:
        self.batches, self.size, self.seed, self.rank, self.world = batches, size, seed, rank, world
        source = torch.Generator().manual_seed(seed)
        self.x = torch.randn(batches * size, 2, 5, 5, generator=source)
        self.y = torch.randint(0, 4, (batches * size,), generator=source)
        self.epoch = self.next = 0
        self.resumed: dict[str, int] | None = None

    @property
    def sampler(self) -> "Batches":
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.resumed = state

    def __len__(self) -> int:
        return self.batches

    def order(self, epoch: int) -> Tensor:
        return torch.randperm(len(self.x), generator=torch.Generator().manual_seed(1000 * self.seed + epoch))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        resumed, self.resumed = self.resumed, None
        self.next = resumed["next"] if resumed is not None and resumed["epoch"] == self.epoch else 0
        order = self.order(self.epoch)
        while self.next < self.batches:
            chosen = order[self.next * self.size : (self.next + 1) * self.size][self.rank :: self.world]
            self.next += 1
            yield self.x[chosen], self.y[chosen]

    def in_order(self) -> "list[tuple[Tensor, Tensor]]":
        """This rank's samples, each once."""
        mine = torch.arange(len(self.x))[self.rank :: self.world]
        return [(self.x[chosen], self.y[chosen]) for chosen in mine.split(self.size)]

    def all(self, epochs: int) -> list[tuple[Tensor, Tensor]]:
        """Every batch of the first ``epochs`` epochs, in order."""
        loader, found = Batches(self.batches, self.size, self.seed, self.rank, self.world), []
        for epoch in range(epochs):
            loader.set_epoch(epoch)
            found += list(loader)
        return found


class Thirds(Batches):
    """The same samples in micro-batches, three for each batch."""

    def __len__(self) -> int:
        return 3 * self.batches

    def __iter__(self) -> Any:
        for x, y in super().__iter__():
            yield from zip(x.chunk(3), y.chunk(3), strict=True)


# ---------------------------------------------------------------------- runs

Watcher = Callable[[pl.Trainer, Any, int], None]


def watch(on_batch_end: Watcher) -> pl.Callback:
    """Calls ``on_batch_end(trainer, module, batches done before)`` after every batch; put it behind the sparsity callbacks."""
    count = itertools.count()
    return pl.callbacks.LambdaCallback(on_train_batch_end=lambda trainer, module, *_: on_batch_end(trainer, module, next(count)))


def trainer_for(callbacks: Sequence[pl.Callback], **options: Any) -> pl.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    return pl.Trainer(**{"accelerator": "cpu", "devices": 1, "max_epochs": 2, **quiet, **options, "callbacks": list(callbacks)})


def fit(module: pl.LightningModule, *callbacks: pl.Callback, loader: Any = None, ckpt_path: Any = None, **options: Any) -> pl.Trainer:
    """Fit for two epochs of eight batches, unless told otherwise."""
    trainer = trainer_for(callbacks, **options)
    trainer.fit(module, Batches() if loader is None else loader, ckpt_path=ckpt_path)
    return trainer


def sparse_weights(module: nn.Module, *callbacks: SparsityCallback) -> dict[str, tuple[Tensor, Tensor]]:
    """(weight, mask) by name."""
    weights = {n: p.detach() for n, p in module.named_parameters()}
    return {n: (weights[n], m) for c in callbacks for n, m in c.masks.items()}


def assert_effective(module: nn.Module, *callbacks: SparsityCallback) -> None:
    """Every sparse weight is what its mask leaves of it."""
    found = sparse_weights(module, *callbacks)
    assert found
    for name, (weight, mask) in found.items():
        assert mask.dtype == torch.bool, name
        assert mask.shape == weight.shape, name
        assert not weight[~mask].any(), f"{name}: {int(weight[~mask].count_nonzero())} pruned weights are not zero"


def assert_counts(callback: SparsityCallback) -> None:
    """Exactly the zeros that ``plan()`` announces, in every parameter, or over all where they share a threshold."""
    plan = callback.plan()
    assert sum(int((~m).sum()) for m in callback.masks.values()) == plan.zeros
    if plan.joint is not None:
        assert set(callback.masks) == plan.selected
        return
    assert {n: int((~m).sum()) for n, m in callback.masks.items()} == {r.name: r.zeros for r in plan if r.name in plan.selected}


def lasting(state: Any) -> Any:
    """A state without what belongs to one run: when its phases and epochs began."""
    if not isinstance(state, Mapping):
        return state
    return {k: lasting(v) for k, v in state.items() if not str(k).startswith(("phase/", "workers/offset"))}


def snapshot(trainer: pl.Trainer, module: nn.Module, *callbacks: SparsityCallback) -> dict[str, Any]:
    """Copies of everything that a resumed run must share with one that never stopped."""
    return copy.deepcopy(
        {
            "weights": module.state_dict(),
            "masks": [c.masks for c in callbacks],
            "callbacks": [c.state_dict() for c in callbacks],
            "aux": [c.aux for c in callbacks],
            "counts": [(c.step, c.updates, c.at_target) for c in callbacks],
            "optimizers": [o.state_dict() for o in trainer.optimizers],
            "rates": [[group["lr"] for group in o.param_groups] for o in trainer.optimizers],
            "global_step": trainer.global_step,
        }
    )


def differences(first: Any, second: Any, where: str = "", bitwise: bool = True) -> list[str]:
    """Where two nests of dicts, sequences, numbers and tensors differ; tensors bit by bit, or else by value (-0.0 equals 0.0)."""
    if isinstance(first, Mapping) and isinstance(second, Mapping):
        if set(first) != set(second):
            return [f"{where}: keys {sorted(map(str, set(first) ^ set(second)))}"]
        return [d for key in first for d in differences(first[key], second[key], f"{where}/{key}", bitwise)]
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        if len(first) != len(second):
            return [f"{where}: lengths {len(first)} and {len(second)}"]
        pairs = enumerate(zip(first, second, strict=True))
        return [d for i, (a, b) in pairs for d in differences(a, b, f"{where}/{i}", bitwise)]
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        alike = first.dtype == second.dtype and first.shape == second.shape
        return [] if alike and (_bits(first) == _bits(second) if bitwise else torch.equal(first, second)) else [where]
    return [] if type(first) is type(second) and first == second else [f"{where}: {first!r} and {second!r}"]


def _bits(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


class Stops(pl.Callback):
    """Writes a checkpoint after each of these batches (counted from 1)."""

    def __init__(self, folder: Path, after: tuple[int, ...]) -> None:
        self.folder, self.after, self.batches = folder, after, 0

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        self.batches += 1
        if self.batches in self.after:
            trainer.save_checkpoint(self.path(self.batches))

    def path(self, batch: int) -> Path:
        return self.folder / f"{batch}.ckpt"


def run_two_processes(script: str, folder: Path) -> None:
    """Run ``script`` of this folder with ``folder`` as its argument, as the two ranks of one run."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "WORLD_SIZE": "2", "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join(p or os.getcwd() for p in sys.path),
    }  # fmt: skip
    command = [sys.executable, str(Path(__file__).with_name(script)), str(folder)]
    processes = [
        subprocess.Popen(command, env=os.environ | shared | {"LOCAL_RANK": rank}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for rank in ("0", "1")
    ]
    try:
        outputs = [p.communicate(timeout=240)[0].decode() for p in processes]
    finally:
        for p in processes:
            p.kill()
    assert [p.returncode for p in processes] == [0, 0], "\n".join(outputs)[-4000:]


def per_element_state(optimizer: Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """The optimizer's state tensors that have one element for each weight."""
    return {k: v for k, v in optimizer.state[parameter].items() if isinstance(v, Tensor) and v.shape == parameter.shape}


def structure(module: nn.Module) -> dict[str, Any]:
    """Everything that is in a model besides the values of its tensors: keys, buffers, types, attributes and hooks."""
    hooks = {
        f"{name}.{kind}": len(value)
        for name, child in module.named_modules()
        for kind, value in vars(child).items()
        if kind.endswith("_hooks") and isinstance(value, dict)
    }
    return {
        "keys": list(module.state_dict()),
        "buffers": [n for n, _ in module.named_buffers()],
        "parameters": {n: (type(p).__name__, id(p), p.requires_grad, tuple(p.shape)) for n, p in module.named_parameters()},
        "types": {n: type(m).__name__ for n, m in module.named_modules()},
        "attributes": {n: sorted(vars(m)) for n, m in module.named_modules() if n},
        "hooks": hooks,
        "gradient hooks": [n for n, p in module.named_parameters() if p._backward_hooks or p._post_accumulate_grad_hooks],
        "on the tensors": {n: sorted(vars(p)) for n, p in module.named_parameters()},
    }
