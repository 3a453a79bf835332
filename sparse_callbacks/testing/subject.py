"""The method under test: how a case makes it, and what it may ask of its settings."""

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from sparse_callbacks.core.constructors import argument_names
from sparse_callbacks.core.method import Options
from sparse_callbacks.lightning.callback import SparsityCallback
from sparse_callbacks.testing.settings import PROMISES, Inner, Settings

STEPS = 16  # of a short run: two epochs of eight batches

Case = TypeVar("Case", bound=Callable[..., None])


def needs(*promises: str) -> Callable[[Case], Case]:
    """Marks a case that only makes sense for a method with these promises; the contract of others leaves it out."""

    def mark(case: Case) -> Case:
        case.needs = promises  # type: ignore[attr-defined]
        return case

    return mark


class Contract:
    """Base of the classes that ``contract`` makes; its cases are functions of the modules ``cases_*``."""

    callback_class: ClassVar[type[SparsityCallback]]
    settings: ClassVar[Settings]

    def method(self, **changes: Any) -> Any:
        """The callback for a short run; ``changes`` that its constructor does not take are left out."""
        return self.callback_class(**self.arguments(**changes))

    def arguments(self, **changes: Any) -> dict[str, Any]:
        """Constructor arguments for a short run with ``changes``; what a method in it takes of them goes to that one."""
        made = {k: v.made(changes) if isinstance(v, Inner) else v for k, v in self.settings.arguments.items()}
        taken = [
            n
            for v in self.settings.arguments.values()
            if isinstance(v, Inner)
            for n in argument_names(v.method, Options)
        ]
        if "any share" in self.settings.promises_not_made:
            taken += ["sparsity", "distribution"]
        known = [n for n in argument_names(self.callback_class, Options) if n not in taken]
        return {**made, **{k: v for k, v in changes.items() if k in known}}

    def promises(self, promise: str) -> bool:
        """Whether the method makes the promise; a failure then names it."""
        assert promise in PROMISES
        made = promise not in self.settings.promises_not_made
        if made:
            vars(self).setdefault("asked", {})[promise] = None  # a dict, because it keeps the order
        return made

    def moves(self) -> bool:
        """The method has several updates in a short run."""
        return self.promises("several updates")

    def moves_at_all(self) -> bool:
        """Masks move in a short run, be it once, on the way to a target."""
        return self.moves() or bool(self.method().arrives_at_stop)

    def gradient(self, mask: Tensor, dense: Tensor, aux: Mapping[str, Tensor]) -> Tensor:
        """What the optimizer sees of a dense gradient."""
        if callable(self.settings.gradients):
            return self.settings.gradients(mask, dense, aux)
        return dense * mask if self.settings.gradients == "masked" else dense

    def assert_gradient(self, callback: Any, name: str, gradient: Tensor) -> None:
        """At the clip the gradient is zero where the settings say so, and only there."""
        mask = callback.masks[name]
        seen = self.gradient(mask, torch.ones_like(gradient), aux_of(callback.aux, name)) != 0
        hidden = int(gradient[~seen].count_nonzero())
        assert not hidden, f"{name}: {hidden} gradients at the clip that gradients= in the settings says are zero"
        assert not (seen & ~mask).any() or gradient[~mask].any(), f"{name}: gradients of pruned weights are zero"


def aux_of(aux: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors that a method keeps for a parameter, by key without the parameter's name."""
    return {key.removesuffix(name).rstrip("/"): value for key, value in aux.items() if key.endswith(name)}
