"""Sparse parameters that no gradient reaches, such as those of a mean teacher."""

from collections.abc import Iterable, Sequence

from sparse_callbacks.core.method import Method
from sparse_callbacks.core.step import Step

STEPS = 100
"""Optimizer steps after which a parameter without a gradient is named."""


class FirstGradients:
    """Looks in the first steps of a run which sparse parameters have no gradient in any of them.

    Args:
        optimizers: number of optimizers of the run; with 0 nothing is looked at.
        steps: number of steps of each optimizer that are looked at.
    """

    def __init__(self, optimizers: int, steps: float) -> None:
        self.looks_at = set(range(optimizers))
        """The optimizers with parameters that have had no gradient yet."""
        self._steps = min(steps, STEPS)
        self._looks: dict[int, int] = {}
        self._silent: dict[int, Sequence[str]] = {}

    def look(self, step: Step) -> list[str]:
        """Look at the gradients of a step before they are masked, of an optimizer in :attr:`looks_at`.

        Returns:
            Names of the parameters to warn of: those without a gradient, once all optimizers have taken enough steps.
        """
        index = step.index
        self._silent[index] = [n for n in self._silent.get(index, step.names) if step.gradient(n) is None]
        self._looks[index] = self._looks.get(index, 0) + 1
        if not self._silent[index]:
            self.looks_at.discard(index)  # from now on a step costs a look into a set
        # one warning for all: an optimizer with few steps is waited for, one that has not begun is not
        return self.end() if all(self._looks[i] >= self._steps for i in self._looks.keys() & self.looks_at) else []

    def end(self) -> list[str]:
        """The first epoch is over: names of the parameters to warn of, in the steps of whose optimizer they had no
        gradient."""
        named = [name for index in sorted(self.looks_at & self._silent.keys()) for name in self._silent[index]]
        self.looks_at -= self._looks.keys()
        return named

    def words(self, silent: Sequence[str], sparse: Iterable[str], method: str) -> str:
        """A warning of parameters without a gradient.

        Args:
            silent: names of these parameters.
            sparse: names of all sparse parameters.
            method: name of the method.
        """
        looks = max(self._looks.values(), default=0)
        return (
            f"{method} makes {', '.join(silent)} sparse, and they had no gradient in any of the first {looks} steps. "
            "Where an average or a copy moves them, as in a mean teacher or a momentum encoder, masks of their own cut "
            f"what they are given: leave them out with exclude={globs_for(silent, sparse)}. Where their layers are used "
            "later, nothing is wrong."
        )


class SilenceWarning:
    """Warns of sparse parameters that have no gradient in the first steps of a run.

    Args:
        method: the method of the run.
    """

    def __init__(self, method: Method) -> None:
        self._method, self._first = method, FirstGradients(0, 0)

    def expect(self, epoch: int, steps: float) -> None:
        """Training begins: warn when enough steps are over, or the first epoch.

        Args:
            epoch: the epoch (from 0) that begins or goes on.
            steps: the number of optimizer steps in an epoch, as far as it is known.
        """
        # the first run has said it
        resumed = self._method.saved is not None and (epoch > 0 or self._method.step >= STEPS)
        self._first = FirstGradients(0 if resumed else len(self._method.owners.optimizers), steps)

    def look(self, step: Step) -> None:
        """Look at the gradients of a step before they are masked."""
        if step.index in self._first.looks_at:
            self._warn(self._first.look(step))

    def epoch_over(self) -> None:
        """An epoch is over; of interest is the first one."""
        self._warn(self._first.end())

    def _warn(self, names: Sequence[str]) -> None:
        if names:
            method = self._method
            method.host.warn(self._first.words(names, method.params, type(method).__name__))


def globs_for(chosen: Sequence[str], names: Iterable[str]) -> list[str]:
    """Few globs that match all ``chosen`` of ``names`` and no other: of whole modules where that is possible."""
    others = set(names) - set(chosen)
    found: dict[str, None] = {}
    for name in chosen:
        parts = name.split(".")
        modules = (".".join([*parts[:depth], ""]) for depth in range(1, len(parts)))
        whole = next((m for m in modules if not any(other.startswith(m) for other in others)), None)
        found[name if whole is None else f"{whole}*"] = None
    return list(found)
