"""The hold on the optimizers of a run: hooks around their steps, and switches of their modes."""

from collections.abc import Callable, Iterable
from functools import partial

from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from sparse_callbacks.core.optimizer_modes import DenseInSwitch, is_schedule_free
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.passing_rates import PassingRates
from sparse_callbacks.core.weights import SparseWeights


class OptimizerHold:
    """Hooks in optimizers, and dense values for those that switch between training and evaluation themselves.

    Args:
        owners: the optimizers of the run; none where no run goes on.
        weights: masks and parameters of the run.
        after: called with an optimizer that has stepped.
        sets_rates: whether the method gives learning rates of single steps.
    """

    def __init__(
        self, owners: Ownership, weights: SparseWeights, after: Callable[..., None], sets_rates: bool = False
    ) -> None:
        self.begun: set[int] = set()
        """Indices of the optimizers whose steps were announced by hooks since the last batch ended."""
        self._owners = owners
        self.handles: list[RemovableHandle] = [o.register_step_post_hook(after) for o in owners.optimizers]
        """The hooks that are planted; empty once they were taken away."""
        self.rates = PassingRates(owners.optimizers if sets_rates else ())
        """Learning rates of single steps."""
        self.handles += self.rates.handles
        self._switches = [
            DenseInSwitch(o, weights, names)
            for o, names in zip(owners.optimizers, owners.steps, strict=True)
            if is_schedule_free(o)
        ]

    def announce_by_hooks(self, optimizers: Iterable[Optimizer], begins: Callable[[Optimizer], None]) -> None:
        """Let ``begins`` be called with each of ``optimizers`` that begins a step, once for each step."""
        self.handles += [o.register_step_pre_hook(partial(self._step_begins, begins)) for o in optimizers]

    def _step_begins(self, begins: Callable[[Optimizer], None], optimizer: Optimizer, *_: object) -> None:
        index = self._owners.index(optimizer)
        if index in self.begun:
            return  # a subclass that calls its parent's step fires the hooks of both
        self.begun.add(index)
        begins(optimizer)

    def move_on(self) -> None:
        """Other optimizers take the places of these: let these go."""
        for switch in self._switches:
            switch.release()
        self._unhook()

    def end_run(self) -> None:
        """The run is over: let the optimizers go."""
        for switch in self._switches:
            switch.end_run()
        self._unhook()

    def _unhook(self) -> None:
        self.rates.put_back()
        for handle in self.handles:
            handle.remove()
        self.handles = []
