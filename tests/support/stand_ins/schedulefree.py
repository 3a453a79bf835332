"""A stand-in for the package ``schedulefree``: the interface and the arithmetic of its optimizers, one weight at a time.

Load it with :func:`support.schedule_free.stand_in`; its classes then come from a module of the package's name.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer


class SGDScheduleFree(Optimizer):
    """Steps y, the point of the gradients, which lies between z, a plain descent, and x, the mean of all z."""

    def __init__(self, params: Any, lr: float = 1.0, momentum: float = 0.9, weight_decay: float = 0.0) -> None:
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, defaults | {"k": 0, "train_mode": False, "weight_sum": 0.0})

    @torch.no_grad()
    def eval(self) -> None:
        for group in self.param_groups:
            if group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(end=self.state[p]["z"], weight=1 - 1 / group["momentum"])
                group["train_mode"] = False

    @torch.no_grad()
    def train(self) -> None:
        for group in self.param_groups:
            if not group["train_mode"]:
                for p in group["params"]:
                    if "z" in self.state[p]:
                        p.lerp_(end=self.state[p]["z"], weight=1 - group["momentum"])
                group["train_mode"] = True

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        if not self.param_groups[0]["train_mode"]:
            raise Exception("Optimizer was not in train mode when step is called.")
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            weight = lr**2
            group["weight_sum"] += weight
            share = weight / group["weight_sum"]
            for p in [p for p in group["params"] if p.grad is not None]:
                z = self.state[p].setdefault("z", p.detach().clone())
                p.grad.add_(p, alpha=group["weight_decay"])
                p.lerp_(end=z, weight=share).add_(p.grad, alpha=lr * (momentum * (1 - share) - 1))
                z.sub_(p.grad, alpha=lr)
            group["k"] += 1
        return loss


class SGDScheduleFreeReference(Optimizer):
    """The same with all three points in its state."""

    def __init__(self, params: Any, lr: float = 1.0, momentum: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "k": 0, "train_mode": True, "weight_sum": 0.0})

    @torch.no_grad()
    def eval(self) -> None:
        self._switch("x", False)

    @torch.no_grad()
    def train(self) -> None:
        self._switch("y", True)

    def _switch(self, point: str, train: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train:
                for p in group["params"]:
                    if point in self.state[p]:
                        p.copy_(self.state[p][point])
                group["train_mode"] = train

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            weight = lr**2
            group["weight_sum"] += weight
            share = weight / group["weight_sum"]
            for p in [p for p in group["params"] if p.grad is not None]:
                if not self.state[p]:
                    self.state[p] = {point: p.detach().clone() for point in "xyz"}
                x, y, z = (self.state[p][point] for point in "xyz")
                z.sub_(p.grad, alpha=lr)
                x.mul_(1 - share).add_(z, alpha=share)
                y.copy_(x.mul(momentum).add_(z, alpha=1 - momentum))
                p.copy_(y)
            group["k"] += 1
        return loss
