"""Asks the checks of a run at their times, and gives each warning once."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparse_callbacks.core.calendar import SHORTEST_INTERVAL
from sparse_callbacks.core.doctor.at_start import why_slow, why_too_short, why_too_small
from sparse_callbacks.core.doctor.collapse import why_collapsing, why_no_path
from sparse_callbacks.core.doctor.first_signals import FirstSignals
from sparse_callbacks.core.doctor.gradient_noise import ELEMENTS, GradientNoise
from sparse_callbacks.core.doctor.movement import GrownWeights, StandingWeights, StuckMasks
from sparse_callbacks.core.doctor.remedies import remedy
from sparse_callbacks.core.doctor.warning import DoctorWarning
from sparse_callbacks.core.fresh_weights import layers_of_few_inputs
from sparse_callbacks.core.initial_masks import StartsSparse
from sparse_callbacks.core.inspection import is_compiled
from sparse_callbacks.core.method import Method
from sparse_callbacks.core.shards import WHOLE, layout_of
from sparse_callbacks.core.sparse_layers.moved_places import Move
from sparse_callbacks.core.step import ReplacesSteps, Step
from sparse_callbacks.core.topology import Update


class Doctor:
    """Warns, through the host, of what is measured to go wrong in a run: once each, also where the run is resumed.

    Args:
        method: the method of the run. What was said is kept in its ``aux``, under ``doctor/<name of the check>``.
        listener: called with the text of each warning.
    """

    def __init__(self, method: Method, listener: Callable[[str], object]) -> None:
        self._method, self._listener = method, listener
        self.forget()

    def forget(self) -> None:
        """A run begins or goes on."""
        self._signals: FirstSignals | None = None
        self._chain: tuple[str, ...] = ()
        self._stuck, self._standing = StuckMasks(), StandingWeights()
        self._grown, self._noise = GrownWeights(), GradientNoise()
        self.given: list[str] = []
        """The texts of the warnings that were given since."""

    def _say(self, name: str, text: str) -> None:
        method, key = self._method, f"doctor/{name}"
        if not text or key in method.aux:
            return
        method.aux[key] = torch.tensor(True)
        words = f"{key}: {type(method).__name__}: {text}. {remedy(name, method)}"
        method.host.warn(words, DoctorWarning)
        self.given.append(words)
        self._listener(words)

    # ------------------------------------------------------------------ a run begins

    def length_known(self, length: float) -> None:
        """A new run will have so many optimizer steps."""
        self._say("short_run", why_too_short(self._method, length))

    def begin(self) -> None:
        """Training begins: masks are written."""
        method = self._method
        self._say("slow_optimizer", why_slow(method.owners.optimizers))
        self._say("stuck_masks", why_too_small(method))
        if not method.progress.most() and not is_compiled(method.model):
            self._signals = FirstSignals(method)

    def end(self) -> None:
        """The run is over."""
        if self._signals is not None:
            self._signals.end()
        self._signals = None

    def _conclude_first_batch(self, signals: FirstSignals) -> None:
        method, self._chain = self._method, signals.chain()
        self.end()
        self._look_at_layers()
        # what can be said of the masks alone was said before the batch
        said = self._was_said("no_path") or layers_of_few_inputs(method, method.model)
        if isinstance(method, StartsSparse) and not said:
            self._say("faded_signals", signals.why_faded())

    # ------------------------------------------------------------------ a step, and an update

    @property
    def waits(self) -> bool:
        """The gradients of the coming step are wanted."""
        return self._signals is not None or self._noise.waits

    def look(self, step: Step) -> None:
        """Gradients are ready, and not masked yet."""
        if self._signals is not None:
            self._conclude_first_batch(self._signals)
        if self._noise.waits:
            held = self._method.weights.held_masks
            pruned = {name: ~held[name].flatten()[:ELEMENTS] for name in step.names if name in held}
            self._say("gradient_noise", self._noise.look(step, pruned))

    def note(self, name: str, move: Move) -> None:
        """An update has moved units of an exchanged layer."""
        if self._counts_grown:
            self._grown.moved(name, move)

    def masks_before(self, update: Update) -> dict[str, Tensor]:
        """The masks that an update is about to replace, as they are: the engine takes other tensors in their place."""
        held = self._method.weights.held_masks
        return {name: held[name] for name in update.masks if name in held}

    def updated(self, step: Step, before: Mapping[str, Tensor], figures: Mapping[str, float], changed: float) -> None:
        """An update is over.

        Args:
            step: the step that it follows or replaces.
            before: what :meth:`masks_before` gave.
            figures: figures of the update.
            changed: the share of connections that it has replaced.
        """
        method = self._method
        self._say("stuck_masks", self._stuck.look(changed, figures))
        self._say("zero_rate", self._standing.look(step.index, step.optimizer, changed))
        # of methods that replace a share of their weights: others let go of what they have grown by design
        if "update/drop_fraction" in figures and not self._is_sharded:
            if self._counts_grown:
                for name, mask in before.items():
                    self._grown.masked(name, mask, method.weights.held_masks[name])
                self._say("short_interval", self._grown.look(figures["update/drop_fraction"]))
            if isinstance(method, ReplacesSteps) and before and not self._was_said("gradient_noise"):
                self._say("gradient_noise", self._noise.updated(step.index))
        self._look_at_layers()

    @property
    def _counts_grown(self) -> bool:
        return self._method.times.every < SHORTEST_INTERVAL and not self._was_said("short_interval")

    @property
    def _is_sharded(self) -> bool:
        return any(layout_of(p) is not WHOLE for p in self._method.params.values())

    def _look_at_layers(self) -> None:
        """Whether signals still get through the network; paths are followed after updates 0, 1, 2, 4, ... and the last one."""
        method, number = self._method, self._method.updates
        self._say("collapse", why_collapsing(method.weights))
        ends = method.calendar is not None and method.progress.most() >= method.calendar.stop
        if self._chain and not (number & (number - 1) and not ends):
            self._say("no_path", why_no_path(self._chain, [method.weights], method.model))

    def epoch_over(self) -> None:
        """An epoch is over: gates close without updates, and an optimizer may not have stepped yet."""
        if self._signals is not None:
            self._conclude_first_batch(self._signals)
        if not self._method.updates:
            self._say("collapse", why_collapsing(self._method.weights))

    def _was_said(self, name: str) -> bool:
        return f"doctor/{name}" in self._method.aux
