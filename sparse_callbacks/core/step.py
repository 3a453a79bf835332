"""One optimizer step: what a method may know of it, and do to it."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_callbacks.core.calendar import Calendar
from sparse_callbacks.core.gradients import DenseGradients
from sparse_callbacks.core.live.live_growth import largest_in_layer
from sparse_callbacks.core.optimizers import Ownership
from sparse_callbacks.core.progress import Progress
from sparse_callbacks.core.weights import SparseWeights


class Step:
    """One optimizer step, as the hooks of a method see it: gradients, counters, and whether an update falls now.

    The engine makes one when gradients are ready and keeps it until the optimizer has stepped (or a GradScaler has
    skipped the step). Every hook that has to do with a step gets it as an argument, so nobody can ask for a step
    outside of one.

    Args:
        index: number of the optimizer in the run.
        tick: number of the optimizer step in the run, replaced and skipped steps included.
        owners: the optimizers and the parameters that each of them owns.
        weights: masks and parameters.
        progress: steps counted and updates done.
        calendar: when updates fall; None for a method that has none.
        gradients: dense gradients of the current step.
        gradients_are_read: whether something, such as clipping, reads gradients between backward and the optimizer's step.
    """

    __slots__ = (
        "_asked",
        "_calendar",
        "_gradients",
        "_gradients_are_read",
        "_owners",
        "_progress",
        "_weights",
        "finite_flag",
        "group_numbers",
        "index",
        "masked_gradients",
        "masking",
        "names",
        "optimizer",
        "rates",
        "replaced",
        "skipped",
        "taken",
        "tick",
    )

    def __init__(
        self,
        index: int,
        tick: int,
        owners: Ownership,
        weights: SparseWeights,
        progress: Progress,
        calendar: Calendar | None,
        gradients: DenseGradients,
        gradients_are_read: bool,
    ) -> None:
        self.index = index
        """Number of the optimizer in the run."""
        self.tick = tick
        """Number of this optimizer step in the run, replaced and skipped ones included."""
        self.optimizer: Optimizer = owners.optimizers[index]
        self.names: Sequence[str] = owners.owns[index]
        """Names of the sparse parameters whose masks move on this optimizer's calendar."""
        self.finite_flag: Tensor | bool = True
        """:attr:`finite`, as a tensor that nobody has waited for yet where gradients are on another device than the
        CPU."""
        self.replaced = False
        """An update of the masks takes the place of this step."""
        self.masked_gradients = False
        """Gradients of pruned weights were zeroed."""
        self.group_numbers: list[dict[str, float]] = []
        """Numbers of the optimizer's groups when the gradients were taken away; empty for a step with gradients."""
        self.taken = False
        """The optimizer has stepped."""
        self.skipped = False
        """The optimizer has not stepped: a GradScaler skipped it."""
        self.rates: Sequence[float] | None = None
        """Learning rates of the optimizer's groups in this step alone (:meth:`use_rates`); None: as the user set them."""
        self._asked: bool | None = None
        self.masking = False
        """mask_gradients() was called: from then on p.grad may be dense, masked or clipped, by who else reads it."""
        self._owners, self._weights, self._progress = owners, weights, progress
        self._calendar, self._gradients, self._gradients_are_read = calendar, gradients, gradients_are_read

    @property
    def number(self) -> int:
        """Gradient steps that this optimizer has taken, this one included once it was taken.

        Steps that an update replaced do not count.
        """
        return self._progress.counts[self.index].read()

    @property
    def calendar(self) -> Calendar:
        """When updates fall, in optimizer steps.

        Raises:
            RuntimeError: the method keeps no time arguments.
        """
        if self._calendar is None:
            raise RuntimeError("this method has no calendar: it keeps no time arguments (see Method.set_times).")
        return self._calendar

    @property
    def due(self) -> bool:
        """An update falls now, and the gradient is finite."""
        if self._asked is not None:
            return self._asked and self.finite
        return self._progress.due(self.index, self.calendar) and self.finite

    @property
    def may_be_due(self) -> bool:
        """False where no update can fall now, found without asking the device."""
        return self._progress.may_be_due(self.index) if self._asked is None else self._asked

    def call_for_update(self, wanted: bool) -> None:
        """Let an update fall in this step, or none, whatever the calendar says. Call it before anybody asks :attr:`due`.

        Args:
            wanted: whether an update falls in this step.
        """
        self._asked = wanted

    def use_rates(self, rates: Sequence[float]) -> None:
        """Let the optimizer take this step with other learning rates; afterwards it has its own again.

        A method that calls it, in ``before_step``, says so with :class:`SetsRates`.

        Args:
            rates: a rate for each group of parameters.
        """
        self.rates = rates

    @property
    def finite(self) -> bool:
        """No gradient of a sparse weight holds inf or NaN. Waits for the device; :attr:`finite_flag` does not."""
        return bool(self.finite_flag)

    def gradient(self, name: str) -> Tensor | None:
        """Dense gradient of a sparse parameter, also where an update has taken it from the optimizer; None without one.

        Args:
            name: name of the parameter.

        Raises:
            RuntimeError: the gradients of this step were masked already, so the dense one is gone.
        """
        if self.masking and not self._weights.has_copy(name) and not self._gradients.has_kept(name):
            raise RuntimeError(
                f"the dense gradient of {name} is gone: step.mask_gradients() was called before. Read it in "
                "before_step(step), before super().before_step(step) or step.mask_gradients(), and keep what after_step "
                "needs of it."
            )
        return self._gradients.of(name, self.optimizer, self.tick)

    def largest_units(
        self,
        name: str,
        kept: Tensor,
        count: int,
        candidates: int | None = None,
        source: torch.Generator | None = None,
        full: bool = False,
    ) -> Tensor | None:
        """Keys of the units of an exchanged layer with the largest gradients over all ranks, ascending.

        None where the layer has no gradient, or one that came from no backward pass that was seen.

        Args:
            name: the name of the layer's weight.
            kept: ascending keys of the units that are not to be among them.
            count: how many; of a grouped layer in each block of rows.
            candidates: among how many that are drawn at random, of a grouped layer in each block; None: among all.
            source: the generator of that draw; None without one.
            full: whether each block gets as many as it lacks of ``count``, whatever it keeps; not among candidates.
        """
        gradient, layer = self.gradient(name), self._weights.layers_stored[name]
        return None if gradient is None else largest_in_layer(layer, gradient, kept, count, candidates, source, full)

    def mask_gradients(self) -> None:
        """Zero the gradients of pruned weights, unless nobody reads them before the step: masking the weights is enough then.

        Parameters with a dense copy keep theirs.
        """
        self.masking = True
        # momentum would keep an inf for ever, so a gradient that is known to hold one is always masked
        if self._gradients_are_read or self.finite_flag is False:
            for name in self.names:
                if not self._weights.has_copy(name):
                    self.masked_gradients = True
                    self._weights.mask_gradient(name)

    def replace(self) -> None:
        """Let an update of the masks take the place of this step: no parameter of the optimizer moves, nor does its state.

        The host takes the gradients away as late as it can, so that others who read them before the step still find
        them. A method that calls it says so with :class:`ReplacesSteps`.
        """
        self.replaced = True

    def clear_state(self, name: str, where: Tensor) -> None:
        """Give a parameter the optimizer state of fresh weights at some positions: momentum 0, for example.

        Args:
            name: name of the parameter.
            where: bool, of the parameter's shape: the positions.
        """
        self._owners.clear(name, where)


class MeasuresSimilarity:
    """A method whose passes over the data compare each input of a layer with each of its outputs."""


class SetsRates:
    """A method that gives the learning rates of some steps (:meth:`Step.use_rates`)."""


class ReplacesSteps:
    """A method some of whose updates take the place of a step (:meth:`Step.replace`).

    It is refused before the first batch where an optimizer does anything in a step without gradients.
    """
