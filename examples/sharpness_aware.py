"""Sharpness-aware minimization: RigL trains two spirals 80 % sparse, under a Trainer and in a loop of your own.

    python examples/sharpness_aware.py

The optimizer takes gradients twice for one step, at the weights and uphill from them. It holds the torch optimizer that
takes the step, and shares its state, so that checkpoints hold everything.
"""

import math
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import sparse_callbacks
from sparse_callbacks import methods, sparsify


class SAM(torch.optim.Optimizer):
    """``base`` steps by the gradient at w + rho * g / |g|, where g is the gradient at w."""

    def __init__(self, params: Any, base: type[torch.optim.Optimizer], rho: float = 0.05, **options: Any) -> None:
        super().__init__(params, {"rho": rho, **options})
        self.base_optimizer = base(self.param_groups, **options)
        self.share()

    def share(self) -> None:
        self.param_groups, self.state = self.base_optimizer.param_groups, self.base_optimizer.state

    def load_state_dict(self, state_dict: Any) -> None:
        self.base_optimizer.load_state_dict(state_dict)
        self.share()

    @torch.no_grad()
    def first_step(self) -> None:
        found = [(p, group["rho"]) for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p, _ in found]).norm() + 1e-12
        for p, rho in found:
            self.state[p]["before"] = p.detach().clone()
            p.add_(p.grad * (rho / norm))
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if "before" in self.state[p]:
                    p.copy_(self.state[p].pop("before"))
        self.base_optimizer.step()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Both passes by a closure that clears gradients and runs backward, as a Trainer's does."""
        assert closure is not None
        with torch.enable_grad():
            loss = closure()
        self.first_step()
        with torch.enable_grad():
            closure()
        self.second_step()
        return loss


def spirals(points: int, seed: int) -> TensorDataset:
    """Points [points, 2] on two spirals with a little noise, and which spiral each lies on [points]."""
    source = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 2, (points,), generator=source)
    turn = 3 * math.pi * torch.rand(points, generator=source).sqrt()
    angle = turn + math.pi * label
    place = torch.stack([turn * angle.cos(), turn * angle.sin()], dim=1) / 10
    return TensorDataset(place + 0.02 * torch.randn(points, 2, generator=source), label)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 2))


class Spirals(pl.LightningModule):
    """An ordinary module: automatic optimization calls the closure of ``SAM.step`` twice."""

    def __init__(self) -> None:
        super().__init__()
        self.net = network()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return SAM(self.parameters(), torch.optim.AdamW, lr=3e-3)


def with_a_trainer(loader: DataLoader[Any], epochs: int) -> nn.Module:
    """Train under a Trainer."""
    module, callback = Spirals(), sparse_callbacks.RigL(0.8, keep_dense="both", print_plan=False)
    trainer = pl.Trainer(max_epochs=epochs, callbacks=[callback], accelerator="cpu", logger=False, barebones=True)
    trainer.fit(module, loader)
    print(f"Trainer: {callback.updates} updates, sparsity {callback.measured_sparsity()['sparsity/total']:.2f}")
    return module.net


def with_a_loop(loader: DataLoader[Any], epochs: int) -> nn.Module:
    """Train in a loop, with two calls and a backward pass before each."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=3e-3)
    method = methods.RigL(0.8, keep_dense="both", print_plan=False)
    with sparsify(method, model, optimizer, steps=epochs * len(loader)) as run:
        for x, y in (batch for _ in range(epochs) for batch in loader):
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.first_step()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.second_step()
            optimizer.zero_grad()
    print(f"loop: {run.updates} updates, sparsity {run.measured_sparsity()['sparsity/total']:.2f}")
    return model


def main(epochs: int = 30) -> list[float]:
    """Train in both ways, and give the accuracies on points that were not seen in training."""
    loader = DataLoader(spirals(2000, seed=1), batch_size=100, shuffle=True)
    x, y = spirals(2000, seed=2).tensors
    accuracies = []
    for train in (with_a_trainer, with_a_loop):
        accuracies.append(float((train(loader, epochs)(x).argmax(1) == y).float().mean()))
        print(f"accuracy {accuracies[-1]:.1%}")
    return accuracies


if __name__ == "__main__":
    main()
