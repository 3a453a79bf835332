"""Optimizers that switch between a point to train at and one to evaluate, as schedule-free ones do."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import ref

import torch
from torch.optim import Optimizer

from sparse_callbacks.core.weights import SparseWeights

_PACKAGE = "schedulefree"
# By name, because the package need not be installed. The closure variants move the weights within a step, and the
# wrappers are no torch optimizers.
_SUPPORTED = (
    "SGDScheduleFree",
    "AdamWScheduleFree",
    "RAdamScheduleFree",
    "AdamWScheduleFreePaper",
    "SGDScheduleFreeReference",
    "AdamWScheduleFreeReference",
)
# What these optimizers keep beside a parameter and write into it: z, and in the reference variants x and y.
_AVERAGES = ("z", "x", "y")
_MODES = ("train", "eval")


def has_modes(optimizer: object) -> bool:
    """Whether an optimizer can be switched between training and evaluation."""
    return callable(getattr(optimizer, "train", None)) and callable(getattr(optimizer, "eval", None))


def is_schedule_free(optimizer: Optimizer) -> bool:
    """Whether an optimizer steps and switches as those of the package ``schedulefree`` do; a subclass may override
    anything else."""
    return all(_is_of_the_package(type(optimizer), method) for method in ("step", *_MODES))


def _is_of_the_package(cls: type, method: str) -> bool:
    """Whether a class has ``method`` from one of the supported classes."""
    # of the function and not of the class that has it: torch puts its own wrapper of step into every class
    function = getattr(cls, method, None)
    module, name = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
    return module.partition(".")[0] == _PACKAGE and name.partition(".")[0] in _SUPPORTED


def refuse_modes(optimizers: Iterable[Any]) -> None:
    """Refuse optimizers that write to weights outside of their steps in a way that nobody here knows.

    Raises:
        ValueError: an optimizer with ``train()`` and ``eval()`` that is not one of the package ``schedulefree``.
    """
    for optimizer in optimizers:
        if has_modes(optimizer) and not is_schedule_free(optimizer):
            name = type(optimizer).__name__
            raise ValueError(
                f"{name} has train() and eval(), which write to the weights outside of its steps, so pruned weights "
                f"would come back. Use one of the package {_PACKAGE} ({', '.join(_SUPPORTED[:3])}), or an optimizer "
                "without modes, such as SGD or AdamW."
            )


def mode_of(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Any]:
    """The entry of a parameter group that says in which mode it is; empty for optimizers without modes."""
    return {"train_mode": group["train_mode"]} if is_schedule_free(optimizer) else {}


def take_over_mode(new: Optimizer, old: Optimizer) -> None:
    """Put an optimizer that takes the place of ``old`` into the mode of ``old``, where both have modes."""
    if is_schedule_free(new) and is_schedule_free(old):
        switch: Any = new
        mode = mode_of(old, old.param_groups[0])
        _ = switch.train() if mode["train_mode"] else switch.eval()


@torch.no_grad()
def mask_averages(optimizers: Sequence[Optimizer], weights: SparseWeights, names: Iterable[str] | None = None) -> None:
    """Zero what schedule-free optimizers keep of pruned weights, wherever these have no dense copy.

    With masked gradients it stays zero through all steps, so switching modes leaves pruned weights zero, whoever does it
    and whenever.

    Args:
        optimizers: the optimizers of the run; those without modes are left alone.
        weights: the masks.
        names: names of sparse parameters; None: all.
    """
    for optimizer in filter(is_schedule_free, optimizers):
        for name in weights.params if names is None else names:
            state = optimizer.state.get(weights.params[name], {})
            for key in _AVERAGES if not weights.has_copy(name) else ():
                if key in state:
                    state[key].masked_fill_(~weights.masks[name].to(state[key].device), 0)


class DenseInSwitch:
    """Lets a schedule-free optimizer see dense values when it switches modes, for the parameters with a dense copy.

    In either mode parameters hold ``mask * dense`` then, with the dense values of that mode. Once the run is over this
    goes on for as long as nobody else writes to the parameters: the optimizer still knows the dense values, and would
    bring them back.

    Args:
        optimizer: the optimizer, whose ``train`` and ``eval`` are replaced.
        weights: masks and dense values.
        names: the sparse parameters that the optimizer steps.
    """

    def __init__(self, optimizer: Optimizer, weights: SparseWeights, names: Sequence[str]) -> None:
        self._optimizer, self._weights, self._names = ref(optimizer), weights, list(names)
        self._run_is_over = False
        # attributes of the instance hide its class's methods; neither pickle nor deepcopy takes them along
        for hold in [h for h in _holds(optimizer) if h._run_is_over and h._shares_parameters(self)]:
            hold.release()
        holds = [*_holds(optimizer), self]
        vars(optimizer).update({mode: _Switch(optimizer, mode, holds) for mode in _MODES})

    def _shares_parameters(self, other: "DenseInSwitch") -> bool:
        mine = {id(self._weights.params[n]) for n in self._names}
        return any(id(other._weights.params[n]) in mine for n in other._names)

    @contextmanager
    def dense(self) -> Iterator[None]:
        """Inside, parameters with a copy hold their dense values."""
        optimizer, weights = self._optimizer(), self._weights
        copied = [n for n in self._names if weights.has_copy(n)]
        if self._run_is_over and any(weights.was_written(n) for n in copied):
            self.release()  # the network is no longer the run's
            copied = []
        elif optimizer is not None and not self._run_is_over:
            mask_averages([optimizer], weights, self._names)
        weights.swap_in(copied)
        try:
            yield
        finally:
            weights.write_masked(copied)

    def end_run(self) -> None:
        """The run is over."""
        self._run_is_over = True
        if not any(self._weights.has_copy(n) for n in self._names):
            self.release()

    def release(self) -> None:
        """Let the optimizer switch by itself again."""
        optimizer = self._optimizer()
        if optimizer is not None and self in _holds(optimizer):
            _holds(optimizer).remove(self)
            if not _holds(optimizer):
                for mode in _MODES:
                    del vars(optimizer)[mode]


class _Switch:
    """Stands for ``train`` or ``eval`` of one optimizer."""

    def __init__(self, optimizer: Optimizer, mode: str, holds: list[DenseInSwitch]) -> None:
        self._optimizer, self._mode, self.holds = ref(optimizer), mode, holds

    def __call__(self) -> None:
        optimizer = self._optimizer()
        with ExitStack() as stack:
            for hold in list(self.holds):
                stack.enter_context(hold.dense())
            getattr(type(optimizer), self._mode)(optimizer)


def _holds(optimizer: Optimizer) -> list[DenseInSwitch]:
    """Those who take part where the optimizer switches modes."""
    switch = vars(optimizer).get("train")
    return switch.holds if isinstance(switch, _Switch) else []


def switch_through(wrapper: object, optimizer: Optimizer) -> None:
    """Let a wrapper switch the optimizer itself, where it has the methods from the optimizer's class: the wrappers of
    Lightning and Fabric are instances of a subclass of it, and would pass :class:`DenseInSwitch` by.

    Args:
        wrapper: the object that the user's code calls.
        optimizer: the optimizer that it wraps.
    """
    if wrapper is not optimizer and all(_is_of_the_package(type(wrapper), mode) for mode in _MODES):
        vars(wrapper).update({mode: _Through(optimizer, mode) for mode in _MODES})


class _Through:
    """Calls ``train`` or ``eval`` of an optimizer, whatever stands for it then."""

    def __init__(self, optimizer: Optimizer, mode: str) -> None:
        self._optimizer, self._mode = optimizer, mode

    def __call__(self) -> None:
        getattr(self._optimizer, self._mode)()
