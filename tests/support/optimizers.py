"""Optimizers of other kinds than torch's: coded state, state that starts elsewhere, and steps without gradients."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


class Stepping(torch.optim.Optimizer):
    """A step that goes through the parameters with a gradient; a subclass says what it does to each."""

    lr = 1e-2

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, {"lr": self.lr, **defaults})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, p.grad, self.state[p], group)
        return loss

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        raise NotImplementedError


class Coded(Stepping):
    """Momentum in 8 bits: 127 stands for zero, and 0 for the largest negative value."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if not state:
            state |= {"code": torch.full_like(p, 127, dtype=torch.uint8), "scale": torch.zeros(())}
        m = (state["code"].float() - 127) / 127 * state["scale"] * 0.9 + gradient
        p.sub_(m, alpha=group["lr"])
        state["scale"] = m.abs().max()
        state["code"] = (m / state["scale"].clamp(min=1e-30) * 127 + 127).round().to(torch.uint8)


class MovingZero(Stepping):
    """Momentum in 8 bits between its smallest and its largest value: the code of zero moves with them."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if not state:
            state |= {"code": torch.zeros_like(p, dtype=torch.uint8), "low": torch.zeros(()), "span": torch.zeros(())}
        m = (state["code"].float() / 255 * state["span"] + state["low"]) * 0.9 + gradient
        p.sub_(m, alpha=group["lr"])
        state["low"], state["span"] = m.min(), m.max() - m.min()
        state["code"] = ((m - m.min()) / state["span"].clamp(min=1e-30) * 255).round().to(torch.uint8)


class HalvedTensor(Tensor):
    """Keeps half of each value; refuses everything but being read and being copied into."""

    halves: Tensor

    @staticmethod
    def __new__(cls, halves: Tensor) -> "HalvedTensor":
        made = Tensor._make_wrapper_subclass(cls, halves.shape)
        made.halves = halves
        return made

    def dequantize(self) -> Tensor:
        return self.halves * 2

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.copy_.default and isinstance(args[0], cls):
            args[0].halves.copy_(args[1] / 2)
            return args[0]
        if func is torch.ops.aten.detach.default:
            return cls(args[0].halves)
        raise NotImplementedError(f"{func} of {cls.__name__}")

    def __deepcopy__(self, memo: Any) -> "HalvedTensor":
        return HalvedTensor(self.halves.clone())


class OpaqueTensor(HalvedTensor):
    """Cannot be read."""

    dequantize = None  # type: ignore[assignment]


class Halved(Stepping):
    """Momentum in a tensor class of its own."""

    kind: type[HalvedTensor] = HalvedTensor

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if not state:
            state["momentum"] = self.kind(torch.zeros_like(p))
        halves = state["momentum"].halves
        halves.mul_(0.9).add_(gradient / 2)
        p.sub_(halves * 2, alpha=group["lr"])


class Opaque(Halved):
    """Momentum in a tensor class of its own that cannot be read."""

    kind = OpaqueTensor


class RandomStart(Stepping):
    """State that is drawn."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if not state:
            state["velocity"] = torch.randn_like(p)
        p.sub_(gradient + state["velocity"].mul_(0.9), alpha=group["lr"])


class Prior(Stepping):
    """A ratio of running estimates that begin at a small number: at 0 it is NaN."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if not state:
            state |= {"signal": torch.full_like(p, 1e-8), "noise": [torch.full_like(p, 3e-8)]}
        p.sub_(state["signal"] / (state["signal"] + state["noise"][0]) * gradient, alpha=group["lr"])
        state["signal"].lerp_(gradient.square(), 0.1)
        state["noise"][0].lerp_(gradient.abs(), 0.1)


class Anchored(Stepping):
    """Pulls weights to where they began, and keeps a flat momentum of gradients of length 1, NaN where all are 0."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if not state:
            state |= {"anchor": p.clone(), "flat": torch.zeros_like(p).flatten()}
        state["flat"].mul_(0.9).add_((gradient / gradient.norm()).flatten())
        p.sub_(state["flat"].view(p.shape) + 0.1 * (p - state["anchor"]), alpha=group["lr"])


class Stacked(Stepping):
    """A fast and a slow momentum in one tensor, and sums and counts of each weight in another."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if not state:
            state |= {"means": torch.zeros(2, *p.shape), "sums": torch.ones(*p.shape, 2)}
        state["means"][0].lerp_(gradient, 0.1)
        state["means"][1].lerp_(gradient, 0.01)
        state["sums"][..., 1].add_(gradient.square())
        p.sub_(state["means"].sum(0) / state["sums"][..., 1].sqrt(), alpha=group["lr"])


class AnchorsElsewhere(Stepping):
    """Keeps where the weights began in an attribute, and brings every weight back to it in each step."""

    anchors: list[Tensor] | None = None

    def step(self, closure: Any = None) -> Any:
        if self.anchors is None:
            self.anchors = [p.detach().clone() for p in parameters_of(self)]
        loss = super().step(closure)
        with torch.no_grad():
            for p, anchor in zip(parameters_of(self), self.anchors, strict=True):
                if p.grad is not None:
                    p.lerp_(anchor, 0.9)
        return loss

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        p.sub_(gradient, alpha=1e-4)


class ClipsToItsPast(Stepping):
    """From the tenth step on gradients are clipped to the size of the earlier ones: those of a fresh weight to 0."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if not state:
            state |= {"largest": torch.zeros_like(p), "taken": 0}
        state["taken"] += 1
        if state["taken"] >= 10:
            gradient = gradient.clamp(-state["largest"], state["largest"])
        state["largest"] = torch.maximum(state["largest"], gradient.abs())
        p.sub_(gradient, alpha=group["lr"])


class Matrices(Stepping):
    """A matrix for the rows and one for the columns, which have the shape of a square layer's weights."""

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        if p.ndim == 2:
            if not state:
                state |= {"rows": 0.1 * torch.eye(p.shape[0]), "columns": 0.1 * torch.eye(p.shape[1])}
            state["rows"].add_(gradient @ gradient.T)
            state["columns"].add_(gradient.T @ gradient)
        p.sub_(gradient, alpha=group["lr"])


class Slow(Stepping):
    """Keeps slow weights from its constructor on, and uses them in every third step alone."""

    def __init__(self, params: Any, **defaults: Any) -> None:
        super().__init__(params, **defaults)
        for group in self.param_groups:
            group["taken"] = 0
            for p in group["params"]:
                self.state[p]["slow"] = p.detach().clone()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for group in self.param_groups:
            group["taken"] += 1
            for p in group["params"]:
                if group["taken"] % 3 == 0 and p.grad is not None:
                    p.lerp_(self.state[p].setdefault("slow", p.clone()), 0.5)
                    self.state[p]["slow"].copy_(p)
        return loss

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        p.sub_(gradient, alpha=group["lr"])


class Whole(Stepping):
    """Gradients over the norm of all of them, kept as a running mean in the group."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, norm=1.0)

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        for group in self.param_groups:
            norms = [p.grad.norm() for p in group["params"] if p.grad is not None]
            group["norm"] = self.joined(norms, group["norm"])
            with torch.no_grad():
                for p in group["params"]:
                    if p.grad is not None:
                        p.sub_(p.grad / (group["norm"] + 1e-8), alpha=group["lr"])
        return loss

    def joined(self, norms: list[Tensor], before: float) -> float:
        return 0.9 * before + 0.1 * float(torch.stack(norms).norm())


class WholeNan(Whole):
    """The mean over no gradient at all is NaN."""

    def joined(self, norms: list[Tensor], before: float) -> float:
        return 0.9 * before + 0.1 * float(torch.tensor([float(n) for n in norms]).mean())


class DecaysAlways(Stepping):
    """Weight decay also where there is no gradient."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for p in parameters_of(self):
                p.mul_(0.999)
        return loss

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        p.sub_(gradient, alpha=group["lr"])


class ForgetsAlways(Stepping):
    """Momentum that fades also where there is no gradient."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        for p in parameters_of(self):
            self.state[p].get("momentum", torch.zeros(())).mul_(0.9)
        return loss

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        p.sub_(state.setdefault("momentum", torch.zeros_like(p)).add_(gradient), alpha=group["lr"])


class BackWithGradients(Stepping):
    """Moves weights towards a second point after its closure, and back those that have a gradient then. In the first
    steps both are one point."""

    def step(self, closure: Any = None) -> Any:
        if closure is None:
            return super().step()
        loss = closure()
        self.shift(0.5)
        self.shift(-0.5)
        super().step()
        return loss

    @torch.no_grad()
    def shift(self, share: float) -> None:
        for p in parameters_of(self):
            if share > 0 or p.grad is not None:
                p.add_(self.state[p].get("apart", torch.zeros(())), alpha=share)

    def update(self, p: Tensor, gradient: Tensor, state: Any, group: Any) -> None:
        p.sub_(gradient, alpha=group["lr"])
        state["taken"] = state.get("taken", 0) + 1
        state["apart"] = torch.full_like(p, 0.01 if state["taken"] > 1 else 0.0)


def parameters_of(optimizer: torch.optim.Optimizer) -> Iterator[nn.Parameter]:
    """Every parameter of an optimizer."""
    return (p for group in optimizer.param_groups for p in group["params"])
