"""What RigL, SET and SNFS share: at each update drop small weights, and grow as many elsewhere."""

from collections.abc import Sequence
from typing import ClassVar, Unpack

from torch import Tensor

from sparse_callbacks.core.calendar import Time
from sparse_callbacks.core.distributions import Distribution
from sparse_callbacks.core.ops import drop_and_grow, drop_count
from sparse_callbacks.core.schedules import Schedule, as_schedule
from sparse_callbacks.lightning.callback import Options, SparsityCallback


class DropAndGrow(SparsityCallback):
    """Sparse from the first step to the last; the number of active weights in a layer never changes.

    A subclass says when (``anchor``) and what to grow (:meth:`grow_scores`). The update comes after a gradient step unless
    the subclass replaces one.
    """

    schedulable: ClassVar[str] = "drop_fraction"
    explores = True

    def __init__(
        self,
        sparsity: float = 0.9,
        *,
        distribution: Distribution = "erdos_renyi_kernel",
        every: Time | None = None,
        start: Time = 0,
        stop: Time = 0.75,
        drop_fraction: float | str | Schedule = 0.3,
        include: str | Sequence[str] | None = None,
        exclude: str | Sequence[str] | None = None,
        seed: int = 0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(sparsity, distribution=distribution, include=include, exclude=exclude, seed=seed, **options)
        self.set_times(every, start, stop)
        self.drop_fraction = drop_fraction
        self._fraction = as_schedule(drop_fraction, "cosine", name="drop_fraction")
        for value in (self._fraction.initial, self._fraction.final):
            if not 0.0 <= value <= 1.0:
                raise ValueError(
                    f"drop_fraction={drop_fraction!r} leaves [0, 1]: it is the fraction of a layer's active weights that an update "
                    "replaces. The published value is 0.3."
                )

    @property
    def fraction(self) -> float:
        """Drop fraction now."""
        return self._fraction(self.step, self.times.start, self.times.stop)

    def after_step(self) -> None:
        if self.due():
            self.update()

    def update(self) -> None:
        self.move_masks(drop_fraction=self.fraction)

    def grow_scores(self, name: str) -> Tensor | None:
        """Score of every position of a parameter, by magnitude; None: leave its mask alone in this update."""
        raise NotImplementedError

    def new_masks(self) -> dict[str, Tensor]:
        fraction, new = self.fraction, {}
        for name in self.names:
            if (scores := self.grow_scores(name)) is not None:
                new[name] = self.store.by_layer(
                    name,
                    lambda _, mask, drop, grow: drop_and_grow(mask, drop, grow, drop_count(int(mask.count_nonzero()), fraction)),
                    self.store.bools[name], self.params[name].detach(), scores,
                )  # fmt: skip
        return new
