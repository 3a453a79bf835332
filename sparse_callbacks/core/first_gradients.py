"""Sparse parameters that no gradient reaches, such as those of a mean teacher."""

from collections.abc import Iterable, Sequence

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
