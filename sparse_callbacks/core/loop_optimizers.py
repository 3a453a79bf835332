"""The optimizers of a hand-written loop: those it was given, and those that take their steps."""

import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch.optim import Optimizer

from sparse_callbacks.core import optimizers as torch_optimizers
from sparse_callbacks.core.loop_passes import AroundPasses
from sparse_callbacks.core.optimizer_modes import mode_of, switch_through
from sparse_callbacks.core.two_pass import steppers, two_pass, why_not_resumed
from sparse_callbacks.core.wrappers import plain_optimizer


class LoopOptimizers:
    """The optimizers of a loop, found under the wrappers of Fabric and of optimizers of two passes.

    Args:
        optimizer: the optimizer of the loop, or a list of all of them, as the loop calls them.

    Raises:
        ValueError: an optimizer under which a mask cannot be kept.
    """

    def __init__(self, optimizer: Any | Sequence[Any]) -> None:
        self.called: list[Any] = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        """The optimizers as the loop calls them, with wrappers."""
        self.given = [plain_optimizer(o) for o in self.called]
        """Those that the loop was written with, without Fabric's wrappers."""
        torch_optimizers.refuse(self.given, scaler=False)
        self.steppers = steppers(self.given, scaler=False)
        """Those that take the steps: of an optimizer of two passes the one that it holds."""
        self.two_pass = two_pass(self.given, self.steppers)
        """Those of the steppers that another optimizer perturbs weights for."""
        torch_optimizers.refuse(self.two_pass, scaler=False)
        for wrapper, plain in zip(self.called, self.given, strict=True):
            switch_through(wrapper, plain)
        self.first_groups = [_group_values(o) for o in self._restarted]
        """The values that the parameter groups began the run with."""

    @property
    def _restarted(self) -> list[Optimizer]:
        """The optimizers that start anew with a phase: those of the loop, and those that these hold for their steps."""
        return [*self.given, *self.two_pass]

    @property
    def trained(self) -> set[int]:
        """``id`` of every parameter that one of them steps."""
        return torch_optimizers.parameter_ids(*self.steppers)

    @property
    def why_not_resumed(self) -> str:
        """Why a resumed run will differ; empty where it will not."""
        return why_not_resumed(self.given, self.steppers)

    def index(self, optimizer: Optimizer) -> int:
        """The position of an optimizer among those of the run.

        Args:
            optimizer: one that was given, or one that takes its steps.

        Raises:
            ValueError: it is neither.
        """
        for index, mine in enumerate(zip(self.given, self.steppers, strict=True)):
            if optimizer in mine:
                return index
        raise ValueError(f"{type(optimizer).__name__} is not an optimizer of this run: sparsify() was not given it.")

    def note_new_groups(self) -> None:
        """Groups that were added since the run began start anew with the values that they have now."""
        for optimizer, groups in zip(self._restarted, self.first_groups, strict=True):
            groups.extend(_group_values(optimizer)[len(groups) :])

    def start_anew(self) -> None:
        """New optimizers, in place: no state, and the groups' values of the call to :func:`sparsify`."""
        self.note_new_groups()
        for optimizer, groups in zip(self._restarted, self.first_groups, strict=True):
            optimizer.state.clear()
            for group, values in zip(optimizer.param_groups, groups, strict=True):
                mode = mode_of(optimizer, group)
                for key in [k for k in group if k != "params" and k not in values]:
                    del group[key]  # of the loop's old schedule, such as "initial_lr", which the new one sets again
                group.update(copy.deepcopy(values) | mode)

    def around_passes(self, act: Callable[[Optimizer], object]) -> list[AroundPasses]:
        """Let ``act`` be called with the stepper wherever an optimizer of two passes may have new gradients."""
        return [
            AroundPasses(given, called, partial(act, stepper))
            for called, given, stepper in zip(self.called, self.given, self.steppers, strict=True)
            if given is not stepper
        ]


def _group_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """The values of each parameter group, without its parameters."""
    return [copy.deepcopy({k: v for k, v in g.items() if k != "params"}) for g in optimizer.param_groups]
