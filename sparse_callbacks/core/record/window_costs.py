"""What a window of training costs, under the masks that its steps were taken with."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.record.account import SampleCost
from sparse_callbacks.core.record.first_batch import WeightUse
from sparse_callbacks.core.record.multiply_adds import WeightsInStep, multiply_adds, step_multiply_adds
from sparse_callbacks.core.step import Step

Kind = tuple[int, int, bool]
"""The method, the optimizer, and whether an update replaces the step."""


@dataclass
class _Known:
    """Weights of a kind of step while masks stay.

    Attributes:
        changes: the count of changes of the masks that they belong to, and whose masks these are.
        names: parameters that the optimizer steps.
        counts: their weights in the step.
        cost: multiply-adds for one sample; None until somebody asks.
    """

    changes: tuple[int, int]
    names: Sequence[str]
    counts: WeightsInStep
    cost: tuple[int, int] | None = None


class WindowCosts:
    """Multiply-adds of training and inference of a model, for one sample.

    A window is what one step of training needs: the accumulated batches of one step or, where a loop has several optimizers,
    of the steps that belong together. It is charged with forward and backward of every layer once, as the first batch has
    used it: the sparse layers by the weights that each step needs, all others whole. Layers of an optimizer that takes no step
    in a window are charged with their active weights.

    Positions are known when the first batch is over, and its masks may have moved by then: so weights are noted with each
    step, and multiplied by positions where the window ends.

    Args:
        methods: the methods of the run, over different parameters of one model; none for a dense run.
    """

    def __init__(self, methods: Sequence[Method]) -> None:
        self._methods = list(methods)
        self._known: dict[Kind, _Known] = {}
        self._window: dict[tuple[int, int], _Known] = {}
        self._uses: Mapping[str, WeightUse] = {}
        self._sizes: Mapping[str, int] = {}
        self._rest = (0, 0)

    def set_uses(self, uses: Mapping[str, WeightUse], sizes: Mapping[str, int]) -> None:
        """What one sample needs.

        Args:
            uses: the use of each parameter by one sample.
            sizes: weights of each parameter of the model.
        """
        self._uses, self._sizes = uses, sizes
        for known in self._known.values():
            known.cost = None
        sparse = {name for method in self._methods for name in method.params}
        rest = [(size, uses[name]) for name, size in sizes.items() if name in uses and name not in sparse]
        forward = sum(size * use.inference for size, use in rest)
        step = sum(size * (use.forward + use.by_input + use.by_weight) for size, use in rest)
        self._rest = forward, step

    # ------------------------------------------------------------------ training

    def note(self, method: Method, step: Step) -> None:
        """A step was taken, under the masks that the method still has."""
        number = self._methods.index(method)
        kind, weights = (number, step.index, step.replaced), method.weights
        changes = id(weights), weights.changes
        known = self._known.get(kind)
        if known is None or known.changes != changes:
            names = method.owners.steps[step.index]
            counts = _of(names, method.weights_in_step(step))
            known = self._known[kind] = _Known(changes, names, counts)
        self._window[number, step.index] = known

    @property
    def noted(self) -> bool:
        """A step was taken in the window that is open."""
        return bool(self._window)

    def window(self) -> SampleCost:
        """The cost of the window that is over; the next one begins."""
        sparse = dense = 0
        noted, self._window = self._window, {}
        for number, method in enumerate(self._methods):
            for index, names in enumerate(method.owners.steps):
                if not names:
                    continue
                known = noted.get((number, index)) or self._without_step(method, names)
                if known.cost is None:
                    known.cost = self._priced(known)
                sparse, dense = sparse + known.cost[0], dense + known.cost[1]
        return SampleCost(sparse, dense, sparse + self._rest[1], dense + self._rest[1])

    def _without_step(self, method: Method, names: Sequence[str]) -> _Known:
        return _Known((0, 0), names, _of(names, WeightsInStep(method.weights.active_counts, {})))

    def _priced(self, known: _Known) -> tuple[int, int]:
        positions = {name: self._uses[name].forward for name in known.names if name in self._uses}
        dense = multiply_adds({name: self._sizes[name] for name in positions}, positions)
        return step_multiply_adds(known.counts, positions), 3 * dense

    # ------------------------------------------------------------------ inference

    def forward(self, active: Mapping[str, int]) -> SampleCost:
        """One forward pass, as inference needs it.

        Args:
            active: active weights of the sparse parameters by name.
        """
        positions = {name: self._uses[name].inference for name in active if name in self._uses}
        sparse = multiply_adds(active, positions)
        dense = multiply_adds({name: self._sizes[name] for name in active}, positions)
        return SampleCost(sparse, dense, sparse + self._rest[0], dense + self._rest[0])

    def similarities(self, method: Method) -> int:
        """Products of each input with each output of the sparse layers of a method, for one sample."""
        positions = {name: self._uses[name].inference for name in method.params if name in self._uses}
        return multiply_adds({name: self._sizes[name] for name in positions}, positions)


def _of(names: Sequence[str], counts: WeightsInStep) -> WeightsInStep:
    """A copy of the counts of these parameters alone: masks are about to move."""
    gradient = {name: counts.gradient[name] for name in names if name in counts.gradient}
    return WeightsInStep({name: counts.forward[name] for name in names}, gradient)
