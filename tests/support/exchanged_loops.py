"""Networks with exchanged layers, made without the engine's help, and loops over them."""

import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_callbacks import RigL, SparseLinear, SparseRun, SparsityCallback, exchange_layers, sparsify
from sparse_callbacks.core.randomness import generator

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, 0.1),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-3),
    "adam": lambda p: torch.optim.Adam(p, 1e-2),
    "amsgrad": lambda p: torch.optim.AdamW(p, 1e-2, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 1e-3, momentum=0.5, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, 1e-2, initial_accumulator_value=0.1),
}
ALL_ELEMENTWISE = OPTIMIZERS | {
    "adamax": lambda p: torch.optim.Adamax(p, 1e-2),
    "nadam": lambda p: torch.optim.NAdam(p, 1e-2),
    "radam": lambda p: torch.optim.RAdam(p, 1e-2),
    "adadelta": lambda p: torch.optim.Adadelta(p, 0.5),
    "asgd": lambda p: torch.optim.ASGD(p, 0.1, t0=2),
    "rprop": lambda p: torch.optim.Rprop(p, 1e-3),
}
HEAD = "4.weight"  # dense
Loop = Callable[[nn.Module, torch.optim.Optimizer, SparseRun], None]
MOVING = {
    "distribution": "uniform",
    "every": 2,
    "stop": 1.0,
    "drop_fraction": "constant(0.3)",
    "exclude": HEAD,
    "print_plan": False,
}


def net(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)).to(dtype)


def first_masks(model: nn.Module, sparsity: float = 0.8) -> dict[str, Tensor]:
    """Random masks of all layers but the head."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and f"{name}.weight" != HEAD:
            scores = torch.rand(module.weight.shape, generator=generator(0, 0, f"{name}.weight"))
            order = scores.flatten().argsort()[int(scores.numel() * sparsity) :]
            found[f"{name}.weight"] = (
                torch.zeros(scores.numel(), dtype=torch.bool).index_fill_(0, order, True).view_as(scores)
            )
    return found


def exchange(model: nn.Module, masks: Mapping[str, Tensor], storage: Any = "sparse", group: int = 1) -> nn.Module:
    """Put a `SparseLinear` in the place of each layer that has a mask."""
    for name, mask in masks.items():
        parent, _, local = name.removesuffix(".weight").rpartition(".")
        holder = model.get_submodule(parent)
        setattr(holder, local, SparseLinear.from_dense(getattr(holder, local), mask, storage=storage, group=group))
    return model


def batches(first: int = 0, size: int = 16, dtype: torch.dtype = torch.float64) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless micro-batches from number ``first`` on."""
    for number in itertools.count(first):
        source = torch.Generator().manual_seed(number)
        yield torch.randn(size, 20, generator=source, dtype=dtype), torch.randint(0, 4, (size,), generator=source)


def loss_of(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int,
    last: int,
    window: int = 2,
    size: int = 16,
    see: Callable[[], object] = lambda: None,
) -> None:
    """Steps number ``first`` to ``last`` (excluded); ``see`` is called after each."""
    dtype = next(model.parameters()).dtype
    data = batches(first * window, size, dtype)
    for _ in range(first, last):
        optimizer.zero_grad()
        for _ in range(window):
            loss_of(model, next(data)).backward()
        optimizer.step()
        see()


def weights_of(model: nn.Module, run: SparseRun) -> dict[str, Tensor]:
    """The dense weights of the sparse layers."""
    layers = {name: model.get_submodule(name.removesuffix(".weight")) for name in run.masks}
    return {name: layer.weight.detach().clone() for name, layer in layers.items()}


def history(
    method: SparsityCallback,
    make: Callable[[Any], torch.optim.Optimizer],
    model: nn.Module,
    updates: int,
    size: int = 16,
) -> tuple[list[tuple[dict[str, Tensor], dict[str, Tensor]]], SparseRun]:
    """Masks and weights after each of so many updates."""
    exchange_layers(method, model)  # Adagrad makes its state at once
    optimizer = make(model.parameters())
    steps = 2 * updates + 2
    run, found = sparsify(method, model, optimizer, steps=10**6), []

    def see() -> None:
        if run.updates > len(found):
            found.append(({n: m.clone() for n, m in run.masks.items()}, weights_of(model, run)))

    for step in range(2 * steps):
        train(model, optimizer, step, step + 1, size=size, see=see)
        if len(found) == updates:
            return found, run
    raise AssertionError(f"{len(found)} updates")


def both(
    loop: Loop,
    make: Callable[[], nn.Module] = net,
    masks: dict[str, Tensor] | None = None,
    grouped: dict[str, Any] | None = None,
    **changes: Any,
) -> list[SparseRun]:
    """RigL in the loop under masked storage and with exchanged layers, which end with the same masks.

    Args:
        loop: the loop, which takes model, optimizer and run.
        make: makes the model.
        masks: the first masks; random ones where it is None.
        grouped: storage and group of the exchanged layers; None for "sparse".
        **changes: arguments of RigL.
    """
    runs, seen = list[SparseRun](), list[dict[str, Tensor]]()
    masks = first_masks(make()) if masks is None else masks
    for sparse in (False, True):
        start: Any = 0.8 if sparse else None
        more = {} if sparse else {"initial_mask": {n: m.double() for n, m in masks.items()}}
        model = exchange(make(), masks, **grouped or {}) if sparse else make()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        run = sparsify(RigL(start, **MOVING | more | changes), model, optimizer, steps=100)
        loop(model, optimizer, run)
        runs.append(run)
        seen.append({n: m.clone() for n, m in run.masks.items()})
    assert runs[0].updates == runs[1].updates > 0
    assert (runs[0].step, runs[0].figures()) == (runs[1].step, runs[1].figures())
    for name, mask in seen[0].items():
        assert torch.equal(mask, seen[1][name]), name
        assert not torch.equal(mask, masks[name]), name
    return runs
