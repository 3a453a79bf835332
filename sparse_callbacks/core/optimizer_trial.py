"""A trial of an optimizer on small parameters, which shows what it does to weights within a step."""

from collections import OrderedDict, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

SMALL = 2  # elements that a small tensor keeps of each dimension
STEPS = 8  # some optimizers do in a later step what they leave out in the first
_RADIUS = "rho"  # what the literature calls the size of a perturbation; a tiny one would hide that there is one


class Twin:
    """A copy of an optimizer, and of those that it holds, with small parameters in the place of its own.

    Tensors keep their first elements in each dimension, and nobody's hooks come along.

    Args:
        optimizer: the optimizer to copy; it is only read.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        self._copies: dict[int, Any] = {}
        self._kept: list[Any] = []  # what ids in the table stand for must stay alive
        self.optimizer: Any = self._twin(optimizer)
        self.parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        self._generator = torch.Generator().manual_seed(0)

    def values(self) -> list[Tensor]:
        """Copies of the parameters."""
        return [p.detach().clone() for p in self.parameters]

    def backward(self) -> None:
        """Give every parameter another gradient."""
        for p in self.parameters:
            p.grad = torch.randn(p.shape, generator=self._generator).to(p)

    def twin_of(self, optimizer: Optimizer) -> Any:
        """The copy of an optimizer that the copied one holds."""
        return self._copies[id(optimizer)]

    def _twin(self, optimizer: Optimizer) -> Any:
        made: Any = object.__new__(type(optimizer))
        self._copies[id(optimizer)] = made
        for name, value in vars(optimizer).items():
            # what hides a method of the class, such as the step that a schedule counts, belongs to the original
            if not (callable(value) and hasattr(type(optimizer), name)):
                vars(made)[name] = self._copy(name, value)
        return made

    def _copy(self, name: Any, value: Any) -> Any:
        """A copy of ``value``; the same for the same object, as optimizers share groups and state with inner ones."""
        if id(value) in self._copies:
            return self._copies[id(value)]
        if isinstance(value, int | float | str | bool | None):
            return 0.1 if name == _RADIUS and isinstance(value, int | float) and abs(value) < 0.01 else value
        copy = self._copy_of(value)
        self._copies[id(value)] = copy
        self._kept.append(value)
        return copy

    def _copy_of(self, value: Any) -> Any:
        if isinstance(value, Optimizer):
            return self._twin(value)
        if isinstance(value, Tensor):
            small = value.detach()[tuple(slice(SMALL) for _ in value.shape)].cpu().clone()
            if not isinstance(value, nn.Parameter):
                return small
            # zeros show the smallest movement, ones show those that are in proportion to the weight
            return nn.Parameter((torch.arange(small.numel()) % 2).view(small.shape).float())
        if isinstance(value, dict):
            if value and all(callable(v) for v in value.values()):
                return type(value)()  # hooks
            copy: Any = defaultdict(value.default_factory) if isinstance(value, defaultdict) else {}
            copy = OrderedDict() if isinstance(value, OrderedDict) else copy
            self._copies[id(value)] = copy
            copy.update({self._copy(None, k): self._copy(k, v) for k, v in value.items()})
            return copy
        if type(value) in (list, tuple, set):
            return type(value)(self._copy(None, v) for v in value)
        return value


class Trial:
    """What an optimizer did in its steps on small parameters.

    Args:
        optimizer: the optimizer to try; it is only read.
        inner: an optimizer that it holds, or None.
        steps: a function of the copy and of a closure that takes one step.
    """

    def __init__(
        self, optimizer: Optimizer, inner: Optimizer | None, steps: Callable[[Twin, Callable[[], Tensor]], object]
    ) -> None:
        self.moved = False
        """Parameters were elsewhere than at the step's beginning when gradients were asked for."""
        self.calls = 0
        """Most calls of the closure in one step."""
        self.failed = False
        """A step raised an error, so that the rest is not known."""
        self.inner_steps = 0
        """Steps of the inner optimizer."""
        self.inner_takes_the_step = inner is not None
        """In every step the inner optimizer stepped once, from where the step began, and nothing moved afterwards."""
        try:
            twin = Twin(optimizer)
            with torch.random.fork_rng(devices=[]):
                for _ in range(STEPS):
                    self._step(twin, None if inner is None else twin.twin_of(inner), steps)
        except Exception:  # whatever someone else's optimizer may raise on parameters that are not those of a network
            self.failed = True

    def _step(self, twin: Twin, inner: Any, steps: Callable[[Twin, Callable[[], Tensor]], object]) -> None:
        begin, calls = twin.values(), 0
        around: list[list[Tensor]] = []
        handles = []

        def inner_stepped(*_: object) -> None:
            around.append(twin.values())
            self.inner_steps += 1

        if inner is not None:
            handles = [
                inner.register_step_pre_hook(lambda *_: around.append(twin.values())),
                inner.register_step_post_hook(inner_stepped),
            ]

        def closure() -> Tensor:
            nonlocal calls
            calls += 1
            self.moved |= not _equal(begin, twin.values())
            twin.backward()
            return torch.ones((), requires_grad=True)

        twin.backward()
        steps(twin, closure)
        for handle in handles:
            handle.remove()
        self.calls = max(self.calls, calls)
        restored = len(around) == 2 and all(
            torch.allclose(a, b, rtol=0, atol=1e-5) for a, b in zip(begin, around[0], strict=True)
        )
        self.inner_takes_the_step &= restored and _equal(around[1], twin.values())


def _equal(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(some, others, strict=True))
