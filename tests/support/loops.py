"""Hand-written loops under `sparsify`: a network, its data, and one way to train it."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sparse_callbacks import (
    CTRE,
    DPF,
    GMP,
    NM,
    SET,
    SMCP,
    SNFS,
    ChannelPruning,
    ConstrainedL0,
    GaP,
    PruneAtStart,
    RigL,
    SparseRun,
    SparsityCallback,
    Static,
    sparsify,
)

METHODS: dict[str, Callable[..., SparsityCallback]] = {
    "static": lambda **more: Static(0.8, print_plan=False, **more),
    "crop": lambda **more: PruneAtStart(
        0.8, score="crop", batches=list(data(batches=2)), loss=loss_in_own_type, print_plan=False, **more
    ),
    "set": lambda **more: SET(0.8, every=4, print_plan=False, **more),
    "rigl": lambda **more: RigL(0.8, every=4, print_plan=False, **more),
    "snfs": lambda **more: SNFS(0.8, every=4, print_plan=False, **more),
    "gmp": lambda **more: GMP(0.8, every=4, print_plan=False, **more),
    "dpf": lambda **more: DPF(0.8, every=4, print_plan=False, **more),
    "nm": lambda **more: NM("1:2", every=4, print_plan=False, **more),
    "nm soft": lambda **more: NM("1:2", projection="soft", print_plan=False, **more),
    "smcp": lambda **more: SMCP(budget=0.5, every=4, print_plan=False, **more),
    "channels": lambda **more: ChannelPruning(budget=0.5, criterion="taylor_fo", every=4, print_plan=False, **more),
    "ctre": lambda **more: CTRE(0.8, every=4, print_plan=False, **more),
    "l0": lambda **more: ConstrainedL0(density=0.3, gate_lr=0.1, dual_lr=0.1, print_plan=False, **more),
    "gap": lambda **more: GaP(0.8, partitions=2, print_plan=False, **more),
}
STEPS, EPOCH = 24, 12


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(12, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 4))


def conv_net() -> nn.Sequential:
    """For inputs [n, 2, 6, 6] and 4 classes."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(32, 4)
    )


def data(*shape: int, batches: int = EPOCH) -> DataLoader[Any]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * batches, *(shape or (12,)), generator=generator)
    return DataLoader(TensorDataset(x, torch.randint(0, 4, (8 * batches,), generator=generator)), batch_size=8)


def sgd(model: nn.Module | list[nn.Parameter], lr: float = 0.1) -> torch.optim.Optimizer:
    parameters = model.parameters() if isinstance(model, nn.Module) else model
    return torch.optim.SGD(parameters, lr=lr, momentum=0.9)


def adamw(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=1e-2)


def batches(loader: DataLoader[Any], first: int, last: int) -> Iterator[Any]:
    """Batches number ``first`` to ``last`` (excluded) of endless passes over the data."""
    listed = list(loader)
    yield from (listed[number % len(listed)] for number in range(first, last))


def loss_of(model: nn.Module, batch: Any) -> Tensor:
    return nn.functional.cross_entropy(model(batch[0]).float(), batch[1])


def loss_in_own_type(model: nn.Module, batch: Any) -> Tensor:
    """The same on batches of another type than the model's."""
    return loss_of(model, (batch[0].to(next(model.parameters()).dtype), batch[1]))


def train(
    run: SparseRun,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    first: int = 0,
    last: int = STEPS,
    loader: DataLoader[Any] | None = None,
    check: bool = True,
) -> None:
    """Steps number ``first`` to ``last`` (excluded) of a loop like everybody's."""
    for batch in batches(loader or data(), first, last):
        with run.batch():
            loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        if check:
            assert_masked(model, run)


def half_precision(
    run: SparseRun,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    inf_at: tuple[int, ...],
    clip: Callable[[SparseRun, torch.optim.Optimizer], object] | None = None,
    last: int = STEPS,
) -> None:
    """float16 under a GradScaler, which skips the steps in ``inf_at``; ``clip`` is what the loop does by hand."""
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    for number, batch in enumerate(batches(data(), 0, last)):
        assert_masked(model, run)  # also in the forward pass after a step that was skipped
        with torch.autocast("cpu", dtype=torch.float16):
            loss = loss_of(model, batch) * (math.inf if number in inf_at else 1.0)
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(optimizer)
            clip(run, optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()


def assert_masked(model: nn.Module, run: SparseRun) -> None:
    parameters = dict(model.named_parameters())
    assert run.masks
    for name, mask in run.masks.items():
        assert not parameters[name].detach()[~mask].any(), name


def assert_same(one: nn.Module, other: nn.Module) -> None:
    """Equal bit for bit, buffers included."""
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name


def begin(method: str | SparsityCallback, model: nn.Module, optimizer: Any, **options: Any) -> SparseRun:
    """`sparsify` for the length of :func:`train`, with what some methods need."""
    made = METHODS[method]() if isinstance(method, str) else method
    return sparsify(
        made, model, optimizer, STEPS, **({"epoch": EPOCH, "data": data(), "on_restart": lambda: None} | options)
    )
